"""EM against the sum over all hidden paths in plain Python, its objective, and known models from simulated logs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.estimation import hidden_states
from lindm.estimation.hidden_states import Log, Parameters, initial_parameters, log_prior, maximize, maximized, smooth

S, A, O = 3, 2, 2
EPISODES = [[(0, 1), (1, 0), (0, 0)], [(1, 1)], [(0, 0), (0, 1)]]  # of steps (action, observation)


def log_of(episodes) -> Log:
    T, N = max(map(len, episodes)), len(episodes)
    actions, observations, steps = np.zeros((T, N), np.int32), np.zeros((T, N), np.int32), np.zeros((T, N), bool)
    for n, episode in enumerate(episodes):
        for t, (a, o) in enumerate(episode):
            actions[t, n], observations[t, n], steps[t, n] = a, o, True
    return Log(*map(jnp.asarray, (actions, observations, steps)))


@pytest.fixture(scope="module")
def parameters():
    return initial_parameters(np.random.default_rng(0), S, np.ones((A, O)))


def enumerated(parameters, episodes):
    """The log-likelihood, and the counts and the laws of the states, each path weighted by its posterior probability."""
    rho, P, emissions = map(np.asarray, parameters)
    total, counts, laws = 0.0, [np.zeros_like(x) for x in (rho, P, emissions)], []
    for episode in episodes:
        weights = {}
        for path in itertools.product(range(S), repeat=len(episode) + 1):
            weight = rho[path[0]]
            for (a, o), s, u in zip(episode, path, path[1:], strict=False):
                weight *= P[s, a, u] * emissions[a, u, o]
            weights[path] = weight
        evidence = sum(weights.values())
        total += np.log(evidence)
        law = np.zeros((len(episode), S))
        for path, weight in weights.items():
            share = weight / evidence
            counts[0][path[0]] += share
            for t, ((a, o), s, u) in enumerate(zip(episode, path, path[1:], strict=False)):
                counts[1][s, a, u] += share
                counts[2][a, u, o] += share
                law[t, s] += share
        laws.append(law)
    return total, counts, laws


def test_likelihood_counts_and_smoothed_states_are_those_of_all_hidden_paths(parameters):
    likelihood, counts, states = smooth(parameters, log_of(EPISODES))
    wanted, wanted_counts, laws = enumerated(parameters, EPISODES)
    np.testing.assert_allclose(likelihood, wanted, rtol=1e-12)
    for found, by_hand in zip(counts, wanted_counts, strict=True):
        np.testing.assert_allclose(found, by_hand, rtol=1e-10, atol=1e-14)
    for n, law in enumerate(laws):
        np.testing.assert_allclose(np.asarray(states)[: len(law), n], law, rtol=1e-10)
        assert not np.asarray(states)[len(law) :, n].any()


def test_an_update_is_proportional_to_counts_and_prior(parameters):
    _, counts, _ = enumerated(parameters, EPISODES)
    new = maximized(Parameters(*map(jnp.asarray, counts)), jnp.asarray(0.5))
    np.testing.assert_allclose(new.rho, (counts[0] + 0.5 / S) / (len(EPISODES) + 0.5), rtol=1e-12)
    np.testing.assert_allclose(new.O[1, 2], (counts[2][1, 2] + 0.5 / O) / (counts[2][1, 2].sum() + 0.5), rtol=1e-12)


def simulate(rng, model: Parameters, episodes: int, steps: int):
    rho, P, emissions = map(np.asarray, model)
    logs = []
    for _ in range(episodes):
        s, episode = rng.choice(len(rho), p=rho), []
        for _ in range(steps):
            a = rng.integers(P.shape[1])
            s = rng.choice(len(rho), p=P[s, a])
            episode.append((int(a), int(rng.choice(emissions.shape[-1], p=emissions[a, s]))))
        logs.append(episode)
    return logs


@pytest.mark.parametrize("prior", [1e-9, 2.0])
def test_the_objective_never_falls(parameters, prior):
    """With almost no prior it is the likelihood."""
    log = log_of(simulate(np.random.default_rng(1), parameters, 20, 6))
    at = initial_parameters(np.random.default_rng(3), S, np.ones((A, O)))
    objectives, likelihoods = [], []
    for _ in range(40):
        likelihood, counts, _ = smooth(at, log)
        likelihoods.append(float(likelihood))
        objectives.append(float(likelihood + log_prior(at, jnp.asarray(prior))))
        at = maximized(counts, jnp.asarray(prior))
    rises = np.diff(objectives)
    assert (rises > -1e-9).all() and objectives[-1] - objectives[0] > 0.5
    if prior < 1e-6:
        np.testing.assert_allclose(likelihoods[1:], objectives[1:], atol=1e-5)
    fit = maximize(initial_parameters(np.random.default_rng(3), S, np.ones((A, O))), log, jnp.asarray(prior))
    assert float(fit.objective) >= objectives[-1] - 1e-6 * abs(objectives[-1]) and 0 < int(fit.iterations) <= 1000
    likelihood, _, _ = smooth(fit.parameters, log)
    np.testing.assert_allclose(fit.log_likelihood, likelihood, rtol=1e-12)


def test_the_gradient_of_the_likelihood_is_that_of_its_counts(parameters):
    """Fisher's identity: theta d log L / d theta = expected counts, by automatic differentiation of the forward recursion."""
    log = log_of(EPISODES)
    gradient = jax.grad(lambda x: hidden_states.expected_counts(x, log)[0])(parameters)
    _, counts, _ = smooth(parameters, log)
    for value, slope, count in zip(parameters, gradient, counts, strict=True):
        np.testing.assert_allclose(value * slope, count, rtol=1e-9, atol=1e-12)


def test_a_known_model_is_found_again_up_to_the_order_of_its_states():
    truth = Parameters(
        rho=np.array([0.9, 0.1]),
        P=np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.3, 0.7], [0.95, 0.05]]]),
        O=np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.1, 0.9]]]),
    )
    episodes = simulate(np.random.default_rng(5), truth, 1500, 8)
    log, rng = log_of(episodes), np.random.default_rng(7)
    seen = np.zeros((2, 2))
    for a, o in itertools.chain(*episodes):
        seen[a, o] += 1
    fits = [maximize(initial_parameters(rng, 2, seen), log, jnp.asarray(1.0)) for _ in range(4)]
    best = max(fits, key=lambda fit: float(fit.objective))
    assert float(best.log_likelihood) >= float(smooth(Parameters(*map(jnp.asarray, truth)), log)[0]) - 1
    errors = []
    for order in ([0, 1], [1, 0]):
        found = [np.asarray(x) for x in best.parameters]
        moved = (found[0][order], found[1][order][:, :, order], found[2][:, order])
        errors.append(max(np.abs(x - y).max() for x, y in zip(moved, truth, strict=True)))
    assert min(errors) < 0.06 < max(errors)
