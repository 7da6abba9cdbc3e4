"""Helpers of the figures of experiments, and the style of all figures (`lindm.figures.style`) in the same place."""

import io
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

from lindm.figures.style import BLUE as BLUE
from lindm.figures.style import BOUND as BOUND
from lindm.figures.style import COLORS as COLORS
from lindm.figures.style import DIVERGING as DIVERGING
from lindm.figures.style import EXACT as EXACT
from lindm.figures.style import GRAY as GRAY
from lindm.figures.style import GREEN as GREEN
from lindm.figures.style import MARKERS as MARKERS
from lindm.figures.style import MEASURED as MEASURED
from lindm.figures.style import ORANGE as ORANGE
from lindm.figures.style import PURPLE as PURPLE
from lindm.figures.style import RED as RED
from lindm.figures.style import SEED as SEED
from lindm.figures.style import SEQUENTIAL as SEQUENTIAL
from lindm.figures.style import SKY as SKY
from lindm.figures.style import STYLE as STYLE
from lindm.figures.style import YELLOW as YELLOW
from lindm.figures.style import file_backend as file_backend


def figure_files(name: str, figure: Any) -> dict[str, bytes]:
    """NAME.png and NAME.pdf of a figure: their contents. There are no dates in them: the same figure gives the same bytes."""
    import matplotlib

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it remarks on the missing date of every font it embeds
    # The layout is computed once, not for each format. `savefig` draws a figure twice as long as it has a layout engine
    # ("none" is one too), and gives it the engine of the style again.
    with matplotlib.rc_context({"figure.constrained_layout.use": False}):
        if engine := figure.get_layout_engine():
            engine.execute(figure)
        figure.set_layout_engine(None)
        contents = {}
        for ending, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, metadata=metadata)
            contents[f"{name}.{ending}"] = buffer.getvalue()
    return contents


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
