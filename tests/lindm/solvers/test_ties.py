"""The tie rule and the greedy action."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lindm.solvers import ties

greedy = jax.jit(ties.greedy)

S, A, H = 4, 3, 3


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
    # an action that nobody takes, however bad, does not blur the others
    assert int(greedy(jnp.asarray([0.2, 0.9, -1e12]))) == 1
    assert int(greedy(jnp.asarray([100.0, 100.0 + 50 * eps]))) == 0
    assert int(greedy(jnp.asarray([100.0, 100.0 + 200 * eps]))) == 1


def test_values_of_different_size_are_no_tie_however_small_both_are():
    for Q in ([1e-13, 0.0], [3e-300, 1e-300], [-1e-13, 0.0], [0.0, -1e-30]):
        best = np.arange(2) == np.argmax(Q)
        np.testing.assert_array_equal(ties.optimal_actions(np.array(Q)), best)
        np.testing.assert_array_equal(ties.optimal_actions(jnp.asarray(Q)), best)


def test_all_tied_actions_are_optimal_and_numpy_agrees_with_jax():
    rng = np.random.default_rng(0)
    Q = rng.integers(0, 3, (5, 200, A)) + rng.choice([0.0, 1e-14], (5, 200, A))
    optimal = ties.optimal_actions(Q)
    np.testing.assert_array_equal(optimal, np.round(Q) == np.round(Q).max(-1, keepdims=True))
    np.testing.assert_array_equal(ties.optimal_actions(jnp.asarray(Q)), optimal)
    action = ties.greedy(Q)
    assert isinstance(action, np.ndarray) and action.dtype == np.int32
    np.testing.assert_array_equal(action, greedy(jnp.asarray(Q)))


def test_rows_that_are_stages_of_their_own_have_a_scale_of_their_own():
    Q = np.array([[0.0, 1e-8], [1e6, 0.0]])
    np.testing.assert_array_equal(ties.optimal_actions(Q), [[True, True], [True, False]])
    np.testing.assert_array_equal(ties.optimal_actions(Q, per_row=True), [[False, True], [True, False]])
    np.testing.assert_array_equal(ties.greedy(jnp.asarray(Q), per_row=True), jax.vmap(greedy)(jnp.asarray(Q)))


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
