"""One process of a run: what torchrun starts, by the launcher or typed by the user.

Imports stay light here: the configuration's environment variables have to be set before torch is imported.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.launcher import options
from rmoe_megablocks.launcher.arguments import resolve
from rmoe_megablocks.process import end_with_parent, quiet_warnings, report_from_rank


def main(argv: list[str]) -> int:
    """Train with Megatron's arguments ``argv`` (and ``--config``) as one rank; the exit code.

    The rank and the rendezvous come from torchrun's environment variables; without them it is a run of one process.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        if "-h" in argv or "--help" in argv:
            if rank == 0:
                print(options.help_text(), end="")
            return 0
        run = resolve(argv)
        options.check_under_torchrun(run.own)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent()
        elif not {"RANK", "WORLD_SIZE"} & os.environ.keys():
            _meet_oneself()
        # torchrun passes a terminal's Ctrl-C on as SIGINT; Megatron saves a checkpoint on SIGTERM only
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

        quiet_warnings(speaks=rank == 0)
        from rmoe_megablocks.megatron import pretrain

        with run.located_errors():
            return pretrain.main(run.megatron) or 0
    except UsageError as error:
        report_from_rank(error)
        return 2


def _meet_oneself() -> None:
    """The rendezvous of a process that nothing else started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
