"""The Megatron-Core releases that this package was built against."""

import re
from importlib.util import find_spec
from pathlib import Path

SUPPORTED = "0.19"


def check_megatron_version() -> None:
    """Raises ImportError, naming the supported releases, unless one of them would be imported."""
    found = _found()
    if found is None:
        raise ImportError(
            f"rmoe_megablocks.megatron needs megatron-core {SUPPORTED}.x, which is not installed: "
            f"pip install 'megatron-core~={SUPPORTED}.0'"
        )
    if not found.startswith(SUPPORTED + "."):
        raise ImportError(
            f"rmoe_megablocks.megatron supports megatron-core {SUPPORTED}.x, found {found}: "
            f"pip install 'megatron-core~={SUPPORTED}.0'"
        )


def _found() -> str | None:
    """The version in the package's own file: a checkout on the path beats an installed one and has no metadata.

    Without importing it, which is for CPU mode to prepare.
    """
    spec = find_spec("megatron")
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / "core" / "package_info.py"
        if file.is_file():
            return ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", file.read_text(), re.MULTILINE))
    return None
