"""What ends a benchmark beside bad input."""


class WrongResult(RuntimeError):
    """What was to be timed does not compute what it should: its time would be that of something else."""
