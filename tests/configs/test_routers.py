"""configs/routers: every baseline and ablation of the paper for each model, by name, differing in the router alone."""

import json

import pytest

from rmoe_megablocks import cli
from rmoe_megablocks.launcher.config import REPOSITORY, load_config
from rmoe_megablocks.planning import read_settings
from rmoe_megablocks.planning.counts import parameters
from rmoe_megablocks.routing import INIT, all_arguments
from tests.distributed.arguments import ALL_CELLS
from tests.planning.built import arguments, build, checked, count, rank_of, stage_ranks

FOLDER = REPOSITORY / "configs" / "routers"
FILES = sorted(FOLDER.glob("*/*.yaml"))
TABLE = ("linear", "hyper", "mlp", "random", "cosine", "xmoe_16", "gru")
ABLATIONS = (
    *("gru_detach", "gru_np", "gru_np_r0.5", "gru_np_r1.0", "gru_share_projector", "rnn", "lstm"),
    *("xmoe_08", "xmoe_32", "gru_xmoe_08", "gru_xmoe_16", "gru_xmoe_32"),
)
# built in every test run; the others, which are the same routers at other sizes, with RMOE_TEST_ALL_CELLS=1
BUILT = sorted(FOLDER.glob("tiny/*.yaml"))
MODELS = {
    "enwik8_medium": (*TABLE, *ABLATIONS),
    "enwik8_small": (*TABLE, *ABLATIONS),
    "tiny": (*TABLE, *ABLATIONS),
    "wikitext103_medium": TABLE,
}
OF_ROUTERS = {"--moe-router-type", *(argument.option for argument in all_arguments() if argument is not INIT)}


def by_name(model, router):
    return FOLDER / model / f"{model}_{router}.yaml"


def arguments_of(model, router):
    return {key: value for key, value in load_config(by_name(model, router)).arguments.items() if value is not None}


def test_every_model_has_every_router():
    assert FILES == sorted(by_name(model, router) for model, routers in MODELS.items() for router in routers)


@pytest.mark.parametrize("path", FILES if ALL_CELLS else BUILT, ids=lambda path: path.stem)
def test_the_dry_run_accepts_it_and_the_plan_counts_what_megatron_builds(path, tmp_path, capsys):
    run = checked(path, tmp_path)
    assert cli.main(["plan", str(path), "--vocab-size", str(run.args.vocab_size or 256), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["warnings"] == []
    built = 0
    for rank in stage_ranks(run):
        with rank_of(run, rank) as groups:
            built += count(build(run, groups))
    assert sum(plan["parameters"]["stages"]) == built


@pytest.mark.parametrize("model", MODELS)
def test_twins_differ_in_the_router_alone(model):
    plain = {key: value for key, value in arguments_of(model, "linear").items() if key not in OF_ROUTERS}
    environment = load_config(by_name(model, "linear")).env
    for router in MODELS[model]:
        chosen = arguments_of(model, router)
        assert {key: value for key, value in chosen.items() if key not in OF_ROUTERS} == plain
        assert load_config(by_name(model, router)).env == environment


@pytest.mark.parametrize("router", (*TABLE, *ABLATIONS))
def test_a_router_is_the_same_one_in_every_model(router):
    widths = {"--moe-router-rnn-hidden-size", "--moe-router-rnn-bias"}  # tiny's state is narrower, and has no biases
    found = [
        {key: value for key, value in arguments_of(model, router).items() if key in OF_ROUTERS - widths}
        for model in MODELS
        if router in MODELS[model]
    ]
    assert found[0] and all(one == found[0] for one in found)


def formulas(layers, hidden, experts=16, state=128, width=256):
    """routers.md's sizes of a layer, times the layers, and what these share; the published figures in millions."""
    made = experts * hidden + experts
    projector, cell = state * hidden + state, state * state + state

    def recurrent(gates, head):
        return layers * (projector + head) + 2 * gates * cell

    def xmoe(dimensions, inputs):
        return dimensions * (inputs + experts)

    linear = experts * state + experts
    return {
        "linear": layers * experts * hidden,
        "random": layers * experts * hidden,
        "mlp": layers * (width * hidden + width + experts * width + experts),
        "hyper": layers * (hidden + width * hidden + width + made * width + made),
        "cosine": layers * (experts * hidden + 1),
        "gru": recurrent(3, linear),
        "gru_detach": recurrent(3, linear),
        "gru_np": recurrent(3, linear),
        "gru_np_r0.5": recurrent(3, linear),
        "gru_np_r1.0": recurrent(3, linear),
        "gru_share_projector": projector + layers * linear + 6 * cell,
        "rnn": recurrent(1, linear),
        "lstm": recurrent(4, linear),
        **{f"xmoe_{d:02}": layers * xmoe(d, hidden) for d in (8, 16, 32)},
        **{f"gru_xmoe_{d:02}": recurrent(3, xmoe(d, state)) for d in (8, 16, 32)},
    }


SIZES = {"enwik8_medium": (8, 352), "enwik8_small": (6, 264), "wikitext103_medium": (8, 352)}


@pytest.mark.parametrize("model", SIZES)
def test_router_parameters_are_those_of_the_formulas(model):
    expected = formulas(*SIZES[model])
    for router in MODELS[model]:
        found = parameters.model(read_settings(arguments(by_name(model, router))[0]))
        assert found.routing == expected[router], router
        frozen = {"random": found.routing, "hyper": found.routing - SIZES[model][0] * SIZES[model][1]}
        assert found.frozen == frozen.get(router, 0)


def test_the_published_router_parameters():
    """Of Table 1, in millions, cut off behind the digits that it gives.

    Its linear maps have biases, which these configurations do not (base/recipe_small_models.yaml). HyperMoE's 12.4 and
    XMoE's .09 are with a linear gate that nothing reads.
    """
    found = formulas(8, 352)
    gate = 8 * (352 * 16 + 16)
    assert gate == 45_184 and found["linear"] == gate - 8 * 16
    assert (found["linear"], found["random"], found["cosine"]) == (45_056, 45_056, 45_064)  # .04
    assert found["mlp"] == 755_840  # .75
    assert found["gru"] == 477_056  # .47
    assert found["hyper"] == 12_338_048 and round((found["hyper"] + gate) / 1e6, 1) == 12.4
    assert found["xmoe_16"] == 47_104 and (found["xmoe_16"] + gate) // 10_000 == 9  # .09
