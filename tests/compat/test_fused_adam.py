"""CPU mode's stand-in for Apex's FusedAdam, against torch's own Adam and AdamW."""

import copy

import pytest
import torch

from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.compat.megatron_cpu.fused_adam import FusedAdam

pytestmark = pytest.mark.skipif(not megatron_cpu.needed(), reason="CPU mode is for machines without a GPU")


def make_parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(5, 3), (7,), (1,)]]


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


@pytest.mark.parametrize("decoupled", [True, False])
def test_fused_adam_is_adam(decoupled):
    ours, theirs = make_parameters(), make_parameters()
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = FusedAdam(
        [{"params": ours[:2], "weight_decay": 0.1}, {"params": ours[2:]}], adam_w_mode=decoupled, **options
    )
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(
        [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "weight_decay": 0.0}], **options
    )
    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(optimizer.state[a]["exp_avg_sq"], reference.state[b]["exp_avg_sq"])
        assert set(optimizer.state[a]) == {"exp_avg", "exp_avg_sq"}
    assert [group["step"] for group in optimizer.param_groups] == [10, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_adam_resumes(dtype):
    params, resumed = make_parameters(dtype), make_parameters(dtype)
    optimizer, after = FusedAdam(params, weight_decay=0.1), FusedAdam(resumed, weight_decay=0.1)
    for step in range(6):
        if step == 3:
            after.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            with torch.no_grad():
                for a, b in zip(resumed, params, strict=True):
                    a.copy_(b)
        set_gradients(params, step)
        optimizer.step()
        if step >= 3:
            set_gradients(resumed, step)
            after.step()
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    assert after.param_groups[0]["step"] == 6


def test_fused_adam_skips_what_has_no_gradient():
    params = make_parameters()
    set_gradients(params[:1], 0)
    before = [param.detach().clone() for param in params]
    optimizer = FusedAdam([{"params": params}, {"params": []}])
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])
    # The distributed optimizer takes the step from the groups that have parameters.
    assert "step" not in optimizer.param_groups[1]
    optimizer.zero_grad()
    assert params[0].grad is None


def test_fused_adam_is_what_megatron_uses():
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    assert optimizer.Adam is distrib_optimizer.Adam is FusedAdam
