"""An optimizer with the interface and state of Apex's FusedAdam, on torch's fused CPU kernels.

Why not ``torch.optim.AdamW``, to which Megatron falls back: it counts steps per parameter, and the distributed
optimizer, which keeps the state of a flat shard, does not restore that count on resuming (distrib_optimizer.py:837,
1028). FusedAdam counts steps per parameter group, and that path works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay (``adam_w_mode``, AdamW) or with weight decay as an L2 penalty.

    Each group counts its own steps in ``group["step"]``; each parameter has the state ``exp_avg`` and ``exp_avg_sq``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
    ) -> None:
        if amsgrad or not bias_correction or capturable:
            raise ValueError("FusedAdam on the CPU has no amsgrad, no CUDA graphs, and always corrects the bias")
        # bias_correction is a key of the group because Apex's groups, and so checkpoints, have it.
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.set_grad_none = set_grad_none
        self._kernel = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Forget the gradients, or zero them."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        # The kernels want one type in a call.
        batches: dict[torch.dtype, tuple[list[torch.Tensor], ...]] = {}
        for param in group["params"]:
            if param.grad is None or param.numel() == 0:
                continue
            state = self.state[param]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            batch = batches.setdefault(param.dtype, ([], [], [], []))
            for tensors, tensor in zip(batch, (param, param.grad, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                tensors.append(tensor)
        beta1, beta2 = group["betas"]
        for params, grads, exp_avgs, exp_avg_sqs in batches.values():
            self._kernel(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                [],
                [torch.tensor(float(group["step"]))] * len(params),
                lr=float(group["lr"]),
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
