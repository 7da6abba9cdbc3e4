"""When is the attention layer better than statistical estimators on the same context, and by how much?

Gaussian features, Lambda = Psi = I, label noise sigma; the layer is trained for the test length (N = M). Both risks are known
exactly,

    layer   d c/(c + M),  c = d + 1 + sigma^2
    OLS     d sigma^2/(M - d - 1)  for M >= d + 2,      d - M + M sigma^2/(d - M - 1)  for M <= d - 2 (shortest solution)

and elementary algebra (ours) compares them: the layer is better if and only if

    sigma^2 > sqrt(M (d + 1)) - (d + 1)   (M >= d + 2),        sigma^2 > sqrt(d (M + 1)) - (M + 1)   (M <= d - 2).

The layer wins on short or noisy contexts, because OLS has no prior. The ridge regression with the same prior (Bayes) is the
best predictor that is linear in y *for every single context X*. One layer is linear in y, so it never beats this ridge
regression, for any law of features and tasks.

In real linear MDPs, ridge, OLS and two Bayes predictors read the same contexts, and LSVI and PEVI read as many transitions (s,
a, r, s') with the same noise on r. The measure is the exact suboptimality of the greedy policy. There the tasks have a mean. A
layer that does not use X'X sees the product of this mean and the sampling noise of X'X as label noise, so the paper's layer
loses to nearly every other estimator. The same layer on labels minus their prior mean is close to Bayes wherever label noise
dominates, and better there than estimators that ignore the prior.

    lindm run against_statistics --preset quick
    lindm verify --only against-statistics

Expected: the boundary is where it is predicted. On no context does the layer beat Bayes. On centered labels, the layer beats
OLS, ridge and LSVI on short contexts and loses to OLS on long contexts without noise.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from lindm.icl.prompts import draw_pairs, transitions
from lindm.problems.linear_mdp import MDPFamily, second_moment, simplex_family, tabulate
from lindm.solvers.rollout import cumulative
from lindm.validate import count, nonnegative
from lindm_experiments.harness.config import check_counts
from lindm_experiments.harness.figures import (
    BLUE,
    DIVERGING,
    GRAY,
    GREEN,
    INK,
    MARKERS,
    MEASURED,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    YELLOW,
    legend_below,
    panel_grid,
    plot_seeds,
    set_log_ticks,
)
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_experiments.lib import attained, linear_mdps
from lindm_experiments.lib.gaussian_regression import D, gaussian_layers, grams
from lindm_experiments.lib.predictor_risks import (
    AFFINE,
    BAYES,
    CENTERED,
    DATA_ONLY,
    LAYER,
    METHODS,
    linear_risk,
    losses,
    risks,
)
from lindm_theory.in_context import optimal_weights
from lindm_theory.least_squares import boundary, layer_risk, ols_risk

S, A, d, H = 12, 3, 6, 3  # sizes of the MDPs


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 2023000
    contexts: int = 4096  # number of Gaussian contexts of every length
    M_gauss: tuple[int, ...] = (2, 16, 32, 64)
    sigma_gauss: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    M_trained: tuple[int, ...] = ()  # lengths at which the layer of the Gaussian problem is trained; elsewhere it is A_N
    tasks: int = 256  # number of MDPs
    M: tuple[int, ...] = (8, 16, 32, 64, 128)
    sigma: tuple[float, ...] = (0.1, 0.3, 1.0)
    M_small: int = 8  # context length of `small-context`, where the layers are trained
    sigma_small: float = 0.3  # label noise of `small-context`
    pool: int = 4096
    steps: int = 400

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "contexts", "tasks", "pool", "steps")
        for name in ("M_gauss", "M"):
            for M in getattr(self, name) or (0,):
                count(M, name)
        for name in ("sigma_gauss", "sigma"):
            for sigma in getattr(self, name) or (-1.0,):
                nonnegative(sigma, name)
                if sigma == 0:
                    raise ValueError(f"{name} must be positive: at sigma = 0 least squares is exact from M = d on; got {sigma}")
        if any(abs(M - D) < 2 for M in self.M_gauss):
            raise ValueError(f"M_gauss must keep a distance of 2 from d = {D}, where OLS has no finite risk; got {self.M_gauss}")
        if not set(self.M_trained) <= set(self.M_gauss):
            raise ValueError(f"M_trained must be among M_gauss = {self.M_gauss}; got {self.M_trained}")
        for name, value, values in (("M_small", self.M_small, self.M), ("sigma_small", self.sigma_small, self.sigma)):
            if value not in values:
                raise ValueError(f"{name} must be one of {values}; got {value}")


QUICK = Config()
FULL = Config(
    seeds=10,
    M_gauss=(2, 3, 4, 12, 16, 24, 32, 64, 128),
    sigma_gauss=(0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    M_trained=(2, 16),
    tasks=512,
    M=(8, 12, 16, 24, 32, 64, 128, 256),
    sigma=(0.03, 0.1, 0.3, 1.0, 3.0),
    pool=16384,
    steps=1500,
)
SMOKE = Config(
    seeds=2,
    contexts=256,
    M_gauss=(2, 16),
    sigma_gauss=(1.0,),
    M_trained=(2,),
    tasks=16,
    M=(8, 16),
    sigma=(0.3,),
    pool=256,
    steps=50,
)


# --- Gaussian regression -------------------------------------------------------------------------------------------------


def gaussian_part(cfg: Config, key: Array) -> list[dict]:
    """The (M, sigma) cells of the Gaussian problem."""
    k_contexts, k_train = jax.random.split(key)
    G = grams(k_contexts, jnp.asarray(cfg.M_gauss), contexts=cfg.contexts, longest=max(cfg.M_gauss))
    where = [(M, s) for M in cfg.M_trained for s in cfg.sigma_gauss]
    Ahat = dict(zip(where, gaussian_layers(k_train, where, cfg.steps), strict=True))
    I, cells = jnp.eye(D), []
    for i, M in enumerate(cfg.M_gauss):
        exact = [M / (M + D + 1 + sigma**2) * np.eye(D) for sigma in cfg.sigma_gauss]
        layers = jnp.asarray(np.stack([Ahat.get((M, sigma), A) for sigma, A in zip(cfg.sigma_gauss, exact, strict=True)]))
        out = risks(G[:, i], layers, jnp.asarray(float(M)), I, jnp.asarray(cfg.sigma_gauss), I)
        beaten = (out[LAYER] < out[BAYES] * (1 - 1e-9)).sum(0)
        for k, sigma in enumerate(cfg.sigma_gauss):
            cells.append(
                {
                    "M": M,
                    "sigma": sigma,
                    "trained": (M, sigma) in Ahat,
                    "risk": {name: float(v[:, k].mean()) for name, v in out.items()},
                    "layer_exact": layer_risk(M, sigma, D),
                    "ols_exact": ols_risk(M, sigma, D),
                    "boundary": boundary(M, D),
                    "beats_bayes": int(beaten[k]),
                    "nearest": float((out[LAYER][:, k] / out[BAYES][:, k]).min()),
                    "n": cfg.contexts,
                }
            )
    return cells


# --- linear MDPs -----------------------------------------------------------------------------------------------------------


def family(seed: int) -> MDPFamily:
    """Rewards in [0, 1], as PEVI requires."""
    return simplex_family(linear_mdps.family_key(seed), S, A, d, H, feature_power=2.0)


@partial(jax.jit, static_argnames=("tests", "pool", "longest"))
def draw_test_tasks(key: Array, family: MDPFamily, tests: int, pool: int, longest: int):
    """Test tasks (MDP, Plan, w), their contexts (x [tests, H, longest, d], r, phi(s', .), two noises), a pool [H, pool, d]."""
    k_tasks, k_pairs, k_steps, k_noise = jax.random.split(key, 4)
    task, plan, w = jax.vmap(lambda k: linear_mdps.draw_oracle(k, family))(jax.random.split(k_tasks, tests + pool))
    mdp, plan = jax.tree.map(lambda leaf: leaf[:tests], (jax.vmap(tabulate)(task), plan))
    pairs = draw_pairs(k_pairs, cumulative(family.design), (tests, H, longest))
    x, r, after = jax.vmap(lambda k, m, i: transitions(k, m, family.phi, i))(jax.random.split(k_steps, tests), mdp, pairs)
    noise = jax.random.normal(k_noise, (2, tests, H, longest))
    return (mdp, plan, w[:tests], (x, r, after, noise[0], noise[1])), jnp.moveaxis(w[tests:], 1, 0)


@jax.jit
def closed_forms(family: MDPFamily, Psi: Array, N: Array, sigma: Array) -> Array:
    """A_N [H, d, d] under label noise sigma."""
    Lambda = second_moment(family)
    K = linear_mdps.fourth_moments(family, Psi)
    return jax.vmap(lambda P, K: optimal_weights(Lambda, P, K, N, sigma**2 * Lambda))(Psi, K)


@jax.jit
def mdp_grams(x: Array, M: Array) -> Array:
    """X'X [tasks, H, d, d] of the first M pairs."""
    used = (jnp.arange(x.shape[2]) < M).astype(x.dtype)
    return jnp.einsum("i,thid,thie->thde", used, x, x)


def mdp_part(cfg: Config, key: Array, features: MDPFamily) -> list[dict]:
    """The (M, sigma) cells of the MDPs: the layer is A_N at N = M; in the cell (M_small, sigma_small) both layers are trained."""
    k_tests, k_train = jax.random.split(key)
    test_tasks, pool = draw_test_tasks(k_tests, features, cfg.tasks, cfg.pool, max(cfg.M))
    Psi, mean, Lambda = linear_mdps.pool_moment(pool), pool.mean(1), second_moment(features)
    covariance = Psi - jnp.asarray(mean)[:, :, None] * jnp.asarray(mean)[:, None, :]
    train = partial(linear_mdps.trained_layers, steps=cfg.steps, learning_rate=0.1, batch=128)
    raw = train(k_train, features, pool, cfg.M_small, cfg.sigma_small)
    deviation = train(k_train, features, pool - mean[:, None], cfg.M_small, cfg.sigma_small)
    cells = []
    for M in cfg.M:
        G = mdp_grams(test_tasks[3][0], jnp.asarray(float(M)))
        for sigma in cfg.sigma:
            at = (jnp.asarray(float(M)), jnp.asarray(sigma))
            small = (M, sigma) == (cfg.M_small, cfg.sigma_small)
            layers = raw if small else closed_forms(features, Psi, *at)
            lost = losses(
                features, test_tasks, layers, deviation if small else closed_forms(features, covariance, *at), Psi, mean, *at
            )
            by_stage = [risks(G[:, h], layers[h][None], at[0], Psi[h], at[1][None], Lambda) for h in range(H)]
            cells.append(
                {
                    "M": M,
                    "sigma": sigma,
                    "trained": small,
                    "loss": {m: float(v.mean()) for m, v in lost.items()},
                    "risk": {m: float(sum(out[m].mean() for out in by_stage)) for m in (LAYER, "OLS", BAYES)},
                    "beats_bayes": sum(int((out[LAYER] < out[BAYES] * (1 - 1e-9)).sum()) for out in by_stage),
                    "nearest": min(float((out[LAYER] / out[BAYES]).min()) for out in by_stage),
                    "n": cfg.tasks * H,
                }
            )
    return cells


# --- the experiment ----------------------------------------------------------------------------------------------------


def measure(cfg: Config, point: dict) -> dict:
    k_gauss, k_mdp = jax.random.split(jax.random.key(cfg.base_seed + point["seed"]))
    features = family(cfg.base_seed + point["seed"])
    return {
        "d": D,
        "gaussian": gaussian_part(cfg, k_gauss),
        "mdp": mdp_part(cfg, k_mdp, features),
        "small": [cfg.M_small, cfg.sigma_small],
        "attained": {"Bayes": bayes_context(cfg.M_small, cfg.sigma_small)},
    }


def bayes_context(M: int, sigma: float) -> list[float]:
    """Risks of Bayes and of the layer on a context with X'X = (M + d + 1) I, on which their weights are equal."""
    G = (M + D + 1) * jnp.eye(D)
    layer, bayes = jnp.eye(D) / (M + D + 1 + sigma**2), jnp.linalg.inv(G + sigma**2 * jnp.eye(D))
    return [float(linear_risk(B, G, jnp.eye(D), jnp.asarray(sigma), jnp.eye(D))) for B in (bayes, layer)]


def _small(record: dict) -> dict[str, float]:
    M, sigma = record["small"]
    return next(c["loss"] for c in record["mdp"] if c["M"] == M and c["sigma"] == sigma)


def check(records: list[dict]) -> list[Verdict]:
    n_cells = len(records[0]["gaussian"])
    ratio = [
        [c["risk"][LAYER] / c["risk"]["OLS"] * c["ols_exact"] / c["layer_exact"] for c in (r["gaussian"][i] for r in records)]
        for i in range(n_cells)
    ]
    wins = sum((c["risk"][LAYER] < c["risk"]["OLS"]) == (c["sigma"] ** 2 > c["boundary"]) for r in records for c in r["gaussian"])
    cells = [c for r in records for c in (*r["gaussian"], *r["mdp"])]
    seen = sum(c["n"] for c in cells)
    methods = ("OLS", "ridge, lambda = 1", "LSVI")

    def against(layer: str) -> list[list[float]]:
        return [[_small(r)[layer] / _small(r)[m] for r in records] for m in methods]

    def named(ratios: list[list[float]]) -> str:
        return ", ".join(f"{m} {np.mean(v):.2f}" for m, v in zip(methods, ratios, strict=True))

    M, sigma = records[0]["small"]
    centered, raw = against(CENTERED), against(LAYER)
    return [
        mean_verdict(
            "against-statistics",
            *ratio,
            figure="map",
            note=f"the better one is the predicted one in {wins} of {n_cells * len(records)} cells",
        ),
        count_verdict(
            "against-statistics/bayes",
            sum(c["beats_bayes"] for c in cells),
            seen,
            seeds=len(records),
            also=[attained.none_below(records, "Bayes")],
            figure="map",
            note="slack: layer / Bayes on the nearest context of a cell",
            slack=[*attained.ratios(records, "Bayes")[0], *(c["nearest"] for c in cells)],
        ),
        mean_verdict(
            "against-statistics/small-context", *centered, figure="methods", note=f"M = {M}, sigma = {sigma:g}: {named(centered)}"
        ),
        mean_verdict("against-statistics/raw-labels", *raw, figure="methods", note=f"M = {M}, sigma = {sigma:g}: {named(raw)}"),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    return {"map": _map(records), "methods": _methods(records)}


def _grid(records: list[dict], part: str, value) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(M, sigma, mean over seeds of value(cell) [sigma, M])."""
    M = sorted({c["M"] for c in records[0][part]})
    sigma = sorted({c["sigma"] for c in records[0][part]})
    table = [[np.mean([value(c) for r in records for c in r[part] if (c["M"], c["sigma"]) == (m, s)]) for m in M] for s in sigma]
    return np.array(M), np.array(sigma), np.array(table)


def _map(records: list[dict]) -> Figure:
    """log2 of layer / other method over (M, sigma): blue where the layer is better."""
    figure, axes = panel_grid(4, 3.2)

    def best(c: dict, layer: str, methods: tuple[str, ...]) -> float:
        return np.log2(c["loss"][layer] / min(c["loss"][m] for m in methods))

    panels = (
        (
            "gaussian",
            lambda c: np.log2(c["risk"][LAYER] / c["risk"]["OLS"]),
            f"Gaussian, d = {records[0]['d']}: risk, layer / OLS; black: boundary",
        ),
        ("mdp", lambda c: best(c, LAYER, DATA_ONLY), "MDPs: loss, layer / best of OLS, ridge, LSVI, PEVI"),
        ("mdp", lambda c: best(c, CENTERED, DATA_ONLY), "MDPs: the same, layer on centered labels"),
        ("mdp", lambda c: best(c, CENTERED, (BAYES, AFFINE)), "MDPs: layer on centered labels / best Bayes"),
    )
    for axis, (part, value, title) in zip(axes, panels, strict=True):
        M, sigma, table = _grid(records, part, value)
        mesh = axis.imshow(table, origin="lower", aspect="auto", cmap=DIVERGING, norm=TwoSlopeNorm(0, -3, 3))
        for i in range(len(sigma)):
            for j in range(len(M)):
                ink = "white" if abs(table[i, j]) > 2 else "black"
                axis.text(j, i + 0.27, f"{2 ** table[i, j]:.2f}", ha="center", va="center", fontsize=8, color=ink)
        if part == "gaussian" and len(sigma) > 1:
            at = np.log(np.maximum([boundary(m, records[0]["d"]) for m in M], 1e-9)) / 2
            rows = np.interp(at, np.log(sigma), np.arange(len(sigma)), left=-1, right=len(sigma))
            axis.hlines(rows, np.arange(len(M)) - 0.5, np.arange(len(M)) + 0.5, color="black", linewidth=2)
            axis.set_ylim(-0.5, len(sigma) - 0.5)
        axis.set_xticks(range(len(M)), [str(m) for m in M])
        axis.set_yticks(range(len(sigma)), [f"{s:g}" for s in sigma])
        axis.grid(visible=False)
        axis.set(xlabel="pairs in the prompt M (= N)", ylabel="label noise sigma", title=title)
    figure.colorbar(
        mesh, ax=axes, label="log2 of the ratio written in the cells; blue: the layer is better", location="bottom", aspect=40
    )
    figure.set_label("Ratios over pairs and noise: the layer wins (blue) with much noise and few pairs, and loses elsewhere.")
    return figure


PALETTES = ((BLUE, GREEN, PURPLE, GRAY), (RED, ORANGE, SKY, YELLOW, "#8B6B00", "#5D3A9B"))  # of layers, of statistics


def _methods(records: list[dict]) -> Figure:
    """Suboptimality over M: a row for each noise level, layers left and statistics right; thin lines are seeds."""
    sigmas = sorted({c["sigma"] for c in records[0]["mdp"]})
    M = sorted({c["M"] for c in records[0]["mdp"]})
    figure, cells = panel_grid(2 * len(sigmas), 2.6, ylabel="suboptimality", sharey=True, sharex=True)
    axes = np.array(cells).reshape(-1, 2)
    layers = (LAYER, CENTERED, "layer on its own targets", "uniform policy")
    rows = (layers, tuple(method for method in METHODS if method not in layers))
    for (row, column), axis in np.ndenumerate(axes):
        sigma = sigmas[row]
        for method, color, marker in zip(rows[column], PALETTES[column], MARKERS, strict=False):
            cells = [{(c["M"], c["sigma"]): c["loss"] for c in r["mdp"]} for r in records]
            curves = np.array([[loss[m, sigma][method] for m in M] for loss in cells])
            plot_seeds(axis, M, curves, color)
            axis.plot(M, curves.mean(0), color=color, marker=marker, markersize=4, linewidth=1.2, label=method)
        if column == 0 and sigma == records[0]["small"][1]:
            for layer in (LAYER, CENTERED):
                values = [_small(r)[layer] for r in records]
                at = [records[0]["small"][0]] * len(values)
                label = "layers trained here" if layer == LAYER else None
                axis.plot(at, values, **(MEASURED | {"marker": "_", "markersize": 12}), color=INK, label=label)
        axis.set(xscale="log", yscale="log", title=f"{('layers', 'statistics')[column]}, noise sigma = {sigma:g}")
        axis.set_xlabel("pairs in the prompt M (= N)" if row == len(sigmas) - 1 else "")
        set_log_ticks(axis, M)
    for column in axes.T:
        named = {text: line for axis in column for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
        legend_below(column[-1], handles=named.values(), labels=named.keys(), ncols=2)
    figure.set_label("Suboptimality falls with the pairs: layers left, statistics right, a row for each noise level.")
    return figure
