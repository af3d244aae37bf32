"""Writes the page and the files beside it."""

from __future__ import annotations

import base64
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmoe_megablocks.analysis import measuring
from rmoe_megablocks.analysis.report.arguments import TOKENS, check_extra, check_models
from rmoe_megablocks.errors import UsageError

#: bytes of the tokens' arrays on a page, all models together, before base64: 2.4 MB as text
SAMPLE_BYTES = 1_800_000
#: bytes of the figures on a page, before base64: 2.1 MB as text
FIGURE_BYTES = 1_600_000
#: dots an inch of the figures on the page: the first with which they fit
DOTS = (110, 80, 60, 45)
PARTS = Path(__file__).parent / "page"


def write(
    folder: Path, recordings: Sequence[Any], measured: Sequence[dict], tokens: int = TOKENS, baseline: str | None = None
) -> Path:
    """``folder/index.html``, ``folder/figures/NAME.png|svg`` and ``folder/measures/MODEL/`` (JSON and CSV).

    The page holds everything it needs: no network, no other file. Its size is bounded: the sample of tokens shrinks
    to SAMPLE_BYTES, the figures' resolution to FIGURE_BYTES.

    Args:
        recordings: 1-4, of the models side by side.
        measured: what ``measuring.measure`` gave of each.
        tokens: in the view of the tokens, a model; fewer where they do not fit.
        baseline: as of ``measuring.compare``; where the models shown have no such group, the usual one.

    Returns:
        The page.

    Raises:
        UsageError: too many models, matplotlib or jinja2 is missing, the folder cannot be written.
    """
    check_models(len(recordings))
    check_extra()
    from rmoe_megablocks.analysis.report import curves, gallery
    from rmoe_megablocks.analysis.report.sample import bytes_a_token, sample

    folder = Path(folder)
    names = curves.labels(measured)
    print(f"report of {', '.join(names)}: figures ...", file=sys.stderr, flush=True)
    drawn = [(entry, made) for entry in gallery.entries() if (made := entry.build(measured)) is not None]
    fitting = SAMPLE_BYTES // sum(bytes_a_token(recording.about) for recording in recordings)
    samples = [sample(recording, max(min(tokens, fitting), 1)) for recording in recordings]
    for one, name in zip(samples, names, strict=True):
        one["name"] = name
    for _, made in drawn:  # places are found once, not for every file
        made.draw_without_rendering()
        made.set_layout_engine("none")
    pictures = _pictures([made for _, made in drawn])
    figures = [
        {"name": entry.name, "title": entry.title, "section": entry.section, "wide": entry.wide, "png": picture,
         "inches": round(float(made.get_figwidth()), 2), **gallery.caption(entry, measured)}
        for (entry, made), picture in zip(drawn, pictures, strict=True)
    ]  # fmt: skip
    page = _render(names, recordings, measured, figures, samples, _compared(measured, baseline))
    try:
        _files(folder, drawn, names, measured)
        beside = folder / "index.html.part"
        beside.write_text(page, encoding="utf-8")
        beside.replace(folder / "index.html")
    except OSError as error:
        raise UsageError(f"--report {folder}: cannot be written ({error.strerror or error})") from None
    return folder / "index.html"


def _pictures(made: Sequence[Any]) -> list[str]:
    """PNGs in base64, of the finest resolution with which all of them fit."""
    for dots in DOTS:
        found = []
        for figure in made:
            into = io.BytesIO()
            figure.savefig(into, format="png", dpi=dots)
            found.append(into.getvalue())
        if sum(map(len, found)) <= FIGURE_BYTES:
            break
    return [base64.b64encode(one).decode() for one in found]


def _files(folder: Path, drawn: Sequence[tuple], names: Sequence[str], measured: Sequence[dict]) -> None:
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for entry, made in drawn:
        made.savefig(figures / f"{entry.name}.png", dpi=200)
        made.savefig(figures / f"{entry.name}.svg")
    for name, one in zip(names, measured, strict=True):
        target = folder / "measures" / name.replace("/", "_")
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        measuring.write(one, target)


def _compared(measured: Sequence[dict], baseline: str | None) -> Any:
    """The comparison; why there is none of several models, or None."""
    if len(measured) < 2:
        return None
    from rmoe_megablocks.analysis.measuring.comparing.groups import grouped

    try:
        return measuring.compare(measured, baseline if baseline in grouped(measured) else None)
    except UsageError as error:
        return str(error)


def _render(names, recordings, measured, figures, samples, compared) -> str:
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PARTS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = number
    return environment.get_template("page.html").render(
        names=names,
        models=[one["recording"] for one in measured],
        measured=measured,
        rows=_rows(measured),
        compared=compared,
        figures=figures,
        sections=list(dict.fromkeys(figure["section"] for figure in figures)),
        left_out=[one.get("left_out") or {} for one in measured],
        samples=samples,
        partial=[not getattr(recording.about, "complete", True) for recording in recordings],
        cut=[len(one["token"]) for one in samples],
        styles=markupsafe.Markup((PARTS / "page.css").read_text(encoding="utf-8")),
        script=markupsafe.Markup((PARTS / "page.js").read_text(encoding="utf-8")),
    )


def _rows(measured: Sequence[dict]) -> list[dict]:
    """A row a figure: title, and of each model value and chance."""
    from rmoe_megablocks.analysis.measuring.figures import TITLES

    found = []
    for name, title in TITLES.items():
        cells = [one["figures"].get(name) for one in measured]
        if any(cell and cell["value"] is not None for cell in cells):
            found.append({"title": title, "cells": [cell or {"value": None, "chance": None} for cell in cells]})
    return found


def number(value: float | None) -> str:
    """Four digits, as 1,234 or 0.1234, of less than a tenth three; a dash for none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-4:
        return f"{value:.2e}"
    return f"{value:.4g}" if size >= 0.1 else f"{value:.3g}"
