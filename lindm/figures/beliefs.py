"""Value and best action over the beliefs of a POMDP of two or three states, and over the attitude to ambiguity."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lindm.figures.style import BLUE, COLORS, WIDTH
from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers import point_based, tree
from lindm.solvers.ties import greedy
from lindm.types import APOMDP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 41  # beliefs of two states
PARTS = 16  # of a side of the triangle of three states
ATTITUDES = 21
MAX_TREE = 1 << 28  # bytes of the tree at one attitude and one belief


@dataclass(frozen=True, kw_only=True)
class BeliefValues:
    """Bounds over the beliefs of a problem."""

    beliefs: np.ndarray  # [n, S]
    lower: np.ndarray  # [n, A] bounds of the action values
    upper: np.ndarray  # [n, A]

    @property
    def actions(self) -> np.ndarray:
        """[n] the action with the largest lower bound."""
        return self.lower.argmax(1)


def belief_grid(states: int) -> np.ndarray:
    """Beliefs [n, S] of two or three states, evenly spread. ValueError: another number of states."""
    if states == 2:
        first = np.linspace(0, 1, POINTS)
        return np.stack([first, 1 - first], axis=1)
    if states == 3:
        return np.array([(i, j, PARTS - i - j) for i in range(PARTS + 1) for j in range(PARTS + 1 - i)]) / PARTS
    raise ValueError(f"a figure over the beliefs takes problems of 2 or 3 states; this one has {states}")


def belief_values(
    problem: StationaryPOMDP,
    horizon: float = math.inf,
    *,
    relative: float = 1e-3,
    timeout: float = math.inf,
    on_belief: Callable[[int, int], None] = lambda done, total: None,
) -> BeliefValues:
    """Bounds at the beliefs of `belief_grid`; `relative` and `timeout` as of `point_based.bounds_at`."""
    beliefs = belief_grid(problem.num_states)
    lower, upper = point_based.bounds_at(
        problem, beliefs, horizon, relative=relative, tolerance=1e-9, timeout=timeout, on_belief=on_belief
    )
    return BeliefValues(beliefs=beliefs, lower=lower, upper=upper)


def draw_belief_values(values: BeliefValues, problem: StationaryPOMDP, horizon: float) -> "Figure":
    """Two states: the bounds of the value as a band, and a strip of the best action. Three: both over the triangle of beliefs."""
    from matplotlib.figure import Figure

    states = problem.states or tuple(f"state {s}" for s in range(problem.num_states))
    actions = problem.actions or tuple(f"action {a}" for a in range(problem.num_actions))
    end = "without an end" if horizon == math.inf else f"{int(horizon)} stages"
    if problem.num_states == 2:
        figure = Figure(figsize=(6.4, 4.6))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(6, 1))
        x, lower, upper = values.beliefs[:, 0], values.lower.max(1), values.upper.max(1)
        draw_bounds(above, x, lower, upper, color=BLUE, alpha=0.25, label="between the bounds")
        above.plot(x, (lower + upper) / 2, color=BLUE, marker="", label="value (middle of the bounds)")
        above.set(ylabel="value", title=f"Value and best first action, {end}", xlim=(0, 1))
        above.legend(fontsize=8, loc="best")
        draw_action_strips(below, x, values.actions[None], [COLORS[(a + 1) % len(COLORS)] for a in range(len(actions))], actions)
        below.set(xlabel=f"probability of {states[0]}", yticks=[])
        below.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.9), ncols=min(4, len(np.unique(values.actions))))
        figure.set_label(f"Value over the belief, between its bounds, and a strip of the best first action, {end}.")
        return figure
    figure = Figure(figsize=(WIDTH, 3.9))
    left, right = figure.subplots(1, 2)
    corners = np.array([(0.0, 0.0), (1.0, 0.0), (0.5, math.sqrt(0.75))])
    x, y = (values.beliefs @ corners).T
    middle = (values.lower.max(1) + values.upper.max(1)) / 2
    filled = left.tricontourf(x, y, middle, levels=14)
    figure.colorbar(filled, ax=left, label="value (middle of the bounds)", location="bottom", shrink=0.8)
    for a in np.unique(values.actions):
        here = values.actions == a
        right.scatter(x[here], y[here], s=30, marker="h", color=COLORS[(a + 1) % len(COLORS)], label=actions[a])
    width = float((values.upper.max(1) - values.lower.max(1)).max())
    figure.set_label(f"The value (left) and the best first action (right) over the triangle of beliefs of {', '.join(states)}.")
    left.set_title(f"Value, {end} (bounds within {width:.2g})")
    right.set_title("Best first action")
    right.legend(loc="upper left", fontsize=8)
    for axis in (left, right):
        for corner, name, (dx, dy) in zip(corners, states, ((-4, -12), (4, -12), (0, 6)), strict=True):
            axis.annotate(name, corner, (dx, dy), textcoords="offset points", ha="center", fontsize=9)
        axis.set(xlim=(-0.12, 1.12), ylim=(-0.12, 1.0), aspect="equal")
        axis.axis("off")
    return figure


def draw_bounds(axis: Any, x: np.ndarray, lower: np.ndarray, upper: np.ndarray, **style: Any) -> None:
    """A band between bounds [n] over the probability x [n] of a state; `style` as of matplotlib's fill_between."""
    axis.fill_between(x, lower, upper, linewidth=0, **style)


def draw_action_strips(
    axis: Any, x: np.ndarray, actions: np.ndarray, colors: Sequence[str], names: Sequence[str] | None = None
) -> None:
    """A strip of the best actions [rows, n] over the probability x [n] of a state for each row, the first one at the top.

    Args:
      colors: of each action.
      names: of each action, for a legend of those that occur. [default: the strips have no labels]
    """
    from matplotlib.colors import ListedColormap

    edges = np.concatenate([[0.0], (x[1:] + x[:-1]) / 2, [1.0]])
    for row, best in enumerate(actions):
        ends = np.array([row - 0.36, row + 0.36])
        axis.pcolormesh(edges, ends, best[None], cmap=ListedColormap(list(colors)), vmin=0, vmax=len(colors) - 1, rasterized=True)
    axis.set_ylim(len(actions) - 0.4, -0.6)
    axis.grid(False)
    if names:
        for a in np.unique(actions):
            axis.fill_between([], [], color=colors[a], label=names[a])


# --- attitudes ----------------------------------------------------------------------------------------------------------------


@jax.jit
def _first_actions(problem: APOMDP, alphas: jax.Array, beliefs: jax.Array) -> jax.Array:
    """The best first action [alphas, beliefs] where the belief under every model is the same one."""

    def best(alpha: jax.Array, belief: jax.Array) -> jax.Array:
        rho = jnp.broadcast_to(belief, problem.models.rho.shape)
        return greedy(tree.tree(replace(problem, alpha=alpha, models=replace(problem.models, rho=rho))).Q[0])

    return jax.lax.map(lambda alpha: jax.lax.map(lambda belief: best(alpha, belief), beliefs), alphas)


def attitude_actions(problem: APOMDP, on_belief: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
    """The best first actions [pairs, attitudes, n] of `ATTITUDES` attitudes and `POINTS` beliefs between each pair of states.

    Args:
      on_belief: called with the number of beliefs that are done, and of all, after each pair.

    Raises:
      ValueError: the problem has another number of states than two or three, or a tree that is too large.
    """
    belief_grid(problem.num_states)
    if (needed := tree.memory_bytes(problem)) > MAX_TREE:
        raise ValueError(f"a figure over the attitudes solves trees of at most {MAX_TREE:,} bytes; this one takes {needed:,}")
    second = np.linspace(0, 1, POINTS)
    best = []
    pairs = list(combinations(range(problem.num_states), 2))
    for i, j in pairs:
        on_belief(len(best) * POINTS, len(pairs) * POINTS)
        beliefs = np.zeros((POINTS, problem.num_states))
        beliefs[:, i], beliefs[:, j] = 1 - second, second
        best.append(np.asarray(_first_actions(problem, jnp.linspace(0, 1, ATTITUDES), jnp.asarray(beliefs))))
    on_belief(len(pairs) * POINTS, len(pairs) * POINTS)
    return np.array(best)


def draw_attitudes(best: np.ndarray, states: tuple[str, ...], actions: tuple[str, ...], alpha: float) -> "Figure":
    """The best first action by the attitude and the belief, for each pair of states: where the color changes is the threshold.

    A line marks the attitude `alpha` of the problem.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    pairs = list(combinations(range(2 if len(best) == 1 else 3), 2))
    states = states or tuple(f"state {s}" for s in range(3))
    figure = Figure(figsize=(6.4, 4.6) if len(pairs) == 1 else (WIDTH, 6.6))
    axes = figure.subplots(-(-len(pairs) // 2), min(2, len(pairs)), squeeze=False).ravel()
    for cell in axes[len(pairs) :]:
        cell.set_axis_off()
    colors = ListedColormap([COLORS[(a + 1) % len(COLORS)] for a in range(int(best.max()) + 1)])
    norm = BoundaryNorm(np.arange(colors.N + 1) - 0.5, colors.N)
    alphas, second = np.linspace(0, 1, ATTITUDES), np.linspace(0, 1, POINTS)
    for axis, (i, j), here in zip(axes, pairs, best, strict=False):
        axis.pcolormesh(alphas, second, here.T, cmap=colors, norm=norm, alpha=0.55, shading="nearest", rasterized=True)
        axis.axvline(alpha, color="black", linestyle="--", linewidth=1, marker="")
        axis.set(xlabel="attitude alpha (1: the worst model)", ylabel=f"probability of {states[j]}, else {states[i]}")
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.grid(False)
    patches: list[Any] = [
        Patch(color=colors(int(a)), alpha=0.55, label=actions[a] if actions else f"action {a}") for a in np.unique(best)
    ]
    patches.append(Line2D([], [], color="black", linestyle="--", linewidth=1, marker="", label=f"alpha = {alpha:g}"))
    figure.set_label("The best first action over the attitude to ambiguity and the belief; colors change at the thresholds.")
    title = "best first action"
    if len(axes) > len(pairs):
        axes[-1].legend(handles=patches, title=title, loc="center")
    else:
        figure.legend(handles=patches, title=title, loc="outside lower center", ncols=4)
    return figure
