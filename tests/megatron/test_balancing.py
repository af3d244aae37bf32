"""The weight of the load-balancing loss: four definitions measured on one batch, and the option that changes it."""

import argparse

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import gpt_config_from_args

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments, balancing, existing_job
from tests.distributed.arguments import BASE, LINEAR, of_type
from tests.megatron.recurrence.test_model import build, gradients, routers

L, E, K = 4, 4, 2
COEFFICIENT = 0.01


def with_coefficient(value: float, *more: str):
    return build("--moe-aux-loss-coeff", str(value), "--moe-z-loss-coeff=null", *more)


def logits_of(model) -> list[torch.Tensor]:
    """Every layer's logits [T, E] in the forward pass that :func:`gradients` runs."""
    seen = []
    for router in routers(model):
        router.routing_layer.register_forward_hook(
            lambda module, args, output: seen.append(output[0].detach().reshape(-1, E))
        )
    return seen


def megatron(logits: list[torch.Tensor]) -> float:
    return sum(of_layer(layer) for layer in logits)


def of_layer(logits_TE: torch.Tensor) -> float:
    scores = logits_TE.softmax(-1)
    share = scores.topk(K).indices.flatten().bincount(minlength=E) / (len(scores) * K)
    return (E * share @ scores.mean(0)).item()


def megablocks(logits: list[torch.Tensor]) -> float:
    """By MegaBlocks' own function."""
    pytest.importorskip("stk", reason="MegaBlocks is not installed (rmoe install megablocks)")
    from rmoe_megablocks import megablocks as rmoe  # isort: skip  before MegaBlocks
    from megablocks.layers import moe

    for layer in logits:
        scores = layer.softmax(-1)
        moe.save_load_balancing_loss((scores.topk(K).indices.flatten().bincount(minlength=E), scores))
    args = rmoe.Arguments(num_layers=L, moe_num_experts=E, moe_top_k=K, moe_loss_weight=1.0, fp16=False)
    loss = moe.batched_load_balancing_loss(args).item()
    moe.clear_load_balancing_loss()
    return loss


def released(logits: list[torch.Tensor]) -> float:
    """E * sum over the K places and the experts of (share of tokens with the expert there) * (mean score), over the
    tokens of all layers at once: the function of the released Llama-style model code."""
    scores = torch.cat(logits).softmax(-1)
    places_KE = torch.nn.functional.one_hot(scores.topk(K).indices, E).float().mean(0)
    return (E * (places_KE * scores.mean(0)).sum()).item()


def small_models(logits: list[torch.Tensor]) -> float:
    """CompeteSMoE's: shares and scores are both divided by the number of choices, T * K."""
    total = 0.0
    for layer in logits:
        scores = layer.softmax(-1)
        choices = scores.topk(K).indices.flatten()
        total += (E * (choices.bincount(minlength=E) / len(choices)) @ (scores.sum(0) / len(choices))).item()
    return total


def test_four_definitions_on_one_batch(one_process):
    model = with_coefficient(COEFFICIENT)
    logits = logits_of(model)
    gradients(model)
    (values,) = [entry.values for entry in get_moe_metrics_tracker().metrics.values() if len(entry.values) == L]
    assert values.sum().item() == pytest.approx(megatron(logits), rel=1e-5)  # what Megatron itself has recorded
    total = megatron(logits)
    assert total / megablocks(logits) == pytest.approx(L, rel=1e-5)
    assert total / small_models(logits) == pytest.approx(K, rel=1e-5)
    # layers that prefer other experts even each other out where all are pooled: below the mean, up to the factor K
    assert released(logits) == pytest.approx(K * of_layer(torch.cat(logits)), rel=1e-5)
    assert 0.9 * K < released(logits) / megablocks(logits) < K


def test_balanced_they_are_l_1_k_and_l_over_k():
    logits = [torch.eye(E).repeat(8, 1) + torch.eye(E).roll(1, 1).repeat(8, 1) * 0.5] * L
    found = [definition(logits) for definition in (megatron, megablocks, released, small_models)]
    assert found == pytest.approx([L, 1, K, L / K], rel=1e-5)


@pytest.mark.parametrize("router_type", ["gru", "linear"])
def test_the_mean_is_a_sum_of_a_share_of_the_coefficient(one_process, router_type):
    type_of = of_type(router_type)
    mean = with_coefficient(1.0, "--moe-aux-loss-reduction", "mean", *type_of)
    share, whole, none = (with_coefficient(value, *type_of) for value in (1.0 / L, 1.0, 0.0))
    for model in (share, whole, none):
        model.load_state_dict(mean.state_dict())
    found, expected, whole, none = (gradients(model) for model in (mean, share, whole, none))
    (name,) = [name for name in found if "layers.1." in name and ("projector" in name or "router.weight" in name)]
    assert (whole[name] - none[name]).norm() > 1e-3 * none[name].norm()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
        of_mean, of_sum = gradient - none[name], whole[name] - none[name]
        torch.testing.assert_close(L * of_mean, of_sum, rtol=1e-3, atol=1e-5 * whole[name].abs().max().item())


def test_what_is_logged_is_the_same_with_both(one_process):
    sums, means = (with_coefficient(COEFFICIENT, "--moe-aux-loss-reduction", name) for name in balancing.REDUCTIONS)
    means.load_state_dict(sums.state_dict())
    logged = []
    for model in (sums, means):
        gradients(model)
        logged.append(get_moe_metrics_tracker().metrics["load_balancing_loss"].values.clone())
        get_moe_metrics_tracker().clear()
    assert logged[0].min() >= 0.9  # each layer's loss without its weight
    torch.testing.assert_close(logged[0], logged[1])


@pytest.mark.parametrize(
    ("frequency", "layers"), [(1, 6), (2, 3), (4, 2), ([0, 1, 1, 0, 1, 0], 3), ([1] * 6, 6)], ids=str
)
def test_dense_layers_are_not_counted(frequency, layers):
    config = TransformerConfig(
        num_layers=6, hidden_size=8, num_attention_heads=2, num_moe_experts=4, moe_layer_freq=frequency
    )
    args = argparse.Namespace(moe_aux_loss_reduction="mean", moe_aux_loss_coeff=[0.6, 0.3])
    balancing.apply_reduction(config, args)
    assert config.moe_aux_loss_coeff == pytest.approx([0.6 / layers, 0.3 / layers])


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("--num-experts=null --moe-router-type linear --moe-ffn-hidden-size=null", "no experts to balance"),
        ("--moe-aux-loss-coeff 0", "there is no load-balancing loss"),
        ("--moe-router-load-balancing-type none", "there is no load-balancing loss"),
        ("--moe-router-load-balancing-type sinkhorn", "there is no load-balancing loss"),
        ("--mtp-num-layers 1", "does not work with --mtp-num-layers"),
    ],
)
def test_a_mean_over_nothing_is_refused(typed, reason):
    args = arguments.parse([*BASE, "--moe-aux-loss-reduction", "mean", *typed.split()])
    with pytest.raises(UsageError, match=reason):
        arguments.check_router_arguments(args)
    args = arguments.parse([*BASE, "--moe-aux-loss-reduction", "sum", "--mtp-num-layers", "1"])
    arguments.check_router_arguments(args)


@pytest.mark.parametrize("reduction", balancing.REDUCTIONS)
def test_an_existing_job_with_megatrons_own_router_gets_it_too(one_process, monkeypatch, reduction):
    argv = [*BASE, "--eval-interval", "100", *LINEAR, "--moe-aux-loss-reduction", reduction]
    args = arguments.parse(argv)
    arguments.fill_defaults(args)
    arguments.validate(args)
    args.padded_vocab_size = 256
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *args.argv])
    model_config = gpt_config_from_args(args)
    existing_job.prepare_model(model_config, args)
    existing_job.prepare_model(model_config, args)  # a script that says it itself, under the wrapper
    assert model_config.transformer.moe_aux_loss_coeff == (0.25 if reduction == "mean" else 1.0)
    assert args.moe_aux_loss_coeff == 1.0
