"""Megatron's arguments that CPU mode needs, and their place in a command line that was written for a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rmoe_megablocks.errors import CommonError

ARGUMENTS: tuple[str, ...] = (
    # There is no NCCL without a GPU.
    "--distributed-backend",
    "gloo",
    # Everything below switches off kernels of Transformer Engine, Apex or Megatron that exist for CUDA alone.
    "--transformer-impl",
    "local",
    "--attention-backend",
    "unfused",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    "--no-masked-softmax-fusion",
    "--no-gradient-accumulation-fusion",
)
"""Megatron arguments that CPU mode needs, in command line form."""

# They choose among ways to compute or send the same numbers: what was typed for a GPU gives way.
_REPLACED = ("--distributed-backend", "--attention-backend")


def supply(argv: Sequence[str]) -> tuple[list[str], str]:
    """The command line ``argv`` with what CPU mode needs, and a line that says what that was; empty for nothing.

    Raises:
        CommonError: an argument asks for what a CPU does not have.
    """
    typed = dict(_groups(argv))
    added: list[str] = []
    for option, values in _groups(ARGUMENTS):
        if option not in typed or (typed[option] != values and option in _REPLACED):
            added += [option, *values]
        elif typed[option] != values:
            raise CommonError(
                f"{option} {' '.join(typed[option])} does not work without a GPU: leave it out, or use "
                f"{' '.join([option, *values])}"
            )
    # Behind everything: the last one of a repeated argument counts.
    return [*argv, *added], f"CPU mode adds: {' '.join(added)}" if added else ""


def _groups(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(option, values) for each option, "--a=b" and "--a b" alike."""
    option, values = "", []
    for word in [*argv, "--"]:
        if word.startswith("--"):
            if option:
                yield option, values
            option, _, value = word.partition("=")
            values = [value] if value else []
        else:
            values.append(word)
