"""SHA256SUMS of a folder, as ``sha256sum -c`` reads it. Reading them takes neither torch nor Megatron."""

import hashlib
import re
from pathlib import Path

from rmoe_megablocks.errors import UsageError

CHECKSUMS = "SHA256SUMS"


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_checksums(folder: Path) -> bool:
    """Whether ``folder`` has checksums; then all of them were compared. Raises UsageError naming what differs."""
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
    except FileNotFoundError:
        return False
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/].*)", line)
        if not match or ".." in Path(match[2]).parts:
            raise UsageError(f"{folder / CHECKSUMS}: {line[:80]!r} is no checksum of a file")
        path = folder / match[2]
        if not path.is_file():
            raise UsageError(f"{folder}: {match[2]} is missing, {CHECKSUMS} names it")
        if sha256(path) != match[1]:
            raise UsageError(
                f"{folder}: {match[2]} is not as {CHECKSUMS} says: damaged, or changed (then remove {CHECKSUMS})"
            )
    return True
