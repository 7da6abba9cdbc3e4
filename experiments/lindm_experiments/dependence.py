"""How many independent pairs is a context of one long trajectory worth?

There are two linear MDPs with time-homogeneous dynamics, a fixed behavior policy, and random rewards; the labels are Q*_1 of
the pairs. In `stay`, each aggregate of states leads back to itself. In `turn`, each leads to the next one in a cycle. A
context is a piece of the chain of pairs, started from its stationary law. A logger that samples faster than the system moves
sees the lazy chain stick I + (1 - stick) K. The features are transformed to the same covariance under each stationary law, so
that only the dependence differs. Theory sums the pairs exactly (lindm_theory.moments.chain_moments) and gives, for any layer,

    risk = tr(Lq A V A') + bias,   V = E[S S'] - Lambda Psi Lambda,   M_eff = tr(Lq A V_1 A') / tr(Lq A V A'),

and the layer that is best on such contexts, by its own normal equations.

    lindm run dependence --preset quick
    lindm verify --only dependence

Expected: the points are on the exact lines for the layer trained on independent pairs, the layers trained on trajectories, and
contexts pooled from several trajectories. M_eff is far below M if the chain is slow, but not in general: if the dynamics turn,
successive pairs cover the space evenly, and a trajectory is worth *more* than independent pairs.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from lindm.icl.attention import ReducedAttention, query_columns
from lindm.icl.label_laws import oracle_labels
from lindm.icl.prompts import chain, pair_kernel, stationary
from lindm.icl.trainer import train_many
from lindm.problems.linear_mdp import linear_mdp, simplex_family, tabulate, with_second_moment
from lindm.problems.mdp import simplex_rows
from lindm.problems.regression import covariance
from lindm.solvers.dp import plan_linear
from lindm.types import LinearMDP, Prompt
from lindm_experiments.harness.config import check_at_least, check_counts, check_multiples, check_rising
from lindm_experiments.harness.figures import (
    BLUE,
    COLORS,
    EXACT,
    GRAY,
    MARKERS,
    MEASURED,
    ORANGE,
    SKY,
    legend_below,
    panel_grid,
    set_log_ticks,
)
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_experiments.lib import linear_mdps
from lindm_theory.in_context import moment_risk, pair_variance, solve_normal_equations
from lindm_theory.moments import chain_moments, design_fourth, design_moment, effective_sample_size, independent_copies

S, A, D, H = 10, 2, 4, 3  # states, actions, features, stages
BLOCK = 256  # contexts in flight
SERVES = 8  # tasks for every chain


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 2022000
    contexts: int = 28672
    M: tuple[int, ...] = (8, 32, 128)
    N: int = 32  # pairs in a training context
    copies: int = 4  # number of trajectories of N pairs pooled into one context
    stick: tuple[float, ...] = (0.0, 0.5, 0.8)  # laziness of the chain of `stay`
    stay: float = 6.0  # strength with which an aggregate of states leads to its own states, or to those of the next one
    kappa: float = 3.0
    steps: int = 1000

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "contexts", "N", "copies", "steps")
        check_multiples(self, BLOCK, "contexts")
        if not 2 <= self.copies <= 8:
            raise ValueError(f"copies must be between 2 and 8; got {self.copies}")
        check_rising(self, "M")
        if self.N not in self.M:
            raise ValueError(f"M must contain N = {self.N}; got {self.M}")
        if not self.stick or self.stick[0] != 0 or list(self.stick) != sorted(set(self.stick)) or self.stick[-1] >= 1:
            raise ValueError(f"stick must contain rising probabilities, the first 0 and all below 1; got {self.stick}")
        check_at_least(self, 1, "stay", "kappa")


QUICK = Config()
FULL = Config(seeds=10, contexts=32768, M=(8, 16, 32, 64, 128, 256), stick=(0.0, 0.3, 0.5, 0.7, 0.8, 0.9), steps=3000)
SMOKE = Config(seeds=2, contexts=1024, M=(4, 8), N=8, stick=(0.0, 0.8), steps=20)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Chain:
    """One case: a law of contexts. Stacked over cases in `chains`."""

    phi: Array  # [S*A, d]
    start: Array  # [S*A] stationary law
    kernel: Array  # [S*A, S*A]
    mu: Array  # [d, S]
    dual_map: Array  # [d, d], takes simplex coordinates to those of phi


def names(cfg: Config) -> list[str]:
    """The cases, in the order of `chains`."""
    return ["independent", *(f"stay, stick {s:g}" for s in cfg.stick), "turn"]


def chains(cfg: Config, seed: int) -> Chain:
    """All cases of one seed, stacked: features, behavior policy and dynamics are drawn anew for each seed."""
    k_state, k_pair, k_policy = jax.random.split(linear_mdps.family_key(seed), 3)
    # each state belongs mostly to one aggregate, whatever the action
    phi = 0.9 * simplex_rows(k_state, (S, 1, D), 3.0) + 0.1 * simplex_rows(k_pair, (S, A, D), 1.0)
    policy = simplex_rows(k_policy, (S, A), 1.0)
    frame = simplex_family(k_state, S, A, D, H, low=-1.0, high=1.0)

    def dynamics(ahead: int) -> tuple[Chain, Array]:
        member = phi.mean(1).T ** cfg.stay  # [d, S]
        mu = jnp.roll(member, -ahead, axis=0)
        mu = mu / mu.sum(1, keepdims=True)
        # `linear_mdp` checks that <phi, mu> is a kernel
        P = tabulate(linear_mdp(phi, mu[None], jnp.zeros((1, D)))).P[0]
        kernel = pair_kernel(P, policy)
        start = stationary(kernel)
        family = with_second_moment(replace(frame, phi=phi, design=start), covariance(D, cfg.kappa))
        return Chain(phi=linear_mdps.pairs_table(family), start=start, kernel=kernel, mu=mu, dual_map=family.dual_map), start

    stay, start = dynamics(0)
    turn, _ = dynamics(1)
    one = jnp.eye(S * A)
    cases = [
        replace(stay, kernel=jnp.broadcast_to(start[None, :], one.shape)),
        *(replace(stay, kernel=s * one + (1 - s) * stay.kernel) for s in cfg.stick),
        turn,
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)


@partial(jax.jit, static_argnames="tasks")
def draw_tasks(key: Array, chains: Chain, tasks: int) -> Array:
    """Q*_1 weights w [C, tasks, d] for random rewards on the dynamics of every case."""

    def case(at) -> Array:
        k, chain_of_case = at
        phi = chain_of_case.phi.reshape(S, A, D)
        mu = jnp.broadcast_to(chain_of_case.dual_map @ chain_of_case.mu, (H, D, S))

        def one(k: Array) -> Array:
            theta = jax.random.uniform(k, (H, D), minval=-1.0, maxval=1.0)
            return plan_linear(LinearMDP(phi=phi, mu=mu, theta=theta @ chain_of_case.dual_map.T, rho=jnp.full(S, 1.0 / S)))[1][0]

        return jax.vmap(one)(jax.random.split(k, tasks))

    return jax.lax.map(case, (jax.random.split(key, len(chains.phi)), chains))


@partial(jax.jit, static_argnames=("longest", "piece", "copies"))
def context_moments(
    key: Array, chains: Chain, w: Array, lengths: Array, longest: int, piece: int, copies: int
) -> tuple[Array, Array]:
    """(E[S S'], E[S w']) [C, L + 1, d, d] over contexts of every case: one trajectory cut to each of the L lengths, and last
    `copies` pieces of `piece` pairs pooled.  w [C, n, d], a task for every context."""
    used = (jnp.arange(longest)[None, :] < lengths[:, None]) / lengths[:, None]
    pooled = (jnp.arange(longest) < piece) / piece

    def grams(k: Array, chain_of_case: Chain) -> tuple[Array, Array]:
        x = chain_of_case.phi[chain(k, chain_of_case.kernel, chain_of_case.start, longest)]
        weighted = jnp.concatenate([used, pooled[None]])
        G = jnp.einsum("lm,mi,mj->lij", weighted, x, x, optimize=[(0, 1), (0, 1)])
        return G[:-1], G[-1]

    def case(at) -> tuple[Array, Array]:
        k, chain_of_case, w = at

        def block(at) -> tuple[Array, Array]:
            keys, w = at
            G, piece_G = jax.vmap(grams, (0, None))(keys, chain_of_case)
            # independent chains pooled in groups of which no two share more than one chain
            joined = jnp.stack([jnp.roll(piece_G, 2**r - 1, axis=0) for r in range(copies)]).mean(0)
            G = jnp.concatenate([G, joined[:, None]], axis=1)
            several = jnp.repeat(w.reshape(-1, SERVES, D), SERVES, axis=0)  # every chain serves several tasks
            S_M = jnp.einsum("nlij,nrj->lnri", G, several)
            return jnp.einsum("lnri,lnrj->lij", S_M, S_M) / SERVES, jnp.einsum("lnri,nrj->lij", S_M, several) / SERVES

        blocks = jax.lax.map(block, (jax.random.split(k, len(w)).reshape(-1, BLOCK), w.reshape(-1, BLOCK, D)))
        return jax.tree.map(lambda m: m.sum(0) / len(w), blocks)

    return jax.lax.map(case, (jax.random.split(key, len(w)), chains, w))


@partial(jax.jit, static_argnames="length")
def exact_moments(chains: Chain, Psi: Array, length: int) -> tuple[Array, Array]:
    """(E[G], E[G Psi G]) of a trajectory of `length` pairs for every case, [C, d, d] each."""
    return jax.vmap(lambda v, P: chain_moments(v.kernel, v.start, v.phi, P, length))(chains, Psi)


@jax.jit
def exact(A: Array, chains: Chain, Psi: Array, mean: Array, second: Array) -> dict[str, Array]:
    """Risk of the layers A [C, d, d] and M_eff [C], from E[G], E[G Psi G] [C, d, d] of the contexts."""

    def case(A: Array, v: Chain, P: Array, mean: Array, second: Array) -> dict[str, Array]:
        Lambda = design_moment(v.phi, v.start)
        V = second - mean @ P @ mean
        V_1 = pair_variance(Lambda, P, design_fourth(v.phi, v.start, P))
        return {"risk": moment_risk(A, mean, P, V, Lambda).total, "size": effective_sample_size(A, V_1, V, Lambda)}

    return jax.vmap(case)(A, chains, Psi, mean, second)


@jax.jit
def measured(A: Array, chains: Chain, Psi: Array, SS: Array, Sw: Array) -> dict[str, Array]:
    """The same from moments over contexts drawn: E|L^(1/2)(A S - w)|^2, and M_eff from E|L^(1/2) A (S - L w)|^2."""

    def case(A: Array, v: Chain, P: Array, SS: Array, Sw: Array) -> dict[str, Array]:
        Lambda = design_moment(v.phi, v.start)
        residual = SS - Sw @ Lambda - Lambda @ Sw.T + Lambda @ P @ Lambda
        V_1 = pair_variance(Lambda, P, design_fourth(v.phi, v.start, P))
        cross = A @ Sw
        return {
            "risk": jnp.trace(Lambda @ (A @ SS @ A.T - cross - cross.T + P)),
            "size": effective_sample_size(A, V_1, residual, Lambda),
        }

    return jax.vmap(case)(A, chains, Psi, SS, Sw)


def draw_training(key: Array, chain_of_case: Chain, pool: Array, length: Array) -> tuple[Prompt, Array]:
    """128 chains of one case, each for several tasks of the pool; the queries' law enters exactly, by d columns.
    `length` is there for its shape [N]."""
    which, k = jax.random.split(key)
    w = pool[jax.random.randint(which, (128 * 4,), 0, len(pool))]
    idx = jax.vmap(lambda q: chain(q, chain_of_case.kernel, chain_of_case.start, length.shape[0]))(jax.random.split(k, 128))
    x = jnp.repeat(chain_of_case.phi[idx], 4, axis=0)
    query = jnp.broadcast_to(query_columns(design_moment(chain_of_case.phi, chain_of_case.start)), (len(w), D, D))
    return Prompt(x=x, y=oracle_labels(x, w), query=query), oracle_labels(query, w)


def trained(key: Array, chains: Chain, pool: Array, cfg: Config) -> Array:
    """Reduced layers [C, d, d], each trained in float32 on the contexts of its own case."""
    cases = len(pool)
    data = linear_mdps.single_precision((chains, pool, jnp.zeros((cases, cfg.N))))
    layers, _ = train_many(
        ReducedAttention(D), draw_training, jax.random.split(key, cases), steps=cfg.steps, data=data, learning_rate=0.1
    )
    return layers.A[...][:, 0].astype(pool.dtype)


def measure(cfg: Config, point: dict) -> dict:
    k_pool, k_train, k_test = jax.random.split(jax.random.key(cfg.base_seed + point["seed"]), 3)
    cases, all_names = chains(cfg, cfg.base_seed + point["seed"]), names(cfg)
    # no task is both trained on and tested
    pool, tested = (draw_tasks(k, cases, tasks=cfg.contexts) for k in jax.random.split(k_pool))
    Psi, Psi_trained = (jnp.einsum("cni,cnj->cij", w, w) / cfg.contexts for w in (tested, pool))
    moments = {M: exact_moments(cases, Psi, M) for M in cfg.M}
    Lambda, second = exact_moments(cases, Psi_trained, cfg.N)  # stationary: E[G] is the second moment
    best = jax.vmap(solve_normal_equations)(Lambda @ Psi_trained, second)
    own = trained(k_train, cases, pool, cfg)
    # the `stay` cases share features and law of tasks, so that one layer trained on independent pairs serves all of them;
    # `turn` gets the closed form of its own
    turn = jax.tree.map(lambda x: x[-1:], cases)
    free = replace(turn, kernel=jnp.broadcast_to(turn.start[:, None, :], turn.kernel.shape))
    plain_turn = solve_normal_equations(Lambda[-1] @ Psi_trained[-1], exact_moments(free, Psi_trained[-1:], cfg.N)[1][0])
    plain = jnp.broadcast_to(own[0], own.shape).at[-1].set(plain_turn)
    SS, Sw = context_moments(k_test, cases, tested, jnp.asarray(cfg.M, float), longest=cfg.M[-1], piece=cfg.N, copies=cfg.copies)
    pooled = jax.vmap(independent_copies, (0, 0, 0, None))(moments[cfg.N][0], moments[cfg.N][1], Psi, cfg.copies)
    laws = [(M, *moments[M]) for M in cfg.M] + [(cfg.N * cfg.copies, Lambda, pooled)]
    cells = []
    for i, (M, mean, second) in enumerate(laws):
        measurements = {k: measured(L, cases, Psi, SS[:, i], Sw[:, i]) for k, L in (("plain", plain), ("own", own))}
        predictions = {k: exact(L, cases, Psi, mean, second) for k, L in (("plain", plain), ("own", own))}
        cells += [
            {
                "case": name,
                "M": M,
                "pooled": i == len(cfg.M),
                "measured": {k: float(v["risk"][c]) for k, v in measurements.items()},
                "exact": {k: float(v["risk"][c]) for k, v in predictions.items()},
                "size": [float(measurements["plain"]["size"][c]), float(predictions["plain"]["size"][c])],
            }
            for c, name in enumerate(all_names)
        ]
    return {
        "N": cfg.N,
        "copies": cfg.copies,
        "names": all_names,
        "stick": list(cfg.stick),
        "cells": cells,
        "weights_error": (jnp.linalg.norm(own - best, axis=(1, 2)) / jnp.linalg.norm(best, axis=(1, 2))).tolist(),
        "apart": (jnp.linalg.norm(best - plain, axis=(1, 2)) / jnp.linalg.norm(best, axis=(1, 2))).tolist(),
    }


def _cell(record: dict, case: str, M: int, pooled: bool = False) -> dict:
    return next(c for c in record["cells"] if (c["case"], c["M"], c["pooled"]) == (case, M, pooled))


def _keys(records: list[dict]) -> list[tuple[str, int, bool]]:
    return [(c["case"], c["M"], c["pooled"]) for c in records[0]["cells"]]


def check(records: list[dict]) -> list[Verdict]:
    first = records[0]
    cells_by_key = {key: [_cell(r, *key) for r in records] for key in _keys(records)}
    ratios = [[c["measured"][k] / c["exact"][k] for c in cells] for cells in cells_by_key.values() for k in ("plain", "own")]
    sizes = [[c["size"][0] / c["size"][1] for c in cells] for cells in cells_by_key.values()]

    def share(chosen) -> list[list[float]]:
        return [[c["size"][0] / c["M"] for c in cells] for key, cells in cells_by_key.items() if chosen(*key)]

    slow = share(lambda case, M, pooled: case.startswith("stay") and not pooled)
    turning = share(lambda case, M, pooled: case == "turn" and not pooled)
    weights = np.array([r["weights_error"] for r in records])
    sticky = first["names"][-2]
    at_N = [_cell(r, sticky, first["N"]) for r in records]
    apart = np.mean([r["apart"][-2] for r in records])
    gain = np.mean([c["measured"]["own"] / c["measured"]["plain"] for c in at_N])
    return [
        mean_verdict(
            "dependence", *ratios, *sizes, figure="dependence", note=f"{len(ratios)} risks and {len(sizes)} M_eff, worst shown"
        ),
        mean_verdict(
            "dependence/slow",
            *slow,
            figure="dependence",
            note=f"from {np.mean(slow, 1).min():.2g} to {np.mean(slow, 1).max():.2g}",
        ),
        mean_verdict("dependence/turning", *turning, figure="dependence"),
        mean_verdict(
            "dependence/weights",
            *weights.T,
            figure="risk",
            note=f"{sticky}: {apart:.0%} away from the layer of independent pairs, risk x {gain:.2f}",
        ),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    return {"dependence": _sizes(records), "risk": _risks(records)}


def _lengths(records: list[dict]) -> list[int]:
    return sorted({c["M"] for c in records[0]["cells"] if not c["pooled"]})


def _sizes(records: list[dict]) -> Figure:
    """M_eff / M over M for every case, and over the stickiness of the chain."""
    first, M = records[0], _lengths(records)
    figure, (left, right) = panel_grid(2, 4.4)
    for name, color, marker in zip(first["names"], (GRAY, *(c for c in COLORS if c != GRAY), "black"), MARKERS * 2, strict=False):
        shares = np.array([[np.array(_cell(r, name, m)["size"]) / m for m in M] for r in records])
        left.plot(M, shares[:, :, 1].mean(0), color=color, label=name, **EXACT)
        for seed in shares:
            left.plot(M, seed[:, 0], color=color, **MEASURED | {"marker": marker}, alpha=0.6)
    left.axhline(1.0, color=GRAY, linestyle=":", linewidth=1.0)
    left.set(xscale="log", yscale="log", xlabel="pairs in the context M", ylabel="effective share  $M_{eff}$ / M")
    set_log_ticks(left, M)
    left.set_title("What one pair of a trajectory is worth")
    legend_below(left, ncols=2)
    names = [f"stay, stick {s:g}" for s in first["stick"]]
    longest = first["N"] * first["copies"]
    groups = [(M[-1], False, SKY, "o", f"one trajectory of {M[-1]} pairs")]
    groups.append((longest, True, ORANGE, "s", f"{first['copies']} trajectories of {first['N']} pairs"))
    for m, pooled, color, marker, label in groups:
        shares = np.array([[np.array(_cell(r, n, m, pooled)["size"]) / m for n in names] for r in records])
        right.plot(first["stick"], shares[:, :, 1].mean(0), color=color, label=label, **EXACT)
        for seed in shares:
            right.plot(first["stick"], seed[:, 0], color=color, **MEASURED | {"marker": marker}, alpha=0.6)
    right.set(yscale="log", xlabel="chance that the chain stays", ylabel=left.get_ylabel(), title="Slower chains, and pooling")
    legend_below(right)
    figure.set_label(
        "Left: the effective share of a context's pairs is 1 for independent pairs, falls to a few percent on chains that "
        "stay where they are, and is above 1 on chains that turn. Right: the share falls with the chance to stay, less where "
        "trajectories are pooled."
    )
    return figure


def _risks(records: list[dict]) -> Figure:
    """Risk over M of the layer trained on independent pairs and of the one trained on the trajectories themselves."""
    first, M = records[0], _lengths(records)
    chosen = [first["names"][0], first["names"][1], first["names"][-2], first["names"][-1]]
    figure, axes = panel_grid(len(chosen), 3.0, ylabel="risk of Qhat", sharey=True)
    for axis, name in zip(axes, chosen, strict=True):
        for k, color, marker, label in (("plain", BLUE, "o", "independent pairs"), ("own", COLORS[1], "s", "such contexts")):
            cells = [[_cell(r, name, m) for m in M] for r in records]
            axis.plot(M, np.mean([[c["exact"][k] for c in row] for row in cells], 0), color=color, **EXACT, label=label)
            for row in cells:
                axis.plot(M, [c["measured"][k] for c in row], color=color, **MEASURED | {"marker": marker}, alpha=0.6)
        axis.axvline(first["N"], color=GRAY, linestyle=":", linewidth=1.0)
        axis.set(xscale="log", yscale="log", xlabel="pairs in the context M", title=name)
        set_log_ticks(axis, M)
    place = {"title": f"trained at N = {first['N']} (dotted) on", "ncols": 2, "loc": "outside lower center"}
    figure.legend(*axes[0].get_legend_handles_labels(), **place)
    figure.set_label(
        "Risk of Qhat over the context length, one panel for each kind of chain: the layer trained on such contexts is better "
        "than the one trained on independent pairs where contexts are shorter than in training."
    )
    return figure
