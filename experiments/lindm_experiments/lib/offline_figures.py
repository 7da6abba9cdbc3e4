"""The figures of `offline_data`."""

from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm_experiments.harness.figures import (
    BLUE,
    EXACT,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SEED,
    WIDTH,
    panel_grid,
    set_log_ticks,
)
from lindm_experiments.harness.statistics import crossed_ci
from lindm_experiments.lib.jumps import change_point, power_law
from lindm_experiments.lib.offline_cells import CELLS, REFERENCE
from lindm_experiments.lib.offline_claims import LENGTHS, YARDSTICK, Records

LINES = {"behavior": "demonstrator", "bc": "behavior cloning (bc)", "lsvi": "LSVI", YARDSTICK: "Bayes (yardstick)"}
DASHES = {"behavior": ":", "bc": "--", "lsvi": "-.", YARDSTICK: "-"}
SIZES = {"tiny": ("1.4 M weights", BLUE), "small": ("10 M weights", ORANGE), "pretrained": ("SmolLM2, 135 M", GREEN)}
GAP = "normalized optimality gap"
ROUND = tuple(k * 10**p for p in range(1, 6) for k in (1, 2, 5))
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1)


def plot(records: list[dict]) -> dict[str, Figure]:
    r = Records(records)
    figures: dict[str, Figure] = {}
    if r.main is not None:
        figures |= {"law": _law(r, r.main), "curves": _curves(r, r.main)}
    if any(r.trainings_of(name) for name, cell in CELLS.items() if cell.factor != "base"):
        figures["factors"] = _factors(r)
    if all(r.trainings_of(name) for name in LENGTHS):
        figures["lengths"] = _lengths(r)
    return figures


def _log_gaps(axis: Any) -> None:
    axis.set_yscale("log")
    axis.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axis.yaxis.minorticks_off()


def _law(r: Records, main: str) -> Figure:
    """Gap over training sequences for each size of model, and over distinct tasks at a fixed number of steps."""
    figure, axis = pyplot.subplots(figsize=(WIDTH, 4.6))
    for name, (label, color) in SIZES.items():
        name = main if name == "tiny" else name
        if r.trainings_of(name):
            n, gaps = r.curves(name, "gap")
            for curve in gaps:
                axis.plot(n, curve, color=color, **SEED)
            axis.plot(n, gaps.mean(0), color=color, label=f"{label}, each sequence seen once", **EXACT)
    if r.law is not None and len(sizes := r.sizes(r.law)) > 1:
        means = [crossed_ci(r.sft(r.law, size)) for size in sizes]
        ends = np.array([[m - low, high - m] for m, (low, high) in means]).T
        style = {"linestyle": "none", "marker": "o", "color": PURPLE, "capsize": 2}
        axis.errorbar(sizes, [m for m, _ in means], ends, label=f"{SIZES['tiny'][0]}, n distinct sequences, same steps", **style)
    for policy, label in LINES.items():
        if r.row(main, policy) is not None:
            level = r.policy(main, policy).mean()
            axis.axhline(level, color=GRAY, linestyle=DASHES[policy], linewidth=1.2, marker="")
            axis.annotate(
                label, (1, level), (4, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8, color=GRAY
            )
    axis.set(xscale="log", xlabel="training sequences", ylabel=f"{GAP} (log scale)")
    _log_gaps(axis)
    axis.set_ylim(0.015, 1.5)  # an interval over two trainings can be wider, down to below 0
    axis.legend(loc="lower left", fontsize=8)
    figure.set_label(
        "The gap over training sequences: lines for sizes of models, points for distinct tasks, gray lines for other policies."
    )
    return figure


def _curves(r: Records, main: str) -> Figure:
    """Held-out loss over training sequences, with the best power law and the best change point."""
    names = [name for name in (main, "small", "pretrained") if r.trainings_of(name)]
    figure, axes = panel_grid(len(names), 3.0 if len(names) > 2 else 4.0, ylabel="held-out loss, nats a label")
    for axis, name in zip(axes, names, strict=True):
        n, losses = r.curves(name, "loss")
        for curve in losses:
            axis.plot(n, curve, color=BLUE, **SEED)
        mean = losses.mean(0)
        axis.plot(n, mean, color=BLUE, linestyle="none", marker="o", label="mean over trainings")
        axis.plot(n, power_law(n, mean).values, color=RED, linestyle="--", marker="", label="best power law")
        fit, k = change_point(n, mean)
        axis.plot(n[:k], fit.values[:k], color=GREEN, marker="", label="best change point")
        axis.plot(n[k:], fit.values[k:], color=GREEN, marker="")
        axis.set(xlabel="training sequences", title=SIZES["tiny" if name == main else name][0])
        set_log_ticks(axis, [x for x in ROUND if n[0] <= x <= n[-1]] or n)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.set_label(
        "The held-out loss over training sequences (points), with the best power law (dashed) and the best change point (line)."
    )
    return figure


def _factors(r: Records) -> Figure:
    """The gap in every cell, with that of bc and of the yardstick in the same tasks; the reference first."""
    names = sorted((name for name in CELLS if r.trainings_of(name)), key=lambda name: name != REFERENCE)
    figure, axis = pyplot.subplots(figsize=(WIDTH, 0.32 * len(names) + 1.4))
    for y, name in enumerate(reversed(names)):
        mean, (low, high) = crossed_ci(r.sft(name))
        first = y == 0
        ends = [[mean - low], [high - mean]]
        axis.errorbar([mean], [y], xerr=ends, color=BLUE, marker="o", capsize=2, label="model" if first else None)
        for policy, marker, color, label in (("bc", "|", RED, "bc"), (YARDSTICK, "D", GREEN, "Bayes (yardstick)")):
            if r.row(name, policy) is not None:
                style = {"color": color, "marker": marker, "linestyle": "none", "markersize": 9 if marker == "|" else 4}
                axis.plot([r.policy(name, policy).mean()], [y], label=label if first else None, **style)
    axis.set_yticks(range(len(names)), [_describe(name) for name in reversed(names)])
    axis.set(xscale="log", xlabel=f"{GAP} (log scale)")
    axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axis.xaxis.minorticks_off()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    rows = "A row for each cell, the reference first"
    figure.set_label(f"{rows}: the gap of the model with its interval, that of bc and that of the yardstick.")
    return figure


def _describe(name: str) -> str:
    cell = CELLS[name]
    if name == REFERENCE:
        return "reference (base, fewer steps)"
    return cell.label if cell.factor == "base" else f"{cell.factor}: {cell.label}"


def _lengths(r: Records) -> Figure:
    """Gap over the demonstrations of the test tasks, for each number in training."""
    figure, axis = pyplot.subplots()
    tested = CELLS[REFERENCE].test_demos
    for name, color, marker in zip(LENGTHS, (BLUE, ORANGE, PURPLE), ("o", "s", "D"), strict=True):
        means = [crossed_ci(r.sft(name, demos=M)) for M in tested]
        ends = np.array([[m - low, high - m] for m, (low, high) in means]).T
        label = f"trained at {CELLS[name].demos}"
        axis.errorbar(tested, [m for m, _ in means], ends, color=color, marker=marker, capsize=2, label=label)
    for policy, color in ((YARDSTICK, GREEN), ("layer", GRAY)):
        if all(r.row(REFERENCE, policy, M) is not None for M in tested):
            gaps = [r.policy(REFERENCE, policy, M).mean() for M in tested]
            axis.plot(tested, gaps, color=color, linestyle="--", marker="", label=LINES.get(policy, "attention layer"))
    axis.set(xlabel="demonstrations in the test tasks", ylabel=GAP)
    set_log_ticks(axis, tested)
    axis.legend()
    figure.set_label(
        "The gap over the demonstrations of the test tasks, a line for each number in training, the yardstick dashed."
    )
    return figure
