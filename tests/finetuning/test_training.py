"""What is trained, by which gradient, and what of it reaches the folder."""

import copy
import json
import os
import signal
import stat

import pytest
import torch
from torch.nn import functional as F

from rmoe_megablocks.conversion.folder.checksums import check_checksums
from rmoe_megablocks.evaluation import loading
from rmoe_megablocks.finetuning import examples, rows, running, settings, training
from rmoe_megablocks.finetuning.examples import LEFT_OUT
from rmoe_megablocks.huggingface.layers import balancing
from tests.finetuning.made import LENGTH, ROWS, finetune, parsed, tiny, written

STEPS = 20
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder and a file of rows."""
    place = tmp_path_factory.mktemp("made")
    return tiny(place / "hf"), written(place / "rows.json")


def trainer_of(made, out, *words):
    """(trainer, all rows as one batch) for arguments."""
    args = parsed(made[0], "--data", made[1], "--out", out, "--global-batch-size", len(ROWS), *words)
    loading.prepare(made[0])
    settings.complete(args, loading.config(made[0]))
    tokenizer = loading.tokenizer(made[0])
    found = examples.make(rows.read(made[1]), tokenizer, args.seq_length)
    model = loading.model(made[0], torch.float32, torch.device("cpu"))
    trainer = running.make_trainer(args, out, model, tokenizer, found)
    model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer, trainer.data_collator(
        [dict(input_ids=i, labels=n) for i, n in zip(found.ids, found.labels, strict=True)]
    )


def labels_in(batch) -> int:
    return int((batch["labels"][:, 1:] != LEFT_OUT).sum())


def gradients(trainer, *batches, total=None) -> dict[str, torch.Tensor]:
    """Of the trainer's loss of a step of these batches."""
    trainer.model.zero_grad()
    total = total or sum(map(labels_in, batches))
    for batch in batches:
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(total)).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def response_loss(model, batch) -> torch.Tensor:
    """Mean over the labels, by torch alone."""
    with torch.no_grad() if not model.training else torch.enable_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=LEFT_OUT)


def equal(ours, theirs, tolerance=1e-6):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=name)


def test_a_prompt_label_has_no_gradient(made, tmp_path):
    trainer, batch = trainer_of(made, tmp_path, "--aux-loss", 0)
    before_head = []
    trainer.model.model.norm.register_forward_hook(lambda _, __, out: (out.retain_grad(), before_head.append(out))[0])
    found = gradients(trainer, batch)
    at_BS = before_head[0].grad.abs().amax(-1)
    predicts_BS = F.pad(batch["labels"][:, 1:] != LEFT_OUT, (0, 1))
    assert (at_BS[~predicts_BS] == 0).all() and (at_BS[predicts_BS] > 0).all()
    for row, labels in zip(ROWS, batch["labels"], strict=True):
        assert bytes(labels[labels != LEFT_OUT].tolist()) == row["output"].encode() + b"\0"
    trainer.model.zero_grad()
    response_loss(trainer.model, batch).backward()
    equal(found, {name: p.grad for name, p in trainer.model.named_parameters()})


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_auxiliary_loss_is_the_models_own_with_checkpointing_too(made, tmp_path, reduction, monkeypatch):
    found = {}
    for words in ((), ("--gradient-checkpointing",)):
        trainer, batch = trainer_of(made, tmp_path, "--aux-loss", 0.5, *words)
        trainer.model.config.router_aux_loss_reduction = reduction
        assert trainer.model.model.layers[0].gradient_checkpointing is bool(words)
        found[words] = gradients(trainer, batch)
    equal(found[()], found["--gradient-checkpointing",])
    model = trainer.model
    model.gradient_checkpointing_disable()
    model.zero_grad()
    outputs = model.model(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    aux = balancing.load_balancing_loss(outputs.router_logits, model.config, batch["attention_mask"])
    (response_loss(model, batch) + 0.5 * aux).backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters()}
    equal(found[()], theirs)
    trainer.own_aux_loss = 0.0
    without = gradients(trainer, batch)
    router = "model.layers.2.mlp.router.layer.router"
    assert (without[router] - theirs[router]).abs().max() > 1e-3  # what is compared is there


def test_a_step_is_a_mean_over_its_labels(made, tmp_path):
    """Micro-batches of different numbers of labels."""
    trainer, batch = trainer_of(made, tmp_path, "--aux-loss", 0)
    batch["labels"][0, :-3] = LEFT_OUT
    parts = [{name: tensor[begin:end] for name, tensor in batch.items()} for begin, end in ((0, 1), (1, 8))]
    equal(gradients(trainer, batch), gradients(trainer, *parts))
    with pytest.raises(RuntimeError, match="not counted"):
        trainer.compute_loss(trainer.model, dict(batch))


def test_finetuning(made, tmp_path, capsys):
    """The loss falls, the router is what it was, all else has moved, and the folder is what the figures say."""
    out = tmp_path / "out"
    words = ["--max-steps", STEPS, "--lr", 0.01, "--global-batch-size", 8, "--freeze-router", "--seed", 3]
    assert finetune(made[0], "--data", made[1], "--out", out, *words) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == f"{out}: {STEPS} steps, 8 rows, 72 labels an epoch"
    assert max(len(line) for line in captured.out.replace(str(out), "DIR").splitlines()) <= 80
    assert check_checksums(out) and not list(tmp_path.glob("*.partial"))
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) & 0o044
    before, after = (loading.model(place, torch.float32, torch.device("cpu")) for place in (made[0], out))
    assert (out / "modeling_rmoe.py").is_file()
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    router = {name for name in old if "router" in name}
    assert {"model.layers.1.mlp.router.layer.projector", "model.layers.2.mlp.router.layer.router"} <= router
    assert "model.shared_router.weight_hh" in " ".join(router)
    for name in old:
        assert torch.equal(old[name], new[name]) is (name in router), name
    _, batch = trainer_of(made, tmp_path / "t")
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, STEPS + 1)) and summary["iterations"] == STEPS
    first, last = (response_loss(model, batch).item() for model in (before, after))
    assert summary["first_lm_loss"] == lines[0]["lm_loss"] == pytest.approx(first, abs=1e-5)
    assert last < lines[-1]["lm_loss"] < first / 2
    assert summary["tokens"] == STEPS * int(batch["attention_mask"].sum())
    said, now = (json.loads((place / "config.json").read_text()) for place in (made[0], out))
    changed = {"auto_map": now["auto_map"], "eos_token_id": 0}
    assert now == said | changed  # TRL's own settings are not in it
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0


def test_the_steps_of_the_trainer(made, tmp_path):
    """Micro-batches, or all rows at once: the same weights."""
    weights = {}
    for size in (8, 2):
        trainer, _ = trainer_of(
            made, tmp_path, "--aux-loss", 0, "--max-steps", 2, "--lr", 1e-3, "--micro-batch-size", size
        )
        trainer.train()
        weights[size] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    equal(weights[8], weights[2], 1e-5)
    start = loading.model(made[0], torch.float32, torch.device("cpu")).state_dict()
    assert max((start[name] - weights[2][name]).abs().max() for name in weights[2]) > 5e-4


def test_a_signal_and_resume(made, tmp_path, capsys, monkeypatch):
    """Stopped after step 2 of 4, with a newer checkpoint that a kill has cut, it ends in the same bits."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["--data", made[1], "--max-steps", 4, "--lr", 0.01, "--global-batch-size", 4]
    assert finetune(made[0], "--out", whole, *words) == 0

    class Signalled(training.Telling):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().on_step_end(args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(running, "Telling", Signalled)
        assert finetune(made[0], "--out", cut, *words) == 130
    assert "stopped after step 2" in capsys.readouterr().err and not cut.exists()
    assert finetune(made[0], "--out", cut, *words) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert finetune(made[0], "--out", cut, *words, "--lr", 0.02, "--resume") == 2
    assert "--lr is 0.02, and was 0.01" in capsys.readouterr().err
    place = tmp_path / "cut.partial"
    (place / "checkpoints" / "checkpoint-3").mkdir()
    with (place / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "iteration": 3, "tokens": 9}\n{"kind"')
    assert finetune(made[0], "--out", cut, *words, "--resume") == 0
    for name in ("model.safetensors", "config.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    figures = [
        [line["lm_loss"] for line in map(json.loads, (place / "metrics.jsonl").read_text().splitlines())]
        for place in (whole, cut)
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 4
    capsys.readouterr()
    assert finetune(made[0], "--out", cut, *words, "--resume") == 0
    assert "is finished" in capsys.readouterr().out


def test_another_model(made, tmp_path, capsys):
    """One of the library's with experts: its own balancing loss is added, and told apart."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        **dict(vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2),
        **dict(num_key_value_heads=2, num_local_experts=4, max_position_embeddings=LENGTH, router_aux_loss_coef=0.1),
    )
    place = tmp_path / "mixtral"
    MixtralForCausalLM(config).save_pretrained(place)
    for path in made[0].glob("token*"):
        (place / path.name).write_bytes(path.read_bytes())
    words = ["--data", made[1], "--out", tmp_path / "out", "--max-steps", 1, "--global-batch-size", 8]
    assert finetune(place, *words, "--micro-batch-size", 4) == 0
    (line,) = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    _, batch = trainer_of(made, tmp_path / "t")
    model = MixtralForCausalLM.from_pretrained(place).eval()
    assert line["lm_loss"] == pytest.approx(response_loss(model, batch).item(), abs=1e-5)
    assert 1 < line["aux_loss"] < 4
    said, now = (json.loads((folder / "config.json").read_text()) for folder in (place, tmp_path / "out"))
    assert now == said | {"eos_token_id": [2, 0]}


def test_a_loss_that_is_not_finite(made, tmp_path, capsys):
    model = copy.deepcopy(loading.model(made[0], torch.float32, torch.device("cpu")))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    place = tmp_path / "hf"
    model.save_pretrained(place)
    for path in made[0].glob("token*"):
        (place / path.name).write_bytes(path.read_bytes())
    assert finetune(place, "--data", made[1], "--out", tmp_path / "out", "--max-steps", 2) == 2
    assert "step 1: lm_loss is nan" in capsys.readouterr().err and not (tmp_path / "out").exists()
