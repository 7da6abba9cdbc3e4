"""How many distinct tasks does training need before it is as good as training on fresh ones?

Training on prompts of T given tasks (new contexts at every step) replaces Psi by the second moment Psi_T = (1/T) sum w w'. It
must therefore converge to A_N(Psi_T), and its risk on the population of tasks is known exactly. The excess over the optimum of
fresh tasks is quadratic in Psi_T - Psi, hence C/T, with C = E tr(Lq Z B^-1 Z') from `lindm_theory.robustness.few_task_score`
for every law of tasks, in closed form for Gaussian ones. Both laws of tasks use the features of one simplex linear MDP: the
vectors w of its first stage, and Gaussian vectors with the same Psi. Many sets of tasks are trained on at once; the sets are
nested in T.

    lindm run few_tasks --preset quick
    lindm verify --only few-tasks

Expected: the risk is within 3 % of that of A_N(Psi_T) for every T, including T below d; the slope is -1; about ten tasks give
an excess of 10 %, because the tasks of a first stage differ little from their mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from lindm.icl.attention import ReducedAttention, query_columns
from lindm.icl.prompts import draw_pairs
from lindm.icl.trainer import train_many
from lindm.problems.linear_mdp import MDPFamily, second_moment, simplex_family
from lindm.solvers.rollout import cumulative
from lindm.types import Prompt
from lindm_experiments.harness.config import check_counts, check_rising
from lindm_experiments.harness.figures import BLUE, BOUND, EXACT, GRAY, MEASURED, RED, legend_below, panel_grid, plot_seeds
from lindm_experiments.harness.statistics import slopes
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_experiments.lib import linear_mdps
from lindm_theory.in_context import context_second_moment, optimal_weights, risk
from lindm_theory.moments import design_fourth
from lindm_theory.robustness import few_task_coefficient, few_task_score

LAWS = ("MDP tasks", "gaussian tasks, same $\\Psi$")


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 204000
    N: int = 8
    T: tuple[int, ...] = (2, 8, 128)
    fit_from: int = 8  # smallest T of the fit of the slope: 2 d
    sets: int = 64  # number of sets of MDP tasks
    sets_gaussian: int = 16
    steps: int = 300
    batch: int = 64
    pool: int = 32 * linear_mdps.BLOCK  # size of the population of tasks
    prompts: int = 1 << 16  # number of fresh tasks on which the layers are tested

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "N", "sets", "sets_gaussian", "steps", "batch", "prompts", "fit_from")
        check_rising(self, "T", length=2)
        if sum(self.fit_from <= T for T in self.T) < 2:
            raise ValueError(f"fit_from must leave at least two values of T; got {self.fit_from} with T = {self.T}")
        if self.pool % linear_mdps.BLOCK or self.pool < self.T[-1]:
            raise ValueError(f"pool must be a multiple of {linear_mdps.BLOCK}, at least T; got {self.pool}")


QUICK = Config()
FULL = Config(seeds=10, T=(1, 2, 4, 8, 16, 32, 64, 128, 256), steps=500, batch=128, prompts=1 << 17)
SMOKE = Config(seeds=2, T=(2, 8, 16), sets=2, sets_gaussian=2, steps=10, batch=16, pool=linear_mdps.BLOCK, prompts=512)


@lru_cache
def _draw(N: int, batch: int) -> Callable:
    def draw(key: Array, phi: Array, columns: Array, tasks: Array, T: Array):
        """Noiseless prompts of the first T of `tasks` [Tmax, d] on features phi [S*A, d], uniform design."""
        which, pairs = jax.random.split(key)
        w = tasks[jnp.minimum((jax.random.uniform(which, (batch,)) * T).astype(int), T.astype(int) - 1)]
        uniform = jnp.cumsum(jnp.full(len(phi), 1 / len(phi), phi.dtype))
        x = phi[draw_pairs(pairs, uniform, batch * N)].reshape(batch, N, -1)
        y = jnp.einsum("bnd,bd->bn", x, w)
        return Prompt(x=x, y=y, query=jnp.broadcast_to(columns, (batch, *columns.shape))), w @ columns.T

    return draw


@partial(jax.jit, static_argnames=("sets", "gaussian", "largest"))
def draw_sets(key: Array, population: Array, sets: int, gaussian: int, largest: int) -> Array:
    """Independent sets of `largest` tasks from vectors [P, d], then Gaussian ones: [sets + gaussian, largest, d]."""
    which, normal = jax.random.split(key)
    d = population.shape[1]
    index = jax.random.randint(which, (sets * largest,), 0, len(population))
    spectrum, basis = jnp.linalg.eigh(population.T @ population / len(population))
    root = basis * jnp.sqrt(jnp.maximum(spectrum, 0.0))[None, :]
    z = jax.random.normal(normal, (gaussian * largest * d,)).reshape(-1, d)
    return jnp.concatenate([population[index], z @ root.T]).reshape(-1, largest, d)


@jax.jit
def predictions(family: MDPFamily, population: Array, sets: Array, T: Array, N: Array):
    """A_N(Psi_T) and its exact risk on the population, [sets, len(T), ...]; A_N(Psi), its risk []; C of the two laws [2]."""
    Lambda, table = second_moment(family), linear_mdps.pairs_table(family)

    def fourth(P: Array) -> Array:
        return design_fourth(table, family.design, P)

    Psi = population.T @ population / len(population)
    K = fourth(Psi)
    A, B = optimal_weights(Lambda, Psi, K, N), context_second_moment(Lambda, Psi, K, N)

    def one(tasks: Array, T: Array) -> tuple[Array, Array]:
        used = jnp.where(jnp.arange(len(tasks)) < T, 1 / T, 0.0)
        P = jnp.einsum("t,ti,tj->ij", used, tasks, tasks)
        A_T = optimal_weights(Lambda, P, fourth(P), N)
        return A_T, risk(A_T, Lambda, Psi, K, N, Lambda).total

    A_T, risk_T = jax.vmap(lambda s: jax.vmap(lambda t: one(s, t))(T))(sets)
    Z = jax.vmap(lambda w: few_task_score(A, jnp.outer(w, w) - Psi, Lambda, fourth, N))(population)
    C = jnp.einsum("ij,pjk,kl,pil->", Lambda, Z, jnp.linalg.inv(B), Z) / len(population)
    least = risk(A, Lambda, Psi, K, N, Lambda).total
    return A_T, risk_T, least, jnp.stack([C, few_task_coefficient(Lambda, Psi, fourth, N, Lambda)])


@partial(jax.jit, static_argnames=("N", "prompts"))
def measured_risks(key: Array, family: MDPFamily, population: Array, layers: Array, N: int, prompts: int) -> Array:
    """Mean squared error of each of `layers` [..., d, d] on the same fresh contexts of fresh tasks, every query weighed."""
    which, pairs = jax.random.split(key)
    w = population[jax.random.randint(which, (prompts,), 0, len(population))]
    x = linear_mdps.pairs_table(family)[draw_pairs(pairs, cumulative(family.design), prompts * N)].reshape(prompts, N, -1)
    S = jnp.einsum("pn,pnd->pd", jnp.einsum("pnd,pd->pn", x, w), x) / N
    # the mean of |w - A S|^2 over the prompts, from three sums of them that serve every A
    ww, Sw, SS = (a.T @ b / prompts for a, b in ((w, w), (S, w), (S, S)))
    Lambda = second_moment(family)
    crossed = jnp.einsum("ij,...jk,ki->...", Lambda, layers, Sw)
    squared = jnp.einsum("ij,...jk,kl,...il->...", Lambda, layers, SS, layers)
    return jnp.trace(Lambda @ ww) - 2 * crossed + squared


@jax.jit
def excess_risk(family: MDPFamily, population: Array, layers: Array, N: Array) -> Array:
    """Exact risk of trained layers [..., d, d] on the population, above that of A_N: no Monte Carlo noise in small excesses."""
    Lambda, Psi = second_moment(family), population.T @ population / len(population)
    K = design_fourth(linear_mdps.pairs_table(family), family.design, Psi)
    off = layers - jnp.broadcast_to(optimal_weights(Lambda, Psi, K, N), layers.shape)
    return jnp.einsum("ij,...jk,kl,...il->...", Lambda, off, context_second_moment(Lambda, Psi, K, N), off)


def measure(cfg: Config, point: dict) -> dict:
    k_pool, k_sets, k_train, k_test = jax.random.split(jax.random.key(cfg.base_seed + point["seed"]), 4)
    family = simplex_family(linear_mdps.family_key(cfg.base_seed + point["seed"]), 10, 3, 4, 3, feature_power=3.0)
    population = linear_mdps.task_pool(k_pool, family, cfg.pool)[0]
    sets = draw_sets(k_sets, population, cfg.sets, cfg.sets_gaussian, cfg.T[-1])
    N, T = np.float64(cfg.N), np.asarray(cfg.T, float)
    A_T, risk_T, least, C = predictions(family, population, sets, T, N)
    runs, phi, d = len(sets) * len(T), linear_mdps.pairs_table(family), population.shape[1]
    data = (
        np.broadcast_to(phi, (runs, *phi.shape)),
        np.broadcast_to(query_columns(second_moment(family)), (runs, d, d)),
        np.repeat(np.asarray(sets), len(T), axis=0),
        np.tile(T, len(sets)),
    )
    layers, _ = train_many(
        ReducedAttention(d),
        _draw(cfg.N, cfg.batch),
        jax.random.split(k_train, runs),
        steps=cfg.steps,
        data=tuple(x.astype(np.float32) for x in data),
        learning_rate=0.5,
        average=0.5,
    )
    trained = np.asarray(layers.A[...], dtype=float).reshape(A_T.shape)
    measured = measured_risks(k_test, family, population, trained, N=cfg.N, prompts=cfg.prompts)

    def by_law(values: Array) -> list[list[float]]:
        """Means over the sets of each law, [law][T]."""
        return [np.asarray(part).mean(0).tolist() for part in (values[: cfg.sets], values[cfg.sets :])]

    return {
        "T": list(cfg.T),
        "N": cfg.N,
        "d": d,
        "fit_from": cfg.fit_from,
        "least": float(least),
        "C": np.asarray(C).tolist(),
        "measured": by_law(measured),
        "predicted": by_law(risk_T),
        "excess": by_law(excess_risk(family, population, trained, N)),
        "weights_error": by_law(np.linalg.norm(trained - A_T, axis=(2, 3)) / np.linalg.norm(A_T, axis=(2, 3))),
    }


def _ratios(record: dict) -> np.ndarray:
    """Measured / predicted risk, [law, T]."""
    return np.array(record["measured"]) / np.array(record["predicted"])


def _slope(record: dict, law: int) -> float:
    keep = [i for i, T in enumerate(record["T"]) if record["fit_from"] <= T]
    return float(slopes([record["T"][i] for i in keep], [record["excess"][law][i] for i in keep])[0])


def tasks_needed(T: np.ndarray, excess: np.ndarray, level: float) -> float:
    """The first T at which the excess falls to `level`, on straight lines in logarithms; nan if it does not."""
    for i in range(1, len(T)):
        if excess[i] <= level < excess[i - 1]:
            part = np.log(excess[i - 1] / level) / np.log(excess[i - 1] / excess[i])
            return float(T[i - 1] * (T[i] / T[i - 1]) ** part)
    return float("nan")


def check(records: list[dict]) -> list[Verdict]:
    T = np.array(records[0]["T"], dtype=float)
    excess = np.mean([np.array(r["excess"]) / r["least"] for r in records], axis=0)
    law = np.mean([np.array(r["C"]) / r["least"] for r in records], axis=0)
    needed = [f"{tasks_needed(T, excess[i], 0.1):.3g} measured, {10 * law[i]:.3g} by C/T" for i in range(2)]
    ratios = np.array([_ratios(r) for r in records])
    return [
        mean_verdict(
            "few-tasks",
            [_slope(r, 0) for r in records],
            figure="few_tasks",
            note=f"tasks for 10 % excess: {needed[0]} (MDP), {needed[1]} (gaussian tasks)",
        ),
        mean_verdict(
            "few-tasks/exact",
            *ratios.reshape(len(records), -1).T,
            figure="few_tasks",
            note=f"T from {records[0]['T'][0]} to {records[0]['T'][-1]}, d = {records[0]['d']}",
        ),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    T = np.array(records[0]["T"], dtype=float)
    figure, (left, right) = panel_grid(2, 4.8)
    for i, (name, color) in enumerate(zip(LAWS, (BLUE, RED), strict=True)):
        measured = np.array([np.array(r["excess"][i]) / r["least"] for r in records])
        exact = np.array([np.array(r["predicted"][i]) / r["least"] - 1 for r in records])
        plot_seeds(left, T, exact, color)
        left.plot(T, exact.mean(0), color=color, label=f"{name}: $A_N(\\Psi_T)$, exact", **EXACT)
        left.plot(T, measured.mean(0), color=color, label=f"{name}: trained", **(MEASURED | {"marker": "os"[i]}))
        first_order = np.mean([r["C"][i] / r["least"] for r in records])
        left.plot(T, first_order / T, color=color, label=f"{name}: $C/T$", **BOUND)
        for k, r in enumerate(records):
            label = name if k == 0 else None
            right.plot(T * (1 + 0.06 * i), _ratios(r)[i], color=color, label=label, **(MEASURED | {"marker": "os"[i]}))
    left.axhline(0.1, color=GRAY, linestyle=":", marker="")
    left.set(
        xscale="log",
        yscale="log",
        xlabel="distinct tasks in training T",
        ylabel="risk above fresh tasks, relative",
        title="Excess risk",
    )
    legend_below(left)
    right.axhline(1.0, color=GRAY, **EXACT)
    right.set(
        xscale="log",
        xlabel="distinct tasks in training T",
        ylabel="measured / predicted risk",
        title="Risk on fresh tasks, every seed",
    )
    legend_below(right)
    figure.set_label(
        "Left: the excess risk falls as C/T with the number of distinct training tasks, on the exact curves. Right: measured "
        "over predicted risk lies within one percent of 1 for every seed."
    )
    return {"few_tasks": figure}
