"""What does the layer predict for an action that the prompt does not contain?

With one-hot features and labels without noise, S_i = (n_i/M) Q_i, where n_i counts the pair i. The paper's layer (Psi = I) is
diagonal and has Qhat = 0 where n_i = 0: an unseen action beats every seen one if values are negative, and none if they are
positive. Whether it is picked depends on counts and signs alone, so the rate is exact: 0, 1, and for centered values a sum
over the counts. (In the last stage of centered tasks, where signs are fair coins, it is E 2^-k with k the number of seen
actions.) The counts also give the law of the action. Contexts of different stages are independent, so this gives the *exact*
expected loss (`lindm_theory.mean_policy`).

The three families differ by a constant added to every reward, which changes no decision of an optimal policy and every
decision of the layer. Does training on the uncentered tasks remove the effect? The design is uniform and the tasks are
exchangeable, so A_N = alpha I + beta 11', and the unseen action is imputed beta 1'S, a shrunken mean. But beta 1'S is added to
*every* action: the policy is that of the diagonal layer, and the rate stays 1. Centering the labels by their prior mean does
help.

    lindm run onehot_coverage --preset quick
    lindm verify --only onehot-coverage

Expected: rates of 0 and 1 to the last decision, and the exact curve between; centered labels lose less than raw ones of either
sign.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from math import lgamma

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from lindm.icl.attention import ReducedAttention
from lindm.icl.label_laws import oracle_labels
from lindm.icl.prompts import draw_pairs
from lindm.icl.trainer import train_many
from lindm.problems.linear_mdp import MDPFamily, onehot_family, tabulate
from lindm.solvers.dp import policy_value
from lindm.solvers.rollout import cumulative
from lindm.solvers.ties import greedy
from lindm.types import Prompt
from lindm_experiments.harness.config import check_counts, check_rising
from lindm_experiments.harness.figures import (
    BLUE,
    EXACT,
    GRAY,
    GREEN,
    MEASURED,
    PURPLE,
    RED,
    legend_below,
    panel_grid,
    set_log_ticks,
)
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_experiments.lib import linear_mdps
from lindm_theory.mean_policy import policy_loss

SHIFTS = {"positive": (0.0, 1.0), "negative": (-1.0, 0.0), "centered": (-0.5, 0.5)}  # reward ranges: one family, shifted
CENTERED_LABELS = "labels minus prior mean"
S, A, H = 4, 3, 3
NEGLIGIBLE = 1e-10  # counts less likely than this are left out of the enumeration; `lost_mass` says what that leaves out


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 2022000
    tasks: int = 64
    contexts: int = 48  # number of contexts of every task; each shows every stage once
    M: tuple[int, ...] = (6, 12, 24, 48)
    N: int = 16
    pool: int = 2048  # number of training tasks
    steps: int = 500

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "tasks", "contexts", "N", "pool", "steps")
        check_rising(self, "M")


QUICK = Config()
FULL = Config(seeds=10, tasks=96, contexts=96, M=(3, 6, 12, 24, 48), pool=8192, steps=2000)
SMOKE = Config(seeds=2, tasks=8, contexts=8, M=(4, 8), pool=256, steps=100)


@partial(jax.jit, static_argnames=("tests", "pool", "contexts", "longest"))
def draw_test_tasks(key: Array, family: MDPFamily, tests: int, pool: int, contexts: int, longest: int):
    """Test tasks (MDP, Plan, w [tests, H, d]), pairs [tests, contexts, H, longest], and training vectors [H, pool, d]."""
    k_tasks, k_pairs = jax.random.split(key)
    task, plan, w = jax.vmap(lambda k: linear_mdps.draw_oracle(k, family))(jax.random.split(k_tasks, tests + pool))
    mdp, plan = jax.tree.map(lambda leaf: leaf[:tests], (jax.vmap(tabulate)(task), plan))
    pairs = draw_pairs(k_pairs, cumulative(family.design), (tests, contexts, w.shape[1], longest))
    return (mdp, plan, w[:tests], pairs), jnp.moveaxis(w[tests:], 1, 0)


@jax.jit
def policies(family: MDPFamily, tests, layers: Array, center: Array, M: Array) -> tuple[Array, Array, Array]:
    """The policies of n layers [n, H, d, d] on labels y - center, center [n, H].

    Returns loss [tasks, n, m], the mean over contexts; actions [tasks, contexts, n, m, H, S]; and which pairs were seen
    [tasks, contexts, m, H, S, A]. A constant added to all of Qhat changes no action, so centered labels need nothing added back.
    """

    def one(test) -> tuple[Array, Array, Array]:
        mdp, plan, w, pairs = test

        def context(idx: Array) -> tuple[Array, Array, Array]:
            x = linear_mdps.pairs_table(family)[idx]
            used = (jnp.arange(x.shape[1])[None] < M[:, None]) / M[:, None]
            share = jnp.einsum("mi,hid->mhd", used, x)  # n_i / M
            S_M = jnp.einsum("mi,hi,hid->mhd", used, oracle_labels(x, w), x)[None] - center[:, None, :, None] * share[None]
            pihat = greedy(jnp.einsum("sai,nhij,nmhj->nmhsa", family.phi, layers, S_M))
            value = jax.vmap(lambda pi: mdp.rho @ policy_value(mdp, pi)[0])(pihat.reshape(-1, *plan.pi.shape))
            loss = (mdp.rho @ plan.V[0] - value).reshape(pihat.shape[:2])
            return loss, pihat, jnp.einsum("sad,mhd->mhsa", family.phi, share) > 0

        loss, pihat, seen = jax.vmap(context)(pairs)
        return loss.mean(0), pihat, seen

    return jax.lax.map(one, tests)


@lru_cache
def _draw(n: int, batch: int):
    """The draw of a training batch; the same object on every call, so that nothing compiles twice.

    Every pair is a query once: with a uniform design that is the expectation over queries, without its noise.
    """

    def draw(key: Array, family: MDPFamily, pool: Array):
        which, pairs = jax.random.split(key)
        w = pool[jax.random.randint(which, (batch,), 0, pool.shape[0])]
        table = linear_mdps.pairs_table(family)
        x = table[draw_pairs(pairs, cumulative(family.design), (batch, n))]
        query = jnp.broadcast_to(table, (batch, *table.shape))
        return Prompt(x=x, y=oracle_labels(x, w), query=query), oracle_labels(query, w)

    return draw


def trained(key: Array, family: MDPFamily, pools: np.ndarray, N: int, steps: int) -> Array:
    """One layer [runs, d, d] for each pool of task vectors [runs, tasks, d], trained in float32."""
    runs, _, d = pools.shape
    family, pools = linear_mdps.single_precision((family, jnp.asarray(pools)))
    stacked = jax.tree.map(lambda x: np.broadcast_to(x, (runs, *x.shape)), family)
    layers, _ = train_many(
        ReducedAttention(d), _draw(N, 256), jax.random.split(key, runs), steps=steps, data=(stacked, pools), learning_rate=0.1
    )
    return layers.A[...][:, 0].astype(float)


# --- exact, from the counts alone ----------------------------------------------------------------------------------------


@lru_cache
def action_counts(M: int) -> tuple[np.ndarray, np.ndarray]:
    """How often the A actions of one state are drawn among M pairs of a uniform design: counts [k, A], probabilities [k]."""
    grid = np.stack(np.meshgrid(*[np.arange(min(M, 40) + 1)] * A, indexing="ij"), -1).reshape(-1, A)
    rows = grid[grid.sum(1) <= M]
    rest = M - rows.sum(1)
    logs = np.array([lgamma(n + 1) for n in range(M + 1)])
    p = np.exp(logs[M] - logs[rows].sum(1) - logs[rest] - rows.sum(1) * np.log(S * A) + rest * np.log(1 - 1 / S))
    return rows[p > NEGLIGIBLE], p[p > NEGLIGIBLE]


def exact_actions(Q: np.ndarray, M: int) -> tuple[np.ndarray, float]:
    """The law pibar [..., A] of argmax_a n_a Q_a (lowest index among ties), Q [..., A], and the rate of picking an unseen action
    where some action of the state was seen and some was not, over all leading axes."""
    counts, p = action_counts(M)
    value = counts * Q[..., None, :]
    pick = np.argmax(value >= value.max(-1, keepdims=True) - 1e-9, -1)
    law = np.stack([((pick == a) * p).sum(-1) for a in range(A)], -1)
    mixed = p * ((counts > 0).any(1) & (counts == 0).any(1))
    unseen = np.take_along_axis(np.broadcast_to(counts == 0, value.shape), pick[..., None], -1)[..., 0]
    return law / p.sum(), float((unseen * mixed).sum(-1).mean() / mixed.sum())


def sign_law(M: int) -> float:
    """The rate E[2^-k | mixed] of picking an unseen action when the signs of k seen ones are fair coins."""
    counts, p = action_counts(M)
    k = (counts > 0).sum(1)
    mixed = (k > 0) & (k < A)
    return float((p * 0.5**k)[mixed].sum() / p[mixed].sum())


exact_loss = jax.jit(jax.vmap(policy_loss, (0, 0, None, 0)))


def exact(tests, center: np.ndarray, cfg: Config) -> tuple[list[float], list[float]]:
    """Rate of picking unseen actions and mean loss over the tasks, for every M, from the counts."""
    mdp, plan, _, _ = tests
    rates, losses = [], []
    for M in cfg.M:
        law, rate = exact_actions(np.asarray(plan.Q) - center[None, :, None, None], M)
        rates.append(rate)
        losses.append(float(exact_loss(mdp.P, plan.V[..., None] - plan.Q, mdp.rho[0], law).mean()))
    return rates, losses


# --- the experiment ----------------------------------------------------------------------------------------------------


def unseen_rate(actions: np.ndarray, seen: np.ndarray) -> list[float]:
    """For every M: among states with seen and unseen actions, how often an unseen one is picked.
    actions [tasks, contexts, m, H, S], seen [tasks, contexts, m, H, S, A]."""
    picked = np.take_along_axis(seen, actions[..., None], -1)[..., 0]
    mixed = seen.any(-1) & ~seen.all(-1)
    return ((~picked & mixed).sum((0, 1, 3, 4)) / mixed.sum((0, 1, 3, 4))).tolist()


def measure(cfg: Config, point: dict) -> dict:
    key = jax.random.key(cfg.base_seed + point["seed"])
    k_tests, k_train = jax.random.split(key)
    families = {name: onehot_family(S, A, H, low=low, high=high) for name, (low, high) in SHIFTS.items()}
    # the same key for all three: the same kernels, contexts and reward ranks
    drawn = {n: draw_test_tasks(k_tests, f, cfg.tasks, cfg.pool, cfg.contexts, cfg.M[-1]) for n, f in families.items()}
    d = S * A
    rng = np.random.default_rng([cfg.base_seed, point["seed"]])
    gaussian = rng.standard_normal((cfg.pool, d))
    # whitened: a pool whose Psi is I exactly, or its sampling error would stay in the weights however long the training
    gaussian = gaussian @ np.linalg.inv(np.linalg.cholesky(gaussian.T @ gaussian / cfg.pool)).T
    pools = np.concatenate([gaussian[None], drawn["negative"][1]])
    Ahat = np.asarray(trained(k_train, families["centered"], pools, cfg.N, cfg.steps))
    plain, real = np.broadcast_to(Ahat[0], (H, d, d)), Ahat[1:]  # trained on w ~ N(0, I), as in the paper, and on real tasks
    diagonal = np.broadcast_to(np.eye(d), (H, d, d))  # any A_N of Psi = I, up to a factor
    on = np.trace(real, axis1=1, axis2=2) / d
    beta = (real.sum((1, 2)) - d * on) / (d * (d - 1))
    symmetric = (on - beta)[:, None, None] * np.eye(d)[None] + beta[:, None, None]  # alpha I + beta 11': what training tends to
    by_family = {}
    # centered labels are the same numbers in all three families
    rate_centered, expected_centered = exact(drawn["centered"][0], np.asarray(drawn["centered"][1]).mean((1, 2)), cfg)
    for name, family in families.items():
        tests, pool = drawn[name]
        prior = np.asarray(pool).mean((1, 2))
        zero = np.zeros(H)
        layers = jnp.asarray(np.stack([diagonal, plain, real, symmetric, diagonal]))
        center = jnp.asarray(np.stack([zero, zero, zero, zero, prior]))
        loss, actions, seen = (np.asarray(a) for a in policies(family, tests, layers, center, jnp.asarray(cfg.M, float)))
        rate, expected = exact(tests, zero, cfg)
        last = actions[..., 0, :, -1:, :], seen[..., -1:, :, :]
        by_family[name] = {
            "rate": {
                "diagonal": unseen_rate(actions[:, :, 0], seen),
                "trained": unseen_rate(actions[:, :, 1], seen),
                "real": unseen_rate(actions[:, :, 2], seen),
                CENTERED_LABELS: unseen_rate(actions[:, :, 4], seen),
                "last stage": unseen_rate(*last),
            },
            "rate_exact": {"raw": rate, CENTERED_LABELS: rate_centered},
            "loss": {
                "diagonal": loss[:, 0].mean(0).tolist(),
                "trained": loss[:, 1].mean(0).tolist(),
                "real": loss[:, 2].mean(0).tolist(),
                CENTERED_LABELS: loss[:, 4].mean(0).tolist(),
            },
            "loss_exact": {"raw": expected, CENTERED_LABELS: expected_centered},
            "imputed_differs": int((actions[:, :, 3] != actions[:, :, 0]).sum()),
            "decisions": int(actions[:, :, 0].size),
        }
    return {
        "M": list(cfg.M),
        "problems": by_family,
        "alpha_beta": [(on - beta).tolist(), beta.tolist()],  # of the layer trained on negative tasks, for every stage
        "off_diagonal": float(np.abs(Ahat[0] - np.diag(np.diag(Ahat[0]))).max() / np.diag(Ahat[0]).mean()),
        "sign_law": [sign_law(M) for M in cfg.M],
        "lost_mass": float(1 - action_counts(cfg.M[-1])[1].sum()),
    }


def _mean(record: dict, family: str, *path: str) -> float:
    value = record["problems"][family]
    for step in path:
        value = value[step]
    return float(np.mean(value))


def check(records: list[dict]) -> list[Verdict]:
    off = [[_mean(r, n, "rate", "trained") - _mean(r, n, "rate_exact", "raw") for r in records] for n in SHIFTS]
    coin = np.mean([r["problems"]["centered"]["rate"]["last stage"] for r in records])
    raw = [[_mean(r, n, "loss", "diagonal") / _mean(r, n, "loss_exact", "raw") for r in records] for n in SHIFTS]
    fixed = [[_mean(r, n, "loss", CENTERED_LABELS) / _mean(r, n, "loss_exact", CENTERED_LABELS) for r in records] for n in SHIFTS]
    law = np.mean([r["sign_law"] for r in records])
    differ = sum(r["problems"][n]["imputed_differs"] for r in records for n in SHIFTS)
    total = sum(r["problems"][n]["decisions"] for r in records for n in SHIFTS)
    rates = {n: np.mean([_mean(r, n, "rate", "trained") for r in records]) for n in SHIFTS}
    gain = [
        [_mean(r, name, "loss", CENTERED_LABELS) / _mean(r, name, "loss", "diagonal") for r in records]
        for name in ("positive", "negative")
    ]
    note = ", ".join(f"{n} {v:.3g}" for n, v in rates.items())
    return [
        mean_verdict(
            "onehot-coverage",
            *off,
            figure="unseen",
            note=f"rates: {note}; last stage, centered {coin:.3f}, E 2^-k = {law:.3f}",
        ),
        mean_verdict("onehot-coverage/loss", *raw, *fixed, figure="unseen"),
        mean_verdict(
            "onehot-coverage/imputation",
            [_mean(r, "negative", "rate", "real") for r in records],
            figure="unseen",
            note=f"alpha I + beta 11' and alpha I differ in {differ} of {total} actions",
        ),
        mean_verdict("onehot-coverage/centering", *gain, figure="unseen"),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    M = np.array(records[0]["M"])
    figure, (left, right) = panel_grid(2, 4.8)
    color = dict(zip(SHIFTS, (RED, BLUE, GREEN), strict=True))

    def draw(axis, name: str, kind: str, measured: str, predicted: str, color: str, label: str, marker: str) -> None:
        cells = [r["problems"][name] for r in records]
        for c in cells:
            axis.plot(M, c[kind][measured], **(MEASURED | {"marker": marker}), color=color, alpha=0.5)
        mean = np.mean([c[f"{kind}_exact"][predicted] for c in cells], 0)
        axis.plot(M, mean, **EXACT, color=color)
        axis.plot([], [], **EXACT | {"marker": marker}, color=color, label=label)

    for name in SHIFTS:
        low, high = SHIFTS[name]
        box = f"rewards in [{low:g}, {high:g}]"
        draw(left, name, "rate", "trained", "raw", color[name], box, "o")
        draw(right, name, "loss", "diagonal", "raw", color[name], box, "o")
    for r in records:
        left.plot(
            M, r["problems"]["negative"]["rate"]["real"], linestyle="none", marker="s", mfc="none", color=GRAY, markersize=8
        )
        left.plot(M, r["problems"]["negative"]["rate"][CENTERED_LABELS], **MEASURED, color=PURPLE, alpha=0.5)
    left.plot([], [], linestyle="none", marker="s", mfc="none", color=GRAY, markersize=8, label="[-1, 0], trained on these tasks")
    exact_centered = np.mean([r["problems"]["negative"]["rate_exact"][CENTERED_LABELS] for r in records], 0)
    left.plot(M, exact_centered, **EXACT, color=PURPLE)
    draw(right, "negative", "loss", CENTERED_LABELS, CENTERED_LABELS, PURPLE, f"any of them, {CENTERED_LABELS}", "o")
    left.plot([], [], **EXACT | {"marker": "o"}, color=PURPLE, label=f"[-1, 0], {CENTERED_LABELS}")
    left.set(xscale="log", ylim=(-0.04, 1.04), xlabel="pairs in the test prompt M", ylabel="share of decisions")
    left.set_title("An unseen action is picked (some seen, some not)")
    right.set(xscale="log", yscale="log", xlabel="pairs in the test prompt M", ylabel="suboptimality")
    right.set_title("What it costs: the same MDPs, shifted rewards")
    for axis in (left, right):
        set_log_ticks(axis, M)
        legend_below(axis, title="points: measured, every seed; lines: exact", title_fontsize=8)
    figure.set_label(
        "Left: the share of decisions that pick an unseen action is 1 where rewards are negative and 0 where they are "
        "positive, and falls with M where labels are centered. Right: the suboptimality falls with M, fastest with centered "
        "labels."
    )
    return {"unseen": figure}
