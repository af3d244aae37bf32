"""MegaBlocks' MoE layers with a routing state, and how they come in the place of the stock ones."""

from __future__ import annotations

import copy
import functools

import megablocks
import torch
from megablocks import MoE, dMoE
from torch import Tensor

from rmoe_megablocks.megablocks.arguments import Arguments, check_arguments, router_type
from rmoe_megablocks.megablocks.router import RecurrentRouter

_MISSING = object()


def register() -> None:
    """Makes ``MoE(args)`` and ``dMoE(args)``, and subclasses of theirs, build the router that ``args`` name.

    For every type but ``linear`` they give an instance of a subclass, :class:`RecurrentMoE` and the class that was
    called; for ``linear`` the class itself. The one thing that changes in MegaBlocks is ``MoE.__new__``. Idempotent.
    """
    MoE.__new__ = staticmethod(_new)


def _new(cls: type[MoE], *args, **kwargs) -> MoE:
    arguments = args[0] if args else kwargs.get("args")
    if arguments is None or issubclass(cls, RecurrentMoE):  # also what copy and pickle call
        return object.__new__(cls)
    recurrent = router_type(arguments).replaces_hosts
    if recurrent or isinstance(arguments, Arguments):
        check_arguments(arguments, dropless=issubclass(cls, dMoE))
    return object.__new__(_recurrent_class(cls) if recurrent else cls)


class RecurrentMoE:
    """Mixed into a MegaBlocks layer: takes a routing state and returns the next one, and the losses.

    Everything is an input or an output, each tensor in a place of its own: ``torch.utils.checkpoint`` carries
    gradients through such places only.
    """

    def __init__(self, args: megablocks.Arguments) -> None:
        without_losses = copy.copy(args)  # upstream's global lists stay empty
        without_losses.moe_loss_weight = without_losses.moe_zloss_weight = 0
        super().__init__(without_losses)
        # After the experts, whose weights are then those of a linear model of the same seed.
        self.router = RecurrentRouter(args)

    def forward(self, x: Tensor, router_state: Tensor | None | object = _MISSING) -> tuple[Tensor, ...]:
        """The layer's own outputs, the next state and this layer's losses.

        Args:
            x: [..., H] as the layer takes it, usually [S, B, H], in the dtype of the layer.
            router_state: [..., state_size] from the previous MoE layer, None in the first one and with a type without
                a state. Always given: a model that forgot it would train, with layers that know nothing of each other.

        Returns:
            ``(out, router_state, aux_loss)``, or ``(out, bias, router_state, aux_loss)`` where the layer returns its
            bias. ``aux_loss`` is an fp32 scalar to be added to the model's loss: load balancing times
            ``moe_loss_weight / num_layers`` and z-loss times ``moe_zloss_weight``; 0 in eval mode.

        Raises:
            RuntimeError: a type whose layers share something, without it: see :func:`.share_recurrence`.
            TypeError: called as a stock layer, without a state.
            ValueError: an input or a state of another shape, dtype or device than the layer's.
        """
        self._check_call(x, router_state)
        slot = self.router.slot
        with slot.call():
            slot.put(router_state)
            out = super().forward(x.contiguous())  # upstream takes views of it
            return *(out if isinstance(out, tuple) else (out,)), *self.router.take()

    def _check_call(self, x: Tensor, router_state: Tensor | None | object) -> None:
        kind = self._stock_class.__name__
        if router_state is _MISSING:
            bias = ", bias" * returns_bias(self)
            raise TypeError(
                f"a {kind} with moe_router_type={self.router.args.moe_router_type!r} is called as "
                f"out{bias}, router_state, aux_loss = layer(x, router_state), with router_state=None in the first layer"
            )
        if not self.router.bound:
            raise RuntimeError(
                "this layer has not been given what it shares with the others: call share_recurrence(model) or use "
                "RecurrentStack"
            )
        weight = next(self.experts.mlp.parameters())
        hidden = self.experts.args.hidden_size
        if x.dim() < 2 or x.shape[-1] != hidden or (x.dim() != 3 and not isinstance(self, dMoE)):
            form = "[..., H]" if isinstance(self, dMoE) else "[S, B, H]"
            raise ValueError(f"x of a {kind} must be {form} with hidden_size H = {hidden}, got {list(x.shape)}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"x is {x.dtype} and the {kind}'s weights are {weight.dtype}: convert one of them "
                "(Arguments have fp16=True by default)"
            )
        if x.device != weight.device:
            raise ValueError(f"x is on {x.device} and the {kind}'s weights are on {weight.device}: move one of them")

    def __reduce__(self):
        return _rebuild, (self._stock_class,), self.__dict__


def returns_bias(layer: MoE) -> bool:
    """Whether MegaBlocks returns the layer's bias beside its output."""
    return layer.experts.bias is not None and layer.experts.args.return_bias


@functools.cache
def _recurrent_class(cls: type[MoE]) -> type[MoE]:
    return type(f"Recurrent{cls.__name__}", (RecurrentMoE, cls), {"__module__": __name__, "_stock_class": cls})


def _rebuild(cls: type[MoE]) -> MoE:
    return object.__new__(_recurrent_class(cls))
