"""Dynamic programming for finite-horizon MDPs, one problem per call; `solve_many` maps a solver over a stack.

    Q_h(s, a) = r_h(s, a) + sum_{s'} P_h(s' | s, a) V_{h+1}(s'),   V_h = max_a Q_h,   V_{H+1} = 0

There is no discount factor: fold gamma^h into the rewards.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array

from lindm.types import MDP, LinearMDP, Plan, at_stage, only_legal

BATCH_BYTES = 48 << 10  # of the problems that `solve_many` solves together on a CPU: the first-level cache of a core


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


@jax.jit
def optimal_policy(mdp: MDP) -> tuple[Array, Array]:
    """V [H, S] and pi [H, S] of `backward_induction`, without the action values: they are a fifth of its memory at A = 5."""
    _check_shapes(mdp)

    def choose(Q: Array) -> tuple[Array, Array]:
        return Q.max(-1), Q.argmax(-1).astype(jnp.int32)

    def stage(V_next: Array, h_r: tuple[Array, Array]):
        h, r = h_r
        V, pi = choose(only_legal(r + at_stage(mdp.P, h) @ V_next, mdp.legal))
        return V, (V, pi)

    last = choose(only_legal(mdp.r[-1], mdp.legal))  # no stage follows: no product
    before = jax.lax.scan(stage, last[0], (_stages(mdp)[:-1], mdp.r[:-1]), reverse=True)[1]
    return jax.tree.map(lambda early, end: jnp.concatenate([early, end[None]]), before, last)


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


def uniform_policy(mdp: MDP) -> Array:
    """Probabilities [H, S, A]: the same for every legal action."""
    legal = jnp.ones(mdp.r.shape[-2:], mdp.r.dtype) if mdp.legal is None else mdp.legal.astype(mdp.r.dtype)
    return jnp.broadcast_to(legal / legal.sum(-1, keepdims=True), mdp.r.shape)


@jax.jit
def policy_value(mdp: MDP, pi: Array) -> Array:
    """V [H, S] of a policy given as action indices [H, S] or as probabilities [H, S, A]."""

    def stage(V_next: Array, h_r_pi: tuple[Array, Array, Array]):
        h, r, weights = h_r_pi
        V = (weights * (r + at_stage(mdp.P, h) @ V_next)).sum(-1)
        return V, V

    stages = (_stages(mdp), mdp.r, _as_stochastic(mdp, pi))
    return jax.lax.scan(stage, jnp.zeros_like(mdp.r[0, :, 0]), stages, reverse=True)[1]


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
    the time of one at a time). On an accelerator the whole stack is one `vmap`.

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
