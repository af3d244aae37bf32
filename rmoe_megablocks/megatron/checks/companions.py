"""Options that do nothing without another one: refused by name where that one is missing.

Megatron takes them and never looks at them: ``--num-query-groups 2`` without ``--group-query-attention`` trains plain
multi-head attention, ``--moe-router-bias-update-rate`` without ``--moe-router-enable-expert-bias`` no bias. A value
that is Megatron's default asks for nothing, and passes. What nothing reads at all: compat/megatron/dead_arguments.py.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable

from rmoe_megablocks.compat.megatron.options import actions
from rmoe_megablocks.errors import UsageError

_ROTARY = ("rope", "yarn", "mrope")


@dataclasses.dataclass(frozen=True)
class Need:
    """What ``options`` need to do anything: in words, and whether the arguments have it.

    ``options`` are separated by blanks; one that ends in * stands for all that begin so, except what ``missing`` names.
    """

    missing: str
    met: Callable[[argparse.Namespace], object]
    options: str


def _position(*kinds: str) -> Callable[[argparse.Namespace], bool]:
    return lambda args: args.use_rotary_position_embeddings and "rope" in kinds or args.position_embedding_type in kinds


def _variant(name: str) -> Callable[[argparse.Namespace], bool]:
    return lambda args: args.experimental_attention_variant == name


def _has(name: str) -> Callable[[argparse.Namespace], bool]:
    """Whether an argument has a value: 0 is one for numbers, as --mtp-num-layers 0 is none of them."""
    return lambda args: bool(getattr(args, name))


def _kinds(args: argparse.Namespace) -> list[str]:
    """The balancing types; Megatron makes a list of one a word while it validates."""
    kinds = args.moe_router_load_balancing_type
    return [kinds] if isinstance(kinds, str) else kinds


def _tokenizer(*words: str) -> Callable[[argparse.Namespace], bool]:
    return lambda args: any(word in (args.tokenizer_type or "") for word in words)


def _recomputes_modules(args: argparse.Namespace) -> bool:
    return args.recompute_granularity == "selective" or args.recompute_activations or args.moe_layer_recompute


_EXPERTS = Need("--num-experts", _has("num_experts"), "--moe-*")
_NEEDS = (
    # the model
    Need("--group-query-attention", _has("group_query_attention"), "--num-query-groups"),
    Need("--multi-latent-attention", _has("multi_latent_attention"),
         "--q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim --rope-type "
         "--cache-mla-latents --mla-down-proj-fusion"),
    Need("--position-embedding-type yarn", lambda args: _position("yarn")(args) or args.multi_latent_attention,
         "--rotary-scaling-factor --mscale --mscale-all-dim --yarn-* --no-yarn-*"),
    Need("--mtp-num-layers", _has("mtp_num_layers"), "--mtp-loss-scaling-factor --mtp-detach-heads"),
    Need("--qk-clip", _has("qk_clip"), "--qk-clip-alpha --qk-clip-threshold"),
    Need("--window-size", lambda args: args.window_size is not None, "--window-attn-skip-freq"),
    Need("--experimental-attention-variant dsa", _variant("dsa"), "--dsa-* --no-dsa-*"),
    Need("--experimental-attention-variant gated_delta_net", _variant("gated_delta_net"), "--linear-*"),
    Need("--use-mup", _has("use_mup"), "--mup-*"),
    Need("--use-kitchen-attention", _has("use_kitchen_attention"), "--kitchen-attention-backend"),
    Need("--position-embedding-type mrope", _position("mrope"), "--mrope-section"),
    Need("--position-embedding-type relative", _position("relative"), "--relative-attention-*"),
    Need("--position-embedding-type rope", _position(*_ROTARY),
         "--rotary-base --rotary-percent --rotary-interleaved --rotary-seq-len-interpolation-factor --use-rope-scaling "
         "--no-rope-freq"),
    Need("--use-rope-scaling", _has("use_rope_scaling"), "--rope-scaling-factor"),
    Need("--swiglu or --quick-geglu", lambda args: args.swiglu or args.quick_geglu,
         "--activation-func-clamp-value --glu-linear-offset"),
    # experts and their router
    Need("--moe-shared-expert-intermediate-size", _has("moe_shared_expert_intermediate_size"),
         "--moe-shared-expert-* --use-grouped-gemm-for-shared-expert"),
    Need("--moe-router-group-topk", _has("moe_router_group_topk"), "--moe-router-num-groups"),
    Need("--moe-router-enable-expert-bias", _has("moe_router_enable_expert_bias"), "--moe-router-bias-update-rate"),
    Need("--moe-router-load-balancing-type quantile_balancing", lambda args: "quantile_balancing" in _kinds(args),
         "--moe-router-quantile-balancing-ema"),
    Need("--moe-expert-capacity-factor", lambda args: args.moe_expert_capacity_factor is not None,
         "--moe-token-drop-policy"),
    Need("--moe-token-dispatcher-type flex", lambda args: args.moe_token_dispatcher_type == "flex",
         "--moe-flex-dispatcher-* --moe-deepep-* --moe-hybridep-* --moe-ncclep-* --moe-permute-fusion-into-hybridep"),
    Need("--moe-grouped-gemm", _has("moe_grouped_gemm"), "--moe-mlp-glu-interleave-size"),
    Need("--moe-paged-stash", _has("moe_paged_stash"), "--moe-paged-stash-*"),
    Need("--moe-use-upcycling", _has("moe_use_upcycling"), "--moe-upcycling-granularity"),
    Need("--moe-routing-trace-path", _has("moe_routing_trace_path"), "--moe-routing-trace-*"),
    # precision
    Need("--fp8-format", _has("fp8"), "--fp8-* --no-fp8-wgrad --first-last-layers-bf16"),
    Need("--first-last-layers-bf16", _has("first_last_layers_bf16"),
         "--num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16"),
    Need("--fp4-format", _has("fp4"), "--fp4-*"),
    Need("--fp16", _has("fp16"), "--initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis"),
    Need("--fp16 or --bf16", lambda args: args.fp16 or args.bf16, "--loss-scale"),
    Need("--bf16", _has("bf16"), "--grad-reduce-in-bf16 --disable-bf16-reduced-precision-matmul"),
    # memory
    Need("--recompute-granularity full", lambda args: args.recompute_granularity == "full",
         "--recompute-method --recompute-num-layers"),
    Need("--recompute-granularity selective", _recomputes_modules, "--recompute-modules"),
    Need("--fine-grained-activation-offloading", _has("fine_grained_activation_offloading"),
         "--offload-modules --min-offloaded-tensor-size --delta-offload-bytes-across-pp-ranks "
         "--activation-offload-fraction --fine-grained-offloading-* --delay-offload-until-cuda-graph"),
    Need("--cpu-offloading-num-layers", _has("cpu_offloading_num_layers"), "--cpu-offloading-*"),
    Need("--optimizer-cpu-offload", _has("optimizer_cpu_offload"),
         "--optimizer-offload-fraction --use-torch-optimizer-for-cpu-offload --overlap-cpu-optimizer-d2h-h2d "
         "--no-pin-cpu-grads --no-pin-cpu-params"),
    # layout and schedule
    Need("--num-virtual-stages-per-pipeline-rank", lambda args: args.num_virtual_stages_per_pipeline_rank
         or args.num_layers_per_virtual_pipeline_stage or args.pipeline_model_parallel_layout,
         "--microbatch-group-size-per-virtual-pipeline-stage"),
    Need("--defer-embedding-wgrad-compute", _has("defer_embedding_wgrad_compute"), "--wgrad-deferral-limit"),
    Need("--context-parallel-size", lambda args: args.context_parallel_size > 1, "--cp-comm-type"),
    Need("--overlap-grad-reduce", _has("overlap_grad_reduce"), "--ddp-bucket-size --ddp-num-buckets"),
    Need("--use-megatron-fsdp", _has("use_megatron_fsdp"),
         "--megatron-fsdp-* --fsdp-* --suggested-communication-unit-size"),
    Need("--cross-entropy-loss-fusion", _has("cross_entropy_loss_fusion"), "--cross-entropy-fusion-impl"),
    Need("--cuda-graph-impl", lambda args: args.cuda_graph_impl != "none" or args.enable_cuda_graph
         or args.external_cuda_graph, "--cuda-graph-*"),
    # optimizer
    Need("--weight-decay-incr-style constant", lambda args: args.weight_decay_incr_style == "constant"
         or args.start_weight_decay is None, "--weight-decay"),
    Need("--optimizer adam", lambda args: args.optimizer != "sgd", "--adam-*"),
    Need("--optimizer sgd", lambda args: args.optimizer == "sgd", "--sgd-momentum"),
    Need("--optimizer muon", lambda args: "muon" in args.optimizer, "--muon-*"),
    Need("--optimizer lion", lambda args: "lion" in (args.optimizer, args.muon_scalar_optimizer), "--lion-*"),
    Need("--decoupled-lr", lambda args: args.decoupled_lr is not None, "--decoupled-min-lr"),
    Need("--lr-decay-style WSD", lambda args: args.lr_decay_style == "WSD", "--lr-wsd-*"),
    Need("--lr-warmup-fraction", lambda args: args.lr_warmup_fraction or args.lr_warmup_iters
         or args.lr_warmup_samples, "--lr-warmup-init"),
    # data
    Need("--multiple-validation-sets", _has("multiple_validation_sets"), "--validation-set-names"),
    Need("--tokenizer-type TikTokenizer", _tokenizer("TikTokenizer"), "--tiktoken-*"),
    Need("--tokenizer-type NullTokenizer", _tokenizer("Null"), "--null-tokenizer-*"),
    Need("--tokenizer-type SentencePieceTokenizer", _tokenizer("SentencePiece", "Llama2"),
         "--tokenizer-sentencepiece-* --no-tokenizer-sentencepiece-*"),
    Need("--tokenizer-type HuggingFaceTokenizer", _tokenizer("HuggingFace", "SFT", "Multimodal"),
         "--tokenizer-hf-* --trust-remote-code"),
    Need("a --tokenizer-type that reads one, as GPT2BPETokenizer", lambda args: not _tokenizer("Null")(args),
         "--tokenizer-model --vocab-file --merge-file --tokenizer-special-tokens --tokenizer-metadata"),
    # what is told, and saved
    Need("--profile", _has("profile"), "--profile-* --use-pytorch-profiler --nvtx-ranges"),
    Need("--use-pytorch-profiler", _has("use_pytorch_profiler"), "--pytorch-profiler-* --record-shapes"),
    Need("--manual-gc", _has("manual_gc"), "--manual-gc-interval --no-manual-gc-eval"),
    Need("--wandb-project", _has("wandb_project"), "--wandb-*"),
    Need("--error-injection-rate", _has("error_injection_rate"), "--error-injection-type"),
    Need("--async-save", _has("async_save"), "--async-strategy --async-ckpt-*"),
    Need("--load, the checkpoints' folder", lambda args: args.load or args.pretrained_checkpoint,
         "--ckpt-step --override-ckpt-iteration --no-initialization"),
    Need("--replication", _has("replication"), "--replication-*"),
    Need("--logits-save-dir", _has("logits_save_dir"), "--logits-save-*"),
    Need("--enable-ft-package", _has("enable_ft_package"), "--ft-* --calc-ft-timeouts"),
    Need("--fault-injector-num-ranks or --fault-injector-ranks",
         lambda args: args.fault_injector_num_ranks is not None or args.fault_injector_ranks, "--fault-injector-*"),
    Need("--adlr-autoresume", _has("adlr_autoresume"), "--adlr-autoresume-interval"),
)  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Refuses the options that the user named and that do nothing, those of one kind at once. Raises UsageError.

    Args:
        args: parsed, with ``explicit``, and not yet validated: Megatron deletes some and completes others.
    """
    idle: dict[Need, list[str]] = {}
    for option in sorted(args.explicit & actions().keys()):
        action = actions()[option]
        is_default = getattr(args, action.dest, None) in (action.default, [action.default])  # a list of one word
        need = None if is_default else _unmet(option, args)
        if need is not None:
            idle.setdefault(need, []).append(option)
    for need, options in idle.items():
        does, it = ("does", "it") if len(options) == 1 else ("do", "them")
        raise UsageError(f"{' and '.join(options)} {does} nothing without {need.missing}: add that, or take {it} back")


def _unmet(option: str, args: argparse.Namespace) -> Need | None:
    if option.startswith("--moe-") and not _EXPERTS.met(args):
        return _EXPERTS
    need = _need_of(option)
    return None if need is None or need.met(args) else need


@functools.cache
def _need_of(option: str) -> Need | None:
    for need in _NEEDS:
        patterns = need.options.split()
        begins = tuple(pattern[:-1] for pattern in patterns if pattern.endswith("*"))
        if option in patterns or (begins and option.startswith(begins) and option not in need.missing.split()):
            return need
    return None
