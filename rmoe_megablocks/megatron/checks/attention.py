"""Options of attention, positions and activations that Megatron takes and computes something else for."""

import argparse
from collections.abc import Iterator


def contradictions(args: argparse.Namespace) -> Iterator[tuple[object, str]]:
    """(whether it applies, the line that refuses it)."""
    yield from _positions(args)
    if args.window_size is not None:
        yield from _window(args)
    yield (
        args.group_query_attention and args.num_query_groups and args.num_attention_heads % args.num_query_groups,
        f"--num-query-groups {args.num_query_groups} does not divide --num-attention-heads {args.num_attention_heads}",
    )
    # mlp.py:285 and experts.py:826 hand it to the fused quick GeGLU alone
    yield (
        args.activation_func_clamp_value is not None
        and args.swiglu
        and args.bias_swiglu_fusion
        and not args.use_transformer_engine_op_fuser,
        f"--activation-func-clamp-value {args.activation_func_clamp_value}: the fused SwiGLU does not clamp; add "
        "--no-bias-swiglu-fusion",
    )


def _positions(args: argparse.Namespace) -> Iterator[tuple[object, str]]:
    kind = "rope" if args.use_rotary_position_embeddings else args.position_embedding_type
    width = int((args.kv_channels or args.hidden_size // args.num_attention_heads) * args.rotary_percent)
    option = f"--position-embedding-type {kind}"
    yield (
        kind == "rope" and width % 2,
        f"{option} turns pairs of channels, and --kv-channels x --rotary-percent are {width}",
    )
    yield (
        kind == "rope" and not width and not args.multi_latent_attention,
        f"--rotary-percent {args.rotary_percent} leaves no channel to turn, and so no positions: to have none use "
        "--position-embedding-type none",
    )
    yield kind == "mrope", f"{option}: the positions of this entry's data count tokens alone; use rope"
    frequency = args.no_rope_freq
    yield (
        isinstance(frequency, list) and set(frequency) - {0, 1},
        f"--no-rope-freq {frequency}: a layer is 1 (without rotary positions) or 0 (with them)",
    )


def _window(args: argparse.Namespace) -> Iterator[tuple[object, str]]:
    """A window that reaches to the right shows the token that is to be predicted (transformer/utils.py:42)."""
    option = f"--window-size {','.join(map(str, args.window_size))}"
    wanted = "two numbers are wanted, LEFT,0: how many tokens before it a token sees"
    local = args.transformer_impl == "local"  # which takes -1 for a number, Transformer Engine for no limit
    yield len(args.window_size) != 2, f"{option}: {wanted}"
    yield (
        len(args.window_size) == 2
        and (args.window_size[0] < (0 if local else -1) or args.window_size[1] not in ((0,) if local else (0, -1))),
        f"{option}: {wanted}, and none after it",
    )
    yield (
        local and args.reset_attention_mask,
        f"{option} takes the place of --reset-attention-mask where Transformer Engine is not used: keep one",
    )
