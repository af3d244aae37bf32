"""Small models of any router type for tests, drawn so that no weight is what hides a mistake."""

import torch
from torch import Tensor

from rmoe_megablocks.huggingface import RmoeConfig, RmoeForCausalLM
from rmoe_megablocks.huggingface.cache import CACHE
from rmoe_megablocks.huggingface.layers.moe import RmoeRouter
from rmoe_megablocks.routing import LINEAR, Argument, get_router_type, router_types

B, S, V, E, K = 2, 9, 61, 4, 2
M = 5  # E + M is a square, as product_key wants it
TYPES = router_types()
LINEAR_AND_STATEFUL = (LINEAR, RmoeConfig.router_type)  # the host's matrix, and RMoE


def having(argument: Argument) -> list[str]:
    """The types that take ``argument``."""
    return [name for name in TYPES if argument in get_router_type(name).arguments]


def config(kind: str = "gru", options: dict | None = None, **changes) -> RmoeConfig:
    """Layers with and without experts, grouped queries, a shared expert; ``options`` by Argument."""
    widths = {a.dest: 6 for a in get_router_type(kind).arguments if type(a.default) is int}
    values = dict(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=E,
        num_experts_per_tok=K,
        moe_shared_expert_intermediate_size=24,
        moe_layer_freq=[0, 1, 1, 0, 1],
        max_position_embeddings=64,
        initializer_range=0.2,
        router_type=kind,
        router_options=widths | {argument.dest: value for argument, value in (options or {}).items()},
    )
    return RmoeConfig(**(values | changes))


def model(*args, seed: int = 0, **changes) -> RmoeForCausalLM:
    """Of :func:`config`, in evaluation mode; biases are not 0, norms not 1."""
    torch.manual_seed(seed)
    made = RmoeForCausalLM(config(*args, **changes)).eval()
    with torch.no_grad():
        for tensor in [*made.parameters(), *(router.expert_bias for router in routers(made))]:
            if tensor is not None and tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    return made


def routers(made: RmoeForCausalLM) -> list[RmoeRouter]:
    return [module for module in made.modules() if isinstance(module, RmoeRouter)]


def tokens(batch: int = B, length: int = S, seed: int = 1) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def cache_of(outputs):
    """The cache among a model's results, under either name."""
    return outputs[CACHE]


def gradients(made: RmoeForCausalLM, **inputs) -> dict[str, Tensor]:
    """Of the loss on :func:`tokens`, of every trained parameter; that all have one is checked."""
    made.zero_grad()
    made(tokens(), labels=tokens(), **inputs).loss.backward()
    found = {name: p.grad for name, p in made.named_parameters() if p.requires_grad}
    assert not [name for name, grad in found.items() if grad is None or not grad.isfinite().all()]
    return {name: grad.clone() for name, grad in found.items()}


def close(ours, theirs, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def spelt(value: object) -> str:
    """A test's id: a type's name, or its options as they are typed; alike in every process that collects the tests."""
    return " ".join(f"{a.option} {v}" for a, v in value.items()) or "plain" if isinstance(value, dict) else str(value)
