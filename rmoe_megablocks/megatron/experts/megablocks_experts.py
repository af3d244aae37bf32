"""MegaBlocks' dropless grouped experts as the experts of a Megatron MoE layer.

Importing this module imports MegaBlocks, with our stand-ins for what is not compiled.
"""

from contextlib import nullcontext

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rmoe_megablocks.compat import megablocks as megablocks_mode
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.experts.megablocks_weights import ExpertShards, split_expert
from rmoe_megablocks.megatron.null_experts import options as null_experts

megablocks_mode.enable()  # before the first import of MegaBlocks
from megablocks.layers.arguments import Arguments  # noqa: E402
from megablocks.layers.dmoe import ParallelDroplessMLP  # noqa: E402


class MegaBlocksExperts(MegatronModule):
    """The experts of one layer that this rank holds, and the way of all tokens to theirs and back.

    Parameters, under ``dropless.mlp``: w1, w2 [E*F, H] and, for gated units, v1 [E*F, H]; E experts a rank. See
    :mod:`.megablocks_weights` for how they correspond to Megatron's. They start as Megatron's experts would from
    the same seed, and are reduced, clipped and saved by the same rules.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        if pg_collection.expt_tp.size() > 1:
            raise UsageError("--moe-backend megablocks: experts are whole; set --expert-tensor-parallel-size 1")
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.dp_group = pg_collection.expt_dp
        self.dropless = ParallelDroplessMLP(_arguments(config, self.ep_group))
        mlp = self.dropless.mlp
        mlp.gradient_scale = None  # Megatron's data parallelism divides already
        # MegaBlocks draws the weights of all ranks on every rank and keeps its own. Built without storage, its
        # matrices are made here instead, the local experts' only.
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        for parameter_name, parameter in list(mlp.named_parameters()):
            weight = torch.nn.Parameter(torch.empty(parameter.shape, dtype=config.params_dtype, device=device))
            self._mark(weight)
            setattr(mlp, parameter_name, weight)
        if config.perform_initialization:
            self.reset_parameters()
        self._register_load_state_dict_pre_hook(lambda state, prefix, *_: state.setdefault(f"{prefix}_extra_state"))

    def _mark(self, weight: Tensor) -> None:
        """Says who sums and counts its gradient, as Megatron does of its experts' (tensor_parallel/layers.py)."""
        config = self.config
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
        weight.allreduce = not (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weights anew, expert by expert with the generator, shapes and order of Megatron's SequentialMLP."""
        config, mlp = self.config, self.dropless.mlp
        on_cpu = config.use_cpu_initialization
        rows = config.moe_ffn_hidden_size
        with nullcontext() if on_cpu else get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            for i in range(self.num_local_experts):
                # Megatron draws in fp32 and rounds on the CPU, in the parameters' dtype on a GPU
                like = {"dtype": torch.float32 if on_cpu else mlp.w1.dtype, "device": mlp.w1.device}
                fc1 = torch.empty((1 + config.gated_linear_unit) * rows, config.hidden_size, **like)
                fc2 = torch.empty(config.hidden_size, rows, **like)
                config.init_method(fc1)
                config.output_layer_init_method(fc2)
                for name, part in split_expert(fc1, fc2, config.gated_linear_unit).items():
                    getattr(mlp, name)[i * rows : (i + 1) * rows].copy_(part)

    def forward(
        self, hidden_SBH: Tensor, weights_TK: Tensor, experts_TK: Tensor, tokens_N: Tensor | None = None
    ) -> Tensor:
        """Sends every token to its experts, wherever they are, and sums what they answer.

        Args:
            hidden_SBH: this rank's tokens [S, B, H], T = S x B.
            weights_TK: weight of each chosen expert's answer [T, K], fp32.
            experts_TK: the chosen experts [T, K], by their number among all.
            tokens_N: where a token has any number of experts, the token of each choice; weights and experts are [N].

        Returns:
            [S, B, H] in the dtype of ``hidden_SBH``.
        """
        if tokens_N is None:
            return self.dropless(hidden_SBH.contiguous(), None, weights_TK, experts_TK)
        # MegaBlocks takes as many experts of every row: each choice is a row, of one expert
        hidden_TH = hidden_SBH.reshape(-1, hidden_SBH.shape[-1])
        answers_NH = self.dropless(hidden_TH.index_select(0, tokens_N), None, weights_TK, experts_TK)
        return torch.zeros_like(hidden_TH).index_add(0, tokens_N, answers_NH).view_as(hidden_SBH)

    def backward_dw(self) -> None:
        """Weight gradients are never delayed: nothing to do."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The weights in Megatron's checkpoint layout."""
        shards = ExpertShards(
            prefix=f"{prefix}experts.",
            offsets=tuple(sharded_offsets),
            first=self.ep_group.rank() * self.num_local_experts,
            local=self.num_local_experts,
            total=self.ep_group.size() * self.num_local_experts,
            replica_id=(0, 0, self.dp_group.rank()),
            singleton=(metadata or {}).get("singleton_local_shards", False),
        )
        weights = shards.factories(dict(self.dropless.mlp.named_parameters()), f"{prefix}dropless.mlp.")
        return weights | {f"{prefix}_extra_state": shards.extra_states()}

    def get_extra_state(self) -> None:
        """Nothing. Megatron's linear layers have this entry, so checkpoints must have it: see sharded_state_dict."""

    def set_extra_state(self, state: object) -> None:
        """Whatever Megatron's experts had there: the scales of a quantization that there is not."""


def _arguments(config: TransformerConfig, ep_group) -> Arguments:
    """Every argument that has another meaning by default is given: fp16 would be True, the group the world."""
    distributed = ep_group.size() > 1

    def leave(weight: Tensor) -> None:
        pass  # the weights are not there yet

    return Arguments(
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.moe_ffn_hidden_size,
        bias=False,
        activation_fn=config.activation_func,
        moe_num_experts=config.num_moe_experts,
        moe_top_k=1 if null_experts.of(config) else config.moe_router_topk,
        moe_loss_weight=0,  # MegaBlocks' global loss lists stay empty; Megatron's router attaches the losses
        moe_expert_model_parallelism=distributed,
        expert_parallel_group=ep_group if distributed else None,
        mlp_type="glu" if config.gated_linear_unit else "mlp",
        mlp_impl="grouped",
        fp16=config.params_dtype == torch.float16,
        bf16=config.params_dtype == torch.bfloat16,
        device="meta",
        init_method=leave,
        output_layer_init_method=leave,
    )
