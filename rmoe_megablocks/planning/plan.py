"""A plan: all figures of one run on given machines, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.planning.counts import flops, memory, parameters, traffic
from rmoe_megablocks.planning.settings import Settings


@dataclass(frozen=True)
class Plan:
    """What :func:`make_plan` found.

    Attributes:
        settings: the sizes it was made from.
        world_size: ranks of the whole run.
        gpu_memory: GiB of one GPU.
        memory: the fullest rank under the configured recompute mode.
        by_mode: the same under every mode of ``memory.RECOMPUTE_MODES``.
        largest_micro_batch: by mode, the largest one that fits and divides the global batch; 0 where none does.
        warnings: one line each; ``fits`` is False when the memory does not suffice.
    """

    settings: Settings
    world_size: int
    gpu_memory: float
    counts: parameters.Counts
    flops: flops.Flops
    memory: memory.Memory
    by_mode: dict[str, memory.Memory]
    largest_micro_batch: dict[str, int]
    traffic: traffic.Traffic
    warnings: list[str]
    fits: bool

    def as_dict(self) -> dict:
        """The plan as ``--json`` prints it. Counts are parameters, memory and traffic bytes, FLOPs a token."""
        settings = self.settings
        return {
            "parameters": {
                "total": self.counts.total,
                "active": parameters.active(settings),
                "embeddings": parameters.embeddings(settings),
                "routing": self.counts.routing,
                "frozen": self.counts.frozen,
                "stages": [parameters.stage(settings, rank).total for rank in range(settings.pipeline)],
            },
            "flops_per_token": {
                "forward": self.flops.forward,
                "training": self.flops.training,
                "recomputed": self.flops.recomputed,
                "routing_forward": self.flops.routing,
                "routing_backward": self.flops.routing_backward,
                **({"saved_by_null_experts_forward": self.flops.saved} if settings.null_experts else {}),
            },
            **({"experts_per_token": _experts(settings)} if settings.null_experts else {}),
            "layout": {
                "world_size": self.world_size,
                "tensor": settings.tensor,
                "pipeline": settings.pipeline,
                "virtual": settings.virtual,
                "context": settings.context,
                "expert": settings.expert,
                "expert_tensor": settings.expert_tensor,
                "data": self.world_size // (settings.tensor * settings.pipeline * settings.context),
                "microbatches": memory.microbatches(settings, self.world_size),
            },
            "memory_per_rank": {
                "gpu": int(self.gpu_memory * memory.GIB),
                "usable": memory.usable(self.gpu_memory),
                **_memory(self.memory),
                "recompute": {
                    mode: {**_memory(found), "largest_micro_batch": self.largest_micro_batch[mode]}
                    for mode, found in self.by_mode.items()
                },
            },
            "sent_per_rank_and_step": {
                "pipeline": self.traffic.pipeline,
                "pipeline_state": self.traffic.pipeline_state,
                "all_to_all": self.traffic.all_to_all,
                "data_parallel": self.traffic.data_parallel,
            },
            "fits": self.fits,
            "warnings": self.warnings,
        }


def make_plan(settings: Settings, world_size: int, gpu_memory: float) -> Plan:
    """Computes everything for ``world_size`` ranks on GPUs of ``gpu_memory`` GiB.

    Raises:
        UsageError: one line with all that does not divide: figures would be those of another model.
    """
    ranks = max(1, world_size // (settings.tensor * settings.pipeline * settings.context))
    if not settings.global_batch_size:  # Megatron's default
        settings = replace(settings, global_batch_size=settings.micro_batch_size * ranks)
    if wrong := divisions(settings, world_size):
        raise UsageError("; ".join(wrong))
    problems: list[str] = []
    found = memory.fullest(settings, world_size)
    by_mode, largest = {}, {}
    for mode in memory.RECOMPUTE_MODES:
        varied = memory.with_recompute(settings, mode)
        by_mode[mode] = memory.fullest(varied, world_size)
        largest[mode] = largest_micro_batch(varied, world_size, gpu_memory)
    advice: list[str] = []
    if found.total > memory.usable(gpu_memory):
        problems.append(_too_large(settings, found, gpu_memory, largest))
    if not settings.fused_attention and settings.seq_length >= 2048 and settings.recompute == "none":
        advice.append(
            "attention without Transformer Engine keeps S x S scores for every head: "
            "--recompute-granularity selective --recompute-modules core_attn spares them"
        )
    if settings.null_experts:
        advice.append(
            f"--moe-null-experts: {settings.expected_experts:.3g} real experts a token is an expectation, for balanced "
            f"routing, and so are FLOPs, active parameters and traffic; memory is that of {settings.most_experts}"
        )
    if settings.not_counted:
        advice.append(f"not looked at, figures are those without: {' '.join(settings.not_counted)}")
    return Plan(
        settings=settings,
        world_size=world_size,
        gpu_memory=gpu_memory,
        counts=parameters.model(settings),
        flops=flops.flops(settings),
        memory=found,
        by_mode=by_mode,
        largest_micro_batch=largest,
        traffic=traffic.traffic(settings, world_size),
        warnings=problems + advice,
        fits=not problems,
    )


def largest_micro_batch(settings: Settings, world_size: int, gpu_memory: float) -> int:
    """The largest micro-batch that divides the global batch and fits; 0 when not even one sequence does."""
    ranks = max(1, world_size // (settings.tensor * settings.pipeline * settings.context))
    per_rank = settings.global_batch_size // ranks
    best = 0
    for size in range(1, per_rank + 1):
        if per_rank % size:
            continue
        if memory.fullest(replace(settings, micro_batch_size=size), world_size).total > memory.usable(gpu_memory):
            break
        best = size
    return best


def _experts(settings: Settings) -> dict[str, float]:
    """Real experts a token with null experts: the mean that balanced routing gives, and what memory is planned for."""
    return {"expected_when_balanced": settings.expected_experts, "at_most": settings.most_experts}


def _memory(found: memory.Memory) -> dict[str, int]:
    return {
        "weights": found.weights,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "activations": found.activations,
        "workspace": found.workspace,
        "total": found.total,
        "routing": found.routing,
        "frozen": found.frozen,
    }


def _too_large(settings: Settings, found: memory.Memory, gpu_memory: float, largest: dict[str, int]) -> str:
    need, have = found.total / memory.GIB, memory.usable(gpu_memory) / memory.GIB
    smaller = {mode: size for mode, size in largest.items() if size}
    enough = [mode for mode, size in smaller.items() if size >= settings.micro_batch_size]
    if enough:  # modes go from the cheapest to the dearest
        remedy = f"recompute {enough[0]} makes it fit"
        if "none" in smaller:
            remedy += f", or --micro-batch-size {smaller['none']} without recompute"
    elif smaller:
        mode, size = next(iter(smaller.items()))
        remedy = f"--micro-batch-size {size} with recompute {mode} fits"
    elif found.total - found.activations - found.workspace > memory.usable(gpu_memory):
        remedy = "weights, gradients and optimizer alone do not fit: spread the model over more ranks"
    else:
        remedy = "no micro-batch fits: spread the model over more ranks"
    return f"needs {need:.1f} GiB a rank of {have:.1f} usable ({gpu_memory:g} GiB): {remedy}"


def divisions(settings: Settings, world_size: int) -> list[str]:
    """A line for each thing of the layout that does not divide, as Megatron's own checks would find it."""
    s, problems = settings, []

    def check(whole: int, parts: int, what: str) -> None:
        if parts and whole % parts:
            problems.append(f"{what}: {whole} is not a multiple of {parts}")

    dense = s.tensor * s.pipeline * s.context
    check(world_size, dense, "ranks over tensor x pipeline x context parallel")
    if s.num_experts:
        check(
            world_size, s.expert * s.expert_tensor * s.pipeline, "ranks over expert x expert-tensor x pipeline parallel"
        )
        check(s.num_experts, s.expert, "experts over --expert-model-parallel-size")
        check(s.expert_ffn_size, s.expert_tensor, "--moe-ffn-hidden-size over --expert-tensor-parallel-size")
        check(s.shared_expert_size, s.tensor, "--moe-shared-expert-intermediate-size over --tensor-model-parallel-size")
    elif s.expert > 1:
        problems.append(f"--expert-model-parallel-size {s.expert} without --num-experts")
    check(s.num_layers, s.pipeline * s.virtual, "--num-layers over pipeline x virtual stages")
    check(s.heads, s.tensor, "--num-attention-heads over --tensor-model-parallel-size")
    check(s.query_groups if s.query_groups >= s.tensor else s.tensor, min(s.query_groups, s.tensor), "query groups")
    check(s.ffn_size, s.tensor, "--ffn-hidden-size over --tensor-model-parallel-size")
    if s.context > 1:
        check(s.seq_length, 2 * s.context, "--seq-length over 2 x --context-parallel-size")
    if s.sequence_parallel:
        check(s.seq_length, s.tensor, "--seq-length over --tensor-model-parallel-size")
    if s.tensor > 1 and s.num_experts and not s.sequence_parallel:
        problems.append("experts with --tensor-model-parallel-size need --sequence-parallel")
    check(s.vocab_size, s.tensor, "--padded-vocab-size over --tensor-model-parallel-size")
    if s.virtual > 1 and s.pipeline == 1:
        problems.append("virtual stages without --pipeline-model-parallel-size")
    ranks = max(1, world_size // dense)
    check(s.global_batch_size, s.micro_batch_size * ranks, "--global-batch-size over micro-batch x data parallel")
    if s.virtual > 1:
        check(memory.microbatches(s, world_size), s.pipeline, "micro-batches of an interleaved schedule over stages")
    return problems
