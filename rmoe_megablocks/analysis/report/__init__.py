"""The report: one HTML page without network, of one to four recordings, with every figure also as a file.

``write(folder, recordings, measured)`` brings matplotlib and jinja2 when it is first asked for.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "write":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rmoe_megablocks.analysis.report.writing import write

    return write
