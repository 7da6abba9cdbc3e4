"""The helpers of figures: panels, legends and ticks where they cover nothing."""

import io

import pytest
from matplotlib import pyplot, rc_context

from lindm.figures.style import figure_bytes
from lindm_experiments.harness.figures import STYLE, WIDTH, legend_below, panel_grid, set_log_ticks


@pytest.fixture(autouse=True)
def _style():
    with rc_context(STYLE):  # pyright: ignore
        yield
    pyplot.close("all")


@pytest.mark.parametrize("number, free, columns", [(2, False, [1, 1]), (3, False, [1, 1, 2]), (3, True, [1, 1, 1, 1])])
def test_two_panels_stand_in_a_row_and_a_last_one_alone_is_wide(number, free, columns):
    figure, cells = panel_grid(number, 3.0, ylabel="loss", free=free)
    assert figure.get_figwidth() == WIDTH and figure.get_figheight() == 3.0 * ((number + free + 1) // 2)
    assert [len(cell.get_subplotspec().colspan) for cell in cells] == columns and figure.axes == cells
    assert [cell.axison for cell in cells] == [True] * number + [False] * (len(cells) - number)
    assert [cell.get_ylabel() for cell in cells[:number]] == ["loss", "", "loss"][:number]


def test_a_legend_below_covers_neither_the_label_nor_the_next_row():
    figure, cells = panel_grid(4, 3.0)
    for cell in cells:
        cell.plot([1, 2], [1, 2], label="a series")
        cell.set(xlabel="pairs in the prompt", title="a title")
        legend_below(cell)
    figure_bytes(figure, ["png"])
    figure.savefig(io.BytesIO(), format="png")
    for place, cell in enumerate(cells):
        legend = cell.get_legend().get_window_extent()
        assert legend.y1 <= cell.xaxis.label.get_window_extent().y0
        if place < 2:
            assert legend.y0 >= cells[place + 2].get_tightbbox().y1


@pytest.mark.parametrize(
    "values, numbers",
    [
        ([4, 8, 16, 32, 64, 128], ["4", "8", "16", "32", "64", "128"]),
        ([131072, 512, 1024, 2048, 4096, 8192], ["512", "", "2,048", "", "8,192", "131,072"]),
        ([3], ["3"]),
    ],
)
def test_crowded_ticks_have_no_number_and_the_last_one_always_has(values, numbers):
    _, axis = pyplot.subplots()
    axis.plot(values, values)
    set_log_ticks(axis, values)
    assert axis.get_xticks().tolist() == sorted(values) and axis.get_xscale() == "log"
    assert [text.get_text() for text in axis.get_xticklabels()] == numbers
