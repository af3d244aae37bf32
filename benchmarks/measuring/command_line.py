"""Arguments that several benchmarks take; whatever is wrong with one is a UsageError of one line."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from rmoe_megablocks.errors import UsageError, nearest


class Parser(argparse.ArgumentParser):
    """argparse's, that raises UsageError in the place of a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        """One line for what argparse refuses."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def at_least(lowest: int) -> Callable[[str], int]:
    """An argparse type: a whole number from ``lowest`` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {value}")
        return value

    return number


def check_names(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises UsageError for a name that is not known, or comes twice."""
    known, seen = list(known), set()
    for name in names:
        if name not in known:
            raise UsageError(f"{option} {name}: there is none of that name{nearest(name, known)}: {', '.join(known)}")
        if name in seen:
            raise UsageError(f"{option}: {name} is named twice")
        seen.add(name)


def check_file(path: Path | None, option: str) -> None:
    """Raises UsageError for a file that could not be written when all is measured."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} {path}: is a folder")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}")
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written ({error.strerror})") from None
    if not existed:
        path.unlink()


def set_threads(threads: int | None, processor_time: bool) -> None:
    """Sets torch's threads on the CPU. Raises UsageError for processor time of several: it adds them up."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if processor_time and torch.get_num_threads() > 1:
        raise UsageError("--processor-time: adds up all threads, so it says nothing of several; use --threads 1")
