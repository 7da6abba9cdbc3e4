"""Figures over the beliefs: their numbers against recursions of their own, and what is refused."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.text import Text

import lindm as ld
from lindm.cli.main import main
from lindm.evaluation.environments import double_precision
from lindm.figures.beliefs import (
    ATTITUDES,
    POINTS,
    attitude_actions,
    belief_grid,
    belief_values,
    draw_attitudes,
    draw_belief_values,
)
from lindm.figures.style import save
from lindm.problems.apomdp import apomdp
from lindm.problems.pomdp import pomdp
from lindm.problems.stationary import from_pomdp, to_pomdp
from tests.lindm.solvers.test_point_based import FILES, exact, model, read


@pytest.mark.parametrize("states", [2, 3])
def test_the_bounds_of_a_figure_contain_the_action_values_at_every_belief(states):
    problem = model(4, 0.9, S=states, A=3)
    values = belief_values(problem, 3, relative=1e-6)
    assert values.beliefs.shape == {2: (POINTS, 2), 3: (153, 3)}[states]
    for b, lower, upper, action in zip(values.beliefs, values.lower, values.upper, values.actions, strict=True):
        Q = exact(problem, 3, b)
        assert (lower <= Q + 1e-9).all() and (upper + 1e-9 >= Q).all()
        assert Q.max() - Q[action] <= 1e-5 and upper.max() - lower.max() <= 1e-5


def maxmin(models: list, alpha: float, stages: int, beliefs: list[np.ndarray]) -> np.ndarray:
    """Q* [A] of the stage-wise alpha-maxmin at beliefs [S] under each of the models (P [S, A, S], O [A, S, O], r [S, A])."""
    G = []
    for (P, O, r), b in zip(models, beliefs, strict=True):
        values = b @ r
        for a in range(r.shape[1]):
            for o in range(O.shape[2] if stages > 1 else 0):
                after = (b @ P[:, a]) * O[a, :, o]
                if after.sum() > 0:
                    following = maxmin(models, alpha, stages - 1, [after / after.sum()] * len(models))
                    values[a] += after.sum() * following.max()
        G.append(values)
    return alpha * np.min(G, 0) + (1 - alpha) * np.max(G, 0)


def test_the_actions_over_beliefs_and_attitudes_are_those_of_a_recursion():
    rng = np.random.default_rng(3)
    models = [(rng.dirichlet([1, 1], (2, 2)), rng.dirichlet([0.5, 0.5], (2, 2)), rng.normal(size=(2, 2))) for _ in range(3)]
    with double_precision():
        problem = apomdp([pomdp(P, O, r, [0.5, 0.5], horizon=2) for P, O, r in models], 0.5)
        (best,) = attitude_actions(problem)
    assert best.shape == (ATTITUDES, POINTS) and len(np.unique(best)) == 2
    for i in range(0, ATTITUDES, 5):
        for k in range(0, POINTS, 8):
            Q = maxmin(models, i / (ATTITUDES - 1), 2, [np.array([1 - k / (POINTS - 1), k / (POINTS - 1)])] * 3)
            assert Q.max() - Q[best[i, k]] <= 1e-12


def test_figures_name_states_and_actions_and_are_the_same_every_time(tmp_path):
    tiger = read("tiger")
    values = belief_values(tiger, 2, relative=1e-6)
    for name in ("a.svg", "b.svg"):
        save(lambda: draw_belief_values(values, tiger, 2), tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert all(word in text for word in ("probability of left", "open-right", "listen", "2 stages"))
    figure = draw_belief_values(values, tiger, 2)
    (strip,) = [mesh for mesh in figure.axes[1].collections if isinstance(mesh, QuadMesh)]
    np.testing.assert_array_equal(np.asarray(strip.get_array()).ravel(), values.actions)
    edges = np.asarray(strip.get_coordinates())[0, :, 0]  # halfway between the beliefs
    assert edges[0] == 0 and edges[-1] == 1 and edges[1] == pytest.approx(0.5 / (POINTS - 1))
    three = model(1, 0.9)
    save(lambda: draw_belief_values(belief_values(three, 1), three, 1), tmp_path / "three.svg")
    assert "state 2" in (tmp_path / "three.svg").read_text()
    best = np.zeros((3, ATTITUDES, POINTS), int)
    best[:, 5:] = 1
    save(lambda: draw_attitudes(best, ("low", "high", "cured"), ("wait", "treat"), 0.5), tmp_path / "attitudes.svg")
    text = (tmp_path / "attitudes.svg").read_text()
    assert all(word in text for word in ("probability of cured, else high", "treat", "attitude alpha"))


def test_a_problem_without_its_horizon_is_the_same_problem():
    problem = replace(read("tiger"), states=(), actions=(), observations=())
    with double_precision():
        dense = to_pomdp(problem, 3)
        again = from_pomdp(dense)
        changing = replace(dense, r=dense.r.at[1].add(jax.numpy.ones(3)))
    assert again.discount == pytest.approx(0.95) and (again.r == problem.r).all() and (again.rho == problem.rho).all()
    assert all((a.toarray() == b.toarray()).all() for a, b in zip(again.P + again.O, problem.P + problem.O, strict=True))
    with pytest.raises(ValueError, match="must be the same at every stage, but for a discount"):
        from_pomdp(changing)


def test_more_states_and_observed_states_are_refused_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="takes problems of 2 or 3 states; this one has 11"):
        belief_grid(11)
    assert main(["solve", str(FILES / "forest.pomdp"), "--horizon", "3", "--plot", "x.png"]) == 2
    assert "--plot draws over the beliefs of a POMDP; the state of an MDP is observed" in capsys.readouterr().err
    assert main(["solve", str(FILES / "tiger.pomdp"), "--horizon", "3", "--plot", "x.gif"]) == 2
    assert "--plot must end in .svg, .png, .pdf; got x.gif" in capsys.readouterr().err
    assert main(["solve", str(FILES / "tiger.pomdp"), "--horizon", "2", "--plot", "x.png"]) == 0
    assert "figure        x.png" in capsys.readouterr().out and (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"


def test_solutions_and_graphs_are_drawn_from_python(tmp_path):
    tiger = ld.read_pomdp(FILES / "tiger.pomdp", horizon=2)
    stationary = ld.solve_stationary(ld.read_stationary_pomdp(FILES / "tiger.pomdp"), horizon=2, tolerance=1e-9)
    seen = []
    whole, same = ld.plot(ld.solve(tiger), tmp_path / "a.png", on_belief=lambda *n: seen.append(n)), ld.plot(stationary)
    value = [line.get_ydata() for line in whole.axes[0].lines]
    assert seen[-1] == (41, 41) and (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    for y, other in zip(value, (line.get_ydata() for line in same.axes[0].lines), strict=True):
        np.testing.assert_allclose(y, other, atol=1e-6)
    assert {"listen", "open-left"} <= {label.get_text() for label in whole.findobj(Text)}
    graph = ld.plot(stationary.graph())
    assert sum("listen" in text.get_text() for text in graph.axes[0].texts) >= 2
    ambiguous, seen = ld.with_names(ld.apomdp([tiger, tiger], alpha=0.25), actions=tiger.actions), []
    drawn = ld.plot(ld.solve(ambiguous), on_belief=lambda *n: seen.append(n))
    assert {"listen", "alpha = 0.25"} <= {text.get_text() for text in drawn.legends[0].get_texts()}
    assert seen == [(0, 41), (41, 41)] and drawn.axes[0].lines[0].get_xdata() == [0.25, 0.25]


def test_what_has_no_beliefs_is_refused_by_name():
    mdp = ld.read_pomdp(FILES / "forest.pomdp", horizon=3)
    with pytest.raises(ValueError, match=r"solution must be that of a POMDP, .*; got the solution of an MDP"):
        ld.plot(ld.solve(mdp))
    with pytest.raises(ValueError, match="got NamedProblem"):
        ld.plot(mdp)
    with pytest.raises(ValueError, match="got the solution of an MDP"):
        ld.plot(ld.solve_stationary(ld.read_stationary_pomdp(FILES / "forest.pomdp")))


def test_the_ending_of_the_name_is_checked_before_anything_is_computed(tmp_path):
    def fail(*_):
        raise AssertionError("a belief was computed")

    solution = ld.solve(ld.read_pomdp(FILES / "tiger.pomdp", horizon=2))
    with pytest.raises(ValueError, match=r"path must end in .png, .pdf, .svg; got .*x.gif"):
        ld.plot(solution, tmp_path / "x.gif", on_belief=fail)
    assert not list(tmp_path.iterdir())
