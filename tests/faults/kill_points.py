"""Where a run is killed, and what is done to its folder before it starts.

Files are caught as they are opened, so that these points do not depend on who writes them.
"""

import builtins
import functools
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def alarm(seconds: int) -> None:
    """Ends the process if it hangs."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


class _Half:
    """A file that takes half of what is written to it, and then the process is gone."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, content: Any) -> None:
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        die()

    def __enter__(self) -> "_Half":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def on_write(name: str, half: bool, times: int = 1) -> Callable[[], None]:
    """Killed when a file ``name``, or a temporary one for it, is opened for writing, or half-way through writing it."""
    wanted = (name, f"{name}.new")
    seen = [0]

    def arm() -> None:
        original = builtins.open

        def killing(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            path = os.path.basename(os.fsdecode(file)) if not isinstance(file, int) else ""
            if mode[0] not in "wx" or not (path in wanted or (name.startswith("*") and name[1:] in path)):
                return original(file, mode, *args, **kwargs)
            seen[0] += 1
            if seen[0] < times:
                return original(file, mode, *args, **kwargs)
            if not half:
                die()
            return _Half(original(file, mode, *args, **kwargs))

        builtins.open = io.open = killing

    return arm


def _in_data() -> None:
    """Killed between two tensors of a .distcp."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original, written = filesystem_async._write_item, [0]

    @functools.wraps(original)  # Megatron looks at its signature
    def write_item(transforms: Any, stream: Any, *args: Any, **kwargs: Any) -> Any:
        written[0] += 1
        if written[0] == 4:
            stream.flush()
            die()
        return original(transforms, stream, *args, **kwargs)

    filesystem_async._write_item = write_item


def _in_asynchronous_data() -> None:
    """The rank is killed once its writer, a process of its own, has the tensors."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    original = PersistentAsyncCaller.schedule_async_call

    def schedule_async_call(self: Any, request: Any) -> None:
        original(self, request)
        die()

    PersistentAsyncCaller.schedule_async_call = schedule_async_call


def _torchrun_ends_the_rank() -> None:
    """SIGTERM to the rank and its helpers, between two tensors: as torchrun and a batch system send it."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original = filesystem_async._write_item
    os.setsid()

    @functools.wraps(original)
    def write_item(*args: Any, **kwargs: Any) -> Any:
        os.killpg(0, signal.SIGTERM)
        return original(*args, **kwargs)

    filesystem_async._write_item = write_item


def _in_a_step() -> None:
    from megatron.training import training

    original, steps = training.train_step, [0]

    def train_step(*args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        result = original(*args, **kwargs)
        if steps[0] == 2:
            die()
        return result

    training.train_step = train_step


def _while_deleting() -> None:
    from megatron.training import checkpointing

    def rmtree(path: str) -> None:
        os.unlink(sorted(Path(path).glob("*.distcp"))[0])
        die()

    checkpointing.shutil = type("shutil", (), {"rmtree": staticmethod(rmtree)})


POINTS: dict[str, Callable[[], None]] = {
    "in a step": _in_a_step,
    "SIGTERM in the data": _torchrun_ends_the_rank,
    "in the data": _in_data,
    "in the data, asynchronously": _in_asynchronous_data,
    "before metadata.json": on_write("metadata.json", half=False),
    "before the manifest": on_write("integrity.json", half=False),
    "half of the manifest": on_write("integrity.json", half=True),
    "before the tracker": on_write("latest_checkpointed_iteration.txt", half=False),
    "half of the tracker": on_write("latest_checkpointed_iteration.txt", half=True),
    "while an old one is deleted": _while_deleting,
    "half of a dataset index": on_write("*shuffle_index.npy", half=True),
}


def arm(name: str) -> None:
    """Has the process killed at the named point."""
    POINTS[name]()


def _copy(name: str) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        shutil.copytree(folder.parent / name, folder)

    return copy


def _untrack(folder: Path) -> None:
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("")


def _truncate(folder: Path) -> None:
    path = folder / "checkpoints" / "iter_0000004" / "__1_0.distcp"
    os.truncate(path, path.stat().st_size // 2)


def _flip(folder: Path) -> None:
    from tests.checkpoints import flip_in_a_weight  # here: it imports torch, which a manager's process need not

    flip_in_a_weight(folder / "checkpoints" / "iter_0000004")


#: what may be done to a run's folder before a step
BEFORE: dict[str, Callable[[Path], None]] = {
    "copy base": _copy("base"),
    "copy saved": _copy("saved"),
    "empty tracker": _untrack,
    "truncated data": _truncate,
    "flipped tensor": _flip,
}
