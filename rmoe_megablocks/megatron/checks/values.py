"""Values that Megatron's parser takes and its code cannot use: refused in one line that names the option.

Without these checks they become divisions by zero, assertions without a word or NaNs, late and on every rank. What
:mod:`.rehearsal` finds by building the thing itself is not repeated here.
"""

import argparse
import itertools
import math
from collections.abc import Iterator

from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.compat.megatron.options import spelling
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checks import attention, companions, optimizer, routing
from rmoe_megablocks.megatron.null_experts import options as null_experts

# Below zero is either an error or, for these, a meaning of its own
_MAY_BE_NEGATIVE = {
    "activation_offload_fraction",
    "delta_offload_bytes_across_pp_ranks",
    "fault_injector_offset_seconds",
    "glu_linear_offset",
    "inference_batch_times_seqlen_threshold",
    "inference_dynamic_batching_num_cuda_graphs",
    "moe_expert_capacity_factor",
    "moe_paged_stash_buffer_size_factor_cpu",
    "moe_paged_stash_buffer_size_factor_cuda",
    "moe_router_force_biased",
    "null_tokenizer_eod_id",
    "null_tokenizer_pad_id",
    "rl_default_top_k",
}
# Zero is either "off" or, for these, an error; the text says what to do instead
_AT_LEAST_ONE = {
    "check_weight_hash_across_dp_replicas_interval": "leave it out for no check",
    "context_parallel_size": "",
    "ddp_num_buckets": "leave it out to let Megatron choose",
    "dist_ckpt_workers": "",
    "distributed_timeout_minutes": "",
    "distributed_timeout_seconds_after_init": "leave it out to keep --distributed-timeout-minutes",
    "eval_global_batch_size": "",
    "eval_interval": "to leave evaluation out use --eval-iters 0",
    "eval_micro_batch_size": "",
    "exit_duration_in_mins": "leave it out to train to the end",
    "exit_interval": "leave it out to train to the end",
    "expert_model_parallel_size": "",
    "expert_tensor_parallel_size": "",
    "ffn_hidden_size": "",
    "global_batch_size": "",
    "hysteresis": "",
    "hidden_size": "",
    "kv_channels": "",
    "log_interval": "for few lines use a large one",
    "log_memory_interval": "leave it out to log none",
    "lr_decay_iters": "leave it out for a decay over the whole run",
    "lr_decay_samples": "leave it out for a decay over the whole run",
    "make_vocab_size_divisible_by": "",
    "max_position_embeddings": "",
    "micro_batch_size": "",
    "moe_ffn_hidden_size": "",
    "moe_layer_freq": "1 makes every layer one with experts; for a model without leave --num-experts out",
    "moe_router_group_topk": "leave it out for routing without groups",
    "moe_router_num_groups": "leave it out for routing without groups",
    "moe_router_topk": "every token needs an expert",
    "moe_shared_expert_intermediate_size": "leave it out for no shared experts",
    "non_persistent_save_interval": "leave it out to save none",
    "num_attention_heads": "",
    "num_dataset_builder_threads": "",
    "num_distributed_optimizer_instances": "",
    "num_layers": "",
    "num_layers_per_virtual_pipeline_stage": "leave it out for no virtual stages",
    "num_query_groups": "",
    "num_virtual_stages_per_pipeline_rank": "leave it out for no virtual stages",
    "pipeline_model_parallel_size": "",
    "recompute_num_layers": "leave it out for no recompute",
    "rotary_base": "",
    "save_interval": "to save nothing use --no-checkpoints",
    "save_retain_interval": "leave it out to keep every checkpoint",
    "seed": "Megatron's seeds start there",
    "tensor_model_parallel_size": "",
    "tensorboard_log_interval": "",
    "tensorboard_queue_size": "",
    "train_iters": "to evaluate only, use --skip-train",
    "train_samples": "to evaluate only, use --skip-train",
    "vocab_size": "",
}
for _kind in ("activations", "dgrads", "params", "tokens_per_expert", "wgrads"):
    _AT_LEAST_ONE[f"save_{_kind}_interval"] = "leave it out to save none"
# Zero is either "off" or, for these, weights that are all 0, divisions by 0, or taken for no value at all
_POSITIVE = {
    "adam_eps": "an expert without a token would be updated by 0 / 0",
    "initial_loss_scale": "",
    "init_method_std": "a model of zeros cannot train",
    "loss_scale": "leave it out for a dynamic one",
    "loss_scale_window": "",
    "moe_input_jitter_eps": "leave it out",
    "moe_router_topk_scaling_factor": "leave it out for no scaling",
    "rope_scaling_factor": "leave --use-rope-scaling out for no scaling",
    "rotary_seq_len_interpolation_factor": "leave it out",
}
# Far beyond any machine: Megatron would fill its memory, or count to it, without a sign of life
_AT_MOST = {
    "num_layers": 10_000,
    "mtp_num_layers": 1_000,
    "num_experts": 1_000_000,
    "num_workers": 10_000,
    "distributed_timeout_minutes": 1_000_000,
}
_BELOW_ONE = ("adam_beta1", "adam_beta2", "lr_warmup_fraction", "hidden_dropout", "attention_dropout")
_AT_MOST_ONE = ("rotary_percent", "activation_offload_fraction", "optimizer_offload_fraction", "sample_rate")
_REQUIRED = {
    "num_layers": "the number of layers",
    "hidden_size": "the width of the model",
    "num_attention_heads": "the number of attention heads",
    "seq_length": "the number of tokens in a sequence",
    "max_position_embeddings": "the number of positions, at least --seq-length",
    "micro_batch_size": "the number of sequences in a micro-batch",
}


def check_numbers(args: argparse.Namespace) -> None:
    """Refuses numbers that are none, below zero or zero where that means nothing. Raises UsageError."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check(args, name, number)


def _check(args: argparse.Namespace, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise _error(name, value, "not a finite number")
    if name in _AT_LEAST_ONE and value < 1 and not isinstance(getattr(args, name), list):
        raise _error(name, value, "must be at least 1", _AT_LEAST_ONE[name])
    if value < 0 and name not in _MAY_BE_NEGATIVE and name in spelling():
        raise _error(name, value, "must not be negative")
    if name in _POSITIVE and value == 0:
        raise _error(name, value, "must be above zero", _POSITIVE[name])
    if name in _AT_MOST and value > _AT_MOST[name]:
        raise _error(name, value, f"must be at most {_AT_MOST[name]}")
    if name == "seq_length" and value < 2:  # Megatron's samples never end with one
        raise _error(name, value, "must be at least 2")
    if name in _BELOW_ONE and value >= 1:
        raise _error(name, value, "must be below 1")
    if name in _AT_MOST_ONE and value > 1:
        raise _error(name, value, "must be at most 1")
    if name == "seed" and value > _largest_seed(args):
        raise _error(name, value, f"must be at most {_largest_seed(args)} for NumPy, which gets it too")


def _largest_seed(args: argparse.Namespace) -> int:
    """A stage's seed is the seed plus 100 times its rank (initialize.py:439)."""
    return 2**32 - 1 - 100 * (args.pipeline_model_parallel_size - 1)


def _error(name: str, value: float, reason: str, instead: str = "") -> UsageError:
    return UsageError(f"{spelling().get(name, name)} {value}: {reason}" + (f"; {instead}" if instead else ""))


def check_together(args: argparse.Namespace) -> None:
    """Refuses what is missing, and values that do not go together. Raises UsageError."""
    for name, meaning in _REQUIRED.items():
        if getattr(args, name) is None:
            raise UsageError(f"no {spelling()[name]}: name {meaning}")
    companions.check(args)
    found = (_contradictions, *(part.contradictions for part in (optimizer, attention, routing)))
    for refused, text in itertools.chain.from_iterable(contradictions(args) for contradictions in found):
        if refused:
            raise UsageError(text)


def _contradictions(args: argparse.Namespace) -> Iterator[tuple[object, str]]:
    trains = not args.skip_train
    yield (
        not (args.train_iters or args.train_samples),
        "no --train-iters: name the number of iterations (or --train-samples)",
    )
    yield trains and args.lr is None, "no --lr: the optimizer needs a learning rate"
    yield (
        trains and args.lr is not None and args.min_lr > args.lr,
        f"--lr {args.lr} is below --min-lr {args.min_lr}, where it decays to: lower --min-lr as well",
    )
    yield args.fp16 and args.bf16, "--fp16 and --bf16 are two precisions: keep one"
    wsd = args.lr_wsd_decay_samples if args.train_samples else args.lr_wsd_decay_iters
    option = "--lr-wsd-decay-samples" if args.train_samples else "--lr-wsd-decay-iters"
    yield (
        trains and args.lr_decay_style == "WSD" and not wsd,
        f"--lr-decay-style WSD needs {option}: how long the decay at the end takes",
    )
    decay = args.lr_decay_iters or args.train_iters
    yield (
        args.lr_warmup_iters and decay and args.lr_warmup_iters >= decay,
        f"--lr-warmup-iters {args.lr_warmup_iters} must be below --lr-decay-iters or --train-iters ({decay}); "
        "use --lr-warmup-fraction for runs of any length",
    )
    yield (
        args.num_experts and args.moe_router_topk > null_experts.logits(args),
        f"--moe-router-topk {args.moe_router_topk}: there are only {null_experts.named(args)} to choose from",
    )
    saved = [f"--save-{kind}-interval" for kind in ("activations", "dgrads", "params", "tokens-per-expert", "wgrads")]
    saved = [option for option in saved if getattr(args, option.removeprefix("--").replace("-", "_"))]
    yield saved and args.save is None, f"{' and '.join(saved)} without checkpoints: set --save, where it would go"
    yield (
        args.moe_enable_routing_replay,
        "--moe-enable-routing-replay: nothing in this entry records routing or replays it; leave it out",
    )
    if megatron_cpu.active():
        yield args.gpu_sniff_test_interval is not None, "--gpu-sniff-test-interval: there is no GPU"
        yield args.record_memory_history, "--record-memory-history: there is no GPU"
        yield args.use_sharp, "--use-sharp: there is no GPU, and so no NCCL"
        yield args.log_energy, "--log-energy: there is no GPU, whose energy it measures"
        yield args.optimizer_cpu_offload, "--optimizer-cpu-offload: there is no GPU"
        yield (
            args.profile and not args.use_pytorch_profiler,
            "--profile: there is no GPU for Nsight Systems; add --use-pytorch-profiler",
        )
    yield (
        args.profile and args.profile_step_start >= args.profile_step_end,
        f"--profile-step-start {args.profile_step_start} must be below --profile-step-end {args.profile_step_end}",
    )
    yield (
        args.rerun_mode == "report_stats",
        "--rerun-mode report_stats: Megatron-Core 0.19 does not know its own name for it; use validate_results",
    )
    kinds = set(args.cp_comm_type) - {"p2p", "all_gather", "a2a", "a2a+p2p"}
    yield kinds, f"--cp-comm-type {' '.join(args.cp_comm_type)}: choose from p2p, all_gather, a2a, a2a+p2p"
    yield from _stages(args)
    yield args.sharp_enabled_group and not args.use_sharp, "--sharp-enabled-group needs --use-sharp"
    yield args.lazy_mpu_init, "--lazy-mpu-init: this entry sets up the process groups at once; leave it out"
    yield (
        args.config_logger_dir,
        "--config-logger-dir: Megatron cannot write configurations that hold process groups; leave it out, the run's "
        "folder has config.yaml and arguments.json",
    )
    yield (
        args.moe_apply_probs_on_input and args.num_experts and args.moe_router_topk != 1,
        f"--moe-apply-probs-on-input needs --moe-router-topk 1, not {args.moe_router_topk}",
    )
    pattern = args.moe_layer_freq
    if args.num_experts and isinstance(pattern, list):
        yield not any(pattern), "--moe-layer-freq: no layer has experts; for a model without leave --num-experts out"
        yield (
            set(pattern) - {0, 1},
            f"--moe-layer-freq {pattern}: a layer is 1 (with experts) or 0 (without)",
        )
        yield (
            len(pattern) != args.num_layers,
            f"--moe-layer-freq names {len(pattern)} layers, --num-layers {args.num_layers}: they must be as many",
        )
    yield (
        args.phase_transition_iterations and not args.train_samples,
        "--phase-transition-iterations needs --train-samples in the place of --train-iters",
    )


def _stages(args: argparse.Namespace) -> Iterator[tuple[object, str]]:
    """Those of several stages :mod:`.rehearsal` counts."""
    for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
        held = getattr(args, name)
        yield (
            args.pipeline_model_parallel_size == 1 and held not in (None, args.num_layers),
            f"{spelling()[name]} {held}: the one pipeline stage holds --num-layers {args.num_layers}",
        )
