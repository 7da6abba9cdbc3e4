"""Does training with small steps follow the ordinary differential equation of gradient flow?

The full layer, with all of W_KQ and W_PV free, starts at the initialization of [ZFB] (U = s Theta Theta', u = s, v = z = 0)
and takes steps of stochastic gradient descent on fresh Gaussian tasks. It is compared with the equation of
theory/lindm_theory/gradient_flow.py for U and u alone. A step of length r of the layer is the time r of the flow. The distance
between the two paths, over the whole path and in all blocks, must vanish with r: like r if the steps are too coarse, like
sqrt(r) if only the noise of the batches is left.

    lindm run gradient_flow --preset quick
    lindm verify --only gradient-flow

Expected: the paths agree. At the smallest step they differ by one or two percent of the length of the path, and v and z, which
the equation does not have, stay within the noise. The remaining difference is mostly in one direction: (c u, U / c) has the
same loss for every c, so no gradient restores c, and u^2 - ||U||_F^2, which the flow conserves, falls slowly. Noise of order r
/ batch lengthens the d^2 entries of U more than it lengthens u.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.icl.attention import FullAttention, query_columns
from lindm.icl.trainer import train
from lindm.problems.regression import covariance, draw_regression
from lindm.types import Prompt
from lindm_experiments.harness.config import check_counts
from lindm_experiments.harness.figures import (
    BLUE,
    BOUND,
    EXACT,
    GRAY,
    GREEN,
    INK,
    MARKERS,
    ORANGE,
    PURPLE,
    RED,
    SEED,
    SEQUENTIAL,
    legend_below,
    panel_grid,
    set_log_ticks,
)
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_theory import gradient_flow as flow
from lindm_theory.in_context import context_second_moment, optimal_weights
from lindm_theory.moments import gaussian_fourth

SUBSTEPS = 8  # Runge-Kutta steps in the longest step of the layer
DESCENT = optax.sgd(0.5)  # on a loss without the factor 1/2 of the papers: one step is one gradient of theirs


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 2011000
    d: int = 3
    kappa: float = 3.0
    N: int = 16
    scale: float = 0.3
    steps: int = 25  # steps between two comparisons of the layer with the flow
    looks: int = 8  # number of comparisons at the longest step; half the step has twice as many
    rates: tuple[float, ...] = (0.08, 0.04, 0.02, 0.01)  # lengths of a step, in the time of the flow
    batch: int = 128

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "d", "N", "steps", "looks", "batch")
        covariance(self.d, self.kappa)
        rates = np.array(self.rates)
        if len(rates) < 2 or not (rates > 0).all() or not np.allclose(rates[0] / rates, np.round(rates[0] / rates)):
            raise ValueError(f"rates must be at least two positive steps, each dividing the first; got {self.rates}")
        if not all(a > b for a, b in zip(self.rates, self.rates[1:], strict=False)):
            raise ValueError(f"rates must fall; got {self.rates}")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive; got {self.scale}")


QUICK = Config()
FULL = Config(seeds=10, rates=(0.08, 0.04, 0.02, 0.01, 0.005, 0.0025), batch=256)
SMOKE = Config(seeds=2, steps=5, looks=2, rates=(0.08, 0.04), batch=8)


def problem(cfg: Config) -> tuple[Array, Array, Array]:
    """Lambda, B = E[S S'] and A_N of the Gaussian law with Psi = I, [d, d] each."""
    Lambda, Psi = covariance(cfg.d, cfg.kappa), jnp.eye(cfg.d)
    K = gaussian_fourth(Lambda, Psi)
    return Lambda, context_second_moment(Lambda, Psi, K, cfg.N), optimal_weights(Lambda, Psi, K, cfg.N)


def start(cfg: Config) -> FullAttention:
    """The layer at its start, in single precision; one Theta for all seeds, so that all follow one curve."""
    return FullAttention(cfg.d, rngs=nnx.Rngs(0), scale=cfg.scale)


def draw(key: Array, root: Array, rate: Array, context: Array, tasks: Array) -> tuple[Prompt, Array]:
    """`len(tasks)` fresh prompts of `len(context)` pairs.

    The loss is `rate` times the squared error over queries of the law: the length of a step is a number in the data, and every
    length runs the same compiled program.
    """
    query = jnp.sqrt(rate) * query_columns(root @ root.T)

    def one(k: Array) -> tuple[Prompt, Array]:
        prompt, _, w = draw_regression(k, root, jnp.eye(len(root), dtype=root.dtype), len(context), 1)
        return Prompt(x=prompt.x, y=prompt.y, query=query), query @ w

    return jax.vmap(one)(jax.random.split(key, len(tasks)))


def blocks(layer: FullAttention) -> np.ndarray:
    """(U, u, v, z) of a layer of depth one as one vector [d^2 + 1 + 2 d]."""
    return np.concatenate([np.asarray(a, float).ravel() for a in (layer.U, layer.u, layer.v, layer.z)])


def layer_path(cfg: Config, key: Array, rate: float) -> np.ndarray:
    """What training goes through: [looks + 1, d^2 + 1 + 2 d], the start included, one look every steps * rate in time."""
    root = jnp.linalg.cholesky(covariance(cfg.d, cfg.kappa)).astype(jnp.float32)
    # only the sizes of the last two matter
    data = (root, jnp.float32(rate), jnp.zeros(cfg.N, jnp.float32), jnp.zeros(cfg.batch, jnp.float32))
    layer = start(cfg)
    path = [blocks(layer)]
    for k in range(round(cfg.looks * cfg.rates[0] / rate)):
        layer, _ = train(layer, draw, jax.random.fold_in(key, k), steps=cfg.steps, data=data, average=0.0, optimizer=DESCENT)
        path.append(blocks(layer))
    return np.array(path)


@partial(jax.jit, static_argnames="steps")
def flow_path(U: Array, u: Array, B: Array, Lambda: Array, step: Array, steps: int) -> Array:
    """The equation from the same start: [steps + 1, d^2 + 1]."""
    path_U, path_u = flow.integrate(U, u, B, Lambda, Lambda, step=step, steps=steps)
    return jnp.concatenate([path_U.reshape(steps + 1, -1), path_u[:, None]], axis=1)


def measure(cfg: Config, point: dict) -> dict:
    key = jax.random.key(cfg.base_seed + point["seed"])
    d2 = cfg.d**2
    Lambda, B, A = problem(cfg)
    begin = blocks(start(cfg))
    # a common grid of times on which every measurement of every rate lies
    finest = SUBSTEPS * cfg.steps  # points between two looks at the first rate
    step = cfg.rates[0] / SUBSTEPS
    fine = np.asarray(flow_path(jnp.asarray(begin[:d2].reshape(cfg.d, cfg.d)), begin[d2], B, Lambda, step, cfg.looks * finest))
    way = float(np.linalg.norm(np.diff(fine, axis=0), axis=1).sum())
    times = step * np.arange(len(fine))
    U, u = flow.limit(A)
    end = np.append(np.asarray(U).ravel(), float(u))
    runs = []
    for rate in cfg.rates:
        path = layer_path(cfg, jax.random.fold_in(key, round(1e6 * rate)), rate)
        at = rate * cfg.steps * np.arange(len(path))
        exact = np.stack([np.interp(at, times, column) for column in fine.T], axis=1)
        off = path - np.pad(exact, ((0, 0), (0, 2 * cfg.d)))
        runs.append(
            {
                "rate": rate,
                "time": at.tolist(),
                "path": path.tolist(),
                "distance": (np.linalg.norm(off, axis=1) / way).tolist(),
                "leak": (np.linalg.norm(path[:, d2 + 1 :], axis=1) / way).tolist(),
                "invariant": (path[:, d2] ** 2 - np.sum(path[:, :d2] ** 2, axis=1)).tolist(),
            }
        )
    shown = slice(None, None, max(1, len(fine) // 100))
    return {
        "d": cfg.d,
        "way": way,
        "runs": runs,
        "flow": {"time": times[shown].tolist(), "path": fine[shown].tolist()},
        "left": float(np.linalg.norm(fine[-1] - end) / np.linalg.norm(end)),
    }


def _largest(records: list[dict], name: str) -> np.ndarray:
    """The largest distance or leak on the way: [seeds, rates]."""
    return np.array([[max(run[name]) for run in r["runs"]] for r in records])


def check(records: list[dict]) -> list[Verdict]:
    distance, leak = _largest(records, "distance"), _largest(records, "leak")
    rates = [run["rate"] for run in records[0]["runs"]]
    apart = ", ".join(f"{v:.2%} at {r:g}" for r, v in zip(rates, distance.mean(0), strict=True))
    last = [r["runs"][-1] for r in records]
    lost = np.mean([run["invariant"][-1] / r["flow"]["path"][-1][-1] ** 2 for run, r in zip(last, records, strict=True)])
    note = (
        f"by length of step: {apart}; v and z up to {leak[:, -1].max():.2%}; u^2 - ||U||^2, kept at zero by "
        f"the flow and lowered by noise: {lost:+.2%} of u^2 at the end; the flow is {records[0]['left']:.1%} from its limit"
    )
    return [mean_verdict("gradient-flow", distance[:, -1], figure="paths", note=note)]


def plot(records: list[dict]) -> dict[str, Figure]:
    d = records[0]["d"]
    flow_ = records[0]["flow"]
    names = [f"U{i + 1}{j + 1}" for i in range(d) for j in range(d)] + ["u"]
    diagonal = [i for i, n in enumerate(names) if n == "u" or n[1] == n[2]][-4:]
    looks = dict(zip(diagonal, zip((BLUE, RED, GREEN, ORANGE), MARKERS, strict=False), strict=False))
    beside = [i for i, n in enumerate(names) if n != "u" and n[1] < n[2]][:3]
    figure, (left, middle, right) = panel_grid(3, 4.2)
    curve = np.array(flow_["path"])
    for i in (*diagonal, *beside):
        color, marker = looks.get(i, (PURPLE, "v"))
        left.plot(flow_["time"], curve[:, i], color=color, **EXACT)
        for r in records:
            run = r["runs"][-1]
            every = max(1, len(run["time"]) // 16)
            path = np.array(run["path"])[::every, i]
            left.plot(run["time"][::every], path, linestyle="none", marker=marker, color=color, markersize=3.5, alpha=0.6)
        if i in diagonal or i == beside[0]:
            left.plot([], [], color=color, marker=marker, label=names[i] if i in diagonal else "U off the diagonal")
    for r in records:
        run = r["runs"][-1]
        left.plot(run["time"], np.array(run["path"])[:, d * d + 1 :], color=GRAY, **SEED)
    left.plot([], [], color=GRAY, label="v, z", **SEED)
    left.set(
        xlabel="time of the flow",
        ylabel="parameter",
        title=f"Layer (points, step {records[0]['runs'][-1]['rate']:g}), flow (lines)",
    )
    legend_below(left, ncols=3)
    shades = pyplot.get_cmap(SEQUENTIAL)(np.linspace(0, 0.85, len(records[0]["runs"])))
    for k, run in enumerate(records[0]["runs"]):
        for r in records:
            middle.plot(r["runs"][k]["time"], r["runs"][k]["distance"], color=shades[k], **SEED)
        mean = np.mean([r["runs"][k]["distance"] for r in records], axis=0)
        middle.plot(run["time"], mean, color=shades[k], marker="", label=f"step {run['rate']:g}")
    middle.set(xlabel="time of the flow", ylabel="distance / length of the way", title="Layer and flow apart", ylim=(0, None))
    legend_below(middle, ncols=2)
    rates = np.array([run["rate"] for run in records[0]["runs"]])
    distance, leak = _largest(records, "distance"), _largest(records, "leak")
    for values, color, marker, label in (
        (distance, INK, "o", "largest distance"),
        (leak, GRAY, "s", "of it v and z"),
    ):
        for row in values:
            right.plot(rates, row, linestyle="none", marker=marker, color=color, markersize=4.5, alpha=0.6)
        right.plot([], [], linestyle="none", marker=marker, color=color, label=label)
    right.plot(rates, distance[:, 0].mean() * rates / rates[0], color=INK, label="slope 1", **BOUND)
    right.plot(rates, distance[:, 0].mean() * (rates / rates[0]) ** 0.5, color=INK, marker="", linestyle=":", label="slope 1/2")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="length of a step",
        ylabel="distance / length of the way",
        title="It vanishes with the step",
    )
    set_log_ticks(right, rates)
    legend_below(right, ncols=2)
    figure.set_label(
        "Above left: the parameters of the trained layer (points) move along the gradient flow (lines); entries off the "
        "diagonal and the blocks v and z stay near 0. Above right: the distance between layer and flow grows with the time "
        "and with the length of a step. Below: the largest distance falls with the step."
    )
    return {"paths": figure}
