"""One look for all figures: readable in print and in black and white, safe for colour-blind readers.

Colours: Okabe and Ito, *Color Universal Design* (2008); every series also has its own marker and dash.
"""

from typing import Any

from cycler import cycler

BLUE, ORANGE, GREEN, PURPLE, RED, SKY, YELLOW, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#F0E442",
    "#6B6B6B",
)
COLORS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"

MEASURED: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4.5}  # what was measured: points
EXACT: dict[str, Any] = {"linestyle": "-", "linewidth": 1.6}  # what theory predicts exactly: a line
BOUND: dict[str, Any] = {"linestyle": "--", "linewidth": 1.4}  # what theory only bounds: a dashed line
SEED: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.35}  # one seed: every seed is shown


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
