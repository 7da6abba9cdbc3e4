"""Can one linear layer solve tasks whose kernels move their contexts, given enough data?

No. In linear MDPs with H = 2 and kernels drawn with the task, the pairs that a behavior policy visits at stage 2 have a
covariance Lambda_t that depends on the task, and the layer sees S -> Lambda_t w as M grows. The risk of every A at every M and
N is at least the floor of lindm_theory.lower_bound. Repeating the layer, w <- w + A (S - G w), uses the G of the context
itself and goes below the floor. If only the scale of Lambda_t varies (episodes that end early), a division by tr G does so,
too. For the policy there are twin tasks, with the same law of S and opposite best actions. A policy that sees only S, as the
reduced layer does, takes the wrong action half of the time, for all A, M and N. With both signs of the rewards, the full
layer, with all its blocks, is wrong at least a quarter of the time. These shares are sums over all contexts.

    lindm run lower_bound --preset quick      about 10 s on 2 cores
    lindm verify --only lower-bound

Expected: risks are on the exact lines, which end on the floor. Losses on the twins are one half, and down to one quarter for
the full layer. Depth removes both.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure
from scipy import stats

from lindm.problems.linear_mdp import MDPFamily, draw_task, second_moment, simplex_family, tabulate
from lindm.solvers.dp import occupancy, plan_linear
from lindm.solvers.policy_values import suboptimality
from lindm.solvers.ties import greedy
from lindm.types import LinearMDP
from lindm_experiments.harness.config import check_counts, check_positive, check_rising
from lindm_experiments.harness.figures import (
    BLUE,
    BOUND,
    EXACT,
    GRAY,
    GREEN,
    MEASURED,
    ORANGE,
    PURPLE,
    RED,
    legend_below,
    panel_grid,
    plot_seeds,
    set_log_ticks,
)
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_experiments.lib import linear_mdps
from lindm_experiments.lib.twin_layers import embedded, wrong_shares
from lindm_theory import lower_bound as theory
from lindm_theory.in_context import solve_normal_equations
from lindm_theory.moments import pair_covariance

S, A, D, H = 10, 2, 4, 2  # states, actions, features, stages
ROUNDING = 1e-9  # of a sum over all contexts


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 10
    base_seed: int = 2063000
    tasks: int = 1536  # number of training tasks; the test has as many others
    M: tuple[int, ...] = (16, 64, 256, 1024, 4096)  # lengths of the test contexts, equal to the training length N
    power: float = 4.0  # concentration of the kernels; 1 is the flat Dirichlet law
    depth: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    least_scale: float = 0.2  # least scale of Lambda_t in the family of episodes that end early; scales are uniform up to 1
    M_twins: tuple[int, ...] = (2, 8, 32, 128)
    layers: int = 40  # number of random layers for each seed
    depth_twins: int = 64

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "tasks", "layers", "depth_twins")
        check_rising(self, "M", "M_twins", "depth", length=2)
        check_positive(self, "power", "least_scale")
        if self.depth[0] != 1 or self.least_scale >= 1:
            raise ValueError(f"depth must start at 1 and least_scale be below 1; got {self.depth} and {self.least_scale}")


QUICK = Config()
FULL = Config(
    seeds=20,
    tasks=8192,
    M=(4, 16, 64, 256, 1024, 4096, 16384),
    depth=(1, 2, 4, 8, 16, 32, 64),
    M_twins=(2, 8, 32, 128, 512),
    layers=256,
)
SMOKE = Config(seeds=2, tasks=64, M=(16, 256), depth=(1, 8), M_twins=(2, 8), layers=2, depth_twins=8)


@partial(jax.jit, static_argnames="tasks")
def draw_tasks(key: Array, family: MDPFamily, tasks: int) -> tuple[LinearMDP, Array, Array, Array]:
    """Tasks, their w [P, d] and law of pairs [P, S*A] at the last stage under the uniform policy, and Q* [P, H, S, A]."""

    def one(key: Array) -> tuple[LinearMDP, Array, Array, Array]:
        task = draw_task(key, family)
        plan, w = plan_linear(task)
        visits = occupancy(tabulate(task), jnp.full((H, S, A), 1 / A))[-1]
        return task, w[-1], jnp.repeat(visits / A, A), plan.Q

    return jax.vmap(one)(jax.random.split(key, tasks))


@jax.jit
def exact_moments(table: Array, law: Array, w: Array) -> tuple[Array, ...]:
    """Lambda_t [P, d, d], and (Psi, m, D, R) [d, d] over the tasks, from the features [n, d] and laws of pairs [P, n]."""
    Lambda = jnp.einsum("pn,ni,nj->pij", law, table, table)
    even = jnp.full(len(w), 1 / len(w))
    R = jax.vmap(lambda p, w: pair_covariance(table, p, w))(law, w).mean(0)
    return Lambda, *theory.task_moments(Lambda, w, even), R


def draw_grams(rng: np.random.Generator, table: np.ndarray, law: np.ndarray, M: int) -> np.ndarray:
    """G [P, d, d] of one context of M pairs for each task."""
    counts = rng.multinomial(M, law / law.sum(axis=1, keepdims=True))
    return np.einsum("pn,nij->pij", counts / M, table[:, :, None] * table[:, None, :])


def mean_error(guess: np.ndarray, w: np.ndarray, Lambda_q: np.ndarray) -> float:
    """Mean of |guess - w|^2 in Lambda_q over tasks: [P, d], [P, d]."""
    return float(np.einsum("pi,ij,pj->", guess - w, Lambda_q, guess - w) / len(w))


def iterate(A: np.ndarray, G: np.ndarray, w: np.ndarray, depths: tuple[int, ...]) -> list[np.ndarray]:
    """Guesses [P, d] after each of the depths, of w <- w + A (S - G w) from zero, without label noise: S = G w."""
    guess, out = np.zeros_like(w), []
    for k in range(1, depths[-1] + 1):
        guess = guess + np.einsum("ij,pjk,pk->pi", A, G, w - guess)
        out += [guess] if k in depths else []
    return out


@jax.jit
def mean_loss(tasks: LinearMDP, Qstar: Array, guess: Array) -> Array:
    """Mean suboptimality [] of the policy that is optimal at the first stages and greedy for the guesses [P, d] at the last."""

    def one(task: LinearMDP, Q: Array, guess: Array) -> Array:
        return suboptimality(tabulate(task), greedy(Q.at[-1].set(task.phi @ guess)))

    return jax.vmap(one)(tasks, Qstar, guess).mean()


def kernels(key: Array, rng: np.random.Generator, cfg: Config) -> dict:
    """Random kernels: risk of A_N over M = N, its floor, and what depth makes of it."""
    k_family, k_train, k_test = jax.random.split(key, 3)
    family = simplex_family(k_family, S, A, D, H, feature_power=3.0, power=cfg.power, low=-1.0, high=1.0)
    table, Lambda_q = np.asarray(linear_mdps.pairs_table(family)), np.asarray(second_moment(family))
    _, w, law, _ = draw_tasks(k_train, family, cfg.tasks)
    Lambda, _, m, D_, R = exact_moments(table, law, w)
    tasks, w_test, law_test, Qstar = draw_tasks(k_test, family, cfg.tasks)
    Lambda_test, Psi, m_test, D_test, R_test = exact_moments(table, law_test, w_test)
    floor = float(theory.floor(Psi, m_test, D_test, Lambda_q))
    w_test, law_test = np.asarray(w_test), np.asarray(law_test)
    measured, exact, best = [], [], []
    for M in cfg.M:
        layer = np.asarray(solve_normal_equations(m, D_ + R / M))
        exact.append(float(theory.task_risk(layer, Psi, m_test, D_test, R_test, M, Lambda_q).total))
        G = draw_grams(rng, table, law_test, M)
        sums = np.einsum("pij,pj->pi", G, w_test)
        measured.append(mean_error(sums @ layer.T, w_test, Lambda_q))
        # the smallest error of any A on these very contexts
        fitted = np.linalg.lstsq(sums, w_test)[0]
        best.append(mean_error(sums @ fitted, w_test, Lambda_q))
    mean = np.linalg.inv(np.asarray(Lambda).mean(0))
    largest = np.linalg.eigvals(np.einsum("ij,pjk->pik", mean, np.asarray(Lambda))).real.max()
    step, even = mean / largest, np.full(cfg.tasks, 1 / cfg.tasks)
    guesses = iterate(step, G, w_test, cfg.depth)
    trace = np.trace(np.asarray(Lambda_test), axis1=1, axis2=2)
    unminimized = theory.task_risk(mean, Psi, m_test, D_test, R_test, np.inf, Lambda_q).bias
    return {
        "floor": floor,
        "power": float(np.trace(Lambda_q @ np.asarray(Psi))),
        "unminimized": float(unminimized),
        "scale_share": float(np.var(trace) / np.mean(trace**2)),  # Var(c)/E[c^2] of the scales alone
        "measured": measured,
        "exact": exact,
        "best": best,
        "depth": [mean_error(g, w_test, Lambda_q) for g in guesses],
        "depth_exact": [float(theory.depth_floor(step, Lambda_test, w_test, even, Lambda_q, k)) for k in cfg.depth],
        "loss": [float(mean_loss(tasks, Qstar, g)) for g in (sums @ layer.T, guesses[-1])],
        "scales": scales(rng, cfg, table, Lambda_q, w_test, np.asarray(Psi)),
    }


def scales(rng: np.random.Generator, cfg: Config, table: np.ndarray, Lambda: np.ndarray, w: np.ndarray, Psi: np.ndarray) -> dict:
    """Episodes that end early, Lambda_t = c_t Lambda: risk of A_N at the longest M = N, and of a layer that divides by tr G."""
    c = rng.uniform(cfg.least_scale, 1.0, size=len(w))
    ends = np.concatenate([c[:, None] * np.full((1, len(table)), 1 / len(table)), 1 - c[:, None]], axis=1)
    padded = np.concatenate([table, np.zeros((1, table.shape[1]))])  # an ended episode has no features
    _, _, m, D_, R = exact_moments(padded, ends, w)
    M = cfg.M[-1]
    G = draw_grams(rng, padded, ends, M)
    layer = np.asarray(solve_normal_equations(m, D_ + R / M))
    sums = np.einsum("pij,pj->pi", G, w)
    normalized = sums / np.trace(G, axis1=1, axis2=2)[:, None] @ (np.trace(Lambda) * np.linalg.inv(Lambda)).T
    return {
        "floor": float(theory.scale_floor(c, np.full(len(c), 1 / len(c)), Psi, Lambda)),
        "power": float(np.trace(Lambda @ Psi)),
        "mean": float(c.mean()),
        "square": float(np.mean(c**2)),
        "one": mean_error(sums @ layer.T, w, Lambda),
        "normalized": mean_error(normalized, w, Lambda),
    }


def twins(rng: np.random.Generator, cfg: Config) -> dict:
    """The signed twins: wrong actions of random layers, of A_N and of the hand-set full layer, over M."""
    best, other, visit = rng.uniform(1.5, 3.0), rng.uniform(0.5, 1.0), rng.uniform(0.35, 0.65)
    z, chance = rng.uniform(0.5, 2.0, size=2), np.array([visit, 1 - visit])
    r2, w = (np.asarray(v) for v in theory.twin_tasks(best, other, z))
    x = np.sqrt(r2)[:, :, None] * np.eye(2)
    # the moments do not see the sign of w
    _, _, m, D_, R = exact_moments(np.concatenate(x), np.stack([[*chance, 0, 0], [0, 0, *chance]]), w)
    hand = np.concatenate(
        [np.ravel(v) for v in embedded(*(np.asarray(v) for v in theory.twin_full_weights(best, other, z, chance)))]
    )
    size = np.abs(hand).max()
    flat = np.stack(
        [hand]
        + [hand + size * scale * rng.normal(size=18) for scale in np.geomspace(0.003, 1.0, cfg.layers)]
        + [rng.normal(size=18) for _ in range(cfg.layers)]
    ).reshape(-1, 2, 3, 3)
    step, rows = np.eye(2) / r2.max() / chance.max(), cfg.M_twins[-1] + 1
    out = {"reduced": [], "full": [], "below": [], "hand": [], "deep": [], "test": []}
    for M in cfg.M_twins:
        n = np.minimum(np.arange(rows), M)
        weight = np.where(np.arange(rows) <= M, stats.binom.pmf(np.arange(rows), M, visit), 0.0)
        closed = np.asarray(solve_normal_equations(m, D_ + R / M))
        layers = np.concatenate([closed[None], rng.normal(size=(cfg.layers, 2, 2))])
        shares = np.stack([n, M - n], axis=1) / M
        full = (flat[:, 0], flat[:, 1])
        reduced, wide, deep = (np.asarray(v) for v in wrong_shares(layers, full, step, x, w, shares, weight, cfg.depth_twins))
        out["reduced"].append([float(reduced.min()), float(reduced.max())])
        out["full"].append(float(wide.min()))
        out["below"].append(int(np.sum(wide < 0.25 - ROUNDING)))
        out["hand"].append(float(wide[0]))
        out["deep"].append(float(deep))
        out["test"].append(float(theory.testing_bound(weight, weight, 1.0, 1.0)))  # in units of the gap
    return out | {"layers": len(flat)}


def measure(cfg: Config, point: dict) -> dict:
    rng = np.random.default_rng([cfg.base_seed, point["seed"]])
    return {
        "M": list(cfg.M),
        "depths": list(cfg.depth),
        "M_twins": list(cfg.M_twins),
        "depth_twins": cfg.depth_twins,
        "kernels": kernels(jax.random.key(cfg.base_seed + point["seed"]), rng, cfg),
        "twins": twins(rng, cfg),
    }


def _kernels(records: list[dict], name: str) -> np.ndarray:
    return np.array([r["kernels"][name] for r in records])


def _twins(records: list[dict], name: str) -> np.ndarray:
    return np.array([r["twins"][name] for r in records])


def check(records: list[dict]) -> list[Verdict]:
    first = records[0]
    measured, exact, best, floor = (_kernels(records, n) for n in ("measured", "exact", "best", "floor"))
    depth, depth_exact, loss = (_kernels(records, n) for n in ("depth", "depth_exact", "loss"))
    scale = {n: np.array([r["kernels"]["scales"][n] for r in records]) for n in ("floor", "one", "normalized")}
    inner = [i for i, k in enumerate(first["depths"]) if 1 <= k <= 8]
    reduced, full, test = (_twins(records, n) for n in ("reduced", "full", "test"))
    share = np.mean(floor / _kernels(records, "power"))
    return [
        mean_verdict(
            "lower-bound", *(measured / exact).T, figure="lower_bound", note=f"M = N from {first['M'][0]} to {first['M'][-1]}"
        ),
        mean_verdict(
            "lower-bound/floor",
            *(best / floor[:, None]).T,
            figure="lower_bound",
            note=f"floor = {share:.1%} of the power of the tasks; smallest ratio by M: "
            + ", ".join(f"{v:.4g}" for v in (best / floor[:, None]).min(0)),
            slack=best / floor[:, None],
        ),
        mean_verdict("lower-bound/attained", measured[:, -1] / floor, figure="lower_bound", note=f"M = N = {first['M'][-1]}"),
        mean_verdict("lower-bound/unminimized", measured[:, -1] / _kernels(records, "unminimized"), figure="lower_bound"),
        mean_verdict("lower-bound/depth", depth[:, -1] / floor, figure="lower_bound", note=f"{first['depths'][-1]} steps"),
        mean_verdict(
            "lower-bound/depth-exact", *(depth / depth_exact)[:, inner].T, figure="lower_bound", note=f"M = {first['M'][-1]}"
        ),
        mean_verdict("lower-bound/scale", scale["one"] / scale["floor"], figure="lower_bound"),
        mean_verdict("lower-bound/normalized", scale["normalized"] / scale["floor"], figure="lower_bound"),
        mean_verdict(
            "lower-bound/policy-kernels",
            loss[:, 1] / loss[:, 0],
            figure="lower_bound",
            note=f"loss of one layer {loss[:, 0].mean():.3g}, of {first['depths'][-1]} steps {loss[:, 1].mean():.3g}",
        ),
        mean_verdict(
            "lower-bound/policy",
            *np.moveaxis(reduced / test[:, :, None], 0, -1).reshape(-1, len(records)),
            figure="twins",
            note=f"M from {first['M_twins'][0]} to {first['M_twins'][-1]}, A_N and random A",
        ),
        count_verdict(
            "lower-bound/policy-full",
            int(_twins(records, "below").sum()),
            len(first["M_twins"]) * int(_twins(records, "layers").sum()),
            seeds=len(records),
            figure="twins",
            note=f"smallest share times 4: {4 * full.min():.6f}",
            slack=4 * full,
        ),
        mean_verdict(
            "lower-bound/policy-attained", 4 * _twins(records, "hand")[:, -1], figure="twins", note=f"M = {first['M_twins'][-1]}"
        ),
        mean_verdict("lower-bound/policy-half", 2 * full.min(axis=1), figure="twins"),
        mean_verdict(
            "lower-bound/policy-depth", 2 * _twins(records, "deep")[:, -1], figure="twins", note=f"{first['depth_twins']} steps"
        ),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    return {"lower_bound": _risks(records), "twins": _wrong(records)}


def _risks(records: list[dict]) -> Figure:
    """Risk over M = N with its floor, and risk over the depth; relative to the floor, every seed."""
    M, depths = np.array(records[0]["M"]), np.array(records[0]["depths"])
    floor = _kernels(records, "floor")[:, None]
    figure, (left, right) = panel_grid(2, 4.6)
    plot_seeds(left, M, _kernels(records, "exact") / floor, BLUE)
    left.plot(M, (_kernels(records, "exact") / floor).mean(0), color=BLUE, label="$A_N$: exact", **EXACT)
    left.plot(M, (_kernels(records, "measured") / floor).mean(0), color=BLUE, label="$A_N$: measured", **MEASURED)
    best = (_kernels(records, "best") / floor).mean(0)
    left.plot(M, best, color=GREEN, label="best A on these contexts", **MEASURED | {"marker": "^"})
    left.axhline(1.0, color=GRAY, label="floor", **BOUND)
    unminimized = (_kernels(records, "unminimized")[:, None] / floor).mean()
    left.axhline(unminimized, color=RED, label="$A = \\bar\\Lambda^{-1}$: no bound", linestyle=":", marker="")
    left.set(xlabel="pairs in the prompt M (= N)", ylabel="risk / floor", title="One layer: kernels that differ")
    set_log_ticks(left, M)
    exact = _kernels(records, "depth_exact") / floor
    plot_seeds(right, depths, exact, PURPLE)
    right.plot(depths, exact.mean(0), color=PURPLE, label="$M = \\infty$, exact", **EXACT)
    measured = (_kernels(records, "depth") / floor).mean(0)
    right.plot(depths, measured, color=PURPLE, label=f"M = {M[-1]}, measured", **MEASURED | {"marker": "D"})
    right.axhline(1.0, color=GRAY, label="floor of one layer", **BOUND)
    scales = np.array(
        [[r["kernels"]["scales"][n] / r["kernels"]["scales"]["floor"] for n in ("one", "normalized")] for r in records]
    )
    for value, marker, layer in zip(scales.mean(0), "sv", ("one layer", "divided by tr G"), strict=True):
        label = f"episodes that end early: {layer}"
        right.plot([1], [value], color=ORANGE, label=label, **MEASURED | {"marker": marker, "markersize": 8})
    right.set(xlabel="steps k", ylabel="risk / floor", yscale="log", title="Depth and normalization")
    set_log_ticks(right, depths)
    for axis in (left, right):
        legend_below(axis)
    figure.set_label(
        "Left: the risk of one layer falls with the prompt length to its floor, and no lower. Right: with more steps the risk "
        "falls far below the floor of one layer, as it does at one step where a layer divides by the trace."
    )
    return figure


def _wrong(records: list[dict]) -> Figure:
    """Share of wrong actions on the twins over M: reduced, full and deep layers, every seed."""
    M = np.array(records[0]["M_twins"])
    figure, axis = pyplot.subplots(figsize=(6.4, 4.2))
    for name, color, marker, label in (
        ("reduced", BLUE, "o", "reduced layers, every A"),
        ("full", RED, "s", "best of the full layers"),
        ("deep", PURPLE, "D", f"{records[0]['depth_twins']} steps"),
    ):
        values = _twins(records, name)
        values = values[:, :, 1] if name == "reduced" else values
        plot_seeds(axis, M, values, color)
        axis.plot(M, values.mean(0), color=color, label=label, **MEASURED | {"marker": marker})
    axis.axhline(0.5, color=BLUE, label="1/2: exact for every A", **EXACT)
    axis.axhline(0.25, color=RED, label="1/4: bound for all blocks", **BOUND)
    axis.set(xlabel="pairs in the prompt M", ylabel="share of wrong actions", ylim=(-0.02, 0.62), title="Twin tasks")
    set_log_ticks(axis, M)
    axis.legend(fontsize=8, ncols=2)
    figure.set_label(
        "Share of wrong actions on twin tasks: reduced layers stay at one half, the best full layers at one quarter, and many "
        "steps fall to 0 with the prompt length."
    )
    return figure
