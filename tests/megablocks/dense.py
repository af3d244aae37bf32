"""Every expert computed for every token, in plain torch: what the layers are held against."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rmoe_megablocks.routing import reference


def expert_outputs(x_TH: Tensor, mlp, features: int) -> Tensor:
    """[T, E, H] from the weights of a MegaBlocks MLP: w1, v1 and w2 of a dMoE [E * F, H], of a MoE [E, H, F]."""
    hidden = x_TH.shape[1]
    if mlp.w1.ndim == 3:
        w1, v1, w2 = mlp.w1, None, mlp.w2
    else:
        w1 = mlp.w1.view(-1, features, hidden).mT
        w2 = mlp.w2.view(-1, features, hidden)
        v1 = mlp.v1.view(-1, features, hidden).mT if hasattr(mlp, "v1") else None
    inner = F.gelu(torch.einsum("th,ehf->tef", x_TH, w1), approximate="tanh")
    if v1 is not None:
        inner = inner * torch.einsum("th,ehf->tef", x_TH, v1)
    return torch.einsum("tef,efh->teh", inner, w2)


def mix(outputs_TEH: Tensor, scores_TE: Tensor, top_k: int, norm: float | None) -> tuple[Tensor, Tensor]:
    """The chosen experts' weighted sum [T, H] and how many choices fell on each expert [E]."""
    weights_TK, experts_TK = scores_TE.topk(top_k, dim=-1)
    if norm:
        weights_TK = weights_TK / weights_TK.norm(p=norm, dim=-1, keepdim=True)
    chosen_TKEH = F.one_hot(experts_TK, scores_TE.shape[1])
    gates_TE = (chosen_TKEH.to(scores_TE.dtype) * weights_TK[..., None]).sum(1)
    return torch.einsum("te,teh->th", gates_TE, outputs_TEH), chosen_TKEH.sum((0, 1))


def by_the_equations(own, x_TH: Tensor, h: Tensor | None, cell, index: int) -> tuple[Tensor, Tensor]:
    """Logits and state of a gru router."""
    gru = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    projected = x_TH @ own.projector.T + (0 if own.projector_bias is None else own.projector_bias)
    h = reference.gru_step(projected, torch.zeros_like(projected) if h is None else h, *gru)
    return h @ own.router.T + (0 if own.router_bias is None else own.router_bias), h


def stack_of_layers(x_SBH: Tensor, layers, shared, args, route=by_the_equations, states=None) -> tuple[Tensor, Tensor]:
    """MoE layers with residual connections: the output and the sum of the losses.

    ``route(routing layer, x_TH, state, shared, index) -> (logits_TE, state)``; ``states`` gets the states.
    """
    h, total = None, 0.0
    for index, layer in enumerate(layers):
        x_TH = x_SBH.reshape(-1, x_SBH.shape[-1])
        logits_TE, h = route(layer.router.routing_layer, x_TH, h, shared, index)
        if states is not None:
            states.append(h)
        scores_TE = torch.softmax(logits_TE, -1)
        outputs_TEH = expert_outputs(x_TH, layer.experts.mlp, args.ffn_hidden_size)
        out_TH, counts_E = mix(outputs_TEH, scores_TE, args.moe_top_k, args.moe_normalize_expert_weights)
        if layer.experts.bias is not None:
            out_TH = out_TH + layer.experts.bias
        balancing = args.moe_num_experts * (counts_E / (len(x_TH) * args.moe_top_k) * scores_TE.mean(0)).sum()
        z = torch.log(torch.exp(logits_TE).sum(-1)).pow(2).mean()
        total = total + args.moe_loss_weight / args.num_layers * balancing + args.moe_zloss_weight * z
        x_SBH = x_SBH + out_TH.view_as(x_SBH)
    return x_SBH, total
