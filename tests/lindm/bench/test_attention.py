"""The benchmark measures the same work on both sides, against an exact risk."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.bench import attention, timing
from lindm.cli.main import main
from lindm.icl.attention import FullAttention

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def dense_weights(d, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(d + 1, d + 1)) / d, rng.normal(size=(d + 1, d + 1)) / d


def test_the_exact_risk_is_the_monte_carlo_risk_of_the_layer():
    d, n, batch = 3, 6, 400_000
    W_KQ, W_PV = dense_weights(d, 0)
    layer = FullAttention(d, dtype=jnp.float64)
    layer.W_KQ[...], layer.W_PV[...] = jnp.asarray(W_KQ)[None], jnp.asarray(W_PV)[None]
    prompt, target = attention.gaussian_draw(batch, d, n)(jax.random.key(0))
    squares = np.asarray((jax.jit(jax.vmap(layer))(prompt) - target) ** 2, np.float64)
    assert abs(squares.mean() - attention.exact_risk(W_KQ, W_PV, n)) < 5 * squares.std() / np.sqrt(batch)


def test_no_weights_do_better_than_the_optimal_risk_and_the_inverse_of_gamma_attains_it():
    d, n = 5, 20
    W_KQ, W_PV = np.zeros((d + 1, d + 1)), np.zeros((d + 1, d + 1))
    W_KQ[:d, :d], W_PV[d, d] = np.eye(d) / (1 + (d + 1) / n), 1.0
    assert attention.exact_risk(W_KQ, W_PV, n) == pytest.approx(attention.optimal_risk(d, n), rel=1e-12)
    rng = np.random.default_rng(0)
    for _ in range(50):
        step = 0.1 * rng.normal(size=(2, d + 1, d + 1))
        assert attention.exact_risk(W_KQ + step[0], W_PV + step[1], n) > attention.optimal_risk(d, n)


def test_training_as_in_the_bench_comes_within_one_percent_of_the_optimal_loss():
    _, d, n = attention.HEADLINE
    risk = attention.exact_risk(*attention.run_ours(attention.HEADLINE, 1600, 1), n)
    assert attention.optimal_risk(d, n) < risk < 1.01 * attention.optimal_risk(d, n)


def a_measurement(cost):
    return {
        "start": 2.0,
        "call": 0.01,
        "batch": [cost * b for b in attention.BATCHES],
        "length": [cost * n for n in attention.LENGTHS],
        "given": [cost * b / 2 for b in attention.BATCHES],
        "draw": [cost * b / 4 for b in attention.BATCHES],
        "bits": [cost * b / 5 for b in attention.BATCHES],
        "matmul": 2.0 * attention.step_operations((1, *attention.HEADLINE[1:])),
        "copy": 8.0 * attention.step_bytes((1, *attention.HEADLINE[1:])),
        "dimension": [cost * d for d in attention.DIMENSIONS],
        "optimum": {"steps": 800, "seconds": cost, "worst": 0.005},
        "memory": 10 * cost,
    }


def test_rows_have_the_ratio_to_the_peer():
    table = attention.rows(a_measurement(1.0), a_measurement(20.0), a_measurement(4.0))
    assert all(set(row) == {"work", "ours", "peer", "peer_name", "ratio", "unit"} for row in table)
    for row in table:
        if row["unit"] in ("contexts/CPU-s", "MiB") or ("optimal loss" in row["work"] and row["unit"] == "CPU-s"):
            assert row["ratio"] == pytest.approx(4.0 if row["peer_name"] == attention.MOMENTS else 20.0)
        else:
            assert row["ratio"] is None
    shares = {row["peer_name"]: row["ours"] for row in table if row["unit"] == "share"}
    assert shares == pytest.approx({attention.MATMUL: 1.0, attention.COPY: 0.25, attention.BITS: 0.8})
    exponents = [row for row in table if "exponent" in row["work"]]
    assert len(exponents) == 4 and all(row["ours"] == pytest.approx(1.0) for row in exponents)


def test_without_torch_the_peer_is_null_and_the_bench_still_runs(monkeypatch, capsys):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(attention, "_side", lambda side: a_measurement(1.0))
    assert main(["bench", "attention", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert all(row["peer"] is None and row["ratio"] is None for row in table)
    assert all(row["peer_name"] == attention.MISSING for row in table if row["unit"] != "share")
    assert main(["bench", "attention"]) == 0
    assert "contexts/CPU-s" in capsys.readouterr().out


def test_a_budget_that_does_not_suffice_is_null_and_not_a_number_out_of_the_air():
    def never(shape, steps, seed):
        return np.zeros((6, 6)), np.zeros((6, 6))

    assert attention.time_to_optimum(never, attention.HEADLINE) == {"steps": None, "seconds": None, "worst": None}
    table = attention.rows(
        {**a_measurement(1.0), "optimum": attention.time_to_optimum(never, attention.HEADLINE)}, a_measurement(2.0), None
    )
    assert [row["ratio"] for row in table if "optimal loss" in row["work"]] == [None] * 3


def test_the_operations_of_a_step_are_those_of_a_program_that_is_counted():
    """XLA counts the products and sums of the training loss and its gradient."""
    d, n = 5, 1280  # the part of the optimizer and of the d x d products is small
    prompt, target = attention.gaussian_draw(1, d, n)(jax.random.key(0))

    def loss(W_KQ, W_PV):
        values = prompt.x[0] @ W_PV[:-1] + W_PV[-1] * prompt.y[0]
        row = (values @ prompt.x[0]) @ W_KQ[:-1] + (values @ prompt.y[0]) * W_KQ[-1]
        return (prompt.query[0] @ row / n - target[0])[0] ** 2

    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(jnp.ones((d + 1, d)), jnp.ones(d + 1)).compile()
    counted = dict(program.cost_analysis() or {})["flops"]
    assert attention.step_operations((1, d, n)) == pytest.approx(counted, rel=0.15)


def test_the_cost_of_a_step_is_a_difference_without_what_a_call_costs_and_what_compiles(monkeypatch):
    """A clock that runs for 7 seconds in a call, for 1 in a step, and for 100 where the number of steps is new."""
    seen: set[int] = set()

    def run(shape, steps, seed):
        cost = 7.0 + steps + 100 * (steps not in seen)
        seen.add(steps)
        return cost

    monkeypatch.setattr(attention, "cpu_seconds", lambda work, repeats=1: min(work() for _ in range(repeats)))
    for ours in (True, False):
        monkeypatch.setitem(attention.PARTS, "ours", (run if ours else attention.train_on_one_batch, attention._draw_many))
        assert attention.step_seconds(run, (64, 5, 20), target=500.0) == pytest.approx(1.0)
        seen.clear()


def test_the_parts_do_what_their_rows_say():
    losses = attention.train_on_one_batch((8, 2, 4), 200, 0)
    assert losses[-1] < losses[0] and attention.copy_rate(1) > 1e7
    draws = attention._draw_many(jax.random.key(0), (8, 2, 4), 3)
    prompts = [attention.gaussian_draw(8, 2, 4)(jax.random.fold_in(jax.random.key(0), t)) for t in range(3)]
    assert float(draws) == pytest.approx(sum(float(a.sum()) for a in jax.tree.leaves(prompts)), rel=1e-4)


@pytest.mark.parity
@needs_torch
def test_the_torch_layers_are_the_layer_of_the_bench():
    """After no step at a rate of zero, and after many: both peers find what ours finds."""
    import torch  # pyright: ignore[reportMissingImports]

    state = torch.random.get_rng_state()
    try:
        _, d, n = attention.HEADLINE
        for plain in (True, False):
            risk = attention.exact_risk(*attention.torch_run(attention.HEADLINE, 1600, 1, plain), n)
            assert attention.optimal_risk(d, n) < risk < 1.01 * attention.optimal_risk(d, n)
        plain, moments = (attention.torch_run((8, 3, 6), 30, 2, plain) for plain in (True, False))
        for a, b in zip(plain, moments, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    finally:
        torch.random.set_rng_state(state)


@pytest.mark.parity
@needs_torch
def test_memory_is_measured_in_processes_of_their_own_and_the_plain_peer_holds_the_score_matrix():
    batch, _, n = attention.MEMORY
    assert timing.in_worker(attention.MODULE, "torch", "memory")["memory"] > batch * n * n * 4 / 2**20
    assert timing.in_worker(attention.MODULE, "ours", "memory")["memory"] < batch * n * n * 4 / 2**20
