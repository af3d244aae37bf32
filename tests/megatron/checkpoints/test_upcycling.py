"""--moe-router-upcycle: a linear checkpoint with a fresh recurrent router, in layouts of two processes."""

import re

import pytest
import torch
from megatron.core.safe_globals import SAFE_GLOBALS

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import preflight
from rmoe_megablocks.megatron.checkpoints import compatibility
from rmoe_megablocks.megatron.checkpoints.upcycling import is_routing
from tests.distributed.arguments import BASE, LINEAR, PP2
from tests.distributed.lab import run_groups

EP2 = "--expert-model-parallel-size 2".split()
LAYOUTS = {
    "PP2": PP2,
    "EP2": EP2,
    "DP2 bf16": ["--bf16", "--use-distributed-optimizer"],
    "null experts": ["--moe-null-experts", "5"],
}
STILL = "--train-iters 1 --lr 0 --min-lr 0 --no-checkpoints".split()
UNTIE = "--untie-embeddings-and-output-weights"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("upcycling")


@pytest.fixture(scope="module")
def results(folder):
    """{case name: [one result a rank]}."""
    linear, torch_format = folder / "linear", folder / "torch"
    upcycle = ["--moe-router-upcycle", "--load", str(linear)]
    save = ["--save", str(folder / "recurrent"), *upcycle]
    cases = {
        "linear": [*LINEAR, "--train-iters", "2", "--save", str(linear)],
        "linear torch": [*LINEAR, "--train-iters", "1", "--save", str(torch_format), "--ckpt-format", "torch"],
        **{f"fresh {name}": [*words, *STILL] for name, words in LAYOUTS.items()},
        **{f"upcycled {name}": [*words, *STILL, *upcycle] for name, words in LAYOUTS.items()},
        "trains": [*PP2, *save, "--train-iters", "5", "--exit-interval", "3"],
        "resumes": [*PP2, *save, "--train-iters", "5"],
        "lacks": [*STILL, *upcycle, "--qk-layernorm"],
        "has more": [*STILL, *upcycle],
    }
    entries = []
    for name, words in cases.items():
        base = [word for word in BASE if not (name == "has more" and word == UNTIE)]
        argv = [*base, *words, "--runs-dir", str(folder / "runs"), "--run-name", name]
        entry = {"name": name, "argv": argv, "collect": ["weights"]}
        entries.append(entry | {"may_fail": name in ("lacks", "has more")})
    return run_groups(folder, [[(2, entries)]])


def everywhere(name: str, first_expert: int) -> str:
    """An expert's parameter by its number in the whole model."""
    return re.sub(r"(?<=local_experts\.)\d+", lambda number: str(int(number[0]) + first_expert), name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routing_is_fresh_and_everything_else_the_checkpoints(results, layout):
    linear, seen = results["linear"][0]["weights"], set()
    for rank, (ours, fresh) in enumerate(zip(results[f"upcycled {layout}"], results[f"fresh {layout}"], strict=True)):
        assert ours["weights"].keys() == fresh["weights"].keys()
        for name, value in ours["weights"].items():
            saved = everywhere(name, 2 * rank if layout == "EP2" else 0)
            expected = fresh["weights"][name] if is_routing(name) else linear[saved].to(value.dtype)
            assert torch.equal(value, expected), name
            seen.add(saved)
    assert {name for name in linear if not is_routing(name)} == {name for name in seen if not is_routing(name)}
    assert sum(map(is_routing, seen)) == 4 * 2 + 4


def test_it_trains_on_and_the_same_command_resumes(results):
    first, second = (results[name][0] for name in ("trains", "resumes"))
    assert len(first["loss"]) == 3 and len(second["loss"]) == 2  # iterations 4 and 5
    assert first["loss"][0] == pytest.approx(results["upcycled PP2"][0]["loss"][0], rel=1e-6)
    assert abs(second["loss"][0] / first["loss"][0] - 1) > 1e-3  # goes on, and does not start over


def test_a_checkpoint_of_another_model_is_refused(results):
    for rank in results["lacks"]:
        assert "no --qk-layernorm, this run --qk-layernorm" in rank["refused"]
    for rank in results["has more"]:
        assert "--untie-embeddings-and-output-weights, this run no --untie" in rank["refused"]


def refusal(folder, *words: str) -> str:
    with pytest.raises(UsageError) as caught:
        preflight.check([*BASE, "--runs-dir", str(folder / "runs"), "--run-name", "refused", *words])
    return str(caught.value)


def test_a_list_that_another_library_has_emptied(folder, results):
    """torch's safe_globals(), in which transformers' Trainer resumes, takes out at its end what was there before it."""
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        pass
    compatibility._check_objects.cache_clear()
    assert compatibility.saved_state(folder / "linear")["iteration"] == 2


def test_refusals(folder, results):
    linear, recurrent, torch_format = (str(folder / name) for name in ("linear", "recurrent", "torch"))
    up = "--moe-router-upcycle"
    assert f"or {up} to start from all its weights" in refusal(folder, "--load", linear)
    assert "name a linear checkpoint to start from" in refusal(folder, up)
    assert f"--load {recurrent} already has a gru router" in refusal(folder, up, "--load", recurrent)
    assert "already has checkpoints of the linear model" in refusal(folder, up, "--save", linear, "--load", linear)
    assert "add --moe-router-type gru" in refusal(folder, up, "--load", linear, *LINEAR)
    assert "--ckpt-convert-format torch_dist first" in refusal(folder, up, "--load", torch_format)
    assert "the checkpoint's router is gru" in refusal(folder, "--load", recurrent, *LINEAR)


def test_what_the_option_sets(folder, results):
    words = ["--runs-dir", str(folder / "runs"), "--run-name", "set", "--moe-router-upcycle"]
    run = preflight.check([*BASE, *words, "--pretrained-checkpoint", str(folder / "linear")]).run
    assert run.args.load == str(folder / "linear") and run.args.pretrained_checkpoint is None
    assert run.args.finetune and run.args.no_load_optim and run.args.no_load_rng
    assert any("--finetune --no-load-optim --no-load-rng" in note for note in run.notes)
    assert not any("continuing from" in note for note in run.notes)
