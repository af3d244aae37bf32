"""Who computes the routing step: one declared table.

Where hidden states are in bf16 and an fp32 state is asked for, providers without ``fp32_state`` compute in bf16
throughout, state and logits too: that is less than what is asked, and faster than they would be with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measuring.command_line import check_names
from benchmarks.routing_step.inputs import Inputs, Step, Values, linear, product, recurrence
from benchmarks.routing_step.sizes import Size
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.kernels import gru_step, why_not_triton
from rmoe_megablocks.routing import STATE_SIZE, RoutingConfig, get_router_type
from rmoe_megablocks.routing.parts.implementation import EAGER, IMPL, RECOMPUTE, TRITON

COMPILER = "inductor"  # torch.compile's backend
_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_ALL = ("x", "h", "projector", *_CELL, "router")


@dataclass(frozen=True)
class Provider:
    """One entry of the table.

    Attributes:
        name, summary: what it is.
        build: its step on some inputs, with x', state and logits in a dtype.
        equations: what it computes, on any values: the float64 truth it is held against.
        fp32_state: it computes in fp32 where an fp32 state is asked for beside bf16 hidden states.
        when_named: on a CPU it is left out unless named, because it takes minutes to compile.
        why_not: why it does not run at a size on a device; None if it does.
    """

    name: str
    summary: str
    build: Callable[[Inputs, torch.dtype], Step]
    equations: Callable[[Values], tuple[Tensor, ...]] = recurrence
    fp32_state: bool = False
    when_named: bool = False
    why_not: Callable[[Size, torch.device], str | None] = lambda size, device: None

    def arithmetic(self, size: Size) -> torch.dtype:
        """Dtype of its x', state and logits."""
        return size.state if self.fp32_state else size.hidden


def _leaves(inputs: Inputs, dtype: torch.dtype, names: Sequence[str] = _ALL) -> dict[str, Tensor]:
    """x and parameters in the dtype of the hidden states, h in ``dtype``."""
    return {name: inputs.leaf(name, dtype if name == "h" else inputs.size.hidden) for name in names}


def _step(run: Callable[[], tuple[Tensor, ...]], leaves: dict[str, Tensor]) -> Step:
    return Step(run, {name: (leaf,) for name, leaf in leaves.items()})


def _released(inputs: Inputs, dtype: torch.dtype, compiled: bool = False) -> Step:
    """Six linears, each with a matrix and a bias of its own, as the released code's twelve parameters."""
    v = _leaves(inputs, dtype)
    parts = {name: [part.detach().clone().requires_grad_() for part in v[name].chunk(3)] for name in _CELL}
    W_ir, W_iz, W_in = parts["weight_ih"]
    W_hr, W_hz, W_hn = parts["weight_hh"]
    b_ir, b_iz, b_in = parts["bias_ih"]
    b_hr, b_hz, b_hn = parts["bias_hh"]

    def run(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        x = F.linear(x, v["projector"])
        r = torch.sigmoid(F.linear(x, W_ir, b_ir) + F.linear(h, W_hr, b_hr))
        z = torch.sigmoid(F.linear(x, W_iz, b_iz) + F.linear(h, W_hz, b_hz))
        n = torch.tanh(F.linear(x, W_in, b_in) + r * F.linear(h, W_hn, b_hn))
        h = (1 - z) * n + z * h
        return F.linear(h, v["router"]), h

    run = _compiled(run) if compiled else run
    leaves = {name: tuple(parts[name]) if name in parts else (leaf,) for name, leaf in v.items()}
    return Step(lambda: run(v["x"], v["h"]), leaves)


def _naive(inputs: Inputs, dtype: torch.dtype, compiled: bool = False) -> Step:
    """routing/reference.py's, left to autograd."""
    v = _leaves(inputs, dtype)
    run = _compiled(recurrence) if compiled else recurrence
    return _step(lambda: run(v), v)


def _compiled(function: Callable) -> Callable:
    torch._dynamo.reset()  # a code object that was compiled for eight sizes is not compiled again
    return torch.compile(function, fullgraph=True, dynamic=False, backend=COMPILER)


def _gru_cell(inputs: Inputs, dtype: torch.dtype) -> Step:
    v = _leaves(inputs, dtype)
    cell = torch.nn.GRUCell(inputs.size.state_size, inputs.size.state_size, device=inputs.device, dtype=dtype)
    with torch.no_grad():
        for name in _CELL:
            getattr(cell, name).copy_(v[name])
    v.update(cell.named_parameters())

    def run() -> tuple[Tensor, Tensor]:
        h = cell(F.linear(v["x"], v["projector"]), v["h"])
        return F.linear(h, v["router"]), h

    return _step(run, v)


def _upcast(inputs: Inputs, dtype: torch.dtype) -> Step:
    v = _leaves(inputs, dtype)

    def run() -> tuple[Tensor, Tensor]:
        x = F.linear(v["x"].to(dtype), v["projector"].to(dtype))
        h = gru_step(x, v["h"], *(v[name].to(dtype) for name in _CELL))
        return F.linear(h, v["router"].to(dtype)), h

    return _step(run, v)


def _ours(impl: str) -> Callable[[Inputs, torch.dtype], Step]:
    """The router layer and the shared cell, as a host calls them."""

    def build(inputs: Inputs, dtype: torch.dtype) -> Step:
        size, kind = inputs.size, get_router_type("gru")
        config = RoutingConfig(size.hidden_size, size.experts, {STATE_SIZE: size.state_size, IMPL: impl})
        layer, cell = (
            module.to(inputs.device, size.hidden) for module in (kind.build_layer(config), kind.build_shared(config))
        )
        v = _leaves(inputs, dtype, ("x", "h"))
        parameters = {name: getattr(layer, name) for name in ("projector", "router")}
        parameters |= {name: getattr(cell, name) for name in _CELL}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(inputs.values[name])
        return _step(lambda: layer(v["x"], v["h"], cell, dtype), v | parameters)

    return build


def _projector_router(inputs: Inputs, dtype: torch.dtype) -> Step:
    from rmoe_megablocks.kernels import linear_in_dtype

    v = _leaves(inputs, dtype, ("x", "projector", "router"))

    def run() -> tuple[Tensor]:
        x = linear_in_dtype(v["x"], v["projector"], None, dtype)
        return (linear_in_dtype(x, v["router"], None, dtype),)

    return _step(run, v)


def _megatron_linear(inputs: Inputs, dtype: torch.dtype) -> Step:
    from rmoe_megablocks.compat import megatron_cpu

    megatron_cpu.install(announce=False)
    from megatron.core.transformer.moe.moe_utils import router_gating_linear  # behind CPU mode

    v = _leaves(inputs, dtype, ("x", "gate"))
    return _step(lambda: (router_gating_linear(v["x"], v["gate"], None, dtype),), v)


def _only_mixed(size: Size, device: torch.device) -> str | None:
    return None if size.state != size.hidden else "it is for an fp32 state beside bf16 hidden states"


def _has_kernel(size: Size, device: torch.device) -> str | None:
    return why_not_triton(device, size.state, size.hidden, size.state_size, size.experts)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("released", "six linears, as released", _released),
        Provider("naive", "Eq. 2-6 as routing/reference.py has them", _naive),
        Provider("GRUCell", "torch.nn.GRUCell between projector and router", _gru_cell),
        Provider("compiled", "torch.compile of naive", lambda i, d: _naive(i, d, True), when_named=True),
        Provider("compiled_released", "torch.compile of released", lambda i, d: _released(i, d, True), when_named=True),
        Provider("upcast", "all operands copied to fp32 first", _upcast, fp32_state=True, why_not=_only_mixed),
        Provider(EAGER, "ours, gates kept", _ours(EAGER), fp32_state=True),
        Provider(RECOMPUTE, "ours, gates computed again", _ours(RECOMPUTE), fp32_state=True),
        Provider(TRITON, "ours, kernels", _ours(TRITON), fp32_state=True, why_not=_has_kernel),
        Provider("projector_router", "floor: no recurrence", _projector_router, product, fp32_state=True),
        Provider(
            "megatron_linear", "Megatron's linear router: its product alone", _megatron_linear, linear, fp32_state=True
        ),
    )
}


def select(names: Sequence[str] | None, size: Size, device: torch.device) -> list[Provider]:
    """Those named, or all that run at a size on a device. Raises UsageError for one that is unknown or cannot run."""
    if names is None:
        found = (p for p in PROVIDERS.values() if not (p.when_named and device.type == "cpu"))
        return [provider for provider in found if provider.why_not(size, device) is None]
    check_names("--providers", names, PROVIDERS)
    for name in names:
        reason = PROVIDERS[name].why_not(size, device)
        if reason is not None:
            raise UsageError(f"--providers {name}: {reason}; leave it out")
    return [PROVIDERS[name] for name in names]
