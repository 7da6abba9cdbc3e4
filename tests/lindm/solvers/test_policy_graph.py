"""Policy graphs: their values against linear equations and a recursion over all that can happen, their words, their files."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from lindm.cli.main import main
from lindm.figures.policy_graph import draw_policy_graph
from lindm.figures.style import figure_bytes, save
from lindm.problems.identity import differences, problem_digests
from lindm.problems.stationary import from_pomdp, to_pomdp
from lindm.solvers import policy_graph
from lindm.solvers.alpha_values import policy_value_bounds
from lindm.solvers.point_based import solve
from lindm.solvers.policy_graph import PolicyGraph, earned_graph
from tests.lindm.solvers.test_point_based import FILES, exact, model, read


def earned(graph: PolicyGraph, node: int, stages: int, b: np.ndarray) -> float:
    """What the graph earns from a node in so many stages, at an unnormalized belief, by recursion."""
    if stages == 0 or not b.sum() > 0:
        return 0.0
    problem, a = graph.problem, int(graph.actions[node])
    after = (b @ problem.P[a].toarray())[:, None] * problem.O[a].toarray()
    rest = [earned(graph, int(to), stages - 1, u) for to, u in zip(graph.successors[node], after.T, strict=True)]
    return float(b @ problem.r[:, a]) + problem.discount * sum(rest)


@pytest.mark.parametrize("kind", ["dense", "sparse", "deterministic"])
@pytest.mark.parametrize("seed", range(3))
def test_the_value_of_a_finite_horizon_is_that_of_a_recursion_and_next_to_the_optimum(kind, seed):
    problem = model(seed, 0.9, kind=kind)
    solution = solve(problem, 4, trials=30)
    graph = solution.graph()
    assert graph.value == pytest.approx(earned(graph, 0, 4, problem.rho), abs=1e-10)
    assert graph.value <= exact(problem, 4, problem.rho).max() + 1e-10
    assert graph.value >= solution.lower - 0.1 * (solution.upper - solution.lower) - 1e-8
    assert graph.stages.tolist() == sorted(graph.stages.tolist()) and (graph.successors[graph.stages == 3] == -1).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_value_of_an_infinite_horizon_solves_the_equations_of_the_graph(seed):
    problem = model(seed, 0.9, S=3, A=3, kind="sparse")
    solution = solve(problem, tolerance=0.05, trials=60)
    graph = solution.graph()
    n, S = graph.values.shape
    system, rewards = np.eye(n * S), np.zeros(n * S)
    for i, a in enumerate(graph.actions):
        rows = slice(i * S, i * S + S)
        rewards[rows] = problem.r[:, a]
        for o, to in enumerate(graph.successors[i]):
            system[rows, to * S : to * S + S] -= 0.9 * problem.P[a].toarray() * problem.O[a].toarray()[:, o]
    values = np.linalg.solve(system, rewards).reshape(n, S)
    np.testing.assert_allclose(graph.values, values, atol=1e-9)
    assert graph.value == pytest.approx(values[0] @ problem.rho, abs=1e-9)
    assert graph.value >= solution.lower - 0.1 * (solution.upper - solution.lower) - 1e-8 and graph.value <= solution.upper + 1e-9


def test_the_tiger_needs_five_nodes_and_its_graph_is_the_published_policy():
    graph = solve(read("tiger"), tolerance=1e-6).graph()
    assert graph.value == pytest.approx(19.371368, abs=1e-6)
    assert graph.rules() == [
        "1 (start): listen; after hear-left go to 2; after hear-right go to 3",
        "2: listen; after hear-left go to 4; after hear-right go to 1",
        "3: listen; after hear-left go to 1; after hear-right go to 5",
        "4: open-right; after hear-left or hear-right go to 1",
        "5: open-left; after hear-left or hear-right go to 1",
    ]
    far = solve(read("tiger"), 1000, tolerance=1e-6).graph()
    assert far.is_stationary and far.horizon == 1000 and far.value == pytest.approx(graph.value, abs=1e-8)


def test_the_file_has_the_vectors_of_each_stage_and_each_vector_is_what_its_node_earns(tmp_path):
    path = tmp_path / "new" / "policy.json"
    solution = solve(read("tiger"), 3, tolerance=1e-9)
    solution.save(path)
    saved = json.loads(path.read_text())
    assert saved["format"] == "lindm-policy-1" and saved["horizon"] == 3 and saved["value"] == pytest.approx(2.3098)
    graph = solution.graph()
    for number, node in enumerate(saved["nodes"]):
        for s in range(2):
            assert node["values"][s] == pytest.approx(earned(graph, number, 3 - node["stage"], np.eye(2)[s]))
    assert saved["nodes"][0]["action"] == "listen" and set(saved["nodes"][0]["next"]) == {"hear-left", "hear-right"}


def test_a_picture_shows_every_node_with_its_action_and_is_the_same_every_time(tmp_path):
    graph = solve(read("tiger"), tolerance=1e-6).graph()
    for name in ("a.svg", "b.svg"):
        save(lambda: draw_policy_graph(graph), tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert all(word in text for word in ("1  listen", "4  open-right", "5  open-left", "hear-right"))


def test_an_arrow_ends_at_its_box_also_where_the_picture_is_drawn_for_the_first_time():
    """matplotlib knows the place of a box when it has drawn it: a second drawing shows where every arrow belongs."""
    figure = draw_policy_graph(solve(read("tiger"), tolerance=1e-6).graph())
    first, second = figure_bytes(figure, ["svg"]), figure_bytes(figure, ["svg"])
    assert first == second


def test_a_graph_that_is_too_large_is_refused(monkeypatch):
    solution = solve(read("tiger"), 5, tolerance=1e-9)
    monkeypatch.setattr("lindm.figures.policy_graph.MAX_NODES", 4)
    with pytest.raises(ValueError, match=r"a picture must have at most 4 nodes; this policy graph has 13: save it as \.json"):
        draw_policy_graph(solution.graph())
    monkeypatch.setattr(policy_graph, "MAX_NODES", 4)
    with pytest.raises(ValueError, match="a policy graph must have at most 4 nodes; this policy needs more"):
        solution.graph()


def test_solve_prints_the_rules_and_saves_the_picture(tmp_path, capsys):
    tiger, picture = str(FILES / "tiger.pomdp"), tmp_path / "policy.svg"
    assert main(["solve", tiger, "--horizon", "inf", "--rules", "--save", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert f"a graph of 5 nodes, which earns 19.37136837, in {picture}" in printed
    assert "  4: open-right; after hear-left or hear-right go to 1\n" in printed and picture.read_text().startswith("<?xml")
    assert main(["solve", tiger, "--horizon", "2", "--rules", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["rules"][0].startswith("1 (start, stage 1): listen") and answer["graph_value"] == pytest.approx(-1.95)
    assert not math.isinf(answer["horizon"])


def test_an_option_that_needs_a_policy_says_that_it_changes_the_method(tmp_path, capsys):
    words = ["solve", str(FILES / "tiger.pomdp"), "--horizon", "2"]
    for more, said in ((["--save", str(tmp_path / "p.json")], "--save"), (["--rules"], "--rules"), ([], None)):
        assert main([*words, *more]) == 0
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
        wanted = [f"note          {said} needs a policy, so the problem was solved by point-based; without it, by an exact tree"]
        assert notes == (wanted if said else [])
    assert main([*words, "--rules", "--method", "point-based"]) == 0 and "note" not in capsys.readouterr().out


def test_vectors_of_another_problem_are_worth_what_they_earn_in_this_one(monkeypatch):
    tiger, other = read("tiger"), replace(read("tiger"), r=read("tiger").r - np.array([0.5, 0, 0]))
    solution = solve(tiger, tolerance=1e-6)
    for problem in (tiger, other):
        graph = earned_graph(problem, solution.actions, solution.vectors)
        assert graph is not None
        # what a recursion over 5 steps earns, and then at least the lowest and at most the highest reward at every stage
        begun, rest = earned(graph, 0, 5, problem.rho), 0.95**5 / 0.05
        assert begun + rest * problem.r.min() <= graph.value <= begun + rest * problem.r.max()
        low, high = policy_value_bounds(problem, solution.actions, solution.vectors)
        assert graph.value <= high + 1e-9  # following the vectors at every belief earns at least the graph
        assert graph.value == pytest.approx(19.371368 if problem is tiger else low, abs=1e-6)
    monkeypatch.setattr(policy_graph, "MAX_WORK", 4 * 2 * solution.vectors.size)  # of four nodes, and it has five
    assert earned_graph(tiger, solution.actions, solution.vectors) is None


def test_a_problem_is_known_again_by_its_numbers():
    tiger = read("tiger")
    own = problem_digests(tiger)
    assert differences(own, problem_digests(from_pomdp(to_pomdp(tiger, 4)))) == []
    explicit = replace(tiger, P=tuple(type(P)(P.toarray()[::-1][::-1] + 1e-14) for P in tiger.P), actions=())
    assert differences(own, problem_digests(explicit)) == []
    changed = {
        "transitions": {"P": (tiger.P[1], *tiger.P[1:])},
        "observations": {"O": (tiger.O[1], *tiger.O[1:])},
        "rewards": {"r": tiger.r + 1e-6},
        "start": {"rho": np.array([0.4, 0.6])},
        "discount": {"discount": 0.9},
        "legal actions": {"legal": np.array([[True, True, True], [True, True, False]])},
    }
    for part, fields in changed.items():
        assert differences(own, problem_digests(replace(tiger, **fields))) == [part]
