"""What does training without oracle labels cost, and how does the cost grow with the horizon?

The layer computes its own targets: y = r + max_a Qhat_{h+1}(s', a), stage by stage from the end. This is in-context
least-squares value iteration. Let e_h = sup |T Qhat_{h+1} - Qhat_h|. Two theorems bound the loss: one carries every error
through all earlier stages, 2 sum_h sum_{h' >= h} e_{h'} (of order H^2 at equal e_h); [JYW]'s decomposition gives 2 sum_h e_h
(of order H). The first is not tight; the second is attained (`lib/attained_offline.py`). To show the order itself, the same
problems are also solved with an error of equal size at every stage, Qhat_h = T Qhat_{h+1} +- epsilon. The last H stages of one
long problem are a problem of horizon H, so one backward pass covers every horizon. A further comparison is pessimism:
estimates with an error below a known uncertainty, which is subtracted.

    lindm run bellman_horizon --preset quick
    lindm verify --only bellman-horizon

Expected: no bound is violated. At equal one-stage errors the loss grows like H. With bootstrapped labels the loss is close to
that with oracle labels, for every horizon, so the missing oracle does not cost a further factor H.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from lindm.icl.label_laws import bellman_labels, bellman_moments, noise_moment
from lindm.icl.prompts import draw_pairs
from lindm.problems.linear_mdp import MDPFamily, second_moment, simplex_family, tabulate
from lindm.random import flat
from lindm.solvers.dp import occupancy, policy_value
from lindm.solvers.rollout import cumulative
from lindm.solvers.ties import greedy
from lindm.validate import count
from lindm_experiments.harness.config import check_counts, check_positive
from lindm_experiments.harness.figures import BLUE, BOUND, EXACT, GRAY, GREEN, ORANGE, RED, legend_below, panel_grid, plot_seeds
from lindm_experiments.harness.statistics import slopes
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_experiments.lib import attained, attained_offline, linear_mdps
from lindm_theory import offline
from lindm_theory.in_context import optimal_weights
from lindm_theory.moments import design_fourth


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 2011000
    tasks: int = 4096  # number of tasks: half of them give the moments that determine the layers, half are tested
    M: int = 64  # pairs in every context, in training and test
    horizon: int = 16
    epsilon: float = 0.3  # size of the injected one-stage error; rewards are in [-1, 1]

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "M")
        check_counts(self, "horizon", least=4)
        check_positive(self, "epsilon")
        if count(self.tasks, "tasks", least=4) % 2:
            raise ValueError(f"tasks must be even (half for the moments, half for the test); got {self.tasks}")


QUICK = Config()
FULL = Config(seeds=10, tasks=8192, horizon=32)
SMOKE = Config(seeds=2, tasks=32, M=16, horizon=4)


@partial(jax.jit, static_argnames=("tasks", "M"))
def backward_pass(key: Array, family: MDPFamily, tasks: int, M: int):
    """In-context value iteration on many tasks at once: (MDPs, plans, Qhat bootstrapped, Qhat by oracle labels).

    Both Qhat [tasks, H, S, A] come from contexts at the same pairs. The layer of a stage is the best one for its own label law,
    whose moments are those of the first half of the tasks, exact over the design and the next state.
    """
    k_tasks, k_stages = jax.random.split(key)
    problems, plans, w = jax.vmap(lambda k: linear_mdps.draw_oracle(k, family))(jax.random.split(k_tasks, tasks))
    mdps = jax.vmap(tabulate)(problems)
    Lambda, table, cdf = second_moment(family), linear_mdps.pairs_table(family), cumulative(family.design)
    half = tasks // 2

    def layer(targets: Array, noise: Array) -> Array:
        Psi = jnp.einsum("ni,nj->ij", targets[:half], targets[:half]) / half
        return optimal_weights(Lambda, Psi, design_fourth(table, family.design, Psi), M, noise)

    def estimate(A: Array, idx: Array, y: Array) -> Array:
        S = jnp.einsum("nm,nmd->nd", y, table[idx]) / M
        return jnp.einsum("sai,ij,nj->nsa", family.phi, A, S)

    def stage(Q_next: Array, inputs):
        h, k = inputs
        k_pairs, k_labels = jax.random.split(k)
        idx = draw_pairs(k_pairs, cdf, (tasks, M))
        y = jax.vmap(bellman_labels, (0, 0, None, 0, 0))(jax.random.split(k_labels, tasks), mdps, h, idx, Q_next)
        targets = problems.theta[:, h] + jnp.einsum("nds,ns->nd", problems.mu[:, h], Q_next.max(-1))
        variance = jax.vmap(bellman_moments, (0, None, 0))(mdps, h, Q_next)[1]
        noise = noise_moment(family.phi, family.design, variance[:half].mean(0))
        Q = estimate(layer(targets, noise), idx, y)
        by_oracle = estimate(layer(w[:, h], jnp.zeros_like(noise)), idx, jnp.einsum("nmd,nd->nm", table[idx], w[:, h]))
        return Q, (Q, by_oracle)

    H = family.theta_low.shape[0]
    inputs = (jnp.arange(H), jax.random.split(k_stages, H))
    _, (Q, by_oracle) = jax.lax.scan(stage, jnp.zeros_like(plans.Q[:, 0]), inputs, reverse=True)
    return jax.tree.map(lambda x: x[half:], (mdps, plans, jnp.moveaxis(Q, 0, 1), jnp.moveaxis(by_oracle, 0, 1)))


@jax.jit
def injected_losses(key: Array, mdps, plans, epsilon: Array) -> Array:
    """Exact losses [tasks, H] by horizon of value iteration whose every backup is off by +-epsilon, signs at random."""

    def one(k: Array, mdp, plan) -> Array:
        def stage(V: Array, inputs):
            P, r, signs = inputs
            Q = r + P @ V + epsilon * signs
            return Q.max(-1), Q

        signs = flat(jax.random.rademacher, k, mdp.r.shape, mdp.r.dtype)
        _, Q = jax.lax.scan(stage, jnp.zeros_like(mdp.rho), (mdp.P, mdp.r, signs), reverse=True)
        return ((plan.V - policy_value(mdp, greedy(Q))) @ mdp.rho)[::-1]

    return jax.vmap(one)(jax.random.split(key, len(plans.V)), mdps, plans)


@jax.jit
def pessimistic_losses(key: Array, mdps, plans, epsilon: Array) -> tuple[Array, Array]:
    """Exact losses [tasks] of pessimistic value iteration, whose backups are off by at most an uncertainty, and their bounds.

    The uncertainty of every action is drawn from [0, epsilon], the error from +-uncertainty.
    """

    def one(k: Array, mdp, plan) -> tuple[Array, Array]:
        drawn = flat(jax.random.uniform, k, (2, *mdp.r.shape), mdp.r.dtype)
        uncertainty = epsilon * drawn[0]
        off = uncertainty * (2 * drawn[1] - 1) - uncertainty

        def stage(V: Array, inputs):
            P, r, off = inputs
            Q = r + P @ V + off
            return Q.max(-1), Q

        _, Q = jax.lax.scan(stage, jnp.zeros_like(mdp.rho), (mdp.P, mdp.r, off), reverse=True)
        loss = (plan.V - policy_value(mdp, greedy(Q)))[0] @ mdp.rho
        return loss, offline.pessimism_bound(occupancy(mdp, plan.pi), plan.pi, uncertainty)

    return jax.vmap(one)(jax.random.split(key, len(plans.V)), mdps, plans)


def _to_go(x: Array) -> Array:
    """[..., H] -> sums from each stage to the end, in the order of the horizon 1, 2, ..., H."""
    return jnp.cumsum(x[..., ::-1], axis=-1)


@jax.jit
def losses_and_bounds(mdps, plans, Q: Array, by_oracle: Array) -> dict[str, Array]:
    """For every test task and horizon 1..H, all [tasks, H]: exact loss of both policies, and the bounds on the first; and the
    decomposition of its loss at the full horizon, `identity` [tasks]."""

    def one(mdp, plan, Q: Array, by_oracle: Array) -> dict[str, Array]:
        def loss(q: Array) -> Array:
            return ((plan.V - policy_value(mdp, greedy(q))) @ mdp.rho)[::-1]

        residual = offline.bellman_residual(mdp.P, mdp.r, Q)
        pihat = greedy(Q)
        visits, own_visits = occupancy(mdp, plan.pi), occupancy(mdp, pihat)
        star, own, greed = offline.suboptimality_decomposition(residual, Q, visits, plan.pi, own_visits, pihat)
        e = jnp.abs(residual).max((1, 2))
        span = residual.max((1, 2)) - residual.min((1, 2))
        return {
            "bellman": loss(Q),
            "identity": star - own - greed,
            "oracle": loss(by_oracle),
            "error": _to_go(e) / jnp.arange(1, len(e) + 1),
            "span": _to_go(span),
            "linear": 2 * _to_go(e),
            "quadratic": jnp.stack([offline.quadratic_bound(e[len(e) - H :]) for H in range(1, len(e) + 1)]),
            "scale": jnp.maximum(1.0, jnp.abs(plan.V).max(-1))[::-1],
        }

    return jax.vmap(one)(mdps, plans, Q, by_oracle)


def measure(cfg: Config, point: dict) -> dict:
    seed = cfg.base_seed + point["seed"]
    key, k_family = jax.random.key(seed), linear_mdps.family_key(seed)
    family = simplex_family(k_family, 6, 3, 4, cfg.horizon, feature_power=3.0, power=2.0, low=-1.0, high=1.0)
    mdps, plans, Q, by_oracle = backward_pass(key, family, tasks=cfg.tasks, M=cfg.M)
    out = losses_and_bounds(mdps, plans, Q, by_oracle)
    out["injected"] = injected_losses(jax.random.fold_in(key, 1), mdps, plans, jnp.asarray(cfg.epsilon))
    pessimistic, covered = pessimistic_losses(jax.random.fold_in(key, 2), mdps, plans, jnp.asarray(cfg.epsilon))
    tolerance = 1e-9 * out["scale"]
    names = ("bellman", "oracle", "injected", "error", "span", "linear", "quadratic")
    return {
        "horizons": list(range(1, cfg.horizon + 1)),
        "mean": {name: out[name].mean(0) for name in names},
        "epsilon": cfg.epsilon,
        "n": len(out["bellman"]),
        # the horizons of one task are not independent of each other: a task counts once
        "violations": {
            name: int((out["bellman"] > out[name] + tolerance).any(1).sum()) for name in ("span", "linear", "quadratic")
        }
        | {"identity": int((jnp.abs(out["bellman"][:, -1] - out["identity"]) > tolerance[:, -1]).sum())},
        "pessimism": {
            "violations": int((pessimistic > covered + tolerance[:, -1]).sum()),
            "loss": float(pessimistic.mean()),
            "bound": float(covered.mean()),
        },
        "instances": seed,
        "attained": attained_offline.pairs(seed),
    }


def _price_slope(record: dict) -> float:
    """Log-log slope in H of the loss at equal one-stage errors, over the last two octaves of H."""
    H = np.array(record["horizons"])
    far = H[-1] // 4 <= H
    return float(slopes(H[far], np.array(record["mean"]["injected"])[far])[0])


def _oracle_slope(record: dict) -> float:
    """Log-log slope in H of the loss with bootstrapped labels over that with oracle labels, over the last two octaves of H."""
    H = np.array(record["horizons"])
    far = H[-1] // 4 <= H
    ratio = np.array(record["mean"]["bellman"]) / np.array(record["mean"]["oracle"])
    return float(slopes(H[far], ratio[far])[0])


def check(records: list[dict]) -> list[Verdict]:
    n = sum(r["n"] for r in records)
    broken = min(n, sum(sum(r["violations"].values()) for r in records))
    price = [_price_slope(r) for r in records]
    last = {k: np.mean([r["mean"][k][-1] for r in records]) for k in records[0]["mean"]}
    tight = ", ".join(f"{k} {last[k] / last['bellman']:.3g}" for k in ("span", "linear", "quadratic"))
    longest = records[0]["horizons"][-1]
    against = f"at H = {longest} {last['bellman'] / last['oracle']:.2g} times the loss with oracle labels"
    names = [k for k in attained_offline.BOUNDS if k != "pessimism"]
    slack = [r["mean"][k][-1] / r["mean"]["bellman"][-1] for r in records for k in ("span", "linear", "quadratic")]
    pessimism = [r["pessimism"] for r in records]
    shown = ", ".join(
        f"{k} {v.mean():.3g}"
        for k, v in zip(attained_offline.BOUNDS, attained.ratios(records, *attained_offline.BOUNDS), strict=True)
    )
    return [
        count_verdict(
            "bellman-horizon",
            broken,
            n,
            seeds=len(records),
            also=[attained.none_below(records, *names)],
            figure="horizon",
            note=f"bound/truth at H = {longest}: {tight}",
            slack=np.concatenate([*attained.ratios(records, *names), slack]),
        ),
        mean_verdict(
            "bellman-horizon/attained",
            *attained.ratios(records, *attained_offline.BOUNDS),
            also=[attained.none_below(records, *attained_offline.BOUNDS)],
            note=f"bound/truth: {shown}",
        ),
        count_verdict(
            "bellman-horizon/pessimism",
            sum(p["violations"] for p in pessimism),
            n,
            seeds=len(records),
            also=[attained.none_below(records, "pessimism")],
            slack=np.concatenate([*attained.ratios(records, "pessimism"), [p["bound"] / p["loss"] for p in pessimism]]),
        ),
        mean_verdict("bellman-horizon/linear", price, figure="horizon", note=against),
        mean_verdict("bellman-horizon/quadratic-price", [_oracle_slope(r) for r in records], figure="horizon"),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    H = np.array(records[0]["horizons"])
    figure, (left, right) = panel_grid(2, 4.6)
    for name, color, label in (("bellman", BLUE, "labels bootstrapped"), ("oracle", GREEN, "labels by the oracle")):
        curves = np.array([r["mean"][name] for r in records])
        plot_seeds(left, H, curves, color)
        left.plot(H, curves.mean(0), color=color, label=f"measured, {label}", **EXACT | {"marker": "o"})
    bounds = (
        ("span", ORANGE, r"$\sum_h$ span $l_h$"),
        ("linear", RED, r"$2\sum_h e_h$"),
        ("quadratic", GRAY, r"$2\sum_h\sum_{h'\geq h} e_{h'}$"),
    )
    for name, color, label in bounds:
        left.plot(H, np.mean([r["mean"][name] for r in records], 0), color=color, label=label, **BOUND)
    left.set(xscale="log", yscale="log", xlabel="horizon H", ylabel="loss of value", title="Loss and bounds without an oracle")
    legend_below(left)
    curves = np.array([r["mean"]["injected"] for r in records]) / records[0]["epsilon"]
    plot_seeds(right, H, curves, BLUE)
    mean = curves.mean(0)
    right.plot(H, mean, color=BLUE, label="measured", **EXACT | {"marker": "o"})
    for power, style in ((1, "--"), (2, ":")):
        right.plot(H, mean[-1] * (H / H[-1]) ** power, color=GRAY, linestyle=style, marker="", label=f"slope {power}")
    right.set(
        xscale="log", yscale="log", xlabel="horizon H", ylabel="loss / one-stage error", title="Equal errors at every stage"
    )
    legend_below(right)
    figure.set_label(
        "Left: measured losses grow with the horizon, nearly as fast with bootstrapped labels as with labels by the oracle; "
        "three bounds lie above, the quadratic one up to a hundred times. Right: with equal errors at every stage the loss "
        "follows slope 1, far from slope 2."
    )
    return {"horizon": figure}
