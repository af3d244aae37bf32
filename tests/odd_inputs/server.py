"""Runs cases in forks of one process that has imported everything: ``python -m tests.odd_inputs.server``.

A run of one process trains in such a fork too, where torchrun would start it and it would import all that again.

Reads a JSON line a case on standard input ({"command", "folder", "env", "trains", "seconds"}), answers with one
({"code"}) on the standard output it was started with; what the case prints goes to files beside its folder.
"""

import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from rmoe_megablocks.launcher import worker

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the imports print is no answer
    _import_everything()
    for line in sys.stdin:
        case = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(case)  # does not return
        answers.write(json.dumps({"code": _wait(child, case["seconds"])}) + "\n")


def _import_everything() -> None:
    import rmoe_megablocks.megatron  # noqa: F401  CPU mode before Megatron
    from rmoe_megablocks import cli, doctor  # noqa: F401
    from rmoe_megablocks.compat.megatron import options
    from rmoe_megablocks.launcher import __main__  # noqa: F401
    from rmoe_megablocks.megatron import preflight  # noqa: F401
    from rmoe_megablocks.planning import plan  # noqa: F401
    from tests import preloaded  # noqa: F401

    options.spelling()


def _wait(child: int, seconds: float) -> int | None:
    """The exit code as a shell tells it; None where the time ran out and everything was ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run(case: dict) -> None:
    code = 1
    try:
        os.setsid()
        folder = case["folder"]
        for number, suffix in ((0, None), (1, ".out"), (2, ".err")):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open("/dev/null" if suffix is None else folder + suffix, flags, 0o644), number)
        os.chdir(folder)
        for name, value in case["env"].items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        code = _call_all(case["command"], case["trains"], in_fork=not case["env"])
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    except BaseException:  # noqa: BLE001  as the interpreter does it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call_all(command: str, trains: bool, in_fork: bool) -> int:
    """Commands joined by && one after the other, each in a fork that knows nothing of the one before."""
    first, *others = command.split(" && pretrain ")
    for following in others:
        child = os.fork()
        if child == 0:
            return _call(first, trains, in_fork)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            return code
        first = f"pretrain {following}"
    return _call(first, trains, in_fork)


def _call(command: str, trains: bool, in_fork: bool) -> int:
    program, _, rest = command.partition(" ")
    if program == "sh":
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        os.execve("/bin/bash", ["bash", "-c", rest], {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)})
    argv = shlex.split(rest)
    sys.argv = [program, *argv]
    if program == "rmoe":
        from rmoe_megablocks import cli

        return cli.main(argv) or 0
    if program == "pretrain":
        from rmoe_megablocks.launcher import __main__ as launcher

        os.environ["PYTHONPATH"] = str(REPOSITORY)
        if not trains:
            launcher.run_agent = _would_start
        elif in_fork:
            launcher.run_agent = _Rank(launcher.run_agent)
        return launcher.main(argv)
    raise ValueError(f"{program}: pretrain, rmoe or sh")


class _Rank:
    """Takes the place of ``run_agent``: a process that was forked before the launcher did anything."""

    def __init__(self, run_agent: Callable) -> None:
        self._run_agent = run_agent
        waits, self._command = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._command)
            with open(waits) as file:
                text = file.read()
            os._exit(_train(json.loads(text)) if text else 0)
        os.close(waits)

    def __call__(self, command: list[str], env: dict[str, str]) -> int:
        if "--nproc-per-node=1" not in command:
            return self._run_agent(command, env)
        with open(self._command, "w") as file:
            argv = command[command.index(worker.__name__) + 1 :]
            json.dump({"argv": argv, "env": dict(env)}, file)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def _train(asked: dict) -> int:
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = [worker.__file__, *asked["argv"]]
    try:
        return worker.main(asked["argv"])
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    except BaseException:  # noqa: BLE001  as the interpreter does it
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _would_start(command: list[str], env: object = None) -> int:
    (processes,) = (word.partition("=")[2] for word in command if word.startswith("--nproc-per-node="))
    print(f"would start {processes} processes")
    return 0


if __name__ == "__main__":
    main()
