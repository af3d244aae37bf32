"""The slot that a routing state lies in during one call of a layer: every order of its methods but the right one."""

import itertools

import pytest
import torch

from rmoe_megablocks.routing import RoutingStateError, StateSlot

METHODS = {
    "put": lambda slot: slot.put(None),
    "withdraw": lambda slot: slot.withdraw(),
    "step": lambda slot: slot.step(lambda h: ("logits", torch.zeros(1))),
    "keep": lambda slot: slot.keep(torch.zeros(1)),
    "state": lambda slot: slot.state,
    "take": lambda slot: slot.take(),
}
# phase -> what may be called in it, and the phase that follows
ALLOWED = {
    "empty": {"put": "given", "keep": "routed"},
    "given": {"withdraw": "empty", "step": "routed"},
    "routed": {"state": "routed", "take": "empty"},
}


@pytest.mark.parametrize("order", list(itertools.product(METHODS, repeat=3)), ids="-".join)
def test_every_order(order):
    slot, phase = StateSlot(), "empty"
    for name in order:
        if name in ALLOWED[phase]:
            METHODS[name](slot)
            phase = ALLOWED[phase][name]
        else:
            with pytest.raises(RoutingStateError) as caught:
                METHODS[name](slot)
            assert "\n" not in str(caught.value)  # and the phase stays what it was
        assert slot.empty == (phase == "empty")


def test_values_pass_through():
    slot, h, following = StateSlot(), torch.zeros(2, 3), torch.ones(2, 3)
    slot.put(h)
    slot.reshape(lambda state: state.T)
    seen = []
    assert slot.step(lambda state: (seen.append(state), following)[1:] * 2) is following
    assert seen[0].shape == (3, 2) and slot.state is following and slot.take() is following


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_call_that_fails_leaves_the_slot_empty(error, steps):
    slot = StateSlot()
    with pytest.raises(error), slot.call():
        for name in ("put", "step")[:steps]:
            METHODS[name](slot)
        raise error
    assert slot.empty
