"""Are layers of linear attention steps of temporal-difference learning, and does training find them? Can they take a maximum?

A context has transitions (x, r, x') of one policy in one linear MDP; the layer predicts action values. With hand-set weights,
L layers are L steps of batch TD(0) (`lindm_theory.temporal_difference`) up to rounding. A looped layer (one block at every
depth) is then trained on the true action values of many tasks, with three structures in one program: all weights free; TD,
where only its matrix C is trained; and TD with two matrices, one for the predicted values and one for the values from which it
bootstraps. Their predictions are compared, because weights are not identified.

Optimal values need a maximum over actions. Reduced linear attention of any depth is linear in the rewards, so its risk on Q*
has an exactly known floor: the part of Q* that is even in the rewards. Least-squares value iteration, by ridge regression,
takes the maximum between its iterations and goes below the floor.

    lindm run in_context_td --preset quick      about 12 s on 2 cores
    lindm verify --only in-context-td

Expected: hand-set weights are TD to 1e-12. Training finds TD with one layer; with more layers it finds something better, about
as good as TD with two matrices. No trained layer is below the floor; value iteration is.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from matplotlib.figure import Figure

from lindm.icl.attention import FullAttention, ReducedAttention, query_columns
from lindm.icl.prompts import td_prompt
from lindm.icl.trainer import train
from lindm.problems.linear_mdp import MDPFamily, draw_task, second_moment, simplex_family, with_second_moment
from lindm.solvers.rollout import cumulative, invert
from lindm.types import Prompt
from lindm_experiments.harness.config import check_at_least, check_counts, check_positive, check_rising
from lindm_experiments.harness.figures import (
    BLUE,
    BOUND,
    GRAY,
    GREEN,
    PURPLE,
    RED,
    legend_below,
    panel_grid,
    plot_seeds,
    set_log_ticks,
)
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_experiments.lib import linear_mdps
from lindm_theory import temporal_difference as td

D, STATES, ACTIONS = 4, 8, 3
STRUCTURES = ("free", "td", "two")
BACKUPS = 200  # of value iteration: gamma^200 is below rounding
SWEEPS = 30  # of least-squares value iteration on a context


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 10
    base_seed: int = 4201000
    depths: tuple[int, ...] = (1, 2, 4)
    N: int = 32  # transitions in a context
    gamma: float = 0.8
    pool: int = 2048  # number of training tasks
    tasks: int = 2048  # number of test tasks, one context each
    steps: int = 500
    batch: int = 32
    learning_rate: float = 0.08

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "N", "pool", "tasks", "steps", "batch")
        check_rising(self, "depths", length=2)
        check_positive(self, "learning_rate")
        check_at_least(self, 0, "gamma")
        if self.gamma > 0.9:
            raise ValueError(f"gamma must be at most 0.9, for {BACKUPS} backups to converge; got {self.gamma}")


QUICK = Config()
FULL = Config(seeds=20, depths=(1, 2, 3, 4, 6), pool=8192, tasks=8192, steps=2000, batch=64, learning_rate=0.05)
SMOKE = Config(seeds=2, depths=(1, 2), pool=64, tasks=64, steps=10, batch=8)


class LoopedAttention(nnx.Module):
    """One block at `depth` layers: w <- w + B (S - G w), B = left A right, of at most `layers` layers in one compiled program.

    left, right and the layers in use are variables, not parameters, so that all structures and depths share the program.
    """

    def __init__(self, A: Array, left: Array, right: Array, depth: int, layers: int):
        self.A = nnx.Param(A)
        self.left, self.right = nnx.Variable(left), nnx.Variable(right)
        self.used = nnx.Variable((jnp.arange(layers) < depth).astype(A.dtype))

    def block(self) -> Array:
        """B [2d, 2d]."""
        return self.left[...] @ self.A[...] @ self.right[...]

    def __call__(self, prompt: Prompt) -> Array:
        """yhat[Q] of one prompt."""
        n, B = len(prompt.y), self.block()
        S, G = prompt.x.T @ prompt.y / n, prompt.x.T @ prompt.x / n

        def layer(w: Array, used: Array) -> tuple[Array, None]:
            return w + used * (B @ (S - G @ w)), None

        return prompt.query @ jax.lax.scan(layer, jnp.zeros_like(S), self.used[...])[0]


def structure(name: str) -> tuple[np.ndarray, np.ndarray]:
    """left, right [2d, 2d] with left A right = A (free), [[C, 0], [-C, 0]] (td) or [[C, 0], [-E, 0]] (two), blocks of A."""
    eye, zero = np.eye(D, dtype=np.float32), np.zeros((D, D), np.float32)
    whole, first = np.eye(2 * D, dtype=np.float32), np.block([[eye, zero], [zero, zero]])
    return {"free": (whole, whole), "td": (np.block([[eye, zero], [-eye, zero]]), first), "two": (whole, first)}[name]


@partial(jax.jit, static_argnames=("tasks",))
def draw_tasks(key: Array, family: MDPFamily, gamma: Array, tasks: int) -> dict[str, Array]:
    """Discounted tasks: kernel sums over next states, theta, w of the uniform policy, of Q* and of Q* with negated rewards."""
    phi = family.phi

    def one(k: Array) -> dict[str, Array]:
        task = draw_task(k, family)
        mu, theta = task.mu[0], task.theta[0]
        uniform = mu @ phi.mean(1)  # [d, d]: expected next features of the uniform policy

        def backup(w: Array, reward: Array) -> Array:
            return reward + gamma * mu @ jnp.max(phi @ w, axis=-1)

        def optimal(reward: Array) -> Array:
            return jax.lax.fori_loop(0, BACKUPS, lambda _, w: backup(w, reward), jnp.zeros_like(reward))

        return {
            "cdf": cumulative(jnp.einsum("sad,dt->sat", phi, mu).reshape(-1, phi.shape[0])),
            "theta": theta,
            "policy": jnp.linalg.solve(jnp.eye(D, dtype=phi.dtype) - gamma * uniform, theta),
            "optimal": optimal(theta),
            "negated": optimal(-theta),
        }

    return jax.vmap(one)(jax.random.split(key, tasks))


@partial(jax.jit, static_argnames="N")
def draw_transitions(key: Array, family: MDPFamily, tasks: dict[str, Array], N: int) -> tuple[Array, Array, Array, Array]:
    """x [B, N, d], next actions' features [B, N, A, d], the one taken x' [B, N, d], and r [B, N]: uniform pairs and actions."""
    x_all = linear_mdps.pairs_table(family)
    u = jax.random.uniform(key, (3, len(tasks["theta"]), N), x_all.dtype)
    pair = (u[0] * len(x_all)).astype(jnp.int32)
    state = jax.vmap(lambda cdf, i, u: invert(cdf[i], u))(tasks["cdf"], pair, u[1])
    following = family.phi[state]
    action = (u[2] * family.phi.shape[1]).astype(jnp.int32)
    x_next = jnp.take_along_axis(following, action[..., None, None], axis=2)[:, :, 0]
    return x_all[pair], following, x_next, jnp.einsum("bnd,bd->bn", x_all[pair], tasks["theta"])


@partial(jax.jit, static_argnames="N")
def prompts(key: Array, family: MDPFamily, tasks: dict[str, Array], gamma: Array, N: int) -> Prompt:
    """One context of N transitions for each task; the law of the queries enters exactly, by d columns."""
    x, _, x_next, r = draw_transitions(key, family, tasks, N)
    columns = query_columns(second_moment(family))
    return td_prompt(x, x_next, r, jnp.broadcast_to(columns, (len(r), *columns.shape)), gamma)


def draw_training(
    key: Array, family: MDPFamily, pool: dict[str, Array], target: Array, gamma: Array, sizes: tuple[Array, Array]
) -> tuple[Prompt, Array]:
    """A batch of prompts with the targets q'w, w [pool, d] the rows of `target`."""
    batch, N = (len(size) for size in sizes)
    which, k = jax.random.split(key)
    index = jax.random.randint(which, (batch,), 0, len(target))
    prompt = prompts(k, family, jax.tree.map(lambda a: a[index], pool), gamma, N)
    return prompt, jnp.einsum("bqd,bd->bq", prompt.query[..., :D], target[index])


def trained(key: Array, cfg: Config, family: MDPFamily, pool: dict[str, Array], target: Array, name: str, depth: int) -> Array:
    """The block [2d, 2d] of a looped layer of one structure, trained in float32."""
    start, k = jax.random.split(key)
    A = 0.05 * jax.random.normal(start, (2 * D, 2 * D), jnp.float32)
    layer = LoopedAttention(A, *structure(name), depth, cfg.depths[-1])
    sizes = (np.zeros(cfg.batch, np.float32), np.zeros(cfg.N, np.float32))
    data = linear_mdps.single_precision((family, pool, target, jnp.asarray(cfg.gamma)))
    layer, _ = train(layer, draw_training, k, steps=cfg.steps, data=(*data, sizes), learning_rate=cfg.learning_rate, clip=1.0)
    return layer.block().astype(target.dtype)


@partial(jax.jit, static_argnames=("layers",))
def predictions(block: Array, prompt: Prompt, depth: Array, layers: int) -> Array:
    """yhat [tasks, d] of a block [2d, 2d] applied `depth` times."""
    layer = LoopedAttention(block, jnp.eye(2 * D), jnp.eye(2 * D), 0, layers)
    layer.used[...] = (jnp.arange(layers) < depth).astype(block.dtype)
    return jax.vmap(layer)(prompt)


@jax.jit
def value_iteration(x: Array, following: Array, r: Array, gamma: Array, prior: Array) -> Array:
    """w [B, d] of least-squares value iteration on each context: SWEEPS ridge regressions on r + gamma max_a phi(s', a)'w.

    The maximum is clipped to the range of values, abs(r) <= 1: without it some contexts diverge.
    """
    largest = 1 / (1 - gamma)

    def context(x: Array, following: Array, r: Array) -> Array:
        inverse = jnp.linalg.inv(x.T @ x + prior)

        def sweep(_: int, w: Array) -> Array:
            following_value = jnp.clip(jnp.max(following @ w, axis=-1), -largest, largest)
            return inverse @ (x.T @ (r + gamma * following_value))

        return jax.lax.fori_loop(0, SWEEPS, sweep, jnp.zeros(D))

    return jax.vmap(context)(x, following, r)


@jax.jit
def _hand_set(x: Array, x_next: Array, r: Array, q: Array, C: Array) -> Array:
    """Largest differences [2] between batch TD(0) and the hand-set reduced and full layers, relative."""
    wanted = q @ td.batch_td(C, *td.td_statistics(x, x_next, r, 0.9))[-1]
    prompt, depth, d = td_prompt(x, x_next, r, q, 0.9), len(C), x.shape[1]
    full = FullAttention(2 * d, depth, dtype=C.dtype)
    full.W_PV[...], full.W_KQ[...] = td.td_attention(C)
    layers = (ReducedAttention(2 * d, depth, A=td.td_blocks(C)), full)
    return jnp.stack([jnp.max(jnp.abs(layer(prompt) - wanted)) for layer in layers]) / jnp.max(jnp.abs(wanted))


def hand_set_error(seed: int) -> float:
    """The largest difference between batch TD(0) and the hand-set layers of depth 1 and 5, relative, on random transitions."""
    rng = np.random.default_rng(seed)
    x, x_next, r, q = rng.normal(size=(20, 3)), rng.normal(size=(20, 3)), rng.normal(size=20), rng.normal(size=(5, 3))
    return max(float(_hand_set(x, x_next, r, q, 0.2 * rng.normal(size=(k, 3, 3))).max()) for k in (1, 5))


def measure(cfg: Config, point: dict) -> dict:
    keys = jax.random.split(jax.random.key(cfg.base_seed + point["seed"]), 5)
    base = simplex_family(keys[0], STATES, ACTIONS, D, 1, feature_power=3.0, low=-1.0, high=1.0)
    family = with_second_moment(base, np.eye(D))
    gamma = jnp.asarray(cfg.gamma)
    pool, test = draw_tasks(keys[1], family, gamma, tasks=cfg.pool), draw_tasks(keys[2], family, gamma, tasks=cfg.tasks)
    prompt = prompts(keys[3], family, test, gamma, cfg.N)
    columns, layers = prompt.query[0, :, :D], cfg.depths[-1]
    target = test["policy"] @ columns.T

    def risk(yhat: Array, wanted: Array) -> float:
        return float(jnp.mean((yhat - wanted) ** 2) / jnp.mean(wanted**2))

    def predicted(name: str, weights: Array, depth: int) -> Array:
        block = trained(keys[4], cfg, family, pool, weights, name, depth)
        return predictions(block, prompt, jnp.asarray(depth), layers)

    yhat = {name: [predicted(name, pool["policy"], depth) for depth in cfg.depths] for name in STRUCTURES}
    # the maximum: targets Q* minus their mean over tasks
    mean = pool["optimal"].mean(0, keepdims=True)
    wanted = (test["optimal"] - mean) @ columns.T
    scale = float(jnp.mean(wanted**2))
    even = td.odd_floor(test["optimal"] @ columns.T, test["negated"] @ columns.T, jnp.full(D, 1 / D), mean @ columns.T)
    uncentered = td.odd_floor(test["optimal"] @ columns.T, test["negated"] @ columns.T, jnp.full(D, 1 / D))
    linear = [predicted("free", pool["optimal"] - mean, depth) for depth in cfg.depths]
    x, following, _, r = draw_transitions(keys[3], family, test, cfg.N)
    iterated = value_iteration(x, following, r, gamma, 0.1 * jnp.eye(D)) - mean
    return {
        "depths": list(cfg.depths),
        "hand-set": hand_set_error(cfg.base_seed + point["seed"]),
        "risk": {name: [risk(y, target) for y in yhat[name]] for name in STRUCTURES},
        "distance": {name: [risk(y, z) for y, z in zip(yhat[name], yhat["free"], strict=True)] for name in STRUCTURES[1:]},
        "optimal": [risk(y, wanted) for y in linear],
        "floor": float(even) / scale,
        "wrong floors": {"uncentered": float(uncentered) / scale, "not negated": 1.0},
        "value iteration": risk(iterated @ columns.T, wanted),
    }


def check(records: list[dict]) -> list[Verdict]:
    deepest = records[0]["depths"][-1]
    at = f"at depth {deepest}"
    slack = np.mean([np.array(r["optimal"]) / r["floor"] for r in records], axis=0)

    def each(value) -> list[float]:
        return [value(r) for r in records]

    def share(name: str, layer: int) -> list[float]:
        return [r["distance"][name][layer] / r["risk"][name][layer] for r in records]

    def ratio(name: str) -> list[float]:
        return [r["risk"]["free"][-1] / r["risk"][name][-1] for r in records]

    return [
        mean_verdict("in-context-td", each(lambda r: r["hand-set"]), figure="in-context-td"),
        mean_verdict("in-context-td/one-layer", share("td", 0), figure="in-context-td"),
        mean_verdict("in-context-td/deeper", share("td", -1), figure="in-context-td", note=at),
        mean_verdict("in-context-td/better", ratio("td"), figure="in-context-td", note=at),
        mean_verdict("in-context-td/two-matrices", ratio("two"), figure="in-context-td", note=at),
        mean_verdict(
            "in-context-td/maximum",
            *(each(lambda r, i=i: r["optimal"][i] / r["floor"]) for i in range(len(slack))),
            figure="in-context-td",
            note="risk/floor by depth: " + ", ".join(f"{x:.3g}" for x in slack),
            slack=[x / r["floor"] for r in records for x in r["optimal"]],
        ),
        mean_verdict("in-context-td/attained", each(lambda r: r["optimal"][-1] / r["floor"]), figure="in-context-td", note=at),
        mean_verdict("in-context-td/value-iteration", each(lambda r: r["value iteration"] / r["floor"]), figure="in-context-td"),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    depths = np.array(records[0]["depths"])
    figure, (left, right) = panel_grid(2, 4.6)
    kinds = (
        ("td", BLUE, "o", "TD, its matrix trained"),
        ("two", GREEN, "D", "TD with two matrices, trained"),
        ("free", RED, "s", "all weights trained"),
    )
    for name, color, marker, label in kinds:
        curves = np.array([r["risk"][name] for r in records])
        plot_seeds(left, depths, curves, color)
        left.plot(depths, curves.mean(0), color=color, marker=marker, label=label)
    for name, color, _, label in kinds[:2]:
        curves = np.array([r["distance"][name] for r in records])
        label = f"difference of {label.split(',')[0]} and all weights trained"
        left.plot(depths, curves.mean(0), color=color, marker="", linestyle=":", label=label)
    left.set(yscale="log", xlabel="layers", ylabel="mean square / that of the values", title="Values of a policy")
    curves = np.array([np.array(r["optimal"]) / r["floor"] for r in records])
    plot_seeds(right, depths, curves, RED)
    right.plot(depths, curves.mean(0), color=RED, marker="s", label="linear attention, all weights trained")
    iterated = [r["value iteration"] / r["floor"] for r in records]
    right.axhline(1.0, color=GRAY, label="floor of every layer linear in the rewards", **BOUND)
    right.axhline(np.mean(iterated), color=PURPLE, label="least-squares value iteration", **BOUND)
    right.set(ylim=(0, None), xlabel="layers", ylabel="risk / floor", title="Optimal values: the maximum")
    for axis in (left, right):
        set_log_ticks(axis, depths)
        legend_below(axis)
    figure.set_label(
        "Left: the error of a policy's values falls with the layers, alike for TD with two matrices and for all weights "
        "trained; dotted, their differences are much smaller. Right: for optimal values the risk falls toward the floor of "
        "every layer that is linear in the rewards and stays above it; least-squares value iteration is below."
    )
    return {"in-context-td": figure}
