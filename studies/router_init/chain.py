"""From a layer's input to its logits, gru alone: where the spread goes, and how much of it tells no two tokens apart.

Inputs and draws as in ``initial``. x' is what the projector makes of them, h the state behind the shared cell. The part
that is "the same for all tokens" is the square of the mean over tokens as a share of the mean square: it comes from the
cell's biases, prefers the same experts for every token, and is nothing to route by.
"""

import argparse
import functools

import torch
from torch import Tensor

from rmoe_megablocks.routing import LAYER_INITS, get_router_type
from studies.router_init import initial

CONFIGURATIONS = ("tiny", "rmoe_enwik8_small", "rmoe_0.9b_8xa100")
_HEAD = ("configuration", "--moe-router-init", "layer", "x'", "h", "the same for all tokens", "logits", "the same")
_DRAWS = 4


add_arguments = initial.add_arguments


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    return initial.tell(markdown, args)


def markdown() -> str:
    """Rows for the first and the last layer of some configurations, by initialisation."""
    lines = [
        "Root mean squares of projected inputs, state and logits (around a token's mean) before the first step, inputs",
        f"of root mean square 1, {_DRAWS} draws; shares of the mean square that are the same for all tokens.",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|" + "---|" * len(_HEAD),
    ]
    for name in CONFIGURATIONS:
        sizes = initial.sizes(initial.CONFIGS / f"{name}.yaml")
        for init in LAYER_INITS:
            layers = by_layer(sizes, init)
            for number in (1, len(layers)):
                x, h, h_same, logits, same = layers[number - 1]
                figures = f"{x:.3g} | {h:.3g} | {h_same:.0%} | {logits:.3g} | {same:.0%}"
                lines.append(f"| {name} | {init} | {number} | {figures} |")
    return "\n".join(lines) + "\n"


@functools.cache
def by_layer(of: initial.Sizes, init: str, seed: int = 1) -> list[tuple[float, float, float, float, float]]:
    """For each layer x', h, the share of h that is the same for all tokens, logits, and theirs."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        squares = torch.stack([_squares(of, init) for _ in range(_DRAWS)]).mean(0)
    return [(x**0.5, h**0.5, h_same / h, logits**0.5, same / logits) for x, h, h_same, logits, same in squares.tolist()]


def _squares(of: initial.Sizes, init: str) -> Tensor:
    """[layers, 5]: mean squares of x', h and logits, the latter two also of their means over tokens."""
    config = initial.routing_config(of, init)
    gru = get_router_type("gru")
    cell, h_TP, found = gru.build_shared(config), None, []
    for _ in range(of.layers):
        layer, x_TH = gru.build_layer(config), initial.inputs(of)
        logits_TE, h_TP = layer(x_TH, h_TP, cell)
        centred_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
        projected_TP = x_TH @ layer.projector.T + (0 if layer.projector_bias is None else layer.projector_bias)
        found.append([projected_TP.square().mean(), *_with_mean(h_TP), *_with_mean(centred_TE)])
    return torch.tensor(found)


def _with_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.square().mean(), values.mean(0).square().mean()
