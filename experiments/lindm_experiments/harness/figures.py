"""The style of all figures: readable in print and in black and white, safe for color-blind readers.

Colors: Okabe and Ito, *Color Universal Design* (2008); every series also has its own marker and dash.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from cycler import cycler

BLUE, ORANGE, GREEN, PURPLE, RED, SKY, YELLOW, GRAY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#F0E442",
    "#6B6B6B",
)
COLORS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GRAY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"

MEASURED: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4.5}  # what was measured: points
EXACT: dict[str, Any] = {"linestyle": "-", "linewidth": 1.6, "marker": ""}  # what theory predicts exactly: a line
BOUND: dict[str, Any] = {"linestyle": "--", "linewidth": 1.4, "marker": ""}  # what theory only bounds: a dashed line
SEED: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.35, "marker": ""}  # one seed: every seed is shown


STYLE: dict[str, Any] = {
    "figure.figsize": (6.4, 4.0),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "mathtext.fontset": "dejavusans",
    "axes.prop_cycle": cycler(color=COLORS) + cycler(marker=MARKERS),
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "image.cmap": SEQUENTIAL,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


@contextlib.contextmanager
def file_backend() -> Iterator[None]:
    """Figures of pyplot are drawn to files in this block, without windows; afterward the backend is that of before."""
    import matplotlib

    before, fallback = matplotlib.get_backend(), matplotlib.rcParams["backend_fallback"]
    matplotlib.use("Agg")
    try:
        yield
    finally:
        matplotlib.use(before)
        matplotlib.rcParams["backend_fallback"] = fallback


def plot_seeds(axis: Any, x: Any, curves: Iterable[Any], color: str) -> None:
    """One thin line for each seed."""
    for curve in curves:
        axis.plot(x, curve, color=color, **SEED)


def plot_markers(axis: Any, x: Any, curves: Iterable[Any], color: str, marker: str, label: str = "") -> None:
    """Markers without lines for each seed, with one label for all."""
    style = MEASURED | {"marker": marker, "color": color, "alpha": 0.55}
    for number, curve in enumerate(curves):
        axis.plot(x, curve, label="" if number else label, **style)


def set_log_ticks(axis: Any, values: Iterable[float]) -> None:
    """A logarithmic x axis with ticks at the measured values alone."""
    values = list(values)
    axis.set_xscale("log")
    axis.set_xticks(values, [f"{v:g}" for v in values])
    axis.xaxis.minorticks_off()


def label_line_ends(axis: Any, x: float, ends: list[float], names: list[str], colors: list[str]) -> None:
    """Names beside the ends of lines, pushed apart where they would overlap."""
    low, high = axis.get_ylim()
    order, apart = np.argsort(ends), 0.05 * (high - low)
    places = np.array(ends)[order]
    for _ in range(50):
        push = np.maximum(apart - np.diff(places), 0) / 2
        places[1:] += push
        places[:-1] -= push
    for i, y in zip(order, places, strict=True):
        axis.annotate(names[i], (x, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8, color=colors[i])
