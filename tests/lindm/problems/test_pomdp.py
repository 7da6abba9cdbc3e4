"""POMDPs: valid and invalid arrays, and the laws of random problems; values by a recursion over beliefs in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lindm as ld
from lindm.problems.mdp import draw_mdp, draw_stationary_mdp
from lindm.problems.pomdp import draw_pomdp, pomdp, reveal

S, A, O, H = 3, 2, 4, 3


def arrays(seed: int = 0):
    rng = np.random.default_rng(seed)
    return {
        "P": rng.dirichlet(np.ones(S), (H, S, A)),
        "O": rng.dirichlet(np.ones(O), (H, A, S)),
        "r": rng.normal(size=(H, S, A)),
        "rho": rng.dirichlet(np.ones(S)),
    }


def value(problem, b, h=0):
    """V_h(b) by the definition."""
    P, O, r = (np.asarray(x) for x in (problem.P, problem.O, problem.r))
    if h == len(r):
        return 0.0
    P, O = P[h % len(P)], O[h % len(O)]
    best = -np.inf
    for a in range(r.shape[-1]):
        total = b @ r[h, :, a]
        for o in range(O.shape[-1]):
            reached = (b @ P[:, a]) * O[a, :, o]
            if reached.sum() > 0:
                total += reached.sum() * value(problem, reached / reached.sum(), h + 1)
        best = max(best, total)
    return best


def test_a_valid_problem_is_returned_unchanged():
    given_arrays = arrays()
    problem = pomdp(**given_arrays)
    for name, array in given_arrays.items():
        np.testing.assert_array_equal(getattr(problem, name), array)


def test_arrays_without_stages_get_an_axis_of_one_and_rewards_the_horizon_and_the_discount():
    whole = arrays()
    problem = pomdp(whole["P"][0], whole["O"][0], whole["r"][0], whole["rho"], horizon=5, discount=0.9)
    np.testing.assert_array_equal(problem.P, whole["P"][:1])
    np.testing.assert_array_equal(problem.O, whole["O"][:1])
    for h in range(5):
        np.testing.assert_allclose(problem.r[h], 0.9**h * whole["r"][0], rtol=1e-14)


def test_axes_of_one_stage_are_accepted_beside_full_ones_and_stage_rewards_are_discounted():
    whole = arrays(1)
    problem = pomdp(whole["P"][:1], whole["O"], whole["r"], whole["rho"], horizon=H, discount=0.5)
    assert problem.P.shape == (1, S, A, S)
    assert problem.O.shape == (H, A, S, O)
    np.testing.assert_allclose(problem.r, whole["r"] * np.array([1, 0.5, 0.25])[:, None, None], rtol=1e-14)


def test_lists_and_whole_numbers_are_accepted():
    problem = pomdp(P=[[[1, 0]], [[0, 1]]], O=[[[1], [1]]], r=[[1], [0]], rho=[1, 0], horizon=2)
    assert problem.O.shape == (1, 1, 2, 1)
    assert jnp.issubdtype(problem.P.dtype, jnp.floating)


@pytest.mark.parametrize("name", ["P", "O", "r", "rho"])
def test_arrays_of_mixed_precision_become_one_problem(name):
    problem = pomdp(**(arrays() | {name: arrays()[name].astype(np.float32)}))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(problem)} == {"float64"}


@given(seed=st.integers(0, 10**6), shift=st.sampled_from([-2.0, -0.01, 0.01, 2.0]), name=st.sampled_from(["P", "O", "rho"]))
def test_a_law_with_one_wrong_entry_raises_an_error_that_names_it(seed, shift, name):
    broken = arrays(seed)
    flat = broken[name].reshape(-1)
    flat[seed % flat.size] += shift
    with pytest.raises(ValueError, match=rf"(row of )?\b{name}\b must"):
        pomdp(**broken)


@pytest.mark.parametrize("name", ["P", "O", "r", "rho"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_raise_an_error_that_names_them(name, bad):
    broken = arrays()
    broken[name].reshape(-1)[-1] = bad
    with pytest.raises(ValueError, match=f"^{name} must be finite"):
        pomdp(**broken)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("P", np.full((S, S), 1 / S)),
        ("P", np.full((H + 1, S, A, S), 1 / S)),
        ("P", np.full((A, S, S), 1 / S)),
        ("O", np.full((S, A, O), 1 / O)),
        ("O", np.full((H - 1, A, S, O), 1 / O)),
        ("O", np.full((A, S, 0), 1.0)),
        ("O", np.full((A, S), 1.0)),
        ("r", np.zeros(S)),
        ("r", np.zeros((0, S, A))),
        ("r", np.zeros((1, H, S, A))),
        ("rho", np.full(S + 1, 1 / (S + 1))),
        ("rho", np.full((1, S), 1 / S)),
    ],
)
def test_a_wrong_shape_raises_an_error_that_names_it(name, array):
    with pytest.raises(ValueError, match=f"^{name} must have shape"):
        pomdp(**(arrays() | {name: array}))


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"horizon": H + 1}, f"horizon must be the length of r's first axis, {H}; got {H + 1}"),
        ({"r": np.zeros((S, A))}, "horizon must be given when r has no axis of stages"),
        ({"r": np.zeros((S, A)), "horizon": 0}, "horizon must be a whole number of at least 1; got 0"),
        ({"r": np.zeros((S, A)), "horizon": 2}, "P must have shape"),
        ({"discount": -0.1}, "discount must be"),
        ({"discount": 1.5}, "discount must be"),
    ],
)
def test_horizons_and_discounts_that_do_not_fit_raise_an_error(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        pomdp(**(arrays() | arguments))


@pytest.mark.parametrize("draw", [draw_mdp, draw_stationary_mdp])
def test_a_revealed_mdp_is_valid_and_has_the_mdps_value_at_each_known_first_state(draw):
    mdp = draw(jax.random.key(4), S, A, H)
    problem = reveal(mdp)
    pomdp(problem.P, problem.O, problem.r, problem.rho)
    P, r, V = np.asarray(mdp.P), np.asarray(mdp.r), np.zeros(S)
    for h in reversed(range(H)):
        V = (r[h] + P[h % len(P)] @ V).max(-1)
    for s in range(S):
        assert value(problem, np.eye(S)[s]) == pytest.approx(V[s], rel=1e-12)
    assert value(problem, np.asarray(problem.rho)) < np.asarray(problem.rho) @ V


@jax.jit
def drawn(key, c, quality, discount):
    return draw_pomdp(key, S, A, O, H, concentration=c, quality=quality, low=-1.0, step=0.1, discount=discount)


@given(seed=st.integers(0, 10**6), c=st.floats(0.01, 100.0), quality=st.floats(0.0, 1.0), discount=st.floats(0.1, 1.0))
def test_drawn_problems_are_valid(seed, c, quality, discount):
    problem = drawn(jax.random.key(seed), c, quality, discount)
    checked = pomdp(problem.P, problem.O, problem.r, problem.rho)
    assert checked.P.shape == (1, S, A, S) and checked.O.shape == (1, A, S, O) and checked.r.shape == (H, S, A)
    np.testing.assert_allclose(problem.r[-1], discount ** (H - 1) * problem.r[0], rtol=1e-13)
    np.testing.assert_allclose(problem.rho, 1 / S)


@pytest.mark.parametrize(("states", "seen"), [(S, O), (5, 2)])
def test_observations_of_quality_one_are_the_state_as_far_as_they_reach(states, seen):
    rows = np.asarray(draw_pomdp(jax.random.key(0), states, A, seen, H, quality=1.0).O)
    for s in range(states):
        np.testing.assert_array_equal(rows[0, :, s], np.tile(np.eye(seen)[s % seen], (A, 1)))


def test_observations_of_quality_zero_are_worth_nothing():
    problem = draw_pomdp(jax.random.key(1), S, A, O, H, quality=0.0)
    rows = np.asarray(problem.O)
    np.testing.assert_array_equal(rows, np.broadcast_to(rows[:, :, :1], rows.shape))
    assert (rows[0, 0, 0] != rows[0, 1, 0]).all()  # each action has its noise
    blind = pomdp(problem.P, np.ones((A, S, 1)), problem.r, problem.rho)
    rho = np.asarray(problem.rho)
    assert value(problem, rho) == pytest.approx(value(blind, rho), rel=1e-12)


@given(seed=st.integers(0, 10**6), low=st.floats(0.0, 1.0), high=st.floats(0.0, 1.0))
def test_better_observations_are_worth_no_less(seed, low, high):
    # the worse channel is the better one, sometimes replaced by noise: it cannot be worth more (Blackwell)
    low, high = sorted((low, high))
    worse, better = (drawn(jax.random.key(seed), 0.5, q, 0.9) for q in (low, high))
    np.testing.assert_array_equal(worse.P, better.P)
    np.testing.assert_array_equal(worse.r, better.r)
    rho = np.asarray(worse.rho)
    assert value(worse, rho) <= value(better, rho) + 1e-12


def test_the_noise_of_observations_is_a_flat_dirichlet_row():
    count = 20_000
    draw = jax.jit(jax.vmap(lambda k: draw_pomdp(k, 1, 1, 3, 1, quality=0.25).O))
    rows = np.asarray(draw(jax.random.split(jax.random.key(2), count)))
    noise = (rows[:, 0, 0, 0] - 0.25 * np.eye(3)[0]) / 0.75
    products = noise[:, :, None] * noise[:, None, :]
    assert (np.abs(products.mean(0) - (1 + np.eye(3)) / 12) <= 5 * products.std(0) / np.sqrt(count)).all()


def test_numbers_may_be_traced_and_stacks_are_loops():
    keys, c, q, discount = jax.random.split(jax.random.key(3), 2), [0.1, 1.0], [0.0, 0.9], [1.0, 0.5]
    stack = jax.vmap(drawn)(keys, jnp.array(c), jnp.array(q), jnp.array(discount))
    for i in range(2):
        one = draw_pomdp(keys[i], S, A, O, H, concentration=c[i], quality=q[i], low=-1.0, step=0.1, discount=discount[i])
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-9, atol=1e-300), stack, one)


def test_random_problems_come_in_single_precision():
    problem = draw_pomdp(jax.random.key(0), S, A, O, H, concentration=0.01, step=0.1, discount=0.9, dtype=jnp.float32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(problem)} == {"float32"}
    pomdp(problem.P, problem.O, problem.r, problem.rho)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"O": 0}, "O must be a whole number"),
        ({"S": 0}, "S must be a whole number"),
        ({"quality": -0.1}, r"quality must be a number in \[0, 1\]; got -0.1"),
        ({"quality": 1.1}, "quality must be"),
        ({"quality": float("nan")}, "quality must be"),
        ({"concentration": -1.0}, "concentration must be"),
    ],
)
def test_random_problems_out_of_range_raise_an_error_that_names_them(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        draw_pomdp(jax.random.key(0), **({"S": S, "A": A, "O": O, "H": H} | arguments))


def test_names_appear_in_decisions_and_stay_where_they_are_not_given():
    problem = ld.pomdp(**arrays())
    named = ld.with_names(problem, actions=["wait", "treat"])
    action = ld.solve(problem).first_action
    assert ld.solve(named).first_action == ("wait", "treat")[action]
    assert ld.with_names(named, states=["well", "ill", "dead"]).names == {
        "states": ("well", "ill", "dead"),
        "actions": ("wait", "treat"),
    }


@pytest.mark.parametrize("kind", [np.array, iter, tuple])
def test_names_are_any_sequence_of_strings(kind):
    named = ld.with_names(ld.pomdp(**arrays()), actions=kind(["wait", "treat"]))
    assert named.names == {"actions": ("wait", "treat")} and {type(name) for name in named.names["actions"]} == {str}


@pytest.mark.parametrize(
    "names, error",
    [
        ({"actions": ["wait"]}, r"actions must have 2 names, one for each; got 1: \['wait'\]"),
        ({"models": ["a"]}, r"models must be left out for a POMDP, which has none; got \['a'\]"),
        ({"states": [f"s{i}" for i in range(100)]}, "states must have 3 names, one for each; got 100: .*'s5', ...]"),
        ({"actions": "wt"}, "actions must be a list of names; got 'wt'"),
        ({"actions": [0, 1]}, r"actions must be a list of names; got \[0, 1\]"),
        ({"actions": 3}, "actions must be a list of names; got 3"),
        ({"actions": None}, "actions must be a list of names; got None"),
        ({"actions": ["wait", ""]}, "got '': a name has at least one character"),
        ({"actions": ["wait", "wait"]}, "got 'wait': it is given twice"),
        ({"actions": ["wait", "give drug"]}, "got 'give drug': a name has no space, colon or #"),
        ({"actions": ["wait", "1"]}, "got '1': a number is an index"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, error):
    with pytest.raises(ValueError, match=error):
        ld.with_names(ld.pomdp(**arrays()), **names)
