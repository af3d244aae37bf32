"""Which releases of transformers will do, and what of their insides is touched: both looked up at import."""

import transformers
from packaging.version import Version
from transformers import PreTrainedModel

OLDEST = "5.17"
#: methods of PreTrainedModel that RmoePreTrainedModel replaces; under another name they would not be called any more
TOUCHED = {
    "_can_set_experts_implementation": "it looks for the experts' decorator in the text of the model's own file",
    "_initialize_weights": "it leaves out modules without parameters of their own, if they are not the library's",
    "maybe_distribute_model": "pipeline stages are refused there, before any weight is loaded",
}


def check(model: type = PreTrainedModel, version: str = transformers.__version__) -> None:
    """Raises ImportError, one line, for an older release and for one that lacks what is touched."""
    if Version(version) < Version(OLDEST):
        raise ImportError(f"rmoe_megablocks.huggingface needs transformers {OLDEST} or later, this is {version}")
    for name, why in TOUCHED.items():
        if not hasattr(model, name):
            raise ImportError(f"transformers {version} has no PreTrainedModel.{name} any more ({why}): use 5.24")
