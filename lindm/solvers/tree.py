r"""Exact solution of POMDPs and APOMDPs by the tree of unnormalized beliefs: einsums only, no division, no sampling.

The unnormalized belief U(h) of a history h (`lindm.solvers.belief`) is the joint law of the history and the present state. It
needs one product a step,

    U(h a m o) = U(h) K_m[a, o],     U() = rho_m under model m,

and the values, which are positively homogeneous in U, are computed backward without any normalization:

    G_m(h, a) = U(h) . r_m(., a) + sum_o V(h a m o),
    Q(h, a)   = alpha min_m G_m(h, a) + (1 - alpha) max_m G_m(h, a),      V(h) = max_a Q(h, a).

The value of any policy over histories is the same recursion with the policy's action, or the mean under its action probabilities,
in place of the maximum.

Arithmetic runs along the histories of one stage, the fast axis of every array. Where subtrees fit the cache of a core, they are
computed one block at a time. The beliefs of the last stage are never formed: its rewards are pulled back one step, r -> K r.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import Array

from lindm import validate
from lindm.problems.apomdp import alpha_maxmin
from lindm.solvers.belief import branching, first_history, joint_kernel, stage_rewards
from lindm.solvers.ties import greedy
from lindm.types import APOMDP, in_given_precision

CACHE_BYTES = 1 << 18  # size of the last stage of a block of subtrees

Policy = tuple[Array, ...]
"""One array for each stage: actions [histories] (int) or probabilities [histories, A]; stage t has branching^t histories."""

Choice = Callable[[Array], Array]
"""Q [A, n] -> V [n]: the value of a history from its action values, -inf where an action is not legal."""
BEST: Choice = partial(jnp.max, axis=0)


def uniform(Q: Array) -> Array:
    """The mean of the legal actions' values: V [n] from Q [A, n]; -inf where there are none."""
    legal = -jnp.inf < Q
    return jnp.where(legal.any(0), jnp.where(legal, Q, 0).sum(0) / jnp.maximum(legal.sum(0), 1), -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tree:
    """Q* at every history, normalized by the history's probability; zero where that is zero."""

    Q: Array  # [..., histories of all stages, A], stage after stage (`first_history`)


def memory_bytes(problem: APOMDP) -> int:
    """Peak memory of `tree` in double precision: the table, its stages before they are joined, and copies."""
    return table_bytes(problem.num_actions, branching(problem), problem.horizon)


def table_bytes(actions: int, branches: int, horizon: int) -> int:
    """`memory_bytes` by the sizes of a problem."""
    return 4 * 8 * actions * first_history(branches, horizon)


def stage_Q(tree: Tree, t: int, branches: int) -> Array:
    """Q* [branches^t, A] at the histories of stage t."""
    start = first_history(branches, t)
    return tree.Q[start : start + branches**t]


@in_given_precision
def optimal_policy(problem: APOMDP, tree: Tree) -> Policy:
    """The greedy action (`lindm.solvers.ties`) at every history: one int32 array [histories] for each stage."""
    B = branching(problem)
    return tuple(greedy(stage_Q(tree, t, B), per_row=True) for t in range(problem.horizon))


@in_given_precision
def uniform_policy(problem: APOMDP) -> Policy:
    """The same probability for every action, at every history."""
    H, A = problem.horizon, problem.num_actions
    return tuple(jnp.full((branching(problem) ** t, A), 1 / A, problem.models.r.dtype) for t in range(H))


# --- the recursion -----------------------------------------------------------------------------------------------------


def _weighted(coefficients: Array, U: Array) -> Array:
    """sum_s coefficients[..., s] U[s, n] -> [..., n], as a fused sum: there are too few states for a matrix product."""
    U = U.reshape(*(1,) * (coefficients.ndim - 1), *U.shape)
    total = coefficients[..., 0, None] * U[..., 0, :]
    for s in range(1, coefficients.shape[-1]):
        total = total + coefficients[..., s, None] * U[..., s, :]
    return total


def _children(problem: APOMDP, U: Array, t: int) -> Array:
    """U [S, n] of stage t -> [S, A M O n] of stage t + 1."""
    K = joint_kernel(problem, t)
    return _weighted(K.transpose(4, 0, 1, 2, 3), U).reshape(K.shape[-1], -1)


def _last(problem: APOMDP, U: Array) -> tuple[Array, Array]:
    """Q [A, A M O n] of the last stage and the histories' probabilities [A M O n], from U [S, n] one stage before."""
    H = problem.horizon
    K, r = joint_kernel(problem, H - 2), stage_rewards(problem, H - 1)
    G = _weighted(jnp.einsum("amosu,bnu->bnamos", K, r), U)  # [A, M, A, M, O, n]
    Q = alpha_maxmin(problem.alpha, G, 1)
    if problem.models.legal is not None:
        illegal = (~problem.models.legal[0]).astype(U.dtype)
        Q = jnp.where(_weighted(jnp.einsum("amosu,ub->bamos", K, illegal), U) > 0, -jnp.inf, Q)
    return Q.reshape(len(Q), -1), _weighted(K.sum(-1), U).reshape(-1)


def _only_legal(problem: APOMDP, U: Array, Q: Array) -> Array:
    """Q [A, n] with -inf where a state of positive probability in U [S, n] does not allow the action."""
    if problem.models.legal is None:
        return Q
    return jnp.where(_weighted((~problem.models.legal[0].T).astype(U.dtype), U) > 0, -jnp.inf, Q)


def _backed_up(problem: APOMDP, U: Array, V: Array, t: int) -> Array:
    """Q [A, n] at histories with U [S, n], from V [A M O n] of their children."""
    r = stage_rewards(problem, t)
    G = _weighted(r, U) + V.reshape(*r.shape[:2], -1, U.shape[1]).sum(2)
    return _only_legal(problem, U, alpha_maxmin(problem.alpha, G, 1))


def _below(problem: APOMDP, U: Array, t: int, keep: bool, choose: Choice) -> tuple[Array, list[Array]]:
    """V [n] at histories of stage t >= 1 with U [S, n]; with `keep`, normalized Q [A, n] of this stage and of all below it."""
    H = problem.horizon
    mass = U.sum(0)
    if t == H - 1:
        Q, deeper = _only_legal(problem, U, alpha_maxmin(problem.alpha, _weighted(stage_rewards(problem, t), U), 1)), []
    elif t == H - 2:
        Q_last, mass_last = _last(problem, U)
        Q, deeper = _backed_up(problem, U, choose(Q_last), t), [_normalized(Q_last, mass_last)] if keep else []
    else:
        V, deeper = _below(problem, _children(problem, U, t), t + 1, keep, choose)
        Q = _backed_up(problem, U, V, t)
    return choose(Q), [_normalized(Q, mass), *deeper] if keep else []


def _normalized(Q: Array, mass: Array) -> Array:
    return jnp.where(mass[None] > 0, Q / jnp.where(mass > 0, mass, 1)[None], 0)


def _block(problem: APOMDP, t: int) -> int:
    """The number of subtrees of stage t that fit the cache together; 0 if one does not."""
    A, M, B, H = problem.num_actions, problem.num_models, branching(problem), problem.horizon
    return CACHE_BYTES // (8 * A * M * B ** max(H - 1 - t, 0))


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
        return choose(Q), [_normalized(Q, U.sum(0)), *deeper] if keep else []
    while n % block:  # blocks of one size
        block -= 1
    V, deeper = jax.lax.map(lambda u: _below(problem, u, t, keep, choose), U.reshape(len(U), -1, block).swapaxes(0, 1))
    # [blocks, A, steps of the subtree, block] -> histories of the block are the lowest digits, the block comes next
    joined = [Q.reshape(*Q.shape[:2], -1, block).transpose(1, 2, 0, 3).reshape(Q.shape[1], -1) for Q in deeper]
    return V.reshape(-1), joined


def _root(problem: APOMDP, keep: bool, choose: Choice = BEST) -> tuple[Array, list[Array]]:
    """Q [A] at the start, where the belief under model m is rho_m, and with `keep` the normalized Q of all later stages."""
    chex.assert_rank([problem.models.r, problem.models.rho], [4, 2])  # one problem, without leading axes
    rho = problem.models.rho
    G = jnp.einsum("ams,ms->am", stage_rewards(problem, 0), rho)
    deeper: list[Array] = []
    if problem.horizon > 1:
        K = joint_kernel(problem, 0)
        U = jnp.einsum("amosu,ms->uamo", K, rho)
        V, deeper = _subtrees(problem, U.reshape(len(U), -1), 1, keep, choose)
        G = G + V.reshape(K.shape[:3]).sum(-1)
    Q = _only_legal(problem, rho.max(0)[:, None], alpha_maxmin(problem.alpha, G, 1)[:, None])[:, 0]  # under every model
    return Q, deeper


@in_given_precision
@jax.jit
def value(problem: APOMDP) -> Array:
    """V* [] at the start."""
    return _root(problem, keep=False)[0].max()


@in_given_precision
@jax.jit
def uniform_value(problem: APOMDP) -> Array:
    """V [] of the uniformly random policy: `policy_value` of `uniform_policy`, without its tables."""
    return uniform(_root(problem, keep=False, choose=uniform)[0])


@in_given_precision
@jax.jit
def tree(problem: APOMDP) -> Tree:
    """Q* at every history; `memory_bytes` gives the memory."""
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


@in_given_precision
@jax.jit
def policy_value(problem: APOMDP, policy: Policy) -> Array:
    """V^pi [] at the start of a policy over histories: V^pi(h) = sum_a pi(a | h) Q^pi(h, a).

    A random action is drawn after nature has fixed its choice for each action.
    """
    check_shapes(problem, policy)

    def chosen(table: Array, Q: Array) -> Array:
        """V [n] from Q [A, n]."""
        if jnp.issubdtype(table.dtype, jnp.integer):
            return jnp.take_along_axis(Q, table[None], axis=0)[0]
        if problem.models.legal is None:
            return jnp.einsum("na,an->n", table, Q)
        return jnp.where(table.T > 0, table.T * Q, 0).sum(0)  # -inf of a policy that takes an action which is not legal

    def below(U: Array, t: int) -> Array:
        if t == len(policy) - 1:
            Q = alpha_maxmin(problem.alpha, _weighted(stage_rewards(problem, t), U), 1)
            return chosen(policy[t], _only_legal(problem, U, Q))
        return chosen(policy[t], _backed_up(problem, U, below(_children(problem, U, t), t + 1), t))

    G = jnp.einsum("ams,ms->am", stage_rewards(problem, 0), problem.models.rho)
    if len(policy) > 1:
        K = joint_kernel(problem, 0)
        U = jnp.einsum("amosu,ms->uamo", K, problem.models.rho)
        G = G + below(U.reshape(len(U), -1), 1).reshape(K.shape[:3]).sum(-1)
    Q = _only_legal(problem, problem.models.rho.max(0)[:, None], alpha_maxmin(problem.alpha, G, 1)[:, None])
    return chosen(next(iter(policy)), Q)[0]
