"""The sampled posterior over models whose state is hidden: against prior models that plain numpy weights, and calibrated."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lindm.evaluation.policies import posterior
from lindm.evaluation.policies.posterior import draw_posterior, effective_size, posterior_size
from lindm.evaluation.policies.prior import draw_models, draw_parameters, models_of
from lindm.families.random_suites import RandomSuite, suite
from lindm.text import Step
from lindm.types import APOMDP, POMDP

HIDDEN = RandomSuite(
    name="pomdp", horizon=2, states=2, actions=2, observations=2, concentration=0.5, quality=0.8, step=0.25, gap=0.05
)
AMBIGUOUS = replace(HIDDEN, name="apomdp", models=2, distance=0.3, alpha=0.7)
DEMONSTRATIONS = [
    [Step(0, observation=1), Step(1, observation=0)],
    [Step(0, observation=0), Step(0, observation=0)],
    [Step(1, observation=1), Step(0, observation=1)],
]


def brute_force(models, demonstrations, epsilon):
    """Of POMDPs with two stages: the action gap or not [K], the probability of the data [K], and Q [K, A] at the start."""
    P, O, r, rho = models["P"], models["O"], models["r"], np.array([0.5, 0.5])
    after = np.einsum("s,ksau,kauo->kaou", rho, P, O)
    below = np.einsum("kaou,kub->kaob", after, r)
    Q = np.einsum("s,ksa->ka", rho, r) + below.max(-1).sum(-1)
    rows, first = np.arange(len(P)), Q.argmax(-1)
    mass, later = after.sum(-1)[rows, first], below[rows, first]
    gaps = np.where(mass >= 0.05, np.abs(later[..., 0] - later[..., 1]) / np.where(mass > 0, mass, 1), np.inf)
    allowed = (np.abs(Q[:, 0] - Q[:, 1]) >= HIDDEN.gap * (1 - 1e-9)) & (gaps.min(-1) >= HIDDEN.gap * (1 - 1e-9))
    probability = np.ones(len(P))
    for one, two in demonstrations:
        U = after[:, one.action, one.observation]
        probability *= (np.einsum("ks,ksu->ku", U, P[:, :, two.action]) * O[:, two.action, :, two.observation]).sum(-1)
        if epsilon is not None:
            best = below[:, one.action, one.observation].argmax(-1)
            for hit in (first == one.action, best == two.action):
                probability *= np.where(hit, 1 - epsilon / 2, epsilon / 2)
    return allowed, probability, Q


def prior_models(count, rng):
    """Tables of the POMDPs of `HIDDEN` without the action gap, by the words of its law."""
    noise = rng.dirichlet([1.0, 1.0], (count, 2))
    return {
        "P": rng.dirichlet([0.5, 0.5], (count, 2, 2)),
        "O": 0.8 * np.eye(2) + 0.2 * noise[:, :, None],
        "r": rng.integers(0, 5, (count, 2, 2)) / 4,
    }


def figures(P, O, r, Q):
    """Functions of K models [K, n]."""
    return np.c_[Q[:, 0] - Q[:, 1], r.reshape(len(r), -1), P[..., 0].reshape(len(P), -1), O[:, :, 0, 0]]


def tables_of(models: APOMDP):
    tables = {name: np.asarray(getattr(models.models, name))[:, 0, 0] for name in ("P", "O", "r")}
    Q = brute_force(tables, [], None)[2]
    return tables, figures(**tables, Q=Q)


@pytest.mark.parametrize("epsilon", [None, 0.2, 0.0])
def test_means_and_spreads_agree_with_weighted_models_of_the_prior(epsilon):
    models = prior_models(400_000, np.random.default_rng(7))
    demonstrations = 3 * (DEMONSTRATIONS if epsilon != 0 else DEMONSTRATIONS[:2])  # the third begins with another action
    allowed, weight, Q = brute_force(models, demonstrations, epsilon)
    weight = weight * allowed / (weight * allowed).sum()
    values = figures(**models, Q=Q)
    mean = weight @ values
    spread = weight @ (values - mean) ** 2
    exact_error = np.sqrt((weight**2) @ (values - mean) ** 2)
    sampled = draw_posterior(HIDDEN, demonstrations, epsilon, 2000, 1)
    found = tables_of(sampled.models)[1]
    assert 100 < sampled.effective <= 2000 and sampled.distinct > 1000
    assert sampled.acceptance is not None and 0.2 < sampled.acceptance < 0.8
    # the effective size is that of action values; half of it leaves room for parameters that mix more slowly
    error = np.hypot(exact_error, np.sqrt(spread / (sampled.effective / 2)))
    assert (np.abs(found.mean(0) - mean) < 5 * error).all()
    np.testing.assert_allclose(found.var(0), spread, rtol=0.35)


def test_every_model_has_the_action_gap_and_repeats_the_demonstrators_without_randomness():
    sampled = draw_posterior(HIDDEN, DEMONSTRATIONS[1:2], 0.0, 100, 2)
    tables, _ = tables_of(sampled.models)
    allowed, probability, _ = brute_force(tables, DEMONSTRATIONS[1:2], 0.0)
    assert allowed.all() and (probability > 0).all()


def test_actions_that_no_model_explains_leave_the_models_with_the_fewest_contradictions():
    """Two demonstrators who are never random start with different actions."""
    sampled = draw_posterior(HIDDEN, [DEMONSTRATIONS[1], DEMONSTRATIONS[2]], 0.0, 64, 2)
    tables, _ = tables_of(sampled.models)
    assert sampled.acceptance is not None and sampled.acceptance > 0
    one, other = (brute_force(tables, [demonstration], 0.0)[1] > 0 for demonstration in (DEMONSTRATIONS[1], DEMONSTRATIONS[2]))
    assert (one ^ other).all()


def test_a_sample_is_a_function_of_its_seed_and_of_the_demonstrations():
    first, again, other = (draw_posterior(HIDDEN, DEMONSTRATIONS, 0.2, 64, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.models.models.P, again.models.models.P)
    assert (first.effective, first.distinct, first.acceptance) == (again.effective, again.distinct, again.acceptance)
    assert not np.array_equal(first.models.models.P, other.models.models.P)


def simulated(rng, epsilon):
    """A model of the prior with the action gap, and demonstrations of it: tables, and steps."""
    while True:
        model = prior_models(1, rng)
        allowed, _, Q = brute_force(model, [], None)
        if allowed[0]:
            break
    P, O, r = (model[name][0] for name in ("P", "O", "r"))
    demonstrations = []
    for _ in range(3):
        s, belief, steps = rng.integers(2), np.array([0.5, 0.5]), []
        for values in (Q[0], None):
            best = (belief @ r if values is None else values).argmax()
            a = int(best if rng.random() >= epsilon else rng.integers(2))
            s = rng.choice(2, p=P[s, a])
            o = int(rng.choice(2, p=O[a, s]))
            belief = belief @ P[:, a] * O[a, :, o]
            steps.append(Step(a, observation=o))
        demonstrations.append(steps)
    return model, demonstrations


def test_the_truth_is_uniformly_ranked_among_the_models_of_its_posterior():
    """Simulation-based calibration (Talts et al., 2018), with the probability of the data as one of the functions."""
    rng, epsilon, ranks = np.random.default_rng(11), 0.3, []
    for replicate in range(200):
        truth, demonstrations = simulated(rng, epsilon)
        sampled = draw_posterior(HIDDEN, demonstrations, epsilon, 100, 1000 + replicate % 4)
        tables, found = tables_of(sampled.models)
        own = figures(**truth, Q=brute_force(truth, [], None)[2])
        found = np.c_[found, brute_force(tables, demonstrations, epsilon)[1]]
        own = np.c_[own, brute_force(truth, demonstrations, epsilon)[1]]
        ties = (found == own).sum(0)
        ranks.append(((found < own).sum(0) + rng.integers(0, ties + 1) + rng.random(found.shape[1])) / (len(found) + 1))
    p_values = [stats.kstest(column, "uniform").pvalue for column in np.array(ranks).T]
    assert min(p_values) > 0.01 / len(p_values)


def test_copies_of_a_model_count_once_and_copies_that_moved_apart_count_all():
    rng = np.random.default_rng(0)
    families = rng.normal(size=(200, 3))
    ancestor = np.repeat(np.arange(200), 5)
    assert effective_size(np.repeat(families, 5, 0), ancestor) == pytest.approx(200, rel=0.02)
    assert effective_size(rng.normal(size=(1000, 3)), ancestor) == pytest.approx(1000, rel=0.15)
    assert effective_size(families, np.zeros(200, int)) == 1.0


@pytest.mark.parametrize("law", [HIDDEN, AMBIGUOUS], ids=lambda law: law.name)
def test_the_law_of_the_parameters_is_that_of_the_suite(law):
    law = replace(law, gap=0.0)
    drawn = draw_models(law, 2000, 0)
    expected = drawn.models if isinstance(drawn, APOMDP) else drawn
    found = models_of(law, draw_parameters(law, 4000, np.random.default_rng(0)))
    assert isinstance(expected, POMDP)
    if isinstance(drawn, APOMDP):
        np.testing.assert_array_equal(found.alpha[:10], drawn.alpha[:10])
    for name in ("P", "O", "r", "rho"):
        one, other = np.asarray(getattr(expected, name)), np.asarray(getattr(found.models, name))
        other = other if isinstance(drawn, APOMDP) else other[:, 0]
        assert one.shape[1:] == other.shape[1:]
        one, other = (x.reshape(len(x), -1) for x in (one, other))
        for power in (1, 2):  # means, and all products of two entries
            pairs = itertools.combinations_with_replacement(range(min(one.shape[1], 12)), power)
            for columns in pairs:
                x, y = (np.prod([z[:, c] for c in columns], axis=0) for z in (one, other))
                error = np.sqrt(x.var() / len(x) + y.var() / len(y))
                assert abs(x.mean() - y.mean()) <= 5 * error + 1e-7


def test_long_tables_of_best_actions_leave_fewer_models():
    assert posterior_size(suite("pomdp", 4), 2000) == posterior.MOVE_ENTRIES // 259
    assert posterior_size(suite("pomdp", 8), 2000) == posterior.FEWEST
    assert posterior_size(suite("pomdp", 4), 50) == 50
