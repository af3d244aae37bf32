"""Exact parameter counts, the whole model's and each pipeline stage's."""

from __future__ import annotations

from dataclasses import dataclass

from rmoe_megablocks.planning.settings import Settings


@dataclass(frozen=True)
class Counts:
    """Parameters by how ranks share them.

    Attributes:
        split: divided over tensor-parallel ranks.
        whole: a full copy on every tensor-parallel rank (norms, biases of row-parallel maps, routing).
        experts: divided over expert-parallel and expert-tensor-parallel ranks.
        expert_whole: as experts, but not divided by tensor parallelism (the experts' output biases).
        routing: of ``whole``, those of the layers' routers and of what they share.
        frozen: of ``routing``, those that are never trained: no gradient, no optimizer state.
    """

    split: int = 0
    whole: int = 0
    experts: int = 0
    expert_whole: int = 0
    routing: int = 0
    frozen: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self.as_tuple(), other.as_tuple(), strict=True)))

    def as_tuple(self) -> tuple[int, ...]:
        """The fields in order."""
        return self.split, self.whole, self.experts, self.expert_whole, self.routing, self.frozen

    @property
    def total(self) -> int:
        """All parameters, each once."""
        return self.split + self.whole + self.experts + self.expert_whole

    def dense_on_rank(self, settings: Settings) -> int:
        """Parameters of one rank that every data-parallel rank of it has a copy of."""
        return self.split // settings.tensor + self.whole

    def experts_on_rank(self, settings: Settings) -> int:
        """Parameters of one rank's share of the experts."""
        return (self.experts // settings.expert_tensor + self.expert_whole) // settings.expert


def norm(settings: Settings, size: int) -> int:
    """Parameters of one normalisation over ``size``: a weight, and LayerNorm's bias."""
    return size * (2 if settings.layer_norm else 1)


def recurrence(settings: Settings) -> Counts:
    """What all layers share of a router."""
    if settings.routing is None:
        return Counts()
    shared = settings.routing.shared
    return Counts(whole=shared, routing=shared, frozen=settings.routing.frozen_shared)


def router(settings: Settings) -> Counts:
    """One layer's router: the host's own matrix [E, H], or what its type gives every layer."""
    if settings.routing is not None:
        owned = settings.routing.layer
        return Counts(whole=owned, routing=owned, frozen=settings.routing.frozen_layer)
    matrix = settings.logits * (settings.hidden_size + (1 if settings.linear_bias else 0))
    return Counts(whole=matrix, routing=matrix)


def layer(settings: Settings, index: int) -> Counts:
    """Layer ``index``, counted from 0."""
    hidden, bias = settings.hidden_size, settings.linear_bias
    query, key_value = settings.heads * settings.head_size, settings.query_groups * settings.head_size
    up = 2 if settings.gated else 1
    qkv = (query + 2 * key_value) * (hidden + settings.qkv_bias)
    attention = Counts(split=qkv + query * hidden, whole=2 * norm(settings, hidden) + (hidden if bias else 0))
    if settings.qk_layernorm:
        attention += Counts(whole=2 * norm(settings, settings.head_size))
    if not settings.moe_layers[index]:
        ffn = settings.ffn_size
        return attention + Counts(split=(up + 1) * ffn * hidden + bias * up * ffn, whole=bias * hidden)
    ffn, experts = settings.expert_ffn_size, settings.num_experts
    routed = router(settings) + Counts(
        experts=experts * ((up + 1) * ffn * hidden + bias * up * ffn), expert_whole=experts * bias * hidden
    )
    shared = Counts(
        split=(up + 1) * settings.shared_expert_size * hidden,
        whole=hidden if settings.shared_expert_gate and settings.shared_expert_size else 0,
    )
    return attention + routed + shared


def layers_of_rank(settings: Settings, rank: int) -> list[int]:
    """Indices of the layers on pipeline rank ``rank``: a run of them for each of its virtual stages."""
    each = settings.num_layers // (settings.pipeline * settings.virtual)
    starts = [(chunk * settings.pipeline + rank) * each for chunk in range(settings.virtual)]
    return [start + i for start in starts for i in range(each)]


def embedding(settings: Settings) -> Counts:
    """Token and learned position embeddings."""
    return Counts(split=settings.vocab_size * settings.hidden_size, whole=settings.positions * settings.hidden_size)


def model(settings: Settings) -> Counts:
    """The model, each parameter once, whatever the layout."""
    counts = embedding(settings) + recurrence(settings)
    counts += Counts(
        split=0 if settings.tied else settings.vocab_size * settings.hidden_size,
        whole=norm(settings, settings.hidden_size),
    )
    for index in range(settings.num_layers):
        counts += layer(settings, index)
    return counts


def stage(settings: Settings, rank: int) -> Counts:
    """What pipeline rank ``rank`` holds, copies included: what layers share, and a tied embedding on the last one."""
    counts = recurrence(settings)
    for index in layers_of_rank(settings, rank):
        counts += layer(settings, index)
    first, last = rank == 0, rank == settings.pipeline - 1
    if first:
        counts += embedding(settings)
    if last:
        counts += Counts(whole=norm(settings, settings.hidden_size))
        if not (settings.tied and first):
            counts += Counts(split=settings.vocab_size * settings.hidden_size)
    return counts


def active(settings: Settings) -> int:
    """Parameters that work on a token: top-k experts instead of all of them, with null experts in the mean."""
    counts = model(settings)
    if not settings.num_experts:
        return counts.total
    experts = counts.experts + counts.expert_whole
    return counts.total - experts + experts * settings.topk // settings.logits


def embeddings(settings: Settings) -> int:
    """Parameters of the input and output embeddings."""
    return embedding(settings).total + (0 if settings.tied else settings.vocab_size * settings.hidden_size)
