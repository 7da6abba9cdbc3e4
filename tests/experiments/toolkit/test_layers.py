"""Layers of one's own: measured risk of known layers, losses of policies that are known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lindm as ld
from lindm.icl import feature_laws
from lindm.problems.linear_mdp import onehot_family, simplex_family

LAMBDA = np.array([[2.0, 0.5], [0.5, 0.4]])


class LeastSquares(nnx.Module):
    """query @ pinv(X) y times a factor."""

    def __init__(self, factor=1.0):
        self.factor = nnx.Param(jnp.asarray(factor, jnp.float32))

    def __call__(self, prompt):
        G = prompt.x.T @ prompt.x
        return self.factor[...] * (prompt.query @ jnp.linalg.solve(G, prompt.x.T @ prompt.y))


def test_the_closed_form_layer_has_its_exact_risk_and_a_layer_of_zeros_that_of_no_prediction():
    law, N = feature_laws.gaussian(LAMBDA), 8
    gamma = (1 + 1 / N) * LAMBDA + np.trace(LAMBDA) / N * np.eye(2)
    layer = ld.icl.ReducedAttention(2, A=jnp.asarray(np.linalg.inv(gamma), jnp.float32))
    sizes = {"train_length": N, "test_lengths": [4, 32], "steps": 0, "seeds": 12, "tasks": 600}
    result = ld.measure_risk(layer, law, **sizes)
    assert result.exact.law == "gaussian" and result.exact.paper_bound is not None
    error = result.measured.std(0, ddof=1) / np.sqrt(12)
    assert (np.abs(result.mean - result.exact.total[0]) < 4 * error).all() and (error < 0.06 * result.mean).all()
    assert (result.interval[:, 0] < result.mean).all() and result.losses.shape == (12, 0)
    nothing = ld.measure_risk(ld.icl.ReducedAttention(2), law, **sizes).mean
    np.testing.assert_allclose(nothing, np.trace(LAMBDA), rtol=0.1)


def test_training_lowers_the_risk_of_any_module_and_seeds_differ(tmp_path):
    sizes = {"noise": 0.3, "train_length": 16, "test_lengths": [16], "seeds": 3, "tasks": 200}
    law = feature_laws.table([[1.0, 0.0], [0.5, 1.0], [-1.0, 0.5]])
    before = ld.measure_risk(LeastSquares(0.2), law, steps=0, **sizes)
    after = ld.measure_risk(LeastSquares(0.2), law, steps=100, **sizes)
    assert after.mean[0] < 0.3 * before.mean[0] and after.losses.shape == (3, 100)
    assert len(set(after.measured[:, 0])) == 3
    figure = after.plot(tmp_path / "risk.png")
    assert (tmp_path / "risk.png").read_bytes().startswith(b"\x89PNG")
    assert figure.axes[0].get_xlabel() == "pairs in a test prompt M (log scale)" and after.plot() is not figure


def test_a_layer_without_error_loses_nothing_and_one_that_predicts_nothing_takes_the_first_action(tmp_path):
    sizes = {"train_length": 4, "test_length": 24, "steps": 0, "seeds": 3}
    exact = ld.measure_ladder(LeastSquares(), lambda key: simplex_family(key, 4, 3, 2, 2, feature_power=2.0), tasks=16, **sizes)
    assert exact.mean["sup_norm"] < 0.02 and exact.mean["suboptimality"] < 1e-4
    # rewards of two actions are uniform on [0, 1]: E max - E first = 2/3 - 1/2
    nothing = ld.measure_ladder(ld.icl.ReducedAttention(4), onehot_family(2, 2, 1), tasks=800, **sizes)
    assert nothing.mean["suboptimality"] == pytest.approx(1 / 6, abs=0.015)
    assert nothing.mean["identity"] == pytest.approx(nothing.mean["suboptimality"], rel=1e-9)
    # Qhat = 0: the sup norm is twice E max
    assert nothing.mean["sup_norm"] == pytest.approx(4 / 3, abs=0.03)
    assert set(nothing.violations.values()) == {0}
    with jax.enable_x64(False):  # as a notebook makes it: the identity still holds to rounding in double precision
        single = simplex_family(jax.random.key(1), 4, 3, 2, 2, feature_power=2.0)
    assert set(ld.measure_ladder(ld.icl.ReducedAttention(2), single, tasks=16, **sizes).violations.values()) == {0}
    nothing.plot(tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_a_bound_below_the_loss_is_a_violation():
    result = ld.measure_ladder(
        ld.icl.ReducedAttention(4), onehot_family(2, 2, 1), train_length=4, test_length=4, steps=0, seeds=2, tasks=32
    )
    halved = type(result)(values=result.values | {"sup_norm": 0.1 * result.values["sup_norm"]}, losses=result.losses)
    assert result.violations["sup_norm"] == 0 < halved.violations["sup_norm"]


@pytest.mark.parametrize(
    "message, call",
    [
        ("layer must be an nnx.Module", lambda law, **k: ld.measure_risk(lambda p: p, law, **k)),  # pyright: ignore
        (
            "seeds must be a whole number .*; got 1",
            lambda law, **k: ld.measure_risk(LeastSquares(), law, seeds=1, **k),
        ),
        ("law must be one of .*, or have a method sample", lambda law, **k: ld.measure_risk(LeastSquares(), 3, **k)),
        (
            "family must be an MDPFamily or a function",
            lambda law, **k: ld.measure_ladder(LeastSquares(), lambda key: 3, train_length=4, test_length=4),
        ),
    ],
)
def test_a_wrong_argument_is_named(message, call):
    with pytest.raises(ValueError, match=message):
        call(feature_laws.gaussian(LAMBDA), train_length=4, test_lengths=[4])
