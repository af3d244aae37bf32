"""What Megatron would stop at on every rank is found before there are ranks."""

import contextlib
import io

import pytest

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments
from rmoe_megablocks.megatron.checks import rehearsal
from tests.distributed.arguments import BASE, LINEAR, PP2

from megatron.core import num_microbatches_calculator, parallel_state  # isort: skip  after CPU mode
from megatron.training import global_vars  # isort: skip

SAID = {
    "--lr-warmup-init 1 --lr-warmup-iters 1": "--lr-warmup-init <= --lr, but was given --lr-warmup-init 1.0, --lr 0.0",
    "--weight-decay-incr-style linear --start-weight-decay 1 --end-weight-decay 0.1": "--end-weight-decay >= --start",
    "--wandb-project x": "--wandb-project x: the package wandb is not installed",
    "--hierarchical-context-parallel-sizes 1": "--hierarchical-context-parallel-sizes: the package einops is not",
    "--enable-ft-package": "--enable-ft-package: the package nvidia_resiliency_ext is not installed",
    "--adlr-autoresume": "--adlr-autoresume: the package userlib is not installed",
    f"{' '.join(LINEAR)} --optimizer muon": "--optimizer muon: the package emerging_optimizers is not installed",
    "--num-distributed-optimizer-instances 2": "--num-distributed-optimizer-instances 2 does not divide 1",
    "--padded-vocab-size 100": "--padded-vocab-size 100",
    "--tokenizer-type SentencePieceTokenizer": "--tokenizer-type SentencePieceTokenizer, no --tokenizer-model",
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model x": "--tokenizer-model x: tokenizer_path: x is invalid",
    "--decoder-first-pipeline-num-layers 9 " + " ".join(PP2): "the pipeline's stages would hold 9, -5 of them",
}
SCHEDULES = {
    "0:4 1K:7": "7 from sample 31 on is no multiple of --micro-batch-size 2 x 1",
    "1K:4": "--step-batch-size-schedule 1K:4: first schedule entry must have threshold 0",
    "a:b": "--step-batch-size-schedule a:b: could not convert string to float",
    "4": "--step-batch-size-schedule 4: Invalid schedule entry",
    "0:0": "--step-batch-size-schedule 0:0: batch size must be positive",
}


def parsed(words: list[str]):
    args = arguments.parse(["--eval-interval", "5", *words])
    arguments.fill_defaults(args)
    args.world_size = args.pipeline_model_parallel_size
    with contextlib.redirect_stdout(io.StringIO()):
        arguments.validate(args)
    return args


def refusal(args) -> str:
    with pytest.raises(UsageError) as caught:
        rehearsal.rehearse(args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("words", SAID)
def test_refused(words):
    assert SAID[words] in refusal(parsed([*BASE, *words.split()]))


def test_a_tokenizer_whose_package_is_not_installed(monkeypatch):
    monkeypatch.setattr(rehearsal, "installed", lambda module: module != "transformers")
    words = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model x".split()
    assert "the package transformers is not installed" in refusal(parsed([*BASE, *words]))


def without(option: str) -> list[str]:
    at = BASE.index(option)
    return BASE[:at] + BASE[at + 2 :]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_batch_sizes(schedule):
    words = without("--global-batch-size")
    assert SCHEDULES[schedule] in refusal(parsed([*words, "--step-batch-size-schedule", schedule]))


def test_a_schedule_that_works():
    rehearsal.rehearse(parsed([*without("--global-batch-size"), "--step-batch-size-schedule", "0:4 1K:6"]))


@pytest.mark.parametrize(
    ("option", "said"),
    [("--tokenizer-type", "no --tokenizer-type"), ("--vocab-size", "NullTokenizer needs --vocab-size")],
)
def test_no_tokenizer(option, said):
    assert said in refusal(parsed(without(option)))


def test_wandb_needs_a_name_and_a_place(monkeypatch):
    monkeypatch.setattr(rehearsal, "installed", lambda module: True)
    assert "needs --wandb-exp-name" in refusal(parsed([*BASE, "--wandb-project", "x"]))
    named = [*BASE, "--wandb-project", "x", "--wandb-exp-name", "y"]
    assert "without --save needs --wandb-save-dir" in refusal(parsed(named))
    rehearsal.rehearse(parsed([*named, "--wandb-save-dir", "z"]))


def test_tensorboard_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(rehearsal, "installed", lambda module: module != "tensorboard")
    rehearsal.rehearse(parsed(BASE))
    said = "--tensorboard-dir x: the package tensorboard is not installed"
    assert said in refusal(parsed([*BASE, "--tensorboard-dir", "x"]))


def test_nothing_is_changed():
    args = parsed([*BASE, *PP2])
    before = dict(vars(args))
    rehearsal.rehearse(args)
    assert vars(args) == before and global_vars._GLOBAL_ARGS is None and global_vars._GLOBAL_TOKENIZER is None
    assert num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None
    assert parallel_state._MPU_PIPELINE_MODEL_PARALLEL_RANK is None
