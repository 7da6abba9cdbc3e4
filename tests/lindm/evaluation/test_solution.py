"""The policy of a solution, in the protocol of all policies."""

import pytest

import lindm as ld


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
    lost = results["solution"].gap_of_value * abs(solution.value)
    assert -1e-12 <= lost <= solution.upper - solution.lower + 1e-9
    if solution.exact:
        assert results["solution"].gap == results["oracle"].gap and results["solution"].method == "exact"
