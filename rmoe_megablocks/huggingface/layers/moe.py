"""An MoE layer: a router whose logits come from :mod:`rmoe_megablocks.routing`, experts, a shared expert."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.utils.generic import maybe_autocast

from rmoe_megablocks.routing import SharedRouting
from rmoe_megablocks.routing.parts.null_experts import real_weights

from ..configuration import RmoeConfig


class RmoeMLP(nn.Module):
    """down(act(gate x) * up x): of a dense layer, and the shared expert."""

    def __init__(self, config: RmoeConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@use_experts_implementation
class RmoeExperts(nn.Module):
    """All experts' matrices in two tensors: gate_up_proj [E, 2F, H], gate above up, and down_proj [E, H, F].

    ``config._experts_implementation`` says with what they are computed; :meth:`forward` is ``eager``.
    """

    def __init__(self, config: RmoeConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, hidden, width
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, K] -> [T, H]."""
        result_TH = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, places = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = F.linear(hidden_states[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(self.act_fn(gate) * up, self.down_proj[expert]) * top_k_weights[tokens, places, None]
            result_TH.index_add_(0, tokens, y.to(result_TH.dtype))
        return result_TH


def choose(logits_TN: Tensor, config: RmoeConfig, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The K experts of each token and their weights, as Megatron's topk_routing_with_score_function has them.

    Args:
        logits_TN: logits [T, E + M].
        config: names the score function, and what is done with scores.
        expert_bias: [E], added to sigmoids for the choice alone.

    Returns:
        weights [T, K] in the dtype of the logits, computed in fp32, and experts [T, K]. A null expert has the weight 0
        and in its place stands a real one, whose result it takes away.
    """
    topk, softmax = config.num_experts_per_tok, config.router_score_function == "softmax"
    if config.num_null_experts:
        weights_TK, experts_TK = _choose_of_null(logits_TN, config)
    elif softmax and config.router_pre_softmax:
        weights_TK, experts_TK = logits_TN.softmax(-1, dtype=torch.float32).topk(topk, dim=-1)
    elif softmax:
        chosen_TK, experts_TK = logits_TN.topk(topk, dim=-1)
        weights_TK = chosen_TK.softmax(-1, dtype=torch.float32)
    else:
        scores_TE = logits_TN.float().sigmoid()
        preferred_TE = scores_TE if expert_bias is None else scores_TE + expert_bias.float()
        experts_TK = preferred_TE.topk(topk, dim=-1).indices
        weights_TK = scores_TE.gather(-1, experts_TK)
        if topk > 1:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    if config.router_topk_scaling_factor:
        weights_TK = weights_TK * config.router_topk_scaling_factor
    return weights_TK.to(logits_TN.dtype), experts_TK


def _choose_of_null(logits_TN: Tensor, config: RmoeConfig) -> tuple[Tensor, Tensor]:
    experts = config.num_experts
    chosen_TK = logits_TN.topk(config.num_experts_per_tok, dim=-1).indices
    chosen_TN = torch.zeros_like(logits_TN, dtype=torch.bool).scatter(-1, chosen_TK, True)
    weights_TE = real_weights(logits_TN, chosen_TN, experts, config.router_score_function)
    weights_TN = F.pad(weights_TE, (0, config.num_null_experts))
    # no implementation of experts leaves out a place: it computes a real one for nothing, spread over all of them
    return weights_TN.gather(-1, chosen_TK), chosen_TK % experts


class RmoeRouter(nn.Module):
    """Logits of one layer and what is chosen by them.

    Parameters: of ``linear`` the matrix ``weight`` [E + M, H], of other types those of ``layer``, a
    :class:`rmoe_megablocks.routing.RouterLayer`. Buffer: ``expert_bias`` [E], which stays in fp32.
    """

    def __init__(self, config: RmoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        kind, routing = config.routing()
        self.layer = kind.layer(routing) if kind.replaces_hosts else None  # drawn by the model's _init_weights
        self.weight = None
        if self.layer is None:
            self.weight = nn.Parameter(torch.empty(config.router_logits, config.hidden_size))
        else:
            self.layer.index = layer_idx
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.router_enable_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(
        self, x_BSH: Tensor, h_BSP: Tensor | None, shared: SharedRouting | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x [B, S, H] and the previous state -> logits [T, E + M], weights [T, K], experts [T, K], the next state.

        Logits and state are in ``router_dtype``, whatever the model's dtype and autocast.
        """
        dtype = x_BSH.dtype if self.config.router_dtype is None else getattr(torch, self.config.router_dtype)
        with maybe_autocast(x_BSH.device.type, enabled=False):
            if self.layer is None:
                logits = F.linear(x_BSH.to(dtype), self.weight.to(dtype))
            else:
                logits, h_BSP = self.layer(x_BSH, h_BSP, shared, dtype)
            logits_TN = logits.reshape(-1, logits.shape[-1])
            return logits_TN, *choose(logits_TN, self.config, self.expert_bias), h_BSP

    def _apply(self, fn, recurse=True):
        """As every module, but a conversion of the model's dtype leaves the expert bias as exact as it was."""
        before = self.expert_bias
        super()._apply(fn, recurse)
        if before is not None and self.expert_bias.dtype != before.dtype:
            self.expert_bias = before.to(self.expert_bias.device)
        return self


class RmoeSparseMoeBlock(nn.Module):
    """Router and experts of a layer, and what all tokens go through beside them."""

    def __init__(self, config: RmoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.router = RmoeRouter(config, layer_idx)
        self.experts = RmoeExperts(config)
        width, gate = config.moe_shared_expert_intermediate_size, config.moe_shared_expert_gate
        self.scaling = config.moe_shared_expert_scaling
        self.shared_experts = RmoeMLP(config, width) if width else None
        self.shared_experts_gate = nn.Linear(config.hidden_size, 1, bias=False) if gate else None

    def forward(
        self, x_BSH: Tensor, h_BSP: Tensor | None, shared: SharedRouting | None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, S, H] and the previous MoE layer's state -> the layer's output [B, S, H] and the next state."""
        _, weights_TK, experts_TK, h_BSP = self.router(x_BSH, h_BSP, shared)
        y_BSH = self.experts(x_BSH.flatten(0, 1), experts_TK, weights_TK).view_as(x_BSH)
        if self.shared_experts is not None:
            always_BSH = self.shared_experts(x_BSH)
            if self.shared_experts_gate is not None:
                always_BSH = always_BSH * self.shared_experts_gate(x_BSH).sigmoid()
            y_BSH = y_BSH + (always_BSH if self.scaling == 1 else self.scaling * always_BSH)
        return y_BSH, h_BSP
