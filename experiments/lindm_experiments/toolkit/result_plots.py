"""Figures of the toolkit, in the style of the experiments."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lindm.evaluation.environments import double_precision
from lindm.figures.style import INK
from lindm.figures.style import render as render
from lindm_experiments.harness.figures import (
    BLUE,
    BOUND,
    COLORS,
    EXACT,
    GRAY,
    MARKERS,
    ORANGE,
    RED,
    SEQUENTIAL,
    legend_below,
    panel_grid,
)
from lindm_experiments.toolkit.risks import Risk, balance_lengths, risk_grid

if TYPE_CHECKING:
    from lindm_experiments.toolkit.layers import MeasuredLadder, MeasuredRisk

GRID = 60  # lengths of each axis of a contour plot


def _span(lengths: np.ndarray) -> np.ndarray:
    return np.geomspace(max(lengths.min() / 2, 1), lengths.max() * 2, GRID)


def plain_log(axis) -> None:
    """Both axes logarithmic, with ticks at 1, 2, 5 and numbers in place of powers of ten."""
    axis.set(xscale="log", yscale="log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        side.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        side.set_minor_locator(NullLocator())


def risk_figure(table: Risk) -> Figure:
    """Left: contours of the exact risk over (M, N) with the balance line and the best N. Right: risk and bounds along M."""
    N, M = _span(table.train_lengths), _span(table.test_lengths)
    Lambda, K, Psi = table.covariance, table.fourth_moment, table.task_covariance
    with double_precision():
        arrays = [jnp.asarray(a) for a in (Lambda, K, Psi)]
        grid = np.asarray(risk_grid(*arrays, table.noise, jnp.asarray(N), jnp.asarray(M)).total)
        along = risk_grid(*arrays, table.noise, jnp.asarray(table.train_lengths, float), jnp.asarray(M)).total
        balance = None
        if table.balance_lengths is not None:
            balance = np.asarray(balance_lengths(*arrays, table.noise, jnp.asarray(M))[0])
    figure, (left, right) = panel_grid(2, 5.2)
    lines = left.contourf(M, N, np.log10(grid), levels=14, cmap=SEQUENTIAL)
    bar = figure.colorbar(lines, ax=left, label="exact risk", location="top")
    low, high = np.log10(grid.min()), np.log10(grid.max())
    steps = (1, 2, 5) if high - low < 1 else (1, 3) if high - low < 2.5 else (1,)  # more labels run into each other
    ticks = [t for t in (k * 10.0**p for p in range(int(low) - 1, int(high) + 2) for k in steps) if low <= np.log10(t) <= high]
    bar.set_ticks(np.log10(ticks), labels=[f"{t:g}" for t in ticks])
    left.plot(M, M, color=INK, marker="", label="best N for the risk: N = M")
    if balance is not None:
        left.plot(M, balance, color=ORANGE, marker="", linestyle="--", linewidth=2, label="bias = estimation")
    left.set(ylim=(N[0], N[-1]), xlabel="pairs in a test prompt M", ylabel="pairs in a training prompt N")
    left.grid(False)
    legend_below(left)
    name, bound = ("general bound", table.general_bound) if table.paper_bound is None else ("eq. (6)", table.paper_bound)
    marks = zip(COLORS, MARKERS, strict=True)
    for i, (length, (color, marker)) in enumerate(zip(table.train_lengths, list(marks) * len(table.train_lengths), strict=False)):
        right.plot(M, along[i], color=color, label=f"N = {length}, exact", **EXACT)
        error = None if table.standard_error is None else 1.96 * table.standard_error[i]
        right.errorbar(table.test_lengths, table.total[i], error, color=color, marker=marker, linestyle="none", capsize=2)
        right.plot(table.test_lengths, bound[i], color=color, **BOUND)
    right.set(xlabel="pairs in a test prompt M", ylabel="risk")
    right.plot([], [], color=GRAY, label=name, **BOUND)
    legend_below(right, ncols=2)
    for axis in (left, right):
        plain_log(axis)
    source = "exact moments" if table.samples is None else f"moments estimated from {table.samples} samples"
    figure.suptitle(f"Risk of the trained layer: {table.law}, d = {len(Lambda)}, {source}", x=0.01, ha="left")
    figure.set_label("Exact risk of the trained layer: contours over both lengths on the left, curves and bounds on the right.")
    return figure


def measured_risk_figure(result: "MeasuredRisk") -> Figure:
    """The risk of a layer of one's own along M: seeds, their interval, the exact risk of A_N and its two parts."""
    exact, lengths = result.exact, result.exact.test_lengths
    M = _span(lengths)
    with double_precision():
        arrays = [jnp.asarray(a) for a in (exact.covariance, exact.fourth_moment, exact.task_covariance)]
        parts = risk_grid(*arrays, exact.noise, jnp.asarray(exact.train_lengths, float), jnp.asarray(M))
    figure, axis = pyplot.subplots()
    axis.plot(M, parts.total[0], color=BLUE, label="exact risk of the linear layer", **EXACT)
    axis.plot(M, parts.estimation[0], color=GRAY, marker="", linestyle=":", label="its estimation error")
    axis.plot(M, parts.bias[0], color=GRAY, marker="", linestyle="-.", label="its training-length bias")
    axis.plot(lengths, result.measured.T, color=RED, alpha=0.3, markersize=3, marker="o", linestyle="none")
    spread = np.abs(result.interval.T - result.mean[None])
    axis.errorbar(lengths, result.mean, spread, color=RED, marker="o", linestyle="none", capsize=3, label="this layer, measured")
    axis.set(xlabel="pairs in a test prompt M", ylabel="risk")
    axis.set_title(f"{exact.law}, d = {len(exact.covariance)}, N = {exact.train_lengths[0]}, {len(result.measured)} seeds")
    axis.legend(fontsize=8)
    plain_log(axis)
    figure.set_label("Measured risk of a layer with 95 % intervals, the exact risk of the linear layer, and its two parts.")
    return figure


def ladder_figure(result: "MeasuredLadder") -> Figure:
    """The exact loss and every bound as points on a logarithmic axis, seeds as ticks."""
    names = list(result.values)
    seeds = np.array([result.values[name].mean(1) for name in names])
    figure, axis = pyplot.subplots(figsize=(7.2, 3.2))
    means = seeds.mean(1)
    left = means[means > 0].min() / 3
    for i, name in enumerate(names):
        color = BLUE if name == "suboptimality" else GRAY
        axis.plot(seeds[i], np.full(seeds.shape[1], i), "|", color=color, markersize=9, alpha=0.7)
        axis.plot(max(means[i], left), i, "o", color=color, markersize=6)
        axis.text(max(seeds[i].max(), left) * 1.1, i, f"{means[i]:.3g}  ×{means[i] / means[0]:.3g}", va="center", fontsize=8)
    axis.set(xscale="log", xlim=(left, seeds.max() * 4), xlabel="loss of the policy and its bounds")
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.invert_yaxis()
    figure.set_label("The exact loss of the policy (above) and every bound, as points with numbers and multiples of the loss.")
    tasks = result.values["suboptimality"].shape[1]
    figure.suptitle(
        f"Exact suboptimality and the bounds above it ({seeds.shape[1]} seeds, {tasks} tasks each)", x=0.01, ha="left"
    )
    return figure
