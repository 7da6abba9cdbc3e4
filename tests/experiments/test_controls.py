"""The mutants: records, and a harness that would notice a mutant that is not one."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.io import files
from lindm_experiments import controls
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from lindm_experiments.harness.experiments import points_of


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return [{"point": p} | files.to_jsonable(controls.measure(controls.SMOKE, p)) for p in points_of(controls, controls.SMOKE)]


def _ideal() -> list[dict]:
    record = {
        "swap": {"honest": 1.0, "mutant": 0.4},
        "leak": {"honest": 1.0, "mutant": 0.7},
        "untrained": {"honest": 0.01, "mutant": 1.0},
        "horizon": {"honest": 0, "mutant": 900},
        "policies": 1000,
    }
    out = [copy.deepcopy(record) for _ in range(6)]
    for i, r in enumerate(out):
        for name in ("swap", "leak"):
            r[name]["mutant"] += 1e-3 * i
    return out


def test_mutants_fail_and_together_they_pass():
    verdicts = {v.id: v.verdict for v in controls.check(_ideal())}
    assert verdicts == dict.fromkeys(claim_ids("controls"), FAIL) | {"controls": PASS}


@pytest.mark.parametrize(
    ("name", "version", "value"), [("swap", "mutant", 1.0), ("leak", "honest", 0.9), ("horizon", "honest", 1)]
)
def test_a_mutant_that_is_not_caught_or_a_twin_that_fails_is_seen(name, version, value):
    records = _ideal()
    for r in records:
        r[name][version] = value
    assert {v.id: v.verdict for v in controls.check(records)}["controls"] == FAIL


def test_the_measured_risk_is_that_of_numpy():
    A, w = jnp.diag(jnp.array([0.5, 0.8])), jnp.array([[1.0, -2.0]])
    got = controls.measured_risk(jax.random.key(3), A, w, n=5, prompts=4096)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40000, 5, 2))
    S = np.einsum("bnd,bn->bd", x, x @ np.asarray(w[0])) / 5
    errors = ((S @ np.asarray(A) - np.asarray(w)) ** 2).sum(1)
    assert abs(float(got) - errors.mean()) < 5 * errors.std() * (1 / 4096 + 1 / 40000) ** 0.5


def test_smoke_records_and_figure(records):
    assert all(r["horizon"]["honest"] == 0 < r["horizon"]["mutant"] for r in records)
    assert set(controls.plot(records)) == {"controls"}


def test_a_config_out_of_range_names_its_field():
    for field, value in (("M", 16), ("prompts", 1000), ("leaked", 0)):
        with pytest.raises(ValueError, match=field):
            replace(controls.SMOKE, **{field: value})
