"""Text into a dataset: OUT/{train,valid,test}.{bin,idx} and OUT/dataset.json.

Plain text of all inputs, in order, is one stream, and each split is a stretch of it: one document in the indexed
dataset, so that Megatron's samples follow one another as the text does. JSON is one document a row.

A dataset appears all at once: it is written into a hidden folder beside OUT that is renamed at the very end.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rmoe_megablocks.data.errors import DataError
from rmoe_megablocks.data.prepared import indexed, responses
from rmoe_megablocks.data.prepared.metadata import FILE_NAME, FORMAT_VERSION, DatasetMetadata, SplitMetadata
from rmoe_megablocks.data.reading.formats import AUTO, BYTES
from rmoe_megablocks.data.reading.sources import Inputs
from rmoe_megablocks.data.split import SPLITS, parse_split
from rmoe_megablocks.data.tokenizers import Tokenizer, make_tokenizer
from rmoe_megablocks.process import progress_stream

# what a dataset's folder may hold: its files, and Megatron's sample indices in folders named as the prefixes
_OWN_NAMES = {FILE_NAME, *SPLITS, *(f"{name}.{kind}" for name in SPLITS for kind in ("bin", "idx", "mask"))}

# a text of which more than this share is unknown to the tokenizer is not one that it is meant for
_MOST_UNKNOWN = 0.25


class OutputExists(DataError):
    """The output is there already."""


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    split: str,
    tokenizer: str = "bytes",
    tokenizer_model: str | Path | None = None,
    json_key: str | None = None,
    input_format: str = AUTO,
    append_eod: bool = False,
    loss_after: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> DatasetMetadata:
    """Tokenize ``inputs`` into the dataset folder ``output``.

    Args:
        inputs: files, all plain text or all JSON; each as is or compressed (gzip, xz, bzip2, zstd).
        output: the dataset's folder; missing parents are made.
        split: see :mod:`rmoe_megablocks.data.split`. Sizes cut plain text at exactly these bytes; with sentencepiece a
            cut within a character moves to its end. JSON is cut between rows, nearest to the asked-for place; its
            bytes are those of the text under the key.
        tokenizer: "bytes" or "sentencepiece", the latter with ``tokenizer_model``.
        json_key: where an object has its text: the inputs are JSON, an object a line or an array of objects. Without,
            they are plain text.
        input_format: "auto" takes UTF-8 text and refuses what is JSON or no text at all; "text" takes JSON as the text
            it is; "bytes" takes any bytes, for the bytes tokenizer. Compressed files are decompressed in all three. The
            mark that UTF-8 files may begin with is left out except by "bytes".
        append_eod: end documents (rows; for plain text: each split) in the tokenizer's end-of-document id.
        loss_after: the line that ends the prompt of each row: see :mod:`rmoe_megablocks.data.prepared.responses`.
        overwrite: replace a dataset that is there, once the new one is complete.
        progress: a progress bar on stderr.

    Returns:
        The metadata as in dataset.json.

    Raises:
        DataError: one line on what is wrong with the input, the split, the tokenizer or the output. Nothing is left.
    """
    parsed = parse_split(split)
    encoding = make_tokenizer(tokenizer, tokenizer_model, append_eod)
    if loss_after is not None and (json_key is None or not loss_after or "\n" in loss_after):
        raise DataError(f"--loss-after {loss_after!r}: expected one line, and --json-key: rows have prompts")
    target = Path(output).resolve()
    _check_target(target, output, overwrite)
    source = Inputs([Path(path) for path in inputs], json_key, input_format)
    if input_format == BYTES and not encoding.cuts_bytes:
        raise DataError(f"--input-format {input_format} needs --tokenizer bytes: {tokenizer} reads characters")

    with _bar("reading", None, progress, delay=1) as bar:  # most of what is wrong is found at once: one line then
        files = source.inspect(encoding.cuts_bytes, bar.update)
    total = sum(file.text_bytes for file in files)
    ends = parsed.ends(total)
    indexed.import_megatron()  # takes seconds: after the checks, before the bar
    with _staging(target, output, overwrite) as staging, _bar("writing", ends[-1], progress) as bar:
        if json_key is not None:
            parts = _cut_rows(source.pieces(), ends)
        else:
            parts = _cut_stream(source.pieces(), ends, encoding.cuts_bytes)
        splits, dtype = _write(staging, parts, encoding, append_eod, loss_after, bar.update)
        used = sum(written.bytes for written in splits.values())
        # a cut moves by less than a character, or for rows to the nearest row
        if json_key is None and used < ends[-1]:
            raise DataError(f"the input changed while it was read: {used:,} bytes, expected {ends[-1]:,}")
        for name, part in zip(SPLITS, parsed.parts, strict=True):
            if part > 0 and splits[name].tokens == 0:
                raise DataError(f"split {split!r} leaves {name} empty: no document falls into it")
        tokens = sum(written.tokens for written in splits.values())
        if encoding.unknown_tokens > _MOST_UNKNOWN * tokens:
            raise DataError(
                f"tokenizer model {tokenizer_model}: {encoding.unknown_tokens / tokens:.0%} of the tokens are its "
                "unknown piece: it is made for another language or script; choose another model"
            )
        metadata = DatasetMetadata(
            format_version=FORMAT_VERSION,
            tokenizer=encoding.kind,
            tokenizer_model=encoding.model_path.name if encoding.model_path else None,
            tokenizer_sha256=encoding.model_sha256,
            vocab_size=encoding.vocab_size,
            eod_id=encoding.eod_id,
            newlines=encoding.newlines,
            dtype=dtype,
            split=split,
            splits=splits,
            unused_bytes=total - used,
            sources=tuple(files),
            unknown_tokens=encoding.unknown_tokens,
            loss_after=loss_after,
        )
        metadata.save(staging)
        metadata.check_files(staging)
    return metadata


def _cut_stream(chunks: Iterator[bytes], ends: Sequence[int], cuts_bytes: bool) -> Iterator[tuple[int, bytes, bool]]:
    """(number of the split, bytes, False) for a stream cut at ``ends``, or at the end of a UTF-8 character there."""
    position = split = 0
    for chunk in chunks:
        start = 0
        while start < len(chunk):
            if position < ends[split]:
                stop = min(len(chunk), start + ends[split] - position)
            elif not cuts_bytes and position < ends[split] + 3 and chunk[start] & 0xC0 == 0x80:
                stop = start + 1  # the rest of the character that the cut falls into
            else:
                split += 1
                if split == len(ends):
                    return
                continue
            yield split, chunk[start:stop], False
            position += stop - start
            start = stop


def _cut_rows(rows: Iterator[bytes], ends: Sequence[int]) -> Iterator[tuple[int, bytes, bool]]:
    """(number of the split, row, True) for rows; a row belongs to the split that its middle falls into."""
    doubled = [2 * end for end in ends]
    start = 0
    for row in rows:
        if not row:
            continue
        split = bisect_right(doubled, 2 * start + len(row))
        if split == len(ends):
            return
        yield split, row, True
        start += len(row)


def _write(
    directory: Path,
    parts: Iterator[tuple[int, bytes, bool]],
    tokenizer: Tokenizer,
    append_eod: bool,
    loss_after: str | None,
    advance: Callable[[int], object],
) -> tuple[dict[str, SplitMetadata], str]:
    """Encode ``parts`` (split, bytes, whether a document ends there; non-decreasing splits) into the splits' files."""
    eod = np.array([tokenizer.eod_id] if append_eod else [], dtype=np.int32)
    writers = [indexed.SplitWriter(directory / name, tokenizer.vocab_size) for name in SPLITS]
    sizes = [0] * len(SPLITS)
    encoder, current = None, 0

    def end_document() -> None:
        nonlocal encoder
        if encoder is not None:
            writers[current].write(encoder.finish())
            writers[current].write(eod)
            writers[current].end_document()
            encoder = None

    def write_row(row: bytes, number: int) -> None:
        ids, prompt = responses.encode(tokenizer, row, loss_after, number)
        writers[split].write(ids)
        writers[split].write(eod)
        writers[split].end_document()
        with responses.mask_path(directory / SPLITS[split]).open("ab") as file:
            file.write(bytes(prompt) + b"\1" * (len(ids) - prompt + len(eod)))

    try:
        for number, (split, data, ends_document) in enumerate(parts, start=1):
            if loss_after is not None:
                write_row(data, number)
                sizes[split] += len(data)
                advance(len(data))
                continue
            if split != current:
                end_document()
                current = split
            encoder = encoder or tokenizer.encoder()
            writers[current].write(encoder.feed(data))
            sizes[current] += len(data)
            advance(len(data))
            if ends_document:
                end_document()
        end_document()
        for writer in writers:
            writer.close()
    finally:
        for writer in writers:
            writer.abandon()
    written = {
        name: SplitMetadata(bytes=size, tokens=writer.tokens, documents=writer.documents)
        for name, size, writer in zip(SPLITS, sizes, writers, strict=True)
    }
    return written, writers[0].dtype.name


def _check_target(target: Path, spelling: str | Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        above = next(folder for folder in target.parents if os.path.lexists(folder))
        if not above.is_dir():
            raise DataError(f"output {spelling}: {above} is no folder")
        if not os.access(above, os.W_OK | os.X_OK):  # else that is found when everything has been read
            raise DataError(f"output {spelling}: nothing can be written into {above}")
        return
    if not target.is_dir():
        raise DataError(f"output {spelling} is a file: a dataset is a folder")
    try:
        names = {entry.name for entry in target.iterdir()}
    except OSError as error:
        raise DataError(f"output {spelling}: cannot be read ({error.strerror})") from None
    if not names:
        return
    if FILE_NAME not in names or names - _OWN_NAMES:
        # never delete what this program has not written
        other = ", ".join(sorted(names - _OWN_NAMES)[:3]) or f"no {FILE_NAME}"
        raise OutputExists(f"output {spelling} exists and is not a dataset of its own ({other}): choose another folder")
    if not overwrite:
        raise OutputExists(
            f"output {spelling} has a dataset already: choose another folder, or replace it: --overwrite"
        )


@contextmanager
def _staging(target: Path, spelling: str | Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside ``target`` that becomes it when the block ends well, and vanishes when it does not."""
    # not tempfile.mkdtemp: that folder is its owner's only, and the dataset would be
    staging = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        try:
            yield staging
            _install(staging, target, spelling, overwrite)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise DataError(f"output {spelling}: cannot be written ({error.strerror or error})") from error


def _install(staging: Path, target: Path, spelling: str | Path, overwrite: bool) -> None:
    # again: it can have come into being meanwhile
    _check_target(target, spelling, overwrite)
    if overwrite and target.is_dir():
        old = staging.with_name(staging.name.replace(".partial-", ".replaced-"))
        target.rename(old)
        try:
            staging.rename(target)
        except BaseException:  # Ctrl-C too: the old dataset goes back to its place, and the error on its way
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        staging.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputExists(f"output {spelling} came into being while this dataset was prepared") from None
        raise


def _bar(what: str, total: int | None, progress: bool, delay: float = 0) -> tqdm:
    return tqdm(
        desc=what,
        total=total,
        unit="B",
        unit_scale=True,
        disable=not progress,
        file=progress_stream(),
        mininterval=0.2 if sys.stderr.isatty() else 5.0,  # in a log file a bar is a line for each refresh
        delay=delay,
    )
