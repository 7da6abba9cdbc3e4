"""The flow beside the layer: the equation by another route, one step against the field, verdicts from records."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot

from lindm_experiments import gradient_flow
from lindm_experiments.harness.claims import FAIL, PASS
from tests.experiments.conftest import smoke_records

CFG = gradient_flow.SMOKE


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(gradient_flow)


def _field(theta: np.ndarray) -> np.ndarray:
    """[ZFB] Lemma 5.2 in numpy, for the geometric spectrum of condition number 3 and trace 3."""
    spectrum = 3.0 ** -(np.arange(3) / 2)
    L = np.diag(3 * spectrum / spectrum.sum())
    gamma = (1 + 1 / CFG.N) * L + np.trace(L) / CFG.N * np.eye(3)
    U, u = theta[:9].reshape(3, 3), theta[9]
    dU = -(u**2) * gamma @ L @ U @ L + u * L @ L
    du = -np.trace(u * gamma @ L @ U @ L @ U.T - L @ L @ U.T)
    return np.append(dU.ravel(), du)


def test_the_recorded_flow_obeys_the_equation_of_the_paper(records):
    time, path = np.array(records[0]["flow"]["time"]), np.array(records[0]["flow"]["path"])
    theta, t = path[0].copy(), 0.0
    for k in range(1, len(time)):
        steps = 400  # the midpoint rule: another method
        h = (time[k] - t) / steps
        for _ in range(steps):
            theta = theta + h * _field(theta + h / 2 * _field(theta))
        t = time[k]
        np.testing.assert_allclose(path[k], theta, rtol=1e-5, atol=1e-7)
        if k == 4:
            break


def test_the_distance_is_that_of_the_recorded_paths(records):
    r = records[0]
    flow = np.array(r["flow"]["path"])
    for run in r["runs"]:
        for at, path, distance in zip(run["time"], np.array(run["path"]), run["distance"], strict=True):
            exact = np.array([np.interp(at, r["flow"]["time"], column) for column in flow.T])
            expected = np.hypot(np.linalg.norm(path[:10] - exact), np.linalg.norm(path[10:])) / r["way"]
            assert distance == pytest.approx(expected, abs=2e-3)
    assert r["runs"][0]["time"] == pytest.approx(r["runs"][1]["time"][::2])


def test_one_step_of_the_layer_is_the_field_times_its_rate():
    rate, batch = 0.02, 20_000
    cfg = replace(CFG, steps=1, looks=1, rates=(rate, rate / 2), batch=batch)
    path = gradient_flow.layer_path(cfg, jax.random.key(0), rate)
    step = (path[1] - path[0]) / rate
    expected = np.append(_field(path[0, :10]), np.zeros(6))  # v and z do not move
    assert np.abs(step - expected).max() < 0.05 * np.abs(expected).max()


def test_the_rate_is_a_factor_of_the_loss():
    root = jnp.linalg.cholesky(jnp.diag(jnp.array([2.0, 1.0])))
    small, large = (gradient_flow.draw(jax.random.key(1), root, jnp.asarray(r), jnp.zeros(4), jnp.zeros(3)) for r in (0.1, 0.4))
    np.testing.assert_array_equal(small[0].x, large[0].x)
    np.testing.assert_allclose(2 * small[0].query, large[0].query)
    np.testing.assert_allclose(2 * small[1], large[1])


def _at(records: list[dict], distance: float) -> list[dict]:
    out = []
    for e in np.random.default_rng(0).normal(0, 1e-3, 6):
        r = copy.deepcopy(records[0])
        r["runs"][-1]["distance"] = [0.0, distance + e]
        out.append(r)
    return out


def test_the_verdict_follows_the_largest_distance_at_the_smallest_step(records):
    assert [v.verdict for v in gradient_flow.check(_at(records, 0.02))] == [PASS]
    assert [v.verdict for v in gradient_flow.check(_at(records, 0.08))] == [FAIL]


def test_the_figure_is_drawn_from_the_records(records):
    figures = gradient_flow.plot(records)
    assert set(figures) == {"paths"}
    pyplot.close(figures["paths"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rates": (0.1, 0.03)}, "rates must be at least two positive steps"),
        ({"rates": (0.1, 0.1)}, "rates must fall"),
        ({"kappa": 0.5}, "kappa must be a finite condition number"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"batch": 0}, "batch must be a whole number"),
    ],
)
def test_a_configuration_out_of_range_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CFG, **change)
