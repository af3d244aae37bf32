"""Checkpoints that are missing, or of another model."""

import functools
import json
import math
import shutil
import tempfile
from pathlib import Path

from tests.odd_inputs.case import Case
from tests.odd_inputs.cases.checkpoint_schedules import rate
from tests.odd_inputs.cases.environment import SHORT, TINY, would_start
from tests.odd_inputs.client import client

SMALL = f"{TINY} {SHORT} --run-name run"
EMPTY = f"{TINY} {SHORT} --run-name new"


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="rmoe-odd-inputs-")  # until this process ends


@functools.cache
def trained_run(options: str = "") -> Path:
    """The folder of runs with one of two iterations, made once."""
    folder = Path(_scratch().name, options or "trained")
    folder.mkdir()
    code = client().run(f"{SMALL} {options}", folder, {}, trains=True, seconds=120)
    assert code == 0, Path(f"{folder}.err").read_text()
    return folder / "runs"


def run_of_two_iterations(folder: Path) -> None:
    shutil.copytree(trained_run(), folder / "runs", symlinks=True)


def run_with_an_empty_index(folder: Path) -> None:
    run_of_two_iterations(folder)
    (folder / "runs" / "run" / "checkpoints" / "iter_0000002" / ".metadata").write_bytes(b"")


def run_without(option: str):
    def make(folder: Path) -> None:
        shutil.copytree(trained_run(option), folder / "runs", symlinks=True)

    return make


def other(name: str, options: str, refused: str, command: str = SMALL) -> Case:
    return Case(name, f"{command} {options}", refused=refused, files=run_of_two_iterations)


def continues(outcome) -> None:
    would_start(outcome)
    tracker = outcome.folder / "runs" / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "2"
    assert json.loads((outcome.folder / "runs" / "run" / "summary.json").read_text())["iterations"] == 2


LOADS = f"{EMPTY} --load runs/run/checkpoints"


def new(name: str, options: str, refused: str) -> Case:
    return Case(name, f"{EMPTY} {options}", refused=refused)


def starts_anew(outcome) -> None:
    """Iteration 3 has the rate of iteration 1, and a line has said so."""
    lines = (outcome.folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    rates = {line["iteration"]: line["learning_rate"] for line in map(json.loads, lines) if "grad_norm" in line}
    assert list(rates) == [1, 2, 3, 4] and math.isclose(rates[3], rate(1, 4), rel_tol=1e-6), rates
    assert f"starts anew, and the learning rate's schedule with it, at 0 and not at {rate(2, 4):.4g}" in outcome.err


SECOND = "does not work here: a restart would have to choose between two kinds"
REFUSED = {
    "--non-persistent-save-interval 1": SECOND,
    "--non-persistent-save-interval 1 --non-persistent-ckpt-type global": SECOND,
    "--non-persistent-ckpt-type in_memory": SECOND,
    "--non-persistent-ckpt-type local --non-persistent-local-ckpt-dir x": SECOND,
    "--non-persistent-global-ckpt-dir x": SECOND,
    "--non-persistent-local-ckpt-algo atomic": SECOND,
    "--replication": "--replication does not work here",
    "--replication-jump 1": "--replication-jump does not work here",
    "--replication-factor 3": "--replication-factor does not work here",
    "--use-mp-args-from-checkpoint-args": "it is about --use-checkpoint-args",
    "--no-use-tokenizer-model-from-checkpoint-args": "it is about --use-checkpoint-args",
    "--override-ckpt-iteration 1": "go back with --ckpt-step",
    "--auto-detect-ckpt-format": "loads both formats without it",
    "--async-strategy mcore": "does nothing without --async-save",
    "--use-persistent-ckpt-worker": "does nothing without --async-save",
    "--async-ckpt-cpu-priority 5": "does nothing without --async-save",
    "--async-ckpt-io-priority 2": "does nothing without --async-save",
    "--async-save --async-ckpt-use-cpu-shm": "needs the package nvidia-resiliency-ext",
    "--ckpt-fully-parallel-load-exchange-algo gather_object": "does nothing without --ckpt-fully-parallel-load",
    "--ckpt-fully-parallel-load-process-group ep_dp": "does nothing without --ckpt-fully-parallel-load",
    "--ckpt-fully-parallel-save-process-group ep_dp --no-ckpt-fully-parallel-save": "keep one of them",
    "--ckpt-convert-format torch": "--ckpt-convert-save",
    "--ckpt-convert-save x": "does nothing without --ckpt-convert-format",
    "--ckpt-convert-format torch --ckpt-convert-save x": "requires --load with --ckpt-convert-format",
    "--ckpt-convert-update-legacy-dist-opt-format": "it is about --ckpt-format torch with",
    "--ckpt-format torch_dcp": "--ckpt-format torch_dcp is for FSDP",
    "--ckpt-format fsdp_dtensor": "--ckpt-format fsdp_dtensor is for FSDP",
    "--ckpt-format torch --use-distributed-optimizer": "cannot load the optimizer's state again",
    "--ckpt-format torch --async-save": "--async-save does nothing with --ckpt-format torch",
    "--ckpt-format torch --verify-integrity": "--verify-integrity does nothing with --ckpt-format torch",
    "--ckpt-format torch --dist-ckpt-strictness raise_all": "--dist-ckpt-strictness does nothing with",
    "--dist-ckpt-strictness return_all": "use log_all or raise_all",
    "--no-strict-fsdp-dtensor-load": "does nothing without --ckpt-format fsdp_dtensor",
    "--no-stream-ckpt-dequant": "does nothing without --fp8-format",
    "--distrib-optim-fully-reshardable-mem-efficient": "without --dist-ckpt-optim-fully-reshardable",
    "--dist-ckpt-workers 2": "does nothing without --async-save with --ckpt-assume-constant-structure",
    "--load-main-params-from-ckpt --no-load-optim": "does nothing without --fp16 or --bf16",
}

CASES = [
    Case(
        "--exit-on-missing-checkpoint in a new run", f"{EMPTY} --exit-on-missing-checkpoint", refused="no checkpoint in"
    ),
    Case(
        "--load of a folder that is not there", f"{EMPTY} --load nowhere", refused="--load nowhere: no checkpoint there"
    ),
    Case("the same command again", SMALL, works=continues, files=run_of_two_iterations),
    other(
        "tied embeddings on an untied checkpoint",
        "--untie-embeddings-and-output-weights=false",
        "--untie.*this run no --untie",
    ),
    other("fewer layers than the checkpoint's", "--num-layers 1", "--num-layers 2, this run --num-layers 1"),
    other("another hidden size", "--hidden-size 32", "--hidden-size 16, this run --hidden-size 32"),
    other("other experts", "--num-experts 4", "--num-experts 8, this run --num-experts 4"),
    other("another vocabulary", "--vocab-size 300", "--vocab-size 256, this run --vocab-size 300"),
    other("experts of another width", "--moe-ffn-hidden-size 32", "--moe-ffn-hidden-size 16, this run .* 32"),
    other("another activation", "--swiglu=false", "--swiglu, this run no --swiglu"),
    other("another normalization", "--normalization LayerNorm", "--normalization RMSNorm, this run .*LayerNorm"),
    other(
        "another position embedding",
        "--position-embedding-type learned_absolute",
        "--position-embedding-type rope.* this run .*learned_absolute",
    ),
    other("query groups", "--group-query-attention --num-query-groups 1", "--num-query-groups 2, this run .* 1"),
    other("normalized queries and keys", "--qk-layernorm", "no --qk-layernorm, this run --qk-layernorm"),
    other("a shared expert", "--moe-shared-expert-intermediate-size 16", "no --moe-shared-expert-intermediate-size"),
    other("dense layers in between", "--moe-layer-freq 2", "no --moe-layer-freq, this run .*--moe-layer-freq .1, 0."),
    Case(
        "a checkpoint whose index is empty",
        SMALL,
        refused="iter_0000002 is damaged or incomplete",
        files=run_with_an_empty_index,
    ),
    other("two of them at once", "--num-layers 4 --hidden-size 32", "--num-layers 2, --hidden-size 16, this run"),
    other(
        "another model under --load --finetune",
        "--finetune --hidden-size 32",
        "--load runs/run/checkpoints.*--hidden-size",
        LOADS,
    ),
    other("another router", "--moe-router-type linear", "router is gru, this run's is linear"),
    other("another state width", "--moe-router-rnn-hidden-size 32", "--moe-router-rnn-hidden-size 64, this run has 32"),
    *(new(words, words, said) for words, said in REFUSED.items()),
    other(
        "--ckpt-step without a folder to load from", "--ckpt-step 2 --no-checkpoints", "--ckpt-step 2 with --no-checkp"
    ),
    other("--ckpt-step 0", "--ckpt-step 0", "--ckpt-step 0: no checkpoint has that iteration"),
    other(
        "--save of a run that shall save nothing",
        "--save x --no-checkpoints",
        "--save x and --no-checkpoints contradict",
    ),
    other(
        "the wrong folder's --ckpt-step with --load",
        "--load runs/run/checkpoints --ckpt-step 1",
        "--ckpt-step 1: --load .*complete ones: 2",
        EMPTY,
    ),
    other(
        "--ckpt-format torch on a torch_dist checkpoint",
        "--ckpt-format torch",
        "torch_dist, .* --ckpt-format torch cannot",
    ),
    Case("--finetune of a new run", f"{EMPTY} --finetune", refused="--finetune: there is no checkpoint"),
    other(
        "the main parameters of a torch_dist checkpoint",
        "--bf16 --no-load-optim --load-main-params-from-ckpt",
        "--load-main-params-from-ckpt: --load .* rounded all the same",
        LOADS,
    ),
    Case(
        "the optimizer left out of a load: the learning rate starts anew",
        f"{SMALL} --train-iters 4 --no-load-optim",
        works=starts_anew,
        files=run_of_two_iterations,
        trains=True,
        seconds=120,
    ),
    Case(
        "a checkpoint saved without optimizer",
        f"{SMALL} --train-iters 4",
        refused="saved with --no-save-optim: add --no-load-optim",
        files=run_without("--no-save-optim"),
    ),
    Case(
        "a checkpoint saved without random numbers",
        f"{SMALL} --train-iters 4",
        refused="saved with --no-save-rng: add --no-load-rng",
        files=run_without("--no-save-rng"),
    ),
]
