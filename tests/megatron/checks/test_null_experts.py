"""--moe-null-experts: what it is not combined with, and the checkpoints that it belongs to."""

import pytest

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments
from rmoe_megablocks.megatron.checkpoints import compatibility
from tests.distributed.arguments import BASE, LINEAR, of_type

NULL = ["--moe-null-experts", "5"]
_NO_LOSS = " --moe-aux-loss-coeff 0"
REFUSED = {
    "--moe-router-topk 10": "--moe-router-topk 10: there are only 4 experts and 5 null experts to choose from",
    "--moe-router-load-balancing-type sinkhorn" + _NO_LOSS: "it would balance null experts one by one",
    "--moe-router-load-balancing-type quantile_balancing" + _NO_LOSS: "it would balance null experts one by one",
    "--moe-router-load-balancing-type aux_loss sinkhorn --moe-aux-loss-coeff 1 0": "it would balance null experts",
    "--moe-router-score-function sqrtsoftplus": "--moe-router-score-function sqrtsoftplus: use softmax or sigmoid",
    "--moe-router-pre-softmax": "--moe-router-pre-softmax: weights are normalised over the chosen real experts",
    "--moe-router-topk 1 --moe-router-score-function sigmoid": "the one real expert's weight would be 1",
    "--moe-router-num-groups 2 --moe-router-group-topk 1": "--moe-router-num-groups",
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias": "--moe-router-enable-expert-bias",
    "--moe-router-fusion": "--moe-router-fusion",
    "--moe-enable-routing-replay": "--moe-enable-routing-replay",
    "--moe-routing-trace-path trace": "--moe-routing-trace-path",
    "--moe-router-force-load-balancing": "--moe-router-force-load-balancing",
    "--moe-router-force-biased 1.0": "--moe-router-force-biased",
    "--moe-expert-capacity-factor 1.0": "--moe-expert-capacity-factor",
    "--moe-router-padding-for-quantization": "--moe-router-padding-for-quantization",
    "--moe-token-dispatcher-type flex": "--moe-token-dispatcher-type flex: use alltoall or allgather",
    "--moe-permute-fusion": "--moe-permute-fusion",
    "--moe-shared-expert-intermediate-size 32 --moe-shared-expert-overlap": "--moe-shared-expert-overlap",
    "--moe-latent-size 32": "--moe-latent-size",
    "--mtp-num-layers 1": "--mtp-num-layers",
    "--cuda-graph-impl local": "--cuda-graph-impl: a token's number of experts varies",
    "--use-megatron-fsdp": "--use-megatron-fsdp",
    "--transformer-impl inference_optimized": "--transformer-impl inference_optimized: use local",
    "--spec a b": "--spec: its layers bring their own router",
    "--fp8-format hybrid": "--fp8-format and --fp4-format: use --bf16",
}


@pytest.mark.parametrize("router", ["gru", "linear"])
@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_proven_is_refused_by_name(words, router):
    args = arguments.parse([*BASE, *(LINEAR if router == "linear" else []), *NULL, *words.split()])
    with pytest.raises(UsageError) as caught:
        arguments.check_router_arguments(args)
        arguments.values.check_together(args)
    assert REFUSED[words] in str(caught.value) and "\n" not in str(caught.value)
    assert "topk 10" in words or str(caught.value).startswith("--moe-null-experts does not work with ")


def test_a_type_that_cannot_have_so_many_logits_says_what_they_are():
    args = arguments.parse([*BASE, *of_type("product_key"), "--moe-null-experts", "4"])
    with pytest.raises(UsageError, match="as 16 or 64, got 8 .4 experts and 4 null experts."):
        arguments.check_router_arguments(args)


@pytest.mark.parametrize(
    "words",
    [
        "--moe-router-load-balancing-type none",
        "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 1 1",
        "--moe-router-topk 9",
        "--moe-router-score-function sigmoid --moe-router-topk-scaling-factor 2.5",
        "--moe-token-dispatcher-type allgather",
        "--moe-router-dtype fp64",
        "--moe-aux-loss-reduction mean",
    ],
)
def test_what_is_goes_through(words):
    args = arguments.parse([*BASE, *NULL, *words.split(), "--eval-interval", "100"])
    arguments.fill_defaults(args)
    arguments.validate(args)


@pytest.mark.parametrize(
    ("saved", "asked", "refused"), [(5, 5, False), (0, 0, False), (None, 0, False), (5, 0, True), (None, 5, True)]
)
def test_a_checkpoint_belongs_to_its_number(monkeypatch, tmp_path, saved, asked, refused):
    theirs, ours = (arguments.parse([*BASE, "--moe-null-experts", str(n or 0)]) for n in (saved, asked))
    if saved is None:
        del theirs.moe_null_experts  # before there was the argument
    monkeypatch.setattr(compatibility, "saved_arguments", lambda folder, step: theirs)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    ours.load = str(tmp_path)
    if not refused:
        compatibility.check_router_matches(ours)
        return
    words = f"was trained with --moe-null-experts {saved or 0}, this run has {asked}"
    with pytest.raises(UsageError, match=words):
        compatibility.check_router_matches(ours)
