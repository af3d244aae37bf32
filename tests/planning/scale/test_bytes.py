"""What the plan says a rank sends is what processes send, over gloo: byte for byte."""

import os

import pytest

from rmoe_megablocks.planning.counts.traffic import traffic
from rmoe_megablocks.planning.scale import cost
from rmoe_megablocks.planning.settings import read_settings
from tests.distributed.arguments import DISTRIBUTED_OPTIMIZER, EP2, FULL_RECOMPUTE, INTERLEAVED, LINEAR, PP2, PP4
from tests.distributed.cases import Case, model
from tests.distributed.lab import Lab

# Loads that are all alike: the plan counts their mean
PADDED = "--moe-expert-capacity-factor 1 --moe-pad-expert-input-to-capacity".split()
EP4 = "--expert-model-parallel-size 4".split()
CASES = {
    "PP2": (2, PP2),
    "PP2 VPP2": (2, INTERLEAVED),
    "DP2": (2, []),
    "DP2, distributed optimizer": (2, DISTRIBUTED_OPTIMIZER),
    "EP2": (2, [*EP2, *PADDED]),
    "PP2 linear": (2, [*PP2, *LINEAR]),
}
MORE = {
    "PP4": (4, [*PP4, "--micro-batch-size", "1"]),
    "PP2 EP2": (4, [*PP2, *EP2, *PADDED]),
    "PP2 DP2, distributed optimizer": (4, [*PP2, *DISTRIBUTED_OPTIMIZER]),
    "EP4, recompute": (4, [*EP4, *PADDED, *FULL_RECOMPUTE, "--micro-batch-size", "1"]),
    "PP2 EP2 DP2": (8, [*PP2, *EP2, *PADDED, "--global-batch-size", "8"]),
    "PP4 DP2": (8, [*PP4, "--micro-batch-size", "1"]),
    "EP4 DP2, distributed optimizer": (8, [*EP4, *PADDED, *DISTRIBUTED_OPTIMIZER, "--global-batch-size", "16"]),
}
if os.environ.get("RMOE_TEST_ALL_CELLS") == "1":
    CASES |= MORE
SMALL = 1000  # bytes: numbers of tokens, losses, norms
PADDING = 128 * 4  # bytes a bucket of the distributed optimizer is filled up with, at most, where ranks are few


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("bytes"))
    lab.run(
        Case(name, ranks, "base", tuple(argv), collect=("traffic",), from_start=False)
        for name, (ranks, argv) in CASES.items()
    )
    return lab


def sent(result: dict) -> dict[str, float]:
    """Bytes a rank sent in an iteration; of collectives by ring algorithms."""
    steps, counts = len(result["loss"]), result["traffic"]
    found = {"pipeline": counts["bytes"], "all_to_all": 0, "reduced": {}, "buckets": 0}
    for name, ranks, size in counts["collectives"]:
        if name == "alltoall_base":
            found["all_to_all"] += size
        elif size >= SMALL and len(ranks) > 1:
            turns = 2 if name == "allreduce" else 1
            found["reduced"][ranks] = found["reduced"].get(ranks, 0) + turns * size * (len(ranks) - 1) / len(ranks)
            found["buckets"] += name != "allreduce"
    assert found["pipeline"] % steps == found["all_to_all"] % steps == 0
    reduced = {ranks: size / steps for ranks, size in found["reduced"].items()}
    return {key: value / steps for key, value in found.items() if key != "reduced"} | {"reduced": reduced}


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_that_processes_send(lab, name):
    ranks, argv = CASES[name]
    settings = read_settings([*model("base"), *argv])
    planned, measured = traffic(settings, ranks), [sent(result) for result in lab.results[name]]
    assert max(rank["pipeline"] for rank in measured) == planned.pipeline
    assert max(rank["all_to_all"] for rank in measured) == planned.all_to_all
    per_stage = ranks // settings.pipeline
    for one in measured:  # ranks of one stage share gradients, stages what their layers share
        one["stages"] = sum(n for group, n in one["reduced"].items() if max(group) - min(group) >= per_stage)
        one["data"] = sum(one["reduced"].values()) - one["stages"]
    shared = cost.shared_bytes(settings)
    assert [rank["stages"] for rank in measured] == [2 * shared * (settings.pipeline - 1) / settings.pipeline] * ranks
    over = max(rank["data"] for rank in measured) - planned.data_parallel
    assert 0 <= over <= max(rank["buckets"] for rank in measured) * PADDING
    assert not planned.data_parallel or over < 0.01 * planned.data_parallel


def test_something_is_sent_of_each_kind(lab):
    results = {name: [sent(result) for result in lab.results[name]] for name in CASES}
    assert results["PP2"][0]["pipeline"] > results["PP2 linear"][0]["pipeline"] > 0
    assert results["EP2"][0]["all_to_all"] > 0 and results["DP2"][0]["reduced"] and results["PP2"][0]["reduced"]
    assert not results["PP2 linear"][0]["reduced"]
