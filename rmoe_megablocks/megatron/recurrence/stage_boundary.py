"""The routing state's passage from one pipeline stage to the next: inside the message of the hidden states.

Every message is [S, B, H + W] in the pipeline's dtype. Its last W columns are the bits of h_SBP [S, B, P]: W = P for
equal dtypes, 2P for an fp32 state under bf16. The backward message has the same form and carries the gradients.
"""

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from rmoe_megablocks.megatron.recurrence.router import router_dtype


def state_dtype(config) -> torch.dtype:
    """Dtype of the routing state, from a TransformerConfig."""
    return router_dtype(config) or config.params_dtype


def wire_width(config) -> int:
    """W: columns that the state adds to a message; 0 for a router without a state."""
    return getattr(config, "router_state_size", 0) * _elements(state_dtype(config), config.pipeline_dtype)


def _elements(state: torch.dtype, wire: torch.dtype) -> int:
    """Wire elements that hold one state element. A narrower state is widened, which loses nothing either."""
    return max(1, state.itemsize // wire.itemsize)


def pack(hidden_SBH: Tensor, h_SBP: Tensor | None, config) -> Tensor:
    """Hidden states and state -> message. A state of None (dense layers so far) travels as zeros, which h_0 is."""
    if h_SBP is None:
        shape = (*hidden_SBH.shape[:-1], config.router_state_size)
        h_SBP = torch.zeros(shape, dtype=state_dtype(config), device=hidden_SBH.device)
    return _Pack.apply(hidden_SBH, h_SBP)


def unpack(message: Tensor, config) -> tuple[Tensor, Tensor]:
    """Message -> hidden states [S, B, H] and state [S, B, P], bit for bit what :func:`pack` was given."""
    return _Unpack.apply(message, config.hidden_size, state_dtype(config))


def connect(chunk: GPTModel) -> None:
    """Marks where the state enters and leaves the stage that ``chunk`` is, and pads or strips messages without layers.

    The first layer of a stage splits the state off and the last one appends it. Stages without a decoder layer (only
    the embedding, only multi-token prediction and the loss) have no layer to do so; behind the last decoder layer the
    state has no reader any more, and a final norm may follow that wants hidden states alone: zeros travel there.
    """
    layers, config = chunk.decoder.layers, chunk.config
    if len(layers) > 0:
        holds_last = layers[-1].layer_number == config.num_layers
        layers[0].receives_state = not chunk.pre_process
        layers[-1].sends_state = not (chunk.post_process or holds_last)
        pads = holds_last and not chunk.post_process
    else:
        pads = chunk.pre_process
        if chunk.post_process:
            chunk.decoder.register_forward_pre_hook(_drop_state)
    if pads:
        chunk.decoder.register_forward_hook(_append_zeros)


def _drop_state(decoder: TransformerBlock, args: tuple) -> None:
    decoder.input_tensor, _ = unpack(decoder.input_tensor, decoder.config)


def _append_zeros(decoder: TransformerBlock, args: tuple, hidden_SBH: Tensor) -> Tensor:
    return pack(hidden_SBH, None, decoder.config)


def _join(hidden: Tensor, state: Tensor) -> Tensor:
    if state.dtype.itemsize < hidden.dtype.itemsize:
        state = state.to(hidden.dtype)
    return torch.cat((hidden, state.contiguous().view(hidden.dtype)), dim=-1)


def _split(message: Tensor, hidden_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    hidden, state = message[..., :hidden_size].contiguous(), message[..., hidden_size:].contiguous()
    return hidden, state.to(dtype) if dtype.itemsize < message.dtype.itemsize else state.view(dtype)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, state: Tensor) -> Tensor:
        ctx.hidden_size, ctx.dtype = hidden.shape[-1], state.dtype
        return _join(hidden, state)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _split(grad, ctx.hidden_size, ctx.dtype)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, message: Tensor, hidden_size: int, dtype: torch.dtype):
        return _split(message, hidden_size, dtype)

    @staticmethod
    def backward(ctx, grad_hidden: Tensor, grad_state: Tensor):
        return _join(grad_hidden, grad_state), None, None


class StateP2PCommunicator(P2PCommunicator):
    """Receives messages as wide as :func:`pack` makes them. The schedules compute shapes from hidden_size alone."""

    def _communicate(self, *, tensor_shape, **kwargs):
        if tensor_shape:
            tensor_shape = (*tensor_shape[:-1], tensor_shape[-1] + wire_width(self.config))
        return super()._communicate(tensor_shape=tensor_shape, **kwargs)
