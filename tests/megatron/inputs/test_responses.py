"""Prompts in Megatron's packed samples: their labels have no gradient, and the loss is a mean without them."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss

from rmoe_megablocks.data import prepare
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import existing_job
from rmoe_megablocks.megatron.inputs import batches, responses
from rmoe_megablocks.megatron.inputs.responses import ResponseDataset
from tests.distributed.arguments import BASE, CP2
from tests.distributed.lab import deviation, run_groups
from tests.ports import free_port

LENGTH, END = 48, 256
LINE = "### response:"  # prompts have no capital letter, answers nothing else


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Rows of a prompt and an answer, of many lengths."""
    place, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    rows = [
        {"text": "".join(rng.choice(list("abc \n"), n)) + f"\n{LINE}\n" + "".join(rng.choice(list("XYZ"), m))}
        for n, m in rng.integers(0, 60, (40, 2))
    ]
    (place / "rows.json").write_text(json.dumps(rows))
    prepare([place / "rows.json"], place / "out", split="100%,0,0", json_key="text", append_eod=True, loss_after=LINE)
    return str(place / "out" / "train")


@pytest.fixture(scope="module", autouse=True)
def group():
    torch.distributed.init_process_group("gloo", init_method=f"tcp://localhost:{free_port()}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def arguments(**others) -> SimpleNamespace:
    """A run's, as far as data and loss depend on them."""
    places = "data_path data_args_path train_data_path valid_data_path test_data_path per_split_data_args_path".split()
    plain = {"mock_data": False, "context_parallel_size": 1, "calculate_per_token_loss": False, "mtp_num_layers": None}
    plain |= {"stop_on_nonfinite": False, "check_for_nan_in_loss_and_grad": False}
    return SimpleNamespace(**dict.fromkeys(places) | plain | others)


def dataset(prefix, kind=None) -> GPTDataset:
    """Three epochs of samples, as the entry builds them."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        blend_per_split=[([prefix], None), None, None],
        tokenizer=SimpleNamespace(vocab_size=257, eod=END, pad=-1, unique_identifiers={"class": "test"}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    kind = kind or batches._kind(arguments(train_data_path=[prefix]))
    return BlendedMegatronDatasetBuilder(kind, [120, 0, 0], lambda: True, config).build()[0]


def learnt(labels):
    """By the text alone: capital letters, and the end of a row."""
    return ((labels >= ord("A")) & (labels <= ord("Z"))) | (labels == END)


def test_the_mask_lies_as_the_labels_do(prefix):
    found, plain = dataset(prefix), dataset(prefix, GPTDataset)
    assert type(found) is ResponseDataset and len(found) == len(plain) >= 120
    for number in range(len(found)):
        ours, theirs = found[number], plain[number]
        assert (ours["loss_mask"].bool() == learnt(ours["labels"])).all()
        for key in ("tokens", "labels", "position_ids"):
            assert (ours[key] == theirs[key]).all()
        assert (theirs["loss_mask"] == 1).all()
    assert not found[None]["loss_mask"].any()


def test_without_a_mask_it_is_megatrons_own(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "abc" * 99}]))
    prepare([tmp_path / "rows.json"], tmp_path / "out", split="100%,0,0", json_key="text", append_eod=True)
    assert type(dataset(str(tmp_path / "out" / "train"))) is GPTDataset


def test_loss_and_gradient(prefix, monkeypatch):
    monkeypatch.setattr(batches, "get_args", arguments)
    found = dataset(prefix)
    samples = [found[number] for number in range(4)]
    mask_BS, labels_BS = (torch.stack([sample[key] for sample in samples]) for key in ("loss_mask", "labels"))
    logits_BSV = torch.randn(4, LENGTH, 257, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses_BS = torch.nn.functional.cross_entropy(logits_BSV.transpose(1, 2), labels_BS, reduction="none")
    config = SimpleNamespace(
        calculate_per_token_loss=False, timers=None, num_moe_experts=None, mtp_num_layers=None,
        experimental_attention_variant=None, csa_compress_ratios=None,
    )  # fmt: skip
    reported = []
    loss, tokens = forward_step_calc_loss(
        None, losses_BS, lambda output: batches.loss_func(mask_BS, output), config, None, False, 1, reported,
        cp_group_size=1, is_last_stage=True,
    )  # fmt: skip
    counts_BS = learnt(labels_BS)
    assert 0 < counts_BS.sum() < counts_BS.numel() and tokens == counts_BS.sum()
    torch.testing.assert_close(loss, losses_BS[counts_BS].mean(), rtol=0, atol=1e-6)
    assert reported[0]["lm loss"][1] == counts_BS.sum()
    loss.backward()
    at_BS = logits_BSV.grad.abs().amax(-1)
    assert (at_BS[~counts_BS] == 0).all() and (at_BS[counts_BS] > 0).all()


def test_a_stock_script_is_refused(prefix):
    """Its own dataset would count the prompts."""
    existing_job._check_no_prompts(arguments())
    with pytest.raises(UsageError, match=r"train\.mask: the dataset leaves prompts out of the loss"):
        existing_job._check_no_prompts(arguments(train_data_path=[prefix]))


@pytest.mark.parametrize(
    "others, told",
    [
        ({"calculate_per_token_loss": True}, "--calculate-per-token-loss does not work with"),
        ({"context_parallel_size": 2, "mtp_num_layers": 1}, "--mtp-num-layers with --context-parallel-size 2 does not"),
    ],
    ids=range(2),
)
def test_what_counts_other_tokens_is_refused(prefix, others, told):
    responses.check(arguments(**others))
    responses.check(arguments(train_data_path=[prefix]))
    with pytest.raises(UsageError, match=told):
        responses.check(arguments(train_data_path=[prefix], **others))


def test_layouts_weigh_a_token_alike(prefix, tmp_path):
    """Context-parallel ranks have other numbers of predicted tokens in one sequence; data-parallel ones, of a batch."""
    words = [word for word in BASE if word not in ("--mock-data", "--tokenizer-type", "NullTokenizer")]
    words[words.index("--vocab-size") + 1] = "257"
    words += ["--dataset", str(Path(prefix).parent), "--runs-dir", str(tmp_path / "runs")]
    start = ["--load", str(tmp_path / "start"), "--finetune", "--no-load-optim", "--no-load-rng", "--no-checkpoints"]
    layouts = {
        "start": ["--save", str(tmp_path / "start"), "--train-iters", "1", "--lr", "0", "--min-lr", "0"],
        **{name: [*start, "--train-iters", "4", *argv] for name, argv in (("one", []), ("CP2", CP2), ("DP2", []))},
    }
    cases = {
        name: {"name": name, "argv": [*words, "--run-name", name, *argv], "collect": []}
        for name, argv in layouts.items()
    }
    rounds = [[(1, [cases["start"]])], [(1, [cases["one"]]), (2, [cases["CP2"], cases["DP2"]])]]
    results = run_groups(tmp_path, rounds)
    for name in ("CP2", "DP2"):
        assert deviation(results["one"][0], results[name][0]) < 5e-6, name
