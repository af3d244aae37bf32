"""Which window predicts which token of a text: every token but the first once, none left out, none counted twice."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """One forward pass: ``tokens[start:end]`` go in and predict ``tokens[start + 1 : end + 1]``.

    Attributes:
        scored: how many of the predictions count, the last ones: an earlier window has made those before them.
    """

    start: int
    end: int
    scored: int

    @property
    def length(self) -> int:
        """Tokens that go in."""
        return self.end - self.start


class Windows(Sequence[Window]):
    """All windows of a text: the i-th begins at token ``i * stride``, the last one ends with the text.

    With ``stride == length`` each window's predictions count, as in the evaluation that ends a training run; with less
    a prediction has seen at least ``length - stride`` tokens before it, except in the first window (the sliding window
    of transformers' page on perplexity, where each window's first token would be left out).

    Args:
        predicted: tokens of the text without the first one, which nothing predicts.
        length: the most tokens that go in at once.
        stride: between windows, 1 to ``length``.

    Raises:
        ValueError: a size out of its range.
    """

    def __init__(self, predicted: int, length: int, stride: int) -> None:
        if predicted < 1:
            raise ValueError(f"{predicted} tokens to predict")
        if not 1 <= stride <= length:
            raise ValueError(f"a stride of {stride} for windows of {length}: expected 1 to {length}")
        self.predicted, self.size, self.stride = predicted, length, stride

    def __len__(self) -> int:
        return 1 + max(0, -(-(self.predicted - self.size) // self.stride))

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.stride
        end = min(start + self.size, self.predicted)
        before = start - self.stride + self.size if index else 0
        return Window(start, end, end - before)
