"""Megatron's MoE layer with MegaBlocks' experts: Megatron's router decides, MegaBlocks moves tokens and computes.

MegaBlocks' seam is ``ParallelDroplessMLP(x, scores, expert_weights, top_experts)``, behind its own router. Scoring,
top-k, balancing and z losses, padding masks, metrics, shared experts and recompute are therefore those of upstream's
layer, for every router type; token dispatcher and experts are replaced.
"""

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec
from torch import Tensor

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.experts.megablocks_experts import MegaBlocksExperts
from rmoe_megablocks.megatron.null_experts import options as null_experts
from rmoe_megablocks.megatron.recurrence import specs
from rmoe_megablocks.megatron.recurrence.layer import RecurrentMoELayer


class MegaBlocksMoELayer(MoELayer):
    """The steps that upstream's forward calls one after another, between routing and the shared experts' sum."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.token_dispatcher = None  # MegaBlocks is its own; whatever asks for Megatron's must fail

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor):
        """hidden_states [S, B, H], probs and routing_map [T, E] -> hidden_states, (weights [T, K], experts [T, K]).

        With null experts, of which a token may choose some: (weights [N], experts [N], tokens [N]), a row for each of
        the N choices of a real one.
        """
        if null_experts.of(self.config):
            tokens_N, experts_N = routing_map.nonzero(as_tuple=True)
            return hidden_states, (probs[tokens_N, experts_N].float(), experts_N, tokens_N)
        # The map holds exactly K experts for each token: without capacities, nothing is dropped or added.
        experts_TK = routing_map.byte().topk(self.config.moe_router_topk, dim=-1, sorted=False).indices
        return hidden_states, (probs.gather(1, experts_TK).float(), experts_TK)

    def dispatch(self, hidden_states: Tensor, probs: tuple[Tensor, ...]):
        """Left to the experts."""
        return hidden_states, probs

    def routed_experts_compute(self, hidden_states: Tensor, probs: tuple[Tensor, ...]):
        """Permutation, exchange over the expert-parallel ranks, experts, and all the way back: [S, B, H], no bias."""
        return self.experts(hidden_states, *probs), None

    def combine(self, output: Tensor) -> Tensor:
        """Done by the experts."""
        return output

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Adds the shared experts' output [S, B, H]."""
        return output if shared_expert_output is None else output + shared_expert_output


class RecurrentMegaBlocksMoELayer(RecurrentMoELayer, MegaBlocksMoELayer):
    """MegaBlocks' experts behind the recurrent router; recompute takes and returns the routing state."""


_LAYERS = {MoELayer: MegaBlocksMoELayer, RecurrentMoELayer: RecurrentMegaBlocksMoELayer}


def use_megablocks(model_config: GPTModelConfig) -> None:
    """Makes ``model_config`` build its MoE layers, whatever the router, with MegaBlocks' experts. Changed in place."""
    block_spec = model_config.transformer_layer_spec or default_layer_spec
    model_config.transformer_layer_spec = specs.changed(_with_megablocks, block_spec)


def _with_megablocks(spec: ModuleSpec) -> ModuleSpec:
    layer = specs.moe_layer(spec)
    if layer is None:
        return spec  # a dense layer
    if layer not in _LAYERS:
        raise UsageError(f"--moe-backend megablocks: MoE layers of type {layer.__name__} have experts of their own")
    return specs.with_moe(spec, _LAYERS[layer], experts=MegaBlocksExperts)
