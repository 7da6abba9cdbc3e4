"""The style of figures: every format from one figure, equal bytes, scales in the labels, and the alternative text."""

import ast
import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot, rc_context
from matplotlib.figure import Figure
from PIL import Image

from lindm.figures.style import KINDS, STYLE, WIDTH, alternative_text, describe, figure_bytes, in_lines, render

ROOT = Path(__file__).parents[3]


def drawn(height: float = 3.0, about: str = "The loss falls.") -> Figure:
    with rc_context(STYLE):  # pyright: ignore
        figure = Figure(figsize=(6.0, height))
        left, right = figure.subplots(1, 2)
        for k in (1, 2):
            left.plot([1, 10, 100], [1 / k, 0.1 / k, 0.01 / k], label=f"N = {k}")
        left.set(xscale="log", yscale="log", xlabel="pairs M", ylabel="squared error", title="Error")
        left.legend()
        right.plot([0, 1], [0, 1])
        right.set_yscale("symlog", linthresh=0.1)
        right.set(xlabel="attitude $\\alpha$", ylabel="loss", title="Loss")
        figure.set_label(about)
    return figure


def test_a_figure_has_every_format_and_equal_bytes():
    first, second = figure_bytes(drawn()), figure_bytes(drawn())
    assert list(first) == list(KINDS) and first == second
    assert first["png"][:4] == b"\x89PNG" and first["pdf"][:4] == b"%PDF" and b"<svg" in first["svg"]
    assert not any(b"Date" in content or b"date" in content for content in first.values())


def test_a_logarithmic_axis_says_so_once_and_in_a_second_line_where_there_is_no_room():
    figure = drawn()
    figure_bytes(figure, ["png"])
    figure_bytes(figure, ["png"])
    left, right = figure.axes
    assert (left.get_xlabel(), right.get_ylabel()) == ("pairs M (log scale)", "loss (symlog)")
    assert left.get_ylabel() == "squared error (log scale)" and right.get_xlabel() == "attitude $\\alpha$"
    low = drawn(height=2.0)
    figure_bytes(low, ["png"])
    assert low.axes[0].get_ylabel() == "squared error\n(log scale)"


def test_a_rendered_figure_is_shown_once_and_written_where_a_path_is_given(tmp_path):
    def draw():
        figure, axis = pyplot.subplots()
        axis.set(yscale="log", ylabel="loss")
        return figure

    before, backend = pyplot.rcParams["font.size"], pyplot.get_backend()
    shown = render(draw)
    assert shown.axes[0].get_ylabel() == "loss (log scale)" and not list(tmp_path.iterdir())
    render(draw, tmp_path / "new" / "loss")
    assert (tmp_path / "new" / "loss").read_bytes().startswith(b"\x89PNG")
    # pyplot has closed both: a notebook does not show them twice
    assert pyplot.get_fignums() == [] and pyplot.rcParams["font.size"] == before and pyplot.get_backend() == backend


@pytest.mark.parametrize("about", ["The loss falls.", "The loss falls to ∞ by Ψ."])  # latin-1, and beyond it
def test_the_alternative_text_is_in_every_file(about):
    figure = drawn(about=about)
    contents = figure_bytes(figure)
    text = alternative_text(contents["png"])
    assert (
        text
        == describe(figure)
        == (
            f"{about} Error: squared error (log scale) over pairs M (log scale) (series: N = 1; N = 2). "
            "Loss: loss (symlog) over attitude alpha."
        )
    )
    assert about.encode() in contents["svg"]
    assert alternative_text(b"") == alternative_text(contents["png"][:40]) == alternative_text(b"no picture at all") == ""


@pytest.mark.parametrize(
    "text, share, lines",
    [
        ("squared error (log scale)", 0.9, ["squared error", "(log scale)"]),
        ("a loss of the layer at N = 4 and M = 8", 0.5, ["a loss of the layer", "at N = 4 and M = 8"]),
        ("the distance $e^s (v + m_2) / M$ of one head", 0.5, ["the distance", "$e^s (v + m_2) / M$", "of one head"]),
        ("indivisible", 0.2, ["indivisible"]),
    ],
)
def test_long_text_is_broken_at_spaces_outside_of_formulas(text, share, lines):
    assert in_lines(text, share).split("\n") == lines


def test_titles_and_labels_that_are_longer_than_their_panel_are_broken():
    figure = drawn()
    left, right = figure.axes
    left.set_title("The loss falls with the number of pairs in the context of the layer", loc="left")
    right.set_xlabel("attitude to ambiguity (0: the best model, 1: the worst)")
    right.text(0.5, 0.5, "a remark that is longer than its panel, and stays as it is").set_in_layout(False)
    figure_bytes(figure, ["png"])
    assert left.get_title(loc="left").count("\n") >= 1 and right.get_xlabel().count("\n") >= 1
    assert right.get_title(loc="left") == "Loss" and "\n" not in right.texts[0].get_text()
    for text in (left._left_title, right.xaxis.label):  # pyright: ignore[reportAttributeAccessIssue]
        assert text.get_window_extent().width <= 1.1 * left.get_window_extent().width


def test_a_png_has_a_palette_and_the_colors_of_its_figure():
    figure = drawn()
    with Image.open(io.BytesIO(figure_bytes(figure, ["png"])["png"])) as image:
        assert image.mode == "P" and len(image.getcolors()) <= 256
        small = np.asarray(image.convert("RGB"), int)
    figure.savefig(buffer := io.BytesIO(), format="png")
    with Image.open(buffer) as image:
        exact = np.asarray(image.convert("RGB"), int)
    assert small.shape == exact.shape and (small[0, 0] == 255).all()
    assert np.abs(small - exact).max() <= 20 and np.abs(small - exact).mean() < 0.5


EXPERIMENTS = ROOT / "experiments/lindm_experiments"
MAKERS = ("pyplot.subplots", "pyplot.figure", "panel_grid")


def drawing_functions() -> list:
    found = []
    for path in sorted([*EXPERIMENTS.glob("*.py"), *EXPERIMENTS.glob("lib/*.py"), *EXPERIMENTS.glob("toolkit/*.py")]):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                calls = [c for c in ast.walk(node) if isinstance(c, ast.Call) and ast.unparse(c.func) in MAKERS]
                if calls:
                    found.append(pytest.param(ast.unparse(node), calls, id=f"{path.stem}.{node.name}"))
    return found


@pytest.mark.parametrize("code, calls", drawing_functions())
def test_every_figure_of_an_experiment_says_what_is_seen_and_can_be_read_at_400_pixels(code, calls):
    assert code.count("figure.set_label(") == len(calls)
    for size in [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "figsize"]:
        assert isinstance(size, ast.Tuple), "the width must be seen in the call"
        width = size.elts[0]
        least = width.args[0] if isinstance(width, ast.Call) and ast.unparse(width.func) == "min" else width
        assert ast.unparse(least) == "WIDTH" or ast.literal_eval(least) <= WIDTH
