"""MegaBlocks' router with its logits coming from a router type of this package."""

import megablocks
import torch
from megablocks import ops
from megablocks.layers import common, router
from torch import Tensor, nn

from rmoe_megablocks.megablocks.arguments import router_dtype, router_type, routing_config
from rmoe_megablocks.megablocks.losses import load_balancing_loss, router_z_loss
from rmoe_megablocks.routing import StateSlot


class RecurrentRouter(router.LearnedRouter):
    """Jitter, choice of experts and normalisation are MegaBlocks'; logits and losses come about differently.

    The layer hands the state in by :attr:`slot` before its forward and fetches the next one after it. Both happen
    within one call of the layer, so that whatever recomputes the layer replays them; nothing outlives the call, and a
    call that runs the router more or less often than once raises, see :class:`StateSlot`.
    """

    def __init__(self, args: megablocks.Arguments) -> None:
        nn.Module.__init__(self)  # the parent would make a gate matrix
        self.args = args
        with torch.device(args.device):
            self.routing_layer = router_type(args).build_layer(routing_config(args)).to(common.dtype(args))
        self._dtype = router_dtype(args)
        self._shared: tuple[nn.Module | None, ...] = ()
        if not router_type(args).shares(self.routing_layer.config):
            self._shared = (None,)
        self.slot = StateSlot()
        self._aux_loss: Tensor | None = None

    def bind(self, shared: nn.Module | None, index: int) -> None:
        """Sets what all layers share, and this one's place among them. Kept in a tuple: it is not a child."""
        self._shared = (shared,)
        self.routing_layer.index = index

    @property
    def bound(self) -> bool:
        """Whether :meth:`bind` was called."""
        return bool(self._shared)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., H] -> scores [T, E], expert weights [T, K] in the dtype of x, experts [T, K]; the loss is kept.

        Raises:
            RoutingStateError: called a second time for one state, or without one.
            ValueError: a state of other tokens, width, dtype or device than x's.
        """
        args, (shared,) = self.args, self._shared
        dtype = x.dtype
        if self.training and args.moe_jitter_eps is not None:
            x = x * self.jitter(x)
        logits = self.slot.step(lambda h: self.routing_layer(x, h, shared, self._dtype))
        logits_TE = logits.reshape(-1, args.moe_num_experts)
        scores_TE = logits_TE.softmax(-1)
        weights_TK, experts_TK = self._top_k(scores_TE)
        if args.moe_normalize_expert_weights:
            weights_TK = weights_TK / weights_TK.norm(p=args.moe_normalize_expert_weights, dim=-1, keepdim=True)
        if args.uniform_expert_assignment:
            experts_TK = router._uniform_expert_assignment(experts_TK, args.moe_num_experts)
        self._aux_loss = self._loss(logits_TE, scores_TE, experts_TK)
        return scores_TE, weights_TK.to(dtype), experts_TK

    def take(self) -> tuple[Tensor | None, Tensor]:
        """Fetches this layer's state [..., state_size] (None of a type without one) and its loss, and forgets both."""
        h = self.slot.take()
        aux_loss, self._aux_loss = self._aux_loss, None
        return h, aux_loss

    def _loss(self, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """This layer's share: balancing is averaged over ``num_layers``, the z-loss is a sum, both as upstream's."""
        args = self.args
        loss = logits_TE.new_zeros((), dtype=torch.float32)
        if self.training and args.moe_loss_weight:
            counts_E = ops.histogram(experts_TK.flatten().int(), args.moe_num_experts)
            balancing = load_balancing_loss(scores_TE, counts_E, args.moe_top_k)
            loss = loss + balancing * (args.moe_loss_weight / args.num_layers)
        if self.training and args.moe_zloss_weight:
            loss = loss + router_z_loss(logits_TE) * args.moe_zloss_weight
        return loss
