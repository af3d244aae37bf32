"""dataset.json: what a prepared dataset holds, and whether the files beside it are those that were written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rmoe_megablocks.data.errors import DataError
from rmoe_megablocks.data.prepared import indexed
from rmoe_megablocks.data.reading.sources import Source
from rmoe_megablocks.data.split import SPLITS
from rmoe_megablocks.data.tokenizers import KINDS

FORMAT_VERSION = 1
FILE_NAME = "dataset.json"


@dataclass(frozen=True)
class SplitMetadata:
    """A split: ``bytes`` of text, ``tokens`` (with ends of documents) and ``documents`` in the indexed dataset."""

    bytes: int
    tokens: int
    documents: int


@dataclass(frozen=True)
class DatasetMetadata:
    """What dataset.json says; the fields are its keys.

    ``tokenizer_model`` and ``tokenizer_sha256`` are the model's file name and checksum, None for bytes. ``eod_id`` is
    None unless documents end in it. ``dtype`` is NumPy's name of the tokens' type on disk. ``split`` is the spelling
    that was asked for. ``splits`` has train, valid and test; one asked for with size 0 has no files. ``unused_bytes``
    is text at the end of the input that the split left out. ``newlines`` is "kept" or "lost". ``unknown_tokens`` of all
    splits stand for characters that the tokenizer's vocabulary lacks. ``loss_after`` is the line that ends a row's
    prompt, whose tokens SPLIT.mask leaves out of the loss; None where all tokens count.
    """

    format_version: int
    tokenizer: str
    tokenizer_model: str | None
    tokenizer_sha256: str | None
    vocab_size: int
    eod_id: int | None
    newlines: str
    dtype: str
    split: str
    splits: dict[str, SplitMetadata]
    unused_bytes: int
    sources: tuple[Source, ...]
    unknown_tokens: int = 0
    loss_after: str | None = None

    @classmethod
    def load(cls, prefix_or_dir: str | Path) -> DatasetMetadata:
        """The metadata of a dataset, given its folder or a split's prefix in it (OUT or OUT/train).

        Raises:
            DataError: dataset.json is missing, is corrupt or of another format version, or a split's .bin or .idx is
                missing or not of the size that follows from the metadata.
        """
        path = dataset_dir(prefix_or_dir) / FILE_NAME
        try:
            fields = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{path}: no such file: not a dataset of rmoe data prepare, or a half-copied one") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error})") from None
        metadata = cls._from_fields(path, fields)
        metadata.check_files(path.parent)
        return metadata

    @classmethod
    def _from_fields(cls, path: Path, fields: object) -> DatasetMetadata:
        if not isinstance(fields, dict):
            raise DataError(f"{path}: not the metadata of a dataset")
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format version {version!r}, expected {FORMAT_VERSION}: prepare the dataset again")
        try:
            splits = {name: SplitMetadata(**fields["splits"][name]) for name in SPLITS}
            sources = tuple(Source(**source) for source in fields["sources"])
            metadata = cls(**{**fields, "splits": splits, "sources": sources})
            indexed.check_dtype(metadata.dtype)
            numbers = [
                metadata.vocab_size,
                metadata.unknown_tokens,
                *(number for split in splits.values() for number in asdict(split).values()),
            ]
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError("a size is no whole number")
            if metadata.tokenizer not in KINDS:  # of a later release, whose ids may mean anything
                raise ValueError(f"tokenizer {metadata.tokenizer!r}, expected one of {', '.join(KINDS)}")
            eod = metadata.eod_id
            if eod is not None and not (type(eod) is int and 0 <= eod < metadata.vocab_size):
                raise ValueError(f"eod_id {eod!r} is no id of the vocabulary")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: corrupt metadata ({type(error).__name__}: {error})") from None
        return metadata

    def save(self, directory: Path) -> None:
        """Write dataset.json into ``directory``."""
        (directory / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def check_files(self, directory: Path) -> None:
        """Compare the files in ``directory`` with the metadata: their sizes, and what the index says of the tokens. The
        DataError names a wrong one."""
        for name, split in self.splits.items():
            if split.tokens == 0:
                continue
            for path, expected in indexed.expected_sizes(directory / name, self.dtype, split.tokens, split.documents):
                if not path.is_file():
                    raise DataError(f"{path}: no such file, but {FILE_NAME} lists it")
                if (size := path.stat().st_size) != expected:
                    kind = "truncated" if size < expected else "too long"
                    raise DataError(f"{path}: {kind}: {size:,} bytes, but {FILE_NAME} says {expected:,}")
            mask = directory / f"{name}.mask"
            if self.loss_after is not None and (not mask.is_file() or mask.stat().st_size != split.tokens):
                raise DataError(f"{mask}: is missing or no byte for each of {split.tokens:,} tokens: prepare it again")
            index = indexed.read_index(directory / name)
            found = (index.dtype.name, index.tokens, len(index.lengths))
            if found != (self.dtype, split.tokens, split.documents):
                raise DataError(f"{directory / name}.idx: is of another dataset than {FILE_NAME}: prepare it again")


def dataset_dir(prefix_or_dir: str | Path) -> Path:
    """The folder of a dataset from itself or from a split's prefix in it."""
    path = Path(prefix_or_dir)
    # Megatron keeps its sample indices in a folder of the prefix's own name, so OUT/train can be a folder, too
    if path.name in SPLITS and (path.parent / FILE_NAME).exists() and not (path / FILE_NAME).exists():
        return path.parent
    return path


def metadata_beside(prefix: str | Path) -> DatasetMetadata | None:
    """The metadata of the prepared dataset that the indexed dataset ``prefix`` is a split of; None if it is of none.

    Raises:
        DataError: as :meth:`DatasetMetadata.load`.
    """
    path = Path(prefix)
    if path.name not in SPLITS or not (path.parent / FILE_NAME).is_file():
        return None
    return DatasetMetadata.load(path.parent)


def check_tokenizer(
    metadata: DatasetMetadata,
    tokenizer_kind: str,
    model_path: str | Path | None = None,
    vocab_size: int | None = None,
    compares_model: bool = True,
) -> None:
    """Check that training's tokenizer gives the ids that the dataset was made with.

    A vocabulary larger than the dataset's is fine: it may be padded or have ids of its own. ``vocab_size`` None is
    not checked. A model is compared by its content, not by its name, and not at all without ``compares_model``.

    Raises:
        DataError: another kind of tokenizer, another model, or a vocabulary that is smaller than the dataset's.
    """
    if tokenizer_kind != metadata.tokenizer:
        raise DataError(
            f"the dataset was prepared with the tokenizer {metadata.tokenizer}, but training uses {tokenizer_kind}"
        )
    if metadata.tokenizer_sha256 is not None and compares_model:
        if model_path is None:
            raise DataError(f"the dataset was prepared with the model {metadata.tokenizer_model}, training names none")
        try:
            with open(model_path, "rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"tokenizer model {model_path}: cannot be read ({error.strerror})") from None
        if sha256 != metadata.tokenizer_sha256:
            raise DataError(
                f"the dataset was prepared with the model {metadata.tokenizer_model} (sha256 "
                f"{metadata.tokenizer_sha256[:12]}...), but training uses {model_path} (sha256 {sha256[:12]}...)"
            )
    if vocab_size is not None and vocab_size < metadata.vocab_size:
        raise DataError(
            f"the dataset has token ids below {metadata.vocab_size}, but training's vocabulary has only {vocab_size} "
            "(--vocab-size)"
        )
