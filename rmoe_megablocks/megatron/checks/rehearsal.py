"""Builds, without ranks, what Megatron builds at the start of a run, so that its refusals come before the run.

Megatron checks much outside ``validate_args``: in the constructors of its schedulers, configurations, calculators and
tokenizers, which every rank calls after torchrun has started it. All of these take milliseconds and need no process
group; a tokenizer takes what loading it takes.
"""

import argparse
import copy
from types import SimpleNamespace

from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.timers import Timers
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.training import training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.models.gpt import default_layer_spec

from rmoe_megablocks.compat.megatron import globals as megatron_globals
from rmoe_megablocks.compat.megatron.errors import in_one_line
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checks.refusals import installed
from rmoe_megablocks.megatron.inputs import batches
from rmoe_megablocks.process import quiet_logging

_TOKENIZER_PACKAGES = {
    "HuggingFaceTokenizer": "transformers",
    "SFTTokenizer": "transformers",
    "TikTokenizer": "tiktoken",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
}


def rehearse(args: argparse.Namespace) -> None:
    """Raises UsageError with the option's name for what Megatron would stop at. ``args`` are validated, and kept."""
    args = copy.copy(args)  # Megatron completes them on the way
    _check_packages(args)
    with megatron_globals.lent(args), in_one_line(args), quiet_logging():
        Timers(args.timing_log_level, args.timing_log_option)
        _check_groups(args)
        _build_batch_sizes(args)
        _build_schedule(args)
        _build_tokenizer(args)
        _build_model_configuration(args)
        _build_data_configuration(args)


def _check_packages(args: argparse.Namespace) -> None:
    """What is imported late, and by the last rank alone (global_vars.py:231)."""
    for wanted, option, module in (
        (args.wandb_project, f"--wandb-project {args.wandb_project}", "wandb"),
        ("--tensorboard-dir" in args.explicit, f"--tensorboard-dir {args.tensorboard_dir}", "tensorboard"),
        (args.enable_ft_package, "--enable-ft-package", "nvidia_resiliency_ext"),
        (args.adlr_autoresume, "--adlr-autoresume", "userlib"),
        (args.hierarchical_context_parallel_sizes, "--hierarchical-context-parallel-sizes", "einops"),
        (args.save_activations_interval, "--save-activations-interval", "transformer_engine"),
        (args.save_dgrads_interval, "--save-dgrads-interval", "transformer_engine"),
        (args.fault_injector_ranks, "--fault-injector-ranks", "nvidia_resiliency_ext"),
        (args.fault_injector_num_ranks is not None, "--fault-injector-num-ranks", "nvidia_resiliency_ext"),
        (args.optimizer not in ("adam", "sgd"), f"--optimizer {args.optimizer}", "emerging_optimizers"),
    ):
        if wanted and not installed(module):
            raise UsageError(f"{option}: the package {module} is not installed; install it, or leave the option out")
    if args.wandb_project and not args.wandb_exp_name:
        raise UsageError(f"--wandb-project {args.wandb_project} needs --wandb-exp-name")
    if args.wandb_project and not (args.wandb_save_dir or args.save):
        raise UsageError(f"--wandb-project {args.wandb_project} without --save needs --wandb-save-dir")


def _check_groups(args: argparse.Namespace) -> None:
    """Sizes that initialize_model_parallel divides by one another (parallel_state.py:322, 847)."""
    instances = args.num_distributed_optimizer_instances
    experts = args.expert_tensor_parallel_size * args.expert_model_parallel_size * args.pipeline_model_parallel_size
    for ranks in (args.data_parallel_size * args.context_parallel_size, args.world_size // experts):
        if ranks % instances:
            raise UsageError(
                f"--num-distributed-optimizer-instances {instances} does not divide {ranks} data-parallel ranks"
            )


def _build_batch_sizes(args: argparse.Namespace) -> None:
    ranks = args.data_parallel_size * args.gtp_weight_remat_size
    with in_one_line(args, f"--step-batch-size-schedule {args.step_batch_size_schedule}"):
        num_microbatches_calculator.init_num_microbatches_calculator(
            rank=-1,  # rank 0 logs
            global_batch_size=args.global_batch_size,
            micro_batch_size=args.micro_batch_size,
            data_parallel_size=ranks,
            decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
            step_batch_size_schedule=args.step_batch_size_schedule,
            seq_length=args.seq_length,
        )
        num_microbatches_calculator.update_num_microbatches(0)
    for samples, size in megatron_globals.batch_size_schedule():
        if size % (args.micro_batch_size * ranks):  # Megatron looks when the run gets there
            raise UsageError(
                f"--step-batch-size-schedule {args.step_batch_size_schedule}: {size} from sample {samples} on is no "
                f"multiple of --micro-batch-size {args.micro_batch_size} x {ranks} data-parallel ranks"
            )


def _build_schedule(args: argparse.Namespace) -> None:
    """Learning rate and weight decay, asked for at the beginning, in the middle and at the end."""
    if args.skip_train:
        return
    group = {"lr": 0.0, "weight_decay": 0.0, "default_config": True}
    scheduler = training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[group]))
    half = max(1, int(scheduler.lr_decay_steps) // 2)
    for increment in (1, half, half, 1):
        scheduler.step(increment)
    training.get_megatron_optimizer_config(args)


def _build_tokenizer(args: argparse.Namespace) -> None:
    kind = args.tokenizer_type
    if kind is None:
        raise UsageError("no --tokenizer-type: name the data's (NullTokenizer with --vocab-size where there is none)")
    if kind == "NullTokenizer" and not args.vocab_size:
        raise UsageError("--tokenizer-type NullTokenizer needs --vocab-size, which counts the data's token ids")
    about = f"--tokenizer-type {kind}, " + (
        f"--tokenizer-model {args.tokenizer_model}" if args.tokenizer_model else "no --tokenizer-model"
    )
    module = _TOKENIZER_PACKAGES.get(kind)
    if module and not installed(module):
        raise UsageError(f"--tokenizer-type {kind}: the package {module} is not installed; install it")
    try:
        with in_one_line(args, about):
            tokenizer = build_tokenizer(args)
    except (OSError, RuntimeError, TypeError) as error:  # no such file, or no model of that kind
        raise UsageError(f"{about}: {' '.join(str(error).split())[:200]}") from error
    megatron_globals.set_tokenizer(tokenizer)
    if args.padded_vocab_size is not None and args.padded_vocab_size < tokenizer.vocab_size:
        raise UsageError(
            f"--padded-vocab-size {args.padded_vocab_size} is below the vocabulary of {tokenizer.vocab_size}"
        )


def _build_model_configuration(args: argparse.Namespace) -> None:
    """All configurations of a run, and the specifications of every stage's layers."""
    model_config = gpt_config_from_args(args)
    model_config.finalize()
    pretrain_cfg_container_from_args(args, model_config)
    if model_config.transformer_layer_spec is not None:  # --spec
        return
    with in_one_line(args, f"--moe-layer-freq {args.moe_layer_freq}"):
        held = []
        for stage in range(args.pipeline_model_parallel_size):
            parallel_state.set_pipeline_model_parallel_rank(stage)
            for virtual in range(args.virtual_pipeline_model_parallel_size or 1):
                vp_stage = virtual if args.virtual_pipeline_model_parallel_size else None
                held.append(get_num_layers_to_build(model_config.transformer, vp_stage))
                default_layer_spec(model_config, vp_stage)
    parallel_state.set_pipeline_model_parallel_rank(0)
    if min(held) < 0 or sum(held) != args.num_layers:
        raise UsageError(
            f"--num-layers {args.num_layers}: the pipeline's stages would hold {', '.join(map(str, held))} of them; "
            "change --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers, or the layout"
        )


def _build_data_configuration(args: argparse.Namespace) -> None:
    args.iteration = 0
    training.get_train_valid_test_num_samples()
    batches.dataset_config(args)
