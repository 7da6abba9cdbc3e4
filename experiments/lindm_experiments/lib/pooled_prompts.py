"""Prompts of K trajectories that serve all stages: tasks, sums of y x, the readers of such prompts and their exact risk.

Labels (LAWS), readers and dependence are those that `pooled.py` describes. Theory: lindm_theory.pooled, notes/pooled.md.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm.icl.label_laws import oracle_labels, return_labels, return_moments
from lindm.problems.linear_mdp import MDPFamily, simplex_family, tabulate
from lindm.solvers.rollout import rollout
from lindm.solvers.ties import greedy
from lindm.types import MDP
from lindm_experiments.lib import linear_mdps
from lindm_theory import pooled

S, A, D, H = 5, 3, 4, 3  # states, actions, features, stages
LAWS = ("oracle", "rollout", "return", "relabeled")
READERS = (
    ("stage", "oracle"),
    ("stage", "rollout"),
    ("stage", "return"),
    ("augmented", "oracle"),
    ("augmented", "return"),
    ("blind", "oracle"),
    ("blind", "return"),
    ("relabeled", "relabeled"),
)
DEPENDENCE = ("pairs", "markov", "shared")
POOL = 2048  # tasks of training; of 512 tasks the (H d)^2 numbers of the augmented reader learn the sample


@jax.jit
def draw_family(key: Array) -> MDPFamily:
    return simplex_family(key, S, A, D, H, feature_power=2.0, low=-1.0, high=1.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Solved tasks with the exact moments of one trajectory, for every law of labels; leading axis: tasks."""

    mdp: MDP
    Q: Array  # [H, S, A]
    w: Array  # [H, d]
    best: Array  # [H, S] pi*
    behavior: Array  # [H, S, A]
    mean: Array  # [L, H, Hd] E[Z] of what each stage reads, laws in the order of LAWS
    covariance: Array  # [L, H, Hd, Hd]
    free: Array  # [Hd, Hd] Cov(Z) of return labels, were their noise independent


@partial(jax.jit, static_argnames="tasks")
def draw_tasks(key: Array, family: MDPFamily, epsilon: Array, tasks: int) -> Tasks:
    flat = linear_mdps.pairs_table(family)

    def one(k: Array) -> Tasks:
        task, plan, w = linear_mdps.draw_oracle(k, family)
        mdp = tabulate(task)
        best = greedy(plan.Q)
        behavior = (1 - epsilon) * jax.nn.one_hot(best, A) + epsilon / A
        start, kernels = pooled.pair_chain(mdp.P, mdp.rho, behavior)
        Q, r = plan.Q.reshape(H, -1), mdp.r.reshape(H, -1)
        value, square = pooled.return_values(kernels, r)
        # a prompt relabeled for stage h has the label <phi(z_i), w_h> at every i
        relabeled = jnp.broadcast_to((w @ flat.T)[:, None, :], (H, *Q.shape))
        labels = jnp.stack([Q, Q, value, *relabeled])
        none = jnp.zeros_like(Q)
        noise = jnp.stack([none, return_moments(mdp, best)[1].reshape(H, -1), square - value**2, *[none] * H])
        m, C = jax.vmap(lambda y, v: pooled.stack(*pooled.trajectory_moments(kernels, start, flat, y, v)))(labels, noise)
        m_return, C_return = pooled.stack(*pooled.return_trajectory_moments(kernels, start, flat, r))

        def laws(oracle: Array, rollouts: Array, returns: Array, relabeled: Array) -> Array:
            return jnp.stack([*(jnp.stack([x] * H) for x in (oracle, rollouts, returns)), relabeled])

        return Tasks(
            mdp=mdp,
            Q=plan.Q,
            w=w,
            best=best,
            behavior=behavior,
            mean=laws(m[0], m[1], m_return, m[3:]),
            covariance=laws(C[0], C[1], C_return, C[3:]),
            free=C[2],
        )

    return jax.vmap(one)(jax.random.split(key, tasks))


@partial(jax.jit, static_argnames=("contexts", "K"))
def _draw_sums(key: Array, family: MDPFamily, tasks: Tasks, contexts: int, K: tuple[int, ...]) -> tuple[Array, Array]:
    flat = linear_mdps.pairs_table(family)
    used = jnp.stack([(jnp.arange(K[-1]) < k) / k for k in K])

    def one(at: tuple[Tasks, Array]) -> tuple[Array, Array]:
        task, k = at
        k_pairs, k_labels = jax.random.split(k)
        episodes = rollout(k_pairs, task.mdp, task.behavior, contexts * K[-1])
        idx = episodes.s * A + episodes.a  # [n, H]
        stage = jnp.broadcast_to(jnp.arange(H, dtype=jnp.int32), idx.shape)
        x = flat[idx]
        labels = [
            oracle_labels(x.swapaxes(0, 1), task.w).T,
            return_labels(k_labels, task.mdp, task.best, stage, idx),
            jnp.cumsum(episodes.r[:, ::-1], axis=1)[:, ::-1],
        ]
        y = jnp.stack([*labels, *jnp.einsum("nid,hd->hni", x, task.w)])
        sums = (y[..., None] * x[None]).reshape(len(y), contexts, K[-1], H * D)
        sums = jnp.einsum("qk,yckm->yqcm", used, sums).reshape(len(y), len(K), contexts, H, D)
        return sums[:3], jnp.moveaxis(sums[3:], 0, 2)

    return jax.lax.map(one, (tasks, jax.random.split(key, len(tasks.w))))


def draw_sums(key: Array, family: MDPFamily, tasks: Tasks, contexts: int, K: tuple[int, ...]) -> np.ndarray:
    """Sums [T, L, len(K), C, H, H, d] of y x over the first K trajectories of each prompt: (reading stage, stage of the pair)."""
    own, relabeled = (np.asarray(x) for x in _draw_sums(key, family, tasks, contexts, K))
    own = np.broadcast_to(own[..., None, :, :], (*own.shape[:4], H, H, D))
    return np.concatenate([own, relabeled[:, None]], axis=1)


def with_dependence(sums: np.ndarray, dependence: str) -> np.ndarray:
    """sums [..., C, H, H, d] with the contexts (axis -4) of different stages, or of all pairs, taken from different prompts.

    Prompts are independent, so that a cyclic shift makes what is read together independent and keeps every marginal law.
    """
    if dependence == "shared":
        return sums
    out = np.empty_like(sums)
    for h in range(H):
        for i in range(H):
            shift = H * h + (i if dependence == "pairs" else 0)
            out[..., h, i, :] = np.roll(sums[..., h, i, :], shift, axis=-2)
    return out


def layers(pool: Tasks, N: int) -> np.ndarray:
    """B [len(READERS), H, d, Hd], the best of their kind on prompts of N trajectories of the tasks in `pool`."""
    mean, covariance, w = (np.asarray(x) for x in (pool.mean, pool.covariance, pool.w))
    ESS = (np.einsum("tlhm,tlhk->lhmk", mean, mean) + covariance.sum(0) / N) / len(w)
    ESw = np.einsum("tlhm,tgd->lhgmd", mean, w) / len(w)
    everything, mixed = jnp.eye(H * D), pooled.average(H, D)
    out = []
    for reader, law in READERS:
        i = LAWS.index(law)
        if reader == "blind":  # one matrix for every stage
            out.append([_best_reader(mixed, ESS[i, 0], ESw[i, 0].mean(0))] * H)
            continue
        T = {"stage": pooled.block, "augmented": lambda *_: everything, "relabeled": lambda *_: mixed}[reader]
        out.append([_best_reader(T(h, H, D), ESS[i, h], ESw[i, h, h]) for h in range(H)])
    return np.array(out)


_best_reader = jax.jit(pooled.best_reader)
without_cross_blocks = jax.jit(pooled.without_cross_blocks, static_argnums=1)


def exact_risk(
    B: np.ndarray, mean: np.ndarray, covariance: np.ndarray, w: np.ndarray, Lambda_q: np.ndarray
) -> tuple[np.float64, np.float64]:
    """(estimation of one trajectory, bias): sum over the stages, mean over the tasks.

    B [H, d, Hd], w [T, H, d]; mean and covariance [T, H, ...] of one trajectory.
    """
    estimation, bias = (np.asarray(x).sum(1).mean() for x in _stage_risks(B, mean, covariance, w, Lambda_q))
    return estimation, bias


@jax.jit
def _stage_risks(B: Array, mean: Array, covariance: Array, w: Array, Lambda_q: Array) -> tuple[Array, Array]:
    parts = jax.vmap(lambda m, C, w: pooled.reader_risk(B, m, C, w, Lambda_q))(mean, covariance, w)
    return parts.estimation, parts.bias


def blind_floor(pool: Tasks, Lambda_q: np.ndarray) -> list[float]:
    """Sum over the stages of the risk that the blind reader of oracle labels keeps, and of its part by the spread of w_h."""
    signal = pool.mean[:, LAWS.index("oracle"), 0].reshape(POOL, H, D).mean(1)
    floor, spread = pooled.blind_floor(
        signal.T @ signal / POOL,
        np.einsum("td,the->hde", signal, pool.w) / POOL,
        np.einsum("thd,tie->hide", pool.w, pool.w) / POOL,
        Lambda_q,
    )
    return [H * float(floor), H * float(spread)]


def stacked(sums: np.ndarray) -> np.ndarray:
    """[..., H, H, d] -> [..., H, Hd]."""
    return sums.reshape(*sums.shape[:-2], H * D)


def covariance_roots(C: np.ndarray) -> np.ndarray:
    """Square roots of the covariances C [T, m, m], which may be singular."""
    spectrum, basis = np.linalg.eigh(C)
    return basis * np.sqrt(np.maximum(spectrum, 0))[:, None, :]
