"""Bytes on the fullest rank: weights, gradients, optimizer, activations of every recompute mode, the routing's share.

Activations are the tensors that autograd keeps from the forward to the backward pass, counted operation by operation
as Megatron 0.19 runs them (listed with saved-tensor hooks; a test repeats that on a small model). Norms are counted
as kernels that keep their input, which CPU's RMSNorm does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rmoe_megablocks.planning.counts import parameters
from rmoe_megablocks.planning.settings import Settings

GIB = 2**30
#: GiB that a process does not get for tensors: CUDA context, NCCL's buffers, cuBLAS workspace.
OVERHEAD = 2.0
#: Share of the rest that the allocator cannot use: fragments between blocks of changing sizes.
FRAGMENTS = 0.05

RECOMPUTE_MODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "none": ("none", ()),
    "core_attn": ("selective", ("core_attn",)),
    "moe": ("selective", ("moe",)),
    "core_attn moe": ("selective", ("core_attn", "moe")),
    "full": ("full", ()),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: in the training dtype, with the buffers of the router's modules.
        gradients: Megatron's gradient buffer, of trained weights.
        optimizer: fp32 master weights (16-bit training) and Adam's two moments, of trained weights.
        activations: kept for the backward passes of all micro-batches under way.
        workspace: the largest transient: gradient of the logits, or a layer that is recomputed.
        routing: of all the above, what the router takes.
        frozen: of the weights, those that are never trained.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    routing: int
    frozen: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


def usable(gpu_memory: float) -> int:
    """Bytes for tensors on a GPU of ``gpu_memory`` GiB."""
    return int((gpu_memory - OVERHEAD) * (1 - FRAGMENTS) * GIB)


def with_recompute(settings: Settings, mode: str) -> Settings:
    """``settings`` under one of :data:`RECOMPUTE_MODES`; every layer recomputed in ``full``."""
    granularity, modules = RECOMPUTE_MODES[mode]
    return replace(
        settings, recompute=granularity, recompute_modules=modules, recompute_method="uniform", recompute_num_layers=1
    )


def fullest(settings: Settings, world_size: int) -> Memory:
    """Memory of the pipeline rank that needs most."""
    return max((on_rank(settings, world_size, rank) for rank in range(settings.pipeline)), key=lambda it: it.total)


def on_rank(settings: Settings, world_size: int, rank: int) -> Memory:
    """Memory of pipeline rank ``rank``."""
    counts = parameters.stage(settings, rank)
    dense, experts = counts.dense_on_rank(settings) - counts.frozen, counts.experts_on_rank(settings)
    trained = dense + experts
    buffers = _buffers(settings, rank)
    sharing = max(1, world_size // (settings.tensor * settings.pipeline)) if settings.distributed_optimizer else 1
    expert_ranks = settings.expert_tensor * settings.expert * settings.pipeline
    expert_sharing = max(1, world_size // expert_ranks) if settings.distributed_optimizer else 1
    per_parameter = 12 if settings.dtype_bytes == 2 else 8
    optimizer = per_parameter * (dense // sharing + experts // expert_sharing)

    under_way = _in_flight(settings, rank, microbatches(settings, world_size))
    kept = _kept_on_rank(settings, rank, under_way)
    plain = _kept_on_rank(replace(settings, routing=None), rank, under_way)
    routing = settings.dtype_bytes * counts.routing + buffers
    routing += (settings.grad_bytes + per_parameter / sharing) * (counts.routing - counts.frozen)
    return Memory(
        weights=settings.dtype_bytes * (trained + counts.frozen) + buffers,
        gradients=settings.grad_bytes * trained,
        optimizer=optimizer,
        activations=kept,
        workspace=_workspace(settings, rank),
        routing=int(routing) + kept - plain,
        frozen=settings.dtype_bytes * counts.frozen,
    )


def _buffers(settings: Settings, rank: int) -> int:
    """Bytes of the buffers that the router's modules on a pipeline rank have."""
    if settings.routing is None:
        return 0
    routed = sum(settings.moe_layers[index] for index in parameters.layers_of_rank(settings, rank))
    return settings.routing.buffers_shared + routed * settings.routing.buffers_layer


def microbatches(settings: Settings, world_size: int) -> int:
    """Micro-batches of one data-parallel rank in a step, at least 1."""
    ranks = max(1, world_size // (settings.tensor * settings.pipeline * settings.context))
    return max(1, settings.global_batch_size // (settings.micro_batch_size * ranks))


def tokens_on_rank(settings: Settings) -> int:
    """Tokens of a micro-batch that a rank attends over: S x B / CP."""
    return settings.seq_length * settings.micro_batch_size // settings.context


def _kept_on_rank(settings: Settings, rank: int, under_way: float) -> int:
    """All activations of a pipeline rank with ``under_way`` micro-batches between forward and backward."""
    layers = parameters.layers_of_rank(settings, rank)
    kept = 0.0
    if settings.recompute == "full":
        kept += _kept_under_full(settings, layers)
    else:
        kept += sum(layer(settings, index) for index in layers)
    kept *= under_way
    if rank == 0:
        tokens = tokens_on_rank(settings)
        dropout_mask = settings.hidden_size // _sequence_share(settings) if settings.hidden_dropout else 0
        kept += under_way * tokens * (8 + dropout_mask)
    if rank == settings.pipeline - 1:
        kept += _head(settings)
    return int(kept)


def _kept_under_full(settings: Settings, layers: list[int]) -> float:
    if settings.recompute_method == "block":
        # of each virtual stage's layers the first N are recomputed
        each = len(layers) // settings.virtual
        kept = 0.0
        for position, index in enumerate(layers):
            recomputed = position % each < settings.recompute_num_layers
            kept += _carried(settings, index) if recomputed else layer(settings, index)
        return kept
    return sum(_carried(settings, index) for index in layers[:: settings.recompute_num_layers])


def _carried(settings: Settings, index: int) -> float:
    """What goes into layer ``index``: hidden states and, but for the model's first, the routing state."""
    width = settings.hidden_size * settings.dtype_bytes + (_state(settings) if index else 0)
    return width * tokens_on_rank(settings) / _sequence_share(settings)


def _state(settings: Settings) -> int:
    """Bytes of a token's routing state."""
    return settings.routing.state_size * settings.router_dtype_bytes if settings.routing else 0


def _in_flight(settings: Settings, rank: int, steps: int) -> float:
    """Micro-batches whose activations a rank holds at most, of ``steps``, in units of all its layers (schedules.py)."""
    pipeline, virtual = settings.pipeline, settings.virtual
    if virtual == 1:
        return min(pipeline - rank, steps)
    return min((pipeline - rank - 1) * 2 + (virtual - 1) * pipeline + 1, steps * virtual) / virtual


def _sequence_share(settings: Settings) -> int:
    """Over how many ranks the sequence of norms, dropout and routing is divided."""
    return settings.tensor if settings.sequence_parallel else 1


def layer(settings: Settings, index: int) -> float:
    """Bytes that layer ``index`` keeps of one micro-batch on one rank, without full recompute."""
    tokens = tokens_on_rank(settings)
    size, share = settings.dtype_bytes, _sequence_share(settings)
    modules = settings.recompute_modules
    narrow = settings.hidden_size * size / share  # one [S, B, H]
    query = settings.heads * settings.head_size / settings.tensor
    key_value = settings.query_groups * settings.head_size / settings.tensor

    kept = tokens * _norm(settings, modules)
    kept += tokens * size * (query + 2 * key_value)  # the joint product, of which the values are a view
    kept += tokens * size * (query + key_value)  # queries and keys, rotated
    kept += tokens * size * query  # the attention's result, input of its output map
    if "core_attn" not in modules:
        kept += _scores(settings, tokens)
    if not settings.fused_attention and settings.positions == 0:
        kept += 4 * settings.head_size * size * settings.seq_length / settings.context  # sines and cosines
    if settings.hidden_dropout:
        kept += 2 * tokens * settings.hidden_size / share
    kept += tokens * _norm(settings, modules)
    if settings.moe_layers[index]:
        return kept + _moe(settings, tokens, narrow)
    if "mlp" in modules:
        return kept
    return kept + tokens * size * settings.ffn_size / settings.tensor * (3 if settings.gated else 2)


def _norm(settings: Settings, modules: tuple[str, ...]) -> float:
    """Per token: a norm's input and statistics, and its result, which the next map keeps."""
    results = 1 if "layernorm" in modules else 2
    share = _sequence_share(settings)
    return (results * settings.hidden_size * settings.dtype_bytes + (8 if settings.layer_norm else 4)) / share


def _scores(settings: Settings, tokens: int) -> float:
    heads = settings.heads / settings.tensor
    if settings.fused_attention:
        return 4 * tokens * heads  # the logarithm of each row's sum
    square = tokens * settings.seq_length * heads
    # Megatron's softmax keeps its result, dropout its mask and its result; the causal mask is [S, S]
    dropout = 1 + settings.dtype_bytes if settings.attention_dropout else 0
    return square * (settings.dtype_bytes + dropout) + settings.seq_length**2


def _moe(settings: Settings, tokens: int, narrow: float) -> float:
    """An MoE layer after its norm, with tokens spread evenly over experts and ranks."""
    size, share = settings.dtype_bytes, _sequence_share(settings)
    if "moe" in settings.recompute_modules:
        return tokens * _state(settings) / share
    here = tokens / share  # tokens that this rank routes
    kept = here * (12 * settings.logits + 28 * settings.topk)  # scores, indices, maps
    if settings.routing:
        kept += here * settings.routing.kept + settings.routing.kept_once
        if not (
            settings.routing.keeps_input or settings.shared_expert_size or "layernorm" in settings.recompute_modules
        ):
            kept -= narrow * tokens  # the norm's result: frozen weights do not need it
    # under expert-tensor parallelism each rank works on the tokens of the whole group, with a part of each expert
    rows = here * settings.most_experts * settings.expert_tensor
    ffn = settings.expert_ffn_size / settings.expert_tensor
    if settings.gated:
        inner = 2 * ffn + (0 if "moe_act" in settings.recompute_modules else ffn)
    else:  # the activation's input and result, and that result times the token's weight
        inner = ffn + (0 if "moe_act" in settings.recompute_modules else 2 * ffn)
    kept += rows * (size * (settings.hidden_size + inner) + 4)
    if "shared_experts" not in settings.recompute_modules:
        kept += tokens * size * settings.shared_expert_size / settings.tensor * (3 if settings.gated else 2)
    return kept


def _head(settings: Settings) -> float:
    """Last norm, output map and loss: the softmax over the vocabulary in fp32, one micro-batch at a time."""
    tokens = tokens_on_rank(settings)
    return tokens * (_norm(settings, ()) + 4 * settings.vocab_size / settings.tensor + 9)


def _workspace(settings: Settings, rank: int) -> int:
    tokens = tokens_on_rank(settings)
    logits = 0.0
    if rank == settings.pipeline - 1:  # the loss's gradient, beside its softmax in fp32
        logits = tokens * settings.dtype_bytes * settings.vocab_size / settings.tensor
    index = max(parameters.layers_of_rank(settings, rank), key=lambda i: layer(settings, i))
    plain = replace(settings, recompute="none", recompute_modules=())
    rerun = layer(plain, index) - layer(settings, index) if settings.recompute == "selective" else 0.0
    if settings.recompute == "full":
        group = settings.recompute_num_layers if settings.recompute_method != "block" else 1
        rerun = layer(plain, index) * group
    ffn = settings.expert_ffn_size if settings.moe_layers[index] else settings.ffn_size
    rows = settings.most_experts if settings.moe_layers[index] else 1
    # the backward pass through a block of maps holds the gradients of its input, inner part and result
    up = 2 if settings.gated else 1
    gradients = tokens * rows * settings.dtype_bytes * (2 * settings.hidden_size + (up + 1) * ffn / settings.tensor)
    scores = 0.0
    if not settings.fused_attention:  # before and after the mask, or the two gradients
        scores = 2 * settings.dtype_bytes * tokens * settings.seq_length * settings.heads / settings.tensor
    return int(max(logits, rerun + max(gradients, scores)))
