"""How many prompts does pretraining need, and what does the layer know after T of them?

The reduced layer is fitted by ridge regression on T fixed prompts of Gaussian features: at one query each, which is one
regression with d^2 parameters, or at all queries, which is d regressions with d parameters. Every seed draws its own Lambda
and Psi. The risk of a fit on fresh prompts is computed exactly. The mean over fits is compared with two predictions of
lindm_theory.pretraining: the deterministic equivalent (the limit N ~ d, T ~ d^2, in which the features act like Gaussian
vectors of the same covariance), and the first-order law C/T, with C from the fourth moments of a prompt, at every d. Fresh
tasks of another Psi show the price of a mismatch. The error after infinitely many prompts of k = kappa d tasks is compared
with its limit for large d, which is also that of the formula of Lu, Letey, Zavatone-Veth, Maiti, Pehlevan (arXiv 2405.11751).

    lindm run pretraining --preset quick
    lindm verify --only pretraining

Expected: the points are on the lines with a ridge of 0.1 or more, and above them without one at this small d, with a peak at T
= d^2 prompts for one query each and at T = d for all queries. The excess is d + 2 times larger for one query than for all.
Fixed prompts teach far less than as many tasks with fresh contexts.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from lindm_experiments.harness.config import check_at_least, check_counts, check_rising
from lindm_experiments.harness.figures import BOUND, COLORS, EXACT, GRAY, INK, MARKERS, MEASURED, PURPLE, legend_below, panel_grid
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_theory.in_context import context_second_moment, optimal_weights, pair_variance
from lindm_theory.moments import gaussian_fourth, onehot_fourth
from lindm_theory.pretraining import (
    all_query_weights,
    expected_risk,
    many_prompts_limit,
    mismatch_excess,
    one_query_weights,
    prompt_coefficient,
    prompt_moment,
)
from lindm_theory.robustness import few_task_coefficient, few_task_weights

LAWS = ("Gaussian", "one-hot")
LIMITS = ((10, 0.63738), (2, 0.69898))  # kappa, `many_prompts_limit` at alpha = 1, rho = .1, rounded

LEAST_RIDGE = 0.1  # below it the limit is too far away at these d: 10 % off at a ridge of 0.02 and d = 16


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 10
    base_seed: int = 2054000
    d: int = 12
    N: int = 24
    sigma: float = 0.5
    tau: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # values of T/d^2 at one query per prompt
    every: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 16.0)  # values of T/d at all queries
    ridge: tuple[float, ...] = (0.0, 0.1, 0.5)  # ridges, in units of tr(Lq) tr(B), the mean squared norm of the features
    repeats: int = 6  # number of sets of T prompts for each seed
    d_first: int = 8  # dimension d at which the constants are tested
    tau_first: int = 16  # T/d^2 at which the constants are tested
    repeats_first: int = 24
    contexts: int = 20000  # number of contexts that determine the fourth moments
    d_published: int = 120

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "N", "repeats", "tau_first", "repeats_first", "contexts", "d_published")
        check_counts(self, "d", "d_first", least=2)
        check_rising(self, "tau", "every", length=2, least=0)
        check_rising(self, "ridge", length=2, least=0)
        check_at_least(self, 0, "sigma")
        if self.ridge[0] != 0 or not {0.25, 0.5, 1.0, 4.0} <= set(self.tau) or self.tau[-1] < 4:
            raise ValueError(f"ridge must start at 0 and tau contain 0.25, 0.5, 1 and 4; got {self.ridge} and {self.tau}")
        if self.ridge[-1] < LEAST_RIDGE:
            raise ValueError(f"ridge must contain a number of at least {LEAST_RIDGE}; got {self.ridge}")


QUICK = Config()
FULL = Config(
    seeds=20,
    d=16,
    N=32,
    tau=(0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0),
    every=(0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0),
    ridge=(0.0, 0.02, 0.1, 0.5),
    repeats=16,
    d_first=10,
    repeats_first=32,
    contexts=50000,
)
SMOKE = Config(
    seeds=2, d=4, N=8, repeats=2, d_first=4, tau_first=4, repeats_first=2, contexts=200, every=(0.5, 2.0), d_published=20
)


def covariances(rng: np.random.Generator, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lambda, the Psi of training and another Psi of the test, of half as much power again, [d, d] each."""
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    Psi, other = (F @ F.T / (2 * d) for F in rng.normal(size=(2, d, 2 * d)))
    return (basis * rng.uniform(0.5, 1.5, size=d)) @ basis.T, Psi, 1.5 * other


def draw_features(rng: np.random.Generator, law: str, Lambda: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Features of second moment Lambda, [*shape, d]; the one-hot law is uniform."""
    d = len(Lambda)
    if law == "one-hot":
        return np.eye(d)[rng.integers(0, d, size=shape)]
    return rng.normal(size=(*shape, d)) @ np.linalg.cholesky(Lambda).T


def draw_prompts(rng: np.random.Generator, law: str, Lambda: np.ndarray, Psi: np.ndarray, T: int, cfg: Config):
    """(w, S, x_q) of T prompts, [T, d] each."""
    w = rng.normal(size=(T, len(Psi))) @ np.linalg.cholesky(Psi).T
    x = draw_features(rng, law, Lambda, (T, cfg.N))
    y = (x @ w[:, :, None])[:, :, 0] + cfg.sigma * rng.normal(size=(T, cfg.N))
    return w, (y[:, None, :] @ x)[:, 0] / cfg.N, draw_features(rng, law, Lambda, (T,))


def ridge_fits(Z: np.ndarray, y: np.ndarray, ridges: list[float]) -> list[np.ndarray]:
    """argmin |y - Z a|^2 + ridge |a|^2 for each ridge, of smallest norm at 0: Z [T, p], y [T, ...] -> [p, ...]."""
    wide = Z.shape[0] < Z.shape[1]
    gram, basis = np.linalg.eigh(Z @ Z.T if wide else Z.T @ Z)
    right = basis.T @ (y if wide else Z.T @ y)
    fits = [basis @ (right.T / (gram + ridge)).T for ridge in ridges]
    return [Z.T @ a for a in fits] if wide else fits


def one_query_fits(w: np.ndarray, S: np.ndarray, query: np.ndarray, ridges: list[float]) -> list[np.ndarray]:
    """Weights [d, d] fitted to the labels x_q'w at one query of each prompt, for each ridge."""
    T, d = w.shape
    Z = (query[:, :, None] * S[:, None, :]).reshape(T, d * d)
    return [a.reshape(d, d) for a in ridge_fits(Z, np.sum(query * w, axis=1), ridges)]


def exact_risk(A: np.ndarray, Lambda: np.ndarray, Psi: np.ndarray, B: np.ndarray) -> float:
    """Risk of weights A on fresh prompts of tasks of second moment Psi, B = E[S S'] there."""
    return float(np.trace(Lambda @ (A @ B @ A.T - 2 * A @ Lambda @ Psi + Psi)))


@jax.jit
def closed_form(Lambda: Array, Psi: Array, K: Array, N: Array, noise: Array) -> tuple[Array, Array, Array]:
    """A_N, B = E[S S'] and R, [d, d] each."""
    return (
        optimal_weights(Lambda, Psi, K, N, noise),
        context_second_moment(Lambda, Psi, K, N, noise),
        pair_variance(Lambda, Psi, K, noise),
    )


@jax.jit
def constants(G: Array, noise: Array, A: Array, B: Array, Psi: Array, Lambda: Array, query: Array) -> tuple[Array, Array, Array]:
    """E[u u' S'B^-1 S] from sampled contexts, and C for one query and for all queries."""
    moment = prompt_moment(G, jnp.full(len(G), 1 / len(G)), noise, A, B, Psi)
    return moment, prompt_coefficient(moment, query), prompt_coefficient(moment, Lambda)


@jax.jit
def one_query_risks(train: tuple, tests: tuple, Lambda: Array, N: Array, residual: Array, T: Array, ridge: Array) -> Array:
    """Predicted risks of the fits at one query, [tests, T, ridges]: tests = (Psi, R) stacked over matched and other tasks."""
    A, B = train

    def cell(T: Array, ridge: Array) -> Array:
        law = one_query_weights(A, B, residual, Lambda, T, ridge)
        return jax.vmap(lambda P, R: expected_risk(law, Lambda, P, R, N, Lambda).total)(*tests)

    return jnp.moveaxis(jax.vmap(lambda t: jax.vmap(lambda r: cell(t, r))(ridge))(T), -1, 0)


@jax.jit
def all_query_risks(
    train: tuple[Array, Array], test: tuple[Array, Array], Lambda: Array, N: Array, residuals: Array, T: Array
) -> Array:
    """Predicted risks of the least-squares fits at all queries, [T]."""
    A, B = train
    return jax.vmap(lambda t: expected_risk(all_query_weights(A, B, residuals, Lambda, t), Lambda, *test, N, Lambda).total)(T)


@jax.jit
def few_tasks_constant(Lambda: Array, Psi: Array, N: Array, noise: Array) -> Array:
    """C of T tasks with fresh contexts at every step."""
    return few_task_coefficient(Lambda, Psi, lambda P: gaussian_fourth(Lambda, P), N, Lambda, noise)


@jax.jit
def price(Lambda: Array, Psi: Array, other: Array, N: Array, noise: Array) -> Array:
    """What A_N(Psi) loses to A_N(other) on the tasks of `other`."""
    return mismatch_excess(Lambda, Psi, other, lambda P: gaussian_fourth(Lambda, P), N, Lambda, noise)


def curve_points(low: float, high: float, p: int) -> np.ndarray:
    """Numbers of prompts for the lines of a figure: on both sides of p, never p itself."""
    T = np.concatenate([np.geomspace(low, p, 16)[:-1], p * np.array([0.97, 1.03]), np.geomspace(p, high, 16)[1:]])
    return np.round(T, 3)


def first_order(rng: np.random.Generator, law: str, cfg: Config) -> dict:
    """T = tau_first d^2 prompts without a ridge: excess at one query and at all, and the constants."""
    d = cfg.d_first
    Lambda, Psi, _ = covariances(rng, d)
    Lambda = np.eye(d) / d if law == "one-hot" else Lambda
    K = onehot_fourth(np.diag(Lambda), Psi) if law == "one-hot" else gaussian_fourth(Lambda, Psi)
    noise = cfg.sigma**2 * Lambda
    A, B, _ = (np.asarray(v) for v in closed_form(Lambda, Psi, K, np.float64(cfg.N), noise))
    x = draw_features(rng, law, Lambda, (cfg.contexts, cfg.N))
    G = np.swapaxes(x, 1, 2) @ x / cfg.N
    # E[x x' x'Lq^-1 x]: (d + 2) Lq for Gaussian features, d Lq for uniform one-hot ones
    query = (d if law == "one-hot" else d + 2) * Lambda
    _, one, every = constants(G, cfg.sigma**2 * G / cfg.N, A, B, Psi, Lambda, query)
    T, p, least = cfg.tau_first * d**2, d**2, np.trace(Lambda @ (Psi - A @ Lambda @ Psi))
    excess = []
    for _ in range(cfg.repeats_first):
        w, S, x_q = draw_prompts(rng, law, Lambda, Psi, T, cfg)
        fits = (one_query_fits(w, S, x_q, [0.0])[0], ridge_fits(S, w, [0.0])[0].T)
        excess.append([exact_risk(fit, Lambda, Psi, B) - least for fit in fits])
    return {
        "law": law,
        "d": d,
        "T": T,
        "one": float(np.mean(excess, axis=0)[0]) * (T - p),  # times T - p: the constant, as measured
        "all": float(np.mean(excess, axis=0)[1]) * (T - d),
        "C_one": float(one),
        "C_all": float(every),
        "C_residual": float(p * least),
        "C_tasks": float(few_tasks_constant(Lambda, Psi, np.float64(cfg.N), noise)) if law == "Gaussian" else 0.0,
    }


def endless_pretraining(rng: np.random.Generator, kappa: int, d: int) -> float:
    """Error on fresh tasks of the layer pretrained without end on kappa d tasks, N = d, x ~ N(0, I/d), label noise 0.1."""
    rho, Lambda = 0.1, np.eye(d) / d
    tasks = rng.normal(size=(kappa * d, d))
    A = np.asarray(few_task_weights(tasks, Lambda, lambda P: gaussian_fourth(Lambda, P), d, rho * Lambda))
    B = Lambda @ Lambda + (Lambda @ Lambda + (1 + rho) * Lambda) / d
    return rho + exact_risk(A, Lambda, np.eye(d), B)


def measure(cfg: Config, point: dict) -> dict:
    rng = np.random.default_rng([cfg.base_seed, point["seed"]])
    d, p, N = cfg.d, cfg.d**2, np.float64(cfg.N)
    Lambda, Psi, other = covariances(rng, d)
    noise = cfg.sigma**2 * Lambda
    A, B, R = (np.asarray(v) for v in closed_form(Lambda, Psi, gaussian_fourth(Lambda, Psi), N, noise))
    best, B_other, R_other = (np.asarray(v) for v in closed_form(Lambda, other, gaussian_fourth(Lambda, other), N, noise))
    least, own = np.trace(Lambda @ (Psi - A @ Lambda @ Psi)), exact_risk(best, Lambda, other, B_other)
    ridges = np.array(cfg.ridge) * np.trace(Lambda) * np.trace(B)

    T_one, T_all = (np.round(np.array(c) * n).astype(int) for c, n in ((cfg.tau, p), (cfg.every, d)))
    risks, risks_all = np.zeros((cfg.repeats, 2, len(T_one), len(ridges))), np.zeros((cfg.repeats, len(T_all)))
    for k in range(cfg.repeats):
        w, S, x_q = draw_prompts(rng, "Gaussian", Lambda, Psi, T_one[-1], cfg)
        for i, T in enumerate(T_one):  # nested sets of prompts
            for j, fit in enumerate(one_query_fits(w[:T], S[:T], x_q[:T], list(ridges))):
                risks[k, :, i, j] = exact_risk(fit, Lambda, Psi, B), exact_risk(fit, Lambda, other, B_other)
        for i, T in enumerate(T_all):
            risks_all[k, i] = exact_risk(ridge_fits(S[:T], w[:T], [0.0])[0].T, Lambda, Psi, B)

    train, tests = (A, B), (np.stack([Psi, other]), np.stack([R, R_other]))
    curve, curve_all = curve_points(T_one[0], T_one[-1], p), curve_points(T_all[0], T_all[-1], d)
    grid = np.concatenate([T_one, curve])
    predicted = np.array(one_query_risks(train, tests, Lambda, N, least, grid, ridges))
    predicted_all = np.array(
        all_query_risks(train, (Psi, R), Lambda, N, Psi - A @ Lambda @ Psi, np.concatenate([T_all, curve_all]).astype(float))
    )
    # no prediction at the threshold without a ridge: infinite
    predicted[:, : len(T_one), 0][:, T_one == p] = 0.0
    predicted_all[: len(T_all)][T_all == d] = 0.0
    return {
        "d": d,
        "T": T_one.tolist(),
        "T_all": T_all.tolist(),
        "ridge": list(cfg.ridge),
        "least": float(least),
        "least_other": [own, own + float(price(Lambda, Psi, other, N, noise))],
        "measured": risks.mean(0).tolist(),
        "log_risk": np.log2(risks[:, 0]).mean(0).tolist(),
        "predicted": predicted[:, : len(T_one)].tolist(),
        "measured_all": risks_all.mean(0).tolist(),
        "predicted_all": predicted_all[: len(T_all)].tolist(),
        "curve": {"T": curve.tolist(), "risk": predicted[:, len(T_one) :].tolist()},
        "curve_all": {"T": curve_all.tolist(), "risk": predicted_all[len(T_all) :].tolist()},
        "first_order": [first_order(rng, law, cfg) for law in LAWS],
        "limit": [float(many_prompts_limit(1.0, kappa, 0.1)) for kappa, _ in LIMITS],
        "published": [endless_pretraining(rng, kappa, cfg.d_published) for kappa, _ in LIMITS],
    }


def _ratios(records: list[dict], test: int) -> list[np.ndarray]:
    """Measured / predicted risk, a list over the cells (T, ridge >= LEAST_RIDGE) of arrays over the seeds."""
    kept = [j for j, ridge in enumerate(records[0]["ridge"]) if ridge >= LEAST_RIDGE]
    measured, predicted = (np.array([r[name][test] for r in records])[:, :, kept] for name in ("measured", "predicted"))
    return list((measured / predicted).reshape(len(records), -1).T)


def _first(records: list[dict], measured: str, constant: str, laws: int = 2) -> list[list[float]]:
    """Measured constant / predicted constant, [laws][seeds]."""
    return [[r["first_order"][i][measured] / r["first_order"][i][constant] for r in records] for i in range(laws)]


def check(records: list[dict]) -> list[Verdict]:
    first = records[0]
    d, T = first["d"], np.array(first["T"])
    at = {c: int(np.flatnonzero(round(c * d**2) == T)[0]) for c in (0.25, 0.5, 1.0, 4.0)}
    log_risk = np.array([r["log_risk"] for r in records])  # [seeds, T, ridges]
    peak = log_risk[:, at[1.0], 0] - np.maximum(log_risk[:, at[0.25], 0], log_risk[:, at[4.0], 0])
    heaviest = np.array([r["measured"][0] for r in records])[:, :, -1]
    per_query = [[f["one"] / f["all"] / (f["d"] + 2 * (f["law"] == "Gaussian")) for f in part] for part in _by_law(records)]
    gap = np.mean([r["least_other"][1] / r["least_other"][0] for r in records])
    kept = [
        f"kappa = {kappa}: {np.mean([r['published'][i] for r in records]):.4f} (limit {first['limit'][i]:.5f})"
        for i, (kappa, _) in enumerate(LIMITS)
    ]
    return [
        mean_verdict(
            "pretraining",
            *_ratios(records, 0),
            figure="pretraining",
            note=f"d = {d}, T/d^2 from {T[0] / d**2:g} to {T[-1] / d**2:g}",
        ),
        mean_verdict(
            "pretraining/first-order",
            *_first(records, "one", "C_one"),
            *_first(records, "all", "C_all"),
            figure="pretraining",
            note=f"{' and '.join(LAWS)} features, d = {first['first_order'][0]['d']}, T = {first['first_order'][0]['T']}",
        ),
        mean_verdict("pretraining/gaussian-residual", *_first(records, "one", "C_residual", 1), figure="pretraining"),
        mean_verdict("pretraining/fixed-prompts", *_first(records, "one", "C_tasks", 1), figure="pretraining"),
        mean_verdict("pretraining/double-descent", peak, figure="pretraining"),
        mean_verdict("pretraining/ridge", heaviest[:, at[1.0]] / heaviest[:, at[0.5]], figure="pretraining"),
        mean_verdict("pretraining/all-queries", *per_query, figure="pretraining"),
        mean_verdict(
            "pretraining/mismatch",
            *_ratios(records, 1),
            figure="pretraining",
            note=f"risk of A_N(Psi) on the other tasks, over that of their own layer: {gap:.3g}",
        ),
        mean_verdict(
            "pretraining/published",
            *[[r["published"][i] / value for r in records] for i, (_, value) in enumerate(LIMITS)],
            figure="pretraining",
            note=", ".join(kept),
        ),
    ]


def _by_law(records: list[dict]) -> list[list[dict]]:
    return [[r["first_order"][i] for r in records] for i in range(len(LAWS))]


def plot(records: list[dict]) -> dict[str, Figure]:
    first = records[0]
    d, T, T_all = first["d"], np.array(first["T"]), np.array(first["T_all"])
    figure, axes = panel_grid(3, 4.4, ylabel="risk of Qhat")
    for axis, test, title in ((axes[0], 0, "Tasks of the training law"), (axes[1], 1, "Tasks of another $\\Psi$")):
        for j, (ridge, color) in enumerate(zip(first["ridge"], COLORS, strict=False)):
            measured = np.array([r["measured"][test] for r in records])[:, :, j]
            curve = np.array([r["curve"]["risk"][test] for r in records])[:, :, j].mean(0)
            axis.plot(first["curve"]["T"], curve, color=color, **EXACT)
            for row in measured:
                axis.plot(T, row, color=color, alpha=0.25, **MEASURED | {"marker": MARKERS[j], "markersize": 3})
            label = f"one query, ridge {ridge:g}"
            axis.plot(T, measured.mean(0), color=color, label=label, **MEASURED | {"marker": MARKERS[j], "markersize": 6})
        axis.axvline(d**2, color=GRAY, linestyle=":", marker="")
        axis.set(xscale="log", yscale="log", xlabel="prompts T", title=title)
    axes[0].plot(first["curve_all"]["T"], np.mean([r["curve_all"]["risk"] for r in records], 0), color=PURPLE, **EXACT)
    axes[0].plot(
        T_all, np.mean([r["measured_all"] for r in records], 0), color=PURPLE, label="all queries", **MEASURED | {"marker": "X"}
    )
    axes[0].axvline(d, color=GRAY, linestyle=":", marker="")
    for axis, values in (
        (axes[0], [r["least"] for r in records]),
        (axes[1], [r["least_other"][1] for r in records]),
    ):
        axis.axhline(np.mean(values), color=INK, label="$A_N(\\Psi)$: $T=\\infty$", **BOUND)
        low = 0.7 * np.mean(values)
        axis.set_ylim(low, 60 * low)
    axes[1].axhline(np.mean([r["least_other"][0] for r in records]), color=GRAY, label="layer of these tasks", **BOUND)
    names = [("one", "C_one"), ("all", "C_all"), ("one", "C_residual"), ("one", "C_tasks")]
    labels = ["one query:\n$C$", "all queries:\n$C$", "Gaussian\nresidual", "few tasks,\nfresh contexts"]
    for k, (measured, constant) in enumerate(names):
        for i, part in enumerate(_by_law(records)[: 1 if k >= 2 else 2]):
            ratio = np.array([f[measured] / f[constant] for f in part])
            spread = np.linspace(-0.12, 0.12, len(ratio)) + 0.3 * i - (0.15 if k < 2 else 0)
            axes[2].plot(
                k + spread, ratio, color=COLORS[4 + i], label=LAWS[i] if k == 0 else None, **MEASURED | {"marker": "os"[i]}
            )
    axes[2].axhline(1.0, color=GRAY, **EXACT)
    axes[2].set_xticks(range(len(labels)), labels, fontsize=8)
    axes[2].set(
        yscale="log",
        ylabel="measured / predicted constant",
        title=f"Excess $\\times\\,(T-p)$ at T = {first['first_order'][0]['T']}",
    )
    for axis in axes[:3]:
        legend_below(axis, ncols=2)
    figure.set_label("The risk peaks where prompts equal parameters; the excess has the predicted constant.")
    return {"pretraining": figure}
