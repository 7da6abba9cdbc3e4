"""The Bayes policies: against posteriors and plans that are computed another way."""

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.datasets import Dataset, DatasetConfig, make_dataset
from lindm.datasets.generate import TaskGenerator
from lindm.evaluation import compare
from lindm.evaluation.environments import PolicyTask, double_precision, environment
from lindm.evaluation.policies import bayes_hidden, registry
from lindm.evaluation.policies.bayes_adaptive import bayes_adaptive_values
from lindm.evaluation.policies.bayes_evidence import action_evidence, normalized_weights
from lindm.evaluation.policies.bayes_mdp import MeanPlanning, SampledPosterior, reward_values
from lindm.evaluation.policies.bayes_policies import Bayes, BayesDemo
from lindm.evaluation.policies.posterior import draw_posterior
from lindm.evaluation.policies.prior import draw_models
from lindm.evaluation.policy import Observation
from lindm.families.random_suites import RandomSuite
from lindm.families.suites import Suite
from lindm.problems.mdp import mdp
from lindm.problems.pomdp import pomdp
from lindm.text import Step
from lindm.types import MDP, POMDP

SEEN = RandomSuite(name="mdp", horizon=3, states=2, actions=2, concentration=0.5, step=0.25)
HIDDEN = replace(SEEN, name="pomdp", observations=2, quality=0.8)
AMBIGUOUS = replace(HIDDEN, name="apomdp", models=2, distance=0.3, alpha=0.7)
DEMONSTRATIONS = [
    [Step(0, state=0, reward=0.25), Step(1, state=1, reward=0.75), Step(0, state=0, reward=0.25)],
    [Step(0, state=0, reward=0.25), Step(0, state=0, reward=0.25), Step(1, state=1, reward=0.75)],
]


@pytest.fixture(scope="module")
def seen_task():
    with double_precision():
        problem = mdp(np.full((1, 2, 2, 2), 0.5), np.zeros((3, 2, 2)), [0.5, 0.5])
        return PolicyTask(environment=environment(problem), demonstrations=DEMONSTRATIONS)


@pytest.fixture(scope="module")
def hidden_task():
    with double_precision():
        problem = pomdp(np.full((1, 2, 2, 2), 0.5), np.full((1, 2, 2, 2), 0.5), np.zeros((3, 2, 2)), [0.5, 0.5])
        steps = [[Step(0, observation=1), Step(1, observation=0), Step(0, observation=0)]]
        return PolicyTask(environment=environment(problem), demonstrations=steps)


def first_decision(policy, task):
    """Action values [S, A] at the first stage, after `Policy.step`."""
    zeros = np.zeros(2, int)
    state, _ = policy.step(policy.init([task]), Observation(stage=0, task=zeros, parent=zeros, state=np.arange(2)))
    return state


def counted(rewards=True):
    """Dirichlet parameters and mean rewards after the demonstrations, step by step."""
    parameters, mean = np.full((2, 2, 2), 0.5), np.full((2, 2), 0.5)
    for steps in DEMONSTRATIONS:
        for step, after in itertools.pairwise([*steps, None]):
            if rewards:
                mean[step.state, step.action] = step.reward
            if after is not None:
                parameters[step.state, step.action, after.state] += 1
    return parameters, mean


def value_of(parameters, mean, state, stages):
    """Q [A] in the MDP of the posterior means, by a recursion over single states."""
    law = parameters[state] / parameters[state].sum(-1, keepdims=True)
    if stages == 1:
        return mean[state]
    V = np.array([value_of(parameters, mean, u, stages - 1).max() for u in range(len(mean))])
    return mean[state] + law @ V


@pytest.mark.parametrize("rewards", [True, False])
def test_posterior_mean_planning_follows_counts_and_rewards_of_the_demonstrations(seen_task, rewards):
    state = first_decision(MeanPlanning(SEEN, rewards=rewards), seen_task)
    expected = [value_of(*counted(rewards), s, 3) for s in range(2)]
    np.testing.assert_allclose(state.Q, expected, rtol=1e-12)


def test_the_episode_so_far_is_data(seen_task):
    policy = MeanPlanning(SEEN)
    zeros, stay = np.zeros(2, int), np.arange(2)
    state = first_decision(policy, seen_task)
    # in both states action 1 with reward 1, and the state stays: the row of the kernel that was seen decides again
    later = Observation(stage=1, task=zeros, parent=stay, state=stay, action=np.ones(2, int), reward=np.ones(2))
    state, probabilities = policy.step(state, later)
    for s in range(2):
        parameters, mean = counted()
        parameters[s, 1, s] += 1
        mean[s, 1] = 1
        expected = value_of(parameters, mean, s, 2)
        np.testing.assert_allclose(state.Q[s], expected, rtol=1e-12)
        assert probabilities[s].argmax() == expected.argmax()


def test_a_sample_of_the_posterior_agrees_with_the_closed_form_where_actions_tell_nothing(seen_task):
    exact = first_decision(MeanPlanning(SEEN), seen_task)
    sampled = first_decision(SampledPosterior(SEEN, epsilon=1.0, samples=20_000, seed=0), seen_task)
    np.testing.assert_allclose(sampled.Q, exact.Q, atol=0.015)
    np.testing.assert_allclose(sampled.effective, 20_000)


def test_a_sample_of_the_posterior_learns_from_the_episode_as_the_closed_form_does(seen_task):
    zeros, stay = np.zeros(2, int), np.arange(2)
    later = Observation(stage=1, task=zeros, parent=stay, state=stay, action=1 - stay, reward=np.ones(2))
    found = {}
    for name, policy in (
        ("exact", MeanPlanning(SEEN)),
        ("sampled", SampledPosterior(SEEN, epsilon=1.0, samples=40_000, seed=0)),
    ):
        found[name], _ = policy.step(first_decision(policy, seen_task), later)
    np.testing.assert_allclose(found["sampled"].Q, found["exact"].Q, atol=0.015)
    assert (found["sampled"].effective < 40_000).all()  # the transition weights the models


def optimal_actions(P, r, stages):
    """The best action [stages, K, S] of many MDPs."""
    V, best = np.zeros(r.shape[:2]), []
    for _ in range(stages):
        Q = r + (P * V[:, None, None]).sum(-1)
        V = Q.max(-1)
        best.append(Q.argmax(-1))
    return np.array(best[::-1])


def test_demonstrated_actions_weight_the_models(seen_task):
    """Against models of the prior, weighted with all data; rewards are hidden, so every model has a weight."""
    epsilon, K = 0.3, 400_000
    sampled = first_decision(SampledPosterior(SEEN, epsilon=epsilon, samples=200_000, seed=1, rewards=False), seen_task)
    rng = np.random.default_rng(5)
    P, r = rng.dirichlet([0.5, 0.5], (K, 2, 2)), rng.integers(0, 5, (K, 2, 2)) / 4
    best, weight = optimal_actions(P, r, 3), np.ones(K)
    for steps in DEMONSTRATIONS:
        for t, (step, after) in enumerate(itertools.pairwise([*steps, None])):
            weight *= np.where(best[t, :, step.state] == step.action, 1 - epsilon / 2, epsilon / 2)
            if after is not None:
                weight *= P[:, step.state, step.action, after.state]
    weight /= weight.sum()
    mean = np.einsum("k,ksau->sau", weight, P), np.einsum("k,ksa->sa", weight, r)
    expected = [value_of(*mean, s, 3) for s in range(2)]
    np.testing.assert_allclose(sampled.Q, expected, atol=0.015)
    assert 100 < sampled.effective.min() < 200_000


def test_thompson_takes_the_posterior_probability_that_an_action_is_the_best(seen_task):
    policy = SampledPosterior(SEEN, epsilon=None, samples=40_000, seed=2, thompson=True)
    zeros = np.zeros(2, int)
    first = Observation(stage=0, task=zeros, parent=zeros, state=np.arange(2))
    _, probabilities = policy.step(policy.init([seen_task]), first)
    parameters, mean = counted()
    rng, K = np.random.default_rng(6), 100_000
    P = np.stack([[rng.dirichlet(parameters[s, a], K) for a in range(2)] for s in range(2)]).transpose(2, 0, 1, 3)
    r = np.where([[True, False], [False, True]], mean, rng.integers(0, 5, (K, 2, 2)) / 4)
    best = optimal_actions(P, r, 3)[0]
    np.testing.assert_allclose(probabilities[:, 0], (best == 0).mean(0), atol=0.015)


def test_weights_of_impossible_models_are_zero_and_without_any_all_are_alike():
    evidence = action_evidence(np.array([[True, False], [True, True]]), 0.0, 3)
    np.testing.assert_array_equal(evidence, [0, -np.inf])
    np.testing.assert_array_equal(normalized_weights(evidence), [1, 0])
    np.testing.assert_array_equal(normalized_weights(np.full(2, -np.inf)), [0.5, 0.5])
    np.testing.assert_allclose(np.exp(action_evidence(np.array([[True], [False]]), 0.3, 3)), [(1 - 0.3 + 0.1) * 0.1], rtol=1e-12)


# --- hidden states -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OtherSuite(Suite):
    """The law of `HIDDEN` as a suite of which nothing is known but its draws."""

    traceable: ClassVar[bool] = True
    sizes = HIDDEN.sizes  # pyright: ignore

    def draw(self, key):
        return HIDDEN.draw(key)


OTHER = OtherSuite(name="other", horizon=3)


def probability(model, demonstration):
    """Probability of the observations of a demonstration under one model."""
    U = model["rho"]
    for step in demonstration:
        U = U @ model["P"][:, step.action] * model["O"][step.action, :, step.observation]
    return U.sum()


def mixture_value(models, U, stages):
    """Q [A] of a mixture with unnormalized beliefs U of every model, by recursion over histories."""
    Q = np.array([sum(u @ m["r"][:, a] for u, m in zip(U, models, strict=True)) for a in range(2)])
    if stages == 1:
        return Q
    for a, o in itertools.product(range(2), range(2)):
        after = [u @ m["P"][:, a] * m["O"][a, :, o] for u, m in zip(U, models, strict=True)]
        Q[a] += mixture_value(models, after, stages - 1).max()
    return Q


def test_the_mixture_of_pomdps_is_planned_as_one_pomdp(hidden_task):
    policy = bayes_hidden.HiddenPosterior(OTHER, epsilon=None, samples=16, seed=3)
    state = policy.init([hidden_task])
    drawn = draw_models(OTHER, 16, 3)
    assert isinstance(drawn, POMDP)
    models = [{"P": drawn.P[k, 0], "O": drawn.O[k, 0], "r": drawn.r[k, 0], "rho": drawn.rho[k]} for k in range(16)]
    weight = np.array([probability(model, hidden_task.demonstrations[0]) for model in models])
    weight /= weight.sum()
    start = [w * model["rho"] for w, model in zip(weight, models, strict=True)]
    zero = np.zeros(1, int)
    state, probabilities = policy.step(state, Observation(stage=0, task=zero, parent=zero))
    expected = mixture_value(models, start, 3)
    np.testing.assert_allclose(state.Q[0], expected, rtol=1e-10)
    np.testing.assert_allclose(state.effective, 1 / (weight**2).sum(), rtol=1e-10)
    after = [u @ m["P"][:, 1] * m["O"][1, :, 0] for u, m in zip(start, models, strict=True)]
    later = Observation(stage=1, task=zero, parent=zero, action=np.array([1]), observation=zero)
    state, probabilities = policy.step(state, later)
    expected = mixture_value(models, after, 2) / sum(u.sum() for u in after)
    np.testing.assert_allclose(state.Q[0], expected, rtol=1e-10)
    assert probabilities[0].argmax() == expected.argmax()


@pytest.mark.parametrize("suite", [SEEN, HIDDEN, AMBIGUOUS], ids=lambda s: s.name)
def test_no_model_of_the_prior_is_a_task_of_a_dataset(suite):
    with double_precision():
        drawn = TaskGenerator(suite, DatasetConfig(tasks=1, demos=1, seed=0)).generate(0, 1).problems
    tables = getattr(drawn, "models", drawn)
    models = draw_models(suite, 32, 0)
    models = getattr(models, "models", models)
    assert isinstance(tables, MDP | POMDP) and isinstance(models, MDP | POMDP)
    assert not any(np.allclose(models.P[k], tables.P[0]) for k in range(32))


def test_a_policy_of_the_posterior_needs_the_law_of_a_suite():
    with double_precision():
        problem = mdp(np.full((1, 2, 2, 2), 0.5), np.zeros((3, 2, 2)), [0.5, 0.5])
    with pytest.raises(ValueError, match="source must be a family, whose law of tasks is the prior"):
        registry.make_policy("bayes", problem, DatasetConfig(tasks=1))
    with pytest.raises(ValueError, match=r"epsilon must be"):
        BayesDemo(SEEN, 1.5)


# --- the Bayes-adaptive value ------------------------------------------------------------------------------------------------


def adaptive(counts, known, values, state, stages):
    """The values of one history, Bayes-adaptive and of mean planning, by recursion over actions, rewards and next states."""
    Q = []
    for a in range(2):
        shown = values if known.get((state, a)) is None else [known[state, a]]
        total = np.full(2, np.mean(shown))
        if stages > 1:
            row = np.array(counts[state, a])
            for r, u in itertools.product(shown, range(2)):
                after = counts | {(state, a): tuple(row + np.eye(2)[u])}
                chance = row[u] / row.sum() / len(shown)
                total += chance * adaptive(after, known | {(state, a): r}, values, u, stages - 1)
        Q.append(total)
    parameters, mean = (np.zeros((2, 2, 2)), np.full((2, 2), np.mean(values)))
    for pair, row in counts.items():
        parameters[pair] = row
    for pair, r in known.items():
        mean[pair] = r
    planned = value_of(parameters, mean, state, stages)
    chosen = int(planned[1] > planned[0] + 1e-12)
    return np.array([max(Q[0][0], Q[1][0]), Q[chosen][1]])


def test_the_bayes_adaptive_value_is_that_of_an_enumeration_and_exceeds_planning_without_learning():
    values = reward_values(SEEN)
    parameters, _ = counted()
    unknown = np.array([[0.5, np.nan], [np.nan, 0.75]])
    value, planned = bayes_adaptive_values(parameters, unknown, values, np.array([0.5, 0.5]), 3)
    counts = {(s, a): tuple(parameters[s, a]) for s in range(2) for a in range(2)}
    known = {(0, 0): 0.5, (1, 1): 0.75}
    expected = np.mean([adaptive(counts, known, list(values), s, 3) for s in range(2)], axis=0)
    np.testing.assert_allclose([value, planned], expected, rtol=1e-12)
    assert value > planned
    with pytest.raises(ValueError, match="horizon must be short enough"):
        bayes_adaptive_values(parameters, unknown, values, np.array([0.5, 0.5]), 9)


def test_an_evaluation_tells_the_effective_sample_size_of_a_sampled_posterior():
    policies = {"mean": MeanPlanning(SEEN), "sampled": SampledPosterior(SEEN, epsilon=0.5, samples=50, seed=0)}
    dataset = DatasetConfig(tasks=3, demos=2, behavior="epsilon", epsilon=0.5, seed=1_000_000)
    mean, sampled = compare.evaluate(SEEN, policies, dataset=dataset)
    assert mean.effective_samples is None and sampled.effective_samples is not None
    lowest, median = sampled.effective_samples
    assert 1 <= lowest <= median <= 50
    assert mean.gap is not None and sampled.gap is not None and max(mean.gap, sampled.gap) < 1


def test_demonstrations_of_fewer_steps_count_their_own_stages(seen_task):
    """The actions of a short episode are compared with the best ones of the first stages."""
    short = replace(seen_task, demonstrations=[DEMONSTRATIONS[0][:1], DEMONSTRATIONS[1]])
    policy = SampledPosterior(SEEN, epsilon=0.3, samples=100, seed=0)
    (posterior,) = policy.init([short]).tasks
    np.testing.assert_array_equal(posterior.demonstrated[0], [0, 0, 1, 2])


def test_a_model_without_the_action_gap_of_the_suite_has_no_weight(seen_task):
    gap = replace(SEEN, gap=0.1)
    free, conditioned = (
        SampledPosterior(suite, epsilon=0.3, samples=2000, seed=0).init([seen_task]).tasks[0]._with_rewards(())
        for suite in (SEEN, gap)
    )
    _, _, free_weight = free
    _, _, weight = conditioned
    Q = np.array([_q(P, r) for P, r in zip(*_models_of(seen_task), strict=True)])
    gaps = np.abs(Q[..., 0] - Q[..., 1]).min((1, 2))
    np.testing.assert_array_equal(np.isfinite(weight), gaps >= 0.1 * (1 - 1e-9))
    np.testing.assert_array_equal(weight[np.isfinite(weight)], free_weight[np.isfinite(weight)])


def _models_of(task):
    posterior = SampledPosterior(SEEN, epsilon=0.3, samples=2000, seed=0).init([task]).tasks[0]
    return posterior.P, posterior.r


def _q(P, r):
    """Q [H, S, A] of one MDP, by plain recursion."""
    V, Q = np.zeros(2), []
    for _ in range(3):
        Q.append(r + P @ V)
        V = Q[-1].max(-1)
    return np.array(Q[::-1])


def test_hidden_models_are_weighted_with_demonstrated_actions_by_their_own_histories(hidden_task):
    epsilon = 0.3
    with_actions, without = (draw_posterior(OTHER, hidden_task.demonstrations, e, 16, 3).weight for e in (epsilon, None))
    drawn = draw_models(OTHER, 16, 3)
    assert isinstance(drawn, POMDP)
    expected = np.ones(16)
    for k in range(16):
        model = {"P": drawn.P[k, 0], "O": drawn.O[k, 0], "r": drawn.r[k, 0]}
        U = drawn.rho[k]
        for t, step in enumerate(hidden_task.demonstrations[0]):
            best = mixture_value([model], [U], 3 - t).argmax()
            expected[k] *= 1 - epsilon / 2 if best == step.action else epsilon / 2
            U = U @ model["P"][:, step.action] * model["O"][step.action, :, step.observation]
    assert len(set(expected)) > 1
    expected *= without
    np.testing.assert_allclose(with_actions, expected / expected.sum(), rtol=1e-10)


@pytest.mark.parametrize("suite", [HIDDEN, AMBIGUOUS], ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["bayes-demo", "thompson"])
def test_a_single_possible_model_makes_the_policy_its_oracle(suite, name, tmp_path):
    """With one model in the sample, averages and Thompson sampling are that model's optimal policy."""
    policy = registry.make_policy(name, suite, DatasetConfig(tasks=1, behavior="uniform"))
    dataset = DatasetConfig(tasks=1, demos=1, behavior="uniform", seed=4)
    (task,) = compare.read_tasks(_dataset(tmp_path, suite, dataset))
    assert isinstance(policy, Bayes)
    chosen = policy.choose([task])
    assert isinstance(chosen, bayes_hidden.HiddenPosterior)
    chosen.samples = 1
    zero = np.zeros(1, int)
    _, probabilities = chosen.step(chosen.init([task]), Observation(stage=0, task=zero, parent=zero))
    with double_precision():
        models = draw_posterior(suite, task.demonstrations, chosen.epsilon, 1, 0).models
        Q = environment(jax.tree.map(lambda x: jnp.asarray(x[0]), models)).Q[0]
    assert probabilities[0].argmax() == Q.argmax() and probabilities[0].max() == pytest.approx(1)


def _dataset(directory, suite, config):
    make_dataset(directory / "data", suite, config)
    return Dataset(directory / "data")
