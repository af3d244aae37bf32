"""The launcher: ``python -m rmoe_megablocks.launcher``, which launch/pretrain_rmoe.sh runs.

One process that reads the configuration, checks the whole run before anything is started, and starts torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import shlex
import socket
import sys

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.launcher import options
from rmoe_megablocks.launcher.arguments import resolve
from rmoe_megablocks.launcher.supervise import run_agent
from rmoe_megablocks.process import quiet_warnings, report

DEFAULT_PORT = 29500


def main(argv: list[str]) -> int:
    """Check and start the run that ``argv`` describes; its exit code, 2 for an error in what was asked for."""
    try:
        return _launch(argv)
    except UsageError as error:
        report(error)
        return 2
    except KeyboardInterrupt:
        return 130  # before torchrun was started: nothing to save


def _launch(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(options.help_text(), end="")
        return 0
    word = options.parse(argv)[0].help_megatron
    if word is not None:
        return _help_megatron(word)
    run = resolve(argv)
    own = run.own
    _check_port(own)

    quiet_warnings(speaks=False)  # the workers give them
    # late, because it imports torch, which reads the environment variables just set
    from rmoe_megablocks.megatron import preflight
    from rmoe_megablocks.megatron.inputs import datasets

    with run.located_errors():
        plan = preflight.check(run.megatron, nproc_per_node=own.nproc_per_node, nnodes=own.nnodes)
    nproc = plan.nproc_per_node
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // nproc))
    command = agent_command(own, nproc, ["--config", str(run.path), *run.typed])
    if own.dry_run:
        _print_plan(command, {**run.config.env, "OMP_NUM_THREADS": threads}, run.config.sources, run.megatron)
        return 0
    if not own.node_rank:  # rank 0 is here, and takes the lock
        plan.run.check_unlocked()
    if own.nnodes > 1:
        _say_meeting(own)
    return run_agent(command, env={**os.environ, "OMP_NUM_THREADS": threads, datasets.CHECKED: "1"})


def _help_megatron(word: str) -> int:
    quiet_warnings(speaks=False)
    # what Megatron and CPU mode say when they are imported is no help
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from rmoe_megablocks.megatron.command_line import help_text

    text = help_text.megatron(word)
    if not text:
        raise UsageError(f"--help-megatron {word}: no argument has that in its name or help")
    print(text, end="")
    return 0


def agent_command(own: argparse.Namespace, nproc: int, worker_argv: list[str]) -> list[str]:
    """The command that starts the workers: torchrun's arguments for the layout, then the worker's own."""
    layout = [f"--nproc-per-node={nproc}"]
    if own.nnodes == 1 and own.master_addr is None and own.master_port is None:
        # a free port; the loopback address because a machine's own name need not resolve
        layout += ["--standalone", "--local-addr=127.0.0.1"]
    else:
        layout += [
            f"--nnodes={own.nnodes}",
            f"--node-rank={own.node_rank or 0}",
            f"--master-addr={own.master_addr or '127.0.0.1'}",
            f"--master-port={own.master_port or DEFAULT_PORT}",
        ]
    python = [sys.executable, "-u", "-m"]
    return [*python, "rmoe_megablocks.launcher.agent", *layout, "-m", "rmoe_megablocks.launcher.worker", *worker_argv]


def _check_port(own: argparse.Namespace) -> None:
    """torchrun's own message for a port in use is a traceback after a minute of trying."""
    asked = own.master_port is not None or own.master_addr is not None
    if not asked or (own.node_rank or 0) != 0:
        return
    port = own.master_port or DEFAULT_PORT
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # as the store itself does: a port in TIME_WAIT from the last run is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UsageError(f"port {port} is in use on this machine: choose another with --master-port") from None
            if error.errno == errno.EACCES:
                raise UsageError(f"port {port} needs privileges: choose one above 1023 with --master-port") from None
            raise UsageError(f"port {port}: {error.strerror}; choose another with --master-port") from None


def _say_meeting(own: argparse.Namespace) -> None:
    """The machines wait for each other, for minutes if need be: say where, and what may keep them apart."""
    port = own.master_port or DEFAULT_PORT
    try:
        socket.getaddrinfo(own.master_addr, port)
        aside = ""
    except OSError as error:
        aside = f" (this machine does not know that name now: {error.strerror or error})"
    line = f"rmoe: machine {own.node_rank} of {own.nnodes}: meeting the others at {own.master_addr}:{port}{aside}"
    print(line, file=sys.stderr, flush=True)


def _cores() -> int:
    """The cores this process may use, which in a batch job are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _print_plan(command: list[str], env: dict[str, str], sources: list[os.PathLike[str]], argv: list[str]) -> None:
    print("# configuration: " + ", ".join(str(source) for source in sources))
    for name, value in env.items():
        print(f"export {name}={shlex.quote(os.environ.get(name, value))}")
    print(shlex.join(command))
    print("# Megatron's arguments after merging:")
    line: list[str] = []
    for token in [*argv, "--"]:
        if token.startswith("--") and line:
            print("#   " + shlex.join(line))
            line = []
        line.append(token)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
