"""How large are the two parts of the error of Qhat, and does the paper's bound hold outside its own setting?

Reduced layers are trained for several lengths N and laws of features: Gaussian (three condition numbers), the first stage of a
simplex linear MDP with noisy oracle labels, one-hot, and two laws outside eq. (6): noisy labels and heavy tails (x = 0 with
probability 1 - p, else N(0, Lambda/p): the same covariance). Their squared errors on fresh contexts and fresh tasks are
compared with estimation(M, N) + bias(N), exact for the trained weights and for A_N, and with eq. (6).

    lindm run risk --preset quick
    lindm verify --only q-risk estimation-slope training-length-slope paper-bound

Expected: the exact risk within 3 % in every cell; slopes -1 in M and -2 in N; eq. (6) holds in its setting, by a factor that
grows with kappa, and fails under label noise and heavy tails, where the same bound with K(Psi) in it (`every-law`) holds.

Sources of randomness: queries enter only through Lambda_q, and tasks only through Psi. The layer answers for `query_columns`,
whose mean squared error is the expectation over queries, and the prediction uses the Psi of the tasks that were drawn. One
strip of pairs is cut into contexts of every length. The bias at large N is far below the sampling error of training, nearly
all of which comes from the second moment of the training features, Gbar - Lambda. The bias is therefore measured on one very
long context, all features that the layer was trained on. Gbar instead of Lambda removes the error that the two have in common,
as a control variate (it moves the mean by less than 0.2 %). The bias at Lambda itself is also reported, and so is the
optimization error.

The bounds are attained in the limit of long training prompts: there M estimation and N^2 bias of A_N are exact numbers. They
are compared with the same numbers of the bounds, so that a bound with a smaller constant fails.
"""

from dataclasses import dataclass

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lindm.validate import nonnegative
from lindm_experiments.harness.config import check_counts, check_rising
from lindm_experiments.harness.figures import (
    BOUND,
    COLORS,
    EXACT,
    GRAY,
    MARKERS,
    legend_below,
    panel_grid,
    plot_markers,
    set_log_ticks,
)
from lindm_experiments.harness.statistics import slopes
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_experiments.lib import attained
from lindm_experiments.lib.feature_laws import HEAVY, LAWS, MATCHED, NOISY, ONEHOT, SIMPLEX, draw_tasks, named_laws, simplex_mdps
from lindm_experiments.lib.law_predictions import predicted
from lindm_experiments.lib.nested import fit, long_biases, measured

JUDGED = (*MATCHED, SIMPLEX, ONEHOT)  # q-risk and estimation-slope
LONG = (MATCHED[0], ONEHOT)  # training-length-slope: where N x >= 20 is in reach (see `lindm_theory.in_context.modes`)
MEASURED = ("eq. (6), estimation, measured", "eq. (6), bias, measured")


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 203100
    N: tuple[int, ...] = (4, 16, 64)
    M: tuple[int, ...] = (4, 16, 64)
    N_slope: tuple[int, ...] = (168, 336, 672)  # lengths N of the slope, which is within 4 % of -2 if (1 + N x) >= 25
    groups: int = 1536  # number of groups of TASKS tasks with four strips of max(M) pairs, for every law
    steps: int = 600
    batch: int = 16  # number of strips of max(N) pairs per step
    steps_slope: int = 256
    sigma: float = 2.0  # standard deviation of the label noise, for the law that has it
    sigma_mdp: float = 0.3
    present: float = 0.25  # probability p of the heavy tails

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "groups", "steps", "batch", "steps_slope")
        check_rising(self, "N", "M", "N_slope", length=2)
        for name in ("N", "M", "N_slope"):
            lengths = getattr(self, name)
            if any(lengths[-1] % n for n in lengths):
                raise ValueError(
                    f"{name} must contain divisors of its last length, because strips of this length are cut; got {lengths}"
                )
        nonnegative(self.sigma, "sigma")
        nonnegative(self.sigma_mdp, "sigma_mdp")
        if not 0 < self.present <= 1:
            raise ValueError(f"present must be a probability above 0; got {self.present}")


QUICK = Config()
FULL = Config(seeds=10, N=(4, 8, 16, 32, 64, 128), M=(4, 8, 16, 32, 64, 128), groups=3072, steps=1200, steps_slope=512)
SMOKE = Config(seeds=2, N=(4, 8), M=(4, 8), N_slope=(8, 16), groups=8, steps=10, batch=4, steps_slope=4)


def measure(cfg: Config, point: dict) -> dict:
    seed = cfg.base_seed + point["seed"]
    key = jax.random.key(seed)
    k_tasks, k_fit, k_test, k_long = jax.random.split(key, 4)
    law = named_laws(seed, cfg.sigma, cfg.sigma_mdp, cfg.present)
    training, tested = draw_tasks(k_tasks, simplex_mdps(seed), cfg.groups)
    Ahat, _ = fit(
        k_fit, list(law.values()), list(training.values()), cfg.N, cfg.batch, steps=cfg.steps, learning_rate=0.3, average=0.75
    )
    N, M = (np.asarray(lengths, float) for lengths in (cfg.N, cfg.M))
    cells = {}
    for i, name in enumerate(LAWS):
        error, variance = measured(jax.random.fold_in(k_test, i), law[name], Ahat[i], tested[name], cfg.M)
        theory = predicted(law[name], training[name], tested[name], Ahat[i], N, M)
        cells[name] = {"risk": error.tolist(), "variance": variance.tolist()} | {k: v.tolist() for k, v in theory.items()}
    long = long_biases(k_long, [law[name] for name in LONG], cfg.N_slope, cfg.batch, cfg.steps_slope)
    record = {"N": list(cfg.N), "M": list(cfg.M), "cells": cells}
    record["long"] = {"N": list(cfg.N_slope), "laws": dict(zip(LONG, long, strict=True))}
    return record | {"attained": _limits(record)}


def _limits(record: dict) -> dict[str, list[float]]:
    """[truth, bound] in the limit of long training prompts: exact for A_N, and for trained layers on isotropic features."""
    out = {}
    for law in LAWS:
        for part in ("estimation", "bias"):
            truth, paper, every = record["cells"][law][f"limit_{part}"]
            out[f"every law, {part}, {law}"] = [truth, every]
            if law in MATCHED:
                out[f"eq. (6), {part}, {law}"] = [truth, paper]
    M, N, white = record["M"][-1], record["long"]["N"][0], record["cells"][MATCHED[0]]
    measured = M * white["variance"][-1][-1], N**2 * record["long"]["laws"][MATCHED[0]]["bias"][0]
    bounds = [white[f"limit_{part}"][1] for part in ("estimation", "bias")]
    return out | {name: [x, b] for name, x, b in zip(MEASURED, measured, bounds, strict=True)}


# --- verdicts ----------------------------------------------------------------------------------------------------------


def _cells(records: list[dict], law: str, *names: str) -> np.ndarray:
    """Sum of the named entries of one law: [seeds, N, M]."""
    return np.sum([[r["cells"][law][name] for r in records] for name in names], axis=0)


def _each(ratio: np.ndarray) -> list[np.ndarray]:
    """One array of per-seed values for every cell: [seeds, ...] -> list of [seeds]."""
    return list(ratio.reshape(len(ratio), -1).T)


def _largest(records: list[dict], law: str, numerator: tuple[str, ...], bound: str) -> np.ndarray:
    """The largest risk / bound of the grid, [seeds]."""
    return (_cells(records, law, *numerator) / _cells(records, law, bound)).max((1, 2))


def _tightness(records: list[dict], law: str, bound: str) -> str:
    ratio = _cells(records, law, bound) / _cells(records, law, "risk")
    return f"{law} {ratio.min():.3g} to {ratio.max():.3g}"


def _slack(records: list[dict], laws: tuple[str, ...], bound: str) -> np.ndarray:
    """bound / risk of every cell."""
    return np.concatenate([(_cells(records, law, bound) / _cells(records, law, "risk")).ravel() for law in laws])


def check(records: list[dict]) -> list[Verdict]:
    return _risk_verdicts(records) + _bound_verdicts(records)


def _risk_verdicts(records: list[dict]) -> list[Verdict]:
    """The measured risk beside the exact one, and the two slopes."""
    own, best = ("own_estimation", "own_bias"), ("best_estimation", "best_bias")
    ratios = [
        v for law in JUDGED for exact in (best, own) for v in _each(_cells(records, law, "risk") / _cells(records, law, *exact))
    ]
    M, N_long = records[0]["M"], records[0]["long"]["N"]
    in_M = [slopes(M, v) for law in JUDGED for v in np.moveaxis(_cells(records, law, "variance"), 1, 0)]
    long = {k: [slopes(N_long, [r["long"]["laws"][law][k] for r in records]) for law in LONG] for k in ("bias", "at_Lambda")}
    long["exact"] = [slopes(N_long, _exact(records, law, np.array(N_long))) for law in LONG]
    off = max(np.max(r["cells"][law]["optimization"]) for r in records for law in JUDGED)
    shown = {k: " and ".join(f"{v.mean():.3f}" for v in values) for k, values in long.items()}
    return [
        mean_verdict(
            "q-risk",
            *ratios,
            figure="error",
            note=f"{len(ratios)} cells, worst shown; optimization error <= {off:.1%} of the risk",
        ),
        mean_verdict(
            "estimation-slope", *in_M, figure="estimation", note=f"M = {M[0]} to {M[-1]}, {len(in_M)} layers, worst shown"
        ),
        mean_verdict(
            "training-length-slope",
            *long["bias"],
            figure="bias",
            note=f"{' and '.join(LONG)}, N = {N_long[0]} to {N_long[-1]}: A_N {shown['exact']}, trained {shown['bias']}, "
            f"at Lambda (training's sampling error included) {shown['at_Lambda']}",
        ),
    ]


def _bound_verdicts(records: list[dict]) -> list[Verdict]:
    """Eq. (6) in its setting and outside of it, and the form of it that holds for every law."""
    exact = ("best_estimation", "best_bias")
    matched = [_largest(records, law, risks, "bound") for law in MATCHED for risks in (("risk",), exact)]
    every_law = [f"every law, {part}, {law}" for law in LAWS for part in ("estimation", "bias")]
    eq_6 = [f"eq. (6), {part}, {law}" for law in MATCHED for part in ("estimation", "bias")]
    tight = (*eq_6[:2], *MEASURED, *every_law)
    at_limit = {k: v.mean() for k, v in zip((*eq_6, *MEASURED), attained.ratios(records, *eq_6, *MEASURED), strict=True)}
    on_onehot = _largest(records, ONEHOT, ("risk",), "bound")
    return [
        mean_verdict(
            "paper-bound",
            *matched,
            also=[attained.none_below(records, *eq_6, *MEASURED)],
            figure="bound",
            note="bound/risk: " + "; ".join(_tightness(records, law, "bound") for law in MATCHED),
            slack=_slack(records, MATCHED, "bound"),
        ),
        mean_verdict(
            "paper-bound/attained",
            *attained.ratios(records, *tight),
            also=[attained.none_below(records, *tight)],
            figure="bound",
            note="bound/truth: " + "; ".join(f"{k} {v:.3g}" for k, v in at_limit.items()),
        ),
        mean_verdict("paper-bound/label-noise", _largest(records, NOISY, ("risk",), "bound"), figure="bound"),
        mean_verdict(
            "paper-bound/onehot-gamma",
            *_each(_cells(records, ONEHOT, "risk") / _cells(records, ONEHOT, "gaussian")),
            figure="error",
            note=f"as an inequality eq. (6) still holds there: risk/bound <= {on_onehot.max():.2f}",
        ),
        mean_verdict("paper-bound/heavy-tails", _largest(records, HEAVY, ("risk",), "bound"), figure="bound"),
        mean_verdict(
            "paper-bound/every-law",
            *(_largest(records, law, ("risk",), "every_law") for law in LAWS),
            also=[attained.none_below(records, *every_law)],
            figure="bound",
            note="bound/risk: " + "; ".join(_tightness(records, law, "every_law") for law in LAWS),
            slack=_slack(records, LAWS, "every_law"),
        ),
    ]


# --- figures -----------------------------------------------------------------------------------------------------------


def plot(records: list[dict]) -> dict[str, Figure]:
    drawn = {"error": _error, "estimation": _estimation, "bias": _bias, "bound": _bound, "split": _split}
    return {name: draw(records) for name, draw in drawn.items()}


def _exact(records: list[dict], law: str, N: np.ndarray | float, M: float = np.inf) -> np.ndarray:
    """Exact risk of A_N from the modes, mean over the seeds; N and M broadcast, M = infinity leaves the bias."""
    n = np.asarray(N, float)[..., None]

    def one(record: dict) -> np.ndarray:
        x, q = (np.array(record["cells"][law][k]) for k in ("modes", "mode_weights"))
        return (q * (n**2 * x / np.asarray(M, float)[..., None] + 1) / (1 + n * x) ** 2).sum(-1)

    return np.mean([one(r) for r in records], axis=0)


def _colors(records: list[dict]) -> list[tuple[int, int]]:
    """(index, N) of at most five lengths of the grid, for one color each."""
    N = records[0]["N"]
    return list(enumerate(N))[:: max(1, -(-len(N) // 5))]


def _plot_estimation(axis: Axes, records: list[dict], law: str, trained: str) -> None:
    """The variance of Qhat over M, one color for each training length, and the exact curves."""
    for color, (i, N) in enumerate(_colors(records)):
        variance, exact = (_cells(records, law, name)[:, i] for name in ("variance", "best_estimation"))
        plot_markers(axis, records[0]["M"], variance, COLORS[color], MARKERS[color], f"{trained}N = {N}")
        axis.plot(records[0]["M"], exact.mean(0), color=COLORS[color], **EXACT)


def _measured_bias(records: list[dict], law: str) -> np.ndarray:
    """Risk without variance at the longest M, [seeds, N]; NaN where sampling makes it negative."""
    bias = _cells(records, law, "risk")[:, :, -1] - _cells(records, law, "variance")[:, :, -1]
    return np.where(bias > 0, bias, np.nan)


def _error(records: list[dict]) -> Figure:
    """Q error over M: trained layers, the exact curve of A_N, and the bound that is claimed for the law."""
    M = np.array(records[0]["M"])
    fine = np.geomspace(M[0], M[-1], 60)
    panels = ((MATCHED[0], "bound"), (MATCHED[1], "bound"), (SIMPLEX, "every_law"), (ONEHOT, "gaussian"))
    figure, axes = panel_grid(len(panels), 3.1, ylabel="mean squared error of Qhat")
    for axis, (law, other) in zip(axes, panels, strict=True):
        for color, (i, N) in enumerate(_colors(records)):
            plot_markers(axis, M, _cells(records, law, "risk")[:, i], COLORS[color], MARKERS[color], f"trained at N = {N}")
            axis.plot(fine, _exact(records, law, np.full(60, N), fine), color=COLORS[color], **EXACT)
            style = {"linestyle": ":", "marker": ""} if other == "gaussian" else BOUND
            axis.plot(M, _cells(records, law, other)[:, i].mean(0), color=COLORS[color], **style)
        axis.set(yscale="log", title=law, xlabel="pairs in the test prompt M")
        set_log_ticks(axis, M)
    kinds = {"-": "exact, $A_N$", "--": "eq. (6); simplex: its form for every law", ":": "predicted by the Gaussian Γ"}
    for kind, label in kinds.items():
        axes[0].plot([], [], color=GRAY, linestyle=kind, marker="", label=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.set_label("Trained layers (points) lie on the exact curves, and the bound of each law (dashed) above them.")
    return figure


def _estimation(records: list[dict]) -> Figure:
    """The variance of Qhat over the contexts of a task, one panel a law."""
    M = np.array(records[0]["M"])
    laws = (MATCHED[0], MATCHED[2], SIMPLEX, ONEHOT)
    figure, axes = panel_grid(len(laws), 3.0, ylabel="estimation error: variance of Qhat over the contexts of a task")
    for axis, law in zip(axes, laws, strict=True):
        _plot_estimation(axis, records, law, "")
        axis.set(yscale="log", title=law, xlabel="pairs in the test prompt M")
        set_log_ticks(axis, M)
    axes[0].legend(fontsize=8, title="points trained at, lines exact", title_fontsize=8)
    figure.set_label(
        "The estimation error falls as 1/M on four laws: trained layers lie on parallel exact lines of slope -1, higher for "
        "longer training prompts."
    )
    return figure


def _bias(records: list[dict]) -> Figure:
    """Squared bias over N: all laws over the whole range, and the range of the slope."""
    N, long = np.array(records[0]["N"]), np.array(records[0]["long"]["N"])
    figure, (left, right) = panel_grid(2, 4.6)
    fine = np.geomspace(N[0], 4 * long[-1], 200)
    for i, law in enumerate((*MATCHED, SIMPLEX, ONEHOT)):
        plot_markers(left, N, _measured_bias(records, law), COLORS[i], MARKERS[i], law)
        left.plot(fine, _exact(records, law, fine), color=COLORS[i], **EXACT)
        if law in LONG:
            plot_markers(left, long, np.array([r["long"]["laws"][law]["bias"] for r in records]), COLORS[i], MARKERS[i])
    guide = fine[fine > 60]
    falling = 4 * _exact(records, MATCHED[2], guide[-1:]) * (guide[-1] / guide) ** 2
    left.plot(guide, falling, color=GRAY, label="slope -2", **BOUND)
    left.set(xscale="log", yscale="log", xlabel="pairs in a training prompt N", ylabel="squared bias of Qhat")
    left.set_title("Measured (points) and exact (lines)")
    legend_below(left, ncols=2)
    wide = np.geomspace(0.9 * long[0], 1.1 * long[-1], 50)
    for law in LONG:
        i = JUDGED.index(law)
        limit = _exact(records, law, np.array([1e9]))[0] * 1e18  # of N^2 bias
        for k, fill, shift in (("at_Lambda", "none", 1.02), ("bias", COLORS[i], 0.98)):
            look = {"color": COLORS[i], "marker": MARKERS[i], "markerfacecolor": fill, "alpha": 0.7}
            for r in records:
                right.plot(long * shift, np.array(r["long"]["laws"][law][k]) * long**2 / limit, linestyle="none", **look)
        right.plot(wide, _exact(records, law, wide) * wide**2 / limit, color=COLORS[i], label=law, **EXACT)
    for fill, label in ((GRAY, "trained, on all its features"), ("none", "trained, at Λ")):
        right.plot([], [], linestyle="none", marker="o", color=GRAY, markerfacecolor=fill, label=label)
    right.set(xlabel="pairs in a training prompt N", ylabel="N² × squared bias / limit", title="Range of the slope: flat is -2")
    set_log_ticks(right, long)
    legend_below(right)
    figure.set_label("The squared bias falls with the training length, at the end as 1/N squared, on the exact lines.")
    return figure


def _split(records: list[dict]) -> Figure:
    """The two parts of the risk on simplex features: estimation error over M, bias over N, and the bound on each.

    The bounds are the two terms of Theorem 2 in theory/notes/in-context.md, which hold for every law of features; in the modes
    x_i with weights q_i they are sum q_i / (x_i M) and sum q_i / (x_i N)^2. Each seed has its own features: lines are means.
    """
    M, N = np.array(records[0]["M"]), np.array(records[0]["N"])
    x, q = (np.array([r["cells"][SIMPLEX][k] for r in records]) for k in ("modes", "mode_weights"))
    estimation_bound, bias_bound = ((q / x**power).sum(-1).mean() for power in (1, 2))
    figure, (left, right) = panel_grid(2, 4.2)
    _plot_estimation(left, records, SIMPLEX, "trained at ")
    left.plot(M, estimation_bound / M, color=GRAY, label="bound for every N", **BOUND)
    left.set(xlabel="pairs in the test prompt M", ylabel="estimation error of Qhat", title="Estimation error")
    fine = np.geomspace(N[0], N[-1], 100)
    plot_markers(right, N, _measured_bias(records, SIMPLEX), COLORS[0], MARKERS[0], "trained layer, one point per seed")
    right.plot(fine, _exact(records, SIMPLEX, fine), color=COLORS[0], label="exact", **EXACT)
    right.plot(fine, bias_bound / fine**2, color=GRAY, label="bound", **BOUND)
    right.set(xlabel="pairs in a training prompt N", ylabel="squared bias of Qhat", title="Training-length bias")
    for axis, lengths in ((left, M), (right, N)):
        axis.set_yscale("log")
        set_log_ticks(axis, lengths)
        legend_below(axis)
    figure.set_label(
        "Left: the estimation error falls as 1/M with measured points on the exact lines, below the dashed bound. Right: the "
        "squared bias falls with the training length, below its bound."
    )
    return figure


def _bound(records: list[dict]) -> Figure:
    """Risk over bound for the longest training length: eq. (6), and its form for every law."""
    M = np.array(records[0]["M"])
    figure, axes = panel_grid(2, 4.2, ylabel="risk / bound (above 1: violated)", sharey=True)
    for axis, bound, title in zip(axes, ("bound", "every_law"), ("eq. (6)", "the same with K(Ψ) and noise in it"), strict=True):
        left_out = SIMPLEX if bound == "bound" else MATCHED[1]  # eq. (6) is not claimed there; a curve between its neighbors
        for law in (law for law in LAWS if law != left_out):
            i = LAWS.index(law)
            ratio = (_cells(records, law, "risk") / _cells(records, law, bound))[:, -1]
            plot_markers(axis, M, ratio, COLORS[i], MARKERS[i], law)
            exact = _cells(records, law, "best_estimation", "best_bias") / _cells(records, law, bound)
            axis.plot(M, exact[:, -1].mean(0), color=COLORS[i], **EXACT)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(yscale="log", xlabel="pairs in the test prompt M", title=f"{title}, N = {records[0]['N'][-1]}")
        set_log_ticks(axis, M)
    named = {text: line for axis in axes for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), fontsize=8, loc="outside lower center", ncols=4)
    figure.set_label(
        "Risk divided by its bound. Left: eq. (6) holds on its own laws and is violated, above 1, under label noise and heavy "
        "tails. Right: with the fourth moment and the noise in it, the bound holds on every law."
    )
    return figure
