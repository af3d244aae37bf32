"""Megatron in one process, without a launcher."""

import contextlib
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def parallel_state(seed: int = 1234) -> Iterator[None]:
    """This process as the only rank of every group, with Megatron's random streams; all of it ends with the block."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(seed)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
