"""The mutants: records, and a harness that would notice a mutant that is not one."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm_experiments import controls
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(controls)


def _ideal() -> list[dict]:
    record = {
        "swap": {"honest": 1.0, "mutant": 0.4},
        "leak": {"predicted": [1.0, 1.0, 0.99, 0.98, 0.96, 0.7], "beside": [1.0, 0.998, 0.995, 0.98, 0.95, 0.7]},
        "undertrained": {"honest": 0.01, "mutant": 0.04},
        "horizon": {"honest": 0, "mutant": 50},
        "policies": 1000,
        "bounds": {name: {"honest": [1.02, 1.4], "mutant": [0.6, 8.0]} for name in controls.BOUNDS},
    }
    out = [copy.deepcopy(record) for _ in range(6)]
    for i, r in enumerate(out):
        r["swap"]["mutant"] += 1e-3 * i
        r["leak"] = {kind: [values[0], *(x + 1e-4 * i for x in values[1:])] for kind, values in r["leak"].items()}
    return out


@pytest.mark.fault("F24")
def test_mutants_fail_and_together_they_pass():
    verdicts = {v.id: v.verdict for v in controls.check(_ideal())}
    assert verdicts == dict.fromkeys(claim_ids("controls"), FAIL) | {"controls": PASS}


@pytest.mark.fault("F24")
@pytest.mark.parametrize(
    ("name", "version", "value"), [("swap", "mutant", 1.0), ("undertrained", "honest", 0.03), ("horizon", "honest", 1)]
)
def test_a_mutant_that_is_not_caught_or_a_twin_that_fails_is_seen(name, version, value):
    records = _ideal()
    for r in records:
        r[name][version] = value
    assert {v.id: v.verdict for v in controls.check(records)}["controls"] == FAIL


@pytest.mark.fault("F24")
def test_a_leak_or_a_mistaken_bound_that_is_not_caught_is_seen():
    for spoil in (
        lambda r: r["leak"].update(predicted=[1.0] * 6),
        lambda r: r["leak"]["predicted"].__setitem__(0, 0.9),
        lambda r: r["bounds"][controls.BOUNDS[3]].update(mutant=[1.2]),
        lambda r: r["bounds"][controls.BOUNDS[0]].update(honest=[1.02, 0.9]),
    ):
        records = _ideal()
        for r in records:
            spoil(r)
        assert {v.id: v.verdict for v in controls.check(records)}["controls"] == FAIL


def test_the_smallest_leak_that_is_seen_is_in_the_note():
    notes = {v.id: v.note for v in controls.check(_ideal())}
    assert "seen from 1% on beside the layer without a leak, from 30% on by the band" in notes["controls/leak"]
    records = _ideal()
    for r in records:
        r["leak"]["beside"][2] = 1.0  # what is seen at 1 % and not at 3 % is chance
        r["leak"]["predicted"] = [1.0] * 6
    assert (
        "seen from 10% on beside" in controls.check(records)[2].note
        and ", not at all by the band" in controls.check(records)[2].note
    )


def test_a_share_of_the_training_tasks_are_the_leaked_ones():
    leaked = jnp.array([[3.0, 0.0], [0.0, 5.0]], jnp.float32)
    draw = controls._draw(4, 4096)
    for share in (0.0, 0.1, 1.0):
        _, target = draw(jax.random.key(1), leaked, jnp.float32(share))
        norms = np.linalg.norm(target, axis=-1) / 2**0.5
        known = np.isclose(norms, 3, rtol=1e-5) | np.isclose(norms, 5, rtol=1e-5)
        assert abs(known.mean() - share) < 0.02


@pytest.mark.fault("F24")
def test_every_mistake_of_a_bound_is_outside_the_band_of_its_claim():
    for ratios in controls.mistaken_bounds(5).values():
        assert all(1 <= x <= 1.5 for x in ratios["honest"]) and not all(1 <= x <= 1.5 for x in ratios["mutant"])


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
    assert all(set(r["bounds"]) == set(controls.BOUNDS) for r in records)
    assert set(controls.plot(records)) == {"controls"}


def test_a_config_out_of_range_names_its_field():
    for field, value in (("M", 16), ("prompts", 1000), ("leaked", 0), ("slips", 2.0)):
        with pytest.raises(ValueError, match=field):
            replace(controls.SMOKE, **{field: value})
