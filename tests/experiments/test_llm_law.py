"""The law of a trained transformer: reference predictors by other routes, and verdicts on records."""

import copy
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm_experiments import llm_law
from lindm_experiments.harness.claims import FAIL, INCONCLUSIVE, PASS, claim_ids
from lindm_experiments.llm_law import FULL, QUICK, D
from tests.experiments.conftest import smoke_records


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(llm_law)


@pytest.mark.slow
def test_a_record_holds_the_three_readers(records):
    assert [r["point"]["N"] for r in records] == [2, 4]
    for r in records:
        assert [row["M"] for row in r["rows"]] == [2, 4]
        for row in r["rows"]:
            assert row["bayes"] <= row["transformer"]  # nothing is trained in five steps
            assert 0.05 < row["bayes"] < 1 / 12


def test_bayes_is_the_mean_of_the_posterior_and_its_risk_the_sum_over_all_contexts():
    """Of one context, and in the mean: M returns of the queried pair among M = 2 pairs."""
    grid = (np.arange(4000) + 0.5) / 4000  # Q*, uniform
    total = 0.0
    for seen in range(3):  # how many of the two are of the pair
        chance = [((D - 1) / D) ** 2, 2 / D * (D - 1) / D, 1 / D**2][seen]
        for returns in product((0, 1), repeat=seen):
            likely = grid ** sum(returns) * (1 - grid) ** (seen - sum(returns))
            mean = (likely * grid).sum() / likely.sum()
            assert mean == pytest.approx((1 + sum(returns)) / (2 + seen), rel=1e-6)
            total += chance * (likely * (grid - mean) ** 2).mean()
    with jax.enable_x64(False):
        weights = llm_law.train(jax.random.key(0), 2, 1)
        _, bayes = llm_law.tested(weights, jax.random.key(1), 2, 64 * 256)
    assert float(bayes) == pytest.approx(total, rel=0.01)


def test_the_layers_risk_is_what_contexts_that_are_drawn_give():
    """numpy draws contexts and applies the trained layer's weights, from the moments over all pairs of pairs."""
    rng, n, M, N = np.random.default_rng(0), 200_000, 4, 8
    # A = E[w S'] E[S S']^-1 by enumeration: S = (1/N) sum (y - 1/2) x, pairs independent given Q*
    second = np.zeros((D, D))
    for i, j in product(range(D), repeat=2):
        same = (i == j) * (1 / D) * 0.25 / N  # (y - 1/2)^2 = 1/4
        other = (1 - 1 / N) / D**2 * (1 / 12 if i == j else 0.0)
        second[i, j] = same + other
    A = (np.eye(D) / 12 / D) @ np.linalg.inv(second)
    Q = rng.random((n, D))
    pairs = rng.integers(0, D, (n, M))
    y = rng.random((n, M)) < np.take_along_axis(Q, pairs, 1)
    S = np.zeros((n, D))
    np.add.at(S, (np.arange(n)[:, None], pairs), (y - 0.5) / M)
    measured = ((S @ A.T - (Q - 0.5)) ** 2).mean()
    assert llm_law.exact_layer(N, (M,))[0] == pytest.approx(measured, rel=0.01)


def test_tokens_hold_pairs_with_returns_and_then_a_query_for_every_pair():
    pairs, y = jnp.array([[0, 5], [3, 3]]), jnp.array([[1, 0], [0, 1]])
    result = llm_law.tokens(pairs, y)
    assert result.tolist() == [[1, 10, *range(12, 18)], [6, 7, *range(12, 18)]]
    seen = {int(2 * p + r) for p in range(D) for r in (0, 1)}
    assert seen.isdisjoint(range(2 * D, 3 * D))


@pytest.mark.slow
def test_training_learns_to_read_the_context():
    with jax.enable_x64(False):
        weights = llm_law.train(jax.random.key(0), 8, 150)
        mine, bayes = llm_law.tested(weights, jax.random.key(1), 8, 2048)
    assert float(bayes) < float(mine) < 1.15 * float(bayes) < 0.9 / 12  # without the context: 1/12


def test_unexplained_variance_of_a_line_in_one_over_M():
    M = (2, 4, 8, 16)
    line = np.array([[3 / m + 0.1 for m in M], [1 / m + 0.5 for m in M]])
    assert llm_law.unexplained(line, M) == pytest.approx(0, abs=1e-12)
    bent = np.array([[0.0, 1.0, 0.0, 1.0]])
    x = np.stack([1 / np.array(M), np.ones(4)], -1)
    rest = bent[0] - x @ np.linalg.lstsq(x, bent[0], rcond=None)[0]
    assert llm_law.unexplained(bent, M) == pytest.approx((rest**2).sum() / ((bent - 0.5) ** 2).sum())
    assert llm_law.unexplained(np.stack([line[:1], bent]), M) == pytest.approx([0, (rest**2).sum()], abs=1e-12)


def made(transformer, gaps=None) -> list[dict]:
    """Records of six seeds in which the transformer's risk is a function of N and M."""
    rng, result = np.random.default_rng(0), []
    for seed, N in product(range(6), (4, 16)):
        rows = []
        for M in (2, 4, 8, 16, 32):
            noise = 1 + 0.003 * rng.normal()
            rows.append({"M": M, "transformer": transformer(N, M) * noise, "bayes": 1 / (M + 12), "layer": 1 / M + 1 / N})
        result.append({"point": {"seed": seed, "predictor": "transformer", "N": N}, "rows": rows})
    for N, at in (gaps or {}).items():
        values = {m: list(v + rng.normal(0, 0.01, 60)) for m, v in at.items()}
        result.append({"point": {"seed": 0, "predictor": "language model", "N": N}, "gaps": values})
    return result


def verdicts(records: list[dict]) -> dict[str, str]:
    return {v.id: v.verdict for v in llm_law.check(records)}


def test_the_verdicts_follow_the_risks():
    good = {2: {"1": 0.4, "8": 0.2}, 8: {"1": 0.5, "8": 0.1}}
    # a line in 1/M that meets Bayes' risk at M = N
    law = lambda N, M: 1 / (N + 12) + (1 / M - 1 / N) * 0.05  # noqa: E731
    result = verdicts(made(law, good))
    assert result == dict.fromkeys(claim_ids("llm_law"), PASS)
    result = verdicts(made(lambda N, M: 1 / (M + 12) + 0.05 * (N == 16), {2: good[8], 8: good[2]}))
    assert result["llm-law/bias"] == FAIL and result["llm-law/language"] == FAIL and result["llm-law/estimation"] == FAIL
    assert verdicts(made(lambda N, M: 0.1 + 0.05 * (M in (4, 16))))["llm-law"] == FAIL


def test_without_a_language_model_its_claim_is_left_open(records):
    result = {v.id: v for v in llm_law.check(records)}
    assert (result["llm-law/language"].verdict, result["llm-law/language"].measured) == (INCONCLUSIVE, None)
    assert {v.verdict for v in result.values()} == {INCONCLUSIVE}  # one seed decides nothing


def test_the_order_of_records_does_not_matter():
    records = made(lambda N, M: 1 / M + 1 / N)
    shuffled = copy.deepcopy(records)
    np.random.default_rng(1).shuffle(shuffled)
    np.testing.assert_array_equal(llm_law.risks(records, "transformer"), llm_law.risks(shuffled, "transformer"))
    assert llm_law.risks(records, "transformer").shape == (6, 2, 5)


def test_demonstrations_are_in_the_order_of_numbers_whatever_the_file_has():
    records = made(lambda N, M: 1 / M, {8: {"1": 0.3, "16": 0.1, "2": 0.2}, 2: {"1": 0.4, "16": 0.1, "2": 0.3}})
    assert [(n, list(gaps)) for n, gaps in llm_law.language_gaps(records).items()] == [(2, [1, 2, 16]), (8, [1, 2, 16])]
    (axis,) = llm_law.plot(records)["language"].axes
    assert [list(line.get_xdata()) for line in axis.lines[:1]] == [[1, 2, 16]]


def test_figures_are_drawn_with_and_without_a_language_model(records):
    assert llm_law.plot(records).keys() == {"risk"}
    assert llm_law.plot(made(lambda N, M: 1 / M, {2: {"1": 0.3, "4": 0.1}})).keys() == {"risk", "language"}


def test_points_end_with_the_language_model():
    assert len(llm_law.points(QUICK)) == 5 * 2
    assert [p["N"] for p in llm_law.points(FULL)[-2:]] == [2, 8]
    assert {p["predictor"] for p in llm_law.points(QUICK)} == {"transformer"}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seeds": 0}, "seeds must be a whole number"),
        ({"N": (4,)}, "N must contain at least 2 rising numbers"),
        ({"N": (4, 5)}, "M must contain every N"),
        ({"contexts": 100}, "contexts must be a multiple of 256; got 100"),
    ],
)
def test_invalid_configurations_raise_errors_that_name_the_field(change, said):
    with pytest.raises(ValueError, match=said):
        replace(QUICK, **change)
