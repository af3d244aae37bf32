"""The data room's error: one clear line for the user."""

from rmoe_megablocks.errors import UsageError


class DataError(UsageError):
    """A corpus, a split, a tokenizer model or a prepared dataset is not usable; the text is one line that names it."""
