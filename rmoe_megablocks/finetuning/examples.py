"""Rows as token ids and labels: what is predicted is what the assistant says, and the end of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation.texts import is_bytes
from rmoe_megablocks.finetuning.rows import ASSISTANT, SYSTEM, USER, Message, Row

LEFT_OUT = -100
#: the plain template's headings, each on a line of its own
HEADINGS = {SYSTEM: "### System:\n", USER: "### Instruction:\n", ASSISTANT: "### Response:\n"}
_BETWEEN = "\n\n"
_NUL = 0  # ends a response of a tokenizer of bytes that has no token for it: no text has this byte


@dataclass(frozen=True)
class Examples:
    """Attributes:
    ids, labels: of each example that is kept, of one length; a label is the id itself or LEFT_OUT.
    skipped: rows without any label within the sequence.
    cut: rows whose end is beyond it.
    """

    ids: list[list[int]]
    labels: list[list[int]]
    skipped: int
    cut: int

    @property
    def predicted(self) -> int:
        """Labels in all."""
        return sum(label != LEFT_OUT for labels in self.labels for label in labels[1:])


def end_of_response(tokenizer: Any) -> int:
    """The id that ends a response. Raises UsageError for a tokenizer that has none."""
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    if is_bytes(tokenizer):
        return _NUL
    raise UsageError(
        "the tokenizer has no token for the end of a text, so no response would end: name one in its "
        "tokenizer_config.json (eos_token)"
    )


def as_jinja(tokenizer: Any) -> str:
    """The plain template as a tokenizer keeps it, whose ``apply_chat_template`` then asks as rows do."""
    end = "{{ eos_token }}" if tokenizer.eos_token_id is not None else "{{ '\\x00' }}"
    heads = "".join(
        f"{{%- {'if' if role == SYSTEM else 'elif'} m.role == '{role}' %}}{{{{ {text!r} }}}}"
        for role, text in HEADINGS.items()
    )
    return (
        "{%- for m in messages %}" + heads + "{%- endif %}{{ m.content }}"
        "{%- if m.role == 'assistant' %}" + end + "{%- endif %}"
        f"{{%- if not loop.last or add_generation_prompt %}}{{{{ {_BETWEEN!r} }}}}{{%- endif %}}"
        "{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{ {HEADINGS[ASSISTANT]!r} }}}}{{%- endif %}}"
    )


def make(rows: Iterable[Row], tokenizer: Any, length: int) -> Examples:
    """Examples of at most ``length`` tokens. Raises UsageError for a chat template that takes back what it wrote."""
    encode = _of_template if tokenizer.chat_template else _plain
    ids, labels, skipped, cut = [], [], 0, 0
    for row in rows:
        row_ids, row_labels = encode(row, tokenizer)
        cut += len(row_ids) > length
        row_ids, row_labels = row_ids[:length], row_labels[:length]
        if all(label == LEFT_OUT for label in row_labels[1:]):
            skipped += 1
            continue
        ids.append(row_ids)
        labels.append(row_labels)
    return Examples(ids, labels, skipped, cut)


def _plain(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Without a chat template: headings, texts, and a token at the end of each response."""
    end, whole, asked = end_of_response(tokenizer), _Whole(tokenizer, special=False), ""
    for message in row.messages:
        asked += HEADINGS[message.role]
        if message.role == ASSISTANT:
            whole.add(asked, False)
            whole.add(message.content, True)
            whole.end(end)
            asked = _BETWEEN
        else:
            asked += message.content + _BETWEEN
    front = _front(tokenizer)
    return front + whole.ids, [LEFT_OUT] * len(front) + whole.labels


def _of_template(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """With a chat template: what it writes for a message of the assistant behind what asks for it."""
    whole, said = _Whole(tokenizer, special=True), ""
    for number, message in enumerate(row.messages):
        if message.role != ASSISTANT:
            continue
        asked = _rendered(row, row.messages[:number], tokenizer, True)
        answered = _rendered(row, row.messages[: number + 1], tokenizer, False)
        if not asked.startswith(said) or not answered.startswith(asked):
            raise UsageError(
                f"{row.where}: the folder's chat template rewrites what it has written for earlier messages, so what a "
                "response is cannot be told: take conversations of one response, or another template"
            )
        whole.add(asked[len(said) :], False)
        whole.add(answered[len(asked) :], True)
        if not set(whole.last) & set(tokenizer.all_special_ids):  # else the model would not learn to stop
            end = end_of_response(tokenizer)
            if end not in whole.last:
                whole.end(end)
        said = answered
    return whole.ids, whole.labels


def _rendered(row: Row, messages: Sequence[Message], tokenizer: Any, asks: bool) -> str:
    given = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # templates raise what they like
        raise UsageError(f"{row.where}: the folder's chat template refuses it ({str(error)[:200]})") from error


class _Whole:
    """Ids of a text that grows; a token never reaches over the beginning of a response.

    At generation the prompt is encoded alone: an example's prompt has the same ids.
    """

    def __init__(self, tokenizer: Any, special: bool) -> None:
        """Args: special: whether the spelling of a special token is that token, as templates write it."""
        self._tokenizer, self._special = tokenizer, special
        self._text, self._before = "", []
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.last: list[int] = []

    def add(self, text: str, labelled: bool) -> None:
        """Appends ``text``, in the ids that it has behind the rest where those leave the rest as it is."""
        whole = self._encode(self._text + text)
        start = len(self._before)
        self.last = whole[start:] if whole[:start] == self._before else self._encode(text)
        self._text, self._before = self._text + text, self._before + self.last
        self.ids += self.last
        self.labels += self.last if labelled else [LEFT_OUT] * len(self.last)

    def end(self, token: int) -> None:
        """Appends a token that is predicted; what follows is encoded as a text of its own."""
        self.ids.append(token)
        self.labels.append(token)
        self._text, self._before = "", []

    def _encode(self, text: str) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": not self._special, "verbose": False}
        return self._tokenizer(text, **options)["input_ids"] if text else []


def _front(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text."""
    with_special = tokenizer("a")["input_ids"]
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(alone) + 1):
        if with_special[start : start + len(alone)] == alone:
            return with_special[:start]
    return []
