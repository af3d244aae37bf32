"""The error that users see as one line."""


class UsageError(ValueError):
    """Bad input: its text is one clear line that names the argument or file and what to do instead."""
