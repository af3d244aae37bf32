"""What the adapter replaces in Megatron's checkpoint code, with the reason. All of it is idempotent."""

import contextlib
import functools
import inspect
import multiprocessing
import os
import queue
import re
import types
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets import blended_dataset, gpt_dataset
from megatron.core.dist_checkpointing import serialization, validation
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.training import checkpointing, get_args, training

from rmoe_megablocks.compat import async_worker
from rmoe_megablocks.process import serve_parent


def _original(function: Callable) -> Callable:
    return getattr(function, "original", function)


def prepare_saves(prepare: Callable[[int], bool]) -> None:
    """Calls ``prepare(iteration)`` on every rank before a checkpoint is saved; False leaves the save out.

    Megatron writes into a folder as it finds it (checkpointing.py:768) and saves a finished run again
    (training.py:1441). training.py:3086 looks ``save_checkpoint`` up when called.
    """
    original = _original(training.save_checkpoint)

    @functools.wraps(original)
    def save_checkpoint(iteration, *args, **kwargs):
        # those of --non-persistent-ckpt-type have folders and a clean-up of their own
        if kwargs.get("non_persistent_ckpt") or prepare(iteration):
            original(iteration, *args, **kwargs)

    save_checkpoint.original = original
    training.save_checkpoint = save_checkpoint


def seal_manifests(seal: Callable[[Path, dict], None]) -> None:
    """Has ``seal(folder, manifest)`` put a checkpoint's manifest in its place.

    Megatron writes it straight into its place (validation.py:530), where a kill leaves half of one.
    serialization.py:457 looks ``save_integrity_manifest`` up when called, which looks up the file's name.
    """
    original = _original(serialization.save_integrity_manifest)

    @functools.wraps(original)
    def save_integrity_manifest(checkpoint_dir: str) -> None:
        name = validation.INTEGRITY_FNAME
        validation.INTEGRITY_FNAME = draft = name + ".draft"
        try:
            original(checkpoint_dir)
        finally:
            validation.INTEGRITY_FNAME = name
        path = Path(checkpoint_dir, draft)
        manifest = validation.json.loads(path.read_text())
        path.unlink()
        seal(Path(checkpoint_dir), manifest)

    save_integrity_manifest.original = original
    serialization.save_integrity_manifest = save_integrity_manifest


def damaged_files(folder: Path | str) -> list[str]:
    """Files of a checkpoint that do not match its manifest, the same list on every rank."""
    try:
        validation.verify_integrity_manifest(str(folder))
    except CheckpointingException as error:
        found = re.findall(r"^  (.+?): (?:file missing|hash mismatch)", str(error), re.MULTILINE)
        return found or [validation.INTEGRITY_FNAME]
    return []


def verify_loads(verify: Callable[[Path], None]) -> None:
    """Has ``verify(folder)`` answer for a checkpoint's contents before its tensors are loaded, on every rank.

    Megatron's own check refuses what was saved without a manifest and reports damage by a traceback a rank
    (validation.py:548 and 603). serialization.py:122 looks it up when called.
    """
    original = _original(serialization.verify_integrity_manifest)

    @functools.wraps(original)
    def verify_integrity_manifest(checkpoint_dir: str) -> None:
        verify(Path(checkpoint_dir))

    verify_integrity_manifest.original = original
    serialization.verify_integrity_manifest = verify_integrity_manifest


def load_what_ckpt_step_names() -> None:
    """Leaves the tracker file unread where --ckpt-step, typed or chosen, says what to load.

    Megatron reads it all the same, and an empty one ends the process as if all were well (checkpointing.py:369).
    checkpointing.py:1659 looks ``read_metadata`` up when called.
    """
    original = _original(checkpointing.read_metadata)

    @functools.wraps(original)
    def read_metadata(tracker_filename: str) -> tuple[int, bool]:
        step = get_args().ckpt_step
        return (step, False) if step else original(tracker_filename)

    read_metadata.original = original
    checkpointing.read_metadata = read_metadata


class _AtomicStorage:
    """Megatron's file access, but one file is written beside its place and moved there when it is complete."""

    def __init__(self, storage: Any, name: str, write: Callable[[Path, str], None]) -> None:
        self.original = storage
        self._name = name
        self._write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def open(self, path: str, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "w" and os.path.basename(path) == self._name and self.original.open is open:  # not object storage
            return _Draft(Path(path), self._write)
        return self.original.open(path, mode, *args, **kwargs)


class _Draft:
    def __init__(self, path: Path, write: Callable[[Path, str], None]) -> None:
        self._path, self._write_file, self._text = path, write, ""

    def __enter__(self) -> "_Draft":
        return self

    def write(self, text: str) -> None:
        self._text += text

    def __exit__(self, error: type | None, *_: Any) -> None:
        if error is None:
            self._write_file(self._path, self._text)


def write_tracker(name: str, write: Callable[[Path, str], None]) -> None:
    """Has ``write(path, text)`` write the tracker file ``name``: opened for writing (checkpointing.py:1013) it is
    empty until it is closed. ``maybe_msc`` is a name of that module only, so that nothing else changes."""
    checkpointing.maybe_msc = _AtomicStorage(_original(checkpointing.maybe_msc), name, write)


def end_writers_with_their_rank() -> None:
    """The process that writes an asynchronous checkpoint does not outlive its rank, to write into the folder that
    the restarted run fills anew: async_utils.py:277 forks it. checkpointing.py:1122 looks the function up."""
    original = _original(checkpointing.schedule_async_save)

    @functools.wraps(original)
    def schedule_async_save(async_request: Any) -> None:
        write = getattr(async_request, "async_fn", None)
        if write is not None and hasattr(async_request, "_replace") and not get_args().use_persistent_ckpt_worker:
            parent = os.getpid()

            def write_while_parent_lives(*args: Any, **kwargs: Any) -> None:
                serve_parent(parent)
                write(*args, **kwargs)

            async_request = async_request._replace(async_fn=write_while_parent_lives)
        original(async_request)

    schedule_async_save.original = original
    checkpointing.schedule_async_save = schedule_async_save


class _LoopOfRank:
    """Stands for ``PersistentAsyncCaller.async_loop`` where the process that runs it is started."""

    def __get__(self, caller: Any, kind: type) -> Callable[..., None]:
        return functools.partial(async_worker.serve, os.getpid())


def end_persistent_writers_with_their_rank() -> None:
    """The process of --use-persistent-ckpt-worker runs :func:`.async_worker.serve`.

    async_utils.py:386 names it by ``PersistentAsyncCaller.async_loop``; async_utils.py:381 starts it.
    """
    start = _original(async_utils.PersistentAsyncCaller._get_process.__func__)

    @functools.wraps(start)
    def _get_process(cls: type, *args: Any, **kwargs: Any) -> Any:
        loop = cls.__dict__["async_loop"]
        cls.async_loop = _LoopOfRank()
        try:
            return start(cls, *args, **kwargs)
        finally:
            cls.async_loop = loop

    _get_process.original = start
    async_utils.PersistentAsyncCaller._get_process = classmethod(_get_process)


def end_result_servers_with_their_rank() -> None:
    """The process that holds the results of a rank's writers does not outlive the rank either, nor end before it.

    A multiprocessing manager whose owner is killed waits for it for ever; SIGTERM, which torchrun sends to both, ends
    it while the rank still saves. filesystem_async.py:200 looks ``get_write_results_queue`` up when called, which
    starts one the first time (filesystem_async.py:65).
    """
    original = _original(filesystem_async.get_write_results_queue)

    @functools.wraps(original)
    def get_write_results_queue(mp_mode: str | None = None) -> Any:
        if filesystem_async._results_queue is None:
            (default,) = inspect.unwrap(original).__defaults__  # spawn; in CPU mode fork
            method = mp_mode or default
            manager = SyncManager(ctx=multiprocessing.get_context(method))
            manager.start(serve_parent, (os.getpid(),))
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    get_write_results_queue.original = original
    filesystem_async.get_write_results_queue = get_write_results_queue


class _Results:
    """A queue for one rank's writers, in which an error of theirs takes the place of the results."""

    def __init__(self, queue: Any, errors: list[BaseException]) -> None:
        self._queue, self._errors = queue, errors

    def put(self, results: Any) -> None:
        self._queue.put(self._errors[0] if self._errors else results)


def keep_errors_of_writers() -> None:
    """A writer's error reaches the rank that finishes the save as it was raised, with the file's name.

    Megatron keeps no more than its class where a rank's last or only file fails (filesystem_async.py:304), and for
    the other files nothing but an assertion: its result is missing, or in a synchronous save that rank alone fails.
    """
    writer = filesystem_async.FileSystemWriterAsync
    write, write_all = _original(writer.write_preloaded_data), _original(writer.write_preloaded_data_multithread)
    errors: list[BaseException] = []

    @functools.wraps(write)
    def write_preloaded_data(transforms: list, *, write_bucket: Any, results_queue: Any, **kwargs: Any) -> Any:
        found: queue.Queue = queue.Queue()
        result = write(transforms, write_bucket=write_bucket, results_queue=found, **kwargs)
        number, results = result = result if found.empty() else found.get()
        if isinstance(results, Exception):
            errors.append(_with_name(results, write_bucket[0]))
            result = (number, [])
        if results_queue is None:
            return result
        results_queue.put(result)
        return None

    @functools.wraps(write_all)
    def write_preloaded_data_multithread(transforms: list, use_msc: bool, rank: int, buckets: list, results: Any):
        errors.clear()
        return write_all(transforms, use_msc, rank, buckets, _Results(results, errors))

    write_preloaded_data.original = write
    write_preloaded_data_multithread.original = write_all
    writer.write_preloaded_data = staticmethod(write_preloaded_data)
    writer.write_preloaded_data_multithread = staticmethod(write_preloaded_data_multithread)


def _with_name(error: BaseException, name: str) -> BaseException:
    """The OSError that ``error`` is or was raised for, with the name of the file; else ``error``."""
    inner = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    if inner is None or inner.errno is None:
        return error
    return OSError(inner.errno, os.strerror(inner.errno), inner.filename or os.fspath(name))


def save_indices_atomically() -> None:
    """The cached indices of the datasets appear whole: Megatron takes a file that exists for a complete one
    (gpt_dataset.py:483 and blended_dataset.py:141), so that half of one stops every later start."""
    atomic = types.ModuleType("numpy")
    vars(atomic).update(vars(numpy))

    def save(file: str, array: numpy.ndarray, **kwargs: Any) -> None:
        new = f"{file}.{os.getpid()}.new"
        try:
            with open(new, "wb") as stream:
                numpy.save(stream, array, **kwargs)
            os.replace(new, file)
        except OSError as error:  # as of a full disk
            error.filename = file
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise

    atomic.save = save
    gpt_dataset.numpy = blended_dataset.numpy = atomic
