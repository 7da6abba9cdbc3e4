r"""A POMDP's kernels from logged actions and observations, by expectation maximization (EM).

The log is a hidden Markov model with inputs, the actions: s_0 ~ rho, s_{t+1} ~ P[s_t, a_t], o_t ~ O[a_t, s_{t+1}]. EM (Baum,
Petrie, Soules, Weiss, 1970; with inputs: Bengio, Frasconi, 1995) alternates the expected counts of starts, transitions and
observations under the parameters so far, by the forward-backward recursion

    alpha_{t+1}(u) ~ sum_s alpha_t(s) P(s, a_t, u) O(a_t, u, o_t),   beta_t(s) ~ sum_u P(s, a_t, u) O(a_t, u, o_t) beta_{t+1}(u),

with the parameters that are proportional to these counts plus `prior` / K in each of the K entries of a row. The objective

    log-likelihood + sum over all entries of (prior / K) log(entry),

which is the posterior density under Dirichlet laws up to a constant, never falls from one iteration to the next.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

ITERATIONS = 1000  # at most
TOLERANCE = 1e-8  # EM ends when the objective rises by less than this fraction of it


class Log(NamedTuple):
    """N episodes of at most T steps; what follows the last step of an episode has no effect."""

    actions: Array  # [T, N] int32
    observations: Array  # [T, N] int32
    steps: Array  # [T, N] bool: whether the episode has this step


class Parameters(NamedTuple):
    """The laws of the model, or the expected counts of what they generate."""

    rho: Array  # [S] first state
    P: Array  # [S, A, S] next state
    O: Array  # [A, S, O] observation after an action, given the state it led to


class Fit(NamedTuple):
    """The end of one run of EM."""

    parameters: Parameters
    log_likelihood: Array  # [] of these parameters
    objective: Array  # []
    iterations: Array  # []


def expected_counts(parameters: Parameters, log: Log) -> tuple[Array, Parameters, Array]:
    """The log-likelihood [], the expected counts, and the law of the state before each step given the whole episode [T, N, S]."""
    rho, P, O = parameters
    P = P.swapaxes(0, 1)  # [A, S, S]

    def forward(alpha: Array, at: Log) -> tuple[Array, tuple[Array, Array]]:
        joint = jnp.einsum("ns,nsu->nu", alpha, P[at.actions]) * O[at.actions, :, at.observations]
        mass = joint.sum(-1)
        return jnp.where(at.steps[:, None], joint / mass[:, None], alpha), (alpha, mass)

    start = jnp.broadcast_to(rho, (log.actions.shape[1], len(rho)))
    _, (alphas, masses) = lax.scan(forward, start, log)

    def backward(carry: tuple[Array, Array, Array], at: tuple[Log, Array, Array]) -> tuple[tuple[Array, Array, Array], Array]:
        beta, transitions, emissions = carry
        step, alpha, mass = at
        ahead = O[step.actions, :, step.observations] * beta / mass[:, None]
        pairs = alpha[:, :, None] * P[step.actions] * ahead[:, None] * step.steps[:, None, None]  # [N, S, S]
        transitions = transitions.at[step.actions].add(pairs)
        emissions = emissions.at[step.actions, step.observations].add(pairs.sum(1))
        before = jnp.where(step.steps[:, None], jnp.einsum("nsu,nu->ns", P[step.actions], ahead), beta)
        return (before, transitions, emissions), pairs.sum(2)

    A, S, num_observations = O.shape
    zeros = (jnp.ones_like(start), jnp.zeros((A, S, S)), jnp.zeros((A, num_observations, S)))
    (_, transitions, emissions), states = lax.scan(backward, zeros, (log, alphas, masses), reverse=True)
    counts = Parameters(rho=states[0].sum(0), P=transitions.swapaxes(0, 1), O=emissions.swapaxes(1, 2))
    return jnp.where(log.steps, jnp.log(masses), 0).sum(), counts, states


def maximized(counts: Parameters, prior: Array) -> Parameters:
    """The parameters with the highest objective for these counts."""

    def law(count: Array) -> Array:
        count = count + prior / count.shape[-1]
        return count / count.sum(-1, keepdims=True)

    return Parameters(*map(law, counts))


def log_prior(parameters: Parameters, prior: Array) -> Array:
    """The part of the objective that is not the log-likelihood."""
    return sum((prior / x.shape[-1] * jnp.log(x).sum() for x in parameters), jnp.zeros(()))


@partial(jax.jit, static_argnames="iterations")
def maximize(parameters: Parameters, log: Log, prior: Array, iterations: int = ITERATIONS) -> Fit:
    """Run EM from these parameters until the objective hardly rises any more, or for a number of iterations."""

    def expect(parameters: Parameters) -> tuple[Array, Parameters]:
        likelihood, counts, _ = expected_counts(parameters, log)
        return likelihood, counts

    def step(carry: tuple) -> tuple:
        fit, counts, _ = carry
        parameters = maximized(counts, prior)
        likelihood, counts = expect(parameters)
        objective = likelihood + log_prior(parameters, prior)
        done = objective - fit.objective <= TOLERANCE * jnp.abs(objective)
        return Fit(parameters, likelihood, objective, fit.iterations + 1), counts, done

    likelihood, counts = expect(parameters)
    first = Fit(parameters, likelihood, likelihood + log_prior(parameters, prior), jnp.zeros((), int))
    fit, *_ = lax.while_loop(
        lambda carry: ~carry[2] & (carry[0].iterations < iterations), step, (first, counts, jnp.zeros((), bool))
    )
    return fit


smooth = jax.jit(expected_counts)


def initial_parameters(rng: np.random.Generator, states: int, seen: np.ndarray) -> Parameters:
    """Random parameters: states that tend to stay, and observations around their frequencies `seen` [A, O]."""
    A, O = seen.shape
    frequencies = (seen + 1) / (seen + 1).sum(-1, keepdims=True)
    stay = np.eye(states)[:, None]
    return Parameters(
        rho=jnp.asarray(rng.dirichlet(np.ones(states))),
        P=jnp.asarray(0.5 * stay + 0.5 * rng.dirichlet(np.ones(states), (states, A))),
        O=jnp.asarray(0.5 * frequencies[:, None] + 0.5 * rng.dirichlet(np.ones(O), (A, states))),
    )
