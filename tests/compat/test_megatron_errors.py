"""Megatron's assertions in the words of a command line."""

import argparse

import pytest
import torch

from rmoe_megablocks.compat.megatron.errors import explain, in_one_line, is_refusal, lost_contact, out_of_memory
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments
from tests.distributed.arguments import BASE

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # isort: skip  after CPU mode
from megatron.training.arguments import validate_args  # isort: skip

SAID = {
    # a condition in a branch, with options in the place of attributes, and their values
    "--overlap-param-gather-with-optimizer-step": "--overlap-param-gather-with-optimizer-step only supported with",
    "--hidden-size 50": "Megatron requires --hidden-size % --num-attention-heads == 0 with no --kv-channels, but was "
    "given no --kv-channels, --hidden-size 50, --num-attention-heads 4 (arguments.py:",
    "--weight-decay-incr-style linear": "Megatron requires --start-weight-decay with not --weight-decay-incr-style == "
    "'constant', but was given --weight-decay-incr-style linear, no --start-weight-decay (arguments.py:",
    "--fp16 --bf16": "Megatron requires no --bf16 with --fp16, but was given --fp16, --bf16 (arguments.py:",
    "--lr 1e-5": "Megatron requires --min-lr <= --lr, but was given --min-lr 0.0001, --lr 1e-05 (arguments.py:",
    # a message, which gets the options that it is about
    "--train-samples 9": "expected iteration-based training (--train-iters 10, no --skip-train, --train-samples 9)",
    "--global-batch-size 3": "must be divisible by eval_micro_batch_size (2) * data_parallel_size (1) "
    "(--eval-global-batch-size 3, --eval-micro-batch-size 2)",
}


@pytest.mark.parametrize("words", SAID)
def test_a_refusal_of_megatrons(words, capsys):
    args = arguments.parse([*BASE, *words.split()])
    arguments.fill_defaults(args)
    with pytest.raises((AssertionError, ValueError)) as caught:
        validate_args(args, {})
    assert is_refusal(caught.value)
    assert SAID[words] in explain(caught.value, args)


def test_other_names_of_the_same_argument():
    values = dict(init_lr=1.0, max_lr=0.5, min_lr=0.0, lr_warmup_steps=0, lr_decay_steps=9, lr_decay_style="linear")
    with pytest.raises(AssertionError) as caught:
        OptimizerParamScheduler(None, **values, start_wd=0, end_wd=0, wd_incr_steps=1, wd_incr_style="constant")
    said = explain(caught.value, argparse.Namespace(lr=0.5, lr_warmup_init=1.0))
    assert said.startswith("Megatron requires --lr-warmup-init <= --lr, but was given --lr-warmup-init 1.0, --lr 0.5")


def test_a_mistake_of_ours_is_none():
    with pytest.raises(TypeError) as caught:
        len(None)
    assert not is_refusal(caught.value)
    with pytest.raises(TypeError), in_one_line(argparse.Namespace()):
        len(None)


def test_a_slip_inside_megatron_is_one():
    with pytest.raises(TypeError) as caught:
        OptimizerParamScheduler(None, 0.0, None, 0.0, 0, 9, "linear", 0, 0, 1, "constant")
    assert is_refusal(caught.value)


def test_options_for_a_message_without_any():
    with (
        pytest.raises(UsageError, match="^--tokenizer-model x: no such thing$"),
        in_one_line(None, "--tokenizer-model x"),
    ):
        raise ValueError("no such thing")


def test_a_cause_is_told():
    error = ValueError("the data set cannot be built")
    error.__cause__ = MemoryError("4 TB")
    assert explain(error, None) == "the data set cannot be built (MemoryError: 4 TB)"


def test_errors_that_are_no_refusals():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62)
    assert out_of_memory(caught.value) and out_of_memory(MemoryError()) and not is_refusal(caught.value)
    lost = ValueError("cannot go on")
    lost.__context__ = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert lost_contact(lost) and not lost_contact(ValueError("x")) and not out_of_memory(lost)
