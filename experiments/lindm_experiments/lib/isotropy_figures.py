"""The figures of `isotropy`, with the names in its records."""

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from lindm_experiments.harness.figures import (
    BOUND,
    COLORS,
    EXACT,
    GRAY,
    INK,
    MEASURED,
    ORANGE,
    SEED,
    WIDTH,
    legend_below,
    panel_grid,
)

ISOTROPIC = ("one-hot, rewards in [0, 1]", "one-hot, rewards in [-1, 1]")
SIMPLEX = "simplex"
LAWS = ("Gaussian", "signed axes", "sign-symmetric only")  # of the bandits' features


def plot(records: list[dict]) -> dict[str, Figure]:
    return {"plane": _plane(records), "actions": _actions(records)}


def _plane(records: list[dict]) -> Figure:
    """Suboptimality over (M, N): the mean over seeds above, every seed at three context lengths below."""
    first = records[0]
    N, M, Nt = np.array(first["N"]), np.array(first["M"]), first["N_trained"]
    figure, axes = pyplot.subplots(2, 2, figsize=(WIDTH, 7.4), height_ratios=(1.25, 1))
    every = np.log10([np.mean([r["families"][n]["loss"] for r in records], 0) for n in (ISOTROPIC[1], SIMPLEX)])
    for column, (name, word) in enumerate(((ISOTROPIC[1], "isotropic"), (SIMPLEX, "anisotropic"))):
        cells = [r["families"][name] for r in records]
        loss = np.mean([c["loss"] for c in cells], 0)
        top, below = axes[0, column], axes[1, column]
        mesh = top.pcolormesh(M, N, np.log10(loss), vmin=every.min(), vmax=every.max(), shading="nearest", rasterized=True)
        lines = top.contour(M, N, np.log10(loss), levels=5, colors="white", linewidths=0.9, linestyles="-")
        for text in top.clabel(lines, inline=False, fmt=lambda v: f"{10**v:.2g}", fontsize=9, colors="white"):
            text.set(path_effects=[withStroke(linewidth=2.2, foreground=INK)], fontweight="bold")
        balance = np.mean([c["balance"] for c in cells], 0)
        inside = (balance > N[0] / 1.4) & (balance < N[-1] * 1.4)
        top.plot(M[inside], balance[inside], color=ORANGE, **EXACT, label="bias = estimation (exact)")
        top.plot(M, M, color=INK, **BOUND, label="N = M: least risk of Qhat")
        top.set_title(f"{name}: {word}")
        top.set(xscale="log", yscale="log", xlabel="pairs in test M", ylabel="pairs in training N")
        top.set(xlim=(M[0] / 1.4, M[-1] * 1.4), ylim=(N[0] / 1.4, N[-1] * 1.4))
        for color, at in zip(COLORS[:3], (0, len(M) // 2, len(M) - 1), strict=True):
            for c in cells:
                below.plot(N, np.array(c["loss"])[:, at], color=color, **SEED)
                below.plot(Nt, np.array(c["trained_loss"])[:, at], color=color, **MEASURED, alpha=0.6)
            below.plot(N, loss[:, at], color=color, **EXACT, label=f"M = {M[at]}")
        below.set(xscale="log", yscale="log", xlabel="pairs in training N", ylabel="suboptimality")
        below.set_ylim(10 ** every.min() / 1.5, 10 ** every.max() * 1.5)
    bar = figure.colorbar(mesh, ax=list(axes[0]), label="suboptimality (log scale)", aspect=30)
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if every.min() <= np.log10(t) <= every.max()]
    bar.set_ticks(np.log10(ticks), labels=[f"{t:g}" for t in ticks])
    handles = {label: h for axis in axes[:, 0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    title = "above: lengths at which the errors are equal, and the best N; below: closed form (lines), trained layers (points)"
    figure.legend(handles.values(), handles, title=title, title_fontsize=8, fontsize=8, loc="outside lower center", ncols=5)
    figure.set_label("Suboptimality does not change with the training length on isotropic features; it does on anisotropic ones.")
    return figure


def _actions(records: list[dict]) -> Figure:
    """How many actions N changes, what is charged for N, and the same in other coordinates."""
    first = records[0]
    N, kappa = np.array(first["N"]), np.array(first["kappa"])
    figure, (left, middle, right, free) = panel_grid(3, 3.8, free=True)
    M = first["M"][-1]
    series = [(n, [np.array(r["families"][n]["share"])[:, -1] for r in records]) for n in (*ISOTROPIC, SIMPLEX)]
    series += [(f"bandit, {n}", [np.array(r["bandits"][n]["share"]) for r in records]) for n in LAWS]
    for (name, shares), color, marker in zip(series, COLORS, "os^Dv*", strict=False):
        for share in shares:
            left.plot(N, 100 * share, color=color, **SEED)
        left.plot(N, 100 * np.mean(shares, 0), color=color, marker=marker, markersize=4.5, linestyle="none", label=name)
    limit = np.mean([r["families"][SIMPLEX]["share_limit"] for r in records], 0)
    left.plot(N, 100 * limit, color=COLORS[2], **EXACT)
    left.set(xscale="log", xlabel="pairs in a training prompt N", ylabel="actions, %", ylim=(-0.8, None))
    left.set_title(f"Actions that differ from those at N = {N[-1]}")
    free.legend(*left.get_legend_handles_labels(), title=f"above left (MDPs: M = {M}; line: M = ∞)", loc="center")
    for name, color in ((ISOTROPIC[1], COLORS[1]), (SIMPLEX, COLORS[2])):
        for r in records:
            middle.plot(N, r["families"][name]["bias"], color=color, **SEED)
        middle.plot(N, np.mean([r["families"][name]["bias"] for r in records], 0), color=color, **EXACT, label=name)
        middle.plot(N, first["families"][name]["paper_bias"], color=color, **BOUND, label="  eq. (6), which presumes Psi = I")
    middle.set(xscale="log", yscale="log", xlabel="pairs in a training prompt N", ylabel="squared bias of Qhat, all stages")
    middle.set_title("What is charged for N")
    legend_below(middle)
    for key, color, label in (("paper", GRAY, "eq. (6), bias term"), ("theorem", "#8B6B00", "Theorem 2, any law and Psi")):
        values = np.array([r["coordinates"][key] for r in records])
        right.plot(kappa, values.mean(0) / values.mean(0)[0], color=color, **BOUND, label=label)
    for r in records:
        loss = np.array(r["coordinates"]["loss"])
        right.plot(kappa, loss / loss[0], color=INK, **MEASURED, label="suboptimality, measured" if r is first else None)
    right.set(xscale="log", yscale="log", xlabel="condition number kappa", ylabel="relative to kappa = 1")
    right.set_title("The same MDPs in other coordinates")
    legend_below(right)
    figure.set_label("The training length changes no action on isotropic laws; eq. (6) charges for it all the same.")
    return figure
