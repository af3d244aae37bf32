"""The tokenizer of an exported model: bytes, a SentencePiece model as a fast tokenizer, or one of Hugging Face's."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmoe_megablocks import data
from rmoe_megablocks.errors import UsageError

NONE, BYTES = "none", "bytes"
_END = "<|endoftext|>"
_PROBES = ("Hello world", " two  spaces ", "a\nb\n", "x = [1, 2.5]; // ok?", "Grüße, Ωmega, 日本語, 🙂", "\tTab")
#: older releases follow neither the model's prefix nor its merges
SENTENCEPIECE_SINCE = "5.24"
_OF_SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


@dataclass(frozen=True)
class Tokenizer:
    """What will be written.

    Attributes:
        kind: "bytes", "sentencepiece", "huggingface" or "none".
        path: of the model or folder, None for bytes and none.
        vocab_size: of its ids; None where the run's arguments have to say it.
        eod: id of the end of a document, None without.
    """

    kind: str
    path: Path | None
    vocab_size: int | None
    eod: int | None


def choose(args: argparse.Namespace | None, option: str | None) -> Tokenizer:
    """The tokenizer of ``--tokenizer``, else the one that the run of ``args`` was trained with.

    Raises:
        UsageError: it is not known, or its file is not there any more.
    """
    if option == NONE:
        return Tokenizer(NONE, None, None, None)
    if option == BYTES:
        return Tokenizer(BYTES, None, 256, None)
    if option is not None:
        return _of_path(Path(option), "--tokenizer", append_eod=False)
    kind = getattr(args, "tokenizer_type", None)
    metadata = _dataset_of(args)
    if metadata is not None and metadata.tokenizer == "bytes":
        return Tokenizer(BYTES, None, metadata.vocab_size, metadata.eod_id)
    model = getattr(args, "tokenizer_model", None)
    if kind in (*_OF_SENTENCEPIECE, "HuggingFaceTokenizer") and model:
        eod = metadata is not None and metadata.eod_id is not None
        return _of_path(Path(model), f"the run's tokenizer ({kind})", append_eod=eod)
    raise UsageError(
        f"the run's tokenizer ({kind or 'none'}) cannot be told from its checkpoint: name it with --tokenizer bytes, a "
        "SentencePiece model or a folder of Hugging Face's; --tokenizer none exports none"
    )


def _dataset_of(args: argparse.Namespace | None) -> data.DatasetMetadata | None:
    """What is known of the prepared dataset that the run was trained on, if it is still there."""
    for name in ("train_data_path", "data_path"):
        for prefix in getattr(args, name, None) or ():
            try:
                return data.metadata_beside(str(prefix))
            except data.DataError:
                return None
    return None


def _of_path(path: Path, what: str, append_eod: bool) -> Tokenizer:
    if path.is_dir():
        return Tokenizer("huggingface", path, len(_load(path)), None)
    if not path.is_file():
        raise UsageError(f"{what}: {path} is missing; name the tokenizer with --tokenizer, or --tokenizer none")
    from rmoe_megablocks.data.tokenizers import SentencePieceTokenizer

    try:
        found = SentencePieceTokenizer(path, eod=append_eod)
    except data.DataError as error:
        raise UsageError(f"{what}: {error}") from error
    return Tokenizer("sentencepiece", path, found.vocab_size, found.eod_id)


def write(tokenizer: Tokenizer, folder: Path, longest: int) -> dict[str, int]:
    """Writes the tokenizer's files for sequences of ``longest`` tokens; ids of its special tokens for generation.

    Raises:
        UsageError: a SentencePiece model whose fast form gives other ids.
    """
    if tokenizer.kind == NONE:
        return {}
    if tokenizer.kind == BYTES:
        fast = _bytes(tokenizer.eod)
    elif tokenizer.kind == "sentencepiece":
        fast = _fast(tokenizer.path)
        _compare(tokenizer.path, fast)
    else:
        fast = _load(tokenizer.path)
    fast.model_max_length = longest
    fast.save_pretrained(folder)
    ids = {name: getattr(fast, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: value for name, value in ids.items() if value is not None}


def _bytes(eod: int | None) -> Any:
    """Id = byte. Text is encoded as UTF-8; bytes that are none are ids as they are: list(data), bytes(ids)."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()}
    fast = Fast(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    special = {"eos_token": _END} if eod == len(vocabulary) else {}
    return PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **special)


def _fast(path: Path) -> Any:
    """A SentencePiece model in the form of the tokenizers library, with the special pieces that it names."""
    import sentencepiece
    import transformers
    from packaging.version import Version
    from sentencepiece import sentencepiece_model_pb2
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SpmConverter

    if Version(transformers.__version__) < Version(SENTENCEPIECE_SINCE):
        raise UsageError(
            f"writing a SentencePiece model as a fast tokenizer needs transformers {SENTENCEPIECE_SINCE}, here is "
            f"{transformers.__version__}, which makes another tokenizer of it: upgrade, or add --tokenizer none"
        )

    model = sentencepiece.SentencePieceProcessor(model_file=os.fspath(path))
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    of_pairs = proto.trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.BPE
    vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)} if of_pairs else pieces
    kinds = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    kinds["pad_token"] = model.pad_id()
    special = {kind: model.id_to_piece(piece) for kind, piece in kinds.items() if piece >= 0}
    fast = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary)
    return PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **special)


def _compare(path: Path, fast: Any) -> None:
    """The fast form must give the ids that the model was trained on."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=os.fspath(path))
    for text in _PROBES:
        theirs, ours = model.encode(text), fast.encode(text, add_special_tokens=False)
        if theirs != ours:
            raise UsageError(
                f"tokenizer model {path}: as a fast tokenizer it gives {ours[:8]} for {text!r}, itself {theirs[:8]}; "
                "name another form of it with --tokenizer FOLDER, or --tokenizer none"
            )


def _load(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.fspath(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--tokenizer {path}: {str(error).splitlines()[0]}") from error


def sample_ids(tokenizer: Tokenizer, folder: Path, text: str, vocab_size: int, count: int) -> Sequence[int]:
    """``count`` ids to compare models on: of ``text``, or drawn from one seed where there is no tokenizer."""
    if tokenizer.kind == NONE:
        import torch

        return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    ids = list(text.encode()) if tokenizer.kind == BYTES else _load(folder).encode(text, add_special_tokens=False)
    return (ids * (1 + count // max(1, len(ids))))[:count]
