"""Models from logs: posterior by counting, what cannot be identified, files, and the command."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import lindm as ld
from lindm.cli.main import main
from lindm.datasets import read_episodes
from lindm.errors import DataError
from lindm.estimation.estimate import Steps, mean_rewards, padded, steps_of
from lindm.estimation.hidden_states import Parameters, smooth
from lindm.estimation.log_names import similar_names
from lindm.problems import cassandra

SEEN = """\
episode,step,state,action,observation,reward
a,0,good,run,fine,1
a,1,good,run,alarm,2
a,2,worn,fix,fine,-1
a,3,good,,,
b,0,good,run,fine,3
b,1,worn,,,
"""
GOOD, WORN, FIX, RUN, ALARM, FINE = 0, 1, 0, 1, 0, 1  # alphabetical order


def written(tmp_path, text, name="log.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_the_posterior_mean_is_counts_and_prior(tmp_path):
    found = ld.estimate(written(tmp_path, SEEN), prior=0.5, discount=0.9)
    (model,) = found.models
    assert (model.states, model.actions, model.observations) == (("good", "worn"), ("fix", "run"), ("alarm", "fine"))
    assert model.discount == 0.9
    np.testing.assert_allclose(model.start, np.array([2 + 0.25, 0 + 0.25]) / 2.5)
    np.testing.assert_allclose(model.P[GOOD, RUN], np.array([1 + 0.25, 2 + 0.25]) / 3.5)
    np.testing.assert_allclose(model.P[WORN, FIX], np.array([1 + 0.25, 0 + 0.25]) / 1.5)
    np.testing.assert_allclose(model.P[WORN, RUN], [0.5, 0.5])  # never tried
    np.testing.assert_allclose(model.O[RUN, WORN], np.array([1 + 0.25, 1 + 0.25]) / 2.5)
    np.testing.assert_allclose(model.O[RUN, GOOD], np.array([0 + 0.25, 1 + 0.25]) / 1.5)
    mean = (1 + 2 - 1 + 3) / 4
    np.testing.assert_allclose(model.r[GOOD, RUN], 6 / 3)
    np.testing.assert_allclose(model.r[WORN, RUN], mean)
    assert found.visits.tolist() == [[0, 3], [1, 0]]
    assert found.warnings == (
        "tried less than once: 2 of 4 pairs of action and state (fix in good, run in worn); "
        "their rows are the prior's, their rewards are guesses from the mean of the log",
    )


def test_draws_have_the_mean_and_the_variance_of_the_posterior(tmp_path):
    found = ld.estimate(written(tmp_path, SEEN), models=400, prior=2.0)
    p = np.array([model.P[GOOD, RUN, WORN] for model in found.models])
    mean, weight = (2 + 1) / 5, 5  # of a beta law: counts 1 and 2, and one more of each
    deviation = np.sqrt(mean * (1 - mean) / (weight + 1))
    assert abs(p.mean() - mean) < 5 * deviation / 20 and p.std() == pytest.approx(deviation, rel=0.15)
    again = ld.estimate(tmp_path / "log.csv", models=400, prior=2.0)
    other = ld.estimate(tmp_path / "log.csv", models=400, prior=2.0, seed=1)
    np.testing.assert_array_equal(again.models[7].P, found.models[7].P)
    assert (other.models[7].P != found.models[7].P).any()


def test_a_log_without_observations_is_an_mdp_and_its_draws_observe_the_next_state(tmp_path):
    rows = [",".join(cell for i, cell in enumerate(line.split(",")) if i != 4) for line in SEEN.splitlines()]
    path = written(tmp_path, "\n".join(rows) + "\n")
    mean = ld.estimate(path)
    assert isinstance(mean.problem(3).problem, ld.MDP)
    cloud = ld.estimate(path, models=3)
    assert cloud.models[0].observations == ("good", "worn") and (np.eye(2) == cloud.models[0].O).all()
    problem = cloud.problem(3, alpha=0.5)
    assert isinstance(problem.problem, ld.APOMDP) and ld.solve(problem).exact
    assert "the observation after an action is the next state" in cloud.warnings[-1]


def test_rewards_are_the_regression_on_the_law_of_the_state():
    rng = np.random.default_rng(0)
    n, truth = 4000, np.array([[1.0, -2.0], [0.5, 3.0]])
    laws, actions = rng.dirichlet([0.7, 0.7], n), rng.integers(0, 2, n)
    state = (rng.random(n) > laws[:, 0]).astype(int)
    rewards = truth[state, actions] + rng.normal(size=n) * 0.1
    zero = np.zeros(n, int)
    steps = Steps(zero, zero, actions, zero, zero, zero, rewards)
    np.testing.assert_allclose(mean_rewards(steps, laws, 2, 1e-9), truth, atol=0.2)
    averages = [np.average(rewards[actions == 0], weights=laws[actions == 0, s]) for s in (0, 1)]
    assert np.abs(averages - truth[:, 0]).max() > 0.1  # averages weighted by the law are drawn together


def hidden_log(tmp_path, episodes=150, steps=10):
    """Two states that are seen through noise by `look`, and not at all by `wait`."""
    rng, rows = np.random.default_rng(0), ["episode,step,action,observation,reward"]
    for e in range(episodes):
        s = 0
        for t in range(steps):
            a = int(rng.random() < 0.5)
            s = s if rng.random() < 0.8 else 1 - s
            o = s if a and rng.random() < 0.9 else rng.integers(2)
            rows.append(f"{e},{t},{('wait', 'look')[a]},{('no', 'yes')[o]},{s}")
    return written(tmp_path, "\n".join(rows) + "\n", "hidden.csv")


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    path = hidden_log(tmp_path_factory.mktemp("hidden"))
    return path, ld.estimate(path, states=2, restarts=3)


def test_hidden_states_are_found_and_what_is_not_identified_is_said(hidden):
    _, found = hidden
    (model,) = found.models
    look, wait = 0, 1
    assert model.actions == ("look", "wait") and found.visits.sum() == pytest.approx(1500)
    assert (found.visits.sum(1)[0] >= found.visits.sum(1)[1]) and len(found.objectives) == 3
    assert abs(np.linalg.det(model.O[look])) > 0.6 > 0.3 > abs(np.linalg.det(model.O[wait]))
    text = " / ".join(found.warnings)
    assert "their order is arbitrary" in text and "the observation matrix of wait has rank 1 for 2 states" in text
    assert "matrix of look" not in text
    free = 1 + 2 * 2 * 2
    assert found.bic == pytest.approx(free * np.log(1500) - 2 * found.log_likelihood)


def test_all_parts_of_a_model_have_the_same_order_of_states(hidden):
    """EM ends with either order; the likelihood of the model in its file is that of EM."""
    path, _ = hidden
    data, _ = padded(steps_of(read_episodes(path)), 150)
    for seed in range(4):
        found = ld.estimate(path, states=2, restarts=1, seed=seed)
        (model,) = found.models
        parameters = Parameters(*map(jnp.asarray, (model.start, model.P, model.O)))
        assert float(smooth(parameters, data)[0]) == pytest.approx(found.log_likelihood, rel=1e-12)
        assert found.visits.sum(1)[0] >= found.visits.sum(1)[1]


def test_more_states_than_observations_are_never_of_full_rank(hidden):
    path, _ = hidden
    found = ld.estimate(path, states=3, restarts=1)
    assert "the observation matrix of look has rank 2 for 3 states (there are 2 observations)" in " / ".join(found.warnings)
    assert "there was one restart" in found.warnings[-1]


def test_a_file_reads_back_to_the_model_says_where_it_is_from_and_is_checked(tmp_path, capsys):
    found = ld.estimate(written(tmp_path, SEEN), models=2)
    paths = found.save(tmp_path / "cloud.pomdp")
    assert [path.name for path in paths] == ["cloud-1.pomdp", "cloud-2.pomdp"]
    for path, model in zip(paths, found.models, strict=True):
        np.testing.assert_array_equal(cassandra.read(path).P, model.P)
    text = paths[0].read_text()
    assert "log.csv: 2 episodes, 4 steps, SHA-256 " in text and "# warning: tried less than once" in text
    assert [one.kind for one in ld.check(paths[0])] == ["estimated model"]
    paths[0].write_text(text.replace("discount: 0.95", "discount: 0.96"))
    assert main(["check", str(tmp_path)]) == 3
    out = capsys.readouterr().out
    assert "cloud-1.pomdp is damaged or was changed" in out and "estimate the model again" in out
    assert main(["solve", *map(str, paths), "--horizon", "2", "--alpha", "0.5", "--discount", "0.9"]) == 0


@pytest.mark.parametrize(
    "change, code, said",
    [
        (["--states", "2"], 2, "states must be left out where the log has the column state; got 2"),
        (["--models", "0"], 2, "models must be"),
        (["--prior", "0"], 2, "prior must be above 0; got 0.0"),
        (["--discount", "1.5"], 2, "discount must be a number from 0 to 1; got 1.5"),
        (["--out", "model.txt"], 2, "--out must end in .pomdp; got model.txt"),
        (["--like", "nowhere.pomdp"], 3, "nowhere.pomdp"),
    ],
)
def test_wrong_options_raise_an_error_of_one_line(tmp_path, monkeypatch, capsys, change, code, said):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, SEEN)
    assert main(["estimate", "log.csv", *(["--out", "m.pomdp"] if change[0] != "--out" else []), *change]) == code
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and sorted(p.name for p in tmp_path.iterdir()) == ["log.csv"]


@pytest.mark.parametrize(
    "text, options, said",
    [
        ("episode,step,action\n1,0,run\n", {}, "states must be given for a log without the column state"),
        (
            "episode,step,action\n1,0,run\n",
            {"states": 2},
            "log.csv: .* must have the column observation",
        ),
        ("episode,step,action,observation,model\n1,0,run,fine,x\n", {"states": 2}, "must not have the column model"),
        ("episode,step,action,observation\n1,0,run,fine\n1,2,run,fine\n", {"states": 2}, "log.csv:3: step must be 1"),
        (
            "episode,step,action,observation\n1,0,run,fine\n",
            {"states": 2, "models": 2},
            "models must be 1 where",
        ),
    ],
)
def test_a_log_that_does_not_fit_raises_an_error(tmp_path, text, options, said):
    with pytest.raises((DataError, ValueError), match=said):
        ld.estimate(written(tmp_path, text), **options)


def test_a_name_that_a_file_cannot_hold_raises_an_error(tmp_path):
    found = ld.estimate(written(tmp_path, SEEN.replace("worn", "worn out")))
    with pytest.raises(DataError, match=r"a name that a .pomdp file cannot hold: states .* got 'worn out'"):
        found.save(tmp_path / "m.pomdp")
    assert not (tmp_path / "m.pomdp").exists()


def test_the_command_takes_names_and_discount_of_another_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, SEEN)
    like = ["discount: 0.8", "values: reward", "states: worn good lost", "actions: run fix", "observations: fine alarm"]
    rules = ["start: uniform", "T: * identity", "O: * uniform"]
    written(tmp_path, "\n".join([*like, *rules]) + "\n", "expert.pomdp")
    assert main(["estimate", "log.csv", "--like", "expert.pomdp", "--out", "new/models/m.pomdp", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    model = cassandra.read("new/models/m.pomdp")  # its directory was created
    assert (model.states, model.actions, model.discount) == (("worn", "good", "lost"), ("run", "fix"), 0.8)
    assert answer["files"] == ["new/models/m.pomdp"] and answer["visits"] == [[0, 1], [3, 0], [0, 0]]
    assert answer["warnings"][0] == "never visited: state lost; all their rows are the prior's"
    assert main(["estimate", "log.csv", "--out", "m.pomdp"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "episodes        log.csv: 2 episodes, 4 steps" and "lindm: warning: tried less" in err


def test_a_rare_name_beside_a_similar_one_is_a_warning_and_declared_names_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, SEEN.replace("b,0,good", "b,0,goood"))
    assert main(["estimate", "log.csv", "--out", "m.pomdp"]) == 0
    out, err = capsys.readouterr()
    assert "states          good 3, goood 1, worn 2\n" in out and "actions         fix 1, run 3\n" in out
    assert "the state 'goood' occurs once, and 'good' 3 times: if it is misspelled, correct it" in err
    command = ["estimate", "log.csv", "--out", "n.pomdp", "--states"]
    assert main([*command, "worn,good"]) == 3 and not (tmp_path / "n.pomdp").exists()
    assert "log.csv:6: state must be one of worn, good; got 'goood'; did you mean good?" in capsys.readouterr().err
    assert main([*command, "worn, goood, good, new", "--actions", "run,fix", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert cassandra.read("n.pomdp").states == ("worn", "goood", "good", "new")
    assert answer["counts"]["states"] == {"worn": 2, "goood": 1, "good": 3, "new": 0}
    assert not any("goood" in warning and "misspelled" in warning for warning in answer["warnings"])
    for wrong in ("good,,worn", "good,good"):
        assert main([*command, wrong]) == 2
        assert "--states must be different names with commas between them, or the number" in capsys.readouterr().err
    assert main([*command, "a,b", "--like", "m.pomdp"]) == 2
    assert "--states must be left out with --like" in capsys.readouterr().err


def test_similar_names_are_rare_ones_beside_frequent_ones():
    counts = {"states": {"good": 9, "Good": 2, "worn-1": 9, "worn-2": 1, "low": 1, "unseen": 0}, "actions": {"run": 8, "rn": 3}}
    (warning,) = similar_names(counts)
    assert "'Good' occurs 2 times, and 'good' 9 times" in warning
    assert similar_names({"actions": {"run": 8, "rn": 2}}) and not similar_names({"actions": {"run": 5, "rn": 2}})
