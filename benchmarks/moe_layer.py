"""Tokens per second of one MoE layer, forward and backward: Megatron's sequential experts and MegaBlocks' grouped ones.

One process, the layer as Megatron's transformer layer builds it, router and losses included. Rounds alternate (A B,
B A, ...) so that a machine whose speed drifts slows both. On a GPU also the grouped matrix products alone, against a
loop of products, and what share of the device's bf16 peak they reach.
"""

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable

from benchmarks import machine
from benchmarks.one_process import parallel_state

HIDDEN, FFN, EXPERTS, TOP_K = 1280, 448, 16, 4
BACKENDS = ("megatron", "megablocks")
LABELS = {"megatron": "Megatron, sequential", "megablocks": "MegaBlocks, grouped"}
MODEL = (
    f"--num-layers 1 --hidden-size {HIDDEN} --num-attention-heads 20 --ffn-hidden-size {FFN} --num-experts {EXPERTS} "
    f"--moe-router-topk {TOP_K} --moe-ffn-hidden-size {FFN} --seq-length 4096 --max-position-embeddings 4096 "
    "--vocab-size 256 --swiglu --normalization RMSNorm --disable-bias-linear --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall --micro-batch-size 1 --global-batch-size 1 "
    "--train-iters 1 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --eval-interval 100"
).split()
# Dense bf16 tensor-core peaks from the vendor's data sheets, in FLOP/s
BF16_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens a pass (default 1024; 4096 and 16384 on a GPU)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each backend (default 7)")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="processor time of this process, not wall time: for one thread on a machine that others use too",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default fp32, bf16 on a GPU")


def run(args: argparse.Namespace) -> str:
    import rmoe_megablocks.megatron  # noqa: F401  CPU mode, before Megatron
    from rmoe_megablocks.compat import megablocks as megablocks_mode
    from rmoe_megablocks.compat import megatron_cpu

    on_gpu = not megatron_cpu.active()
    dtype = args.dtype or ("bf16" if on_gpu else "fp32")
    compiled = megablocks_mode.enable()
    with parallel_state():
        layers = {backend: _layer(backend, dtype) for backend in BACKENDS}
        rows = []
        for tokens in args.tokens or ([4096, 16384] if on_gpu else [1024]):
            passes = {backend: _layer_pass(layer, tokens) for backend, layer in layers.items()}
            rows += _rows(_alternate(passes, args, on_gpu), tokens)
        products = _products(args, on_gpu, dtype) if on_gpu else []
    return "\n".join(
        [
            machine.describe(),
            f"one MoE layer, forward and backward, {dtype}: {EXPERTS} experts, top-{TOP_K}, ffn {FFN}, hidden {HIDDEN}",
            f"megablocks_ops {compiled['megablocks_ops']}, grouped_gemm {compiled['grouped_gemm']}",
            f"{args.rounds} rounds in turn, {'processor' if args.processor_time else 'wall'} time, median (min-max)",
            "",
            "| experts | tokens a pass | ms | tokens/s | MegaBlocks / Megatron: tokens/s |",
            "|---|---|---|---|---|",
            *rows,
            *products,
        ]
    )


def _layer(backend: str, dtype: str):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import default_layer_spec

    from rmoe_megablocks.megatron import arguments
    from rmoe_megablocks.megatron.recurrence import install

    precision = ["--bf16", "--moe-router-dtype", "fp32"] if dtype == "bf16" else []
    with contextlib.redirect_stdout(io.StringIO()):
        # without Transformer Engine on purpose: that is where Megatron has the loop alone
        parsed = arguments.parse([*MODEL, *precision, "--transformer-impl", "local", "--moe-backend", backend])
        arguments.fill_defaults(parsed)
        arguments.validate(parsed)
        config = gpt_config_from_args(parsed)
        install.install_router(config, parsed)
    spec = (config.transformer_layer_spec or default_layer_spec)(config, None)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = spec.layer_specs[0].submodules.mlp(config=config.transformer, pg_collection=groups, is_mtp_layer=False)
    layer.set_layer_number(1)
    return layer.cuda()


def _layer_pass(layer, tokens: int) -> Callable[[], None]:
    import torch

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 1, HIDDEN, generator=generator).to(layer.config.params_dtype).cuda().requires_grad_()
    grad = torch.randn(tokens, 1, HIDDEN, generator=generator).to(x.dtype).cuda()

    def once() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        x.grad = None
        layer(x)[0].backward(grad)

    return once


def _alternate(passes: dict[str, Callable[[], None]], args: argparse.Namespace, on_gpu: bool) -> dict[str, list[float]]:
    """Seconds a pass, one entry a round; a round repeats its pass for about a fifth of a second."""
    clock = time.process_time if args.processor_time else time.perf_counter
    repeats = {}
    for name, once in passes.items():
        for _ in range(3):
            seconds = _seconds(once, 1, clock, on_gpu)
        repeats[name] = max(1, round(0.2 / seconds))
    result = {name: [] for name in passes}
    for i in range(args.rounds):
        for name in list(passes)[:: 1 if i % 2 == 0 else -1]:
            result[name].append(_seconds(passes[name], repeats[name], clock, on_gpu))
    return result


def _seconds(once: Callable[[], None], repeats: int, clock: Callable[[], float], on_gpu: bool) -> float:
    import torch

    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(repeats):
        once()
    if on_gpu:
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def _rows(seconds: dict[str, list[float]], tokens: int) -> list[str]:
    rows = []
    for backend, times in seconds.items():
        ratio = ""
        if backend != BACKENDS[0]:
            ratio = _spread([a / b for a, b in zip(seconds[BACKENDS[0]], times, strict=True)], ".2f")
        milliseconds, speed = [1e3 * t for t in times], [tokens / t for t in times]
        rows.append(
            f"| {LABELS[backend]} | {tokens} | {_spread(milliseconds, '.1f')} | {_spread(speed, ',.0f')} | {ratio} |"
        )
    return rows


def _products(args: argparse.Namespace, on_gpu: bool, dtype: str) -> list[str]:
    """The first matrix products of the experts alone, evenly routed: grouped_mm, and one product an expert."""
    import torch
    from torch.nn import functional as F

    peak = next((peak for name, peak in BF16_PEAK.items() if name in torch.cuda.get_device_name(0)), None)
    lines = ["", "| products | rows | TFLOP/s | share of bf16 peak |", "|---|---|---|---|"]
    for tokens in args.tokens or [4096, 16384]:
        rows = tokens * TOP_K
        a = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(EXPERTS, HIDDEN, FFN, device="cuda", dtype=torch.bfloat16)
        sizes = [rows // EXPERTS] * EXPERTS
        ends = torch.tensor(sizes, device="cuda").cumsum(0, dtype=torch.int32)
        parts = a.split(sizes)
        passes = {
            "a loop of products": lambda parts=parts, b=b: [
                part @ matrix for part, matrix in zip(parts, b, strict=True)
            ],
            "grouped_mm": lambda a=a, b=b, ends=ends: F.grouped_mm(a, b, offs=ends),
        }
        for name, times in _alternate(passes, args, on_gpu).items():
            speed = [2 * rows * HIDDEN * FFN / t for t in times]
            share = _spread([100 * s / peak for s in speed], ".0f") + " %" if peak else "peak unknown"
            lines.append(f"| {name} | {rows} | {_spread([s / 1e12 for s in speed], '.1f')} | {share} |")
    return lines
