"""The place in a router where a layer's routing state lies while the layer runs, and what notices a wrong use of it.

Hosts call a router with hidden states alone. The state is therefore laid into the router before the host's layer runs
and fetched behind it. A host that calls the router more or less often than once in between would continue another
call's state, or start from none, and nothing in shapes or losses would tell.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor


class RoutingStateError(RuntimeError):
    """A router was called otherwise than once for each state handed in: its results would be wrong."""


class _Phase(enum.Enum):
    EMPTY = "no state was handed in"
    GIVEN = "the router has not run"
    ROUTED = "the router has run"


class StateSlot:
    """Holds a state through one call of a layer: handed in, one step of the recurrence, fetched; in this order.

    Every method raises RoutingStateError out of this order, in training, evaluation and recompute alike. One slot
    belongs to one layer.
    """

    def __init__(self) -> None:
        self._phase = _Phase.EMPTY
        self._h: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether no call of the layer is under way."""
        return self._phase is _Phase.EMPTY

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around one call of the layer: one that ends in an exception leaves no state for the next one to find."""
        try:
            yield
        except BaseException:  # also Ctrl-C, and the exception by which torch's checkpoint ends a recomputation early
            self._set(_Phase.EMPTY, None)
            raise

    def put(self, h_TP: Tensor | None) -> None:
        """Hands in the state of the previous MoE layer [..., P], None before the first one."""
        if self._phase is not _Phase.EMPTY:
            raise RoutingStateError(
                "a routing state was handed to a layer that is still at work on another one: two forward passes of a "
                "layer must not overlap"
            )
        self._set(_Phase.GIVEN, h_TP)

    def withdraw(self) -> Tensor | None:
        """Takes back the state handed in, before the router has run: a recomputed function gets it as an argument."""
        self._must_be_given()
        return self._pop()

    def step(self, advance: Callable[[Tensor | None], tuple[Tensor, Tensor]]) -> Tensor:
        """Runs the router, ``advance(previous state) -> (result, state)``, keeps the state and returns the result."""
        self._must_be_given()
        result, h_TP = advance(self._h)
        self._set(_Phase.ROUTED, h_TP)
        return result

    def keep(self, h_TP: Tensor) -> None:
        """Lays in the state that a recomputed function returned, as if the router had run here."""
        if self._phase is not _Phase.EMPTY:
            raise RoutingStateError(f"a recomputed routing state came where there is one ({self._phase.value})")
        self._set(_Phase.ROUTED, h_TP)

    @property
    def state(self) -> Tensor:
        """This layer's state, once the router has run."""
        self._expect(_Phase.ROUTED, "read")
        return self._h

    def take(self) -> Tensor:
        """Fetches this layer's state and forgets it."""
        self._expect(_Phase.ROUTED, "fetched")
        return self._pop()

    def reshape(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes the form of the state at hand, before or after the router has run; h_0 = 0 has none."""
        if self._phase is _Phase.EMPTY:
            raise RoutingStateError("a routing state was to be reshaped, but none was handed in")
        if self._h is not None:
            self._h = change(self._h)

    def _must_be_given(self) -> None:
        if self._phase is _Phase.ROUTED:
            raise RoutingStateError(
                "the router ran twice for one routing state, so that its second call would continue the state of the "
                "first: leave out what splits or repeats a layer's input (--mlp-chunks-for-training, "
                "--mlp-chunks-for-prefill)"
            )
        if self._phase is _Phase.EMPTY:
            raise RoutingStateError(
                "the router ran without a routing state from its layer, as if before the first layer: only the layer "
                "around an MoE layer may call it"
            )

    def _expect(self, phase: _Phase, what: str) -> None:
        if self._phase is not phase:
            raise RoutingStateError(
                f"a routing state was {what}, but {self._phase.value}: a layer and its router must run once for each "
                "state"
            )

    def _set(self, phase: _Phase, h_TP: Tensor | None) -> None:
        self._phase, self._h = phase, h_TP

    def _pop(self) -> Tensor | None:
        h_TP = self._h
        self._set(_Phase.EMPTY, None)
        return h_TP
