"""Trains again and again in processes forked from one that has imported Megatron: ``-m tests.faults.steps STEPS.json``.

A step is {"name", "argv", "ranks": 1, "kill": a name of kill_points or null, "plant": one of full or null, "before":
[a name of kill_points.BEFORE or full.BEFORE, ...], "folder": for those}. Its ranks are run as the launcher's worker
runs them. The results, {name: {"codes": one a rank, "output": of all}}, replace the file; a negative code is the signal
that ended a process.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.process import report_from_rank
from tests.faults import full, kill_points  # no Megatron up here: the process of a manager imports this module as well
from tests.ports import free_port

TIMEOUT = 120


def run(argv: list[str], kill: str | None, plant: str | None = None) -> int:
    """One rank of a training run in this process."""
    from rmoe_megablocks.megatron import pretrain

    if kill is not None:
        kill_points.arm(kill)
    if plant is not None:
        full.PLANTS[plant]()
    try:
        return pretrain.main(argv) or 0
    except UsageError as error:
        report_from_rank(error)
        return 2


def forked(step: dict, output: Path) -> list[int]:
    """Exit codes of a step's ranks, each run in a process of its own."""
    ranks = step.get("ranks", 1)
    os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    output.write_text("")
    children = [_fork(step, rank, output) for rank in range(ranks)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _fork(step: dict, rank: int, output: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        terminal = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        kill_points.alarm(TIMEOUT)  # a hang ends as a failure
        code = run(step["argv"], step.get("kill"), step.get("plant"))
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(file: Path) -> None:
    import rmoe_megablocks.megatron.pretrain  # noqa: F401  once, for all that are forked

    results = {}
    for step in json.loads(file.read_text()):
        for name in step.get("before", []):
            (kill_points.BEFORE | full.BEFORE)[name](Path(step["folder"]))
        output = file.with_suffix(".output")
        codes = forked(step, output)
        results[step["name"]] = {"codes": codes, "output": output.read_text()}
    file.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
