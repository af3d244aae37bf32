"""What of a row is predicted: the assistant's words and their end, in the ids that generation has as well."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rmoe_megablocks.conversion.folder import tokenizers
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.finetuning import examples
from rmoe_megablocks.finetuning.examples import LEFT_OUT, as_jinja, end_of_response, make
from rmoe_megablocks.finetuning.rows import Message, Row

ALPACA = Row("rows: row 1", (Message("user", "Add.\n1 2"), Message("assistant", "3, I say")))
CHAT = Row(
    "rows: row 2",
    (
        Message("system", "Be <|endoftext|>"),
        Message("user", "é?"),
        Message("assistant", "yes"),
        Message("user", "Why?"),
        Message("assistant", "so"),
    ),
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def runs_of(ids, labels) -> list[list[int]]:
    """The stretches that are predicted, each without a gap."""
    found, last = [], None
    for place, label in enumerate(labels):
        if label != LEFT_OUT:
            assert label == ids[place]
            if last != place - 1:
                found.append([])
            found[-1].append(label)
            last = place
    return found


def learnt() -> PreTrainedTokenizerFast:
    """Pairs of bytes that go over any boundary, a beginning and an end."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    inner.train_from_iterator(["### Response:\n3, I say", "\n3", "\n3, I"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("eod", [None, 256], ids=["none", "eos"])
def test_plain_template_of_bytes(eod):
    tokenizer = tokenizers._bytes(eod)
    end = 0 if eod is None else 256
    made = make([ALPACA, CHAT], tokenizer, 500)
    assert (
        bytes(made.ids[0][:-1]) == b"### Instruction:\nAdd.\n1 2\n\n### Response:\n3, I say" and made.ids[0][-1] == end
    )
    asked = "### System:\nBe <|endoftext|>\n\n### Instruction:\né?\n\n### Response:\n"
    again = "\n\n### Instruction:\nWhy?\n\n### Response:\n"
    assert made.ids[1] == [*asked.encode(), *b"yes", end, *again.encode(), *b"so", end]
    assert runs_of(made.ids[0], made.labels[0]) == [[*b"3, I say", end]]
    assert runs_of(made.ids[1], made.labels[1]) == [[*b"yes", end], [*b"so", end]]
    assert made.predicted == 9 + 4 + 3


@pytest.mark.parametrize("eod", [None, 256], ids=["none", "eos"])
def test_the_written_chat_template_gives_the_same_ids(eod):
    tokenizer = tokenizers._bytes(eod)
    row = Row("", (CHAT.messages[1:]))  # the spelling of a special token is one in a template, as everywhere
    plain = make([ALPACA, row], tokenizer, 500)
    tokenizer.chat_template = as_jinja(tokenizer)
    assert make([ALPACA, row], tokenizer, 500) == plain
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Add.\n1 2"}], tokenize=False, add_generation_prompt=True
    )
    assert bytes(plain.ids[0]).startswith(asked.encode()) if eod is None else asked.endswith("### Response:\n")


def test_no_token_lies_across_the_beginning_of_a_response():
    tokenizer = learnt()
    prompt, whole = "### Instruction:\nAdd.\n1 2\n\n### Response:\n", ALPACA.messages[1].content
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer(prompt + whole)["input_ids"][: len(alone)] != alone  # it would
    made = make([ALPACA], tokenizer, 500)
    said = [label for label in made.labels[0] if label != LEFT_OUT]
    assert tokenizer.decode(said[:-1]) == whole and said[-1] == tokenizer.eos_token_id
    assert made.ids[0] == alone + said


def test_what_a_tokenizer_puts_in_front():
    from tokenizers.processors import TemplateProcessing

    tokenizer = learnt()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = make([ALPACA], tokenizer, 500)
    assert made.ids[0][0] == 0 and made.labels[0][0] == LEFT_OUT and made.ids[0][1:].count(0) == 0


def test_a_chat_template_of_the_folder():
    tokenizer = tokenizers._bytes(256)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    row = Row("", CHAT.messages[1:])
    made = make([row], tokenizer, 500)
    said = [tokenizer.decode(run) for run in runs_of(made.ids[0], made.labels[0])]
    assert said == ["yes<|im_end|>\n", "so<|im_end|>\n"]
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "")
    made = make([row], tokenizer, 500)  # nothing of the template would end a response
    assert [run[-1] for run in runs_of(made.ids[0], made.labels[0])] == [256, 256]
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(UsageError, match="rewrites"):
        make([row], tokenizer, 500)


def test_rows_that_are_too_long():
    tokenizer = tokenizers._bytes(None)
    prompt = len(b"### Instruction:\nAdd.\n1 2\n\n### Response:\n")
    for length, skipped, said in (
        (prompt, 1, []),
        (prompt + 2, 0, [list(b"3,")]),
        (prompt + 8, 0, [list(b"3, I say")]),
    ):
        made = make([ALPACA], tokenizer, length)
        assert (made.skipped, made.cut, len(made.ids)) == (skipped, 1, 1 - skipped)
        assert [run for ids, labels in zip(made.ids, made.labels, strict=True) for run in runs_of(ids, labels)] == said


def test_a_tokenizer_without_an_end():
    tokenizer = learnt()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no token for the end"):
        end_of_response(tokenizer)
    assert examples.end_of_response(tokenizers._bytes(None)) == 0
