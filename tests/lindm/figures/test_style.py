"""The style of figures: every format from one figure, equal bytes, scales in the labels, and the alternative text."""

import ast
from pathlib import Path

import pytest
from matplotlib import pyplot, rc_context
from matplotlib.figure import Figure

from lindm.figures.style import KINDS, STYLE, alternative_text, describe, figure_bytes, render

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
    low = drawn(height=1.6)
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


def drawing_functions() -> list:
    found = []
    for path in sorted((ROOT / "experiments/lindm_experiments").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and (
                "pyplot.subplots(" in (code := ast.unparse(node)) or "pyplot.figure(" in code
            ):
                found.append(pytest.param(code, id=f"{path.stem}.{node.name}"))
    return found


@pytest.mark.parametrize("code", drawing_functions())
def test_every_figure_of_an_experiment_says_what_is_seen(code):
    assert code.count("figure.set_label(") == code.count("pyplot.subplots(") + code.count("pyplot.figure(")
