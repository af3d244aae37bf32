"""CPU mode's context-parallel attention beside upstream's to the whole sequence, in a running process group."""

import copy

import torch
from megatron.core import mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType

from rmoe_megablocks.compat.megatron_cpu.context_parallel import ContextParallelAttention, chunks_of

SEQUENCE, BATCH = 24, 2
WINDOWS = {"causal": None, "window": (5, 0)}
(UPSTREAM,) = ContextParallelAttention.__bases__


def deviations(config) -> dict[str, float]:
    """Largest difference of the output and of each gradient, by mask and name, on this rank's part of the sequence."""
    return {
        f"{mask} {name}": difference
        for mask, window in WINDOWS.items()
        for name, difference in _compare(config, window).items()
    }


def _compare(config, window) -> dict[str, float]:
    undivided, divided = copy.copy(config), copy.copy(config)
    undivided.window_size = divided.window_size = window
    undivided.context_parallel_size = 1
    ranks, generator = mpu.get_context_parallel_world_size(), torch.Generator().manual_seed(1)
    heads = {"query": config.num_attention_heads, "key": config.num_query_groups, "value": config.num_query_groups}
    whole = {n: torch.randn(SEQUENCE, BATCH, h, config.kv_channels, generator=generator) for n, h in heads.items()}
    grad = torch.randn(SEQUENCE, BATCH, config.num_attention_heads * config.kv_channels, generator=generator)

    def part(tensor):
        return torch.cat([tensor.chunk(2 * ranks)[c] for c in chunks_of(mpu.get_context_parallel_rank(), ranks)])

    def run(kind, config, tensors, grad):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        attention = kind(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
        output = attention(*leaves.values(), None)
        output.backward(grad)
        return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    expected = run(UPSTREAM, undivided, whole, grad)
    ours = run(ContextParallelAttention, divided, {name: part(t) for name, t in whole.items()}, part(grad))
    return {name: (ours[name] - part(expected[name])).abs().max().item() for name in expected}
