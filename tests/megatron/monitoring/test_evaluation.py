"""The exact evaluation on one process, with a model that predicts each token at a loss of that token's own number.

tests/distributed compares layouts with real models.
"""

import argparse
import os
import signal

import numpy as np
import pytest
import torch
from megatron.training import training

from rmoe_megablocks.megatron.monitoring import evaluation, interruption
from rmoe_megablocks.megatron.monitoring.evaluation import Part, mean_loss
from rmoe_megablocks.megatron.monitoring.interruption import Interrupted, Interruption
from rmoe_megablocks.megatron.monitoring.progress import TokenProgress

SEQ_LENGTH = 8
ARGS = argparse.Namespace(
    seq_length=SEQ_LENGTH,
    eval_micro_batch_size=2,
    eval_global_batch_size=12,
    data_parallel_size=1,
    pipeline_model_parallel_size=1,
    create_attention_mask_in_dataloader=False,
    exit_duration_in_mins=None,
    exit_signal_handler=False,
    exit_signal=signal.SIGTERM,
)


@pytest.fixture
def model(one_process, monkeypatch):
    """A model for mean_loss; ``evaluate`` in it counts steps, and may be told to be late."""
    state = argparse.Namespace(steps=0, batches=[], late_after=None)

    def evaluate(forward_step, iterator, model, _, config, eval_iters):
        state.steps += eval_iters
        if state.late_after is not None and state.steps > state.late_after:
            return None, None, True
        loss = tokens = 0.0
        for _ in range(eval_iters * ARGS.eval_global_batch_size // ARGS.eval_micro_batch_size):
            batch = next(iterator)
            state.batches.append(batch)
            loss += (batch["labels"] * batch["loss_mask"]).sum()
            tokens += batch["loss_mask"].sum()
        return {"lm loss": loss / tokens}, None, False

    monkeypatch.setattr(training, "evaluate", evaluate)
    for module in (evaluation, interruption):
        monkeypatch.setattr(module, "get_args", lambda: ARGS)
    monkeypatch.setattr(evaluation, "get_model_config", lambda chunk: None)
    return state


@pytest.mark.parametrize("length", [2, 8, 9, 10, 17, 200, 1001])
def test_every_token_but_the_first_is_predicted_once(model, length):
    tokens = np.random.default_rng(length).integers(0, 256, length).astype(np.uint16)
    advances = []
    assert mean_loss([object()], tokens, advance=advances.append) == pytest.approx(tokens[1:].mean(), rel=1e-6)
    assert sum(advances) == length - 1
    labels = torch.cat([batch["labels"][batch["loss_mask"] == 1] for batch in model.batches])
    assert labels.tolist() == tokens[1:].tolist()
    assert ARGS.eval_global_batch_size == 12  # a step takes less of it, for a while


def test_nothing_to_predict_is_no_figure(model):
    with pytest.raises(ValueError, match="1 tokens: nothing to predict"):
        mean_loss([object()], np.zeros(1, np.uint16))


def test_a_signal_ends_it_and_another_handler_is_back_afterwards(model):
    before = signal.getsignal(signal.SIGTERM)
    told = []

    def advance(tokens: int) -> None:
        told.append(tokens)
        os.kill(os.getpid(), signal.SIGTERM)

    tokens = np.arange(2000) % 256
    with pytest.raises(Interrupted, match="by a signal") as caught, Interruption() as stop:
        mean_loss([object()], tokens, stop.check, advance)
    assert len(told) == 1  # a step, and no second one
    assert caught.value.done == told[0] < 1999
    assert caught.value.mean == pytest.approx(tokens[1 : told[0] + 1].mean(), rel=1e-6)  # of what was done
    assert signal.getsignal(signal.SIGTERM) is before


def test_work_of_one_rank_is_interrupted_where_it_is(model):
    with pytest.raises(Interrupted, match="by a signal"), Interruption() as stop:
        stop.alone()
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


def test_a_time_limit_is_no_loss_of_zero(model, monkeypatch):
    """Megatron's evaluate returns None then."""
    monkeypatch.setattr(ARGS, "exit_duration_in_mins", 5)
    model.late_after = 1
    with pytest.raises(Interrupted, match="by --exit-duration-in-mins 5") as caught:
        mean_loss([object()], np.arange(2000) % 256)
    assert (caught.value.mean is None) == (caught.value.done == 0)


def test_a_part_is_the_first_tokens_and_their_share_of_the_bytes():
    tokens = np.arange(101)
    part = Part.first(tokens, split_bytes=303, cap=40)
    assert (part.predicted, part.of, part.partial) == (40, 100, True)
    assert part.tokens.tolist() == list(range(41))
    assert part.bits_per_byte(np.log(2)) == pytest.approx(1 / 3)  # a bit a token of three bytes
    for cap in (None, 100, 1000):
        whole = Part.first(tokens, 303, cap)
        assert (whole.predicted, whole.partial) == (100, False)


def test_progress_off_a_terminal_is_lines_now_and_then(monkeypatch, capfd):
    clock = iter([0.0, 10.0, 40.0, 50.0, 80.0])
    monkeypatch.setattr("rmoe_megablocks.megatron.monitoring.progress.time.perf_counter", lambda: next(clock))
    said = []
    with TokenProgress("evaluating test", 4000, said.append) as progress:
        for _ in range(4):
            progress.update(1000)
    assert said == [
        "evaluating test | 2,000 of 4,000 tokens (50%) | left 00:40",
        "evaluating test | 4,000 of 4,000 tokens (100%) | left 00:00",
    ]
    assert capfd.readouterr().err == ""
