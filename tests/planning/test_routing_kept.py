"""What the routing keeps for the backward pass: the plan's figures against autograd's own, storages counted once."""

import pytest
import torch

from rmoe_megablocks.planning.counts.routing import measure
from rmoe_megablocks.routing import RESIDUAL, RoutingConfig, get_router_type
from rmoe_megablocks.routing.parts.implementation import EAGER, IMPL, RECOMPUTE, TRITON
from tests.routing.types.built import TYPES, having

T, H, P, E, LAYERS = 5, 24, 8, 4, 4
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
FORMS = {name: [name] for name in TYPES if name != "gru"}
FORMS |= {f"gru, {impl}": ["gru", "--moe-router-impl", impl] for impl in (EAGER, RECOMPUTE, TRITON)}
for option, values in {
    "--moe-router-head": ["cosine", "xmoe", "product_key"],
    "--moe-router-recurrence": ["detach", "none"],
    "--moe-router-residual": ["0.5"],
    "--moe-router-rnn-bias": ["True"],
    "--moe-router-share-projector": ["2"],
}.items():
    for value in values:
        for impl in (EAGER, TRITON):
            FORMS[f"gru, {impl}, {option} {value}"] = ["gru", "--moe-router-impl", impl, option, value]
FORMS |= {f"{name}, residual": [name, RESIDUAL.option, "0.5"] for name in having(RESIDUAL) if name != "gru"}


def config_of(name: str, *typed: str) -> RoutingConfig:
    arguments = {argument.option: argument for argument in get_router_type(name).arguments}
    chosen = {argument: 3 for argument in arguments.values() if type(argument.default) is int}
    chosen |= {a: P for a in arguments.values() if a.option == "--moe-router-rnn-hidden-size"}
    for option, value in zip(typed[::2], typed[1::2], strict=True):
        kind = type(arguments[option].default)
        chosen[arguments[option]] = True if kind is bool else kind(value)
    return RoutingConfig(H, E, chosen, num_layers=LAYERS)


def kept(config, name: str, dtype, router_dtype, device: str, count: int) -> tuple[int, bool]:
    """Bytes that ``count`` layers of T tokens keep, the first without a state, as in a model: without parameters,
    hidden states and logits; and whether the hidden states are among what they keep."""
    router, storages = get_router_type(name), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    with torch.device(device):
        layers = [router.layer(config).to(dtype) for _ in range(count)]
        shared = router.build_shared(config)
        xs = [torch.zeros(T, H, dtype=dtype, requires_grad=True) for _ in layers]
    modules = [*layers, *([] if shared is None else [shared.to(dtype)])]
    elsewhere = [*xs, *(p for module in modules for p in module.parameters())]
    h = None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for index, (layer, x) in enumerate(zip(layers, xs, strict=True)):
            layer.index = index
            logits, h = layer(x, h, shared, router_dtype)
            elsewhere.append(logits)
    without = {tensor.untyped_storage()._cdata for tensor in elsewhere}
    of_inputs = {x.untyped_storage()._cdata for x in xs}
    return sum(s.nbytes() for address, s in storages.items() if address not in without), of_inputs <= storages.keys()


@pytest.mark.parametrize(("dtype", "router_dtype"), [(4, 4), (2, 4), (2, 2), (2, 8)])
@pytest.mark.parametrize("form", FORMS)
def test_every_type_and_form_keeps_what_the_plan_says(form, dtype, router_dtype):
    """Every further layer to the byte; all of them within one layer, since the first and the last are others: before
    the first there is no state, which some cells make up and others do without, and nobody reads the last one's.
    Triton's form has shapes alone here (its kernels run in tests/kernels/interpreted), the others numbers."""
    name, *typed = FORMS[form]
    if TRITON in typed and router_dtype == 8:
        pytest.skip("no kernel for float64")
    config = config_of(name, *typed)
    device = "meta" if config[IMPL] == TRITON else "cpu"
    cost = measure(get_router_type(name), config, dtype, router_dtype)
    of_two, of_four = (kept(config, name, DTYPES[dtype], DTYPES[router_dtype], device, n) for n in (2, LAYERS))
    of_a_layer = T * cost.kept + cost.kept_once
    assert (of_four[0] - of_two[0], of_four[1]) == ((LAYERS - 2) * of_a_layer, cost.keeps_input)
    missing = LAYERS * of_a_layer - of_four[0]
    assert -T * router_dtype * cost.state_size <= missing <= of_a_layer
