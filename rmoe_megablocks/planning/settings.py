"""The arguments that decide a run's size, read from Megatron's command line without Megatron."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rmoe_megablocks.command_line import groups_of
from rmoe_megablocks.data import DataError, DatasetMetadata
from rmoe_megablocks.errors import UsageError

#: Options with one value, and Megatron 0.19's defaults (training/arguments.py and the dataclasses in
#: training/config and core/transformer/transformer_config.py, from which it makes its parser). A test compares them
#: with the parser's.
VALUES: dict[str, tuple[type, object]] = {
    "--num-layers": (int, None),
    "--hidden-size": (int, None),
    "--num-attention-heads": (int, None),
    "--kv-channels": (int, None),
    "--num-query-groups": (int, 1),
    "--ffn-hidden-size": (int, None),
    "--num-experts": (int, None),
    "--moe-ffn-hidden-size": (int, None),
    "--moe-layer-freq": (str, 1),
    "--moe-shared-expert-intermediate-size": (int, None),
    "--moe-router-topk": (int, 2),
    "--moe-router-dtype": (str, None),
    "--normalization": (str, "LayerNorm"),
    "--position-embedding-type": (str, "learned_absolute"),
    "--max-position-embeddings": (int, None),
    "--vocab-size": (int, None),
    "--padded-vocab-size": (int, None),
    "--make-vocab-size-divisible-by": (int, 128),
    "--hidden-dropout": (float, 0.1),
    "--attention-dropout": (float, 0.1),
    "--seq-length": (int, None),
    "--micro-batch-size": (int, None),
    "--global-batch-size": (int, None),
    "--tensor-model-parallel-size": (int, 1),
    "--pipeline-model-parallel-size": (int, 1),
    "--num-layers-per-virtual-pipeline-stage": (int, None),
    "--num-virtual-stages-per-pipeline-rank": (int, None),
    "--context-parallel-size": (int, 1),
    "--expert-model-parallel-size": (int, 1),
    "--expert-tensor-parallel-size": (int, None),
    "--recompute-granularity": (str, None),
    "--recompute-method": (str, None),
    "--recompute-num-layers": (int, None),
    "--transformer-impl": (str, "transformer_engine"),
    "--attention-backend": (str, "auto"),
    # our own, megatron/arguments.py
    "--moe-router-type": (str, "linear"),
    "--moe-router-rnn-hidden-size": (int, 128),
    "--dataset": (str, None),
}

#: Bare flags, all off by default.
FLAGS = (
    "--swiglu",
    "--disable-bias-linear",
    "--add-qkv-bias",
    "--qk-layernorm",
    "--group-query-attention",
    "--untie-embeddings-and-output-weights",
    "--moe-shared-expert-gate",
    "--moe-router-rnn-bias",
    "--fp16",
    "--bf16",
    "--grad-reduce-in-bf16",
    "--accumulate-allreduce-grads-in-fp32",
    "--use-distributed-optimizer",
    "--sequence-parallel",
    "--recompute-activations",
    "--mock-data",
)

#: What changes a model or its memory in ways that are not computed here.
UNKNOWN = (
    "--multi-latent-attention",
    "--mtp-num-layers",
    "--hybrid-layer-pattern",
    "--heterogeneous-layers-config-path",
    "--experimental-attention-variant",
    "--moe-latent-size",
    "--pipeline-model-parallel-layout",
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
    "--use-megatron-fsdp",
    "--use-torch-fsdp2",
    "--use-precision-aware-optimizer",
    "--optimizer-cpu-offload",
    "--fp8-format",
    "--fp4-format",
    "--spec",
    "--yaml-cfg",
)

_DATA = ("--data-path", "--data-args-path", "--per-split-data-args-path", "--train-data-path", "--mock-data")


@dataclass(frozen=True)
class Settings:
    """Sizes of a run. Lengths are in elements, batches in sequences; ``moe_layers[i]`` says whether layer i routes."""

    num_layers: int
    hidden_size: int
    heads: int
    head_size: int
    query_groups: int
    ffn_size: int
    num_experts: int
    expert_ffn_size: int
    shared_expert_size: int
    shared_expert_gate: bool
    moe_layers: tuple[bool, ...]
    topk: int
    router_type: str
    state_size: int
    router_bias: bool
    router_dtype_bytes: int
    gated: bool
    linear_bias: bool
    qkv_bias: bool
    layer_norm: bool
    qk_layernorm: bool
    positions: int
    vocab_size: int
    tied: bool
    hidden_dropout: bool
    attention_dropout: bool
    fused_attention: bool
    dtype_bytes: int
    grad_bytes: int
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    expert: int
    expert_tensor: int
    sequence_parallel: bool
    distributed_optimizer: bool
    recompute: str
    recompute_modules: tuple[str, ...]
    recompute_method: str
    recompute_num_layers: int

    @property
    def recurrent(self) -> bool:
        """Whether a routing state goes from layer to layer."""
        return self.router_type != "linear" and self.num_experts > 0

    @property
    def replica(self) -> int:
        """Ranks of one replica, as ``layout_size`` of megatron/arguments.py counts them."""
        return self.pipeline * max(self.tensor * self.context, self.expert * self.expert_tensor)


def read_settings(argv: Sequence[str]) -> Settings:
    """Megatron's command line as :class:`Settings`. Raises UsageError for what is missing, wrong or not known here."""
    given = _options(argv)
    read = _Reader(given)
    for option in UNKNOWN:
        if option in given:
            raise UsageError(f"rmoe plan cannot compute with {option}; leave it out")

    layers, hidden = read.needed("--num-layers"), read.needed("--hidden-size")
    heads = read.needed("--num-attention-heads")
    head_size = read("--kv-channels") or hidden // heads
    gated = read.flag("--swiglu")
    # arguments.py:1280
    ffn = read("--ffn-hidden-size") or (int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden)
    tensor, pipeline = read("--tensor-model-parallel-size"), read("--pipeline-model-parallel-size")
    experts = read("--num-experts") or 0
    half = read.flag("--fp16") or read.flag("--bf16")
    dtype_bytes = 2 if half else 4
    recompute, modules = _recompute(given, read)
    bias = not read.flag("--disable-bias-linear")
    fused = read("--transformer-impl") == "transformer_engine" and half and read("--attention-backend") != "unfused"
    return Settings(
        num_layers=layers,
        hidden_size=hidden,
        heads=heads,
        head_size=head_size,
        query_groups=read("--num-query-groups") if read.flag("--group-query-attention") else heads,
        ffn_size=ffn,
        num_experts=experts,
        expert_ffn_size=read("--moe-ffn-hidden-size") or ffn,
        shared_expert_size=read("--moe-shared-expert-intermediate-size") or 0,
        shared_expert_gate=read.flag("--moe-shared-expert-gate"),
        moe_layers=_moe_layers(str(read("--moe-layer-freq")), layers) if experts else (False,) * layers,
        topk=read("--moe-router-topk"),
        router_type=read("--moe-router-type"),
        state_size=read("--moe-router-rnn-hidden-size"),
        router_bias=read.flag("--moe-router-rnn-bias"),
        router_dtype_bytes={"fp32": 4, "fp64": 8}.get(read("--moe-router-dtype"), dtype_bytes),
        gated=gated,
        linear_bias=bias,
        qkv_bias=bias or read.flag("--add-qkv-bias"),
        layer_norm=read("--normalization") == "LayerNorm",
        qk_layernorm=read.flag("--qk-layernorm"),
        positions=read.needed("--max-position-embeddings")
        if read("--position-embedding-type") == "learned_absolute"
        else 0,
        vocab_size=_vocabulary(given, read, tensor),
        tied=not read.flag("--untie-embeddings-and-output-weights"),
        hidden_dropout=read("--hidden-dropout") > 0,
        attention_dropout=read("--attention-dropout") > 0,
        fused_attention=fused,
        dtype_bytes=dtype_bytes,
        grad_bytes=_grad_bytes(read),
        seq_length=read.needed("--seq-length"),
        micro_batch_size=read.needed("--micro-batch-size"),
        global_batch_size=read("--global-batch-size") or 0,
        tensor=tensor,
        pipeline=pipeline,
        virtual=_virtual(read, layers, pipeline),
        context=read("--context-parallel-size"),
        expert=read("--expert-model-parallel-size"),
        expert_tensor=read("--expert-tensor-parallel-size") or tensor,
        sequence_parallel=read.flag("--sequence-parallel") and tensor > 1,
        distributed_optimizer=read.flag("--use-distributed-optimizer"),
        recompute=recompute,
        recompute_modules=modules,
        recompute_method=read("--recompute-method") or "",
        recompute_num_layers=read("--recompute-num-layers") or 1,
    )


def known_options() -> set[str]:
    """Every option that a plan looks at."""
    return {*VALUES, *FLAGS, *UNKNOWN, *_DATA, "--recompute-modules"}


class _Reader:
    def __init__(self, given: dict[str, list[str]]) -> None:
        self._given = given

    def __call__(self, option: str):
        kind, default = VALUES[option]
        values = self._given.get(option)
        if values is None:
            return default
        if len(values) != 1:
            raise UsageError(f"{option}: expected one value, found {len(values)}")
        try:
            value = kind(values[0])
        except ValueError:
            raise UsageError(f"{option}: {values[0]!r} is not a {'whole ' * (kind is int)}number") from None
        if kind is int and value < 1:
            raise UsageError(f"{option}: must be at least 1, got {value}")
        return value

    def needed(self, option: str) -> int:
        value = self(option)
        if value is None:
            raise UsageError(f"{option} is missing: neither the configuration nor the command line has it")
        return value

    def flag(self, option: str) -> bool:
        return option in self._given


def _options(argv: Sequence[str]) -> dict[str, list[str]]:
    """Options with their values; the last of a repeated one, as argparse takes it."""
    result: dict[str, list[str]] = {}
    for group in groups_of(list(argv)):
        name, equals, value = group[0].partition("=")
        if not name.startswith("--"):
            raise UsageError(f"{name!r} is not an argument (expected --name value)")
        result.pop(name, None)
        if (equals and value == "null") or (name in FLAGS and value == "false"):
            continue  # what it would take back is not there
        values = [value, *group[1:]] if equals else group[1:]
        if name in FLAGS and values not in ([], ["true"]):
            raise UsageError(f"{name} takes no value, found {' '.join(values)!r}")
        result[name] = values
    return result


def _grad_bytes(read: _Reader) -> int:
    """Megatron sums bf16 gradients in fp32 unless told otherwise (arguments.py:1192), fp16 ones only if told."""
    if read.flag("--bf16"):
        return 2 if read.flag("--grad-reduce-in-bf16") else 4
    return 2 if read.flag("--fp16") and not read.flag("--accumulate-allreduce-grads-in-fp32") else 4


def _recompute(given: dict[str, list[str]], read: _Reader) -> tuple[str, tuple[str, ...]]:
    granularity = "selective" if read.flag("--recompute-activations") else read("--recompute-granularity")
    modules = tuple(given.get("--recompute-modules", ())) or ("core_attn",)  # arguments.py: selective's default
    return granularity or "none", modules if granularity == "selective" else ()


def _virtual(read: _Reader, layers: int, pipeline: int) -> int:
    per_stage = read("--num-layers-per-virtual-pipeline-stage")
    if per_stage:
        return max(1, layers // pipeline // per_stage)
    return read("--num-virtual-stages-per-pipeline-rank") or 1


def _moe_layers(text: str, layers: int) -> tuple[bool, ...]:
    """``--moe-layer-freq``: every N-th layer from the first on, or a list expression such as ([0]*1+[1]*23)."""
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        value = None
    if isinstance(value, int) and value > 0:
        return tuple(i % value == 0 for i in range(layers))
    if isinstance(value, list) and len(value) == layers:
        return tuple(bool(item) for item in value)
    raise UsageError(f"--moe-layer-freq: {text!r} is neither a number nor a list of {layers} zeros and ones")


def _evaluate(node: ast.expr):
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _evaluate(node.left), _evaluate(node.right)
        return left + right if isinstance(node.op, ast.Add) else left * right
    raise ValueError("not a list expression")


def _vocabulary(given: dict[str, list[str]], read: _Reader, tensor: int) -> int:
    """Rows of the embedding: as given, or padded as training/vocab_utils.py pads a tokenizer's."""
    padded = read("--padded-vocab-size")
    if padded:
        return padded
    size = read("--vocab-size")
    if size is None and not any(option in given for option in _DATA):
        size = _dataset_vocabulary(read("--dataset"))
    if size is None:
        raise UsageError("the vocabulary's size is not known: give --vocab-size or --padded-vocab-size")
    multiple = read("--make-vocab-size-divisible-by") * tensor
    return -(-size // multiple) * multiple


def _dataset_vocabulary(folder: str | None) -> int:
    if folder is None:
        return 256  # the embedded excerpt of enwik8, byte by byte
    try:
        return DatasetMetadata.load(Path(folder)).vocab_size
    except DataError as error:
        raise UsageError(f"--dataset: {error}; or give --vocab-size") from None
