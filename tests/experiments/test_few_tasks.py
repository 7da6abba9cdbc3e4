"""Training on few tasks: the records, the excess risk by numpy, and a criterion that notices another law."""

import copy

import jax
import numpy as np
import pytest

from lindm.problems.linear_mdp import simplex_family
from lindm_experiments import few_tasks
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from lindm_experiments.lib import linear_mdps
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(few_tasks)


def test_smoke_records_decide_every_claim_and_draw_every_figure(records):
    verdicts = few_tasks.check(records)
    assert tuple(v.id for v in verdicts) == claim_ids("few_tasks")
    assert {v.figure for v in verdicts} <= set(few_tasks.plot(records))


def _numpy_layers(table: np.ndarray, Psi: np.ndarray, N: int) -> tuple[np.ndarray, np.ndarray]:
    """A_N and E[S S'] for a uniform design over the rows of the table."""
    Lambda = table.T @ table / len(table)
    K = np.mean([(x @ Psi @ x) * np.outer(x, x) for x in table], axis=0)
    second = (1 - 1 / N) * Lambda @ Psi @ Lambda + K / N
    return Psi @ Lambda @ np.linalg.inv(second), second


def test_predicted_risks_and_the_constant_are_those_of_numpy():
    family = simplex_family(jax.random.key(3), 4, 2, 3, 2)
    rng = np.random.default_rng(0)
    population = rng.normal(size=(4000, 3)) + 1.0
    sets, T, N = rng.normal(size=(2, 5, 3)), np.array([2.0, 5.0]), 6
    A_T, risk_T, least, C = (np.asarray(x) for x in few_tasks.predictions(family, population, sets, T, np.float64(N)))
    table = np.asarray(linear_mdps.pairs_table(family))
    Lambda, Psi = table.T @ table / len(table), population.T @ population / len(population)
    A, second = _numpy_layers(table, Psi, N)
    np.testing.assert_allclose(least, np.trace(Lambda @ (Psi - A @ Lambda @ Psi)), rtol=1e-9)
    B, _ = _numpy_layers(table, sets[1, :2].T @ sets[1, :2] / 2, N)
    np.testing.assert_allclose(A_T[1, 0], B, rtol=1e-8)
    np.testing.assert_allclose(risk_T[1, 0] - least, np.trace(Lambda @ (B - A) @ second @ (B - A).T), rtol=1e-7)
    excess = few_tasks.excess_risk(family, population, A_T, np.float64(N))
    np.testing.assert_allclose(excess, risk_T - least, rtol=1e-7)
    # C by brute force: mean excess of many tasks, times their number
    many = 2000
    drawn = [population[rng.integers(0, len(population), many)] for _ in range(400)]
    deviations = [_numpy_layers(table, w.T @ w / many, N)[0] - A for w in drawn]
    values = many * np.array([np.trace(Lambda @ off @ second @ off.T) for off in deviations])
    assert abs(values.mean() - C[0]) < 5 * values.std() / np.sqrt(len(values)) + 0.02 * C[0]


def test_measured_risks_are_mean_squared_errors_of_prompts():
    """Tasks and features without chance: one vector w, one feature direction, S = x x'w."""
    family = simplex_family(jax.random.key(3), 1, 1, 2, 1)
    x = np.asarray(linear_mdps.pairs_table(family))[0]
    w = np.array([0.5, -2.0])
    layers = np.random.default_rng(1).normal(size=(3, 1, 2, 2))
    got = few_tasks.measured_risks(jax.random.key(0), family, w[None], layers, N=4, prompts=8)
    wanted = [[(x @ (w - A @ x * (x @ w))) ** 2 for A in row] for row in layers]
    np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_sets_are_nested_and_gaussian_tasks_have_the_moment_of_the_population():
    population = np.random.default_rng(2).exponential(size=(1000, 3))
    sets = np.asarray(few_tasks.draw_sets(jax.random.key(0), population, sets=3, gaussian=50, largest=400))
    assert sets.shape == (53, 400, 3)
    assert {tuple(w) for w in sets[:3].reshape(-1, 3)} <= {tuple(w) for w in population}
    gaussian = sets[3:].reshape(-1, 3)
    Psi = population.T @ population / len(population)
    np.testing.assert_allclose(gaussian.T @ gaussian / len(gaussian), Psi, atol=5 * 3 * np.trace(Psi) / np.sqrt(len(gaussian)))


def _ideal(records: list[dict]) -> list[dict]:
    out = [copy.deepcopy(records[i % len(records)]) for i in range(5)]
    for i, r in enumerate(out):
        T = np.array(r["T"])
        r["excess"] = [(r["least"] * (1 + 0.01 * i) / T).tolist()] * 2
        r["measured"] = (np.array(r["predicted"]) * (1 + 1e-3 * i)).tolist()
    return out


def test_a_law_of_one_over_t_passes_and_one_over_the_root_fails(records):
    assert [v.verdict for v in few_tasks.check(_ideal(records))] == [PASS, PASS]
    mutants = _ideal(records)
    for i, r in enumerate(mutants):
        r["excess"] = [(1 / np.array(r["T"]) ** (0.5 + 0.01 * i)).tolist()] * 2
        r["measured"][0][0] *= 1.1
    assert [v.verdict for v in few_tasks.check(mutants)] == [FAIL, FAIL]


def test_the_number_of_tasks_needed_is_interpolated_on_a_straight_line_in_logarithms():
    T = np.array([2.0, 8.0, 128.0])
    assert few_tasks.tasks_needed(T, 3 / T, 0.1) == pytest.approx(30.0)
    assert np.isnan(few_tasks.tasks_needed(T, 1000 / T, 0.1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": (8, 2)}, "T must contain at least 2 rising numbers"),
        ({"fit_from": 128}, "fit_from must leave at least two values of T"),
        ({"pool": 100}, "pool must be a multiple of"),
        ({"sets": 0}, "sets"),
    ],
)
def test_a_configuration_out_of_range_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        few_tasks.Config(**change)
