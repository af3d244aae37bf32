"""What the recurrent router costs in a whole training step: models with ``gru`` and ``linear``, the same otherwise.

All of them are in one process and take steps in turn on the same batch: gru, linear, control, control, linear, gru. The
control is a second linear model, so that control / linear is measured as gru / linear is: where that is not 1, nothing
is concluded. Ratios and differences are of neighbours, an interval is the bootstrap's of their median.

A step is Megatron's ``train_step``: gradients zeroed, forward, backward, gradients finished and clipped, Adam,
schedule; and the loss and the gradients' norm read, every tenth time the router's figures too. Not in it: data from a
disk, the lines of a log. The learning rate is so small that weights stay as they were drawn, and random logits choose
the experts (--moe-router-force-load-balancing; the router's own are computed, and have gradients, as ever): every step
of every model has the same work.
"""

import argparse
import gc
from collections.abc import Sequence

from benchmarks import machine
from benchmarks.measuring.clocks import progress
from benchmarks.measuring.command_line import at_least, set_threads
from benchmarks.measuring.quantiles import turns
from benchmarks.router_overhead import table
from benchmarks.router_overhead.table import CONTROL, GRU, LINEAR, Depth
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.routing.parts.implementation import AUTO, CHOICES, chosen

# The paper's 0.91B model, but for the number of layers and what the options choose
MODEL = (
    "--hidden-size 1280 --num-attention-heads 20 --ffn-hidden-size 448 --num-experts 16 --moe-router-topk 4 "
    "--moe-ffn-hidden-size 448 --swiglu --normalization RMSNorm --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --moe-aux-loss-reduction mean "
    "--moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --moe-router-force-load-balancing --optimizer adam "
    "--adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --lr 1e-12 --min-lr 1e-12 "
    "--lr-decay-style constant --train-iters 1000000 --eval-interval 1000000 --eval-iters 0 --log-interval 10 "
    "--mock-data --tokenizer-type NullTokenizer --seed 1234"
).split()
STATE_SIZE, EXPERTS = 128, 16
#: a head as large beside four layers as the model's own (96,512 tokens) is beside 24, and a multiple of 128 with the
#: end-of-text token that Megatron adds
VOCABULARY = 16127
#: sequence length and sequences of a step. On one core of a CPU a step of 512 tokens takes some three seconds
DEFAULT_BATCH = {"cpu": (512, 1), "cuda": (2048, 8)}
_WARM_UP = 3
_LOGGED = 10  # one step in so many is a logged one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What may be chosen."""
    parser.add_argument("--pairs", type=at_least(2), default=200, help="of steps, for each ratio (default 200)")
    parser.add_argument(
        "--layers",
        type=at_least(1),
        nargs="+",
        default=[4, 2],
        metavar="N",
        help="of the model; a second, smaller number for the slope, what a layer more costs (default 4 2)",
    )
    parser.add_argument("--sequence-length", type=at_least(2), help="default 512, 2048 on a GPU")
    parser.add_argument("--micro-batch-size", type=at_least(1), help="default 1, 8 on a GPU")
    parser.add_argument("--vocab-size", type=at_least(2), default=VOCABULARY, help=f"default {VOCABULARY}")
    parser.add_argument("--impl", choices=CHOICES, default=AUTO, help="--moe-router-impl of gru (default auto)")
    parser.add_argument("--backend", choices=("megatron", "megablocks"), default="megatron", help="--moe-backend")
    parser.add_argument("--threads", type=at_least(1), help="of the CPU (default torch's)")


def run(args: argparse.Namespace) -> str:
    """Measures and returns the table. Raises UsageError for bad input, before anything is built."""
    device, load = machine.device(), machine.load()
    deep, *shallow = args.layers
    if len(args.layers) > 2 or (shallow and shallow[0] >= deep):
        numbers = " ".join(map(str, args.layers))
        raise UsageError(f"--layers {numbers}: expected one number, or two of which the second is smaller")
    set_threads(args.threads if device.type == "cpu" else None, False)
    impl = _chosen(args.impl, device)
    from benchmarks.router_overhead import training  # CPU mode and Megatron

    sequence, sequences = DEFAULT_BATCH[device.type]
    sequence, sequences = args.sequence_length or sequence, args.micro_batch_size or sequences
    batch = f"--seq-length {sequence} --max-position-embeddings {sequence} --micro-batch-size {sequences} "
    batch += f"--global-batch-size {sequences} --vocab-size {args.vocab_size} --moe-backend {args.backend}"
    precision = ["--bf16", "--use-distributed-optimizer"] if device.type == "cuda" else []
    routers = {
        GRU: f"--moe-router-type gru --moe-router-rnn-hidden-size {STATE_SIZE} --moe-router-impl {args.impl}".split(),
        LINEAR: ["--moe-router-type", "linear"],
    }
    parsed = {
        (layers, router): training.parsed(
            [*MODEL, *batch.split(), *precision, "--num-layers", str(layers), *routers[router]]
        )
        for layers in args.layers
        for router in routers
    }
    depths = []
    for layers in args.layers:
        names = (GRU, LINEAR, CONTROL) if layers == deep else (GRU, LINEAR)  # the control goes with what it controls
        with training.megatron(parsed[layers, GRU]):
            models = {name: parsed[layers, LINEAR if name == CONTROL else name] for name in names}
            depths.append(measure(training, layers, models, args.pairs))
        gc.collect()
    dtype = "bf16" if precision else "fp32"
    what = f"{sequences} x {sequence} tokens a step, vocabulary {args.vocab_size}, {dtype}, experts by {args.backend}"
    return table.markdown(depths, f"{machine.describe()}; {load}", f"{what}, gru by {impl}", device.type)


def _chosen(impl: str, device) -> str:
    """What --moe-router-impl means here. Raises UsageError for triton where it cannot run."""
    import torch

    parameters = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        return chosen(impl, device, torch.float32, parameters, STATE_SIZE, EXPERTS)
    except ValueError as error:
        raise UsageError(f"--impl: {error}") from error


def measure(training, layers: int, parsed: dict[str, argparse.Namespace], pairs: int) -> Depth:
    """Builds the models of one depth, in the order of their names, and has them take their steps in turn."""
    order: Sequence[str] = list(parsed)
    on_gpu = machine.device().type == "cuda"
    with progress(pairs + _WARM_UP + 2 * len(order), f"{layers} layers") as bar:
        models, saved, peak = {}, {}, {}
        for name in order:
            for args in parsed.values():  # padded by the tokenizer, which Megatron builds for the first one alone
                args.padded_vocab_size = parsed[GRU].padded_vocab_size
            models[name] = training.TrainedModel(parsed[name])
            bar.update()
        for name, model in models.items():
            saved[name] = model.saved_bytes()
            peak[name] = model.peak_bytes() if on_gpu else None
            bar.update()
        seconds = {name: [] for name in order}
        for index, names in enumerate(turns(order, _WARM_UP + pairs)):
            for name in names:
                taken = models[name].timed(is_logged=index % _LOGGED == _LOGGED - 1)
                if index >= _WARM_UP:
                    seconds[name].append(taken)
            bar.update()
    return Depth(layers, models[GRU].tokens, seconds, saved, peak)
