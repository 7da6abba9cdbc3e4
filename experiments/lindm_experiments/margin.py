"""Does the loss of the policy fall exponentially in the context length M where there is an action gap, and how without one?

Tasks come from small simplex families, one feature map for each seed. `gap` keeps, of many tasks, those whose smallest action
gap is largest, and a layer trained on other tasks at a length N at which the bias flips none of their actions. The bounds of
rung 2 and below, including eq. (6), can only promise M^-1/2 for them. The log-log slope distinguishes an exponential from a
power of M: that of M^-p is the same at every length, that of an exponential grows with M. The statistic is therefore the slope
over the longest lengths divided by the slope over the lengths where the decay begins. `no gap` keeps every task and removes
the bias (A = Lambda^-1, the limit N = infinity): gaps near zero then have a positive density f(0), and the law is 1/M with the
constant f(0) s^2/4, summed over states and stages. `floor` keeps the tasks that the bias flips at a small N: no context
removes their loss.

    lindm run margin
    lindm verify --only margin

Expected: with a gap the slope more than doubles; without one it is -1, with the predicted constant; the flipped tasks stay at
the loss of the bias. No task is used both for training and for a loss.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.icl.label_laws import oracle_labels
from lindm.problems.linear_mdp import MDPFamily, second_moment, simplex_family, tabulate
from lindm.solvers.dp import occupancy, policy_value
from lindm.solvers.ties import greedy
from lindm_experiments.harness.config import check_counts, check_multiples, check_rising
from lindm_experiments.harness.figures import (
    BLUE,
    BOUND,
    EXACT,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SEED,
    WIDTH,
    legend_below,
    set_log_ticks,
)
from lindm_experiments.harness.statistics import slopes
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_experiments.lib import attained, attained_margin, linear_mdps
from lindm_theory import margin as margins
from lindm_theory import mean_policy, policy_bounds
from lindm_theory.in_context import risk

ENOUGH = 20  # losses seen at a length, for its mean to be known to about a quarter
START, LENGTHS = 0.5, 3  # see `_steepening`
APART = 0.6  # distance of the features of two actions: where they coincide, no task has an action gap
RATE = 0.04  # `gap` keeps the tasks whose exponent is nearest to this: their losses are seen over a range of lengths
NEAR = 0.1  # gaps below this, of a range of about 2, give the density of gaps at zero


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 10
    base_seed: int = 209000
    pool: int = 2048  # number of training tasks
    candidates: int = 32768  # number of tasks drawn, from which `floor` chooses
    gap_tasks: int = 1024  # how many of the first candidates `gap` chooses from
    free_tasks: int = 32768  # how many of the first candidates `no gap` uses
    chosen: int = 16
    contexts: int = 2048  # number of contexts for every chosen task
    N: int = 64
    N_small: int = 4
    M: tuple[int, ...] = (12, 16, 24, 32, 48, 64, 96, 128)
    M_free: tuple[int, ...] = (512, 1024, 2048, 4096)  # lengths for `no gap`: the law of small gaps needs long contexts
    steps: int = 800

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "pool", "candidates", "chosen", "contexts", "N", "N_small", "steps")
        check_multiples(self, linear_mdps.BLOCK, "pool")
        for name in ("gap_tasks", "free_tasks"):
            if not self.chosen <= (value := getattr(self, name)) <= self.candidates:
                raise ValueError(f"{name} must be between chosen = {self.chosen} and candidates = {self.candidates}; got {value}")
        check_rising(self, "M", "M_free", length=2)


QUICK = Config()
FULL = Config(
    seeds=10,
    pool=8192,
    candidates=131072,
    gap_tasks=8192,
    free_tasks=131072,
    contexts=8192,
    M=(12, 16, 24, 32, 48, 64, 96, 128, 192),
    M_free=(512, 1024, 2048, 4096, 8192),
    steps=2000,
)
SMOKE = Config(
    seeds=2, pool=1024, candidates=1024, gap_tasks=256, free_tasks=256, contexts=16, M=(8, 16), M_free=(16, 32), steps=20
)


@jax.jit
def draw_family(key: Array) -> MDPFamily:
    """The first of 64 random simplex feature maps whose two actions are at least APART from each other in every state."""
    draw = partial(simplex_family, S=3, A=2, d=3, H=2, feature_power=6.0, power=2.0, low=-1.0, high=1.0)
    families = jax.vmap(draw)(jax.random.split(key, 64))
    distance = jnp.linalg.norm(families.phi[:, :, 0] - families.phi[:, :, 1], axis=-1).min(-1)
    return jax.tree.map(lambda x: x[jnp.argmax(distance >= APART)], families)


@jax.jit
def exponents(family: MDPFamily, A: Array, tasks) -> Array:
    """The exponent of E SubOpt in M for each task: the least Cramer rate of a wrong action; 0 where the bias flips one."""

    def one(task) -> Array:
        _, plan, w = task
        rate = -jnp.log(mean_policy.chernoff_flip_probability(family.phi, A, w, family.design, 1))
        worse = plan.V[..., None] > plan.Q
        return jnp.min(jnp.where(worse, rate.max(-1), jnp.inf))

    return jax.vmap(one)(tasks)


@partial(jax.jit, static_argnames="tasks")
def draw_tasks(key: Array, family: MDPFamily, tasks: int):
    """So many solved tasks, as MDPs: (MDP, Plan, w), each with a leading axis."""

    def one(k: Array):
        task, plan, w = linear_mdps.draw_oracle(k, family)
        return tabulate(task), plan, w

    return jax.vmap(one)(jax.random.split(key, tasks))


@jax.jit
def losses_of_counts(family: MDPFamily, A: Array, tasks, counts: Array) -> Array:
    """Exact suboptimality [tasks, contexts, lengths] of the layer on contexts that show the pairs as often as counts
    [tasks, contexts, lengths, H, pairs] says, with oracle labels: S = (1/M) sum_i n_i <x_i, w> x_i."""
    table = linear_mdps.pairs_table(family)

    def one(task_and_counts) -> Array:
        (mdp, plan, w), counts = task_and_counts
        labeled = oracle_labels(jnp.broadcast_to(table, (len(w), *table.shape)), w)[..., None] * table[None]  # y x [H, pairs, d]

        def context(n: Array) -> Array:
            S = jnp.einsum("hn,hnd->hd", n / n.sum(-1, keepdims=True), labeled)
            value = policy_value(mdp, greedy(linear_mdps.action_values(family, A, S)))
            return mdp.rho @ (plan.V[0] - value[0])

        return jax.vmap(jax.vmap(context))(counts)

    return jax.lax.map(one, (tasks, counts), batch_size=max(1, 512 // counts.shape[1]))


def losses(rng: np.random.Generator, family: MDPFamily, A: Array, tasks, contexts: int, lengths: tuple[int, ...]) -> Array:
    """The same on independent contexts of i.i.d. pairs, the first M of each for every length M."""
    pieces = np.diff([0, *lengths])[:, None]  # of one context, the same for every stage
    drawn = rng.multinomial(pieces, np.asarray(family.design), size=(len(tasks[2]), contexts, len(lengths), len(A)))
    return losses_of_counts(family, A, tasks, np.cumsum(drawn, axis=2).astype(float))


@jax.jit
def no_gap_constant(family: MDPFamily, A: Array, tasks, width: Array) -> Array:
    """lim M E SubOpt without bias, for two actions: f(0) s^2/4, summed over stages and states with the optimal policy's visits.

    f is the density of the gap at zero, from the gaps below `width`, s^2 the variance of one pair's part of the difference.
    """

    def one(task) -> Array:
        mdp, plan, w = task
        variance = mean_policy.difference_moments(family.phi, A, w, family.design)[1][..., 0, 1]
        visits = occupancy(mdp, jnp.argmax(plan.Q, axis=-1))
        near = jnp.abs(plan.Q[..., 0] - plan.Q[..., 1]) < width
        return jnp.sum(margins.no_gap_law(near / width, jnp.sqrt(variance), 1.0) * visits)

    return jax.vmap(one)(tasks).mean()


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
def margin_bounds(family: MDPFamily, A: Array, tasks, M: Array) -> Array:
    """Mean over tasks of Theorem 5's bound H (A - 1) max(gap) exp(-r M), r the least Bernstein exponent; M [m] -> [m]."""

    def one(task) -> Array:
        _, plan, w = task
        gap = plan.V[..., None] - plan.Q
        moments = mean_policy.difference_moments(family.phi, A, w, family.design)
        H, _, actions = gap.shape
        return H * (actions - 1) * gap.max() * jnp.exp(-mean_policy.decay_exponent(gap, *moments) * M)

    return jax.vmap(one)(tasks).mean(0)


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
    k_family, k_pool, k_tasks, k_train, k_test = jax.random.split(key, 5)
    family = draw_family(k_family)
    pool, tasks = linear_mdps.task_pool(k_pool, family, tasks=cfg.pool), draw_tasks(k_tasks, family, cfg.candidates)
    train = partial(linear_mdps.trained_layers, steps=cfg.steps, learning_rate=0.3, batch=128)
    A = train(k_train, family, pool, cfg.N, 0.0)
    A_small = train(k_train, family, pool, cfg.N_small, 0.0)
    limit = jnp.broadcast_to(jnp.linalg.inv(second_moment(family)), A.shape)

    def pick(order: Array):
        return jax.tree.map(lambda x: x[order[: cfg.chosen]], tasks)

    rates = exponents(family, A, jax.tree.map(lambda x: x[: cfg.gap_tasks], tasks))
    gap = pick(jnp.argsort(jnp.abs(rates - RATE)))
    # flipped, and clearly so in every state: a margin near zero would need contexts of any length to settle
    _, small = floor_and_margins(family, A_small, tasks)
    flipped = pick(jnp.argsort(jnp.where((small < 0).any((1, 2)), -jnp.abs(small).min((1, 2)), 1.0)))
    some = jax.tree.map(lambda x: x[: cfg.free_tasks], tasks)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(k_test)))
    loss = losses(rng, family, A, gap, contexts=cfg.contexts, lengths=cfg.M)
    Psi = linear_mdps.pool_moment(jnp.moveaxis(gap[2], 1, 0))
    far = (*cfg.M_free, 16 * cfg.M_free[-1])  # a flip by a small margin needs long contexts to show
    rungs = [bounds(family, A, Psi, gap, jnp.asarray(float(M))) for M in cfg.M]
    seed = cfg.base_seed + point["seed"]
    return {
        "instances": seed,
        "attained": attained_margin.pairs(seed),
        "M": list(cfg.M),
        "M_free": list(cfg.M_free),
        "M_floor": list(far),
        "seen": (loss > 1e-9).sum((0, 1)),
        "N": cfg.N,
        "N_small": cfg.N_small,
        "curves": {
            "gap": loss.mean((0, 1)),
            "no gap": losses(rng, family, limit, some, contexts=1, lengths=cfg.M_free).mean((0, 1)),
            "floor": losses(rng, family, A_small, flipped, contexts=64, lengths=far).mean((0, 1)),
            "mean policy": [float(tail) for tail, _ in rungs],
            "rung 4": [float(moments) for _, moments in rungs],
            "theorem 5": margin_bounds(family, A, gap, jnp.asarray(cfg.M, float)),
        },
        "smallest_gap": jax.vmap(policy_bounds.strict_gap)(gap[1].Q).min(),
        "exponent": exponents(family, A, gap).mean(),
        "no_gap_constant": no_gap_constant(family, limit, some, jnp.asarray(NEAR)),
        "floor_predicted": floor_and_margins(family, A_small, flipped)[0].mean(),
    }


def _visible(record: dict) -> list[int]:
    """Indices of the lengths at which the decay has begun (the loss is below START of its first value) and is still seen."""
    loss = np.array(record["curves"]["gap"])
    begun = int(np.argmax(loss < START * loss[0])) or len(loss)
    return [i for i, n in enumerate(record["seen"]) if n >= ENOUGH and i >= begun]


def _steepening(record: dict) -> float:
    """Log-log slope of the gap curve over its longest lengths over that where its decay begins: 1 for every power of M."""
    M, loss, seen = np.array(record["M"], float), np.array(record["curves"]["gap"]), _visible(record)
    if len(seen) < 2 * LENGTHS - 1:
        return 0.0  # nothing to fit: no evidence of an exponential
    early, late = seen[:LENGTHS], seen[-LENGTHS:]
    return float(slopes(M[late], loss[late])[0] / slopes(M[early], loss[early])[0])


def check(records: list[dict]) -> list[Verdict]:
    steep = [_steepening(r) for r in records]
    free = [float(slopes(r["M_free"], r["curves"]["no gap"])[0]) for r in records]
    scaled = [np.multiply(r["M_free"], r["curves"]["no gap"])[-2:].mean() for r in records]
    constant = [y / r["no_gap_constant"] for y, r in zip(scaled, records, strict=True)]
    stays = [r["curves"]["floor"][-1] / r["floor_predicted"] for r in records]
    slack = [np.divide(r["curves"]["mean policy"], r["curves"]["gap"])[_visible(r)] for r in records]
    note = f"smallest gap {min(r['smallest_gap'] for r in records):.2f}; slack: mean-policy bound / loss"
    return [
        mean_verdict("margin", steep, figure="margin", note=note, slack=np.concatenate(slack) if any(map(len, slack)) else None),
        mean_verdict(
            "margin/exponent",
            *attained.ratios(records, *attained_margin.BOUNDS),
            also=[attained.none_below(records, *attained_margin.BOUNDS)],
            slack=np.concatenate(attained.ratios(records, *attained_margin.BOUNDS)),
        ),
        mean_verdict("margin/floor", stays, figure="margin"),
        mean_verdict("margin/no-gap", free, figure="margin"),
        mean_verdict("margin/no-gap-constant", constant, figure="margin"),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    first = records[0]
    M, free = first["M"], first["M_free"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(WIDTH, 4.6))

    def draw(axis, x, name, color, label, marker="o") -> np.ndarray:
        curves = np.array([r["curves"][name] for r in records])
        for curve in curves:
            axis.plot(x, np.where(curve > 1e-9, curve, np.nan), color=color, **SEED)
        mean = curves.mean(0)
        axis.plot(x, np.where(mean > 1e-9, mean, np.nan), color=color, label=label, **EXACT | {"marker": marker})
        return mean

    draw(left, M, "gap", BLUE, "measured, tasks with a gap")
    for name, color, label in (
        ("mean policy", GREEN, "mean-policy bound"),
        ("theorem 5", PURPLE, "one exponent for all states (Theorem 5)"),
        ("rung 4", GRAY, "rung 4, the bound on averages"),
    ):
        left.plot(M, np.mean([r["curves"][name] for r in records], 0), color=color, label=label, **BOUND)
    left.set(
        yscale="log", xlabel="pairs in the test prompt M", ylabel="suboptimality", title="With an action gap: exponential in M"
    )
    legend_below(left)
    draw(right, free, "no gap", BLUE, "measured, all tasks, no bias")
    law = np.mean([r["no_gap_constant"] for r in records]) / np.array(free)
    right.plot(free, law, color=ORANGE, label="f(0) s²/(4M), summed over states", **BOUND)
    right.plot(free, law[0] * (free[0] / np.array(free)) ** 0.5, color=INK, label="slope -1/2", linestyle=":", marker="")
    draw(right, first["M_floor"], "floor", RED, f"measured, tasks that the bias flips at N = {first['N_small']}", "s")
    right.axhline(np.mean([r["floor_predicted"] for r in records]), color=RED, linestyle=":", label="bias alone, exact")
    right.set(yscale="log", xlabel="pairs in the test prompt M", title="Gaps down to zero: 1/M; flipped action: a floor")
    set_log_ticks(right, first["M_floor"])
    legend_below(right)
    figure.set_label(
        "Left: with an action gap the measured suboptimality falls exponentially with M, below three bounds. Right: without a "
        "gap it falls as 1/M on the predicted line; on tasks whose best action the bias flips it stays at a floor."
    )
    return {"margin": figure}
