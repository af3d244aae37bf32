"""How the routing is doing: measured in the first iteration and those that are logged, for every router type alike."""

from collections.abc import Callable

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from rmoe_megablocks.megatron.recurrence.router import RecurrentTopKRouter


def observe_routers(chunks: list[torch.nn.Module], observer: Callable[[TopKRouter, Tensor, Tensor], None]) -> None:
    """Calls ``observer(router, logits [..., E], routing_map [T, E])`` after every routing of ``chunks``.

    What the routers return is passed through unchanged.
    """

    def observed(router: TopKRouter, routing):
        def observed_routing(logits: Tensor, *args, **kwargs):
            result = routing(logits, *args, **kwargs)
            observer(router, logits, result[1])
            return result

        return observed_routing

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.routing = observed(module, module.routing)


class RoutingHealth:
    """Sums per MoE layer, between two calls of :meth:`report`, over all micro-batches seen while :attr:`measuring`.

    Only forwards that will be differentiated count: the first pass of a recomputed layer, evaluation and
    no_grad do not.

    Attributes:
        measuring: asked at each routing; always by default.
        num_experts: E.
        num_logits: E + M with M null experts.
    """

    def __init__(
        self, num_layers: int, num_mtp_layers: int, num_experts: int, null_experts: int = 0, topk: int = 0
    ) -> None:
        self.measuring: Callable[[], bool] = lambda: True
        self._num_layers = num_layers
        self.num_experts = num_experts
        self.num_logits = num_experts + null_experts
        self._topk = topk
        # columns: assignments to each expert, summed probability of each logit, variance of the logits, entropy, |h|,
        # tokens
        self._sums_LC = torch.zeros(
            num_layers + num_mtp_layers, num_experts + self.num_logits + 4, dtype=torch.float64, device="cuda"
        )

    def watch(self, chunks: list[torch.nn.Module]) -> None:
        """Observes every router of ``chunks``. Their results are passed through unchanged."""
        observe_routers(chunks, self._observe)

    def _observe(self, router: TopKRouter, logits: Tensor, routing_map_TE: Tensor) -> None:
        if router.training and torch.is_grad_enabled() and self.measuring():
            self._add(router, logits.detach(), routing_map_TE)

    @torch.no_grad()
    def _add(self, router: TopKRouter, logits: Tensor, routing_map_TE: Tensor) -> None:
        scores_TE = torch.log_softmax(logits.reshape(-1, self.num_logits).float(), dim=-1)
        probs_TE = scores_TE.exp()
        state = router.state if isinstance(router, RecurrentTopKRouter) else None
        state_norm = 0.0 if state is None else state.float().norm(dim=-1).sum()
        experts = self.num_experts
        # multi-token prediction layers are numbered on their own
        row = self._sums_LC[router.layer_number - 1 + router.is_mtp_layer * self._num_layers]
        row[:experts] += routing_map_TE.sum(0)
        row[experts:-4] += probs_TE.sum(0)
        row[-4] += scores_TE.var(dim=-1, correction=0).sum()  # that of the logits: they differ by a token's constant
        row[-3] -= (probs_TE * scores_TE).sum()
        row[-2] += state_norm
        row[-1] += len(probs_TE)

    def report(self) -> dict[str, list[float]]:
        """Means since the last report, one entry a MoE layer, the same on every rank (a collective call).

        ``load_balancing_loss``: E * sum_e f_e P_e, 1 when even. ``busiest_expert_share``: of all assignments,
        1/E when even. ``router_entropy``: nats, log(E) when flat. ``logits_std``: standard deviation of a token's E
        logits around their mean (root of the tokens' mean variance), 0 when flat, where the entropy is about
        log(E) - logits_std^2 / 2. ``state_norm``: mean |h|, absent without a state.

        With M null experts E + M stands for E, but in the share, which is of assignments to real experts (0 where
        there are none); f of a null expert is the mean of theirs. ``real_experts_per_token`` is there then.
        """
        torch.distributed.all_reduce(self._sums_LC)
        sums_LC = self._sums_LC[self._sums_LC[:, -1] > 0].cpu()  # dense layers have no row
        self._sums_LC.zero_()
        experts = self.num_experts
        tokens_L1 = sums_LC[:, -1:]
        counts_LE = sums_LC[:, :experts]
        real_L1 = counts_LE.sum(-1, keepdim=True)
        load_LE = counts_LE / real_L1.clamp_min(1)
        means_LC = sums_LC[:, experts:] / tokens_L1
        load_LN = self._load(counts_LE, tokens_L1) if self.num_logits > experts else load_LE
        health = {
            "load_balancing_loss": (self.num_logits * (load_LN * means_LC[:, :-4]).sum(-1)).tolist(),
            "busiest_expert_share": load_LE.amax(-1).tolist() if len(load_LE) else [],
            "router_entropy": means_LC[:, -3].tolist(),
            "logits_std": means_LC[:, -4].sqrt().tolist(),
            "state_norm": means_LC[:, -2].tolist(),
        }
        if not any(health["state_norm"]):
            del health["state_norm"]
        if self.num_logits > experts:
            health["real_experts_per_token"] = (real_L1 / tokens_L1).squeeze(-1).tolist()
        return health

    def _load(self, counts_LE: Tensor, tokens_L1: Tensor) -> Tensor:
        """Shares [L, E + M] of all choices, a null expert's the mean of theirs: who takes no real one takes a null."""
        choices_L1 = tokens_L1 * self._topk
        null = self.num_logits - self.num_experts
        null_L1 = (choices_L1 - counts_LE.sum(-1, keepdim=True)) / null
        return torch.cat((counts_LE, null_L1.expand(-1, null)), dim=-1) / choices_L1
