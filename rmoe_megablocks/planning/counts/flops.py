"""Floating-point operations a token; a multiplication with its addition counts as two."""

from __future__ import annotations

from dataclasses import dataclass

from rmoe_megablocks.planning.counts import memory
from rmoe_megablocks.planning.settings import Settings


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs a token; the backward pass takes twice as many, that of the routing ``routing_backward``.

    ``attention`` is the scores and their weighted sum, for causal attention half of the square. ``training`` is
    forward and backward without recomputation, which ``recomputed`` adds. With null experts ``experts`` is an
    expectation, that of balanced routing, and ``saved`` what a forward pass through K real experts would take more.
    """

    linear: int
    attention: int
    experts: int
    routing: int
    logits: int
    recomputed: int
    routing_backward: int
    saved: int = 0

    @property
    def forward(self) -> int:
        """All of a forward pass."""
        return self.linear + self.attention + self.experts + self.routing + self.logits

    @property
    def training(self) -> int:
        """Forward and backward pass."""
        return 3 * (self.forward - self.routing) + self.routing + self.routing_backward


def flops(settings: Settings) -> Flops:
    """Matrix products only: everything else is below one per cent."""
    hidden, layers, routed = settings.hidden_size, settings.num_layers, sum(settings.moe_layers)
    query, key_value = settings.heads * settings.head_size, settings.query_groups * settings.head_size
    matrices = 3 if settings.gated else 2
    attention = layers * 2 * settings.seq_length * query
    dense = (layers - routed) * 2 * matrices * hidden * settings.ffn_size
    experts_of = routed * 2 * matrices * hidden * settings.expert_ffn_size  # with one expert a token
    experts = round(experts_of * settings.expected_experts)
    shared = routed * 2 * matrices * hidden * settings.shared_expert_size
    routing, routing_backward = (int(routed * of_a_layer) for of_a_layer in router(settings))
    linear = layers * 2 * hidden * (2 * query + 2 * key_value) + dense + shared
    recomputed = 0
    if settings.recompute == "full":
        of = settings.recompute_num_layers * settings.pipeline * settings.virtual / layers
        share = min(1.0, of) if settings.recompute_method == "block" else 1.0
        recomputed = int(share * (linear + attention + experts + routing))
    if settings.recompute == "selective":
        recomputed += attention if "core_attn" in settings.recompute_modules else 0
        recomputed += experts + shared + routing if "moe" in settings.recompute_modules else 0
    logits = 2 * hidden * settings.vocab_size
    saved = round(experts_of * settings.topk) - experts if settings.null_experts else 0
    return Flops(linear, attention, experts, routing, logits, recomputed, routing_backward, saved)


def router(settings: Settings) -> tuple[float, float]:
    """One layer's router, forward and backward: the host's own matrix [E, H], or what its type's modules compute."""
    if settings.routing is None:
        forward = 2 * settings.hidden_size * settings.logits
        return forward, 2 * forward
    tokens = memory.tokens_on_rank(settings) // (settings.tensor if settings.sequence_parallel else 1)
    return settings.routing.forward.of_a_token(tokens), settings.routing.backward.of_a_token(tokens)
