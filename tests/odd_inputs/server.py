"""Runs cases in forks of one process that has imported everything: ``python -m tests.odd_inputs.server``.

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
from pathlib import Path

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
    from rmoe_megablocks import cli, data, doctor  # noqa: F401
    from rmoe_megablocks.launcher import __main__, worker  # noqa: F401
    from rmoe_megablocks.megatron import preflight, pretrain  # noqa: F401
    from rmoe_megablocks.planning import plan  # noqa: F401


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
        code = _call(case["command"], case["trains"])
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    except BaseException:  # noqa: BLE001  as the interpreter does it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(command: str, trains: bool) -> int:
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
        return launcher.main(argv)
    raise ValueError(f"{program}: pretrain, rmoe or sh")


def _would_start(command: list[str], env: object = None) -> int:
    (processes,) = (word.partition("=")[2] for word in command if word.startswith("--nproc-per-node="))
    print(f"would start {processes} processes")
    return 0


if __name__ == "__main__":
    main()
