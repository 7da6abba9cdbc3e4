"""What the pages of `lindm verify` and `lindm report` share: templates, interval plots of claims, and embedded figures."""

import base64
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lindm.errors import DataError
from lindm.io import limits
from lindm_experiments.harness.claims import OPEN
from lindm_experiments.harness.formats import (
    SMOKE_ONLY,
    count_expected,
    format_interval,
    format_limits,
    format_measured,
    format_number,
    format_p,
    format_slack,
    format_test,
    verdict_label,
)
from lindm_experiments.harness.verdicts import as_expected

TEMPLATES = Path(__file__).parent / "templates"
KINDS = {
    "hold": "hold as predicted",
    "control": "fail as expected",
    "open": "open questions",
    "unexpected": "not as expected",
}
"""What a verdict means together with the expectation of its claim; every claim is of one kind."""


def claim_kind(row: Mapping[str, Any]) -> str:
    """The key of `KINDS` of a row of verdicts.json."""
    if row["expected"] == OPEN:
        return "open"
    if not as_expected(row):
        return "unexpected"
    return "control" if row["expected"] == "FAIL" else "hold"


def render_template(template: str, **values: Any) -> str:
    """Render a template of this package. Values are escaped; the only script that a browser runs is that of the package."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, **options)
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.filters |= {"number": format_number, "count_expected": count_expected, "kind": claim_kind}
    environment.filters |= {"measured": format_measured, "slack": format_slack, "p_value": format_p, "label": verdict_label}
    environment.filters |= {"interval_plot": interval_plot, "limits": format_limits, "test": format_test}
    environment.globals |= {"script": script, "script_hash": digest, "kinds": KINDS, "plot_size": (WIDTH, HEIGHT)}
    environment.globals["smoke_only"] = SMOKE_ONLY
    try:
        return environment.get_template(template).render(**values)
    except jinja2.UndefinedError as e:
        raise DataError(f"a file of the report lacks a value: {e}") from e


# --- figures ---------------------------------------------------------------------------------------------------------------

LEVELS = 16  # of each color channel in an embedded figure: a fifth of the bytes, no visible difference; PNG and PDF are exact
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def embed_figure(png: bytes, name: str) -> str:
    """A figure as the address of an image that needs no file: WebP without loss, from colors rounded to `LEVELS` levels.

    Args:
      png: the content of a PNG file.
      name: of the file, for errors.

    Raises:
      DataError: the content is no PNG image, or one with more than `limits.OUTPUT_PIXELS` pixels.
    """
    import numpy as np
    from matplotlib.image import imread, imsave

    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    if not png.startswith(PNG_SIGNATURE) or width * height > limits.OUTPUT_PIXELS:
        raise DataError(f"{name}: must be a PNG image of at most {limits.OUTPUT_PIXELS} pixels")
    try:
        colors = imread(io.BytesIO(png), format="png")
    except (OSError, SyntaxError, ValueError) as e:
        raise DataError(f"{name}: must be a PNG image: {e}") from e
    rounded = (np.round(colors * (LEVELS - 1)) * (255 // (LEVELS - 1))).astype(np.uint8)
    buffer = io.BytesIO()
    try:
        imsave(buffer, rounded, format="webp", cmap="gray", pil_kwargs={"lossless": True, "method": 4})
    except (KeyError, OSError):  # a Pillow that was built without WebP
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- interval plots --------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 220, 38  # of an interval plot, in pixels of CSS
CHARACTER = 6.4  # width of a character of its labels
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class IntervalPlot:
    """Positions in an interval plot, from 0 to `WIDTH`, and what it says in words."""

    band: Interval
    edges: list[float]  # the finite ends of the band
    labels: list[tuple[float, str, str]]  # position, text, and the SVG text-anchor
    ci: Interval
    limits: Interval | None  # one-sided; None where they are not known
    measured: float
    words: str


def band_words(band: tuple[float | None, float | None]) -> str:
    """A band in words: `0.95 to 1.05`, `at most 1` or `at least 0`."""
    lo, hi = band
    if lo is None:
        return f"at most {format_number(hi)}"
    return f"at least {format_number(lo)}" if hi is None else f"{format_number(lo)} to {format_number(hi)}"


def interval_plot(row: Mapping[str, Any]) -> IntervalPlot | None:
    """The plot of what was measured, with its interval and one-sided limits, over the band of the criterion; None without either.

    An end of the band, of the interval or of the limits that is infinite is at the edge of the plot.
    """
    band, measured = row.get("band"), row["measured"]
    if band is None or measured is None:
        return None
    finite = [v for v in (*band, *row["ci"], measured) if v is not None]
    margin = 0.12 * (max(finite) - min(finite)) or 0.1 * max(abs(measured), 1e-9)
    left, right = min(finite) - margin, max(finite) + margin

    def position(value: float | None, edge: float) -> float:
        return edge if value is None else round(WIDTH * (value - left) / (right - left), 1)

    low, high = position(band[0], 0), position(band[1], WIDTH)
    limits = row["limits"] if format_limits(row) else None
    said = [f"two-sided 95 % interval {format_interval(row['ci'])}"]
    if limits is not None:
        said.append(f"one-sided 95 % limits {format_limits(row)}")
    return IntervalPlot(
        band=(low, max(high, low + 2)),  # a band that is narrow on the scale of the plot stays visible
        edges=[x for x, end in ((low, band[0]), (high, band[1])) if end is not None],
        labels=_band_labels(band, (low, high)),
        ci=(position(row["ci"][0], 0), position(row["ci"][1], WIDTH)),
        limits=None if limits is None else (position(limits[0], 0), position(limits[1], WIDTH)),
        measured=position(measured, 0),
        words=f"measured {format_number(measured)}, {', '.join(said)}, band {band_words(band)}",
    )


def _band_labels(band: tuple[float | None, float | None], ends: Interval) -> list[tuple[float, str, str]]:
    """The numbers at the finite ends of a band; one label for both where two would overlap."""
    lo, hi = (None if end is None else format_number(end) for end in band)
    if lo is None or hi is None:
        return [_place(ends[0], f"≥ {lo}") if hi is None else _place(ends[1], f"≤ {hi}")]
    if ends[1] - ends[0] < CHARACTER * (len(lo) + len(hi) + 2) / 2 + 4:
        return [_place(sum(ends) / 2, f"{lo} to {hi}")]
    return [_place(ends[0], lo), _place(ends[1], hi)]


def _place(x: float, text: str) -> tuple[float, str, str]:
    """A label below x that stays inside the plot."""
    half = CHARACTER * len(text) / 2
    if x < half:
        return 0, text, "start"
    return (WIDTH, text, "end") if x > WIDTH - half else (round(x, 1), text, "middle")
