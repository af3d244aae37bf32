"""Which experts the tokens of a text took, as the model itself chose them, and a table of that."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rmoe_megablocks.huggingface.layers.moe import RmoeRouter

NULL = "-"
_TOKEN_WIDTH = 12


@dataclass(frozen=True)
class Choices:
    """Attributes:
    layers: number of each layer with experts, in order.
    experts: [layers, T, K], the best first; -1 for a null expert.
    """

    layers: tuple[int, ...]
    experts: Tensor


def routers(model: torch.nn.Module) -> dict[int, RmoeRouter]:
    """The router of each layer that has one; none in a model that is not ours."""
    layers = enumerate(getattr(model.base_model, "layers", ()))
    return {index: module for index, layer in layers for module in layer.modules() if isinstance(module, RmoeRouter)}


@torch.inference_mode()
def record(model: torch.nn.Module, ids_1S: Tensor) -> Choices:
    """The choices of one forward pass over ``ids_1S`` [1, S]."""
    found: list[Tensor] = []

    def keep(router: RmoeRouter, _inputs, outputs) -> None:
        _, weights_TK, experts_TK, _ = outputs
        if router.config.num_null_experts:  # chosen as a real one of no weight
            experts_TK = experts_TK.masked_fill(weights_TK == 0, -1)
        found.append(experts_TK.cpu())

    chosen = routers(model)
    hooks = [router.register_forward_hook(keep) for router in chosen.values()]
    try:
        model(input_ids=ids_1S, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Choices(tuple(chosen), torch.stack(found))


def table(choices: Choices, tokens: Sequence[str | bytes], prompt: int, width: int = 80) -> str:
    """A row a token, a column a layer with the experts it took; layers that do not fit follow in further blocks.

    Args:
        tokens: [T], each its text, or bytes that are none by themselves.
        prompt: how many of them are the prompt's, which ends in a rule.
        width: columns of the terminal.
    """
    cells = [[",".join(map(_name, experts)) for experts in layer] for layer in choices.experts.tolist()]
    titles = [f"L{layer}" for layer in choices.layers]
    widths = [max(len(title), *map(len, column)) for title, column in zip(titles, cells, strict=True)]
    names = [_shown(token) for token in tokens]
    first = max(map(len, ["token", *names]))
    lines: list[str] = []
    for block in _blocks(widths, width - first):
        lines += [""] * bool(lines)
        lines.append(_line("token".ljust(first), [titles[i].ljust(widths[i]) for i in block]))
        for row, name in enumerate(names):
            if row == prompt and row:
                lines.append("-" * len(lines[-1]))
            lines.append(_line(name.ljust(first), [cells[i][row].ljust(widths[i]) for i in block]))
    return "\n".join(line.rstrip() for line in lines)


def _line(name: str, columns: Sequence[str]) -> str:
    return "  ".join([name, *columns])


def _name(expert: int) -> str:
    return NULL if expert < 0 else str(expert)


def _shown(token: str | bytes) -> str:
    """As Python spells it, so that line breaks and spaces can be seen."""
    shown = repr(token)
    return shown if len(shown) <= _TOKEN_WIDTH else shown[: _TOKEN_WIDTH - 2] + ".."


def _blocks(widths: Sequence[int], room: int) -> list[range]:
    """Consecutive columns that fit beside each other, two spaces before each; at least one a block."""
    blocks, start, used = [], 0, 0
    for index, size in enumerate(widths):
        if index > start and used + 2 + size > room:
            blocks.append(range(start, index))
            start, used = index, 0
        used += 2 + size
    return [*blocks, range(start, len(widths))]
