"""What the weight of the load-balancing loss is a weight of: ``--moe-aux-loss-reduction``.

Four definitions go by the same name and the same 0.01. With b_l = E * sum_e f_e P_e of layer l, 1 when balanced, over
L layers and top-K choices:

    Megatron (``sum``)                    sum of b_l                       L when balanced
    MegaBlocks (``mean``)                 sum of b_l / L                   1
    the released Llama-style model code   K * b of all layers' tokens at once, as if they were one layer's; K
    CompeteSMoE, the small models' base   sum of b_l / K                   L / K
"""

import argparse

from megatron.core.transformer.transformer_config import TransformerConfig

from rmoe_megablocks.errors import UsageError

SUM, MEAN = REDUCTIONS = ("sum", "mean")
_OPTION = "--moe-aux-loss-reduction"
_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")


def add_reduction_argument(group) -> None:
    """Adds ``--moe-aux-loss-reduction`` to a group of arguments."""
    group.add_argument(
        _OPTION,
        choices=REDUCTIONS,
        default=SUM,
        help="Over the MoE layers, --moe-aux-loss-coeff weighs the sum of their load-balancing losses, as Megatron "
        "does, or their mean, as MegaBlocks' moe_loss_weight does; with both routers. The z-loss is a sum in both.",
    )


def check_reduction(args: argparse.Namespace) -> None:
    """Refuses a mean over nothing. Raises UsageError."""
    if args.moe_aux_loss_reduction == SUM:
        return
    option = f"{_OPTION} {args.moe_aux_loss_reduction}"
    if not args.num_experts:
        raise UsageError(f"{option}: the model has no experts to balance; set --num-experts")
    if args.mtp_num_layers:
        raise UsageError(
            f"{option} does not work with --mtp-num-layers: MegaBlocks has no such layers to average over; "
            "leave one of them out"
        )
    balancing, coefficients = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    names = balancing if isinstance(balancing, list) else [balancing]
    weights = coefficients if isinstance(coefficients, list) else [coefficients] * len(names)
    if not any(weight for name, weight in zip(names, weights, strict=False) if name in _LOSSES):
        raise UsageError(
            f"{option}: there is no load-balancing loss; set --moe-router-load-balancing-type aux_loss and "
            "--moe-aux-loss-coeff, or leave it out"
        )


def reduces(args: argparse.Namespace) -> bool:
    """Whether Megatron's own coefficient has to be changed."""
    return args.moe_aux_loss_reduction == MEAN


def apply_reduction(config: TransformerConfig, args: argparse.Namespace) -> None:
    """Makes ``config``, made of ``args``, weigh every layer's loss by its share of the coefficient. Idempotent.

    What Megatron logs is each loss without its weight, and stays so. ``args`` keep the coefficient as it was typed.
    """
    if not reduces(args):
        return
    layers = moe_layers(config)
    coefficients = args.moe_aux_loss_coeff
    scaled = [c / layers for c in coefficients] if isinstance(coefficients, list) else coefficients / layers
    config.moe_aux_loss_coeff = scaled


def moe_layers(config: TransformerConfig) -> int:
    """The model's MoE layers, by ``moe_layer_freq`` (every N-th from the first on, or a list of zeros and ones)."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, list):
        return sum(frequency)
    return sum(index % frequency == 0 for index in range(config.num_layers))
