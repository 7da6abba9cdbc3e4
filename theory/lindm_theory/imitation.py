r"""Imitation with the log-loss: the loss of value of a policy from the probability that it leaves the expert's actions.

Expert pi [H, S] (deterministic), imitator q [H, S, A] (probabilities). On a trajectory of the expert the log-loss is
ell = -sum_h log q_h(pi_h|s_h), and exp(-ell) is the probability that the imitator takes all of the expert's actions. With E over
these trajectories,

    deviation  p = 1 - E exp(-ell),      log-loss  E ell = KL(P_pi || P_q),      Hellinger  D^2 = 2 - 2 E exp(-ell/2),

    V^pi - V^q <= R p,      D^2/2 <= p <= D^2 <= E ell,      p <= 1 - exp(-E ell) <= E ell,

where R is a range of the *total* return, so nothing grows with the horizon (derived here; cf. [FBM] Foster, Block, Misra, arXiv
2407.15007). All expectations are exact, by dynamic programming. Shapes: P [H, S, A, S], r [H, S, A], rho [S]; arrays of one task,
`vmap` over tasks. Proofs: notes/imitation.md.
"""

import jax
import jax.numpy as jnp
from jax import Array


def _on_expert(x: Array, expert: Array) -> Array:
    """x[h, s, pi_h(s)] of x [H, S, A, ...]."""
    index = expert.reshape(*expert.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=2).squeeze(2)


def _probabilities(policy: Array, A: int, dtype) -> Array:
    """[H, S, A] of a policy [H, S] or [H, S, A]."""
    return jax.nn.one_hot(policy, A, dtype=dtype) if policy.ndim == 2 else policy


def _sum_over_trajectories(P: Array, rho: Array, factor: Array) -> Array:
    """Sum over trajectories of rho(s_1) prod_h factor_h(s_h, a_h) P_h(s_{h+1}|s_h, a_h); factor [H, S, A]  -> []."""

    def stage(f: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        kernel, c = at
        return jnp.sum(c * (kernel @ f), axis=-1), None

    return rho @ jax.lax.scan(stage, jnp.ones_like(rho), (P, factor), reverse=True)[0]


def deviation_probability(P: Array, rho: Array, expert: Array, imitator: Array) -> Array:
    """p = 1 - E_pi prod_h q_h(pi_h|s_h): the probability that the imitator ever takes another action than the expert (ours).

    It is the total variation distance of the two laws of trajectories.  expert [H, S], imitator [H, S, A] -> [].
    """
    return 1.0 - _sum_over_trajectories(P, rho, _probabilities(expert, P.shape[2], P.dtype) * imitator)


def squared_hellinger(P: Array, rho: Array, expert: Array, imitator: Array) -> Array:
    """D^2 = sum over trajectories of (sqrt P_pi - sqrt P_q)^2; expert [H, S] or [H, S, A], imitator [H, S, A] -> [].

    For a deterministic expert D^2/2 <= p <= D^2.
    """
    return 2.0 - 2.0 * _sum_over_trajectories(P, rho, jnp.sqrt(_probabilities(expert, P.shape[2], P.dtype) * imitator))


def trajectory_log_loss(P: Array, rho: Array, expert: Array, imitator: Array) -> Array:
    """E_pi[-sum_h log q_h(pi_h|s_h)] = KL(P_pi || P_q): what supervised fine-tuning on expert trajectories minimizes.  -> []."""

    def stage(L: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        kernel, loss = at
        return loss + kernel @ L, None

    loss = -jnp.log(_on_expert(imitator, expert))
    first, _ = jax.lax.scan(stage, jnp.zeros_like(rho), (_on_expert(P, expert), loss), reverse=True)
    return rho @ first


def _extreme(P: Array, r: Array, largest: bool) -> Array:
    """The largest (smallest) reward-to-go V_h(s) [H, S] over actions and over next states of positive probability."""
    best = jnp.max if largest else jnp.min
    never = -jnp.inf if largest else jnp.inf

    def stage(V: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        kernel, reward = at
        V = best(reward + best(jnp.where(kernel > 0, V, never), axis=-1), axis=-1)
        return V, V

    return jax.lax.scan(stage, jnp.zeros_like(r[0, :, 0]), (P, r), reverse=True)[1]


def return_range(P: Array, r: Array, rho: Array) -> Array:
    """R: the largest minus the smallest total reward of a trajectory of positive probability (of any policy).  -> []."""
    top, low = _extreme(P, r, largest=True)[0], _extreme(P, r, largest=False)[0]
    return jnp.max(jnp.where(rho > 0, top, -jnp.inf)) - jnp.min(jnp.where(rho > 0, low, jnp.inf))


def regret_range(P: Array, r: Array, rho: Array, expert: Array) -> Array:
    """R' = max over stages, states that the expert visits, and other actions a, of V^pi_h(s) - min_q Q^q_h(s, a) (ours).  -> [].

    What one deviation can cost in the mean, if the worst policy follows it: V^pi - V^q <= R' p, often far below R p. It can be
    negative where the expert is not optimal; then no deviation hurts.
    """

    def stage(V: tuple[Array, Array], at: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        of_expert, worst = V
        kernel, reward, a = at
        Q = reward + kernel @ worst
        chosen = jax.nn.one_hot(a, reward.shape[-1], dtype=bool)
        of_expert = jnp.sum(jnp.where(chosen, reward + kernel @ of_expert, 0), axis=-1)
        cost = jnp.max(jnp.where(chosen, -jnp.inf, of_expert[:, None] - Q), axis=-1)
        return (of_expert, jnp.min(Q, axis=-1)), cost

    zero = jnp.zeros_like(rho)
    _, cost = jax.lax.scan(stage, (zero, zero), (P, r, expert), reverse=True)

    def visit(seen: Array, kernel: Array) -> tuple[Array, Array]:
        return jnp.any((kernel > 0) & seen[:, None], axis=0), seen

    _, seen = jax.lax.scan(visit, rho > 0, _on_expert(P, expert))
    return jnp.max(jnp.where(seen, cost, -jnp.inf))


def first_deviation_loss(P: Array, r: Array, rho: Array, expert: Array, imitator: Array) -> Array:
    """V^pi - V^q = sum_h E_pi[ prod_{k<h} q_k(pi_k|s_k) sum_{a != pi_h} q_h(a|s_h) (V^pi_h(s_h) - Q^q_h(s_h, a)) ] (ours).

    -> []. The identity behind `regret_range`: only the first deviation counts, and it costs one trajectory, whatever H.
    """

    def stage(carry: tuple[Array, Array, Array], at) -> tuple[tuple[Array, Array, Array], None]:
        of_expert, of_imitator, lost = carry  # lost: the sum over later stages, given no deviation before
        kernel, reward, a, q = at
        chosen = jax.nn.one_hot(a, reward.shape[-1], dtype=bool)

        def at_expert(x: Array) -> Array:
            return jnp.sum(jnp.where(chosen, x, 0), axis=-1)

        Q = reward + kernel @ of_imitator
        of_expert = at_expert(reward + kernel @ of_expert)
        now = jnp.sum(jnp.where(chosen, 0, q * (of_expert[:, None] - Q)), axis=-1)
        lost = now + at_expert(q) * at_expert(kernel @ lost)
        return (of_expert, jnp.sum(q * Q, axis=-1), lost), None

    zero = jnp.zeros_like(rho)
    (_, _, lost), _ = jax.lax.scan(stage, (zero, zero, zero), (P, r, expert, imitator), reverse=True)
    return rho @ lost


def log_loss_bound(value_range: Array | float, log_loss: Array) -> Array:
    """V^pi - V^q <= R (1 - exp(-E ell)), E ell the log-loss of a *trajectory*: the sum over stages, not their mean (ours).

    Attained where any deviation costs R and ell is the same on all trajectories.  `value_range` is R of `return_range` or R' of
    `regret_range`; both [...] -> [...].
    """
    return value_range * -jnp.expm1(-log_loss)


def greedy_log_loss_bound(value_range: Array | float, log_loss: Array) -> Array:
    """V^pi - V^greedy <= R min(1, E ell / log 2) for the policy that takes the likeliest action of q (ours).  [...] -> [...].

    Where it errs, q gives the expert's action at most 1/2, so ell >= log 2 on such a trajectory. A bound of this size is needed:
    q = 1/2 - 0 on a fraction of the trajectories and 1 elsewhere attains it.
    """
    return value_range * jnp.minimum(1.0, log_loss / jnp.log(2.0))


def stochastic_expert_bound(value_range: Array | float, hellinger: Array) -> Array:
    """|V^pi - V^q| <= R D sqrt(1 - D^2/4) for a stochastic expert; hellinger is D^2 (derived here; cf. [FBM]).  [...] -> [...].

    First order in D, where a deterministic expert pays D^2: soft labels cost a square root.
    """
    return value_range * jnp.sqrt(hellinger * (1.0 - hellinger / 4.0))


def classical_bound(stage_deviation: Array, reward_range: Array | float) -> Array:
    """V^pi - V^q <= sum_h (H - h + 1) c e_h, e_h = E_pi[1 - q_h(pi_h|s_h)], c the range of one reward (folklore).  [H] -> [].

    It charges a deviation with the worst reward of every later stage: of order H^2 at equal e_h. R p is at most R sum_h e_h, of
    order H if R has a fixed size.
    """
    H = stage_deviation.shape[-1]
    return reward_range * jnp.sum(stage_deviation * jnp.arange(H, 0, -1), axis=-1)


def stage_deviations(P: Array, rho: Array, expert: Array, imitator: Array) -> Array:
    """e_h = E_pi[1 - q_h(pi_h|s_h)], under the expert's own law of states: p <= sum_h e_h.  -> [H]."""

    def visit(d: Array, kernel: Array) -> tuple[Array, Array]:
        return d @ kernel, d

    _, occupancy = jax.lax.scan(visit, rho, _on_expert(P, expert))
    return jnp.sum(occupancy * (1.0 - _on_expert(imitator, expert)), axis=-1)


def maximum_likelihood_bound(value_range: Array | float, policies: Array | int, n: Array | int, delta: float) -> Array:
    """R min(1, 2 log(K/delta)/n): with probability >= 1 - delta the policy of largest likelihood loses less (cf. [FBM]).

    Derived here. n trajectories of a deterministic expert in a class of K policies. The horizon enters through K alone: log K
    grows with it if every stage has parameters of its own.
    """
    return value_range * jnp.minimum(1.0, 2.0 * jnp.log(policies / delta) / n)


def soft_label_price(temperature: Array | float, actions: int, H: int) -> Array:
    """V* - V^soft <= H T u for the policy softmax(Q*/T), u e^u = (A - 1)/e, u < log A (ours).  -> [].

    Attained in every stage where all other actions are (1 + u) T below the best one.
    """

    def newton(_: int, u: Array) -> Array:
        return u - (u + jnp.log(u) - level) / (1 + 1 / u)

    level = jnp.log(jnp.asarray(actions - 1.0)) - 1.0
    u = jax.lax.fori_loop(0, 30, newton, jnp.log1p(jnp.exp(level)))
    return H * temperature * u


def least_squares_weights(w: Array, S: Array, weights: Array) -> Array:
    """A = (sum c w S')(sum c S S')^{-1}: the squared loss on Q over a finite set of contexts, whatever the law of the queries.

    w and S [n, d], weights c [n] -> [d, d]. Cross-entropy on soft labels softmax(Q*/T), with the same queries for every context,
    tends to the same greedy policy at these queries as T grows (ours): with n actions
    KL(softmax(Q/T) || softmax(f/T)) = sum_a (Q - f, centered over the actions)^2 / (2 n T^2) + O(T^-3).
    """
    return jnp.linalg.solve((S * weights[:, None]).T @ S, (S * weights[:, None]).T @ w).T
