"""The transformer layer that hands the routing state on, and the MoE layer that recomputes with it."""

from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from rmoe_megablocks.megatron.recurrence import stage_boundary


class RecurrentMoELayer(MoELayer):
    """Megatron's MoE layer whose selective recompute ("moe") takes the state as input and returns the next one.

    Upstream checkpoints hidden states alone: a state on the side would lose its gradient.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._recompute = self.moe_layer_recompute
        self.moe_layer_recompute = False  # done here instead

    def forward(self, hidden_states, intermediate_tensors=None, padding_mask=None):
        """As upstream; the router's slot holds the state of the previous layer before, this layer's after the call."""
        if not (self._recompute and self.training):
            return super().forward(hidden_states, intermediate_tensors, padding_mask)

        slot = self.router.slot

        def run(hidden_states, h_SBP, padding_mask):
            with slot.call():
                slot.put(h_SBP)
                output, _ = super(RecurrentMoELayer, self).forward(hidden_states, None, padding_mask)
                return output, slot.take()

        output, h_SBP = tensor_parallel.checkpoint(run, False, hidden_states, slot.withdraw(), padding_mask)
        slot.keep(h_SBP)
        return output, None


class RecurrentTransformerLayer(TransformerLayer):
    """Takes the routing state as ``context`` and returns the next one there.

    TransformerBlock threads (hidden_states, context) through its layers and through full recompute as explicit
    inputs and outputs; a decoder-only model leaves the second place free. Dense layers pass the state through.
    The first layer of a stage splits the state off the message from the previous stage, the last one of a stage
    that is followed by another appends it: :func:`.stage_boundary.connect` sets the two attributes.
    """

    receives_state = False
    sends_state = False

    def forward(self, hidden_states: Tensor, *args, context: Tensor | None = None, **kwargs):
        """hidden_states [S, B, H] (a message [S, B, H + width] in a stage's first layer), context: h_SBP or None."""
        h_SBP = context
        if self.receives_state:
            hidden_states, h_SBP = stage_boundary.unpack(hidden_states, self.config)
        if self.is_moe_layer:
            slot = self.mlp.router.slot
            with slot.call():
                slot.put(h_SBP)
                hidden_states, _ = super().forward(hidden_states, *args, **kwargs)
                h_SBP = slot.take()
        else:
            hidden_states, _ = super().forward(hidden_states, *args, **kwargs)
        if self.sends_state:
            hidden_states = stage_boundary.pack(hidden_states, h_SBP, self.config)
        return hidden_states, h_SBP

    def _maybe_unflatten_for_moe(self, hidden_states: Tensor, padding_mask: Tensor | None, packed_seq_params):
        """Upstream gives packed micro-batches [B*S, 1, H] their batch dimension back here, and we the state."""
        hidden_states, padding_mask, micro_batch_size = super()._maybe_unflatten_for_moe(
            hidden_states, padding_mask, packed_seq_params
        )
        if micro_batch_size is not None:
            shape = (micro_batch_size, packed_seq_params.tokens_per_sample, -1)
            self.mlp.router.slot.reshape(lambda h_TP: h_TP.view(shape).transpose(0, 1))
        return hidden_states, padding_mask, micro_batch_size

    def _maybe_reflatten_from_moe(self, output: Tensor, packed_seq_params, micro_batch_size: int | None):
        """And back: [S, B, P] -> [B*S, 1, P]."""
        if micro_batch_size is not None:
            self.mlp.router.slot.reshape(lambda h_SBP: h_SBP.transpose(0, 1).reshape(-1, 1, h_SBP.shape[-1]))
        return super()._maybe_reflatten_from_moe(output, packed_seq_params, micro_batch_size)
