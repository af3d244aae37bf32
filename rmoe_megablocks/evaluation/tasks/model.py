"""The harness's own Hugging Face model around one that is loaded, and what it does not tell: told."""

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from rmoe_megablocks.errors import UsageError


class Model(HFLM):
    """Scores as HFLM does.

    Attributes:
        cut: by task, requests whose beginning was left out because the model has no positions for it.
        unknown: by task, requests with a token that stands for what the tokenizer does not know.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, folder: Path, batch_size: int) -> None:
        """Args: model: causal, in evaluation mode on its device."""
        # HFLM decodes this id to see whether a text begins with it: a tokenizer of bytes has neither of its two
        nothing = tokenizer.bos_token_id is None and tokenizer.eos_token_id is None
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            prefix_token_id=0 if nothing else None,
        )
        self.pretrained = os.fspath(folder.resolve())  # absolute, it is not taken for a name on the hub
        self.cut: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self._tasks: list[str] = []
        # some have one token for this and for an end or a beginning, which says nothing
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._unknown_id = None if tokenizer.unk_token_id in ends else tokenizer.unk_token_id

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each request. Raises UsageError."""
        self._tasks = [str(request.task_name) for request in requests]
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list, *others: Any, **options: Any) -> list[tuple[float, bool]]:
        size = self.model.get_input_embeddings().num_embeddings
        for task, (_, context, continuation) in zip(self._tasks, requests, strict=True):
            self._check(task, context, continuation, size)
        found = super()._loglikelihood_tokens(requests, *others, **options)
        for task, (value, _) in zip(self._tasks, found, strict=True):
            if not math.isfinite(value):
                raise UsageError(f"{self.pretrained}: a log-likelihood of {task} is {value}; look at the weights")
        return found

    def _check(self, task: str, context: list[int], continuation: list[int], size: int) -> None:
        if not context or not continuation:
            raise UsageError(f"{task}: the tokenizer makes no token of a question or an answer, so nothing is scored")
        largest = max(*context, *continuation)
        if largest >= size:
            raise UsageError(f"{task}: the tokenizer gives the id {largest}, the model has {size:,}")
        if len(continuation) > self.max_length:
            raise UsageError(
                f"{task}: an answer takes {len(continuation):,} tokens, the model has {self.max_length:,} positions"
            )
        self.cut[task] += len(context) + len(continuation) > self.max_length + 1
        self.unknown[task] += self._unknown_id in (*context, *continuation)
