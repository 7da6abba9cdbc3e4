r"""Exact answers by the unnormalised belief tree, for POMDPs and ambiguous ones alike: einsums only, no division, no sampling.

A history is a sequence of steps (a, m, o): the action, the model that nature took, the observation (a POMDP is a cloud of one
model). Its unnormalised belief U, the joint law of the history and the present state, needs one product per step,

    U(h a m o) = U(h) K_m[a, o],     K_m[a, o, s, s'] = P_m[s, a, s'] O_m[a, s', o],     U() = rho_m under model m,

and the values, which are positively homogeneous in U, come back up the tree with no normalisation on the way:

    G_m(h, a) = U(h) . r_m(., a) + sum_o V(h a m o),
    Q(h, a)   = alpha min_m G_m(h, a) + (1 - alpha) max_m G_m(h, a),      V(h) = max_a Q(h, a).

The value of any policy over histories is the same recursion with its action (or its mixture) in the place of the maximum.

Histories of stage t are numbered 0 .. (A M O)^t - 1, the last step most significant: step d = (a M + m) O + o after history i
makes history i + d (A M O)^t. That way the histories of one stage are the fast axis of every array, all arithmetic runs along
it, and no array is permuted. From a stage on whose subtrees fit a core's cache, subtrees are done one block at a time; the last
stage's beliefs are never formed, its rewards are pulled back one step instead: r -> K r.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from lindm import validate
from lindm.solvers.dp import greedy
from lindm.types import APOMDP, at_stage

CACHE = 1 << 18  # bytes of the last stage of a block of subtrees

Policy = tuple[Array, ...]
"""One array a stage: actions [histories] (int) or probabilities [histories, A]; `branching` ** t histories at stage t."""


Choice = Callable[[Array], Array]
"""Q [A, n] -> V [n]: what is made of the action values, the same at every history."""
BEST: Choice = partial(jnp.max, axis=0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tree:
    """Q* at every history, normalised by the history's probability; zero where that is zero."""

    Q: Array  # [..., histories of all stages, A], stage after stage (`first_history`)


def branching(problem: APOMDP) -> int:
    """A M O: the number of ways in which a history goes on."""
    return problem.num_actions * problem.num_models * problem.num_observations


def first_history(branches: int, t: int) -> int:
    """The row of `Tree.Q` at which stage t begins; with t = H, the number of all histories."""
    return (branches**t - 1) // (branches - 1) if branches > 1 else t


def histories(problem: APOMDP) -> int:
    """The number of histories of all stages."""
    return first_history(branching(problem), problem.horizon)


def memory_bytes(problem: APOMDP) -> int:
    """What `tree` holds at its largest, in double precision: the table, its stages before they are joined, and copies between."""
    return 4 * 8 * problem.num_actions * histories(problem)


def stage_Q(tree: Tree, t: int, branches: int) -> Array:
    """Q* [branches^t, A] at the histories of stage t."""
    start = first_history(branches, t)
    return tree.Q[start : start + branches**t]


def optimal_policy(problem: APOMDP, tree: Tree) -> Policy:
    """An optimal action at every history, lowest index among ties: one int32 array [histories] a stage."""
    B = branching(problem)
    return tuple(jax.vmap(greedy)(stage_Q(tree, t, B)) for t in range(problem.horizon))


def uniform_policy(problem: APOMDP) -> Policy:
    """Every action with the same probability, at every history."""
    H, A = problem.horizon, problem.num_actions
    return tuple(jnp.full((branching(problem) ** t, A), 1 / A, problem.models.r.dtype) for t in range(H))


def history_index(problem: APOMDP, a: Array, m: Array, o: Array) -> Array:
    """The number of a history within its stage: steps a, m, o [..., t] -> int32 [...]."""
    M, O = problem.num_models, problem.num_observations
    if branching(problem) ** a.shape[-1] > 2**31:
        raise ValueError(f"a must have few enough steps for 32 bits; got {a.shape[-1]} with {branching(problem)} branches each")
    place = branching(problem) ** jnp.arange(a.shape[-1], dtype=jnp.int32)
    return jnp.sum(((a * M + m) * O + o) * jnp.broadcast_to(place, a.shape), axis=-1, dtype=jnp.int32)


# --- the recursion -----------------------------------------------------------------------------------------------------


def kernel(problem: APOMDP, t: int) -> Array:
    """K [A, M, O, S, S] of stage t: probability of the next state and of the observation."""
    P = jax.vmap(lambda x: at_stage(x, t))(problem.models.P)
    O = jax.vmap(lambda x: at_stage(x, t))(problem.models.O)
    return jnp.einsum("msau,mauo->amosu", P, O)


def rewards(problem: APOMDP, t: int) -> Array:
    """r [A, M, S] of stage t."""
    return problem.models.r[:, t].transpose(2, 0, 1)


def mixed(alpha: Array, G: Array, axis: int) -> Array:
    """alpha min_m G + (1 - alpha) max_m G along the axis of the models; of one model G itself, to the last bit."""
    if G.shape[axis] == 1:
        return G.squeeze(axis)
    return alpha * G.min(axis) + (1 - alpha) * G.max(axis)


def _weighted(coefficients: Array, U: Array) -> Array:
    """sum_s coefficients[..., s] U[s, n] -> [..., n], as a fused sum: too few states for a matrix product."""
    U = U.reshape(*(1,) * (coefficients.ndim - 1), *U.shape)
    total = coefficients[..., 0, None] * U[..., 0, :]
    for s in range(1, coefficients.shape[-1]):
        total = total + coefficients[..., s, None] * U[..., s, :]
    return total


def _children(problem: APOMDP, U: Array, t: int) -> Array:
    """U [S, n] of stage t -> [S, A M O n] of stage t + 1."""
    K = kernel(problem, t)
    return _weighted(K.transpose(4, 0, 1, 2, 3), U).reshape(K.shape[-1], -1)


def _last(problem: APOMDP, U: Array) -> tuple[Array, Array]:
    """Q [A, A M O n] of the last stage and the histories' probabilities [A M O n], from U [S, n] one stage before."""
    H = problem.horizon
    K, r = kernel(problem, H - 2), rewards(problem, H - 1)
    G = _weighted(jnp.einsum("amosu,bnu->bnamos", K, r), U)  # [A, M, A, M, O, n]
    Q = mixed(problem.alpha, G, 1)
    return Q.reshape(len(Q), -1), _weighted(K.sum(-1), U).reshape(-1)


def _backed_up(problem: APOMDP, U: Array, V: Array, t: int) -> Array:
    """Q [A, n] at histories with U [S, n], from V [A M O n] of their children."""
    r = rewards(problem, t)
    G = _weighted(r, U) + V.reshape(*r.shape[:2], -1, U.shape[1]).sum(2)
    return mixed(problem.alpha, G, 1)


def _below(problem: APOMDP, U: Array, t: int, keep: bool, choose: Choice) -> tuple[Array, list[Array]]:
    """V [n] at histories of stage t >= 1 with U [S, n]; with `keep`, normalised Q [A, n] of this stage and of all below it."""
    H = problem.horizon
    mass = U.sum(0)
    if t == H - 1:
        Q, deeper = mixed(problem.alpha, _weighted(rewards(problem, t), U), 1), []
    elif t == H - 2:
        Q_last, mass_last = _last(problem, U)
        Q, deeper = _backed_up(problem, U, choose(Q_last), t), [_normalised(Q_last, mass_last)] if keep else []
    else:
        V, deeper = _below(problem, _children(problem, U, t), t + 1, keep, choose)
        Q = _backed_up(problem, U, V, t)
    return choose(Q), [_normalised(Q, mass), *deeper] if keep else []


def _normalised(Q: Array, mass: Array) -> Array:
    return jnp.where(mass[None] > 0, Q / jnp.where(mass > 0, mass, 1)[None], 0)


def _block(problem: APOMDP, t: int) -> int:
    """How many subtrees of stage t fit the cache together; 0 if not even one does."""
    A, M, B, H = problem.num_actions, problem.num_models, branching(problem), problem.horizon
    return CACHE // (8 * A * M * B ** max(H - 1 - t, 0))


def _subtrees(problem: APOMDP, U: Array, t: int, keep: bool, choose: Choice) -> tuple[Array, list[Array]]:
    """`_below` in blocks that stay in cache."""
    n, H = U.shape[1], problem.horizon
    block = _block(problem, t)
    if block >= n or t == H - 1:
        return _below(problem, U, t, keep, choose)
    if block == 0 and t == H - 2:
        block = 1
    if block == 0:
        V, deeper = _subtrees(problem, _children(problem, U, t), t + 1, keep, choose)
        Q = _backed_up(problem, U, V, t)
        return choose(Q), [_normalised(Q, U.sum(0)), *deeper] if keep else []
    while n % block:  # blocks of one size
        block -= 1
    V, deeper = jax.lax.map(lambda u: _below(problem, u, t, keep, choose), U.reshape(len(U), -1, block).swapaxes(0, 1))
    # [blocks, A, steps of the subtree, block] -> the block's place is just above its own histories
    joined = [Q.reshape(*Q.shape[:2], -1, block).transpose(1, 2, 0, 3).reshape(Q.shape[1], -1) for Q in deeper]
    return V.reshape(-1), joined


def _root(problem: APOMDP, keep: bool, choose: Choice = BEST) -> tuple[Array, list[Array]]:
    """Q [A] at the start, where the belief under model m is rho_m, and with `keep` the normalised Q of all later stages."""
    rho = problem.models.rho
    G = jnp.einsum("ams,ms->am", rewards(problem, 0), rho)
    deeper: list[Array] = []
    if problem.horizon > 1:
        K = kernel(problem, 0)
        U = jnp.einsum("amosu,ms->uamo", K, rho)
        V, deeper = _subtrees(problem, U.reshape(len(U), -1), 1, keep, choose)
        G = G + V.reshape(K.shape[:3]).sum(-1)
    return mixed(problem.alpha, G, 1), deeper


@jax.jit
def value(problem: APOMDP) -> Array:
    """V* [] at the start."""
    return _root(problem, keep=False)[0].max()


@jax.jit
def uniform_value(problem: APOMDP) -> Array:
    """V [] of taking every action with the same probability: `policy_value` of `uniform_policy`, without its tables."""
    return _root(problem, keep=False, choose=partial(jnp.mean, axis=0))[0].mean()


@jax.jit
def tree(problem: APOMDP) -> Tree:
    """Q* at every history; memory as `memory_bytes` says."""
    Q, deeper = _root(problem, keep=True)
    return Tree(Q=jnp.concatenate([Q[:, None], *deeper], axis=1).T)


# --- any policy ----------------------------------------------------------------------------------------------------------


def check_shapes(problem: APOMDP, policy: Policy) -> None:
    """ValueError if a policy over histories has the wrong number of stages or a stage of the wrong shape."""
    H, A = problem.horizon, problem.num_actions
    if len(policy) != H:
        raise ValueError(f"policy must have one array for each of the {H} stages; got {len(policy)}")
    for t, table in enumerate(policy):
        shape = (branching(problem) ** t,) if jnp.issubdtype(table.dtype, jnp.integer) else (branching(problem) ** t, A)
        validate.shaped(table, shape, f"policy[{t}]", "histories, A"[: 9 if len(shape) == 1 else None])


def checked_policy(problem: APOMDP, policy: Policy) -> Policy:
    """A policy over histories whose every stage has the right shape and holds actions or probabilities; ValueError if not."""
    check_shapes(problem, policy)
    A = problem.num_actions
    for t, table in enumerate(policy):
        name = f"policy[{t}]"
        if jnp.issubdtype(table.dtype, jnp.integer):
            if not bool(((table >= 0) & (table < A)).all()):
                raise ValueError(f"{name} must hold actions from 0 to {A - 1}; got values from {table.min()} to {table.max()}")
        else:
            validate.distribution(table, name)
    return policy


@jax.jit
def policy_value(problem: APOMDP, policy: Policy) -> Array:
    """V^pi [] at the start of a policy over histories (`checked_policy` checks one): the same recursion, its action for the max.

    A mixture is drawn after nature's choice is fixed for each action: V^pi(h) = sum_a pi(a | h) Q^pi(h, a).
    """

    check_shapes(problem, policy)

    def chosen(table: Array, Q: Array) -> Array:
        """V [n] from Q [A, n]."""
        if jnp.issubdtype(table.dtype, jnp.integer):
            return jnp.take_along_axis(Q, table[None], axis=0)[0]
        return jnp.einsum("na,an->n", table, Q)

    def below(U: Array, t: int) -> Array:
        if t == len(policy) - 1:
            return chosen(policy[t], mixed(problem.alpha, _weighted(rewards(problem, t), U), 1))
        return chosen(policy[t], _backed_up(problem, U, below(_children(problem, U, t), t + 1), t))

    G = jnp.einsum("ams,ms->am", rewards(problem, 0), problem.models.rho)
    if len(policy) > 1:
        K = kernel(problem, 0)
        U = jnp.einsum("amosu,ms->uamo", K, problem.models.rho)
        G = G + below(U.reshape(len(U), -1), 1).reshape(K.shape[:3]).sum(-1)
    return chosen(next(iter(policy)), mixed(problem.alpha, G, 1)[:, None])[0]
