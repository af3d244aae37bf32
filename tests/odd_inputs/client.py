"""The way to server.py, one process of it for all who ask."""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.odd_inputs.server import REPOSITORY


class Client:
    """One process that has imported everything and forks for each command."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.odd_inputs.server"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, command: str, folder: Path, env: Mapping[str, str | None], trains: bool, seconds: float
    ) -> int | None:
        """The exit code of ``command`` in ``folder``, beside which its output lies; None where the time ran out."""
        words = command.replace("{here}", str(folder)).replace("{repository}", str(REPOSITORY))
        request = {"command": words, "folder": str(folder), "env": dict(env), "trains": trains, "seconds": seconds}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())["code"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@functools.cache
def client() -> Client:
    """The process that is there, started for the first who asks."""
    return Client()
