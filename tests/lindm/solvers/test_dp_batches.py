"""Backward induction at the sizes and in the batches that `solve_many` chooses, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.solvers import dp as oracles
from lindm.types import MDP


def numpy_stack(count, S, A, H, staged):
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(S), (count, H if staged else 1, S, A)), rng.normal(size=(count, H, S, A))


def as_stack(P, r):
    return MDP(P=jnp.asarray(P), r=jnp.asarray(r), rho=jnp.full((len(P), P.shape[-1]), 1 / P.shape[-1]))


def numpy_plan(P, r):
    H, S, A = r.shape
    Q, V = np.empty_like(r), np.zeros(S)
    for h in reversed(range(H)):
        for s in range(S):
            for a in range(A):
                Q[h, s, a] = r[h, s, a] + np.dot(P[h if len(P) > 1 else 0, s, a], V)
        V = Q[h].max(-1)
    return Q


@pytest.mark.parametrize("H", [1, 2, 6])
@pytest.mark.parametrize("staged", [False, True])
def test_one_kernel_for_all_stages_or_one_for_each_gives_the_values_of_numpy(staged, H):
    P, r = numpy_stack(1, 7, 3, H, staged)
    plan, Q = oracles.backward_induction(jax.tree.map(lambda x: x[0], as_stack(P, r))), numpy_plan(P[0], r[0])
    np.testing.assert_allclose(plan.Q, Q, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(plan.V, Q.max(-1), rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(plan.pi, Q.argmax(-1))
    assert plan.pi.dtype == jnp.int32 and plan.Q.shape == (H, 7, 3)


def batches_of(monkeypatch, work):
    """How `work` was mapped: the batch size given to `lax.map` (1 for none), or the word vmap."""
    seen, plain = [], jax.lax.map
    monkeypatch.setattr(
        jax.lax, "map", lambda f, xs, *, batch_size=None: seen.append(batch_size or 1) or plain(f, xs, batch_size=batch_size)
    )
    result = work()
    return result, seen or ["vmap"]


# S, models, batch: as many as fit 48 KiB, and divide the stack; a stack that fits whole is one batch
@pytest.mark.parametrize(
    "S, count, expected", [(2, 6, "vmap"), (6, 24, 12), (6, 34, 2), (6, 13, 1), (12, 3, "vmap"), (30, 2, 1), (30, 1, 1)]
)
def test_every_automatic_batch_size_is_a_loop_over_the_stack(monkeypatch, S, count, expected):
    P, r = numpy_stack(count, S, 3, 4, staged=True)
    assert oracles.BATCH_BYTES == 48 * 1024
    stack = as_stack(P, r)
    plans, seen = batches_of(monkeypatch, lambda: oracles.solve_many(oracles.backward_induction, stack))
    assert seen == [expected]
    for i in range(count):
        np.testing.assert_allclose(plans.Q[i], numpy_plan(P[i], r[i]), rtol=1e-12, atol=1e-13)


def test_on_an_accelerator_the_stack_is_one_batch(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    stack = as_stack(*numpy_stack(3, 30, 3, 4, staged=True))
    plans, seen = batches_of(monkeypatch, lambda: oracles.solve_many(oracles.backward_induction, stack))
    assert seen == ["vmap"] and plans.V.shape == (3, 4, 30)


def test_a_batch_size_that_is_given_is_used_and_may_leave_a_remainder(monkeypatch):
    P, r = numpy_stack(5, 4, 2, 3, staged=False)
    pi = jnp.zeros((5, 3, 4), jnp.int32)
    for requested, expected in ((1, 1), (2, 2), (5, "vmap"), (9, "vmap")):
        with monkeypatch.context() as patch:
            values, seen = batches_of(
                patch,
                lambda requested=requested: oracles.solve_many(oracles.policy_value, as_stack(P, r), pi, batch_size=requested),
            )
        assert seen == [expected]
        for i in range(5):
            one = jax.tree.map(lambda x, i=i: x[i], as_stack(P, r))
            np.testing.assert_allclose(values[i], oracles.policy_value(one, pi[i]), rtol=1e-12)
