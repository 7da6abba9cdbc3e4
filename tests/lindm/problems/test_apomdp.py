"""Ambiguous POMDPs: their checks, the laws of random ones, and the two kinds that are equivalent to POMDPs.

Values come from the definition, by a recursion over beliefs in numpy that keeps one belief per model.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lindm.problems.apomdp import apomdp, draw_apomdp, mixture, optimistic, single
from lindm.problems.pomdp import draw_pomdp, pomdp
from lindm.types import APOMDP, POMDP, RewardFunction

S, A, O, H, M = 2, 2, 2, 3, 2


def action_values(parts, alpha, b, h=0):
    """Q_h [..., A] by the definition, at beliefs b [..., M, S]."""
    P, O, r = (np.asarray(x) for x in (parts.P, parts.O, parts.r))
    G = np.einsum("...ms,msa->...am", b, r[:, h])
    if h + 1 < r.shape[1]:
        K = np.einsum("msat,mato->amost", P[:, h % P.shape[1]], O[:, h % O.shape[1]])
        joint = np.einsum("...ms,amost->...amot", b, K)
        mass = joint.sum(-1)
        tau = joint / np.where(mass > 0, mass, 1)[..., None]
        tau = np.repeat(tau[..., None, :], len(r), axis=-2)
        G = G + (mass * action_values(parts, alpha, tau, h + 1).max(-1)).sum(-1)
    return alpha * G.min(-1) + (1 - alpha) * G.max(-1)


def value(problem: APOMDP) -> float:
    return float(action_values(problem.models, float(problem.alpha), np.asarray(problem.models.rho)).max())


def pomdp_value(problem: POMDP) -> float:
    parts = jax.tree.map(lambda x: np.asarray(x)[None], problem)
    return float(action_values(parts, 0.0, parts.rho).max())


def models(seed: int, count: int = M, stages: tuple[int, int] = (1, 1), common_start: bool = True, O: int = O) -> list[POMDP]:
    rng = np.random.default_rng(seed)
    rho = rng.dirichlet(np.ones(S))
    return [
        pomdp(
            P=rng.dirichlet(np.ones(S), (stages[0], S, A)),
            O=rng.dirichlet(np.ones(O), (stages[1], A, S)),
            r=rng.normal(size=(H, S, A)),
            rho=rho if common_start else rng.dirichlet(np.ones(S)),
        )
        for _ in range(count)
    ]


def checked(problem: POMDP) -> None:
    pomdp(problem.P, problem.O, problem.r, problem.rho)


# the door


def test_models_come_back_as_they_were_given():
    members = models(0, 3, (H, 1), common_start=False)
    problem = apomdp(members, 0.25)
    assert float(problem.alpha) == 0.25
    for m, member in enumerate(members):
        jax.tree.map(lambda x, y, m=m: np.testing.assert_array_equal(x[m], y), problem.models, member)


def test_a_single_stage_is_repeated_where_another_model_has_all_stages():
    flat, full = models(1, 1)[0], models(2, 1, (H, H))[0]
    parts = apomdp([flat, full], 1).models
    assert parts.P.shape == (2, H, S, A, S) and parts.O.shape == (2, H, A, S, O)
    for h in range(H):
        np.testing.assert_array_equal(parts.P[0, h], flat.P[0])
        np.testing.assert_array_equal(parts.O[0, h], flat.O[0])
    np.testing.assert_array_equal(parts.P[1], full.P)


def test_models_of_mixed_precision_become_one_apomdp():
    first, second = models(3)
    problem = apomdp([jax.tree.map(lambda x: x.astype(jnp.float32), first), second], 0.5)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(problem)} == {"float64"}


def test_an_apomdp_without_models_raises_an_error():
    with pytest.raises(ValueError, match="models must contain at least one POMDP; got none"):
        apomdp([], 0.5)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, np.nan, [0.5, 0.5]])
def test_alpha_out_of_range_raises_an_error(alpha):
    for make in (lambda: apomdp(models(0), alpha), lambda: single(models(0)[0], alpha)):
        with pytest.raises(ValueError, match=r"alpha must be a number in \[0, 1\]; got"):
            make()


@pytest.mark.parametrize("name", ["P", "O", "rho"])
def test_a_broken_model_raises_an_error_with_its_index_and_field(name):
    members = models(4, 3)
    members[2] = dataclasses.replace(members[2], **{name: 2 * getattr(members[2], name)})
    with pytest.raises(ValueError, match=rf"^model 2: (each row of )?{name} must sum to one"):
        apomdp(members, 0.5)


def test_models_of_different_shapes_raise_an_error_with_index():
    longer = dataclasses.replace(models(5)[0], r=jnp.zeros((H + 1, S, A)))
    with pytest.raises(ValueError, match=r"same shapes: r of model 1 has \(4, 2, 2\), of model 0 \(3, 2, 2\)"):
        apomdp([models(5)[0], longer], 0.5)
    with pytest.raises(ValueError, match=r"same shapes: O at a stage of model 1 has \(2, 2, 3\), of model 0 \(2, 2, 2\)"):
        apomdp([models(5)[0], models(5, O=3)[0]], 0.5)


@given(seed=st.integers(0, 10**6), alpha=st.floats(0.0, 1.0))
def test_a_single_model_has_the_value_of_its_pomdp_for_every_alpha(seed, alpha):
    member = models(seed, 1)[0]
    problem = single(member, alpha)
    apomdp([jax.tree.map(lambda x: x[0], problem.models)], problem.alpha)
    assert value(problem) == pytest.approx(pomdp_value(member), rel=1e-12, abs=1e-12)


# random APOMDPs


def total_variation(x, y):
    return np.abs(np.asarray(x) - np.asarray(y)).sum(-1) / 2


@jax.jit
def drawn(key, distance, c, quality):
    return draw_apomdp(key, 3, 2, 2, 2, 3, alpha=0.7, distance=distance, concentration=c, quality=quality, discount=0.9)


@given(seed=st.integers(0, 10**6), distance=st.floats(0.0, 1.0), c=st.floats(0.01, 100.0), quality=st.floats(0.0, 1.0))
def test_random_apomdps_are_valid_and_their_models_are_within_the_distance(seed, distance, c, quality):
    problem = drawn(jax.random.key(seed), distance, c, quality)
    parts = problem.models
    again = apomdp([jax.tree.map(lambda x, m=m: x[m], parts) for m in range(3)], problem.alpha)
    jax.tree.map(np.testing.assert_array_equal, again, problem)
    assert parts.P.shape == (3, 1, 3, 2, 3) and parts.O.shape == (3, 1, 2, 3, 2) and parts.r.shape == (3, 2, 3, 2)
    for m in range(3):
        for x in (parts.P, parts.O):
            assert (total_variation(x[m], x[0]) <= distance + 1e-12).all()
        np.testing.assert_array_equal(parts.r[m], parts.r[0])
        np.testing.assert_array_equal(parts.rho[m], parts.rho[0])
    np.testing.assert_allclose(parts.r[0, 1], 0.9 * parts.r[0, 0], rtol=1e-13)


def test_models_move_apart_in_proportion_to_the_distance_from_a_common_centre():
    by_distance = {d: drawn(jax.random.key(6), d, 1.0, 0.2).models for d in (0.0, 0.25, 1.0)}
    for name in ("P", "O"):
        near, some, far = (np.asarray(getattr(by_distance[d], name)) for d in (0.0, 0.25, 1.0))
        np.testing.assert_array_equal(near, np.broadcast_to(near[:1], near.shape))
        np.testing.assert_allclose(some, 0.75 * near + 0.25 * far, rtol=1e-12)
        assert (total_variation(far[1], far[0]) > 0).all()


def test_models_at_distance_one_are_independent():
    keys = jax.random.split(jax.random.key(7), 4_000)
    P = np.asarray(jax.jit(jax.vmap(lambda key: drawn(key, 1.0, 0.5, 0.0)))(keys).models.P)
    assert abs(np.corrcoef(P[:, 0, 0, 0, 0, 0], P[:, 1, 0, 0, 0, 0])[0, 1]) < 5 / np.sqrt(len(P))
    squares = (P[:, 1, 0, 0, 0, 0] - 1 / 3) ** 2  # and each has the variance of Beta(c, 2c), 2 / (9 (3c + 1))
    assert abs(squares.mean() - 4 / 45) < 5 * squares.std() / np.sqrt(len(P))


def test_numbers_of_a_random_apomdp_may_be_traced():
    traced = drawn(jax.random.key(0), 0.3, 0.5, 0.9)
    one = draw_apomdp(jax.random.key(0), 3, 2, 2, 2, 3, alpha=0.7, distance=0.3, concentration=0.5, quality=0.9, discount=0.9)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-300), traced, one)


def test_random_apomdps_can_be_in_single_precision():
    problem = draw_apomdp(jax.random.key(0), S, A, O, H, M, concentration=0.01, discount=0.9, dtype=jnp.float32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(problem)} == {"float32"}
    apomdp([jax.tree.map(lambda x, m=m: x[m], problem.models) for m in range(M)], problem.alpha)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"M": 0}, "M must be a whole number"),
        ({"O": 0}, "O must be a whole number"),
        ({"distance": 1.5}, "distance must be a number in"),
        ({"alpha": -0.5}, "alpha must be a number in"),
        ({"quality": 2.0}, "quality must be a number in"),
    ],
)
def test_arguments_of_a_random_apomdp_out_of_range_raise_an_error_that_names_them(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        draw_apomdp(jax.random.key(0), **({"S": S, "A": A, "O": O, "H": H, "M": M} | arguments))


# two POMDPs in disguise


@given(seed=st.integers(0, 10**6), count=st.sampled_from([1, 2, 3]), stages=st.sampled_from([(1, 1), (H, 1), (1, H), (H, H)]))
def test_the_best_case_is_a_pomdp_over_pairs_of_action_and_model(seed, count, stages):
    problem = apomdp(models(seed, count, stages), 0.0)
    reduced = optimistic(problem)
    checked(reduced)
    assert pomdp_value(reduced) == pytest.approx(value(problem), rel=1e-12, abs=1e-12)


@given(seed=st.integers(0, 10**6), alpha=st.floats(0.0, 0.5), stages=st.sampled_from([(1, 1), (H, 1), (1, H), (H, H)]))
def test_two_models_and_an_attitude_of_at_most_a_half_are_a_pomdp(seed, alpha, stages):
    problem = apomdp(models(seed, 2, stages), alpha)
    reduced = mixture(problem)
    checked(reduced)
    assert reduced.r.shape == (H, 2 * S, 2 * A) and reduced.O.shape[1:] == (2 * A, 2 * S, 2 * O)
    assert pomdp_value(reduced) == pytest.approx(value(problem), rel=1e-12, abs=1e-12)


def test_actions_states_and_observations_of_the_reductions_are_numbered_as_documented():
    # three observations: no two axes that could be exchanged have the same length
    first, second = models(8, O=3)
    best, both = optimistic(apomdp([first, second], 0.0)), mixture(apomdp([first, second], 0.25))
    for m, model in enumerate((first, second)):
        for a in range(A):
            np.testing.assert_array_equal(best.P[:, :, a * 2 + m], model.P[:, :, a])
            np.testing.assert_array_equal(best.O[:, a * 2 + m], model.O[:, a])
            np.testing.assert_array_equal(best.r[:, :, a * 2 + m], model.r[:, :, a])
            for k in range(2):
                weight = 0.75 if k == m else 0.25
                for came in range(2):
                    np.testing.assert_allclose(both.P[:, came::2, a * 2 + k, m::2], weight * model.P[:, :, a], rtol=1e-14)
                np.testing.assert_array_equal(both.O[:, a * 2 + k, m::2, m * 3 : m * 3 + 3], model.O[:, a])
    np.testing.assert_array_equal(both.rho[::2], first.rho)


def test_reductions_raise_an_error_where_they_do_not_hold():
    with pytest.raises(ValueError, match=r"alpha must be 0; got 0.1"):
        optimistic(apomdp(models(0), 0.1))
    with pytest.raises(ValueError, match=r"alpha must be at most 1/2; got 0.6"):
        mixture(apomdp(models(0), 0.6))
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"problem must have two models; got {count}"):
            mixture(apomdp(models(0, count), 0.2))
    for reduce in (optimistic, mixture):
        with pytest.raises(ValueError, match=r"the models must agree in rho; got .* of model 0 and .* of model 1"):
            reduce(apomdp(models(0, common_start=False), 0.0))


def test_a_drawn_model_is_a_member_like_any_other():
    member = draw_pomdp(jax.random.key(9), S, A, O, H)
    assert value(apomdp([member, member], 0.3)) == pytest.approx(pomdp_value(member), rel=1e-12)


def test_models_pay_their_own_rewards_and_share_the_discount():
    P, O, rho = np.full((2, 1, 2), 0.5), np.full((1, 2, 2), 0.5), [0.5, 0.5]
    models = [pomdp(P, O, np.array([[1.0], [k]]), rho, horizon=3, discount=0.5) for k in (2.0, 3.0)]
    table = jnp.arange(4.0).reshape(1, 2, 1, 2, 1)
    models[1] = dataclasses.replace(models[1], paid=RewardFunction(R=table, discount=jnp.asarray(0.5)))
    problem = apomdp(models, 0.5)
    assert float(problem.discount) == 0.5 and problem.models.paid.R.shape == (2, 1, 2, 1, 2, 1)
    for s, u in np.ndindex(2, 2):
        assert float(problem.models.pay(2, s, 0, u, 0, (0,))) == [1.0, 2.0][s]
        assert float(problem.models.pay(2, s, 0, u, 0, (1,))) == 2 * s + u
    assert apomdp([pomdp(P, O, np.ones((3, 2, 1)), rho)], 0.5).models.paid is None
    with pytest.raises(ValueError, match=r"^models must have one discount; got 0.5 of model 0 and 1.0 of model 1$"):
        apomdp([models[0], pomdp(P, O, np.ones((3, 2, 1)), rho)], 0.5)
