"""Both sides of the benchmark solve the same problems."""

import importlib.util
import itertools
import json

import jax
import numpy as np
import pytest

from lindm.bench import point_based, solvers, timing
from lindm.cli.main import main
from lindm.solvers import tree
from lindm.solvers.dp import backward_induction

PEERS_HERE = [peer for peer in solvers.PEERS if importlib.util.find_spec(solvers.IMPORTED_AS[peer])]


@pytest.fixture
def tiny(monkeypatch):
    """The bench in a second."""
    for name, value in {
        "MODELS": {3: 4, 5: 3},
        "HORIZONS": (2, 3),
        "SAMPLE": {2: 2, 3: 2},
        "TREES": 4,
        "TABLES": 2,
        "REPEATS": 1,
    }.items():
        monkeypatch.setattr(solvers, name, value)


def a_plain_peer(actions_first):
    """Backward induction in numpy, called the way a library is."""

    def solve(built):
        P, r = built
        V, policy = np.zeros((solvers.H + 1, len(r))), np.zeros((solvers.H, len(r)), int)
        for h in reversed(range(solvers.H)):
            Q = r + (np.einsum("ast,t->sa", P, V[h + 1]) if actions_first else P @ V[h + 1])
            V[h], policy[h] = Q.max(-1), Q.argmax(-1)
        return V, policy

    return lambda P, r: (P, r), solve


# --- the same problems --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("actions_first", [False, True])
def test_a_peer_is_given_our_problems_in_its_own_order(tiny, actions_first):
    ours, theirs = solvers.measure_our_mdps(), solvers.measure_peer_mdps(*a_plain_peer(actions_first), actions_first)
    np.testing.assert_allclose(ours["values"], theirs["values"], rtol=1e-12)
    for costs in (ours, theirs):
        assert all(len(costs[way]) == len(solvers.MODELS) and min(costs[way]) > 0 for way in solvers.WAYS)
        assert costs["start"] >= 0


def test_action_values_from_a_peers_values_are_those_of_backward_induction():
    P, r = solvers.mdp_models(4, 1)
    plan = backward_induction(jax.tree.map(lambda x: x[0], solvers.our_mdps(4, 1)))
    V = a_plain_peer(False)[1]((P[0], r[0]))[0]
    np.testing.assert_allclose(solvers.with_q(P[0], r[0], V).T.reshape(plan.Q.shape), plan.Q, rtol=1e-12)


def test_the_textbook_recursion_is_the_sum_over_all_ways_that_a_plan_can_go():
    """Enumeration over plans and paths of two stages, with unnormalized probabilities."""
    P, O, r, rho = (arrays[0] for arrays in solvers.pomdp_models(1))
    S, A, n = solvers.TREE_SIZE
    best = -np.inf
    for first, *then in itertools.product(range(A), repeat=1 + n):
        total = rho @ r[:, first]
        for s, o, t in itertools.product(range(S), range(n), range(S)):
            total += rho[s] * P[s, first, t] * O[first, t, o] * r[t, then[o]]
        best = max(best, total)
    assert solvers.textbook(P, O, r, rho, 2)[0].max() == pytest.approx(best, rel=1e-12)


def test_the_textbook_recursion_and_the_tree_agree_at_every_history():
    horizon, (_, A, O) = 4, solvers.TREE_SIZE
    models, stack = solvers.pomdp_models(1), solvers.our_pomdps(1, horizon)
    one = jax.tree.map(lambda x: x[0], stack)
    tables, table_of_tree = solvers.textbook(*(arrays[0] for arrays in models), horizon), tree.tree(one)
    for t, table in enumerate(tables):
        # the textbook's numbering has the last step fastest, the tree's has it slowest
        ours = np.asarray(tree.stage_Q(table_of_tree, t, A * O)).reshape((A * O,) * t + (A,))
        np.testing.assert_allclose(ours.transpose(*reversed(range(t)), t).reshape(-1, A), table, rtol=1e-12)


def test_impossible_observations_of_the_textbook_recursion_add_nothing():
    P, O, r, rho = (arrays[0] for arrays in solvers.pomdp_models(1))
    never = np.concatenate([np.zeros_like(O[..., :1]), O], axis=-1)
    a, b = solvers.textbook(P, O, r, rho, 3)[0], solvers.textbook(P, never, r, rho, 3)[0]
    np.testing.assert_allclose(a, b, rtol=1e-12)


def test_model_number_i_is_the_same_in_a_batch_of_any_size():
    for few, many in zip(solvers.pomdp_models(2), solvers.pomdp_models(5), strict=True):
        np.testing.assert_array_equal(few, many[:2])
    np.testing.assert_allclose(solvers.mdp_models(3, 4)[0].sum(-1), 1, rtol=1e-12)


@pytest.mark.parametrize("peer", PEERS_HERE)
def test_an_installed_peer_finds_our_values(tiny, peer):
    ours, theirs = solvers.measure("ours", "mdp"), solvers.measure(peer, "mdp")
    np.testing.assert_allclose(ours["values"], theirs["values"], rtol=1e-12)
    assert solvers.measure(peer, "mdp memory")["memory"] >= 0


# --- the rows -----------------------------------------------------------------------------------------------------------


def mdps(cost):
    return {**{way: [cost * S**2 for S in solvers.MODELS] for way in solvers.WAYS}, "start": 1.0, "values": [1.0], "memory": cost}


def trees(cost):
    seconds = [cost * 4.0**h for h in solvers.HORIZONS]
    return {"value": seconds, "Q": seconds, "compile": {"value": 1.0, "Q": 2.0}, "values": [2.0], "memory": [cost, cost]}


NAMES = {"quantecon": "quantecon 1.2", "pymdptoolbox": "pymdptoolbox (not installed)"}


def a_table():
    return solvers.rows(mdps(1.0), trees(1.0), {"quantecon": mdps(3.0), "pymdptoolbox": None}, trees(5.0), NAMES)


def test_every_row_has_the_fields_of_a_benchmark_and_the_factor_by_which_ours_is_better():
    table = a_table()
    assert all(set(row) == {"work", "ours", "peer", "peer_name", "ratio", "unit"} for row in table)
    assert len({(row["work"], row["peer_name"]) for row in table}) == len(table)
    for row in table:
        if row["unit"] in ("CPU-us/model", "leaves/CPU-s", "MiB") or ("models" in row["work"] and row["unit"] == "CPU-s"):
            expected = None if row["peer"] is None else 3.0 if row["peer_name"] == "quantecon 1.2" else 5.0
            assert row["ratio"] == (expected if expected is None else pytest.approx(expected)), row
        else:
            assert row["ratio"] is None, row


def test_a_missing_peer_is_null_and_named_as_missing():
    missing = [row for row in a_table() if row["peer_name"] == "pymdptoolbox (not installed)"]
    assert len(missing) == len([row for row in a_table() if row["peer_name"] == "quantecon 1.2"]) > 0
    assert all(row["peer"] is None and row["ratio"] is None and row["ours"] is not None for row in missing)


def test_exponents_and_leaves_are_those_of_the_costs():
    table = a_table()
    of_states = [row for row in table if row["unit"] == "d log CPU-s / d log S"]
    of_horizons = [row for row in table if row["unit"] == "d log CPU-s / d H"]
    assert [row["ours"] for row in of_states] == pytest.approx([2.0, 2.0])
    assert [row["ours"] for row in of_horizons] == pytest.approx([np.log(4.0)] * 2)
    leaves = next(row for row in table if row["unit"] == "leaves/CPU-s")
    assert leaves["ours"] == pytest.approx(solvers.TREES * 4.0**9 / 4.0**10)


def test_sides_that_disagree_are_not_compared():
    with pytest.raises(RuntimeError, match=r"quantecon 1\.2 and ours have different values"):
        solvers.rows(mdps(1.0), trees(1.0), {"quantecon": {**mdps(3.0), "values": [1.1]}}, trees(5.0), NAMES)
    with pytest.raises(RuntimeError, match="textbook recursion in numpy and ours"):
        solvers.rows(mdps(1.0), trees(1.0), {}, {**trees(5.0), "values": [2.1]}, NAMES)


def test_without_peers_the_bench_runs_and_prints_nulls(tiny, monkeypatch, capsys):
    monkeypatch.setattr(solvers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(solvers, "in_worker", lambda module, side, task: solvers.measure(side, task))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(point_based, "SIZES", ((2, 1),))
    assert main(["bench", "solvers", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    for row in table:
        if row["work"].startswith("MDP"):
            assert row["peer"] is None and row["ratio"] is None and row["peer_name"].endswith("(not installed)")
        elif row["work"].startswith("POMDP tree"):
            assert row["peer_name"].startswith("textbook recursion in numpy")
        else:
            assert row["peer"] is None and row["peer_name"].endswith("not on the PATH)")
    assert min(row["ours"] for row in table if row["unit"] in ("CPU-s", "CPU-us/model", "leaves/CPU-s")) >= 0


def test_a_side_is_measured_in_double_precision_in_a_process_of_its_own():
    assert timing.in_worker(solvers.MODULE, "numpy", "tree memory")["memory"][0] > 8 * 4**9 * 3 / 2**20
