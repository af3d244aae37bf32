"""Windows: hand-computed losses, every token once, and those of the evaluation that ends a training run."""

import argparse
import itertools
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rmoe_megablocks.evaluation.prediction import Processes, batch_of, predict
from rmoe_megablocks.evaluation.windows import Window, Windows
from rmoe_megablocks.megatron.monitoring import evaluation

HERE = Processes("cpu")


class OfPlace(torch.nn.Module):
    """Probabilities that depend on the place in the window alone: the last row of the table from there on."""

    def __init__(self, *table) -> None:
        super().__init__()
        self.logits = torch.tensor(table).log()
        self.calls = 0

    def forward(self, input_ids, use_cache):
        self.calls += 1
        places = torch.arange(input_ids.shape[1]).clamp(max=len(self.logits) - 1)
        return SimpleNamespace(logits=self.logits[places].expand(len(input_ids), -1, -1))


HALF_FIRST, HALF_LAST = (0.5, 0.25, 0.25), (0.125, 0.375, 0.5)
# Windows of two tokens. The first one predicts 1 (1/4, in the first place) and 2 (1/2, in the second): 2 + 1 bits.
# Of stride 1 the second one counts only its second place's 2: 1 bit. Of stride 2 it has a first place alone: 2 bits.
TOKENS = np.array([0, 1, 2, 2], np.uint8)


@pytest.mark.parametrize("stride, bits", [(1, 4), (2, 5)])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_by_hand(stride, bits, batch):
    done = predict(OfPlace(HALF_FIRST, HALF_LAST), TOKENS, Windows(3, 2, stride), batch, HERE)
    assert done.nats == pytest.approx(bits * math.log(2), abs=1e-6)
    assert (done.tokens, done.interrupted) == (3, False)


def test_by_hand_in_numbers():
    assert list(Windows(3, 2, 1)) == [Window(0, 2, 2), Window(1, 3, 1)]
    assert list(Windows(3, 2, 2)) == [Window(0, 2, 2), Window(2, 3, 1)]
    ids, labels = batch_of(TOKENS, list(Windows(3, 2, 1)))
    assert ids.tolist() == [[0, 1], [1, 2]] and labels.tolist() == [[1, 2], [-100, 2]]


def test_every_token_once():
    for predicted, length in itertools.product(range(1, 14), range(1, 7)):
        for stride in range(1, length + 1):
            windows = list(Windows(predicted, length, stride))
            scored = [label for w in windows for label in range(w.end + 1 - w.scored, w.end + 1)]
            assert scored == list(range(1, predicted + 1))
            assert all(0 < w.length <= length and w.scored > 0 for w in windows)
            assert all(w.end + 1 - w.scored - w.start > length - stride for w in windows[1:])


@pytest.mark.parametrize("sizes", [(0, 2, 1), (3, 2, 0), (3, 2, 3)])
def test_sizes(sizes):
    with pytest.raises(ValueError):
        Windows(*sizes)


@pytest.mark.parametrize("size", [256, 61])
def test_uniform_logits(size):
    tokens = np.random.default_rng(0).integers(0, size, 101)
    done = predict(OfPlace([1.0] * size), tokens, Windows(100, 16, 4), 3, HERE)
    assert done.nats / math.log(2) / 100 == pytest.approx(math.log2(size), abs=1e-6)


@pytest.mark.parametrize("tokens", [130, 129, 113, 5])
def test_as_at_the_end_of_a_run(monkeypatch, tokens):
    """The same rows as Megatron's evaluation gets; there the padding has a loss mask of 0."""
    text = np.random.default_rng(1).integers(0, 256, tokens)
    windows = Windows(tokens - 1, 16, 16)
    monkeypatch.setattr(evaluation.mpu, "get_data_parallel_rank", lambda: 0)
    monkeypatch.setattr(evaluation.mpu, "get_data_parallel_world_size", lambda: 1)
    args = argparse.Namespace(seq_length=16, eval_micro_batch_size=1, create_attention_mask_in_dataloader=False)
    theirs = list(evaluation._micro_batches(text, args, len(windows)))
    assert len(theirs) == len(windows)
    for window, batch in zip(windows, theirs, strict=True):
        ids, labels = batch_of(text, [window])
        kept = batch["loss_mask"][0] == 1
        assert ids[0].tolist() == batch["tokens"][0][kept].tolist()
        assert labels[0].tolist() == batch["labels"][0][kept].tolist()


def test_an_interruption_leaves_what_is_done():
    class Interrupts(OfPlace):
        def forward(self, **inputs):
            if self.calls == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(**inputs)

    before = signal.getsignal(signal.SIGINT)
    seen = []
    done = predict(Interrupts([0.5, 0.5]), np.zeros(1001, np.uint8), Windows(1000, 10, 10), 5, HERE, seen.append)
    assert done.interrupted and done.tokens == 150 and seen == [50, 50, 50]
    assert done.nats == pytest.approx(150 * math.log(2), abs=1e-4)
    assert signal.getsignal(signal.SIGINT) is before
