"""Megatron's experts and MegaBlocks' train one and the same model, in every layout, and read each other's checkpoints.

The mechanism of tests/distributed: all cases of one world size in one process group, losses and gradient norms by
iteration, from one checkpoint that one process with Megatron's experts wrote.
"""

import pytest
import torch

from rmoe_megablocks.megatron.experts.megablocks_weights import to_megatron
from tests.distributed import lab
from tests.distributed.arguments import (
    ALL_CELLS,
    BASE,
    FULL_RECOMPUTE,
    INTERLEAVED,
    ITERATIONS,
    MOE_RECOMPUTE,
    PP2,
    of_type,
)

HALF = ITERATIONS // 2
TRAIN = [*BASE, "--train-iters", str(ITERATIONS), "--num-workers", "0"]
MEGABLOCKS = "--moe-backend megablocks".split()
EP2 = "--expert-model-parallel-size 2".split()
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel".split()
DISTRIBUTED = [*EP2, *"--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()]
RESHARDABLE = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable".split()
FAULTS = ("experts' gradients divided twice", "experts reduced as dense weights")
# All tokens of a layer go to one random expert: one of two ranks gets none
IDLE_RANK = "--moe-router-topk 1 --moe-router-pre-softmax --moe-router-force-biased 100 --train-iters 2".split()
NULL = "--moe-null-experts 5".split()
NULL_START = "start null experts"
NO_TRAINING = "--train-iters 1 --lr 0 --min-lr 0".split()
ROUTERS = ("linear", "gru")
# Of linear, whose router is the host's own, two of them in every test run
ALWAYS_LINEAR = ("EP1", "EP2")

LAYOUTS = {
    1: {"EP1": [], "full recompute": FULL_RECOMPUTE, "moe recompute": MOE_RECOMPUTE},
    2: {"EP2": EP2, "PP2": PP2, "TP2": TP2},
    4: {"PP2 x EP2": [*PP2, *EP2]},
}
COMPARED = [
    (name, router)
    for processes, layouts in LAYOUTS.items()
    for name in layouts
    for router in ROUTERS
    if ALL_CELLS or (processes < 4 and (router == "gru" or name in ALWAYS_LINEAR))
]
NULL_LAYOUTS = {"EP2": EP2, **({"TP2": TP2, "PP2 moe recompute": [*PP2, *MOE_RECOMPUTE]} if ALL_CELLS else {})}
MORE_LAYOUTS = {"TP2 x EP2": [*TP2, *EP2], "PP2 interleaved": INTERLEAVED}
# Options that the experts' backend could break, against Megatron's experts with the same ones.
OPTIONS = (
    "--moe-shared-expert-intermediate-size 32 --calculate-per-token-loss --moe-router-score-function sigmoid "
    "--moe-router-topk-scaling-factor 2.5 --moe-layer-freq [0,1,1,1]"
).split()


def case(name: str, argv: list[str], router: str, load: str | None = "start", collect=()) -> dict:
    argv = [*TRAIN, *of_type(router), *argv]
    if load:
        argv += ["--load", f"{{folder}}/{load} {router}", "--no-load-rng"]
    if load in ("start", NULL_START):
        argv += ["--finetune", "--no-load-optim"]
    return {"name": f"{name} {router}", "argv": argv, "collect": list(collect)}


def save(name: str, router: str, *more: str) -> list[str]:
    return ["--save", f"{{folder}}/{name} {router}", *more]


def first_half(name: str, router: str, *argv: str) -> dict:
    return case(name, [*argv, *save(name, router), "--exit-interval", str(HALF)], router)


def cases(processes: int) -> list[dict]:
    result = []
    for router in ROUTERS:
        if processes == 2:
            result.append(case("start", [*NO_TRAINING, *EP2, *save("start", router)], router, None, ["weights"]))
        if processes == 1:
            result.append(case("megatron", [], router))
        for name, layout in LAYOUTS[processes].items():
            if (name, router) not in COMPARED:
                continue
            saving = save("EP2 megablocks", router) if layout is EP2 else []
            result.append(case(name, [*MEGABLOCKS, *layout, *saving], router, collect=["weights"] * bool(saving)))
    return result + {1: one_process, 2: two_processes, 4: four_processes}[processes]()


# Four processes take their time: with RMOE_TEST_ALL_CELLS=1
PROCESSES = (2, 1, 4) if ALL_CELLS else (2, 1)


def one_process() -> list[dict]:
    return [
        case("options megatron", OPTIONS, "gru", None),
        case("options megablocks", [*OPTIONS, *MEGABLOCKS], "gru", None),
        case("null experts megatron", NULL, "gru", NULL_START),
        case("null experts EP1", [*NULL, *MEGABLOCKS], "gru", NULL_START),
        first_half("half", "gru"),
        case("resumed", MEGABLOCKS, "gru", "half"),
        first_half("half megablocks", "gru", *MEGABLOCKS),
        case("resumed megatron", [], "gru", "half megablocks"),
        loads("EP1 megablocks loads", MEGABLOCKS, "EP2 megatron"),
        loads("EP1 megatron loads", [], "EP2 megablocks"),
    ]


def two_processes() -> list[dict]:
    more = [case(name, [*MEGABLOCKS, *layout], "gru") for name, layout in MORE_LAYOUTS.items()]
    return more + [
        case(NULL_START, [*NULL, *NO_TRAINING, *EP2, *save(NULL_START, "gru")], "gru", None),
        *(
            case(f"null experts {name}", [*NULL, *MEGABLOCKS, *layout], "gru", NULL_START)
            for name, layout in NULL_LAYOUTS.items()
        ),
        case("idle rank megatron", [*EP2, *IDLE_RANK], "gru"),
        case("idle rank megablocks", [*MEGABLOCKS, *EP2, *IDLE_RANK], "gru"),
        case("start megablocks", [*NO_TRAINING, *EP2, *MEGABLOCKS], "gru", None, ["weights"]),
        case("EP2 megatron", ["--train-iters", "2", *EP2, *save("EP2 megatron", "gru")], "gru", collect=["weights"]),
        first_half("half EP2", "gru", *EP2, *RESHARDABLE),
        case("resumed EP2", [*MEGABLOCKS, *EP2, *RESHARDABLE], "gru", "half EP2"),
        first_half("half distributed optimizer", "linear", *MEGABLOCKS, *DISTRIBUTED),
        case("resumed distributed optimizer", [*MEGABLOCKS, *DISTRIBUTED], "linear", "half distributed optimizer"),
        *(case(fault, [*MEGABLOCKS, *EP2, "--train-iters", "2"], "gru") | {"break": fault} for fault in FAULTS),
    ]


def four_processes() -> list[dict]:
    """Two replicas of two expert-parallel ranks take the checkpoints back."""
    batch = "--global-batch-size 8".split()  # one micro-batch for each of four data-parallel ranks
    return [
        loads("EP2 megatron returns", [*EP2, *batch], "EP1 megablocks loads"),
        loads("EP2 megablocks returns", [*EP2, *MEGABLOCKS, *batch], "EP1 megatron loads"),
    ]


def loads(name: str, argv: list[str], start: str) -> dict:
    argv = [*argv, *NO_TRAINING, "--finetune", "--no-load-optim", *save(name, "gru")]
    return case(name, argv, "gru", start, ["weights"])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{case name: [one result a rank]}."""
    folder = tmp_path_factory.mktemp("backends")
    rounds = []
    for processes in PROCESSES:
        rounds.append([(processes, todo := cases(processes))])
        for c in todo:
            words = [word.replace("{folder}", str(folder)) for word in c["argv"]]
            c["argv"] = [*words, "--runs-dir", str(folder / "runs"), "--run-name", c["name"]]
            c["argv"] += ["--data-cache-path", str(folder / "data_cache")]
    return lab.run_groups(folder, rounds)


def deviation(results, one: str, other: str, first: int = 1) -> float:
    """Of two cases, from iteration ``first`` of ``one`` on, see :func:`lab.deviation`."""
    return lab.deviation(results[one][0], results[other][0], first - 1)


@pytest.mark.parametrize(("layout", "router"), COMPARED)
def test_trains_as_megatrons_experts_in_one_process(results, layout, router):
    assert len(results[f"megatron {router}"][0]["loss"]) == ITERATIONS
    assert deviation(results, f"megatron {router}", f"{layout} {router}") < 1e-5


def test_trains_as_megatrons_experts_with_shared_experts_dense_layers_and_per_token_loss(results):
    assert deviation(results, "options megatron gru", "options megablocks gru") < 1e-5


@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_trains_as_megatrons_experts_in_more_layouts(results, layout):
    assert deviation(results, "megatron gru", f"{layout} gru") < 1e-5


@pytest.mark.parametrize("layout", ["EP1", *NULL_LAYOUTS])
def test_null_experts_train_as_with_megatrons_experts_in_one_process(results, layout):
    assert deviation(results, "null experts megatron gru", f"null experts {layout} gru") < 1e-5


def test_null_experts_in_two_processes_are_those_of_one(results):
    assert deviation(results, "null experts EP1 gru", "null experts EP2 gru") < 2e-6


def test_a_rank_without_tokens_keeps_up(results):
    assert deviation(results, "idle rank megatron gru", "idle rank megablocks gru") < 1e-5


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(results, fault):
    """The comparison above must be able to fail: ten times its tolerance at least, in the very first gradient."""
    expected, found = results["megatron gru"][0]["grad_norm"][0], results[f"{fault} gru"][0]["grad_norm"][0]
    assert abs(found / expected - 1) > 1e-4


@pytest.mark.parametrize("resumed", ["resumed", "resumed megatron", "resumed EP2"])
def test_optimizer_state_moves_to_the_other_backend(results, resumed):
    """Half of a run with one backend and half with the other are the whole run of one."""
    assert deviation(results, "megatron gru", f"{resumed} gru", first=HALF + 1) < 1e-5


def test_the_distributed_optimizer_resumes(results):
    """With its default checkpoint format, which is in the order of the backend's own parameters."""
    assert deviation(results, "megatron linear", "resumed distributed optimizer linear", first=HALF + 1) < 1e-5


def megatron_weights(results, name: str) -> list[dict]:
    """Weights of each rank under the names of Megatron's experts."""
    ranks = results[name][:2]  # of four, the other two are replicas
    return [to_megatron(rank["weights"], 4 // len(ranks)) for rank in ranks]


def everywhere(ranks: list[dict]) -> dict:
    """All ranks' weights in one, local experts under their global number."""
    result = {}
    for rank, weights in enumerate(ranks):
        for name, weight in weights.items():
            before, found, after = name.partition("local_experts.")
            if found:
                index, _, rest = after.partition(".")
                name = f"{before}{found}{rank * (4 // len(ranks)) + int(index)}.{rest}"
            result[name] = weight
    return result


def test_both_backends_start_from_the_same_weights(results):
    ours, theirs = (megatron_weights(results, name) for name in ("start megablocks gru", "start gru"))
    for rank, expected in zip(ours, theirs, strict=True):
        assert rank.keys() == expected.keys()
        assert all(torch.equal(weight, rank[name]) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("saved", "loaded", "returned"),
    [
        ("EP2 megatron gru", "EP1 megablocks loads gru", "EP2 megatron returns gru"),
        ("EP2 gru", "EP1 megatron loads gru", "EP2 megablocks returns gru"),
    ],
)
def test_a_checkpoint_goes_to_the_other_backend_and_back(results, saved, loaded, returned):
    expected = everywhere(megatron_weights(results, saved))
    for name in (loaded, *([returned] if ALL_CELLS else [])):
        found = everywhere(megatron_weights(results, name))
        assert found.keys() == expected.keys()
        assert all(torch.equal(weight, found[key]) for key, weight in expected.items())
    trained = everywhere(megatron_weights(results, "start gru"))
    assert not torch.equal(
        *(w["decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"] for w in (expected, trained))
    )
