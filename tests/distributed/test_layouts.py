"""Every layout trains the model that one process trains, and a fault in the threading of the state is noticed.

All cases of one world size run in one process group, see worker.py. Losses and gradient norms are compared over 20
iterations from one checkpoint that one process wrote.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
SIZES = {
    "--num-layers": 4,
    "--hidden-size": 48,
    "--num-attention-heads": 4,
    "--ffn-hidden-size": 64,
    "--num-experts": 4,
    "--moe-router-topk": 2,
    "--moe-ffn-hidden-size": 32,
    "--moe-router-rnn-hidden-size": 16,
    "--seq-length": 32,
    "--max-position-embeddings": 32,
    "--vocab-size": 256,
    "--micro-batch-size": 2,
    "--global-batch-size": 8,
    "--train-iters": 20,
}
# A large balancing loss and initialisation give the router a share of the gradient norm that a fault in it shows.
COMMON = (
    "--moe-router-type gru --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1.0 --moe-z-loss-coeff 0.1 "
    "--init-method-std 0.15 --moe-token-dispatcher-type alltoall --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --disable-bias-linear --lr 1e-3 "
    "--min-lr 1e-4 --mock-data --tokenizer-type NullTokenizer --eval-iters 0 --log-interval 100 --seed 1234 "
    "--hidden-dropout 0 --attention-dropout 0"
).split()
BASE = [word for pair in SIZES.items() for word in map(str, pair)] + COMMON
PP2 = "--pipeline-model-parallel-size 2".split()
PP4 = "--pipeline-model-parallel-size 4".split()
INTERLEAVED = [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()
BF16 = "--bf16 --moe-router-dtype fp32 --train-iters 1 --clip-grad 0".split()
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
MOE_RECOMPUTE = "--recompute-granularity selective --recompute-modules moe".split()
LINEAR = ["--moe-router-type", "linear"]


def case(name: str, *argv: str, collect=(), fault: str | None = None) -> dict:
    return {"name": name, "argv": [*BASE, *argv], "collect": list(collect), "break": fault}


GRADIENTS_AND_STATES = ("gradients", "states")
CASES = {
    1: [
        case("one"),
        case("one bf16", *BF16, collect=GRADIENTS_AND_STATES),
    ],
    2: [
        case("PP2", *PP2, collect=["weights"]),
        case("PP2 interleaved", *INTERLEAVED, collect=["weights"]),
        case("DP2 distributed optimizer", *DISTRIBUTED_OPTIMIZER),
        case("PP2 full recompute", *PP2, *FULL_RECOMPUTE),
        case("PP2 moe recompute", *PP2, *MOE_RECOMPUTE),
        case("PP2 bf16", *PP2, *BF16, collect=GRADIENTS_AND_STATES),
        case("PP2 traffic", *PP2, "--train-iters", "2", collect=["traffic"]),
        case("PP2 traffic bf16", *PP2, "--train-iters", "2", *BF16[:3], collect=["traffic"]),
        case("PP2 traffic linear", *PP2, *LINEAR, "--train-iters", "2", collect=["traffic"]),
        case("PP2 interleaved traffic", *INTERLEAVED, "--train-iters", "2", collect=["traffic"]),
        case("PP2 interleaved traffic linear", *INTERLEAVED, *LINEAR, "--train-iters", "2", collect=["traffic"]),
        case("detached state", *PP2, fault="detached state"),
        case("no gradient sync", *PP2, collect=["weights"], fault="no gradient sync over stages"),
        case("counted on every stage", *PP2, fault="counted on every stage"),
    ],
    4: [
        case("PP4", *PP4, collect=["weights"]),
        case("PP2 x DP2 distributed optimizer", *PP2, *DISTRIBUTED_OPTIMIZER, collect=["weights"]),
        case("PP2 interleaved x DP2 distributed optimizer", *INTERLEAVED, *DISTRIBUTED_OPTIMIZER, collect=["weights"]),
    ],
}


def torchrun(processes: int, log: Path, *words: str) -> None:
    """Runs a module under torchrun; everything it started ends with it, and its output is in ``log``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--nproc-per-node", str(processes), *words],
            env=environment,
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, log.read_text()[-6000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{case name: [one result a rank]}."""
    folder = tmp_path_factory.mktemp("layouts")
    runs = ["--runs-dir", str(folder / "runs")]
    start = [*BASE, *runs, "--train-iters", "1", "--lr", "0", "--min-lr", "0", "--save", str(folder / "start")]
    from_start = ["--load", str(folder / "start"), "--finetune", "--no-load-optim", "--no-load-rng"]
    results = {}
    for processes, cases in CASES.items():
        cases = [c | {"argv": [*c["argv"], *runs, *([] if "linear" in c["name"] else from_start)]} for c in cases]
        if processes == 1:
            cases.insert(0, {"name": "start", "argv": start})
        file = folder / f"cases{processes}.json"
        file.write_text(json.dumps([c | {"argv": [*c["argv"], "--run-name", c["name"]]} for c in cases]))
        torchrun(processes, folder / f"log{processes}", "-m", "tests.distributed.worker", str(file), str(folder))
        for c in cases:
            ranks = (torch.load(folder / f"{c['name']}.{rank}.pt", weights_only=False) for rank in range(processes))
            results[c["name"]] = list(ranks)
    return results


def deviation(results, name: str) -> float:
    """Largest relative difference from one process, over losses and gradient norms of all iterations."""
    one, other = results["one"][0], results[name][0]
    assert len(one["loss"]) == len(other["loss"]) == 20
    pairs = zip(one["loss"] + one["grad_norm"], other["loss"] + other["grad_norm"], strict=True)
    return max(abs(b / a - 1) for a, b in pairs)


def shared_weights(results, name: str) -> list[dict]:
    copies = [{k: v for k, v in rank["weights"].items() if k.startswith("rnn_router.")} for rank in results[name]]
    return [copy for copy in copies if copy]


LAYOUTS = [c["name"] for cases in CASES.values() for c in cases if not c["break"]]
LAYOUTS = [name for name in LAYOUTS if name != "one" and "bf16" not in name and "traffic" not in name]


@pytest.mark.parametrize("name", LAYOUTS)
def test_trains_as_one_process(results, name):
    assert deviation(results, name) < 2e-6


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in LAYOUTS
        if any(c["name"] == name and "weights" in c["collect"] for cs in CASES.values() for c in cs)
    ],
)
def test_copies_of_the_shared_recurrence_stay_identical(results, name):
    first, *others = shared_weights(results, name)
    assert len(first) == 4 and others
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_bf16_stages_compute_what_one_process_computes(results):
    (one,), stages = results["one bf16"], results["PP2 bf16"]
    assert stages[0]["loss"] == one["loss"]
    layers = {}
    for stage in stages:
        layers |= stage["states"]
    assert sorted(layers) == sorted(one["states"]) == [1, 2, 3, 4]
    for layer, states in layers.items():
        assert len(states) == 4  # micro-batches
        for ours, theirs in zip(states, one["states"][layer], strict=True):
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    names = set()
    for stage in stages:
        for name, gradient in stage["gradients"].items():
            names.add(name)
            expected = one["gradients"][name]
            if name.startswith("rnn_router."):
                assert (gradient - expected).norm() <= 1e-6 * expected.norm()
            else:
                assert torch.equal(gradient, expected), name
            assert expected.abs().sum() > 0, name
    assert names == set(one["gradients"])


@pytest.mark.parametrize("schedule", ["PP2", "PP2 interleaved"])
def test_the_state_adds_bytes_but_no_message(results, schedule):
    for ours, linear in zip(results[f"{schedule} traffic"], results[f"{schedule} traffic linear"], strict=True):
        hidden, state = SIZES["--hidden-size"], SIZES["--moe-router-rnn-hidden-size"]
        assert ours["traffic"]["messages"] == linear["traffic"]["messages"] > 0
        assert ours["traffic"]["bytes"] * hidden == linear["traffic"]["bytes"] * (hidden + state)


def test_an_fp32_state_takes_two_bf16_columns(results):
    for full, half in zip(results["PP2 traffic"], results["PP2 traffic bf16"], strict=True):
        hidden, state = SIZES["--hidden-size"], SIZES["--moe-router-rnn-hidden-size"]
        assert half["traffic"]["messages"] == full["traffic"]["messages"]
        assert half["traffic"]["bytes"] * 4 * (hidden + state) == full["traffic"]["bytes"] * 2 * (hidden + 2 * state)


@pytest.mark.parametrize("fault", ["detached state", "no gradient sync", "counted on every stage"])
def test_a_fault_is_noticed(results, fault):
    """The comparison above must be able to fail: ten times its tolerance at least."""
    assert deviation(results, fault) > 2e-5


def test_missing_gradient_sync_lets_the_copies_drift(results):
    first, second = shared_weights(results, "no gradient sync")
    assert any(not torch.equal(first[key], second[key]) for key in first)
