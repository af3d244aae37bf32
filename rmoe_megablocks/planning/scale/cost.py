"""Seconds of a training step, and what the routing has of them. Estimates: no GPU was asked.

Compute is FLOPs over a share of the peak; the router's products are far too thin for that, so the router takes the
longer of its FLOPs and its bytes (each tensor that it reads or writes, once). Messages are bytes over bandwidth;
pipeline messages delay the schedule (:mod:`.pipeline`), those of tensor and expert parallelism are not overlapped,
gradients and weights are, with the last backward and the first forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rmoe_megablocks.planning.counts import flops, memory, parameters, traffic
from rmoe_megablocks.planning.scale import pipeline
from rmoe_megablocks.planning.scale.hardware import Hardware
from rmoe_megablocks.planning.settings import Settings


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the rank that is done last.

    Attributes:
        compute: products, forward, backward and again, without the router's.
        routing: the router's passes.
        tensor: messages of tensor parallelism.
        expert: messages of expert parallelism.
        bubble: waiting for other stages, with their messages.
        state: of that, what the routing state's part of the messages adds.
        data: gradients and weights, as far as they are not hidden.
        shared: adding the gradients of what layers share over the stages.
    """

    compute: float
    routing: float
    tensor: float
    expert: float
    bubble: float
    state: float
    data: float
    shared: float

    @property
    def total(self) -> float:
        """Of the step; ``state`` is a part of ``bubble``."""
        return self.compute + self.routing + self.tensor + self.expert + self.bubble + self.data + self.shared

    @property
    def of_routing(self) -> float:
        """What goes into the router, its state and what its layers share."""
        return self.routing + self.state + self.shared


def step_time(settings: Settings, world_size: int, machine: Hardware) -> StepTime:
    """The estimate for ``world_size`` ranks in the configured layout."""
    s, steps = settings, memory.microbatches(settings, world_size)
    sent, counted = traffic.traffic(s, world_size), flops.flops(s)
    tokens, split = memory.tokens_on_rank(s), s.tensor  # tokens of a micro-batch, and over how many ranks their work is
    share = s.tensor if s.sequence_parallel else 1
    rate = machine.flops * machine.compute

    of_a_layer = (counted.linear + counted.attention + counted.experts) / s.num_layers
    again = counted.recomputed / s.num_layers
    work = [tokens / split * passes / rate for passes in (of_a_layer, 2 * of_a_layer + again)]
    routed = [_routing(s, tokens / share, machine, backward) for backward in (False, True)]
    between = [_tensor(s, tokens, machine)] * 2
    experts = sent.all_to_all / (steps * max(1, _moe_layers(s)))
    apart = [experts / 2 / _rate(machine, s.expert * s.expert_tensor)] * 2 if experts else [0.0, 0.0]
    head = [tokens / split * n * counted.logits / rate for n in (1, 2)]

    forward, backward = (_stages(s, work[i], routed[i], between[i], apart[i], head[i]) for i in (0, 1))
    message, plain = (_message(s, tokens / share, world_size, machine, with_state) for with_state in (True, False))
    whole = pipeline.makespan(forward, backward, steps, message)
    busiest = max(steps * (sum(forward[rank]) + sum(backward[rank])) for rank in range(s.pipeline))
    state = whole - pipeline.makespan(forward, backward, steps, plain)

    # one rank's share of the work, the busiest's
    moe, layers = _moe_layers(s), max(len(parameters.layers_of_rank(s, rank)) for rank in range(s.pipeline))
    routing, tensor, expert = steps * moe * sum(routed), steps * layers * sum(between), steps * moe * sum(apart)
    data = sent.data_parallel / _rate(machine, world_size // s.pipeline)
    hidden = min(data, sum(backward[0]) / 2 + sum(forward[0]) / 2)
    return StepTime(
        compute=busiest - routing - tensor - expert,
        routing=routing,
        tensor=tensor,
        expert=expert,
        bubble=whole - busiest,
        state=state,
        data=data - hidden,
        shared=_shared(s, world_size, machine),
    )


def _moe_layers(settings: Settings) -> int:
    """Of the rank that has most."""
    return max(
        sum(settings.moe_layers[index] for index in parameters.layers_of_rank(settings, rank))
        for rank in range(settings.pipeline)
    )


def _stages(s: Settings, work: float, routed: float, tensor: float, apart: float, head: float) -> list[list[float]]:
    """[pipeline][virtual] seconds of one micro-batch."""
    result = []
    for rank in range(s.pipeline):
        layers = parameters.layers_of_rank(s, rank)
        each = len(layers) // s.virtual
        chunks = [layers[i * each : (i + 1) * each] for i in range(s.virtual)]
        times = [sum(work + tensor + s.moe_layers[i] * (routed + apart) for i in chunk) for chunk in chunks]
        if rank == s.pipeline - 1:
            times[-1] += head
        result.append(times)
    return result


def _routing(s: Settings, tokens: float, machine: Hardware, backward: bool) -> float:
    """One layer's router: FLOPs or bytes, whichever takes longer."""
    if not s.num_experts:
        return 0.0
    return tokens * max(
        flops.router(s)[backward] / (machine.flops * machine.compute),
        routing_bytes(s, backward) / (machine.bandwidth * machine.reached),
    )


def routing_bytes(s: Settings, backward: bool) -> float:
    """Bytes that a layer's router reads and writes for a token: hidden states, state, logits and what is kept.

    Forward: hidden states, the state there and back, logits, what the backward pass needs. Backward: that again, hidden
    states for the weights' gradient, and the gradients of hidden states (added to what the experts give them), state
    and logits.
    """
    hidden, logits = s.hidden_size * s.dtype_bytes, 4 * s.logits
    state = s.routing.state_size * s.router_dtype_bytes if s.routing else 0
    kept = s.routing.kept if s.routing else 0
    if not backward:
        return hidden + 2 * state + logits + kept
    return 3 * hidden + 2 * state + logits + kept


def _tensor(s: Settings, tokens: int, machine: Hardware) -> float:
    """Of one layer and pass: an all-gather and a reduce-scatter for attention, and for what follows it."""
    if s.tensor == 1:
        return 0.0
    bytes_sent = 4 * tokens * s.hidden_size * s.dtype_bytes * (s.tensor - 1) / s.tensor
    return bytes_sent / _rate(machine, s.tensor)


def _message(s: Settings, tokens: float, world_size: int, machine: Hardware, with_state: bool) -> float:
    if s.pipeline == 1:
        return 0.0
    width = s.hidden_size * s.dtype_bytes
    if with_state and s.routing:
        width += max(s.router_dtype_bytes, s.dtype_bytes) * s.routing.state_size
    return machine.latency + tokens * width / _rate(machine, world_size)


def _shared(s: Settings, world_size: int, machine: Hardware) -> float:
    """A ring all-reduce over the stages."""
    size = shared_bytes(s)
    if not size:
        return 0.0
    return 2 * (s.pipeline - 1) * (machine.latency + size / s.pipeline / _rate(machine, world_size))


def shared_bytes(s: Settings) -> int:
    """Of the gradients that stages add up in a step: those of what the routers of all layers share."""
    if s.pipeline == 1 or s.routing is None:
        return 0
    return (s.routing.shared - s.routing.frozen_shared) * s.grad_bytes


def _rate(machine: Hardware, ranks: int) -> float:
    """Bytes/s a rank sends to another one within so many consecutive ranks: those of a node, or the network decides.

    Megatron counts tensor ranks fastest, then context, expert and data ranks, stages last: neighbouring stages are as
    many ranks apart as a stage has, and share a node where all ranks do.
    """
    return (machine.link if ranks <= machine.gpus else machine.network) * machine.reached


def without_router(settings: Settings) -> Settings:
    """The same model with the host's own router: what the router's share is held against."""
    return replace(settings, routing=None)
