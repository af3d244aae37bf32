"""Checkpoints that are missing, or of another model."""

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.odd_inputs.case import Case
from tests.odd_inputs.cases.environment import SHORT, TINY, would_start
from tests.odd_inputs.server import REPOSITORY

SMALL = f"{TINY} {SHORT} --run-name run"
EMPTY = f"{TINY} {SHORT} --run-name new"


@functools.cache
def trained_run() -> Path:
    """The folder of runs with one of two iterations, made once."""
    folder = Path(tempfile.mkdtemp(prefix="rmoe-odd-inputs-"))
    command = SMALL.replace("{repository}", str(REPOSITORY)).split()[1:]
    subprocess.run(
        [sys.executable, "-m", "rmoe_megablocks.launcher", *command],
        cwd=folder,
        check=True,
        capture_output=True,
        env=None,
    )
    return folder / "runs"


def run_of_two_iterations(folder: Path) -> None:
    shutil.copytree(trained_run(), folder / "runs", symlinks=True)


def other(name: str, options: str, refused: str, command: str = SMALL) -> Case:
    return Case(name, f"{command} {options}", refused=refused, files=run_of_two_iterations)


def continues(outcome) -> None:
    would_start(outcome)
    tracker = outcome.folder / "runs" / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "2"
    assert json.loads((outcome.folder / "runs" / "run" / "summary.json").read_text())["iterations"] == 2


LOADS = f"{EMPTY} --load runs/run/checkpoints"

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
    other("two of them at once", "--num-layers 4 --hidden-size 32", "--num-layers 2, --hidden-size 16, this run"),
    other(
        "another model under --load --finetune",
        "--finetune --hidden-size 32",
        "--load runs/run/checkpoints.*--hidden-size",
        LOADS,
    ),
    other("another router", "--moe-router-type linear", "router is gru, this run's is linear"),
    other("another state width", "--moe-router-rnn-hidden-size 32", "--moe-router-rnn-hidden-size 64, this run has 32"),
]
