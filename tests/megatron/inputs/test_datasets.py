"""The data that a run names: what is read from it before training, what is left out, and what is refused."""

import json

import numpy as np
import pytest

from rmoe_megablocks import data
from rmoe_megablocks.data.prepared.indexed import SplitWriter
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import preflight
from rmoe_megablocks.megatron.inputs import batches, blends, datasets
from tests.distributed.arguments import BASE

SEQUENCE = 32  # of BASE
WORDS = [word for word in BASE if word != "--mock-data"]
TOKENIZER = WORDS.index("--tokenizer-type")
UNTOKENIZED = WORDS[:TOKENIZER] + WORDS[TOKENIZER + 2 :]
VOCABULARY = UNTOKENIZED.index("--vocab-size")


def write(prefix, *documents, vocab_size: int = 256) -> str:
    prefix.parent.mkdir(exist_ok=True)
    writer = SplitWriter(prefix, vocab_size)
    for document in documents:
        writer.write(np.asarray(document))
        writer.end_document()
    writer.close()
    return str(prefix)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words: object, base=WORDS):
        return preflight.check([*base, "--runs-dir", "runs", *map(str, words)], nproc_per_node=1).run

    return run


@pytest.fixture
def refusal(run):
    def refusal(*words: object, **options) -> str:
        with pytest.raises(UsageError) as caught:
            run(*words, **options)
        text = str(caught.value)
        assert "\n" not in text and len(text) < 400
        return text

    return refusal


@pytest.fixture
def plain(tmp_path):
    """Indexed datasets that nothing is beside of."""
    rng = np.random.default_rng(0)
    names = {
        "good": [rng.integers(0, 256, 400)],
        "beyond": [rng.integers(0, 256, 400), [256]],
        "short": [rng.integers(0, 256, SEQUENCE)],
        "many": [rng.integers(0, 256, 50) for _ in range(40)],
    }
    return {name: write(tmp_path / "plain" / name, *documents) for name, documents in names.items()}


@pytest.fixture
def prepared(tmp_path):
    def prepared(name: str = "ready", split="80%,10%,10%", size: int = 4000, **options):
        (tmp_path / "text").write_bytes(b"abcd" * (size // 4))
        data.prepare([tmp_path / "text"], tmp_path / name, split=split, **options)
        return tmp_path / name

    return prepared


def test_ids_beyond_the_vocabulary(plain, run, refusal, tmp_path):
    for words in (
        ["--train-data-path", plain["beyond"]],
        ["--data-path", "0.5", plain["good"], "0.5", plain["beyond"]],
    ):
        said = refusal(*words, "--vocab-size", 256)
        assert said == (
            f"{words[0]} {plain['beyond']}: holds the token id 256, the vocabulary has 256 (--vocab-size 256): "
            "use the tokenizer that it was made with"
        )
        run(*words, "--vocab-size", 257)
    for words in (["--valid-data-path", plain["beyond"]], ["--test-data-path", plain["beyond"]]):
        assert "holds the token id 256" in refusal("--train-data-path", plain["good"], *words, "--vocab-size", 256)
    negative = tmp_path / "negative"
    write(negative, [5] * 50 + [-1], vocab_size=100_000)
    assert "holds the token id -1, below 0" in refusal("--train-data-path", negative)
    # padding does not make ids: 384 rows of an embedding for 257 and 300
    write(tmp_path / "padding", [300] * 50)
    assert "id 300, the vocabulary has 257" in refusal("--train-data-path", tmp_path / "padding", "--vocab-size", 257)


def test_ids_in_the_last_chunk_count(tmp_path, monkeypatch):
    monkeypatch.setattr("rmoe_megablocks.data.prepared.indexed._CHUNK_TOKENS", 7)
    prefix = write(tmp_path / "ids", [3] * 20, [2, 999], vocab_size=1000)
    read = []
    assert data.id_range(prefix, read.append) == (2, 999)
    assert read == [14, 14, 14, 2]  # bytes


def test_the_launcher_reads_for_its_processes(plain, monkeypatch):
    assert datasets.reads_ids_here(world_size=4)
    assert datasets.reads_ids_here(world_size=None)
    monkeypatch.setenv("RANK", "1")
    assert not datasets.reads_ids_here(None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(datasets.CHECKED, "1")
    assert not datasets.reads_ids_here(None)


def test_tokenizers(plain, prepared, models, refusal, run):
    path = ["--train-data-path", plain["good"]]
    assert refusal(*path, base=UNTOKENIZED).startswith("--train-data-path needs --tokenizer-type")
    no_size = WORDS[: WORDS.index("--vocab-size")] + WORDS[WORDS.index("--vocab-size") + 2 :]
    neither = UNTOKENIZED[:VOCABULARY] + UNTOKENIZED[VOCABULARY + 2 :]
    assert "--tokenizer-type NullTokenizer needs --vocab-size" in refusal(*path, base=no_size)
    other = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
    said = refusal(*path, *other, "gone.model", base=UNTOKENIZED)
    assert said.startswith("--tokenizer-type SentencePieceTokenizer: cannot be built (tokenizer_path: gone.model")
    # 54 pieces, whatever --vocab-size says
    assert "the vocabulary has 54 (--tokenizer-type Sent" in refusal(*path, *other, models["default"], base=UNTOKENIZED)
    assert "--padded-vocab-size 200 is less than" in refusal(*path, "--padded-vocab-size", 200)

    text = prepared()
    assert "does not match" in refusal("--train-data-path", text / "train", *other, models["default"], base=UNTOKENIZED)
    assert "--padded-vocab-size 200 is less than" in refusal("--dataset", text, "--padded-vocab-size", 200)
    pieces = prepared("pieces", tokenizer="sentencepiece", tokenizer_model=models["exact"])
    one, two = ["--train-data-path", pieces / "train"], ["--train-data-path", 1, pieces / "train", 1, text / "train"]
    run(*one, *other, models["exact"], base=neither)
    run("--dataset", pieces, *other[2:], models["exact"], base=neither)
    for data_words in (one, ["--dataset", pieces]):
        words = [*data_words, *other, models["exact"], "--vocab-size", 1000]
        assert "--vocab-size 1000 has no effect: the tokenizer has 400 ids" in refusal(*words, base=neither)
        assert run(*words, "--padded-vocab-size", 1024, base=neither).args.padded_vocab_size == 1024
    assert "was prepared with the model exact.model" in refusal(*one, *other, models["breaks"], base=neither)
    assert "were prepared with different tokenizers" in refusal(*two, "--vocab-size", 500)
    run(*one, "--vocab-size", 500)
    assert "token ids below" in refusal(*one)


def test_ends_of_documents(prepared, run, refusal):
    without, with_eod = prepared(), prepared("eod", append_eod=True)
    assert "do not end in a token: prepare it with --append-eod" in refusal("--dataset", without, "--eod-mask-loss")
    # Megatron's own choice is the last id of the vocabulary, which no document ends in
    for words in (["--dataset", with_eod], ["--train-data-path", with_eod / "train"]):
        args = run(*words, "--vocab-size", 300, "--eod-mask-loss").args
        assert args.null_tokenizer_eod_id == 256
        assert "documents of" in refusal(*words, "--vocab-size", 300, "--null-tokenizer-eod-id", 299)


def test_blends(plain, refusal, run):
    good, many = plain["good"], plain["many"]
    for weight in ("1e-1", "0.3", "3", ".5", "1E1"):
        args = run("--train-data-path", weight, good, "2.5", many).args
        assert blends.read(args)["train"].weights == (float(weight), 2.5)
    assert blends.read(run("--train-data-path", good, many, "--valid-data-path", many).args) == {
        "train": blends.Blend("--train-data-path", (good, many), None),
        "valid": blends.Blend("--valid-data-path", (many,), None),
    }
    for words, says in (
        (["0", good, "1", many], f"--train-data-path: the weight 0 of {good} is not above 0"),
        (["-0.5", good, "1", many], "-0.5"),  # argparse takes it for an option or a weight below 0
        (["nan", good, "1", many], "the weight nan of"),
        (["inf", good, "1", many], "the weight inf of"),
        (["0.5", good, many], "0.5 is taken for a dataset, not for a weight: write WEIGHT PREFIX"),
        ([good, "0.5", many, "0.5"], "0.5 is taken for a dataset"),
        (["1", good, many, good], "1 is taken for a dataset"),
        ([good + ".bin"], "a prefix is wanted, without its .bin"),
        ([], "--train-data-path: names no dataset"),
    ):
        assert says in refusal("--train-data-path", *words)


def test_where_data_is_named(plain, prepared, tmp_path, run, refusal):
    good, many = plain["good"], plain["many"]
    (tmp_path / "list").write_text(f"1e-1 {good}\n2 {many}\n")
    (tmp_path / "empty").write_text("")
    lists = {"train": ["1", good, 3, many], "valid": many, "test": None}
    (tmp_path / "lists").write_text(json.dumps(lists))
    args = run("--data-args-path", "list", "--split", "8,1,1").args
    assert args.data_path == ["1e-1", good, "2", many] and args.data_args_path is None
    args = run("--per-split-data-args-path", "lists").args
    assert (args.train_data_path, args.valid_data_path, args.test_data_path) == (["1", good, "3", many], [many], None)
    for words, says in (
        (["--data-args-path", "gone"], "--data-args-path gone: cannot be read (No such file"),
        (["--data-args-path", "empty"], "--data-args-path empty: names no dataset"),
        (["--data-args-path", "list", "--train-data-path", good], "--data-args-path and --train-data-path both name"),
        (
            ["--data-path", good, "--per-split-data-args-path", "lists"],
            "--data-path and --per-split-data-args-path both",
        ),
        (["--per-split-data-args-path", "list"], "--per-split-data-args-path list: not JSON"),
        (["--per-split-data-args-path", "empty"], "--per-split-data-args-path empty: not JSON"),
        (["--valid-data-path", many], "--valid-data-path without --train-data-path"),
        (["--test-data-path", many], "--test-data-path without --train-data-path"),
        (["--train-data-path", good, "--split", "9,1,0"], "--split 9,1,0 cuts up --data-path; --train-data-path names"),
        (["--mock-data", "--data-path", good], "--mock-data and --data-path both name the data"),
        (["--data-path", good, "--split", "0,1,1"], "--split 0,1,1 leaves nothing to train on"),
        (["--train-data-path", good, "--fim-data"], "--fim-data has no effect"),
    ):
        assert says in refusal(*words)
    for split in ("98%,1%,1%", "1e-1,5,5", "-5,5,5", "0,0,0", "1,2,3,4", "nan,1,1", "x", "1.2.3,1,1"):
        assert f"--split {split}: up to three weights" in refusal("--data-path", good, f"--split={split}")
    for broken in ({"train": [good]}, [good], {"train": 5, "valid": None, "test": None}):
        (tmp_path / "lists").write_text(json.dumps(broken))
        assert "--per-split-data-args-path lists: " in refusal("--per-split-data-args-path", "lists")
    folder = prepared()
    assert "a prepared dataset is cut already" in refusal("--dataset", folder, "--split", "9,1,0")
    assert run("--dataset", folder, "--mock-data").notes[-1] == f"--mock-data: {folder} is not used"


EVALUATING = ["--eval-iters", 3]


def test_an_empty_split_is_left_out(prepared, run):
    for split, left_out, evaluated in (
        ("100%,0,0", ["valid", "test"], []),
        ("90%,10%,0", ["test"], ["valid"]),
        ("90%,0,10%", ["valid"], ["test"]),
    ):
        folder = prepared(split.replace("%", ""), split=split)
        found = run("--dataset", folder, *EVALUATING)
        assert found.args.splits_left_out == left_out
        assert datasets.evaluated_splits(found.metadata) == evaluated
        assert found.args.eval_iters == (0 if "valid" in left_out else 3)
        paths = {split: getattr(found.args, f"{split}_data_path") for split in datasets.SPLITS}
        assert [split for split in ("valid", "test") if paths[split] is None] == left_out
        said = [note for note in found.notes if note.startswith("evaluation of")]
        assert said == [f"evaluation of {split} is left out: there is no text for it" for split in left_out]


def test_a_split_shorter_than_a_sequence(prepared, run, refusal):
    folder = prepared(split=f"3000,{SEQUENCE},1B")
    found = run("--dataset", folder, *EVALUATING)
    assert datasets.evaluated_splits(found.metadata) == ["valid"]
    assert found.args.eval_iters == 0 and found.args.valid_data_path is None
    assert found.notes[-2:] == [
        f"evaluation of valid is left out during training: {folder / 'valid'} has {SEQUENCE} tokens there, "
        "less than a sequence",
        f"evaluation of test is left out: {folder / 'test'} has 1 tokens there, less than a sequence",
    ]
    whole = prepared("whole", split=f"{SEQUENCE + 1},{SEQUENCE + 1},{SEQUENCE + 1}B")
    assert run("--dataset", whole, *EVALUATING).args.eval_iters == 3
    short = prepared("short", split=f"{SEQUENCE},100,100B")
    assert f"train: has {SEQUENCE} tokens to train on, less than one sequence" in refusal("--dataset", short)


def test_short_splits_of_megatrons_own_arguments(plain, run, refusal):
    good, short, many = plain["good"], plain["short"], plain["many"]
    assert "short: has 32 tokens to train on" in refusal("--train-data-path", short)
    assert "short: has 32 tokens to train on" in refusal("--train-data-path", 1, good, 1, short)
    args = run("--train-data-path", good, *EVALUATING).args
    assert (args.eval_iters, args.splits_left_out) == (0, ["valid", "test"])
    found = run(
        "--train-data-path", good, "--valid-data-path", 1, many, 1, short, "--test-data-path", many, *EVALUATING
    )
    assert (found.args.eval_iters, found.args.splits_left_out) == (0, ["valid"])
    assert found.notes[-2].startswith(f"evaluation of valid is left out: {short} has 32 tokens")
    assert found.notes[-1] == "evaluation of test is left out: Megatron does it only where it evaluates valid"
    args = run("--train-data-path", good, "--valid-data-path", many, "--test-data-path", many, *EVALUATING).args
    assert (args.eval_iters, args.splits_left_out) == (3, [])


@pytest.mark.parametrize(
    ("name", "split", "tokens"),
    [
        ("good", "98,1,1", [400, 0, 0]),  # one document: Megatron would look for an end of the others for ever
        ("many", "8,1,1", [1600, 200, 200]),
        ("many", "98,1,1", [1950, 50, 0]),
        ("many", "1,1", [1000, 1000, 0]),
        ("many", None, [1950, 50, 0]),
    ],
)
def test_documents_are_cut_as_megatron_does(plain, run, name, split, tokens):
    from megatron.core.datasets.gpt_dataset import GPTDataset

    words = ["--data-path", plain[name], *(["--split", split] if split else []), *EVALUATING]
    found = run(*words)
    assert [blends.tokens_of(plain[name], which, found.args.split) for which in datasets.SPLITS] == tokens
    assert found.args.splits_left_out == [w for w, n in zip(datasets.SPLITS, tokens, strict=True) if n <= SEQUENCE]
    assert (found.args.eval_iters == 0) == (tokens[1] == 0)
    for left_out in found.args.splits_left_out:
        asked_for = blends.split_matrix(found.args.split)[datasets.SPLITS.index(left_out)] is not None
        why = f"{plain[name]} has 0 tokens there, less than a sequence" if asked_for else "there is no text for it"
        assert f"evaluation of {left_out} is left out: {why}" in found.notes
    if split is None:
        assert "--split is missing: Megatron's own, 969,30,1" in found.notes
    # and this is what Megatron builds of it
    low = GPTDataset.build_low_level_dataset(plain[name], batches_config(found.args))
    matrix = batches_config(found.args).split_matrix
    built = [
        int(low.sequence_lengths[round(part[0] * len(low)) : round(part[1] * len(low))].sum()) if part else 0
        for part in matrix
    ]
    assert built == [n if n > SEQUENCE else 0 for n in tokens]
    # of a part without tokens it would look for the end for ever
    assert [split for split, part in zip(datasets.SPLITS, matrix, strict=True) if part is None] == (
        found.args.splits_left_out
    )


def batches_config(args):
    from types import SimpleNamespace

    args.data_cache_path = None
    original = batches.get_tokenizer
    batches.get_tokenizer = lambda: SimpleNamespace(vocab_size=256, eod=255, pad=-1, unique_identifiers={})
    try:
        return batches.dataset_config(args)
    finally:
        batches.get_tokenizer = original


def test_a_damaged_index(plain, refusal):
    with open(plain["good"] + ".bin", "ab") as file:
        file.write(b"xx")
    assert "good.bin: 802 bytes, but its index says 800" in refusal("--train-data-path", plain["good"])
    with open(plain["many"] + ".idx", "r+b") as file:
        file.truncate(40)
    assert "many.idx: truncated index" in refusal("--train-data-path", plain["many"])


def test_a_dataset_named_by_one_of_its_splits(prepared, run):
    folder = prepared()
    assert run("--dataset", folder / "train").args.valid_data_path == [str(folder / "valid")]
