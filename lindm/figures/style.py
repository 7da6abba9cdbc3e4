"""The style of all figures: readable in print and in black and white, safe for color-blind readers.

Colors: Okabe and Ito, *Color Universal Design* (2008); every series also has its own marker and dash.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cycler import cycler

from lindm.io.files import storage_errors, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


FORMATS = (".png", ".pdf", ".svg")


def save(draw: "Callable[[], Figure]", path: str | Path) -> Path:
    """Write the figure that `draw` makes, as PNG where the name has no ending. Settings of matplotlib are afterwards as before.

    Raises:
      StorageError: the file cannot be written.
    """
    from matplotlib import pyplot

    path = Path(path)
    kind = path.suffix.removeprefix(".") or "png"
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}  # no dates: equal bytes
    with file_backend(), pyplot.rc_context({**STYLE, "svg.hashsalt": "lindm"}):  # pyright: ignore
        figure, buffer = draw(), io.BytesIO()
        try:
            figure.savefig(buffer, format=kind, metadata=metadata.get(kind))
        finally:
            pyplot.close(figure)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
    return path
