"""Ports for tests that have to name one some time before they listen on it."""

import random
import socket

# Below Linux's ephemeral range (32768 on), from which the kernel gives any other process the port in the meantime, and
# below the fixed ones of tests/odd_inputs.
_PORTS = range(20000, 29000)


def free_port() -> int:
    """A port on which nobody listens. Drawn afresh by each process: another test is not likely to draw the same."""
    drawn = random.SystemRandom()
    while True:
        port = drawn.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
