"""A sequence split over two ranks trains the model that one process trains, attention and routing state included."""

import json

import pytest
import torch

from tests.distributed.test_layouts import BASE, FULL_RECOMPUTE, torchrun

ITERATIONS = 12
GROUPED = [*BASE, "--train-iters", str(ITERATIONS), "--group-query-attention", "--num-query-groups", "2"]
CP2 = "--context-parallel-size 2".split()
BF16_ITERATIONS = 4  # later, rounding has sent some tokens to other experts
BF16 = f"--bf16 --moe-router-dtype fp32 --train-iters {BF16_ITERATIONS}".split()
CORE_RECOMPUTE = "--recompute-granularity selective --recompute-modules core_attn".split()
FAULT = "keys' gradient not summed"
CASES = {
    1: [("one", [], ["health", "evaluation"], None), ("one bf16", BF16, [], None)],
    2: [
        ("CP2", CP2, ["attention", "health", "evaluation"], None),
        ("CP2 full recompute", [*CP2, *FULL_RECOMPUTE], [], None),
        ("CP2 core recompute", [*CP2, *CORE_RECOMPUTE], [], None),
        ("CP2 bf16", [*CP2, *BF16], [], None),
        (FAULT, CP2, ["attention"], FAULT),
    ],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{case name: [one result a rank]}."""
    folder = tmp_path_factory.mktemp("context")
    start = (
        folder / "start"
    )  # Megatron warms kernels up with random tensors of a rank's shape, before weights are drawn
    make_start = [*GROUPED, "--train-iters", "1", "--lr", "0", "--min-lr", "0", "--save", str(start)]
    load_start = ["--load", str(start), "--finetune", "--no-load-optim", "--no-load-rng", "--no-checkpoints"]
    runs = ["--runs-dir", str(folder / "runs"), "--run-name"]
    results = {}
    for processes, cases in CASES.items():
        file = folder / f"cases{processes}.json"
        entries = [
            {"name": name, "argv": [*GROUPED, *words, *load_start, *runs, name], "collect": collect, "break": fault}
            for name, words, collect, fault in cases
        ]
        if processes == 1:
            entries.insert(0, {"name": "start", "argv": [*make_start, *runs, "start"]})
        file.write_text(json.dumps(entries))
        torchrun(processes, folder / f"log{processes}", "-m", "tests.distributed.worker", str(file), str(folder))
        for name, *_ in cases:
            ranks = (torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(processes))
            results[name] = list(ranks)
    return results


def deviation(results, name: str, reference: str = "one", iterations: int = ITERATIONS) -> float:
    """Largest relative difference from one process, over losses and gradient norms of all iterations."""
    one, other = results[reference][0], results[name][0]
    assert len(one["loss"]) == len(other["loss"]) == iterations
    pairs = zip(one["loss"] + one["grad_norm"], other["loss"] + other["grad_norm"], strict=True)
    return max(abs(b / a - 1) for a, b in pairs)


@pytest.mark.parametrize("name", ["CP2", "CP2 full recompute", "CP2 core recompute"])
def test_trains_as_one_process(results, name):
    assert deviation(results, name) < 5e-6


def test_trains_as_one_process_in_bf16(results):
    assert 0 < deviation(results, "CP2 bf16", "one bf16", BF16_ITERATIONS) < 1e-2


def test_attention_is_upstreams(results):
    for rank in results["CP2"]:
        assert len(rank["attention"]) == 8
        assert all(difference < 2e-6 for difference in rank["attention"].values()), rank["attention"]


def test_logged_figures_are_one_processs(results):
    (one,) = results["one"]
    for rank in results["CP2"]:
        assert rank["health"].keys() == one["health"].keys() and len(one["health"]["state_norm"]) == 4
        for name, values in one["health"].items():
            assert rank["health"][name] == pytest.approx(values, rel=1e-5), name


def test_evaluation_is_one_processs(results):
    (one,) = results["one"]
    for rank in results["CP2"]:
        assert rank["evaluation"] == pytest.approx(one["evaluation"], rel=1e-6)


def test_a_fault_is_noticed(results):
    assert deviation(results, FAULT) > 5e-5
    wrong = {name for rank in results[FAULT] for name, difference in rank["attention"].items() if difference > 1e-3}
    assert wrong == {f"{mask} {name}" for mask in ("causal", "window") for name in ("key", "value")}
