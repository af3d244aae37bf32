"""Models that Megatron builds from a configuration, to hold plans against: any rank of any layout in one process."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from rmoe_megablocks.megatron.recurrence.install import install_router
from rmoe_megablocks.megatron.resolve import Run, resolve

from megatron.core import mpu  # isort: skip  after CPU mode
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder
from torch.testing._internal.distributed.fake_pg import FakeStore

from rmoe_megablocks.launcher.config import REPOSITORY, load_config, merge, to_argv

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
NO_DATA = [
    "--pretrained-checkpoint=null",
    "--dataset=null",
    "--tokenizer-model=null",
    "--mock-data",
    "--tokenizer-type",
    "NullTokenizer",
]


def arguments(path: Path, typed: list[str] = (), runs_dir: Path | None = None) -> tuple[list[str], int]:
    """Megatron's command line of a configuration without its data and checkpoint, and its number of ranks."""
    config = load_config(path)
    no_data = NO_DATA if "--dataset" in config.arguments else []
    argv = merge(to_argv(config.arguments), [*no_data, *typed], lambda option: False)
    if runs_dir is not None:
        argv += ["--run-name", "test", "--runs-dir", str(runs_dir)]
    return argv, int(config.env.get("RMOE_WORLD_SIZE", 0))


def checked(path: Path, runs_dir: Path, typed: list[str] = (), world_size: int | None = None) -> Run:
    """The run as the launcher checks it: Megatron's parser and validation, our checks, the layout."""
    argv, ranks = arguments(path, typed, runs_dir)
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.dict(os.environ, load_config(path).env):
        return resolve(argv, world_size=world_size or ranks or 2)


@contextlib.contextmanager
def rank_of(run: Run, rank: int) -> Iterator[ProcessGroupCollection]:
    """This process as one rank of the run's layout; its process groups do nothing."""
    args = run.args
    torch.distributed.init_process_group("fake", rank=rank, world_size=args.world_size, store=FakeStore())
    try:
        mpu.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        mpu.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build(run: Run, groups: ProcessGroupCollection, device: str = "meta") -> list[GPTModel]:
    """The model chunks of this rank. On "meta" they have shapes and no memory."""
    model_config = gpt_config_from_args(run.args)
    install_router(model_config, run.args)
    builder = GPTModelBuilder(model_config)
    virtual = run.args.virtual_pipeline_model_parallel_size
    on = torch.device(device)
    # Megatron names the device in most places, which a default device does not change. With tied embeddings it sums
    # their copies, and torch 2.9's process group that does nothing takes no tensor of "meta".
    silent = mock.patch.object(torch.distributed, "all_reduce", lambda tensor, *_, **__: None)
    with on, mock.patch.object(torch.cuda, "current_device", lambda: on), silent:
        chunks = [builder.build_model(groups, vp_stage=i if virtual else None) for i in range(virtual or 1)]
    for hook in model_config.pre_wrap_hooks:
        with on:
            chunks = hook(chunks)
    return chunks


def count(chunks: list[GPTModel]) -> int:
    """Parameters of all chunks."""
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


def stage_ranks(run: Run) -> list[int]:
    """A rank of each pipeline stage (Megatron numbers stages last)."""
    each = run.args.world_size // run.args.pipeline_model_parallel_size
    return [stage * each for stage in range(run.args.pipeline_model_parallel_size)]
