"""--moe-null-experts in models of one process: weights, losses, rows computed, zeros, every router type."""

import argparse

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.training import training

from rmoe_megablocks.megatron.monitoring.health import RoutingHealth
from rmoe_megablocks.megatron.null_experts import router as null_router
from rmoe_megablocks.megatron.null_experts.router import NullExperts
from rmoe_megablocks.routing import router_types
from tests.distributed.arguments import FULL_RECOMPUTE, MOE_RECOMPUTE, of_type
from tests.megatron.recurrence.test_model import VOCABULARY, B, S, batch, build, forward

L, E, M, K = 4, 4, 5, 2  # E + M is a square, as product_key wants it
NULL = ["--moe-null-experts", str(M)]
LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
COEFFICIENT = 0.5


def layers(model) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def reference_loss(logits_SBN: torch.Tensor, kind: str, kept_SB: torch.Tensor) -> torch.Tensor:
    """(E + M) * sum_i f_i P_i in float64, f of a null expert the mean of theirs; of each sequence by itself, averaged,
    or of all tokens ``kept``."""
    if kind == "seq_aux_loss":
        return sum(reference_loss(logits_SBN[:, [b]], "aux_loss", kept_SB[:, [b]]) for b in range(B)) / B
    logits_TN = logits_SBN.double()[kept_SB]
    scores_TN = logits_TN.softmax(-1)
    load_N = torch.bincount(logits_TN.topk(K).indices.flatten(), minlength=E + M).double() / (K * len(logits_TN))
    load_N[E:] = load_N[E:].mean()
    return (E + M) * load_N @ scores_TN.mean(0)


def balancing(kind: str, padding_mask=None, wrong=None) -> tuple[float, float, torch.Tensor, torch.Tensor]:
    """The loss that Megatron logs and the reference, and the gradients of the logits by either."""
    model = build(*NULL, "--moe-router-load-balancing-type", kind, "--moe-aux-loss-coeff", str(COEFFICIENT),
                  "--moe-z-loss-coeff=null")  # fmt: skip
    router = layers(model)[1].router
    logits = torch.randn(S, B, E + M, generator=torch.Generator().manual_seed(3)) * 2
    logits[..., E] += 2  # null experts of different loads
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    get_moe_metrics_tracker().clear()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    weights_TE, _ = router.routing(ours, padding_mask=padding_mask)
    (0 * weights_TE).sum().backward()  # the loss's gradient alone is left
    kept = torch.ones(S, B, dtype=torch.bool) if padding_mask is None else ~padding_mask
    expected = reference_loss(theirs, kind, kept)
    (COEFFICIENT * expected).backward()
    ((_, metric),) = get_moe_metrics_tracker().metrics.items()
    found = metric.values[1].item()
    get_moe_metrics_tracker().clear()
    return found, expected.item(), ours.grad, theirs.grad


@pytest.mark.parametrize("kind", LOSSES)
def test_the_balancing_loss_is_the_definition(one_process, kind):
    found, expected, gradient, expected_gradient = balancing(kind)
    assert found == pytest.approx(expected, rel=1e-6)
    assert (gradient - expected_gradient).abs().max() < 1e-5 * expected_gradient.abs().max()
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("kind", ["aux_loss", "global_aux_loss"])
def test_tokens_of_a_padding_mask_are_not_balanced(one_process, kind):
    padding_SB = (torch.arange(S) >= S - 8)[:, None].expand(S, B)
    found, expected, gradient, expected_gradient = balancing(kind, padding_SB)
    assert found == pytest.approx(expected, rel=1e-6)
    assert (gradient - expected_gradient).abs().max() < 1e-5 * expected_gradient.abs().max()


def test_null_experts_counted_by_their_own_load_are_noticed(one_process, monkeypatch):
    monkeypatch.setattr(null_router, "balanced_choices", lambda chosen, experts: chosen.float())
    found, expected, gradient, expected_gradient = balancing("aux_loss")
    assert abs(found / expected - 1) > 1e-2
    assert (gradient - expected_gradient).norm() > 0.1 * expected_gradient.norm()


class Seen:
    """What goes through an MoE layer: input and output, weights, map, and the rows that its experts compute."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        layer.register_forward_hook(self._layer)
        layer.router.register_forward_hook(self._router)
        layer.experts.register_forward_pre_hook(self._experts)

    def _layer(self, layer, args, output):
        self.x_TH, self.y_TH = args[0].detach().flatten(0, 1), output[0].detach().flatten(0, 1)

    def _router(self, router, args, output):
        self.weights_TE, self.map_TE = (tensor.detach() for tensor in output)

    def _experts(self, experts, args):
        self.rows, self.of_expert = len(args[0]), args[1].tolist()

    def expected(self) -> torch.Tensor:
        """The weighted sum over all experts, each run on all tokens, and the shared ones."""
        with torch.no_grad():
            sum_TH = torch.zeros_like(self.y_TH)
            for e, expert in enumerate(self.layer.experts.local_experts):
                sum_TH += expert(self.x_TH, self.weights_TE[:, e])[0]
            if self.layer.shared_experts is not None:
                sum_TH += self.layer.shared_experts(self.x_TH)
            return sum_TH


SHARED = ["--moe-shared-expert-intermediate-size", "32"]


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("more", [[], SHARED], ids=["routed", "shared"])
def test_experts_compute_the_rows_that_are_chosen_and_nothing_else(one_process, dispatcher, more):
    model = build(*NULL, "--moe-token-dispatcher-type", dispatcher, *more)
    seen = [Seen(layer) for layer in layers(model)]
    forward(model, 1).mean().backward()
    numbers = set()
    for layer in seen:
        assert layer.of_expert == layer.map_TE.sum(0).tolist() and layer.rows == layer.map_TE.sum()
        torch.testing.assert_close(layer.y_TH, layer.expected(), rtol=1e-5, atol=1e-6)
        counts = layer.map_TE.sum(-1)
        assert len(counts) == S * B
        torch.testing.assert_close(layer.weights_TE.sum(-1), (counts > 0).float())
        if not more:
            assert not layer.y_TH[counts == 0].any() and layer.y_TH[counts > 0].any(-1).all()
        numbers |= set(counts.tolist())
    assert numbers == {0, 1, K}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_token_may_choose_more_than_there_are_experts(one_process):
    """Top-k of E + M above E."""
    model = build(*NULL, "--moe-router-topk", "7")
    seen = [Seen(layer) for layer in layers(model)]
    forward(model, 1).mean().backward()
    for layer in seen:
        assert layer.of_expert == layer.map_TE.sum(0).tolist() and layer.map_TE.sum(-1).max() == E
        torch.testing.assert_close(layer.y_TH, layer.expected(), rtol=1e-5, atol=1e-6)


def test_weights_over_all_that_are_chosen_are_noticed(one_process, monkeypatch):
    """The planted fault: null experts keep their part of the weight."""

    def over_all(logits_TN, chosen_TN, experts, score_function):
        return logits_TN.masked_fill(~chosen_TN, -torch.inf).softmax(-1)[:, :experts]

    monkeypatch.setattr(null_router, "real_weights", over_all)
    model = build(*NULL)
    seen = [Seen(layer) for layer in layers(model)]
    forward(model, 1)
    sums = torch.cat([layer.weights_TE.sum(-1)[layer.map_TE.any(-1)] for layer in seen])
    assert (sums - 1).abs().max() > 0.1


def test_rows_of_top_k_experts_a_token_are_noticed(one_process, monkeypatch):
    """Upstream's all-to-all sends K rows a token whatever the map says."""
    from megatron.core.transformer.moe import moe_layer
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    model = build(*NULL)
    for layer in layers(model):
        assert isinstance(layer.token_dispatcher, moe_layer.MoEAlltoAllTokenDispatcher)
        layer.token_dispatcher.__class__ = MoEAlltoAllTokenDispatcher
    with pytest.raises(RuntimeError):
        forward(model, 1)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_a_layer_whose_tokens_all_choose_null_experts(one_process, dispatcher):
    """No row at all: zeros, and gradients that are zeros, not NaN; the balancing loss still has one."""
    model = build(*NULL, *of_type("linear"), "--moe-token-dispatcher-type", dispatcher)
    layer = layers(model)[2]
    seen = Seen(layer)
    layer.router.register_forward_pre_hook(lambda router, args: (args[0].abs(),))
    with torch.no_grad():
        layer.router.weight[:E].fill_(-1.0)
        layer.router.weight[E:].fill_(1.0)
    forward(model, 1).mean().backward()
    assert seen.rows == 0 and not seen.y_TH.any()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert not any(parameter.grad.any() for parameter in layer.experts.parameters())
    assert layer.router.weight.grad.any()


@pytest.mark.parametrize("name", router_types())
def test_every_router_type_has_them(one_process, name):
    check_router(build(*NULL, *of_type(name)))


@pytest.mark.parametrize(
    "words",
    [
        "--moe-router-residual 0.5 --moe-z-loss-coeff=null",
        "--moe-router-recurrence none --moe-router-residual 1 --moe-z-loss-coeff=null",
        "--moe-router-head xmoe",
    ],
)
def test_so_have_the_modifiers(one_process, words):
    check_router(build(*NULL, *words.split()))


def check_router(model) -> None:
    """Every layer has E + M logits, and its router's parameters are trained."""
    logits = []
    for layer in layers(model):
        assert isinstance(layer.router, NullExperts)
        routing = layer.router.routing
        layer.router.routing = lambda x, *a, routing=routing, **k: (logits.append(x.shape[-1]), routing(x, *a, **k))[1]
    forward(model, 1).mean().backward()
    assert logits == [E + M] * L
    for parameter_name, parameter in model.named_parameters():
        if ".router." in parameter_name and parameter.requires_grad:
            assert parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.any() or ".layers.0." in parameter_name, parameter_name  # eda's gamma: h_0 = 0


@pytest.mark.parametrize("name", ["gru", "linear"])
@pytest.mark.parametrize("recompute", [FULL_RECOMPUTE, MOE_RECOMPUTE], ids=["full", "moe"])
def test_recompute_changes_nothing(one_process, name, recompute):
    model, recomputing = build(*NULL, *of_type(name)), build(*NULL, *of_type(name), *recompute)
    recomputing.load_state_dict(model.state_dict())
    for one in (model, recomputing):
        forward(one, 1).mean().backward()
    for (parameter_name, ours), theirs in zip(model.named_parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=parameter_name)


@pytest.mark.parametrize("fan_in", [False, True])
def test_the_linear_router_has_a_row_for_each(one_process, fan_in):
    model = build(*NULL, *of_type("linear"), *["--moe-router-init", "fan_in"] * fan_in)
    for layer in layers(model):
        weight = layer.router.weight
        assert weight.shape == (E + M, 48) and weight.requires_grad
        spread = weight.std(-1).detach()
        assert (spread > 0.5 * spread.mean()).all() and (spread < 2 * spread.mean()).all()  # each row is drawn
        assert (weight.abs().max() <= 48**-0.5) == fan_in


def test_without_them_nothing_is_another(one_process):
    kinds = {type(module) for module in build("--moe-null-experts", "0", *of_type("linear")).modules()}
    assert not any(issubclass(kind, NullExperts) for kind in kinds)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_weights_are_scaled(one_process, score_function):
    model = build(*NULL, "--moe-router-topk-scaling-factor", "2.5", "--moe-router-score-function", score_function)
    seen = [Seen(layer) for layer in layers(model)]
    forward(model, 1)
    for layer in seen:
        torch.testing.assert_close(layer.weights_TE.sum(-1), 2.5 * layer.map_TE.any(-1).float())


def test_megatrons_flops_count_the_experts_that_balanced_routing_gives(one_process):
    build(*NULL)  # installs the count
    args = argparse.Namespace(**vars(_arguments()))
    counted = training.num_floating_point_operations(args, 4)
    original = training.num_floating_point_operations.original
    args.moe_router_topk, of_one = 0, []
    for topk in (0, 1):
        args.moe_router_topk = topk
        of_one.append(original(args, 4))
    assert counted == pytest.approx(of_one[0] + (of_one[1] - of_one[0]) * K * E / (E + M), rel=1e-9)
    args.moe_router_topk, args.moe_null_experts = K, 0
    assert training.num_floating_point_operations(args, 4) == original(args, 4)


def _arguments() -> argparse.Namespace:
    from rmoe_megablocks.megatron import arguments
    from tests.distributed.arguments import BASE

    args = arguments.parse([*BASE, *NULL, "--eval-interval", "100"])
    arguments.fill_defaults(args)
    arguments.validate(args)
    args.padded_vocab_size = VOCABULARY
    return args


def test_health_is_that_of_the_real_experts(one_process):
    model = build(*NULL)
    health, logits = RoutingHealth(L, 0, E, M, K), []
    health.watch([model])
    seen = [Seen(layer) for layer in layers(model)]
    for layer in layers(model):
        routing = layer.router.routing
        layer.router.routing = lambda x, *a, routing=routing, **k: (logits.append(x), routing(x, *a, **k))[1]
    tokens, positions, labels = batch(1)
    model(tokens, positions, None, labels=labels)
    report = health.report()
    kept = torch.ones(S, B, dtype=torch.bool)
    for index, layer in enumerate(seen):
        counts = layer.map_TE.sum(0).double()
        assert report["real_experts_per_token"][index] == pytest.approx(counts.sum().item() / (S * B))
        assert report["busiest_expert_share"][index] == pytest.approx((counts.max() / counts.sum()).item())
        expected = reference_loss(logits[index].detach(), "aux_loss", kept).item()
        assert report["load_balancing_loss"][index] == pytest.approx(expected, rel=1e-5)
        scores = logits[index].detach().double().softmax(-1)
        entropy = -(scores * scores.log()).sum(-1).mean().item()
        assert report["router_entropy"][index] == pytest.approx(entropy, rel=1e-5)
