"""``rmoe eval --tasks`` with the harness: its requests, its figures, what is told of them, and what is found late."""

import json
import math
import shutil
import socket
import statistics
from fractions import Fraction
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rmoe_megablocks import cli
from rmoe_megablocks.conversion.folder import tokenizers
from rmoe_megablocks.evaluation.tasks import building, known, rows, running
from rmoe_megablocks.huggingface import RmoeForCausalLM
from tests.evaluation.made import folder
from tests.evaluation.tasks import sets
from tests.evaluation.tasks.sets import ALL, ARC, LAMBADA, PIQA, PREPARED, SCIQ, STOCK
from tests.evaluation.test_sentencepiece import trained

LONGEST = 64  # some of the questions are longer
TRAIN = {f"{task}_train": list(reversed(STOCK[task])) for task in STOCK if task != "lambada_openai"}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The harness asks pip and others about the machine, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("made") / "hf", max_position_embeddings=LONGEST)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    return sets.folder(tmp_path_factory.mktemp("rows"), **TRAIN)


def evaluate(tmp_path, capsys, *words) -> tuple[dict, str]:
    """The result's file and the table."""
    assert cli.main(["eval", *map(str, words), "--out", str(tmp_path / "result.json")]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    return json.loads((tmp_path / "result.json").read_text()), table


def refused_late(capsys, *words) -> str:
    """The one line of an error, below the one that tells of the loading."""
    assert cli.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("rmoe:")]
    assert not out and lines[0] == "rmoe: loading lm-evaluation-harness" and len(lines) == 2, (out, err)
    assert "Traceback" not in err
    return lines[1]


def weights(place: Path, change) -> None:
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


# what the definitions ask, written out: (question, answers, which of them is right)
QUESTIONS = {
    "arc_easy": [
        (f"Question: {r['question']}\nAnswer:", r["choices"]["text"], r["choices"]["label"].index(r["answerKey"]))
        for r in ARC
    ],
    "hellaswag": [(r["query"], r["choices"], r["gold"]) for r in PREPARED],
    "piqa": [(f"Question: {r['goal']}\nAnswer:", [r["sol1"], r["sol2"]], r["label"]) for r in PIQA],
    "sciq": [
        (
            f"{r['support'].lstrip()}\nQuestion: {r['question']}\nAnswer:",
            [r["distractor1"], r["distractor2"], r["distractor3"], r["correct_answer"]],
            3,
        )
        for r in SCIQ
    ],
}
LAST = [tuple(r["text"].rsplit(" ", 1)) for r in LAMBADA]


@torch.no_grad()
def score(model, question: str, answer: str) -> tuple[float, bool]:
    """(log-likelihood of " answer" in bytes, whether greedy decoding gives it), in double precision and alone."""
    tokens, length = list(f"{question} {answer}".encode())[-LONGEST - 1 :], len(f" {answer}".encode())
    scores = model(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)[-length:]
    wanted = torch.tensor(tokens[-length:])
    return scores.gather(1, wanted[:, None]).sum().item(), bool((scores.argmax(-1) == wanted).all())


def best(values: list) -> int:
    return values.index(max(values))


def test_all_five_without_network(made, local, tmp_path, capsys, monkeypatch):
    tried = []
    monkeypatch.setattr(socket.socket, "connect", lambda *args: tried.append(args))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: tried.append(args) or [])
    result, table = evaluate(tmp_path, capsys, made, "--tasks", ALL, "--data-dir", local)
    assert not tried
    model = RmoeForCausalLM.from_pretrained(made).eval()
    right: dict[str, dict[str, list[int]]] = {}
    for task, questions in QUESTIONS.items():
        right[task] = {"acc": [], "acc_norm": []}
        for question, answers, gold in questions:
            values = [score(model, question, answer)[0] for answer in answers]
            right[task]["acc"].append(int(best(values) == gold))
            normed = [value / len(answer) for value, answer in zip(values, answers, strict=True)]
            right[task]["acc_norm"].append(int(best(normed) == gold))
    last = [score(model, *pair) for pair in LAST]
    right["lambada_openai"] = {"acc": [int(greedy) for _, greedy in last]}
    errors = {}
    for task, metrics in right.items():
        found = result["results"][task]
        assert result["n-samples"][task] == {"original": len(STOCK[task]), "effective": len(STOCK[task])}
        for metric, values in metrics.items():
            errors[task, metric] = statistics.stdev(values) / math.sqrt(len(values))
            assert found[f"{metric},none"] == pytest.approx(statistics.mean(values)), (task, metric)
            assert found[f"{metric}_stderr,none"] == pytest.approx(errors[task, metric]), (task, metric)
    perplexity = math.exp(-statistics.mean(value for value, _ in last))
    assert result["results"]["lambada_openai"]["perplexity,none"] == pytest.approx(perplexity, rel=1e-3)
    assert result["results"]["lambada_openai"]["perplexity_stderr,none"] > 0
    ours, averaged = result["rmoe"], dict.fromkeys(STOCK, "acc") | {"hellaswag": "acc_norm"}
    assert ours["averaged"] == averaged and not ours["partial"]
    mean = statistics.mean(statistics.mean(right[task][metric]) for task, metric in averaged.items())
    assert ours["mean"] == pytest.approx(mean)
    assert ours["mean_stderr"] == pytest.approx(math.hypot(*(errors[pair] for pair in averaged.items())) / 5)
    assert f"{ours['mean']:.4f}  {ours['mean_stderr']:>11.4f}" in table
    long = {
        task: sum(len(f"{question} {answer}".encode()) > LONGEST + 1 for question, answers, _ in questions
                  for answer in answers)
        for task, questions in QUESTIONS.items()
    }  # fmt: skip
    long["lambada_openai"] = sum(len(row["text"].encode()) > LONGEST + 1 for row in LAMBADA)
    assert ours["cut_requests"] == long and 0 < sum(long.values())
    plain = " ".join(table.split())
    assert f"lambada_openai: {long['lambada_openai']} requests are longer than the model's 64 positions" in plain
    assert "piqa: 4 rows of validation; the stock task scores 1,838 of validation" in plain
    for line in table.splitlines():
        if "acc" in line.split() or "acc_norm" in line.split() or "perplexity" in line:
            value, error = line.removesuffix(" *").split()[-3:-1]
            assert float(value) >= 0 and float(error) >= 0


def test_equal_scores_take_the_shortest_answer(made, local, tmp_path, capsys):
    """A model to whom all tokens are alike: what it gets is what the rule of ties gives. The first of equals wins."""
    place = shutil.copytree(made, tmp_path / "flat")
    weights(place, lambda tensors: tensors["lm_head.weight"].zero_())
    result, _ = evaluate(tmp_path, capsys, place, "--tasks", ALL, "--data-dir", local)
    for task, questions in QUESTIONS.items():
        sizes = [([len(f" {answer}".encode()) for answer in answers], answers, gold) for _, answers, gold in questions]
        acc = [int(best([-size for size in found]) == gold) for found, _, gold in sizes]
        norm = [
            int(best([-Fraction(size, len(answer)) for size, answer in zip(found, answers, strict=True)]) == gold)
            for found, answers, gold in sizes
        ]
        assert result["results"][task]["acc,none"] == pytest.approx(statistics.mean(acc)), task
        assert result["results"][task]["acc_norm,none"] == pytest.approx(statistics.mean(norm)), task
    # greedy decoding of ties is byte 0, which is in no word
    assert result["results"]["lambada_openai"]["acc,none"] == 0
    size = statistics.mean(len(f" {word}".encode()) for _, word in LAST)
    assert result["results"]["lambada_openai"]["perplexity,none"] == pytest.approx(256**size, rel=1e-4)


def stock(task: str, monkeypatch, splits: dict[str, list[dict]]):
    """The harness's own task; its download gives ``splits``."""
    made = datasets.DatasetDict({split: datasets.Dataset.from_list(found) for split, found in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: made)
    where = Path(lm_eval.tasks.__file__).parent / known.TASKS[task].folder
    return TaskManager(include_defaults=False, include_path=[where]).load(task)["tasks"][task]


def requests(task, shots: int) -> tuple[list, list]:
    """Every request, context and continuation, with the right answers of the questions."""
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests(rank=0, world_size=1)
    return [(one.doc_id, one.idx, one.args) for one in task.instances], [
        task.doc_to_target(row) for row in task.eval_docs
    ]


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("task, prepared", [*((task, False) for task in STOCK), ("hellaswag", True)])
def test_requests_are_those_of_the_stock_task(tmp_path, monkeypatch, task, prepared, shots):
    if shots and task == "lambada_openai":
        shots = 0  # refused
    train = list(reversed(STOCK[task]))
    theirs = stock(task, monkeypatch, {sets.SCORED[task]: STOCK[task], "train": train, "validation": STOCK[task]})
    place = sets.folder(tmp_path / "rows", **TRAIN)
    if prepared:
        sets.folder(place, hellaswag_validation=PREPARED, hellaswag_train=list(reversed(PREPARED)))
    ours = building.of_rows(building.manager(), rows.find(place, task, shots))
    found, expected = requests(ours, shots), requests(theirs, shots)
    assert found == expected and len(found[0]) > len(found[1]) * (task != "lambada_openai")
    assert ours.VERSION == theirs.VERSION and ours.config.metric_list == theirs.config.metric_list


def test_rows_of_the_hub(made, local, tmp_path, capsys, monkeypatch):
    """The stock sets, downloaded, are asked as the same rows from files are, examples included."""
    asked = []

    def load_dataset(path, name=None, **_):
        asked.append((path, name))
        found = ARC if name else SCIQ
        return datasets.DatasetDict(
            {"test": datasets.Dataset.from_list(found), "train": datasets.Dataset.from_list(list(reversed(found)))}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    words = [made, "--tasks", "arc_easy,sciq", "--num-fewshot", 2]
    of_hub, table = evaluate(tmp_path, capsys, *words)
    assert asked == [("allenai/ai2_arc", "ARC-Easy"), ("allenai/sciq", None)]
    assert "2-shot" in table and "stock task scores" not in table
    of_files, _ = evaluate(tmp_path, capsys, *words, "--data-dir", local)
    assert len(asked) == 2
    assert of_hub["results"] == of_files["results"] and of_hub["task_hashes"] == of_files["task_hashes"]

    def unreachable(**_):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(running.loading, "model", None)  # not reached
    said = refused_late(capsys, "eval", *words)
    assert "the stock set of arc_easy could not be loaded (no route): --data-dir" in said


def test_a_sentencepiece_folder_as_the_harness_itself(local, tmp_path, capsys, monkeypatch):
    """The harness loads the folder by itself, without the folder's code, to the same figures."""
    place = folder(tmp_path / "hf", vocab_size=400, max_position_embeddings=LONGEST)
    tokenizers.write(tokenizers.choose(None, str(trained(tmp_path / "pieces", 0))), place, LONGEST)
    names = ["arc_easy", "lambada_openai"]
    words = [place, "--tasks", ",".join(names), "--data-dir", local, "--limit", 2, "--batch-size", 3]
    ours, table = evaluate(tmp_path, capsys, *words)
    assert "PARTIAL (--limit): the first 2 rows" in table and ours["rmoe"]["partial"]
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    knowing = building.manager()
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(place)},
        tasks=[building.of_rows(knowing, rows.find(local, name, 0)) for name in names],
        task_manager=knowing,
        device="cpu",
        batch_size=3,
        limit=2,
        bootstrap_iters=1000,
    )
    assert ours["results"] == theirs["results"]
    assert set(theirs) - {"samples"} < set(ours)


def gpt2(place: Path, size: int) -> Path:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(place)
    return place


def test_another_causal_model_and_words_it_does_not_know(local, tmp_path, capsys):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "Question": 1, "Answer": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    place = gpt2(tmp_path / "gpt2", 3)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(place)
    result, table = evaluate(tmp_path, capsys, place, "--tasks", "piqa", "--data-dir", local)
    assert result["rmoe"]["unknown_requests"] == {"piqa": 2 * len(PIQA)} and "mean of the" not in table
    assert "piqa: 8 requests have tokens that the tokenizer does not know" in " ".join(table.split())


def test_what_is_found_late(made, local, tmp_path, capsys, monkeypatch):
    words = ["--tasks", "piqa", "--data-dir", local]
    small = gpt2(tmp_path / "gpt2", 100)
    tokenizers._bytes(None).save_pretrained(small)
    assert "piqa: the tokenizer gives the id " in refused_late(capsys, "eval", small, *words)
    broken = shutil.copytree(made, tmp_path / "broken")
    weights(broken, lambda tensors: tensors["lm_head.weight"].fill_(math.nan))
    assert "a log-likelihood of piqa is nan" in refused_late(capsys, "eval", broken, *words)
    weights(broken, lambda tensors: tensors.pop("model.norm.weight"))
    assert "missing_keys" in refused_late(capsys, "eval", broken, *words)
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    assert "has no tokenizer" in refused_late(capsys, "eval", broken, *words)
    long = sets.folder(tmp_path / "long", piqa_validation=[PIQA[0] | {"sol1": "x" * LONGEST}, PIQA[1]])
    said = refused_late(capsys, "eval", made, "--tasks", "piqa", "--data-dir", long)
    assert "piqa: an answer takes 65 tokens, the model has 64 positions" in said
    mixed = sets.folder(tmp_path / "mixed", piqa_validation=[PIQA[0] | {"id": 1}, PIQA[1] | {"id": "b"}])
    said = refused_late(capsys, "eval", made, "--tasks", "piqa", "--data-dir", mixed)
    assert "piqa_validation.jsonl: a field that the task does not read is of different types" in said

    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "simple_evaluate", interrupted)
    out = tmp_path / "none.json"
    assert cli.main(["eval", str(made), "--tasks", "piqa", "--data-dir", str(local), "--out", str(out)]) == 130
    assert not out.exists()
