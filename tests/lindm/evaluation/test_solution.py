"""The policy of a solution, in the protocol of all policies."""

import jax
import numpy as np
import pytest

import lindm as ld
from lindm.evaluation.policies.solution import SolutionPolicy
from lindm.evaluation.policy import Observation
from lindm.families.registry import NamedProblem
from lindm.problems.mdp import draw_mdp
from lindm.solvers import dp
from lindm.solvers.solve import solve


@pytest.mark.parametrize(
    "name, horizon, method, effort",
    [("mdp", 4, "auto", None), ("pomdp", 4, "tree", None), ("pomdp", 4, "hsvi", 200), ("apomdp", 3, "tree", None)],
)
def test_the_policy_of_a_solution_loses_no_more_than_the_bounds_are_apart(name, horizon, method, effort):
    problem = ld.make(name, horizon=horizon, seed=1)
    solution = ld.solve(problem, method, effort=effort)
    policies = {"solution": solution.policy, "oracle": ld.policies.oracle()}
    results = ld.evaluate(problem, policies, tasks=1, demos=1)
    assert results["oracle"].gap == pytest.approx(0, abs=1e-12)
    assert results["solution"].gap_of_value is not None
    lost = results["solution"].gap_of_value * abs(solution.value)
    assert -1e-12 <= lost <= solution.upper - solution.lower + 1e-9
    if solution.exact:
        assert results["solution"].gap == results["oracle"].gap and results["solution"].method == "exact"


def test_the_policy_of_a_solution_takes_the_actions_of_the_recursion(brute):
    reference = brute.random(4, S=3, A=2, O=2, M=2, H=3, alpha=0.6)
    policy, zero = SolutionPolicy(solve(reference.problem())), np.zeros(1, int)
    for observations in ((0, 1), (1, 1)):
        state, beliefs, seen = policy.init([]), list(reference.rho), {}
        for t in range(3):
            state, probabilities = policy.step(state, Observation(stage=t, task=zero, parent=zero, **seen))
            action = int(probabilities[0].argmax())
            assert action == int(np.argmax(reference.Q(beliefs, t)))
            if t < 2:
                _, belief = reference.step(beliefs[1], t, action, 1, observations[t])
                beliefs = [belief] * 2
                seen = {"action": zero + action, "model": zero + 1, "observation": zero + observations[t]}


def test_the_policy_of_an_mdp_is_its_table_of_actions():
    problem = draw_mdp(jax.random.key(0), 4, 3, 3)
    policy, Q, zero = SolutionPolicy(solve(problem)), np.asarray(dp.backward_induction(problem).Q), np.zeros(1, int)
    state, probabilities = policy.step(policy.init([]), Observation(stage=0, task=zero, parent=zero, state=zero + 2))
    assert probabilities[0].argmax() == Q[0, 2].argmax()
    _, probabilities = policy.step(state, Observation(stage=1, task=zero, parent=zero, state=zero + 3, action=zero))
    assert probabilities[0].argmax() == Q[1, 3].argmax()


@pytest.mark.parametrize("assumed", [0, 1])
def test_a_policy_that_assumes_a_model_earns_in_each_models_problem_what_a_plain_recursion_says(brute, assumed):
    reference = brute.random(4, S=3, A=2, O=2, M=2, H=3, alpha=0.6)
    solution = ld.solve(reference.problem())

    def value(true, belief, supposed, t=0):
        """V of the policy: `belief` [S] is that of the true model, `supposed` [M, S] are those by which the policy acts."""
        a = int(np.argmax(reference.Q(supposed, t)))
        total = float(belief @ reference.r[true, t, :, a])
        for o in range(2) if t < 2 else ():
            p, after = reference.step(belief, t, a, true, o)
            _, as_supposed = reference.step(supposed[assumed], t, a, assumed, o)
            total += p * value(true, after, [as_supposed] * 2, t + 1)
        return total

    for true in (0, 1):
        problem = jax.tree.map(lambda x, m=true: x[m], reference.problem().models)
        result = ld.evaluate(problem, {"assuming": solution.policy.assuming(assumed)}, tasks=1, demos=1)["assuming"]
        assert result.method == "exact"
        assert result.value == pytest.approx(value(true, reference.rho[true], list(reference.rho)), abs=1e-12)


def test_a_policy_of_several_models_asks_for_the_model_of_each_step_or_an_assumption():
    named = ld.make("prostate", horizon=3, alpha=0.5)
    assert isinstance(named, NamedProblem)
    policy = ld.solve(named).policy
    with jax.enable_x64(False):  # as a user has it
        assumed = policy.assuming("UCSF")
    assert isinstance(assumed.problem, NamedProblem) and isinstance(assumed.problem.problem, ld.POMDP)
    assert (assumed.model, assumed.problem.models, policy.model) == (1, (), None)
    assert assumed.problem.problem.P.dtype == np.float64
    asked, told = assumed.act((), "defer psa-3-null"), policy.act((), "defer UCSF psa-3-null")
    for one, other in ((asked.Q, told.Q), (asked.belief, told.belief)):
        assert one is not None and other is not None
        np.testing.assert_allclose(one, other, rtol=1e-12)
    with pytest.raises(ValueError, match="must observe which model made each step"):
        policy.act((), "defer psa-3-null", assumed.problem)
    with pytest.raises(ValueError, match="model must be one of JH, UCSF, UofT, PRIAS; got 'UCFS'"):
        policy.assuming("UCFS")
    with pytest.raises(ValueError, match="assuming is for policies of ambiguous problems; this one is of a POMDP"):
        ld.solve(assumed.problem).policy.assuming(0)
