"""The two names of the cache in transformers 5.17 to 5.24: ``past_key_values``, and from 5.24 on ``cache``."""

from collections.abc import Callable
from functools import wraps

from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

OLD, NEW = "past_key_values", "cache"
#: what the installed release calls it in calls and results
CACHE = NEW if NEW in MoeModelOutputWithPast.__dataclass_fields__ else OLD


def _renamed(forward: Callable) -> Callable:
    @wraps(forward)
    def wrapper(*args, **kwargs):
        if OLD in kwargs:
            kwargs[NEW] = kwargs.pop(OLD)
        return forward(*args, **kwargs)

    return wrapper


#: decorator of a forward that takes ``cache``; where that is the release's own name, the old one gives its warning
takes_both_names = deprecate_kwarg(OLD, "5.40.0", new_name=NEW) if CACHE == NEW else _renamed
