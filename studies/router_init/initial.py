"""The logits' standard deviation over the experts, as every configuration's routers are drawn.

Only the routers are built, at the configuration's sizes. Every layer gets inputs of its own, normal numbers scaled to
a root mean square of 1 for each token, which is what a fresh RMSNorm or LayerNorm hands to its router; a real model's
layers see inputs that are alike, which changes the later layers a little. Figures are as ``logits_std`` in
metrics.jsonl: root of the tokens' mean variance, here also over several draws.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rmoe_megablocks.launcher.config import load_config
from rmoe_megablocks.routing import (
    BIAS,
    FAN_IN,
    INIT,
    LAYER_INITS,
    RNN_INIT,
    STATE_SIZE,
    RoutingConfig,
    fan_in_,
    get_router_type,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_TOKENS, _DRAWS = 128, 8


class Sizes(NamedTuple):
    """What of a configuration decides its routers' start."""

    layers: int
    hidden_size: int
    experts: int
    state_size: int
    bias: bool
    std: float
    rnn_init: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="also write the table to this file")


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    return tell(markdown, args)


def tell(markdown: Callable[[], str], args: argparse.Namespace) -> int:
    """Prints a table, which is computed by one thread, and leaves it where ``args`` say."""
    torch.set_num_threads(1)
    table = markdown()
    print(table, end="")
    if args.output:
        args.output.write_text(table)
    return 0


def configurations() -> Iterator[Path]:
    """Those with the recurrent router; each speaks for its linear twin, which has the same sizes."""
    return (path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.startswith("smoe_"))


def sizes(path: Path) -> Sizes:
    """Read from a configuration, with the defaults of the arguments."""
    found = load_config(path).arguments
    return Sizes(
        layers=int(str(found["--num-layers"])),
        hidden_size=int(str(found["--hidden-size"])),
        experts=int(str(found["--num-experts"])),
        state_size=int(str(found.get("--moe-router-rnn-hidden-size", 128))),
        bias=bool(found.get("--moe-router-rnn-bias", False)),
        std=float(str(found.get("--init-method-std", 0.02))),
        rnn_init=str(found.get("--moe-router-rnn-init", "standard")),
    )


def markdown() -> str:
    """A row a configuration: first and last layer of gru, every layer of linear is alike."""
    inits = ", ".join(LAYER_INITS)
    columns = [f"{router} {init}" for router in ("gru", "linear") for init in LAYER_INITS]
    lines = [
        f"Logits' standard deviation over the experts before the first step, by --moe-router-init ({inits}): first to",
        f"last layer; inputs of root mean square 1, {_DRAWS} draws of {_TOKENS} tokens. Entropy is about",
        "ln E - (standard deviation)^2 / 2.",
        "",
        "| configuration and its linear twin | layers, H, P, E | " + " | ".join(columns) + " |",
        "|" + "---|" * (2 + len(columns)),
    ]
    for path in configurations():
        found = sizes(path)
        cells = [f"{found.layers}, {found.hidden_size}, {found.state_size}, {found.experts}"]
        for router in ("gru", "linear"):
            for init in LAYER_INITS:
                spreads = by_layer(found, router, init)
                cells.append(f"{spreads[0]:.3g} to {spreads[-1]:.3g}" if router == "gru" else f"{_mean(spreads):.3g}")
        lines.append(f"| {path.stem} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@functools.cache  # layouts of one model have the same sizes
def by_layer(of: Sizes, router: str, init: str, seed: int = 1) -> list[float]:
    """The logits' standard deviation in each layer, root of the mean square over draws."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        variances = torch.tensor([_variances(of, router, init) for _ in range(_DRAWS)])
    return variances.mean(0).sqrt().tolist()


def routing_config(of: Sizes, init: str) -> RoutingConfig:
    """What the routers of a configuration are built from."""
    options = {STATE_SIZE: of.state_size, BIAS: of.bias, RNN_INIT: of.rnn_init, INIT: init}
    return RoutingConfig(of.hidden_size, of.experts, options, init_method=_normal(of.std))


def _normal(std: float) -> functools.partial:
    return functools.partial(torch.nn.init.normal_, mean=0.0, std=std)


def _variances(of: Sizes, router: str, init: str) -> list[float]:
    if router == "linear":
        return [_variance(inputs(of) @ _linear_weight(of, init).T) for _ in range(of.layers)]
    config = routing_config(of, init)
    kind = get_router_type(router)
    cell, h_TP, found = kind.build_shared(config), None, []
    for _ in range(of.layers):
        logits_TE, h_TP = kind.build_layer(config)(inputs(of), h_TP, cell)
        found.append(_variance(logits_TE))
    return found


def inputs(of: Sizes) -> Tensor:
    """Of one layer: tokens of root mean square 1, [T, H]."""
    x_TH = torch.randn(_TOKENS, of.hidden_size)
    return x_TH / x_TH.square().mean(-1, keepdim=True).sqrt()


def _linear_weight(of: Sizes, init: str) -> Tensor:
    weight = torch.empty(of.experts, of.hidden_size)
    (fan_in_ if init == FAN_IN else _normal(of.std))(weight)
    return weight


def _variance(logits_TE: Tensor) -> float:
    return logits_TE.var(-1, correction=0).mean().item()


def _mean(values: list[float]) -> float:
    return statistics.fmean(value**2 for value in values) ** 0.5
