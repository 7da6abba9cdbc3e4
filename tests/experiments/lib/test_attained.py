"""The instances on which bounds are attained: their truths by other routes, and bounds just above them."""

import itertools

import numpy as np
import pytest

from lindm_experiments.lib import attained, attained_margin, attained_offline


@pytest.fixture(scope="module")
def instances() -> dict:
    return attained.ladder_instances(17)


def test_every_bound_is_above_its_truth_and_attained():
    for name, (truth, bound) in (attained.ladder_pairs(18) | attained_offline.pairs(18) | attained_margin.pairs(18)).items():
        highest = {"expected, noise": 2.1, "expected_tight, noise": 2.1, "radius, rare": 7}.get(name, 1.5)
        assert truth * (1 - 1e-9) <= bound <= highest * truth, name


def test_pairs_are_judged_against_their_bound():
    records = [{"attained": {"a": [1.0, 1.0], "b": [2.0, 1.999]}}] * 2
    assert attained.none_below(records, "a").verdict == "INCONCLUSIVE"  # two seeds
    assert attained.none_below(records * 3, "a").verdict == "PASS"
    assert attained.none_below(records * 3, "a", "b").verdict == "FAIL"
    np.testing.assert_allclose(attained.ratios(records, "a", "b"), [[1, 1], [0.9995, 0.9995]])


def test_the_loss_of_the_exchanged_actions_is_the_gap_under_the_occupancy(instances):
    i = instances["flipped"]
    ordered = np.sort(i.Qstar, axis=-1)
    assert (i.Qhat.argmax(-1) == np.argsort(i.Qstar, axis=-1)[..., -2]).all()
    np.testing.assert_allclose(i.truth, (i.occupancy * (ordered[..., -1] - ordered[..., -2])).sum(), rtol=1e-12)
    np.testing.assert_allclose(i.parts.sum(0), i.D, atol=1e-12)


def losses_of_contexts(i: attained.Signs, labels) -> float:
    """Mean loss over the equally likely pairs of one context and the labels (noise, probability) of a stage, by enumeration."""
    c, mean = i.phi[-1, 0, 1], 0.0
    for h, g in enumerate(i.g):
        for x, (noise, chance) in itertools.product(i.flat[-2:], labels(h)):
            S = x * (x @ i.w[h] + noise * np.sign(x[1]))
            Qhat = i.phi[-1] @ i.A[h] @ S
            mean += chance / 2 * (2 * c * g if Qhat[1] > Qhat[0] else 0.0)
    return mean


def test_the_expected_losses_are_those_of_all_contexts(instances):
    i = instances["noisy"]
    np.testing.assert_allclose(losses_of_contexts(i, lambda h: [(i.noise_bound, 0.5), (-i.noise_bound, 0.5)]), i.truth)
    i = instances["two_valued"]
    low = i.phi[-1, 0, 1] * i.g * (1 + attained.SLACK)
    p = 1 / (1 + low**2 / i.noise_variance)
    np.testing.assert_allclose(
        losses_of_contexts(i, lambda h: [(-low[h], p[h]), (low[h] * p[h] / (1 - p[h]), 1 - p[h])]), i.truth
    )


def test_weights_below_zero_lose_at_every_stage_on_any_context(instances):
    i = instances["biased"]
    rng = np.random.default_rng(0)
    x = i.flat[rng.integers(4, size=(50, len(i.g), i.M))]
    S = np.einsum("khm,khmd->khd", np.einsum("khmd,hd->khm", x, i.w), x) / i.M
    assert (np.einsum("d,hde,khe->kh", i.phi[-1, 1] - i.phi[-1, 0], i.A, S) > 0).all()
    np.testing.assert_allclose(i.truth, i.gap[:, -1, 1].sum())


def test_the_stages_of_a_shared_context_fail_together_with_more_than_the_probability(instances):
    i = instances["shared"]
    walks = 2 * np.random.default_rng(1).binomial(i.M, 0.5, 400_000) - i.M
    wrong = i.g[0] * i.phi[-1, 0, 1] + i.noise_bound * walks / i.M <= 1e-12
    assert abs(wrong.mean() - i.delta) < 5 * (i.delta / wrong.size) ** 0.5 + 0.2 * i.delta
    assert attained.reached_sum(1, 0.4) == 1 and attained.reached_sum(2, 0.3) == 0


@pytest.mark.parametrize("name", ["walk", "rare"])
def test_the_norm_is_reached_with_more_than_the_probability(instances, name):
    i = instances[name]
    rng = np.random.default_rng(2)
    moves = rng.binomial(i.M, i.p, 200_000)
    reached = i.e * np.abs(2 * rng.binomial(moves, 0.5) - moves) / i.M >= i.truth * (1 - 1e-9)
    assert i.delta * 0.9 < reached.mean() < 1.35 * i.delta
