"""Rewards of datasets and exports: what an environment pays, beside the discounted means that values add up.

The truth is a file whose rewards depend on everything, as a numpy table that this test wrote into the file.
"""
# no problem here is ambiguous
# pyright: reportAttributeAccessIssue=false

import json

import numpy as np
import pyarrow.parquet
import pytest

from lindm.datasets import Dataset, export, make_dataset
from lindm.families.registry import NamedProblem, load_problem
from lindm.problems.pomdp import pomdp
from tests.lindm.datasets.conftest import config

S, A, O, H, GAMMA = 3, 2, 2, 4, 0.9
rng = np.random.default_rng(0)
P, Z = rng.dirichlet(np.ones(S), (A, S)).round(3), rng.dirichlet(np.ones(O), (A, S)).round(3)
P[..., -1] = 1 - P[..., :-1].sum(-1)
Z[..., -1] = 1 - Z[..., :-1].sum(-1)
R = rng.integers(-99, 100, (S, A, S, O)).astype(float)  # 36 rewards, most of them different
MEAN = np.einsum("asu,auo,sauo->sa", P, Z, R)


def written(with_table: bool, sign: int = 1) -> str:
    """The problem as a file: with its rewards, or with their means (or the opposite) in place of them."""
    lines = [f"discount: {GAMMA}\nvalues: reward\nstates: {S}\nactions: {A}\nobservations: {O}\nstart: 1 0 0"]
    for a, s in np.ndindex(A, S):
        lines.append(f"T: {a} : {s} " + " ".join(map(str, P[a, s].tolist())))
        lines.append(f"O: {a} : {s} " + " ".join(map(str, Z[a, s].tolist())))
        if with_table:
            lines += [f"R: {a} : {s} : {u} : {o} {R[s, a, u, o]}" for u, o in np.ndindex(S, O)]
        else:
            lines.append(f"R: {a} : {s} : * : * {sign * float(MEAN[s, a])!r}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Datasets of the file, of the file with the mean rewards, and of one with several models."""
    root = tmp_path_factory.mktemp("rewards")
    made = {}
    for name in ("table", "mean"):
        (root / f"{name}.pomdp").write_text(written(name == "table"))
        problem = load_problem([str(root / f"{name}.pomdp")], H)
        made[name] = root / name
        make_dataset(made[name], problem, config(tasks=40, demos=5, queries=1, behavior="uniform"))
    return made


def rows(directory, table="episodes"):
    return [json.loads(line) for path in sorted(directory.glob(f"{table}-*.jsonl")) for line in path.read_text().splitlines()]


def test_every_reward_is_the_one_of_its_own_step_and_its_mean_is_discounted(directories):
    seen = set()
    for row in rows(directories["table"]):
        s, a, o = row["state"], row["action"], row["observation"]
        for t in range(H):
            possible = range(S) if t == H - 1 else [s[t + 1]]
            assert row["reward"][t] in {R[s[t], a[t], u, o[t]] for u in possible if P[a[t], s[t], u] > 0}
            assert row["discounted_mean_reward"][t] == pytest.approx(GAMMA**t * MEAN[s[t], a[t]], rel=1e-12)
            seen.add(row["reward"][t])
    assert len(seen) > 25


def test_the_discounted_sum_of_rewards_earns_the_value_of_the_behavior(directories):
    """Uniformly random actions, whose value is a forward recursion over states."""
    law, value = np.array([1.0, 0, 0]), 0.0
    for t in range(H):
        value += GAMMA**t * law @ MEAN.mean(-1)
        law = law @ P.mean(0)
    paid = np.array([row["reward"] for row in rows(directories["table"]) if row["role"] == "demo"]) @ GAMMA ** np.arange(H)
    assert len(paid) == 200 and abs(paid.mean() - value) < 5 * paid.std(ddof=1) / np.sqrt(200)
    assert rows(directories["table"], "tasks")[0]["uniform_value"] == pytest.approx(value, rel=1e-9)
    # the last reward belongs to the state that follows, though that is in no column
    last = np.array([row["reward"][-1] - MEAN[row["state"][-1], row["action"][-1]] for row in rows(directories["table"])])
    assert last.std() > 10 and abs(last.mean()) < 5 * last.std(ddof=1) / np.sqrt(len(last))


def test_all_but_the_rewards_is_as_if_means_were_paid(directories):
    for table, mean in zip(rows(directories["table"]), rows(directories["mean"]), strict=True):
        for name in ("state", "action", "observation", "label", "certificate"):
            assert table[name] == mean[name]
        np.testing.assert_allclose(table["discounted_mean_reward"], mean["discounted_mean_reward"], rtol=1e-9)
        np.testing.assert_allclose(table["Q"], mean["Q"], rtol=1e-9)
        # where a file has r(s, a) alone, that is what is paid, not discounted
        assert mean["reward"] == [MEAN[s, a] for s, a in zip(mean["state"], mean["action"], strict=True)]


def test_gamma_and_the_convention_are_in_every_format(directories, tmp_path, monkeypatch):
    directory = directories["table"]
    dataset = Dataset(directory)
    assert dataset.discount == GAMMA and dataset.manifest["config"]["rewards"]["discount"] == GAMMA
    assert {row["discount"] for row in rows(directory, "tasks")} == {GAMMA}
    table = pyarrow.parquet.read_table(directory / "episodes-00000.parquet")
    assert float(table.schema.metadata[b"discount"]) == GAMMA
    part = (directory / "README.md").read_text().split("### problem\n")[1].split("\n#")[0]
    described = [line.split("`")[1] for line in part.splitlines() if line.startswith("| `")]
    assert described == pyarrow.parquet.read_schema(directory / "problem.parquet").names and "R" in described
    for text in (
        table.schema.metadata[b"rewards"].decode(),
        dataset.manifest["config"]["rewards"]["convention"],
        (directory / "README.md").read_text(),
    ):
        assert "discounted_mean_reward" in text and "not discounted" in text and "gamma" in text
    paid = [row["reward"] for row in rows(directory)]
    assert table["reward"].to_pylist() == paid[: len(table)]

    prompts, _, about = export(directory, "trl", tmp_path / "trl")
    assert f"discount: {GAMMA}\n" in about.read_text() and "paid" in about.read_text()
    assert "#" in prompts.read_text() and f":{paid[0][0]}" in json.loads(prompts.read_text().splitlines()[0])["prompt"]
    _, _, hidden = export(directory, "trl", tmp_path / "hidden", rewards="hidden")
    assert "show no rewards" in hidden.read_text()

    import minari

    export(directory, "minari", tmp_path, dataset_id="paid-v0")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    there = minari.load_dataset("paid-v0")
    assert there.storage.metadata["discount"] == GAMMA and "not discounted" in there.storage.metadata["rewards"]
    for episode, row in zip(there, rows(directory), strict=True):
        assert episode.rewards.tolist() == row["reward"]
        assert episode.infos["discounted_mean_reward"].tolist() == [*row["discounted_mean_reward"], 0.0]


def test_in_an_ambiguous_problem_the_model_of_the_step_pays(tmp_path):
    """The first model has the table, the second one the opposite of its means."""
    for name in ("table", "mean"):
        (tmp_path / f"{name}.pomdp").write_text(written(name == "table", -1))
    problem = load_problem([str(tmp_path / "table.pomdp"), str(tmp_path / "mean.pomdp")], 3, alpha=0.5)
    make_dataset(tmp_path / "d", problem, config(tasks=10, behavior="uniform"))
    assert Dataset(tmp_path / "d").problems()[0].models.paid.R.shape == (2, 1, S, A, S, O)
    paid = {0: 0, 1: 0}
    for row in rows(tmp_path / "d"):
        for t, (s, a, m, o) in enumerate(zip(*(row[k] for k in ("state", "action", "model", "observation")), strict=True)):
            following = range(S) if t == 2 else [row["state"][t + 1]]
            assert row["reward"][t] in ({R[s, a, u, o] for u in following} if m == 0 else {-MEAN[s, a]})
            paid[m] += 1
    assert min(paid.values()) > 20


def test_in_an_mdp_every_reward_is_that_of_the_next_state(tmp_path):
    table = R[..., 0]
    lines = [f"discount: {GAMMA}\nstates: {S}\nactions: {A}\nstart: uniform"]
    lines += [f"T: {a} : {s} " + " ".join(map(str, P[a, s].tolist())) for a, s in np.ndindex(A, S)]
    lines += [f"R: {a} : {s} : {u} {table[s, a, u]}" for a, s, u in np.ndindex(A, S, S)]
    (tmp_path / "seen.pomdp").write_text("\n".join(lines))
    make_dataset(tmp_path / "d", load_problem([str(tmp_path / "seen.pomdp")], H), config(tasks=10, behavior="uniform"))
    mean = np.einsum("asu,sau->sa", P, table)
    for row in rows(tmp_path / "d"):
        s, a = row["state"], row["action"]
        assert row["reward"][:-1] == [table[s[t], a[t], s[t + 1]] for t in range(H - 1)]
        assert row["reward"][-1] in table[s[-1], a[-1]]
        np.testing.assert_allclose(row["discounted_mean_reward"], GAMMA ** np.arange(H) * mean[s, a], rtol=1e-12)


def test_a_problem_with_a_table_reads_back_and_one_from_arrays_keeps_its_discount(directories, tmp_path):
    problem = Dataset(directories["table"]).problems()[0]
    np.testing.assert_array_equal(problem.paid.R, R[None])
    assert float(problem.discount) == GAMMA
    arrays = pomdp(P.swapaxes(0, 1), Z, MEAN, np.array([1.0, 0, 0]), horizon=H, discount=0.5)
    make_dataset(tmp_path / "d", NamedProblem(problem=arrays), config(tasks=2))
    back = Dataset(tmp_path / "d").problems()[0]
    np.testing.assert_array_equal(back.paid.R[0, :, :, 0, 0], MEAN)
    assert float(back.discount) == 0.5
    for row in rows(tmp_path / "d"):
        assert row["reward"] == [MEAN[s, a] for s, a in zip(row["state"], row["action"], strict=True)]
