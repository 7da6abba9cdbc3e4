"""The style of all figures: readable in print and in black and white, safe for color-blind readers.

Colors: Okabe and Ito, *Color Universal Design* (2008); every series also has its own marker and dash. A color has one meaning
in a figure, a panel at most six series, and a logarithmic axis says so in its label (`figure_bytes` adds it). A figure is at most
`WIDTH` wide, with at most two panels of curves in a row: its letters can then be read at 400 pixels. What is seen in a figure is
its matplotlib label (`figure.set_label`), and becomes its alternative text.
"""

import contextlib
import io
import logging
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cycler import cycler

from lindm.io.files import make_parent, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

WIDTH = 7.6  # inches of a figure with several panels: at 400 pixels, letters of 8 points are 6 pixels high
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
INK = "#222222"  # a reference, or a series beside those of a palette
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
    "svg.hashsalt": "lindm",
}


@contextlib.contextmanager
def file_backend() -> Iterator[None]:
    """Figures of pyplot are drawn to files in this block, without windows; afterward the backend is that of before."""
    import matplotlib

    before, fallback = matplotlib.get_backend(), matplotlib.rcParams["backend_fallback"]
    if "inline" in before:  # of a notebook: loaded after another one, it would not show figures
        from matplotlib import pyplot

        pyplot.switch_backend(before)
    matplotlib.use("Agg")
    try:
        yield
    finally:
        matplotlib.use(before)
        matplotlib.rcParams["backend_fallback"] = fallback


KINDS = ("png", "pdf", "svg")
FORMATS = tuple(f".{kind}" for kind in KINDS)


def figure_bytes(figure: "Figure", kinds: Sequence[str] = KINDS) -> dict[str, bytes]:
    """Kind of file -> its content. Labels of logarithmic axes say so, and every file has the alternative text (`describe`).

    There are no dates in the files: the same figure gives the same bytes.
    """
    import matplotlib

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it remarks on the missing date of every font it embeds
    # The layout is computed here, not for each format. `savefig` draws a figure twice as long as it has a layout engine
    # ("none" is one too), and gives it the engine of the style again.
    with matplotlib.rc_context({"figure.constrained_layout.use": False, "svg.hashsalt": "lindm", "svg.fonttype": "none"}):
        _name_scales(figure)
        _break_long_lines(figure)
        text = describe(figure)
        figure.set_layout_engine(None)
        metadata = {
            "png": {"Software": None, "Description": text},
            "pdf": {"CreationDate": None, "Subject": text},
            "svg": {"Date": None, "Description": text},
        }
        contents = {}
        for kind in kinds:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata[kind])
            contents[kind] = _with_palette(buffer) if kind == "png" else buffer.getvalue()
    return contents


def _with_palette(png: io.BytesIO) -> bytes:
    """The PNG with a palette of 256 colors: a third of the bytes, with its alternative text and resolution.

    The choice of colors by "maximum coverage" keeps rare ones, such as that of a single point.
    """
    from PIL import Image, PngImagePlugin

    with Image.open(png) as image:
        texts = PngImagePlugin.PngInfo()
        for key, value in image.text.items():  # pyright: ignore[reportAttributeAccessIssue]
            texts.add_text(key, value)
        small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        small.save(buffer, format="png", optimize=True, pnginfo=texts, dpi=image.info["dpi"])
    return buffer.getvalue()


SCALES = {"log": "(log scale)", "symlog": "(symlog)"}  # scale of an axis -> the end of its label


def _name_scales(figure: "Figure") -> None:
    """Say "log scale" or "symlog" in the labels of such axes."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            name, text = SCALES.get(axis.get_scale()), axis.get_label_text()
            if name and text and not any(word.strip("()") in text for word in SCALES.values()):
                axis.set_label_text(f"{text} {name}")


def _break_long_lines(figure: "Figure") -> None:
    """Lay the figure out, and break labels of axes and titles that are longer than their panel into lines."""

    def lay_out() -> None:
        if engine := figure.get_layout_engine():
            engine.execute(figure)

    lay_out()
    whole = figure.get_window_extent()
    texts: list[tuple[Text, float, bool]] = [(text, 0.99 * whole.width, False) for text in figure.texts]
    for axes in figure.axes:
        room, titles = axes.get_window_extent(), {axes.get_title(loc=place) for place in ("left", "center")}
        texts += [(text, room.width, False) for text in _titles(axes) if text.get_text() in titles]
        texts += [(axes.xaxis.label, room.width, False), (axes.yaxis.label, room.height, True)]
    broken = []
    for text, room, upright in texts:
        extent = text.get_window_extent()
        if text.get_text() and (length := extent.height if upright else extent.width) > 1.02 * room:
            broken.append((text, in_lines(text.get_text(), room / length)))
    for text, lines in broken:
        text.set_text(lines)
    if broken:
        lay_out()


def _titles(axes: Any) -> "list[Text]":
    from matplotlib.text import Annotation, Text

    return [child for child in axes.get_children() if isinstance(child, Text) and not isinstance(child, Annotation)]


def in_lines(text: str, share: float) -> str:
    """The text in lines of about equal length, each at most `share` of the whole, broken at spaces outside of formulas.

    The scale of an axis at the end of its label has a line of its own.
    """
    scale = next((name for name in SCALES.values() if text.endswith(name)), "")
    words = re.sub(r"\$[^$]*\$| = ", lambda part: part[0].replace(" ", "\0"), text.removesuffix(scale))
    width = max(1, math.floor(len(text) * share))

    def lines(width: int) -> list[str]:
        return textwrap.wrap(words, width, break_long_words=False, break_on_hyphens=False)

    fewest = len(lines(width))
    while width > 1 and len(lines(width - 1)) == fewest:
        width -= 1
    return "\n".join([*lines(width), scale] if scale else lines(width)).replace("\0", " ")


def describe(figure: "Figure") -> str:
    """The alternative text: what is seen (the figure's own label), then title, axes and series of each panel."""

    def plain(text: str) -> str:
        return " ".join(text.replace("$", "").replace("\\", "").split())

    parts, before = [figure.get_label()] if figure.get_label() else [], []
    for axes in figure.axes:
        title = next((t for place in ("left", "center") if (t := axes.get_title(loc=place))), "")
        x, y = axes.get_xlabel(), axes.get_ylabel()
        over = f"{y} over {x}" if x and y else x or y
        names = axes.get_legend_handles_labels()[1]
        about = ": ".join(part for part in (title, over) if part)
        if names and names != before:  # panels of a row often have the same ones
            about += f" (series: {'; '.join(map(str, names))})"
        before = names
        if axes.get_visible() and axes.get_label() != "<colorbar>" and about:
            parts.append(f"{about}.")
    return plain(" ".join(map(str, parts)))


def alternative_text(png: bytes) -> str:
    """The alternative text in a PNG that `figure_bytes` has made; empty where there is none."""
    place = 8  # after the signature; then chunks: length, type, content, checksum
    while place + 8 <= len(png):
        length, kind = int.from_bytes(png[place : place + 4], "big"), png[place + 4 : place + 8]
        key, _, content = png[place + 8 : place + 8 + length].partition(b"\0")
        if key == b"Description" and kind == b"tEXt":
            return content.decode("latin-1")
        if key == b"Description" and kind == b"iTXt" and content[:1] == b"\0":  # not compressed
            # the method, then language and translated key, each up to a zero
            return content[2:].split(b"\0", 2)[-1].decode("utf-8", errors="replace")
        place += 12 + length
    return ""


def picture_kind(path: str | Path) -> str:
    """The kind of picture that a path asks for, PNG where its name has no ending. ValueError where it is none of `KINDS`."""
    kind = Path(path).suffix.removeprefix(".") or "png"
    if kind not in KINDS:
        raise ValueError(f"path must end in {', '.join(f'.{known}' for known in KINDS)}; got {path}")
    return kind


def render(draw: "Callable[[], Figure]", path: str | Path | None = None) -> "Figure":
    """The figure that `draw` makes, in this style, for a notebook, which shows the last value of a cell; and written to `path`.

    Settings of matplotlib are afterwards as before, and pyplot has closed the figure.

    Args:
      path: of a file, PNG where the name has no ending. [default: nothing is written]

    Raises:
      ValueError: the name of the file has another ending.
      StorageError: the file cannot be written.
    """
    from matplotlib import pyplot

    path = None if path is None else Path(path)
    kinds = [] if path is None else [picture_kind(path)]
    with file_backend(), pyplot.rc_context(STYLE):  # pyright: ignore
        figure = draw()
        try:
            contents = figure_bytes(figure, kinds)
        finally:
            pyplot.close(figure)
    if path is not None:
        make_parent(path)
        write_atomic(path, contents[kinds[0]])
    return figure


def save(draw: "Callable[[], Figure]", path: str | Path) -> Path:
    """Write the figure that `draw` makes (`render`); the path."""
    render(draw, path)
    return Path(path)
