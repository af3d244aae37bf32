"""Options of Megatron's routing that it takes together and then stops at, or leaves one of them out without a word.

Line numbers are megatron-core 0.19's, moe/router.py and moe/moe_utils.py.
"""

import argparse
from collections.abc import Iterator

_ALONE = ("sinkhorn", "quantile_balancing", "none")
_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
_OPTION = "--moe-router-load-balancing-type"


def contradictions(args: argparse.Namespace) -> Iterator[tuple[object, str]]:
    """(whether it applies, the line that refuses it), for a model with experts."""
    if not args.num_experts:
        return
    kinds = args.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else kinds
    coefficients = args.moe_aux_loss_coeff
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients]
    yield from _types(kinds, coefficients)
    yield from _groups(args)
    if kinds == ["sinkhorn"]:
        yield from _without(args, "sinkhorn", _SINKHORN)
    if kinds == ["quantile_balancing"]:
        yield from _without(args, "quantile_balancing", _QUANTILES)
        yield (
            args.moe_router_quantile_balancing_ema >= 1,
            f"--moe-router-quantile-balancing-ema {args.moe_router_quantile_balancing_ema}: must be below 1, at which "
            "the bias never changes",
        )
    yield (
        args.moe_expert_capacity_factor == 0,
        "--moe-expert-capacity-factor 0.0: every token would be dropped; leave it out to drop none",
    )
    jitter = args.moe_input_jitter_eps
    yield (
        jitter is not None and jitter >= 1,
        f"--moe-input-jitter-eps {jitter}: must be below 1; it multiplies inputs by 1 - {jitter} to 1 + {jitter}",
    )


def _types(kinds: list[str], coefficients: list[float]) -> Iterator[tuple[object, str]]:
    """Several types are several losses, each with its coefficient; what is no loss is looked for alone (router.py:660).

    A type twice has the first one's coefficient alone (router.py:394).
    """
    named = f"{_OPTION} {' '.join(kinds)}"
    alone = [kind for kind in _ALONE if kind in kinds]
    yield (
        len(kinds) > 1 and alone,
        f"{named}: {alone[0] if alone else ''} is no loss that goes with others; keep one type, or losses alone "
        f"({', '.join(_LOSSES)})",
    )
    yield len(set(kinds)) < len(kinds), f"{named}: names a type twice; add up their --moe-aux-loss-coeff"
    yield (
        len(coefficients) != len(kinds) and (len(kinds), len(coefficients)) != (1, 1),
        f"--moe-aux-loss-coeff names {len(coefficients)} weights, {_OPTION} {len(kinds)} types: they must be as many",
    )


def _groups(args: argparse.Namespace) -> Iterator[tuple[object, str]]:
    """A group's score is the sum of its topk // group_topk largest (moe_utils.py:655): none, or more than it has."""
    groups, chosen, topk = args.moe_router_num_groups, args.moe_router_group_topk, args.moe_router_topk
    if not groups or not chosen or args.num_experts % groups or chosen > groups:  # Megatron refuses the latter
        return
    size = args.num_experts // groups
    yield (
        topk < chosen,
        f"--moe-router-group-topk {chosen} is more than --moe-router-topk {topk}: all groups would have the score 0, "
        "and which are taken would not depend on the token",
    )
    yield (
        topk > chosen * size,
        f"--moe-router-topk {topk}: {chosen} of the {groups} groups (--moe-router-group-topk, --moe-router-num-groups) "
        f"have {chosen * size} of the {args.num_experts} experts",
    )


# what a type never looks at: attribute, the option
_SCORES = {
    "moe_router_group_topk": "--moe-router-group-topk",
    "moe_router_enable_expert_bias": "--moe-router-enable-expert-bias",
}
_QUANTILES = _SCORES
_SINKHORN = {
    **_SCORES,
    "moe_router_pre_softmax": "--moe-router-pre-softmax",
    "moe_router_topk_scaling_factor": "--moe-router-topk-scaling-factor",
    "moe_router_score_function": "--moe-router-score-function",
    "moe_router_fusion": "--moe-router-fusion",
    "moe_enable_routing_replay": "--moe-enable-routing-replay",
}


def _without(args: argparse.Namespace, kind: str, ignored: dict[str, str]) -> Iterator[tuple[object, str]]:
    for name, option in ignored.items():
        value = getattr(args, name)
        yield value not in (None, False, "softmax"), f"{_OPTION} {kind} does not look at {option}: leave it out"
    coefficients = args.moe_aux_loss_coeff
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients]
    yield any(coefficients), f"{_OPTION} {kind} with an auxiliary loss does not work: set --moe-aux-loss-coeff 0"
