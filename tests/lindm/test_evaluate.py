"""Greedy policies and their exact loss."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm import evaluate
from lindm.evaluate import measurement
from lindm.types import MDP

suboptimality = jax.jit(evaluate.suboptimality)

S, A, H = 4, 3, 3


def numpy_mdp(seed: int):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(S), (H, S, A)), rng.normal(size=(H, S, A)), rng.dirichlet(np.ones(S))


def as_mdp(P, r, rho) -> MDP:
    return MDP(P=jnp.asarray(P), r=jnp.asarray(r), rho=jnp.asarray(rho))


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
