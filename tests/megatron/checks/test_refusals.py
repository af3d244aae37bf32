"""Bad input ends in one clear line before anything is started."""

import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rmoe_megablocks import data
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments, preflight
from rmoe_megablocks.megatron.checks import refusals
from tests.distributed.arguments import BASE, of_type
from tests.distributed.refused import REFUSED as REFUSED_FEATURES

PP2 = "--pipeline-model-parallel-size 2"
LINEAR = " ".join(of_type("linear"))
REFUSED = {
    "--moe-router-type lsmt": "argument --moe-router-type: unknown router type 'lsmt', did you mean lstm?",
    "--moe-router-type linear": "--moe-router-rnn-hidden-size belongs to --moe-router-type eda, gru, lstm, rnn",
    "--moe-router-typo gru": "unrecognized arguments: --moe-router-typo gru",
    "--moe-router-rnn-hidden-size 0": "argument --moe-router-rnn-hidden-size: must be at least 1, got 0",
    "--moe-router-rnn-hidden-size many": "argument --moe-router-rnn-hidden-size: invalid",
    "--moe-router-share-head 0": "argument --moe-router-share-head: must be layer, all or a whole number of at",
    "--moe-router-share-head every": "argument --moe-router-share-head: must be layer, all or a whole",
    "--moe-router-share-projector=-2": "argument --moe-router-share-projector: must be layer, all or a whole number of",
    "--moe-router-share-projector 5": "--moe-router-share-projector 5: the model has 4 layers, use all",
    LINEAR
    + " --moe-router-share-head all": "--moe-router-share-head belongs to --moe-router-type gru, lstm, rnn: leave",
    "--num-layers 1 " + PP2: "--num-layers 1 leaves stages of the 2",
    "--num-layers 5 " + PP2: "Number of layers should be divisible by the pipeline-model-parallel size",
    "--reset-attention-mask --context-parallel-size 2": "--reset-attention-mask does not work with --context-parallel",
    f"{LINEAR} --reset-attention-mask --context-parallel-size 2": "--reset-attention-mask does not work",
    "--transformer-impl transformer_engine": "Transformer Engine is not installed",
    "--lr-warmup-iters 20": "--lr-warmup-iters 20 must be below",
    "--tokenizer-type NullTokenizer --dataset nowhere": "nowhere",
    "--train-data-path nowhere/train": "nowhere/train.bin does not exist; make it with 'rmoe data prepare'",
    "--train-data-path a --dataset b": "--dataset and --train-data-path both name the data",
    "--load nowhere": "--load nowhere: no checkpoint there",
    "--seq-length 64": "max_position_embeddings",
}


def check(runs, *argv: str, **kwargs):
    words = [word for word in BASE if word != "--mock-data"] if "--mock-data" not in argv else BASE
    return preflight.check([*words, "--runs-dir", str(runs), *argv], **kwargs)


def refusal(runs, *argv: str, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        check(runs, *argv, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize("words", REFUSED_FEATURES)
def test_refused_features(tmp_path, words):
    """Those of docs/layouts.md."""
    assert REFUSED_FEATURES[words] in refusal(tmp_path, "--mock-data", *words.split())


@pytest.mark.parametrize("words", REFUSED)
def test_refused(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    mock = [] if "data" in words else ["--mock-data"]
    assert REFUSED[words] in refusal(tmp_path, *mock, *words.split())


@pytest.mark.parametrize("router", ["linear", "gru"])
def test_context_parallelism_needs_transformer_engine_on_a_gpu(tmp_path, monkeypatch, router):
    words = ["--mock-data", *of_type(router), "--context-parallel-size", "2"]
    assert check(tmp_path, *words).nproc_per_node == 2
    monkeypatch.setattr(arguments.megatron_cpu, "active", lambda: False)
    said = (
        "--context-parallel-size 2 needs Transformer Engine's attention on a GPU: install transformer-engine[pytorch]"
    )
    assert refusal(tmp_path, *words, nproc_per_node=2).startswith(said)


PADDED = "--cuda-graph-impl full_iteration --moe-expert-capacity-factor 1.5 --moe-pad-expert-input-to-capacity"


@pytest.mark.parametrize("router", ["linear", "gru", "mlp"])
def test_a_full_graph_is_for_padded_experts_on_a_gpu(monkeypatch, router):
    def check_arguments(words: str) -> None:
        args = arguments.parse([*BASE, *of_type(router), *words.split()])
        arguments.fill_defaults(args)
        refusals.check_router_arguments(args)

    for words, said in (
        (PADDED, "--cuda-graph-impl full_iteration without a GPU does not work"),
        ("--cuda-graph-impl full_iteration", "without padded experts does not work: the host reads how many tokens"),
        (PADDED + " --timing-log-level 2", "full_iteration with --timing-log-level 2 does not work: it waits inside"),
        (PADDED + " --moe-null-experts 4", "--moe-null-experts does not work with"),
        (PADDED + " --moe-backend megablocks", "--moe-backend megablocks"),
    ):
        with pytest.raises(UsageError, match=said):
            check_arguments(words)
    monkeypatch.setattr(refusals.megatron_cpu, "active", lambda: False)
    check_arguments(PADDED)


def without(option: str, values: int = 1) -> list[str]:
    index = BASE.index(option)
    return BASE[:index] + BASE[index + 1 + values :]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "--moe-router-type gru: the model has no experts to route to; set --num-experts"),
        ("--moe-router-type linear", "--moe-router-rnn-hidden-size: the model has no experts"),
    ],
)
def test_router_options_without_experts(tmp_path, words, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        preflight.check([*without("--num-experts"), "--runs-dir", str(tmp_path), *words.split()])


def test_processes(tmp_path):
    mock = ["--mock-data", *PP2.split()]
    assert check(tmp_path, *mock).nproc_per_node == 2
    assert check(tmp_path, *mock, nproc_per_node=4).run.args.world_size == 4
    assert "1 process for a layout of 2" in refusal(tmp_path, *mock, nproc_per_node=1)
    assert "3 processes for a layout of 2" in refusal(tmp_path, *mock, nproc_per_node=3)


def test_run_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "--runs-dir: cannot write to" in refusal(tmp_path / "file", "--mock-data")


@pytest.fixture
def nobody():
    """Root may write into any folder: these tests often run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_read_only_run_directory(nobody):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are their owner's only, and lie in another of those
        Path(folder).chmod(0o500)
        assert "--runs-dir: cannot write to" in refusal(Path(folder), "--mock-data")


def test_many_ranks_prove_at_once_that_a_directory_can_be_written(tmp_path):
    with ThreadPoolExecutor(8) as ranks:
        for _ in range(50):
            list(ranks.map(lambda _: arguments.check_writable(tmp_path / "run", "--runs-dir"), range(8)))
    assert not list((tmp_path / "run").iterdir())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset") / "small"
    source = folder.parent / "text.txt"
    source.write_bytes(b"abc " * 4000)
    data.prepare([source], folder, split="80%,10%,10%")
    return folder


def test_dataset(tmp_path, dataset):
    words = [word for word in without("--tokenizer-type") if word != "--mock-data"]
    run = preflight.check([*words, "--runs-dir", str(tmp_path), "--dataset", str(dataset)]).run
    assert run.args.train_data_path == [str(dataset / "train")] and run.args.tokenizer_type == "NullTokenizer"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--tokenizer-type SentencePieceTokenizer", "does not match the dataset"),
        ("--vocab-size 100", "token ids below 256, but training's vocabulary has only 100"),
    ],
)
def test_tokenizer_that_does_not_match(tmp_path, dataset, words, said):
    argv = [word for word in without("--tokenizer-type") if word != "--mock-data"]
    with pytest.raises(UsageError, match=said):
        preflight.check([*argv, "--runs-dir", str(tmp_path), "--dataset", str(dataset), *words.split()])


def test_truncated_dataset(tmp_path, dataset):
    file = dataset / "valid.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-2])
    try:
        argv = [word for word in without("--tokenizer-type") if word != "--mock-data"]
        with pytest.raises(UsageError, match=r"valid\.bin: truncated"):
            preflight.check([*argv, "--runs-dir", str(tmp_path), "--dataset", str(dataset)])
    finally:
        file.write_bytes(content)
