"""A policy graph as a picture: a box for each node with its action, an arrow for each observation."""

from typing import TYPE_CHECKING

import numpy as np

from lindm.figures.style import COLORS, GRAY
from lindm.solvers.policy_graph import PolicyGraph

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NODES = 60
WIDTH, HEIGHT = 1.9, 0.85  # inches of a node with its surroundings
FONT = 9  # points
PAD = 0.35 * FONT  # points between the text of a box and its edge


def draw_policy_graph(graph: PolicyGraph) -> "Figure":
    """The picture, from the start on the left: a column for each stage, or for each number of steps from the start.

    Raises:
      ValueError: the graph has more nodes than can be read.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if (n := len(graph.actions)) > MAX_NODES:
        raise ValueError(f"a picture must have at most {MAX_NODES} nodes; this policy graph has {n}: save it as .json")
    places = _places(graph)
    extent = np.ptp(places, axis=0) + 1
    figure = Figure(figsize=(max(5.0, WIDTH * extent[0] + 1), max(2.6, HEIGHT * extent[1] + 1.2)))
    axis = figure.subplots()
    names = graph.problem.actions or tuple(f"action {a}" for a in range(graph.problem.num_actions))
    seen = np.flatnonzero(graph.expected.any(0))
    edge_color = {int(o): COLORS[i % len(COLORS)] for i, o in enumerate(seen)}
    dashes = {int(o): ("-", "--", ":", "-.")[(i // len(COLORS)) % 4] for i, o in enumerate(seen)}
    boxes = [
        axis.text(*place, f"{i + 1}  {names[a]}", ha="center", va="center", fontsize=FONT, bbox=_box(i == 0))  # pyright: ignore
        for i, (place, a) in enumerate(zip(places, graph.actions, strict=True))
    ]
    for i, o in np.argwhere(graph.expected & (graph.successors >= 0)):
        look = (seen.tolist().index(o), edge_color[int(o)], dashes[int(o)])
        _arrow(axis, places, boxes, int(i), int(graph.successors[i, o]), *look)
    labels = graph.problem.observations or tuple(f"observation {o}" for o in range(graph.problem.num_observations))
    lines = [Line2D([], [], color=edge_color[int(o)], linestyle=dashes[int(o)], marker="", label=labels[o]) for o in seen[:14]]  # pyright: ignore
    if lines:
        axis.legend(handles=lines, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(lines)), fontsize=8)
    low, high = places.min(0), places.max(0)
    axis.set(xlim=(low[0] - 0.6, high[0] + 0.6), ylim=(low[1] - 0.8, high[1] + 0.8))
    if not graph.is_stationary:
        for stage in range(int(graph.stages.max()) + 1):
            axis.text(stage, low[1] - 0.65, f"stage {stage + 1}", ha="center", fontsize=8, color=GRAY)
    axis.axis("off")
    about = f"A policy graph of {n} nodes from the start on the left: a box is a node with its action, an arrow an observation"
    figure.set_label(f"{about}; the first action is {names[graph.actions[0]]}.")
    return figure


def _box(start: bool) -> dict:
    return {
        "boxstyle": f"round,pad={PAD / FONT}",
        "facecolor": "white",
        "edgecolor": "#222222",
        "linewidth": 2.2 if start else 1.0,
    }


def _places(graph: PolicyGraph) -> np.ndarray:
    """[n, 2] the column and the height of each node."""
    column = graph.stages.copy() if not graph.is_stationary else np.full(len(graph.actions), -1)
    if graph.is_stationary:
        column[0], ahead = 0, [0]
        for i in ahead:
            for j in graph.successors[i][graph.expected[i]]:
                if column[j] < 0:
                    column[j] = column[i] + 1
                    ahead.append(int(j))
    height = np.zeros(len(column))
    for c in np.unique(column):
        here = np.flatnonzero(column == c)
        height[here] = (len(here) - 1) / 2 - np.arange(len(here))
    return np.stack([column.astype(float), height], axis=1)


def _arrow(axis, places, boxes, i: int, j: int, rank: int, color: str, dash: str) -> None:
    """An arrow from node i to node j; those of several observations between the same nodes lie apart."""
    from matplotlib.text import OffsetFrom

    # above the boxes: matplotlib places a box when it draws it, and an arrow that is drawn before ends where the box is not yet
    style = {"arrowstyle": "-|>", "color": color, "linestyle": dash, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    if i == j:
        style |= {"connectionstyle": f"arc3,rad={-1.1 - 0.4 * rank}"}
        left, right = OffsetFrom(boxes[i], (0.3, 1.0), "points"), OffsetFrom(boxes[i], (0.7, 1.0), "points")
        axis.annotate("", (0, PAD), xytext=(0, PAD), xycoords=right, textcoords=left, arrowprops=style, zorder=4)
        return
    forward = places[j][0] > places[i][0]
    bend = 0.06 + 0.1 * rank if forward else -(0.22 + 0.1 * rank)
    style |= {"connectionstyle": f"arc3,rad={bend}", "patchA": boxes[i].get_bbox_patch(), "patchB": boxes[j].get_bbox_patch()}
    axis.annotate("", places[j], places[i], arrowprops=style, zorder=4)
