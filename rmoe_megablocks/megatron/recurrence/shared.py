"""The recurrence that every MoE layer on every pipeline stage uses, kept one and the same everywhere."""

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import pad_param_start
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor

from rmoe_megablocks.megatron.recurrence.stage_boundary import state_dtype
from rmoe_megablocks.routing import RouterLayer, RouterType, RoutingConfig, get_router_type


class SharedRecurrence(MegatronModule):
    """One copy a pipeline rank, registered on its first model chunk.

    What keeps the copies identical: the same seed at the start (:meth:`__init__`), gradients summed over stages
    (``pipeline_parallel`` together with ``config.has_cond_embedder``, finalize_model_grads.py), one copy counted in
    the gradient norm (``shared``), and gradient buckets of its own: the sum over stages runs after the data-parallel
    reduce-scatter, so its shards must line up on all stages. Buckets are filled from the last registered parameter
    to the first, and ``shared_embedding`` ends one before and after its parameter (distrib_optimizer.py:531): as the
    last submodule of the chunk, with it on our first parameter, we fill the buffer's first two buckets alone.

    In a bf16 or fp16 model its gradients bypass the parameters' dtype on their way to Megatron's fp32 gradient
    buffer. Autograd would sum the contributions of all layers in bf16, and stages would disagree with one process.
    """

    def __init__(self, config, pg_collection: ProcessGroupCollection, seed: int) -> None:
        super().__init__(config)
        self.pg_collection = pg_collection
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # Megatron seeds stages differently, these copies must start alike
            self.cell = get_router_type(config.moe_router_type).build_shared(config.routing)
        self.cell.set_cast(_GradientInBuffer.apply)
        for parameter in self.parameters():
            parameter.pipeline_parallel = True
            parameter.shared = pg_collection.pp.rank() != 0
            parameter.sequence_parallel = config.sequence_parallel
        for parameter in _trained(self)[:1]:
            parameter.shared_embedding = True

    def report_unused(self, chunk: GPTModel, layers: set[int]) -> None:
        """Gives parameters that none of ``layers`` uses a gradient of zero, on the chunk that they are registered on.

        Megatron's overlapped communication waits there for a call of every module that has parameters, and for a
        gradient of each parameter: a layer in the place of the missing one makes one step for nothing.
        """
        with torch.random.fork_rng(devices=[]):
            others = [self._stand_in(index) for index in self.cell.unused_by(layers)]
        if not others:
            return
        dtype = state_dtype(self.config)

        def with_zero_gradients(decoder: torch.nn.Module, args: tuple, hidden_SBH: Tensor) -> Tensor:
            x_TH = hidden_SBH.new_zeros(1, self.config.hidden_size)
            return _WithoutGradient.apply(hidden_SBH, *(layer(x_TH, None, self.cell, dtype)[0] for layer in others))

        chunk.decoder.register_forward_hook(with_zero_gradients)

    def _stand_in(self, index: int) -> RouterLayer:
        """A layer that belongs to no model, and is not trained."""
        layer = get_router_type(self.config.moe_router_type).build_layer(self.config.routing)
        layer.index = index
        return layer.requires_grad_(False).to(torch.cuda.current_device())

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The same tensors on every stage: replicas of one, told apart by pipeline, tensor and data rank."""
        groups = self.pg_collection
        replica_id = (groups.pp.rank(), groups.tp.rank(), groups.dp_cp.rank())
        return {
            prefix + name: make_sharded_tensor_for_checkpoint(
                tensor, prefix + name, replica_id=replica_id, tp_group=groups.tp, dp_cp_group=groups.dp_cp
            )
            for name, tensor in self.state_dict(keep_vars=True).items()
        }


def fits_default_optimizer_checkpoint(router_type: RouterType, routing: RoutingConfig, ranks: int) -> bool:
    """Whether the distributed optimizer can save its state of :class:`SharedRecurrence` in its default format.

    It cannot when a bucket is so small that one of ``ranks`` data-parallel ranks owns no part of it
    (distrib_optimizer.py:1891), nor when the first bucket does not end on a parameter's alignment: the gap would
    be counted into the bucket but lie outside the checkpoint's tensor (distrib_optimizer.py:536 and 1900).
    """
    with torch.device("meta"):
        shared = router_type.build_shared(routing)
    parameters = _trained(shared) if shared is not None else []
    if not parameters:
        return True
    first, *others = parameters
    config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    for bucket in filter(None, ([first], others)):
        layout = DistributedOptimizer._compute_per_buffer_param_layout(bucket, None, ranks, config)
        ((start, end),) = layout.bucket_indices
        if layout.per_bucket_numel_unpadded[0] <= (end - start) // ranks * (ranks - 1):
            return False
    return all(pad_param_start(second.numel()) == second.numel() for second in others[:1])


def _trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Those that Megatron has a gradient buffer and an optimizer for."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class _GradientInBuffer(torch.autograd.Function):
    """A parameter in the dtype it is computed in; its gradient goes straight into ``main_grad``.

    The protocol of Megatron's fused weight gradients (tensor_parallel/layers.py, gradient_accumulation_fusion):
    ``grad_added_to_main_grad`` tells DDP's hook that there is nothing left to add, and a placeholder gradient
    makes that hook run.
    """

    @staticmethod
    def forward(ctx, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.parameter = parameter
        return parameter.to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        parameter = ctx.parameter
        if parameter.dtype == grad.dtype or not hasattr(parameter, "main_grad"):
            return grad.to(parameter.dtype), None
        parameter.main_grad.add_(grad)
        parameter.grad_added_to_main_grad = True
        return torch.zeros_like(parameter), None


class _WithoutGradient(torch.autograd.Function):
    """The first argument unchanged; the others get a gradient of zero."""

    @staticmethod
    def forward(ctx, hidden: Tensor, *unused: Tensor) -> Tensor:
        ctx.save_for_backward(*unused)
        return hidden.clone()  # schedules free a stage's output and refuse a view

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, *map(torch.zeros_like, ctx.saved_tensors)
