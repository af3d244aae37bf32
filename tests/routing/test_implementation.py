"""What --moe-router-impl chooses, refuses and keeps."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rmoe_megablocks.planning.counts.routing import measure
from rmoe_megablocks.routing import RoutingConfig, get_router_type
from rmoe_megablocks.routing.parts import implementation
from rmoe_megablocks.routing.parts.implementation import AUTO, EAGER, RECOMPUTE, TRITON, chosen

ROOT = Path(__file__).parents[2]
BF16, FP32 = torch.bfloat16, torch.float32
T, H, P, E = 6, 20, 8, 4
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_said_yet():
    implementation._chosen.cache_clear()
    yield
    implementation._chosen.cache_clear()


def config(impl: str, **options) -> RoutingConfig:
    chosen_options = {"moe_router_impl": impl, "moe_router_rnn_hidden_size": P, "moe_router_init": "fan_in"}
    return RoutingConfig(H, E, chosen_options | options)


def stack(impl: str, **options):
    """Three layers, their cell and a function of their inputs: all logits and the last state."""
    torch.manual_seed(0)
    gru = get_router_type("gru")
    layers = [gru.build_layer(config(impl, **options)) for _ in range(3)]
    cell = gru.build_shared(config(impl, **options))

    def run(xs, dtype=None):
        h, logits = None, []
        for layer, x in zip(layers, xs, strict=True):
            logits_TE, h = layer(x, h, cell, dtype)
            logits.append(logits_TE)
        return [*logits, h]

    return run, torch.nn.ModuleList([*layers, cell])


def test_auto_is_eager_on_a_cpu(caplog):
    with caplog.at_level(logging.INFO):
        assert [chosen(AUTO, CPU, FP32, FP32, P, E) for _ in range(3)] == [EAGER] * 3
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == "rmoe: the router is computed by eager: it needs a CUDA GPU, and runs on cpu"


@pytest.mark.parametrize(
    ("dtype", "parameters", "size", "experts", "found", "reason"),
    [
        (FP32, BF16, 128, 16, TRITON, ""),
        (BF16, BF16, 512, 512, TRITON, ""),
        (FP32, BF16, 513, 16, EAGER, ": it takes a state and experts of at most 512, not 513 and 16"),
        (torch.float64, FP32, 8, 4, EAGER, ": it takes fp32, bf16 and fp16, not torch.float64 over torch.float32"),
    ],
)
def test_auto_on_a_gpu_says_once_what_it_is(caplog, dtype, parameters, size, experts, found, reason):
    with FakeTensorMode():
        assert [chosen(AUTO, GPU, dtype, parameters, size, experts) for _ in range(3)] == [found] * 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"rmoe: the router is computed by {found}{reason}"


@pytest.mark.parametrize("impl", [TRITON, RECOMPUTE])
@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_other_recurrences_have_no_other_form(name, impl):
    with pytest.raises(ValueError, match=f"--moe-router-impl {impl}: .* has torch's operations alone; use auto"):
        get_router_type(name).build_layer(config(impl))
    get_router_type(name).build_layer(config(AUTO))


def test_triton_is_refused_by_name():
    run, _ = stack(TRITON)
    with pytest.raises(ValueError, match="^--moe-router-impl triton: it needs a CUDA GPU, and runs on cpu; use auto$"):
        run([torch.randn(T, H)] * 3)
    with pytest.raises(ValueError, match="at most 512, not 600; use auto"):
        stack(TRITON, moe_router_rnn_hidden_size=600)


def test_recompute_trains_as_eager():
    """200 steps of Adam: the same numbers to the bit, since the same products make them."""
    losses = {}
    for impl in (EAGER, RECOMPUTE):
        run, modules = stack(impl)
        optimizer = torch.optim.Adam(modules.parameters(), lr=1e-2)
        xs = list(torch.randn(3, T, H, generator=torch.Generator().manual_seed(1)))
        losses[impl] = []
        for _ in range(200):
            optimizer.zero_grad()
            loss = sum((value - 1).square().mean() for value in run(xs))
            loss.backward()
            optimizer.step()
            losses[impl].append(loss.item())
    assert losses[EAGER][-1] < 0.5 * losses[EAGER][0]
    torch.testing.assert_close(losses[EAGER], losses[RECOMPUTE], rtol=1e-4, atol=1e-6)


def test_on_a_gpu_that_is_not_there():
    """tests/routing/fake_gpu.py, in a process without CPU mode, in which torch takes "cuda" for the CPU."""
    command = [sys.executable, "-m", "tests.routing.fake_gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.endswith("12 stacks, 2 products, 2 faults seen\n"), done.stdout


@pytest.mark.parametrize(
    ("impl", "dtype", "router_dtype", "kept", "kept_once"),
    [
        # x' and the new state; where parameters were cast, the matrices in bf16 and the biases in fp32
        (TRITON, 2, 4, 2 * 4 * P, 2 * 6 * P**2 + 4 * 6 * P),
        (AUTO, 2, 4, 2 * 4 * P, 2 * 6 * P**2 + 4 * 6 * P),
        (TRITON, 2, 2, 2 * 2 * P, 0),
        (TRITON, 4, 4, 2 * 4 * P, 0),
        (RECOMPUTE, 2, 4, 2 * 4 * P, 4 * 6 * P * (P + 1)),
        (RECOMPUTE, 4, 4, 2 * 4 * P, 0),
        (EAGER, 2, 4, 6 * 4 * P, 4 * 6 * P**2),
        (EAGER, 2, 2, 6 * 2 * P, 0),
        (AUTO, 2, 8, 6 * 8 * P, 8 * 6 * P**2),  # no kernel for float64
    ],
)
def test_the_plan_counts_what_each_form_keeps(impl, dtype, router_dtype, kept, kept_once):
    cost = measure(get_router_type("gru"), config(impl), dtype, router_dtype)
    assert (cost.kept, cost.kept_once) == (kept, kept_once)
    again = 0 if impl == EAGER or router_dtype == 8 else 12 * P**2  # the gates, in the backward pass
    assert cost.forward.token == 2 * (H * P + 6 * P**2 + P * E)
    assert cost.backward.token == 2 * cost.forward.token + again
