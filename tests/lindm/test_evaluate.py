"""Greedy policies and their exact loss."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lindm import evaluate
from lindm.evaluate import measurement
from lindm.types import MDP

greedy = jax.jit(evaluate.greedy)
suboptimality = jax.jit(evaluate.suboptimality)

S, A, H = 4, 3, 3


def numpy_mdp(seed: int):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(S), (H, S, A)), rng.normal(size=(H, S, A)), rng.dirichlet(np.ones(S))


def as_mdp(P, r, rho) -> MDP:
    return MDP(P=jnp.asarray(P), r=jnp.asarray(r), rho=jnp.asarray(rho))


@given(seed=st.integers(0, 10**6))
def test_greedy_takes_the_largest_value(seed):
    Q = np.random.default_rng(seed).normal(size=(2, H, S, A))
    action = greedy(jnp.asarray(Q))
    assert action.dtype == jnp.int32
    np.testing.assert_array_equal(action, Q.argmax(-1))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_values_that_differ_by_rounding_tie_and_the_lowest_index_wins(scale):
    rounding = 1e-13 * scale
    Q = scale * np.array([[0.5, 1.0, 1.0], [-1.0, -1.0, -2.0], [1.0, 1.0, 1.0]])
    Q[0, 2] += rounding
    Q[1, 1] += rounding
    Q[2, [1, 2]] += rounding
    np.testing.assert_array_equal(greedy(jnp.asarray(Q)), [1, 0, 0])


def test_the_tolerance_is_relative_to_the_largest_magnitude():
    eps = 1e-12
    assert int(greedy(jnp.asarray([1.0, 1.0 + 0.5 * eps]))) == 0
    assert int(greedy(jnp.asarray([1.0, 1.0 + 2.0 * eps]))) == 1
    assert int(greedy(jnp.asarray([0.0, 0.0]))) == 0
    # the magnitude of a bad action counts too: its size sets the rounding of all of them
    assert int(greedy(jnp.asarray([0.0, 2.0 * eps, -100.0]))) == 0
    assert int(greedy(jnp.asarray([100.0, 100.0 + 50 * eps]))) == 0
    assert int(greedy(jnp.asarray([100.0, 100.0 + 200 * eps]))) == 1


def test_the_largest_value_of_the_stage_sets_the_rounding_of_all_its_states():
    Q = jnp.asarray([[0.0, 1e-8], [1e6, 0.0]])
    np.testing.assert_array_equal(greedy(Q), [0, 0])
    np.testing.assert_array_equal(greedy(Q[:1]), [1])
    np.testing.assert_array_equal(greedy(Q[:, None]), [[1], [0]])  # two stages, each with its own scale


def test_a_positive_factor_never_changes_an_action():
    rng = np.random.default_rng(0)
    near = 1.0 + rng.choice([0.0, 1e-6, 1e-9, 1e-13], size=(2000, 4)) * rng.normal(size=(2000, 4))
    for factor in (2.0**-40, 2.0**-10, 2.0**20):
        np.testing.assert_array_equal(greedy(jnp.asarray(near * factor)), greedy(jnp.asarray(near)))


@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
def test_greedy_is_blind_to_a_positive_scale_and_to_a_shift_of_the_state(seed, scale):
    rng = np.random.default_rng(seed)
    Q, shift = rng.normal(size=(S, A)), rng.normal(size=(S, 1))
    np.testing.assert_array_equal(greedy(jnp.asarray(Q)), greedy(jnp.asarray(scale * Q + shift)))


def test_suboptimality_is_the_best_value_less_the_policys_over_all_policies():
    P, r, rho = (array[:2, :2, :2, :2] if array.ndim == 4 else array for array in numpy_mdp(0))
    P, r, rho = P / P.sum(-1, keepdims=True), r[:2, :2, :2], rho[:2] / rho[:2].sum()
    values = {}
    for choice in itertools.product(range(2), repeat=4):
        pi, V = np.array(choice).reshape(2, 2), np.zeros(2)
        for h in reversed(range(2)):
            V = np.array([r[h, s, pi[h, s]] + P[h, s, pi[h, s]] @ V for s in range(2)])
        values[choice] = rho @ V
    best = max(values.values())
    for choice, value in values.items():
        loss = suboptimality(as_mdp(P, r, rho), jnp.asarray(choice).reshape(2, 2))
        assert loss.shape == ()
        assert float(loss) == pytest.approx(best - value, abs=1e-12)


def test_mixing_policies_mixes_their_loss_at_one_state():
    # only the first stage is mixed, so that the loss is linear in the mixture
    P, r, rho = numpy_mdp(1)
    mdp, pi = as_mdp(P, r, rho), np.zeros((H, S), int)
    other = pi.copy()
    other[0] = 1
    weights = 0.3 * np.eye(A)[pi] + 0.7 * np.eye(A)[other]
    mixed = float(suboptimality(mdp, jnp.asarray(weights)))
    parts = [float(suboptimality(mdp, jnp.asarray(each))) for each in (pi, other)]
    assert mixed == pytest.approx(0.3 * parts[0] + 0.7 * parts[1], rel=1e-12)


def test_suboptimality_under_vmap_is_a_loop():
    problems = [as_mdp(*numpy_mdp(seed)) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    pi = jnp.asarray(np.random.default_rng(0).integers(0, A, (3, H, S)))
    got = jax.jit(jax.vmap(suboptimality))(stack, pi)
    for i in range(3):
        assert float(got[i]) == pytest.approx(float(suboptimality(problems[i], pi[i])), rel=1e-12)


def test_a_measurement_is_the_mean_and_its_standard_error():
    values = np.random.default_rng(0).normal(size=(7, 2))
    result = measurement(jnp.asarray(values))
    np.testing.assert_allclose(result.gap, values.mean(0), rtol=1e-12)
    deviations = values - values.mean(0)
    np.testing.assert_allclose(result.sem, np.sqrt((deviations**2).sum(0) / 6 / 7), rtol=1e-12)
    assert result.n == 7


@pytest.mark.parametrize("count", [0, 1])
def test_one_instance_has_no_standard_error(count):
    with pytest.raises(ValueError, match="values must hold at least two instances"):
        measurement(jnp.zeros((count, 3)))
