"""A restart in another layout: what is refused would fail in Megatron, what is allowed goes on as if undisturbed."""

import argparse

import pytest

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments
from rmoe_megablocks.megatron.checkpoints import compatibility, resharding
from tests.distributed.arguments import BASE, PP2
from tests.distributed.lab import run_groups

LAYOUTS = {
    "DP2": [],
    "EP2": "--expert-model-parallel-size 2".split(),
    "PP2": PP2,
    "VPP2": [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"],
    "CP2": "--context-parallel-size 2".split(),
    "DP2 bf16": ["--bf16", "--moe-router-dtype", "fp32"],
    "TP2": "--tensor-model-parallel-size 2 --sequence-parallel".split(),
    "TP2 ETP1": "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1".split(),
}
OPTIMIZERS = {
    "plain": [],
    "distributed": ["--use-distributed-optimizer"],
    "reshardable": ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"],
}
EXPERTS, KIND, BUFFERS = "an optimizer of their own", "alone has --use-distributed", "does not fit with"
PRECISION = "the checkpoint is of a run in"
REFUSED = [
    ("plain DP2", "plain EP2", EXPERTS),
    ("plain DP2", "plain TP2 ETP1", EXPERTS),
    ("reshardable EP2", "reshardable DP2", EXPERTS),
    ("distributed DP2", "distributed EP2", EXPERTS),
    ("plain DP2", "distributed DP2", KIND),
    ("distributed DP2", "plain DP2", KIND),
    ("plain DP2", "plain DP2 bf16", PRECISION),
    ("distributed DP2 bf16", "distributed DP2", PRECISION),
    ("distributed DP2", "distributed PP2", BUFFERS),
    ("distributed PP2", "distributed VPP2", BUFFERS),
]
ALLOWED = [
    ("plain DP2", "plain PP2"),
    ("distributed DP2", "distributed CP2"),
    ("distributed DP2", "reshardable DP2"),
    ("reshardable DP2", "reshardable TP2"),
]


def words(run: str) -> list[str]:
    optimizer, layout = run.split(" ", 1)
    return [*LAYOUTS[layout], *OPTIMIZERS[optimizer], "--train-iters", "4"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{case: rank 0's result}: "straight", "save RUN" and "SAVED > RUN"; two iterations each but for the first."""
    folder = tmp_path_factory.mktemp("optimizer layouts")
    cases = {"straight": (["--no-checkpoints", *words("plain DP2")], None)}
    restarts = [*((before, now) for before, now, _ in REFUSED), *ALLOWED]
    for before in dict.fromkeys(before for before, _ in restarts):
        cases[f"save {before}"] = ([*words(before), "--save", str(folder / before), "--exit-interval", "2"], None)
    for before, now in restarts:
        fault = "no check of the optimizer's layout" if (before, now) not in ALLOWED else None
        cases[f"{before} > {now}"] = ([*words(now), "--load", str(folder / before), "--no-checkpoints"], fault)
    entries = [
        {
            "name": name,
            "argv": [*BASE, *argv, "--runs-dir", str(folder / "runs"), "--run-name", name],
            "break": fault,
            "may_fail": fault is not None,
        }
        for name, (argv, fault) in cases.items()
    ]
    return {name: ranks[0] for name, ranks in run_groups(folder, [[(2, entries)]]).items()}


def parsed(run: str, *more: str) -> argparse.Namespace:
    args = arguments.parse([*BASE, *words(run), *more])
    arguments.fill_defaults(args)
    args.virtual_pipeline_model_parallel_size = args.num_virtual_stages_per_pipeline_rank  # as Megatron's validation
    return args


@pytest.fixture
def saved_by(monkeypatch):
    def set_saved(run: str) -> None:
        monkeypatch.setattr(compatibility, "saved_arguments", lambda folder, step: parsed(run))

    return set_saved


@pytest.mark.parametrize(("before", "now", "said"), REFUSED)
def test_what_would_fail_is_refused(results, saved_by, before, now, said):
    assert "failed" in results[f"{before} > {now}"]
    saved_by(before)
    with pytest.raises(UsageError) as caught:
        resharding.check_optimizer_layout(parsed(now, "--load", "somewhere"))
    text = str(caught.value)
    assert said in text and "--no-load-optim" in text and "\n" not in text and len(text) < 400
    assert ("--dist-ckpt-optim-fully-reshardable" in text) == (said == BUFFERS)
    resharding.check_optimizer_layout(parsed(now, "--load", "somewhere", "--no-load-optim"))
    resharding.check_optimizer_layout(parsed(now, "--load", "somewhere", "--finetune"))


@pytest.mark.parametrize(("before", "now"), ALLOWED)
def test_what_is_allowed_goes_on(results, saved_by, before, now):
    saved_by(before)
    resharding.check_optimizer_layout(parsed(now, "--load", "somewhere"))
    expected, ours = results["straight"], results[f"{before} > {now}"]
    assert len(ours["loss"]) == 2
    for key in ("loss", "grad_norm"):
        assert ours[key] == pytest.approx(expected[key][2:], rel=5e-6)
