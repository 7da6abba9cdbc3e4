"""`solve`: the method, the bounds, the labels and the errors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.solvers import rollout, tree
from lindm.solvers.belief_net import Net
from lindm.solvers.solve import first_action, label, labels, method_for, solve
from lindm.types import BOUNDED, CERTIFIED, EXACT, MDP, POMDP

demonstrate = jax.jit(rollout.demonstrate, static_argnames="n")


def first_model(problem) -> POMDP:
    return jax.tree.map(lambda x: x[0], problem.models)


@pytest.fixture
def small(brute):
    return brute.random(31, S=3, A=2, O=2, M=1, H=5)


def test_the_exact_method_is_taken_where_it_fits_the_budget(brute):
    apomdp = brute.random(0, A=2, O=2, M=2, H=4).problem()
    pomdp, need = first_model(apomdp), tree.memory_bytes(apomdp)
    assert need == 4 * 8 * 2 * (1 + 8 + 64 + 512)
    assert method_for(apomdp, need) == "tree" and method_for(apomdp, need - 1) == "net"
    assert method_for(pomdp, 0) == "hsvi" and method_for(pomdp) == "tree"
    mdp = MDP(P=jnp.ones((1, 1, 1, 1)), r=jnp.ones((2, 1, 1)), rho=jnp.ones(1))
    assert method_for(mdp, 0) == "backward induction"


def test_every_method_brackets_the_value(small):
    problem = first_model(small.problem())
    value = small.V(list(small.rho), 0)
    exact = solve(problem)
    assert exact.exact and exact.method == "tree"
    np.testing.assert_allclose([exact.value, exact.lower, exact.upper], value, rtol=1e-12)
    for method in ("hsvi", "net"):
        bounded = solve(problem, method)
        assert bounded.method == method and not bounded.exact
        assert bounded.lower - 1e-9 <= value <= bounded.upper + 1e-9
        assert bounded.lower <= bounded.value <= bounded.upper
        assert bounded.upper - bounded.lower < 0.05 * abs(value)


def test_beyond_the_budget_the_answer_is_certified(small):
    problem = first_model(small.problem())
    assert solve(problem, budget=1000).method == "hsvi"
    apomdp = small.problem()
    assert solve(apomdp, budget=1000).method == "hsvi"  # an APOMDP with one model is convex


@pytest.mark.parametrize(
    ("other", "certificate", "regret"),
    [(0.9, CERTIFIED, 0), (1.0, CERTIFIED, 0), (1 + 1e-13, CERTIFIED, 0), (1 + 1e-9, BOUNDED, 1e-9)],
)
def test_a_label_is_certified_where_no_other_upper_bound_is_above_its_lower_bound(other, certificate, regret):
    got = label(jnp.array([0.5, 1.0]), jnp.array([other, 1.2]), exact=False)
    assert (got.action, got.certificate) == (1, certificate)
    np.testing.assert_allclose(got.regret, regret, rtol=1e-6)
    assert label(jnp.array([0.5, 1.0]), jnp.array([0.5, 1.0]), exact=True).certificate == EXACT


@pytest.mark.parametrize("method", ["hsvi", "net"])
def test_effort_narrows_the_bounds(brute, method):
    problem = first_model(brute.random(33, S=4, A=3, O=3, M=1, H=5).problem())
    widths = [float(s.upper - s.lower) for s in (solve(problem, method, effort=effort) for effort in (2, 64))]
    assert widths[1] < 0.5 * widths[0]
    with pytest.raises(ValueError, match="effort must be a whole number of at least 1; got 0"):
        solve(problem, method, effort=0)


def test_an_mdp_has_the_mean_of_its_first_values():
    rng = np.random.default_rng(0)
    P, r, rho = rng.dirichlet(np.ones(3), (1, 3, 2)), rng.normal(size=(4, 3, 2)), rng.dirichlet(np.ones(3))
    solution = solve(MDP(P=jnp.asarray(P), r=jnp.asarray(r), rho=jnp.asarray(rho)))
    V = np.zeros(3)
    for h in reversed(range(4)):
        V = (r[h] + P[0] @ V).max(-1)
    np.testing.assert_allclose(solution.value, rho @ V, rtol=1e-12)
    assert solution.exact and solution.lower == solution.upper == solution.value


@pytest.mark.parametrize("method", ["hsvi", "net"])
def test_labels_from_bounds_are_valid(brute, method):
    certificates, losses = [], []
    for seed in range(4):
        problem = first_model(brute.random(40 + seed, S=4, A=3, O=3, M=1, H=4).problem())
        exact, bounded = solve(problem), solve(problem, method, effort=1)  # as little as can be: labels of the net are wrong
        episodes, truth = demonstrate(jax.random.key(0), exact, 200, 1.0)
        labeled = labels(bounded, episodes)
        best = np.asarray(truth.Q).max(-1)
        chosen = np.take_along_axis(np.asarray(truth.Q), np.asarray(labeled.action)[..., None], -1)[..., 0]
        certificate, regret = np.asarray(labeled.certificate), np.asarray(labeled.regret)
        assert (regret[certificate == CERTIFIED] == 0).all() and (regret[certificate == BOUNDED] > 0).all()
        assert (best - chosen <= regret + 1e-9).all()
        certificates.append(certificate)
        losses.append(best - chosen)
    assert set(np.unique(certificates)) == {CERTIFIED, BOUNDED}
    assert method == "hsvi" or (np.array(losses) > 1e-6).mean() > 0.01


def test_labels_of_given_episodes_are_those_of_the_rollout(small, brute):
    for problem in (first_model(small.problem()), brute.random(32, M=2, H=3).problem()):
        solution = solve(problem)
        episodes, labeled = demonstrate(jax.random.key(1), solution, 50, 0.5)
        again = labels(solution, episodes)
        np.testing.assert_array_equal(again.action, labeled.action)
        np.testing.assert_array_equal(again.Q, labeled.Q)
        assert (np.asarray(again.certificate) == EXACT).all()


def test_the_first_action_is_the_best_one_before_any_observation(brute):
    for seed in range(5):
        reference = brute.random(seed, M=2, H=3)
        problem = reference.problem()
        assert int(first_action(solve(problem))) == int(np.argmax(reference.Q(list(reference.rho), 0)))


def test_solve_under_jit_and_map_is_solve(brute):
    problems = [brute.random(seed, M=2, H=3).problem() for seed in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *problems)
    together = jax.jit(lambda p: jax.lax.map(lambda q: solve(q).value, p))(stack)
    np.testing.assert_allclose(together, [solve(p).value for p in problems], rtol=1e-12)


def test_a_certified_method_takes_no_more_than_the_budget(brute):
    problem = brute.random(34, S=4, A=3, O=3, M=2, H=5).problem()
    wide, narrow = solve(problem, "net", budget=1 << 20), solve(problem, "net")
    assert isinstance(wide.tables, Net) and isinstance(narrow.tables, Net)
    assert wide.tables.beliefs.nbytes < narrow.tables.beliefs.nbytes
    assert wide.lower - 1e-9 <= narrow.lower and narrow.upper <= wide.upper + 1e-9
    with pytest.raises(ValueError, match="effort must fit the budget of 1,000 bytes; 20,000 takes"):
        solve(problem, "net", budget=1000, effort=20_000)


def test_a_long_horizon_is_not_unrolled_by_default():
    steady = brute_chain(60)
    assert method_for(steady) == "hsvi" and method_for(brute_chain(40)) == "tree"
    np.testing.assert_allclose(solve(steady).value, 60.0, rtol=1e-12)


def brute_chain(H) -> POMDP:
    one = jnp.ones((1, 1, 1, 1))
    return POMDP(P=one, O=one, r=jnp.ones((H, 1, 1)), rho=jnp.ones(1))


def test_single_precision_raises_an_error(brute):
    problem = jax.tree.map(lambda x: x.astype(jnp.float32), brute.random(0, H=2).problem())
    with pytest.raises(ValueError, match=r"double precision \(jax_enable_x64\).*; got float32"):
        solve(problem)


def test_the_value_of_a_bad_action_does_not_blur_the_others():
    r = jnp.asarray([[[0.2, 0.9, -1e12]]])
    problem = POMDP(P=jnp.ones((1, 1, 3, 1)), O=jnp.ones((1, 3, 1, 1)), r=r, rho=jnp.ones(1))
    solution = solve(problem)
    assert int(first_action(solution)) == 1 and float(solution.value) == 0.9
    _, labeled = demonstrate(jax.random.key(0), solution, 3, 1.0)
    assert (np.asarray(labeled.action) == 1).all()


def test_methods_that_do_not_fit_raise_an_error(brute):
    apomdp = brute.random(0, M=2, H=3).problem()
    with pytest.raises(ValueError, match="method must be one of auto, tree, hsvi, net; got 'magic'"):
        solve(apomdp, "magic")
    with pytest.raises(ValueError, match="method tree must fit the budget of 10 bytes; the tree of this problem takes"):
        solve(apomdp, "tree", budget=10)
    with pytest.raises(ValueError, match=r"hsvi needs one model.*got an APOMDP with 2"):
        solve(apomdp, "hsvi")
    with pytest.raises(ValueError, match=r"effort must be left out where the answer is exact \(tree\); got 5"):
        solve(apomdp, effort=5)
    mdp = MDP(P=jnp.eye(2)[None, :, None], r=jnp.ones((2, 2, 1)), rho=jnp.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="method must be auto for an MDP; got 'tree'"):
        solve(mdp, "tree")
    assert int(first_action(solve(mdp))) == 0
    with pytest.raises(ValueError, match="problem must have one first state: the first action of an MDP depends on it"):
        first_action(solve(replace(mdp, rho=jnp.array([0.5, 0.5]))))
    with pytest.raises(ValueError, match="method net runs on the host, not under jit or vmap"):
        jax.jit(lambda p: solve(p, "net").value)(apomdp)
    with pytest.raises(ValueError, match=r"budget of 2,147,483,648 bytes; the tree of this problem takes more than 2\^60"):
        solve(brute.random(0, H=100).problem(), "tree")
