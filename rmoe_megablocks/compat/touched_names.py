"""Every name inside Megatron that this package replaces, overrides or calls although it is not meant for it.

What is merely imported is not listed: :mod:`.self_check` reads that from this package's own sources.
"""

from __future__ import annotations

from typing import NamedTuple


class Touched(NamedTuple):
    """A name that must be there.

    Attributes:
        name: "module:name" or "module:Class.name".
        reason: what it is touched for, to follow "which rmoe_megablocks needs to".
        parameters: those that a function must have by these names.
    """

    name: str
    reason: str
    parameters: tuple[str, ...] = ()


_STATE = "carry the routing state through a layer"
_STAGES = "send the routing state with the hidden states"
_EXPERTS = "put MegaBlocks' experts in"
_CHECKPOINTS = "keep checkpoints whole"
_CPU = "run without a GPU"
_ADAM = "use an Adam whose state can be resumed without a GPU"

TOUCHED: tuple[Touched, ...] = (
    # recurrence/: overridden, or called by upstream under this name
    Touched("megatron.core.transformer.moe.router:Router.gating", "compute router logits from the recurrence"),
    Touched("megatron.core.transformer.moe.router:Router.reset_parameters", "leave the gate matrix out"),
    Touched(
        "megatron.core.transformer.moe.moe_layer:MoELayer.forward",
        "recompute with the state",
        ("hidden_states", "intermediate_tensors", "padding_mask"),
    ),
    Touched("megatron.core.transformer.transformer_layer:TransformerLayer.forward", _STATE),
    Touched("megatron.core.transformer.transformer_layer:TransformerLayer._forward_mlp", _STATE),
    Touched(
        "megatron.core.transformer.transformer_layer:TransformerLayer._maybe_unflatten_for_moe",
        "give packed micro-batches' state its batch dimension",
        ("hidden_states", "padding_mask", "packed_seq_params"),
    ),
    Touched(
        "megatron.core.transformer.transformer_layer:TransformerLayer._maybe_reflatten_from_moe",
        "take it away again",
        ("output", "packed_seq_params"),
    ),
    Touched("megatron.core.pipeline_parallel.schedules:P2PCommunicator", _STAGES),
    Touched(
        "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate", _STAGES, ("tensor_shape",)
    ),
    Touched("megatron.training.models.gpt:mtp_block_spec", "put the router into multi-token prediction"),
    Touched(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._compute_per_buffer_param_layout",
        "tell whether the shared recurrence fits the optimizer's checkpoint",
    ),
    # experts/: the steps that upstream's forward calls one after another
    Touched("megatron.core.transformer.moe.moe_layer:MoELayer.preprocess", _EXPERTS),
    Touched("megatron.core.transformer.moe.moe_layer:MoELayer.dispatch", _EXPERTS),
    Touched("megatron.core.transformer.moe.moe_layer:MoELayer.routed_experts_compute", _EXPERTS),
    Touched("megatron.core.transformer.moe.moe_layer:MoELayer.combine", _EXPERTS),
    Touched("megatron.core.transformer.moe.moe_layer:MoELayer.postprocess", _EXPERTS),
    # megatron/hooks.py and megatron/script_hooks.py
    Touched(
        "megatron.core.transformer.moe.moe_layer:MoEAlltoAllTokenDispatcher",
        "send a token to fewer experts than top-k",
    ),
    Touched(
        "megatron.training.training:num_floating_point_operations", "count the experts that tokens have", ("args",)
    ),
    Touched(
        "megatron.training.training:training_log",
        "report each iteration",
        ("loss_dict", "learning_rate", "iteration", "skipped_iter", "grad_norm"),
    ),
    Touched(
        "megatron.training.training:evaluate_and_print_results",
        "report each evaluation",
        ("prefix", "iteration", "write_to_tensorboard"),
    ),
    Touched("megatron.training.training:evaluate", "report each evaluation, and to evaluate exactly", ("eval_iters",)),
    Touched(
        "megatron.training.arguments:parse_args",
        "add its arguments to a script's",
        ("extra_args_provider", "ignore_unknown_args"),
    ),
    Touched("megatron.training.argument_utils:gpt_config_from_args", "put the router into a script's model", ("args",)),
    Touched("megatron.training.training:pretrain", "check a script's model before it trains"),
    Touched("megatron.training:pretrain", "check a script's model before it trains"),
    Touched("megatron.training.global_vars:_GLOBAL_TOKENIZER", "try the tokenizer before the ranks start"),
    # megatron/schedule.py
    Touched("megatron.training.training:load_checkpoint", "extend the schedule of a run that resumes"),
    Touched("megatron.training.training:get_args", "read a schedule before the ranks start"),
    # megatron/checkpoints.py
    Touched("megatron.training.training:save_checkpoint", _CHECKPOINTS),
    Touched("megatron.core.dist_checkpointing.serialization:save_integrity_manifest", _CHECKPOINTS),
    Touched("megatron.core.dist_checkpointing.serialization:verify_integrity_manifest", _CHECKPOINTS),
    Touched("megatron.core.dist_checkpointing.validation:INTEGRITY_FNAME", _CHECKPOINTS),
    Touched("megatron.core.dist_checkpointing.validation:json", _CHECKPOINTS),
    Touched("megatron.core.dist_checkpointing.validation:verify_integrity_manifest", _CHECKPOINTS),
    Touched("megatron.training.checkpointing:read_metadata", "load what --ckpt-step names"),
    Touched("megatron.training.checkpointing:maybe_msc", _CHECKPOINTS),
    Touched("megatron.training.checkpointing:schedule_async_save", "end checkpoint writers with their rank"),
    Touched(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
        "end checkpoint writers with their rank",
    ),
    Touched(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",
        "end checkpoint writers with their rank",
    ),
    Touched(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.write_preloaded_data",
        "tell what kept a checkpoint from being written",
        ("transform_list", "write_bucket", "results_queue"),
    ),
    Touched(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:"
        "FileSystemWriterAsync.write_preloaded_data_multithread",
        "tell what kept a checkpoint from being written",
        ("transform_list", "use_msc", "rank", "write_buckets", "global_results_queue"),
    ),
    Touched(
        "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller._get_process",
        "end checkpoint writers with their rank",
    ),
    Touched(
        "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller.async_loop",
        "end checkpoint writers with their rank",
    ),
    Touched("megatron.core.datasets.gpt_dataset:numpy", "write the datasets' indices whole"),
    Touched(
        "megatron.core.datasets.gpt_dataset:GPTDataset._query_document_sample_shuffle_indices",
        "leave prompts out of the loss",
        ("idx",),
    ),
    Touched("megatron.core.datasets.blended_dataset:numpy", "write the datasets' indices whole"),
    # megatron/loaders.py
    Touched(
        "megatron.training.datasets.data_samplers:DistributedSignalHandler",
        "end the data loaders' workers with their rank",
    ),
    # megatron_cpu/
    Touched("megatron.core.optimizer:Adam", _ADAM),
    Touched("megatron.core.optimizer:USING_PYTORCH_OPTIMIZER", _ADAM),
    Touched("megatron.core.optimizer.distrib_optimizer:Adam", _ADAM),
    Touched("megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE", _ADAM),
    Touched("megatron.core.optimizer.distrib_optimizer:USING_APEX_OPTIMIZER", _ADAM),
    Touched("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict", _CPU),
    Touched("megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__", _CPU, ("config",)),
    Touched(
        "megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
        _CPU,
        ("tensor", "as_numpy", "record_stream"),
    ),
    Touched("megatron.core.datasets.utils:compile_helpers", "find the datasets' compiled helper"),
    Touched(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.preload_tensors",
        _CPU,
        ("write_buckets", "non_blocking"),
    ),
    Touched("megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__", _CPU, ("fp8",)),
    Touched("megatron.core.transformer.dot_product_attention:DotProductAttention.forward", _CPU),
)
