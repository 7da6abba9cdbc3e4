"""Does the loss of the policy fall exponentially in the context length M where there is an action gap, and how without one?

Tasks come from a small simplex family. `gap` keeps the tasks whose smallest action gap is largest, and a layer trained at a
length N at which the bias flips none of their actions; the bounds of rung 2 and below, eq. (6) included, can only promise
M^-1/2 for them. `no gap` keeps every task and removes the bias (A = Lambda^-1, the limit N = infinity): gaps near zero then have
a positive density and the law is 1/M. `floor` keeps the tasks that the bias flips at a small N: no context removes their loss.

    lindm run margin --preset quick
    lindm verify --only margin

Expected: with a gap the slope keeps falling (below -2), without one it is -1, and the flipped tasks stay at the loss of the bias.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.problems.linear_mdp import MDPFamily, second_moment, simplex_family, tabulate
from lindm.solvers.dp import policy_value
from lindm.solvers.ties import greedy
from lindm_experiments.harness.config import check_counts, check_rising
from lindm_experiments.harness.figures import BLUE, BOUND, EXACT, GRAY, GREEN, RED, SEED, set_log_ticks
from lindm_experiments.harness.statistics import slopes
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_experiments.lib import linear_mdps
from lindm_theory import margin as margins
from lindm_theory import mean_policy, policy_bounds
from lindm_theory.in_context import risk

ENOUGH = 20  # losses seen at a length, for its mean to be known to about a quarter


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 209000
    candidates: int = 8192  # tasks drawn, from which `gap` and `floor` choose
    chosen: int = 16
    free_tasks: int = 8192  # `no gap`
    contexts: int = 1024  # for every chosen task and M
    N: int = 64
    N_small: int = 4
    M: tuple[int, ...] = (8, 12, 16, 24, 32, 48, 64, 96, 128)
    M_free: tuple[int, ...] = (512, 1024, 2048)  # `no gap`: the law of small gaps needs long contexts
    steps: int = 800

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "candidates", "chosen", "contexts", "N", "N_small", "steps")
        if self.candidates % linear_mdps.BLOCK or self.candidates < self.chosen:
            raise ValueError(f"candidates must be a multiple of {linear_mdps.BLOCK}, at least chosen; got {self.candidates}")
        if not 1 <= self.free_tasks <= self.candidates:
            raise ValueError(f"free_tasks must be between 1 and candidates = {self.candidates}; got {self.free_tasks}")
        check_rising(self, "M", "M_free", length=2)


QUICK = Config()
FULL = Config(
    seeds=10,
    candidates=32768,
    free_tasks=16384,
    contexts=2048,
    M=(8, 12, 16, 24, 32, 48, 64, 96, 128, 192),
    M_free=(512, 1024, 2048, 4096),
    steps=2000,
)
SMOKE = Config(seeds=2, candidates=1024, free_tasks=256, contexts=16, M=(8, 16), M_free=(16, 32), steps=20)


@partial(jax.jit, static_argnames="tasks")
def draw_tasks(key: Array, family: MDPFamily, tasks: int):
    """So many solved tasks, as MDPs: (MDP, Plan, w), each with a leading axis."""

    def one(k: Array):
        task, plan, w = linear_mdps.draw_oracle(k, family)
        return tabulate(task), plan, w

    return jax.vmap(one)(jax.random.split(key, tasks))


@partial(jax.jit, static_argnames=("contexts", "longest"))
def losses(key: Array, family: MDPFamily, A: Array, tasks, M: Array, contexts: int, longest: int) -> Array:
    """Exact suboptimality [tasks, contexts] on independent contexts of M oracle-labeled pairs."""

    def one(task_and_key) -> Array:
        (mdp, plan, w), k = task_and_key

        def context(q: Array) -> Array:
            S = linear_mdps.context_sums(q, family, w, M, longest=longest)
            value = policy_value(mdp, greedy(linear_mdps.action_values(family, A, S)))
            return mdp.rho @ (plan.V[0] - value[0])

        return jax.lax.map(context, jax.random.split(k, contexts), batch_size=min(contexts, 64))

    return jax.lax.map(one, (tasks, jax.random.split(key, len(tasks[2]))))


@jax.jit
def floor_and_margins(family: MDPFamily, A: Array, tasks) -> tuple[Array, Array]:
    """What the bias alone costs each task (M = infinity), [tasks], and its margins [tasks, H, S], negative where it flips."""

    def one(task) -> tuple[Array, Array]:
        mdp, plan, w = task
        values = margins.infinite_context_values(family.phi, A, second_moment(family), w)
        loss = mdp.rho @ (plan.V[0] - policy_value(mdp, greedy(values))[0])
        return loss, margins.bias_margin(values, plan.Q)

    return jax.vmap(one)(tasks)


@jax.jit
def bounds(family: MDPFamily, A: Array, Psi: Array, tasks, M: Array) -> tuple[Array, Array]:
    """Mean over tasks of the mean-policy rung (exponential in M), and rung 4 (M^-1/2)."""

    def one(task) -> Array:
        mdp, plan, w = task
        moments = mean_policy.difference_moments(family.phi, A, w, family.design)
        caps = mean_policy.action_caps(mean_policy.flip_probability(*moments, M))
        return mean_policy.mean_policy_rung(mdp.P, plan.V[..., None] - plan.Q, mdp.rho, caps)

    Lambda = second_moment(family)
    parts = jax.vmap(lambda A, P, K: risk(A, Lambda, P, K, M, Lambda))(A, Psi, linear_mdps.fourth_moments(family, Psi))
    L = policy_bounds.feature_norm(family.phi, Lambda)
    return jax.vmap(one)(tasks).mean(), policy_bounds.expected_rung(L, parts.estimation, parts.bias)


def measure(cfg: Config, point: dict) -> dict:
    key = jax.random.key(cfg.base_seed + point["seed"])
    k_tasks, k_train, k_test = jax.random.split(key, 3)
    # one feature map for all seeds: slopes of different families at the same M are not samples of one number
    family = simplex_family(jax.random.key(0), 3, 2, 3, 2, feature_power=6.0, power=2.0, low=-1.0, high=1.0)
    tasks = draw_tasks(k_tasks, family, cfg.candidates)
    pool = jnp.moveaxis(tasks[2], 1, 0)
    Psi = linear_mdps.pool_moment(pool)
    train = partial(linear_mdps.trained_layers, steps=cfg.steps, learning_rate=0.3, batch=128)
    A = train(k_train, family, pool, cfg.N, 0.0)
    A_small = train(k_train, family, pool, cfg.N_small, 0.0)
    limit = jnp.broadcast_to(jnp.linalg.inv(second_moment(family)), A.shape)

    def pick(order: Array):
        return jax.tree.map(lambda x: x[order[: cfg.chosen]], tasks)

    smallest = jax.vmap(policy_bounds.strict_gap)(tasks[1].Q).min((1, 2))
    flips = (floor_and_margins(family, A, tasks)[1] <= 0).any((1, 2))
    # flipped tasks go last: the claim is about tasks that the bias leaves alone
    gap = pick(jnp.argsort(jnp.where(flips, 1.0, -smallest)))
    # flipped, and clearly so in every state: a margin near zero would need contexts of any length to settle
    _, small = floor_and_margins(family, A_small, tasks)
    flipped = pick(jnp.argsort(jnp.where((small < 0).any((1, 2)), -jnp.abs(small).min((1, 2)), 1.0)))
    some = jax.tree.map(lambda x: x[: cfg.free_tasks], tasks)
    curves: dict[str, list[float]] = {"gap": [], "floor": [], "no gap": [], "mean policy": [], "rung 4": []}
    seen: list[int] = []
    for M in cfg.M:
        k, length = jax.random.fold_in(k_test, M), jnp.asarray(float(M))
        loss = losses(k, family, A, gap, length, contexts=cfg.contexts, longest=cfg.M[-1])
        curves["gap"].append(float(loss.mean()))
        seen.append(int((loss > 1e-9).sum()))
        by_tail, by_moments = bounds(family, A, Psi, gap, length)
        curves["mean policy"].append(float(by_tail))
        curves["rung 4"].append(float(by_moments))
    for M in cfg.M_free:
        k = jax.random.fold_in(k_test, M)
        loss = partial(losses, k, family, M=jnp.asarray(float(M)), longest=cfg.M_free[-1])
        curves["no gap"].append(float(loss(limit, some, contexts=1).mean()))
        curves["floor"].append(float(loss(A_small, flipped, contexts=64).mean()))
    return {
        "M": list(cfg.M),
        "M_free": list(cfg.M_free),
        "seen": seen,
        "N": cfg.N,
        "N_small": cfg.N_small,
        "curves": curves,
        "smallest_gap": float(jax.vmap(policy_bounds.strict_gap)(gap[1].Q).min()),
        "flipped_share": float(flips.mean()),
        "floor_predicted": float(floor_and_margins(family, A_small, flipped)[0].mean()),
    }


def _last_slope(record: dict) -> float:
    """Log-log slope of the gap curve over the three longest contexts at which a loss was still seen in ENOUGH draws."""
    visible = [i for i, n in enumerate(record["seen"]) if n >= ENOUGH][-3:]
    if len(visible) < 3:
        return 0.0  # nothing to fit: no evidence of any decay
    return float(slopes([record["M"][i] for i in visible], [record["curves"]["gap"][i] for i in visible])[0])


def check(records: list[dict]) -> list[Verdict]:
    steep = [_last_slope(r) for r in records]
    free = [float(slopes(r["M_free"], r["curves"]["no gap"])[0]) for r in records]
    stays = [r["curves"]["floor"][-1] / r["floor_predicted"] for r in records]
    return [
        mean_verdict("margin", steep, figure="margin", note=f"smallest gap {min(r['smallest_gap'] for r in records):.2f}"),
        mean_verdict("margin/floor", stays, figure="margin"),
        mean_verdict("margin/no-gap", free, figure="margin"),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    first = records[0]
    M, free = first["M"], first["M_free"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 4.0))

    def draw(axis, x, name, color, label, marker="o") -> np.ndarray:
        curves = np.array([r["curves"][name] for r in records])
        for curve in curves:
            axis.plot(x, np.where(curve > 1e-9, curve, np.nan), color=color, **SEED)
        mean = curves.mean(0)
        axis.plot(x, np.where(mean > 1e-9, mean, np.nan), color=color, label=label, **EXACT | {"marker": marker})
        return mean

    draw(left, M, "gap", BLUE, "measured, tasks with a gap")
    for name, color, label in (("mean policy", GREEN, "mean-policy bound"), ("rung 4", GRAY, "rung 4, the bound on averages")):
        left.plot(M, np.mean([r["curves"][name] for r in records], 0), color=color, label=label, **BOUND)
    left.set(
        yscale="log", xlabel="pairs in the test prompt M", ylabel="suboptimality", title="With an action gap: exponential in M"
    )
    left.legend(fontsize=8, loc="lower left")
    mean = draw(right, free, "no gap", BLUE, "measured, all tasks, no bias")
    right.plot(free, mean[0] * free[0] / np.array(free), color=GRAY, label="slope -1", **BOUND)
    right.plot(free, mean[0] * (free[0] / np.array(free)) ** 0.5, color=GRAY, label="slope -1/2", linestyle=":", marker="")
    draw(right, free, "floor", RED, f"measured, tasks that the bias flips at N = {first['N_small']}", "s")
    right.axhline(np.mean([r["floor_predicted"] for r in records]), color=RED, linestyle=":", label="bias alone, exact")
    right.set(yscale="log", xlabel="pairs in the test prompt M", title="Gaps down to zero: 1/M; flipped action: a floor")
    set_log_ticks(right, free)
    right.legend(fontsize=8, loc="lower left")
    return {"margin": figure}
