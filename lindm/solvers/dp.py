"""Dynamic programming for finite-horizon MDPs, one problem per call; `solve_many` maps a solver over a stack.

    Q_h(s, a) = r_h(s, a) + sum_{s'} P_h(s' | s, a) V_{h+1}(s'),   V_h = max_a Q_h,   V_{H+1} = 0

There is no discount factor: fold gamma^h into the rewards.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lindm.types import MDP, LinearMDP, Plan, at_stage, in_given_precision, only_legal

SETTLING_BYTES = 256 << 10  # of a kernel from which on it pays to ask, at every stage, whether the actions have settled
BATCH_BYTES = 48 << 10  # of the problems that `solve_many` solves together on a CPU: the first-level cache of a core


@in_given_precision
@jax.jit
def backward_induction(mdp: MDP) -> Plan:
    """Optimal values, action values and an optimal policy (argmax) of one MDP."""
    _check_shapes(mdp)

    def stage(V_next: Array, h_r: tuple[Array, Array]):
        h, r = h_r
        Q = only_legal(r + at_stage(mdp.P, h) @ V_next, mdp.legal)
        return Q.max(-1), Q

    last = only_legal(mdp.r[-1], mdp.legal)  # no stage follows: no product
    before = jax.lax.scan(stage, last.max(-1), (_stages(mdp)[:-1], mdp.r[:-1]), reverse=True)[1]
    Q = jnp.concatenate([before, last[None]])
    return Plan(V=Q.max(-1), Q=Q, pi=Q.argmax(-1).astype(jnp.int32))


@in_given_precision
@jax.jit
def optimal_policy(mdp: MDP) -> tuple[Array, Array]:
    """V [H, S] and pi [H, S] of `backward_induction`, without the action values: they are a fifth of its memory at A = 5.

    In a large model whose stages are all the same, the best actions far from the end no longer change, and most products are
    with their rows alone: see `_stages_until_settled`.
    """
    _check_shapes(mdp)
    if mdp.P.shape[0] == 1 and mdp.P.nbytes >= SETTLING_BYTES:
        return _follow(mdp, *_stages_until_settled(mdp))

    def choose(Q: Array) -> tuple[Array, Array]:
        return Q.max(-1), Q.argmax(-1).astype(jnp.int32)

    def stage(V_next: Array, h_r: tuple[Array, Array]):
        h, r = h_r
        V, pi = choose(only_legal(r + at_stage(mdp.P, h) @ V_next, mdp.legal))
        return V, (V, pi)

    last = choose(only_legal(mdp.r[-1], mdp.legal))  # no stage follows: no product
    before = jax.lax.scan(stage, last[0], (_stages(mdp)[:-1], mdp.r[:-1]), reverse=True)[1]
    return jax.tree.map(lambda early, end: jnp.concatenate([early, end[None]]), before, last)


def _stages_until_settled(mdp: MDP) -> tuple[Array, Array, Array]:
    """Backward induction until the actions of all earlier stages are known: V and pi [H, S], filled after stage h, and h.

    With one kernel and one reward for all stages, d = V_h - V_{h+1} bounds all earlier differences: min d <= V_k - V_{k+1} <=
    max d for k < h, because the Bellman operator is monotone and adds a constant to what it is given one. So until stage 0 the
    action values of a state move by h (max d - min d) against each other at most, and where every best action leads by more,
    it stays the best (the elimination of actions of MacQueen, Oper. Res. 15, 1967, for all earlier stages at once). Rows of P
    that sum to 1 + e, and rounding, are added to that bound. h is -1 if the actions did not settle.
    """
    H, S, A = mdp.r.shape
    P, r = mdp.P[0], only_legal(mdp.r, mdp.legal)
    ones = jax.lax.optimization_barrier(jnp.ones(S, P.dtype))  # XLA compiles a sum over the last axis to a slow loop
    row_error = jnp.abs(P @ ones - 1).max()
    rounding = 4 * H * S * jnp.finfo(P.dtype).eps * jnp.abs(mdp.r[-1]).max()
    same_rewards = jnp.abs(mdp.r - mdp.r[-1:]).max() == 0

    def stage(carry: Any):
        V_next, h, _, (V, pi) = carry
        Q = _row(r, h) + P @ V_next
        best, action = Q.max(-1), Q.argmax(-1).astype(jnp.int32)
        others = jnp.where(jax.nn.one_hot(action, A, dtype=bool), -jnp.inf, Q)
        d = best - V_next
        lead, low, minus_high = jnp.stack([best - others.max(-1), d, -d]).min(-1)  # one reduction is one kernel
        drift = 2 * (h + 1) * row_error * (1 + row_error) ** h * jnp.maximum(-low, -minus_high)
        settled = same_rewards & (lead > (h + 1) * (-minus_high - low + drift + rounding))
        return best, h - 1, settled, (_set_row(V, best, h), _set_row(pi, action, h))

    last = r[-1].max(-1), r[-1].argmax(-1).astype(jnp.int32)
    filled = jax.tree.map(lambda row: _set_row(jnp.zeros((H, S), row.dtype), row, H - 1), last)
    start = last[0], jnp.int32(H - 2), jnp.asarray(False), filled
    _, h, _, (V, pi) = jax.lax.while_loop(lambda carry: (carry[1] >= 0) & ~carry[2], stage, start)
    return V, pi, h


def _follow(mdp: MDP, V: Array, pi: Array, h: Array) -> tuple[Array, Array]:
    """The stages up to h of V and pi [H, S], with the actions of stage h + 1: products of [S, S] in place of [S, A, S]."""
    states, actions = jnp.arange(pi.shape[1]), _row(pi, h + 1)
    P, r = mdp.P[0, states, actions], mdp.r[0, states, actions]

    def stage(carry: tuple[Array, Array, Array]):
        V_next, h, V = carry
        here = r + P @ V_next
        return here, h - 1, _set_row(V, here, h)

    V = jax.lax.while_loop(lambda carry: carry[1] >= 0, stage, (_row(V, h + 1), h, V))[2]
    return V, jnp.where(jnp.arange(len(pi))[:, None] <= h, actions[None], pi)


def _row(x: Array, h: ArrayLike) -> Array:
    return jax.lax.dynamic_index_in_dim(x, h, keepdims=False)


def _set_row(x: Array, row: Array, h: ArrayLike) -> Array:
    """`x.at[h].set(row)`, which costs three more kernels for indices out of bounds."""
    return jax.lax.dynamic_update_index_in_dim(x, row, h, 0)


@in_given_precision
@jax.jit
def plan_linear(problem: LinearMDP) -> tuple[Plan, Array]:
    """Backward induction in R^d: the plan and w [H, d] with Q*_h(s, a) = <phi(s, a), w_h>, exactly linear in the features.

    w_h = theta_h + sum_{s'} mu_h(s') V_{h+1}(s')
    """
    H, S, A, d = problem.horizon, problem.num_states, problem.num_actions, problem.num_features
    chex.assert_shape([problem.phi, problem.mu, problem.theta], [(S, A, d), (H, d, S), (H, d)])

    def stage(V_next: Array, mu_theta: tuple[Array, Array]):
        mu, theta = mu_theta
        w = theta + mu @ V_next
        Q = problem.phi @ w
        V = Q.max(-1)
        return V, (Plan(V=V, Q=Q, pi=Q.argmax(-1).astype(jnp.int32)), w)

    return jax.lax.scan(stage, jnp.zeros_like(problem.mu[0, 0]), (problem.mu, problem.theta), reverse=True)[1]


def _check_shapes(mdp: MDP) -> None:
    """AssertionError unless this is one MDP, without leading axes."""
    H, S, A = mdp.horizon, mdp.num_states, mdp.num_actions
    chex.assert_shape(mdp.r, (H, S, A))
    chex.assert_shape(mdp.P, ({1, H}, S, A, S))
    chex.assert_shape(mdp.rho, (S,))


def _stages(mdp: MDP) -> Array:
    return jnp.arange(mdp.horizon)


def _as_stochastic(mdp: MDP, pi: Array) -> Array:
    """Probabilities [H, S, A] of a policy given as action indices [H, S] or as probabilities."""
    _check_shapes(mdp)
    A = mdp.num_actions
    chex.assert_shape(pi, mdp.r.shape[: pi.ndim])
    return pi.astype(mdp.r.dtype) if pi.ndim == mdp.r.ndim else jax.nn.one_hot(pi, A, dtype=mdp.r.dtype)


@in_given_precision
def uniform_policy(mdp: MDP) -> Array:
    """Probabilities [H, S, A]: the same for every legal action."""
    legal = jnp.ones(mdp.r.shape[-2:], mdp.r.dtype) if mdp.legal is None else mdp.legal.astype(mdp.r.dtype)
    return jnp.broadcast_to(legal / legal.sum(-1, keepdims=True), mdp.r.shape)


@in_given_precision
@jax.jit
def policy_value(mdp: MDP, pi: Array) -> Array:
    """V [H, S] of a policy given as action indices [H, S] or as probabilities [H, S, A]."""

    def stage(V_next: Array, h_r_pi: tuple[Array, Array, Array]):
        h, r, weights = h_r_pi
        V = (weights * (r + at_stage(mdp.P, h) @ V_next)).sum(-1)
        return V, V

    stages = (_stages(mdp), mdp.r, _as_stochastic(mdp, pi))
    return jax.lax.scan(stage, jnp.zeros_like(mdp.r[0, :, 0]), stages, reverse=True)[1]


@in_given_precision
@jax.jit
def occupancy(mdp: MDP, pi: Array) -> Array:
    """d [H, S]: the probability of being in s at stage h when following `pi` from the first-state law."""

    def stage(d: Array, h_pi: tuple[Array, Array]):
        h, weights = h_pi
        return jnp.einsum("s,sa,sat->t", d, weights, at_stage(mdp.P, h)), d

    return jax.lax.scan(stage, mdp.rho, (_stages(mdp), _as_stochastic(mdp, pi)))[1]


def solve_many(solver: Callable, problems, *args, batch_size: int | None = None):
    """Map `solver` over the leading axis of `problems` (and of `args`), a few at a time.

    On a CPU a problem should stay in cache for all its stages: `vmap` reads the whole stack from memory at every stage, and XLA
    compiles a stack of matrix-vector products to a slow loop. So large problems are solved one at a time (at S = 50 in a third of
    the time of `vmap`), and small ones in batches of `BATCH_BYTES`, which share the cost of a loop step (at S = 3 in a third of
    the time of one at a time). A loop step copies its problem: problems of megabytes take less memory, and no more time, by one
    call of the solver each. On an accelerator the whole stack is one `vmap`.

    Args:
      batch_size: problems solved together, for a solver that needs much more memory than its problem. A number that does
        not divide the stack copies it.
    """
    count = len(jax.tree.leaves(problems)[0])
    if batch_size is None:
        bytes_each = sum(leaf.nbytes for leaf in jax.tree.leaves((problems, args))) // max(count, 1)
        most = min(BATCH_BYTES // max(bytes_each, 1), count) if jax.default_backend() == "cpu" else count
        batch_size = next((size for size in range(most, 1, -1) if count % size == 0), 1)
    if batch_size == 1:  # without a batch axis of length one, XLA compiles a matrix-vector product
        return jax.lax.map(lambda both: solver(both[0], *both[1]), (problems, args))
    if batch_size >= count:
        return jax.vmap(solver)(problems, *args)
    return jax.lax.map(lambda both: solver(both[0], *both[1]), (problems, args), batch_size=batch_size)
