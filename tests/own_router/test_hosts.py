"""The documented router in every host: its argument, the width of its state, its buffer, one process and two stages."""

import json
import subprocess
import sys

import pytest
import torch

from tests.checkpoints import assert_same_tensors, load_tensors
from tests.distributed.arguments import ALL_CELLS
from tests.existing_job.jobs import OWN_ENTRY, STOCK_SCRIPT, WRAPPER, as_own_entry, losses, start
from tests.own_router.conftest import ROOT, SHORT_NAME, TYPE, block, environment

SKETCH = 5
ROUTER = ["--moe-router-type", TYPE, "--moe-router-sketch-size", str(SKETCH)]
HIDDEN, EXPERTS, LAYERS = 32, 4, 4
SMALL = (
    f"--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads 2 --ffn-hidden-size 32 "
    f"--num-experts {EXPERTS} --moe-ffn-hidden-size 32 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 2 --global-batch-size 8 "
    "--lr 1e-2 --lr-decay-style constant --lr-warmup-fraction=null --eval-iters 0 --log-interval 1 "
    "--no-final-evaluation --moe-aux-loss-coeff 0.1 --init-method-std 0.2 --moe-router-init=null"
).split()
OF_LAYERS = "decoder.layers.mlp.router.routing_layer."  # a checkpoint stacks what all layers have
RESUMED = ["--load", "two/checkpoints", "--ckpt-step", "2", "--train-iters", "6"]
ONE_RANK = ["--train-iters", "2", "--pipeline-model-parallel-size", "1"]
RUNS = {
    "two": ["--train-iters", "2"],  # two stages, tiny.yaml's layout
    "on": RESUMED,
    "one": [*RESUMED, "--pipeline-model-parallel-size", "1"],
}


def launch(package, folder, name, argv, router=ROUTER):
    """Trains with the launcher, or returns what it said with --dry-run."""
    command = ["bash", str(ROOT / "launch" / "pretrain_rmoe.sh"), *SMALL, *router, *argv]
    done = subprocess.run(
        [*command, "--run-name", name, "--runs-dir", str(folder), "--save-interval", "2"],
        env={**environment(package), "RMOE_PYTHON": sys.executable},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


slow = pytest.mark.skipif(not ALL_CELLS, reason="RMOE_TEST_ALL_CELLS=1 runs it")


@pytest.fixture(scope="module")
def trained(package, tmp_path_factory):
    """Two iterations on two stages, and four more of them on two stages and in one process."""
    folder = tmp_path_factory.mktemp("launched")
    for name, argv in RUNS.items():
        launch(package, folder, name, argv)
    return folder


def metrics(folder, name):
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line for line in lines if line["kind"] == "train"}


def test_two_stages_train_as_one_process_does(trained):
    stages, one = metrics(trained, "on"), metrics(trained, "one")
    assert stages.keys() == one.keys() == {3, 4, 5, 6}
    for iteration, line in stages.items():
        assert line["lm_loss"] == pytest.approx(one[iteration]["lm_loss"], abs=2e-6)
        assert line["grad_norm"] == pytest.approx(one[iteration]["grad_norm"], rel=2e-5)
        norms = line["routing"]["state_norm"]
        assert len(norms) == LAYERS and min(norms) > 0


def test_the_checkpoint_has_its_tensors_and_training_leaves_the_buffer(trained):
    start, end = (load_tensors(trained / name / "checkpoints") for name in ("two", "on"))
    shapes = {"weight": (EXPERTS, HIDDEN), "reads": (EXPERTS, SKETCH), "share": (SKETCH,)}
    for name, shape in (shapes | {"projection": (SKETCH, HIDDEN)}).items():
        assert start[OF_LAYERS + name].shape == (LAYERS, *shape)
    for name in shapes:
        assert all(
            (ours != theirs).any() for ours, theirs in zip(start[OF_LAYERS + name], end[OF_LAYERS + name], strict=True)
        )
    projections = start[OF_LAYERS + "projection"]
    assert torch.equal(projections, end[OF_LAYERS + "projection"])
    assert not any(torch.equal(projections[0], other) for other in projections[1:])  # each layer drew its own


@slow
def test_a_float_buffer_is_rounded_with_the_model_once(package, tmp_path):
    launch(package, tmp_path, "half", ["--train-iters", "2", "--bf16", "--moe-router-dtype", "fp32"])
    launch(package, tmp_path, "more", ["--train-iters", "4", "--bf16", "--moe-router-dtype", "fp32",
                                       "--load", "half/checkpoints", "--finetune"])  # fmt: skip
    start, end = (load_tensors(tmp_path / name / "checkpoints") for name in ("half", "more"))
    name = OF_LAYERS + "projection"
    assert start[name].dtype == end[name].dtype == torch.bfloat16 and torch.equal(start[name], end[name])


def test_a_megatron_script_trains_with_it_as_our_own_entry_does(package, tmp_path):
    gru = [word for word in ROUTER]
    wrapped = start(tmp_path / "1", [*WRAPPER, str(STOCK_SCRIPT)], gru, pythonpath=package)
    own = start(tmp_path / "2", ["-c", OWN_ENTRY], [*gru, "--runs-dir", str(tmp_path / "2/runs")], pythonpath=package)
    (code, output), (own_code, own_output) = wrapped.end(), own.end()
    assert (code, own_code) == (0, 0), output[-2000:] + own_output[-2000:]
    assert len(losses(output)) == 4 + 3 and as_own_entry(losses(output)) == losses(own_output)
    assert_same_tensors(wrapped.checkpoint, own.checkpoint)
    assert OF_LAYERS + "projection" in load_tensors(wrapped.checkpoint)


MEGABLOCKS = """
code = open({example!r}).read().replace('moe_router_type="gru", moe_router_rnn_hidden_size=32', {router!r})
names = {{"__file__": {example!r}}}
exec(code, names)
stack, losses = names["stack"], names["losses"]
assert stack.rnn_router is None and losses[-1] < losses[0] - 1, losses
layers = [block.moe.router.routing_layer for block in stack.layers]
assert [layer.index for layer in layers] == [0, 1, 2, 3]
for layer in layers:
    assert all(p.grad is not None and p.grad.norm() > 0 for p in layer.parameters())
    assert layer.projection.shape == (5, 64) and not layer.projection.requires_grad
assert "layers.3.moe.router.routing_layer.projection" in stack.state_dict()
"""


@pytest.mark.parametrize("name", [pytest.param(TYPE, marks=slow), SHORT_NAME])
def test_megablocks(installed, name):
    router = f'moe_router_type={name!r}, moe_router_options={{"moe_router_sketch_size": {SKETCH}}}'
    example = str(ROOT / "tests" / "megablocks" / "plain_torch_example.py")
    done = python(installed, MEGABLOCKS.format(example=example, router=router))
    assert done.returncode == 0, done.stderr


def python(folder, code, *argv):
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, env=environment(folder), cwd=folder, capture_output=True, text=True, timeout=300)


PLAN = "import sys; from rmoe_megablocks import cli; sys.exit(cli.main(sys.argv[1:]))"


@pytest.mark.parametrize("name", [TYPE, pytest.param(SHORT_NAME, marks=slow)])
def test_the_plan_measures_it(installed, name):
    tiny = str(ROOT / "configs" / "tiny.yaml")
    done = python(installed, PLAN, "plan", tiny, "--moe-router-type", name, "--moe-router-sketch-size", "5", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["warnings"] == []
    assert found["parameters"]["routing"] == 4 * (8 * 128 + 8 * 5 + 5) and found["parameters"]["frozen"] == 0
    # a state of 5 in fp32 for 4 sequences of 256 in each of 4 micro-batches
    assert found["sent_per_rank_and_step"]["pipeline_state"] == 4 * 4 * 256 * 5 * 4
    forward = 4 * 2 * (5 * 128 + 8 * 128 + 8 * 5)
    assert found["flops_per_token"]["routing_forward"] == forward
    assert found["flops_per_token"]["routing_backward"] == 2 * forward - 4 * 2 * 5 * 128  # the projection has none


def test_an_installed_package_is_found_by_its_name(installed, tmp_path):
    """In a configuration file as well; with a type of this package typed beside it, its argument is dropped."""
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"defaults: {ROOT}/configs/tiny.yaml\nMODEL_ARGS:\n  --moe-router-type: {SHORT_NAME}\n"
        f"  --moe-router-sketch-size: {SKETCH}\n  --moe-router-rnn-hidden-size: null\n"
    )
    said = launch(installed, tmp_path, "short", ["--config", str(config), *ONE_RANK], router=[])
    assert (tmp_path / "short" / "config.yaml").read_text().count(f"--moe-router-type: {SHORT_NAME}") == 1, said
    assert OF_LAYERS + "share" in load_tensors(tmp_path / "short" / "checkpoints")


@slow
def test_a_module_beside_the_run_is_found_by_launcher_and_workers(package, tmp_path):
    """Without PYTHONPATH, in the folder that the run is started in."""
    (tmp_path / "my_package").symlink_to(package / "my_package")
    launch(ROOT, tmp_path, "beside", ["--train-iters", "2"])
    assert metrics(tmp_path, "beside").keys() == {1, 2}


def test_the_page_is_about_thirty_lines_of_code():
    code = [line for line in block("python").splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(code) <= 32
