"""What MegaBlocks' experts cannot do is said in one line, before anything is started."""

import importlib.util

import pytest

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments, preflight
from rmoe_megablocks.megatron.checkpoints import compatibility
from rmoe_megablocks.megatron.experts import backend
from tests.distributed.arguments import BASE, of_type

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
NOT_WITH = "--moe-backend megablocks does not work with "
REFUSED = {
    "--moe-backend tutel": "argument --moe-backend: invalid choice: 'tutel'",
    "--moe-ffn-hidden-size 24": "--moe-ffn-hidden-size 24 x --num-experts 4 = 96 is less than the 128",
    "--expert-model-parallel-size 3": "--num-experts 4 cannot be shared out evenly among --expert-model-parallel",
    "--moe-router-topk 5": "--moe-router-topk 5: there are only 4 experts",
    TP2 + " --expert-tensor-parallel-size 2": NOT_WITH + "--expert-tensor-parallel-size 2: its experts are whole",
    "--tensor-model-parallel-size 2": NOT_WITH + "--tensor-model-parallel-size above 1 alone: add --sequence-parallel",
    "--moe-expert-capacity-factor 1.0": NOT_WITH + "--moe-expert-capacity-factor: it drops no token",
    "--moe-router-padding-for-quantization": NOT_WITH + "--moe-router-padding-for-quantization: it pads nothing",
    "--moe-router-load-balancing-type quantile_balancing": NOT_WITH + "--moe-router-load-balancing-type quantile",
    "--moe-token-dispatcher-type flex": NOT_WITH + "--moe-token-dispatcher-type flex",
    "--moe-shared-expert-intermediate-size 32 --moe-shared-expert-overlap": NOT_WITH + "--moe-shared-expert-overlap",
    "--moe-use-upcycling": NOT_WITH + "--moe-use-upcycling: up-cycle and save once with --moe-backend megatron",
    "--moe-grouped-gemm --recompute-granularity selective --recompute-modules moe_act": NOT_WITH
    + "--recompute-modules",
    "--activation-func-clamp-value 7": NOT_WITH + "--activation-func-clamp-value",
    "--moe-latent-size 16": NOT_WITH + "--moe-latent-size",
    "--mtp-num-layers 1": NOT_WITH + "--mtp-num-layers",
    "--use-torch-fsdp2": NOT_WITH + "--use-torch-fsdp2: use --use-distributed-optimizer",
    "--overlap-moe-expert-parallel-comm": NOT_WITH + "--overlap-moe-expert-parallel-comm",
}


def refusal(runs, *argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        preflight.check([*argv, "--runs-dir", str(runs)])
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize("router", ["linear", "gru"])
@pytest.mark.parametrize("words", REFUSED)
def test_refused(tmp_path, words, router):
    argv = [*BASE, *of_type(router), "--moe-backend", "megablocks", *words.split()]
    assert REFUSED[words] in refusal(tmp_path, *argv)


def test_biases_are_refused(tmp_path):
    argv = [word for word in BASE if word != "--disable-bias-linear"]
    text = refusal(tmp_path, *argv, "--moe-backend", "megablocks")
    assert text.startswith(NOT_WITH + "biases in the experts: add --disable-bias-linear")


def test_a_model_without_experts_is_refused(tmp_path):
    at = BASE.index("--num-experts")
    argv = [*BASE[:at], *BASE[at + 2 :], *of_type("linear"), "--moe-backend", "megablocks"]
    assert refusal(tmp_path, *argv) == "--moe-backend megablocks: the model has no experts; set --num-experts"


def test_without_megablocks_the_way_to_it_is_named(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "megablocks" else found(name))
    text = refusal(tmp_path, *BASE, "--moe-backend", "megablocks")
    assert text == "--moe-backend megablocks: megablocks not installed; run 'rmoe install megablocks'"


def parsed(*argv: str):
    return arguments.parse([*BASE, *argv])


def test_experts_are_not_split_over_tensor_ranks():
    argv = [*TP2.split(), "--expert-model-parallel-size", "4"]
    ours, megatrons = parsed(*argv, "--moe-backend", "megablocks"), parsed(*argv)
    assert (arguments.layout_size(ours), arguments.layout_size(megatrons)) == (4, 8)
    for args, expected in ((ours, 1), (megatrons, 2)):
        arguments.fill_defaults(args)
        assert args.expert_tensor_parallel_size == backend.expert_tensor_size(args) == expected


@pytest.mark.parametrize(
    ("saved", "run", "refused"),
    [
        ("--use-distributed-optimizer", "--moe-backend megablocks", True),
        ("--use-distributed-optimizer --moe-backend megablocks", "", True),
        ("--use-distributed-optimizer --moe-backend megablocks", "--moe-backend megablocks", False),
        ("--use-distributed-optimizer", "--moe-backend megablocks --no-load-optim", False),
        ("--use-distributed-optimizer", "--moe-backend megablocks --finetune", False),
        ("--use-distributed-optimizer --no-save-optim", "--moe-backend megablocks", False),
        ("--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable", "--moe-backend megablocks", False),
        ("", "--moe-backend megablocks", False),
    ],
)
def test_optimizer_state_in_buffer_order_stays_with_its_backend(monkeypatch, saved, run, refused):
    monkeypatch.setattr(compatibility, "latest_iteration", lambda folder: 5)
    monkeypatch.setattr(compatibility, "saved_arguments", lambda folder, step: parsed(*saved.split()))
    args = parsed("--load", "somewhere", *run.split())
    if not refused:
        compatibility.check_router_matches(args)
        return
    with pytest.raises(UsageError, match="--load somewhere: .* add --no-load-optim for the weights alone"):
        compatibility.check_router_matches(args)
