"""The recurrence that every MoE layer on every pipeline stage uses, kept one and the same everywhere."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import nn

from rmoe_megablocks.routing import get_router_type


class SharedRecurrence(MegatronModule):
    """One copy a pipeline rank, registered on its first model chunk.

    What keeps the copies identical: the same seed at the start (:meth:`__init__`), gradients summed over stages
    (``pipeline_parallel`` together with ``config.has_cond_embedder``, finalize_model_grads.py), one copy counted in
    the gradient norm (``shared``), and a bucket of its own in the gradient buffer (``shared_embedding``): the sum
    over stages runs after the data-parallel reduce-scatter, so its shards must line up on all stages.

    The parameters stay fp32 in a bf16 or fp16 model. They collect gradients from all layers, and the partial sums
    of the stages must add up to what one process sums.
    """

    def __init__(self, config, pg_collection: ProcessGroupCollection, seed: int) -> None:
        super().__init__(config)
        self.pg_collection = pg_collection
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # Megatron seeds stages differently, these copies must start alike
            self.cell: nn.Module = get_router_type(config.moe_router_type).build_shared(config.routing)
        for parameter in self.parameters():
            parameter.pipeline_parallel = True
            parameter.shared = pg_collection.pp.rank() != 0
            parameter.shared_embedding = True
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, p_TP, h_TP):
        """One step of the recurrence, see :class:`rmoe_megablocks.routing.RouterType`."""
        return self.cell(p_TP, h_TP)

    def _apply(self, fn, recurse: bool = True):
        """Follows the model from device to device, not from fp32 to bf16 (Float16Module converts everything)."""

        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

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
