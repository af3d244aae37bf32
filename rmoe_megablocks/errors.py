"""The error that users see as one line."""


class UsageError(ValueError):
    """Bad input: its text is one clear line that names the argument or file and what to do instead."""


class CommonError(UsageError):
    """Bad input that every rank of a run finds at the same place: rank 0 speaks for all."""
