"""Helpers of the figures of experiments, and the style of all figures (`lindm.figures.style`) in the same place."""

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
from lindm.figures.style import INK as INK
from lindm.figures.style import MARKERS as MARKERS
from lindm.figures.style import MEASURED as MEASURED
from lindm.figures.style import ORANGE as ORANGE
from lindm.figures.style import PURPLE as PURPLE
from lindm.figures.style import RED as RED
from lindm.figures.style import SEED as SEED
from lindm.figures.style import SEQUENTIAL as SEQUENTIAL
from lindm.figures.style import SKY as SKY
from lindm.figures.style import STYLE as STYLE
from lindm.figures.style import WIDTH as WIDTH
from lindm.figures.style import YELLOW as YELLOW
from lindm.figures.style import figure_bytes
from lindm.figures.style import file_backend as file_backend


def figure_files(name: str, figure: Any) -> dict[str, bytes]:
    """NAME.png, NAME.pdf and NAME.svg of a figure: their contents, with its alternative text (`style.figure_bytes`)."""
    return {f"{name}.{kind}": content for kind, content in figure_bytes(figure).items()}


def panel_grid(number: int, height: float, *, ylabel: str = "", free: bool = False, **options: Any) -> tuple[Any, list[Any]]:
    """A figure with two panels in a row, `height` inches each, and its cells in order.

    The last one of an odd number is as wide as the figure, where `free` is not asked for.

    Args:
      ylabel: of the first panel in each row.
      free: there is at least one cell without axes, the place of a legend.
      options: as of pyplot.subplots.
    """
    from matplotlib import pyplot

    rows = -(-(number + free) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(WIDTH, height * rows), squeeze=False, **options)
    cells = list(axes.flat)
    if number % 2 and not free:
        cells[-2].set_subplotspec(cells[-2].get_gridspec()[-1, :])
        cells.pop().remove()
    for panel in cells[:number:2]:
        panel.set_ylabel(ylabel)
    for cell in cells[number:]:
        cell.set_axis_off()
    return figure, cells


def legend_below(axis: Any, **options: Any) -> None:
    """A legend under the label of the x axis, which is one line; `options` as of matplotlib's legend."""
    from matplotlib.transforms import offset_copy

    below = offset_copy(axis.transAxes, axis.figure, x=-20, y=-33, units="points")
    place = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": below, "borderaxespad": 0.2}
    axis.legend(**place | {"fontsize": 8} | options)


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
    """A logarithmic x axis with ticks at the measured values alone; of crowded ones some have no number."""
    values = sorted(values)
    axis.set_xscale("log")
    labels, right = [], np.inf
    for value in reversed(values):
        name = f"{value:,g}"
        place = np.log(value / values[0]) / np.log(values[-1] / values[0]) if value > values[0] else 0.0
        numbered = right - place >= 0.035 * len(name)  # of the axis: a digit in half of the width of a figure
        right = place if numbered else right
        labels.append(name if numbered else "")
    axis.set_xticks(values, labels[::-1])
    axis.xaxis.minorticks_off()


def label_line_ends(axis: Any, x: float, ends: list[float], names: list[str], colors: list[str]) -> None:
    """Names beside the ends of lines, pushed apart where they would overlap."""
    low, high = axis.get_ylim()
    order, apart = np.argsort(ends), 0.07 * (high - low)
    places = np.array(ends)[order]
    for _ in range(50):
        push = np.maximum(apart - np.diff(places), 0) / 2
        places[1:] += push
        places[:-1] -= push
    for i, y in zip(order, places, strict=True):
        axis.annotate(names[i], (x, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8, color=colors[i])
