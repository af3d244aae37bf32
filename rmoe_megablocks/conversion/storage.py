"""Errors of the storage while a conversion writes, in one line."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checkpoints import storage

_OF_RUST = re.compile(r"os error (\d+)")  # safetensors' errors are texts


@contextlib.contextmanager
def in_one_line(target: Path, of_safetensors: type[Exception]) -> Iterator[None]:
    """Turns an error of the storage, whoever noticed it, into a UsageError about ``target``."""
    try:
        yield
    except (UsageError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:  # any, as chains are searched; what is no error of the storage is raised again
        found = storage.find(error) or _of_text(error, of_safetensors)
        if found is None and isinstance(error, OSError):
            found = error
        if found is None:
            raise
        if found.errno in (errno.ENOSPC, errno.EDQUOT) or found.errno in storage.BROKEN:
            said = storage.describe(found, target)
        else:
            said = f"{found.filename or target}: {found.strerror or found}"
        raise UsageError(f"{said}; {target} was not written") from error


def _of_text(error: Exception, of_safetensors: type[Exception]) -> OSError | None:
    match = _OF_RUST.search(str(error)) if isinstance(error, of_safetensors) else None
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None
