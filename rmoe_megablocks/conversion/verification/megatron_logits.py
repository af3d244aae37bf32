"""Logits of a checkpoint by Megatron's own model, in fp32, in one process on the CPU.

python -m rmoe_megablocks.conversion.verification.megatron_logits CHECKPOINT IDS.npy LOGITS.npy [ROUTER_TYPE]

A router type that is named may be imported.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from rmoe_megablocks.compat import megatron_cpu

megatron_cpu.install(announce=False)

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402  after CPU mode
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args  # noqa: E402

from rmoe_megablocks.conversion import source as sources  # noqa: E402
from rmoe_megablocks.megatron import arguments  # noqa: E402
from rmoe_megablocks.megatron.experts.backend import MEGATRON  # noqa: E402
from rmoe_megablocks.megatron.recurrence.install import install_router  # noqa: E402

# of the model alone: one process, fp32, nothing that only training or a GPU has
_HERE = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "transformer_pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "world_size": 1,
    "data_parallel_size": 1,
    "rank": 0,
    "bf16": False,
    "fp16": False,
    "params_dtype": torch.float32,
    "transformer_impl": "local",
    "attention_backend": AttnBackend.unfused,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "moe_token_dispatcher_type": "alltoall",
    "moe_backend": MEGATRON,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "moe_shared_expert_overlap": False,
    "moe_router_impl": "eager",
    "moe_router_upcycle": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": None,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "mtp_num_layers": None,
    "use_cpu_initialization": False,
    "perform_initialization": False,
    "cross_entropy_loss_fusion": False,
    "async_save": False,
}


def build(args: argparse.Namespace) -> GPTModel:
    """The model that the arguments of a checkpoint describe, in this process alone. Its weights are not drawn."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    complete = arguments.parse([])  # of this release, with its defaults for what an older one did not save
    vars(complete).update(vars(args))
    vars(complete).update(_HERE)
    model_config = gpt_config_from_args(complete)
    install_router(model_config, complete)
    builder = model_config.get_builder_cls()(model_config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    (model,) = builder.build_distributed_models(groups, wrap_with_ddp=False)
    return model.eval()


def load(model: GPTModel, checkpoint: Path) -> None:
    """Loads every weight, as Megatron does."""
    metadata = {"singleton_local_shards": False, "dp_cp_group": parallel_state.get_data_parallel_group(True)}
    wanted = model.sharded_state_dict(metadata=metadata)
    model.load_state_dict(dist_checkpointing.load({"model": wanted}, str(checkpoint))["model"])


@torch.no_grad()
def logits(model: GPTModel, ids_BS: torch.Tensor) -> torch.Tensor:
    """[B, S] -> [B, S, V] with the padded vocabulary."""
    positions = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
    return model(ids_BS, positions, None)


def main(checkpoint: str, ids: str, out: str, *trusted: str) -> int:
    """See the module."""
    source = sources.open_source(Path(checkpoint), None, None, bool(trusted), any_vocabulary=True)
    model = build(source.args)
    load(model, source.folder)
    np.save(out, logits(model, torch.from_numpy(np.load(ids))).float().numpy())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
