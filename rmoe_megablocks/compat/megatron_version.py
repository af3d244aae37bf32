"""The Megatron-Core releases that this package was built against."""

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = "0.19"


def check_megatron_version() -> None:
    """Raises ImportError, naming the supported releases, unless one of them is installed."""
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        raise ImportError(
            f"rmoe_megablocks.megatron needs megatron-core {SUPPORTED}.x, which is not installed: "
            f"pip install 'megatron-core~={SUPPORTED}.0'"
        ) from None
    if not found.startswith(SUPPORTED + "."):
        raise ImportError(
            f"rmoe_megablocks.megatron supports megatron-core {SUPPORTED}.x, found {found}: "
            f"pip install 'megatron-core~={SUPPORTED}.0'"
        )
