"""Rates and losses from counts against multinomial sampling in numpy, and records that were tampered with."""

import json
from copy import deepcopy
from itertools import product

import numpy as np
import pytest

from lindm_experiments import onehot_coverage as coverage
from lindm_experiments.harness.claims import claim_ids
from lindm_experiments.harness.experiments import points_of
from lindm_experiments.onehot_coverage import CENTERED_LABELS, SHIFTS, SMOKE, A, S
from lindm_theory.mean_policy import policy_loss


@pytest.fixture(scope="module")
def records() -> list[dict]:
    point = points_of(coverage, SMOKE)[0]
    record = json.loads(json.dumps({"point": point} | coverage.measure(SMOKE, point)))
    return [record | {"point": {"seed": s}} for s in range(5)]


def test_a_smoke_run_gives_every_claim_and_the_figure(records):
    assert tuple(v.id for v in coverage.check(records)) == claim_ids("onehot_coverage")
    assert set(coverage.plot(records)) == {"unseen"}


def test_the_law_of_counts_is_the_multinomial_law():
    counts, p = coverage.action_counts(9)
    assert p.sum() == pytest.approx(1, abs=1e-8)
    drawn = np.random.default_rng(0).multinomial(9, [1 / (S * A)] * (S * A), 200_000)[:, :A]
    for c in ([0, 0, 0], [1, 0, 2], [0, 3, 1]):
        exact = float(p[(counts == c).all(1)][0])
        share = (drawn == c).all(1).mean()
        assert abs(share - exact) < 5 * np.sqrt(exact * (1 - exact) / len(drawn))


def test_the_law_of_the_action_is_that_of_simulated_contexts():
    rng = np.random.default_rng(1)
    Q = np.array([0.4, -0.3, 0.2])
    counts = rng.multinomial(6, [1 / (S * A)] * (S * A), 100_000)[:, :A]
    picked = np.argmax(counts * Q, 1)
    law, rate = coverage.exact_actions(Q, 6)
    share = np.bincount(picked, minlength=A) / len(picked)
    assert np.abs(share - law).max() < 5 * 0.5 / np.sqrt(len(picked))
    mixed = (counts > 0).any(1) & (counts == 0).any(1)
    unseen = counts[np.arange(len(counts)), picked] == 0
    assert abs(unseen[mixed].mean() - rate) < 5 * 0.5 / np.sqrt(mixed.sum())


@pytest.mark.parametrize(("Q", "rate"), [([0.2, 0.5, 0.9], 0.0), ([-0.2, -0.5, -0.9], 1.0)])
def test_the_rate_is_zero_for_positive_and_one_for_negative_values(Q, rate):
    assert coverage.exact_actions(np.array(Q), 7)[1] == pytest.approx(rate, abs=1e-12)


def test_with_fair_signs_the_rate_is_the_mean_of_two_to_the_minus_seen():
    signs = np.array(list(product((-1.0, 1.0), repeat=A)))
    assert np.mean([coverage.exact_actions(s, 5)[1] for s in signs]) == pytest.approx(coverage.sign_law(5), rel=1e-6)


def test_the_exact_loss_is_the_mean_loss_over_every_deterministic_policy():
    rng = np.random.default_rng(2)
    H = 2
    P = rng.dirichlet(np.ones(S), (H, S, A))
    gap = rng.exponential(size=(H, S, A))
    law = rng.dirichlet(np.ones(A), (H, S))
    rho = np.full(S, 1 / S)
    total = 0.0
    for choice in product(range(A), repeat=H * S):
        pi = np.array(choice).reshape(H, S)
        weight = np.prod(np.take_along_axis(law, pi[..., None], -1))
        d, loss = rho, 0.0
        for h in range(H):
            loss += d @ gap[h][np.arange(S), pi[h]]
            d = d @ P[h][np.arange(S), pi[h]]
        total += weight * loss
    assert float(policy_loss(P, gap, rho, law)) == pytest.approx(total, rel=1e-10)


def test_measured_and_exact_agree_and_the_imputed_constant_changes_nothing(records):
    for name in SHIFTS:
        cell = records[0]["problems"][name]
        for kind, exact in (("diagonal", "raw"), (CENTERED_LABELS, CENTERED_LABELS)):
            np.testing.assert_allclose(cell["loss"][kind], cell["loss_exact"][exact], rtol=0.3)
        assert cell["imputed_differs"] == 0
    assert records[0]["problems"]["positive"]["rate"]["diagonal"] == [0.0] * len(SMOKE.M)
    assert records[0]["problems"]["negative"]["rate"]["diagonal"] == [1.0] * len(SMOKE.M)


def test_the_three_families_differ_by_a_constant(records):
    cells = records[0]["problems"]
    for name in SHIFTS:
        np.testing.assert_allclose(cells[name]["loss"][CENTERED_LABELS], cells["centered"]["loss"][CENTERED_LABELS], rtol=1e-9)


def test_a_rate_that_is_off_refutes_the_claim(records):
    good = deepcopy(records)
    for record in good:
        for cell in record["problems"].values():
            cell["rate"]["trained"] = list(cell["rate_exact"]["raw"])
    assert coverage.check(good)[0].verdict == "PASS"
    for record in good:
        record["problems"]["negative"]["rate"]["trained"] = [0.9] * len(SMOKE.M)
    assert coverage.check(good)[0].verdict == "FAIL"


def test_a_loss_that_is_off_and_a_cure_that_works_are_seen(records):
    broken = deepcopy(records)
    for record in broken:
        record["problems"]["positive"]["loss"]["diagonal"] = [2 * v for v in record["problems"]["positive"]["loss_exact"]["raw"]]
        record["problems"]["negative"]["rate"]["real"] = [0.1] * len(SMOKE.M)
        record["problems"]["negative"]["loss"][CENTERED_LABELS] = [9.0] * len(SMOKE.M)
    verdicts = {v.id: v.verdict for v in coverage.check(broken)}
    assert verdicts["onehot-coverage/loss"] == "FAIL"
    assert verdicts["onehot-coverage/imputation"] == "PASS"  # it is expected to fail
    assert verdicts["onehot-coverage/centering"] == "FAIL"


@pytest.mark.parametrize("change", [{"tasks": 0}, {"M": ()}, {"M": (8, 4)}, {"steps": -1}])
def test_a_config_out_of_range_is_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        coverage.Config(**change)
