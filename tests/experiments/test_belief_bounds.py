"""Certified bounds beside exact answers, and verdicts that bounds moved inwards turn."""

import copy

import jax
import numpy as np
import pytest

from lindm.solvers import belief_net
from lindm_experiments import belief_bounds
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from lindm_experiments.lib import apomdps
from tests.experiments.conftest import smoke_records

CFG = belief_bounds.SMOKE


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return _measured()


def _measured() -> list[dict]:
    return smoke_records(belief_bounds)


@pytest.fixture(scope="module")
def seen():
    """An APOMDP and its first model along demonstrations, in numpy."""
    stacks = belief_bounds.draw_visited(jax.random.key(1), problems=CFG.problems, episodes=CFG.episodes)
    return [jax.tree.map(lambda x: np.asarray(x[0]), stack) for stack in stacks]


def test_smoke_records_decide_every_claim_and_draw_every_figure(records):
    verdicts = belief_bounds.check(records)
    assert tuple(v.id for v in verdicts) == claim_ids("belief_bounds")
    assert {v.figure for v in verdicts} <= set(belief_bounds.plot(records))


def test_visited_histories_have_the_labels_of_one_numpy_step(seen):
    """At the last two stages, from the beliefs alone; both problems went through the same actions and observations."""
    for visited in seen:
        ambiguous, alpha = visited.problem.models, visited.problem.alpha
        K = np.einsum("msat,mato->maost", ambiguous.P[:, 0], ambiguous.O[:, 0])

        def mixed(G: np.ndarray, alpha=alpha) -> np.ndarray:
            return alpha * G.min(0) + (1 - alpha) * G.max(0)

        def last(u: np.ndarray, r=ambiguous.r) -> float:
            return mixed(np.einsum("s,msa->ma", u, r[:, -1])).max()

        models, actions, seen_, _, _ = K.shape
        for b, Q in zip(visited.beliefs[-2], visited.Q[-2], strict=True):
            G = np.einsum("ms,msa->ma", b, ambiguous.r[:, -2])
            for m, a, o in np.ndindex(models, actions, seen_):
                G[m, a] += last(b[m] @ K[m, a, o])
            np.testing.assert_allclose(Q, mixed(G), rtol=1e-12)
        for b, Q in zip(visited.beliefs[-1], visited.Q[-1], strict=True):
            np.testing.assert_allclose(Q, mixed(np.einsum("ms,msa->ma", b, ambiguous.r[:, -1])), rtol=1e-12)


def test_the_first_model_alone_starts_from_its_own_belief_and_takes_the_same_steps(seen):
    ambiguous, alone = seen
    assert (alone.history[0] == 0).all() and (ambiguous.history[0] == 0).all()
    # a step is (a M + m) O + o of the APOMDP and a O + o of the model
    step = ambiguous.history[1]
    without_model = step // (belief_bounds.M * belief_bounds.O) * belief_bounds.O + step % belief_bounds.O
    np.testing.assert_array_equal(alone.history[1], without_model)


def test_a_filled_net_and_equal_models_change_no_bound(seen):
    _, alone = seen
    filled, layer = belief_bounds.solved_by_net(alone.problem, 16)
    plain = belief_net.net(alone.problem, points=16)
    assert layer == int(plain.points.max()) <= 16 == filled.beliefs.shape[1]
    beliefs = alone.beliefs[2, :, 0]
    for a, b in zip(belief_net.value_bounds(filled, 2, beliefs), belief_net.value_bounds(plain, 2, beliefs), strict=True):
        np.testing.assert_array_equal(a, b)
    alike = belief_bounds.alike(alone.problem)
    assert alike.num_models == belief_bounds.M
    np.testing.assert_allclose(apomdps.value_span(alike), apomdps.value_span(alone.problem), rtol=1e-15)


def _many(records: list[dict]) -> list[dict]:
    """Five seeds with good bounds, and as many instances as a rate takes."""
    out = [copy.deepcopy(records[i % 2]) for i in range(5)] + [records[-1]]
    for i, r in enumerate(out[:5]):
        r["point"] = {"seed": i}
        for method in r["methods"].values():
            method["intervals"] = [[1000] * len(row) for row in method["intervals"]]
            method["width"] = [[1e-3 + 1e-5 * i] * len(row) for row in method["width"]]
            method["certified"] = [[1 - 1e-3 * i] * len(row) for row in method["certified"]]
            for side in (
                "above",
                "below",
            ):  # as if some exact values were on a bound
                method[side] = [[1e-3 * i] * len(row) for row in method[side]]
    return out


def test_verdicts_follow_the_records(records):
    assert [v.verdict for v in belief_bounds.check(_many(records))] == [PASS] * 5
    mutants = _many(records)
    for i, r in enumerate(mutants[:5]):
        for method in r["methods"].values():
            method["width"] = [[0.1 + 1e-3 * i] * len(row) for row in method["width"]]
            method["certified"] = [[0.5 + 1e-3 * i] * len(row) for row in method["certified"]]
            method["below"] = [[0.2 + 1e-3 * i] * len(row) for row in method["below"]]
    assert [v.verdict for v in belief_bounds.check(mutants)] == [PASS, PASS, FAIL, FAIL, FAIL]


def test_the_distances_to_the_bounds_are_those_of_numpy(seen):
    ambiguous, _ = seen
    tables, _ = belief_bounds.solved_by_net(ambiguous.problem, 16)
    bounds = {k: np.asarray(v) for k, v in belief_bounds.bounds_at(ambiguous.problem, tables, ambiguous.beliefs).items()}
    found = belief_bounds.compare_bounds(ambiguous, bounds)
    scale, above, share = float(apomdps.value_span(ambiguous.problem)), 1.0, 0.0
    for where in np.ndindex(ambiguous.Q.shape):
        low, high, q = bounds["lower"][where], bounds["upper"][where], ambiguous.Q[where]
        if high - low > 1e-6 * scale:
            above = min(above, (high - q) / (high - low))
        best, regret = ambiguous.Q[where[:2]].max(), bounds["regret"][where[:2]]
        if where[2] == bounds["action"][where[:2]] and regret > 1e-6 * scale:
            share = max(share, (best - q) / regret)
    np.testing.assert_allclose([found["above"], found["share"]], [above, share], rtol=1e-9)


def test_bounds_moved_inwards_and_labels_of_another_action_are_refuted(monkeypatch):
    honest = belief_bounds.bounds_at

    def inwards(problem, tables, beliefs):
        bounds = dict(honest(problem, tables, beliefs))
        middle = (bounds["lower"] + bounds["upper"]) / 2
        return bounds | {k: middle + 0.2 * (bounds[k] - middle) for k in ("lower", "upper")}

    def other_action(problem, tables, beliefs):
        bounds = dict(honest(problem, tables, beliefs))
        return bounds | {"action": (bounds["action"] + 1) % belief_bounds.A}

    for mutant, refuted in ((inwards, [FAIL, PASS]), (other_action, [PASS, FAIL])):
        monkeypatch.setattr(belief_bounds, "bounds_at", mutant)
        assert [v.verdict for v in belief_bounds.check(_many(_measured()))[:2]] == refuted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": (8, 8)}, "points must rise"),
        ({"points": (0, 8)}, "points"),
        ({"tolerances": (0.0, 0.1)}, "tolerances must fall"),
        ({"tolerances": (0.1, -0.1)}, "tolerances"),
        ({"tolerances": ()}, "tolerances must fall, at least one"),
        ({"problems": 0}, "problems"),
        ({"trials": 0}, "trials"),
    ],
)
def test_a_configuration_out_of_range_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        belief_bounds.Config(**change)
