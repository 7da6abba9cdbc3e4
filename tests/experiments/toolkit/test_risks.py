"""The risk table against sums over all prompts, simulation, and the command."""

import itertools
import json

import jax
import numpy as np
import pytest

import lindm as ld
from lindm.cli.main import main
from lindm.errors import UsageError
from lindm.icl import feature_laws

CORR = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.4]])


def enumerated(phi, chances, Psi, sigma, N, M):
    """Risk of the best weights for N pairs on M pairs: moments of S by a sum over all prompts of a law with few points."""
    d = phi.shape[1]

    def moments(length):
        SS, Sw = np.zeros((d, d)), np.zeros((d, d))
        for index in itertools.product(range(len(phi)), repeat=length):
            x, p = phi[list(index)], np.prod(chances[list(index)])
            G = x.T @ x / length
            SS += p * (G @ Psi @ G + sigma**2 * G / length)
            Sw += p * G @ Psi
        return SS, Sw

    SS, Sw = moments(N)
    A = np.linalg.solve(SS, Sw).T
    SS, Sw = moments(M)
    return np.trace(phi.T @ np.diag(chances) @ phi @ (A @ SS @ A.T - A @ Sw - Sw.T @ A.T + Psi))


@pytest.mark.parametrize("sigma", [0.0, 0.4])
def test_a_table_of_features_has_the_risk_of_a_sum_over_all_prompts(sigma):
    rng = np.random.default_rng(1)
    phi, chances = rng.normal(size=(3, 2)), np.array([0.5, 0.3, 0.2])
    Psi = np.array([[1.0, 0.3], [0.3, 0.5]])
    got = ld.theory.risk(
        law=feature_laws.table(phi, chances), task_covariance=Psi, noise=sigma, train_lengths=[2, 3], test_lengths=[4]
    )
    want = [[enumerated(phi, chances, Psi, sigma, N, 4)] for N in (2, 3)]
    np.testing.assert_allclose(got.total, want, rtol=1e-10)
    assert got.samples is None and got.standard_error is None and got.paper_bound is None
    assert (got.total <= got.general_bound).all()


def test_the_spot_values_and_the_places_of_the_lines():
    table = ld.theory.risk(np.diag([4.0, 1, 0.1]), train_lengths=[20], test_lengths=[5])
    assert table.total[0, 0] == pytest.approx(2.412, abs=5e-4) and np.ravel(table.paper_bound)[0] == pytest.approx(8.76, abs=5e-3)
    noisy = ld.theory.risk(np.diag([2, 1, 0.5, 0.25]), noise=0.5, train_lengths=[8], test_lengths=[30])
    assert noisy.total[0, 0] == pytest.approx(0.769, abs=5e-4) and "noise" in noisy.paper_bound_reason
    wide = ld.theory.risk(CORR, train_lengths=range(1, 60), test_lengths=[7, 31])
    assert wide.best_given_train_lengths.tolist() == wide.best_train_lengths.tolist() == [7, 31]
    above = wide.bias[:, 0] > wide.estimation[:, 0]
    assert np.argmin(above) == np.floor(np.ravel(wide.balance_lengths)[0]), (
        "the first length at which the bias is the smaller part"
    )


def test_estimated_moments_say_so_and_their_error_covers_the_truth():
    truth = ld.theory.risk(CORR, noise=0.2, train_lengths=[16], test_lengths=[8]).total[0, 0]
    rng, root = np.random.default_rng(3), np.linalg.cholesky(CORR)
    tables = [
        ld.theory.risk(features=rng.normal(size=(400, 3)) @ root.T, noise=0.2, train_lengths=[16], test_lengths=[8])
        for _ in range(24)
    ]
    assert {t.samples for t in tables} == {400} and "Gaussian" in tables[0].paper_bound_reason
    errors = np.array([t.total[0, 0] - truth for t in tables])
    spread = np.array([np.ravel(t.standard_error)[0] for t in tables])
    assert 0.6 < errors.std() / spread.mean() < 1.6
    assert (np.abs(errors) < 2 * spread).mean() > 0.75


class Signs:
    """x = +-1 in every entry: K is known by hand."""

    def sample(self, key, shape):
        return jax.random.rademacher(key, (*shape, 2), float)


class KnownSigns(Signs):
    def second_moment(self):
        return np.eye(2)

    def fourth_moment(self, Psi):
        return np.trace(Psi) * np.eye(2) + 2 * (Psi - np.diag(np.diag(Psi)))


def test_a_law_of_ones_own_with_moments_is_exact_and_without_them_is_close():
    lengths = {"train_lengths": [6], "test_lengths": [4]}
    Psi = np.array([[1.0, 0.4], [0.4, 2.0]])
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=2)))
    want = enumerated(corners, np.full(4, 0.25), Psi, 0.0, 6, 4)
    known = ld.theory.risk(law=KnownSigns(), task_covariance=Psi, **lengths)
    assert known.total[0, 0] == pytest.approx(want, rel=1e-10) and known.samples is None and known.law == "KnownSigns"
    guess = ld.theory.risk(law=Signs(), task_covariance=Psi, samples=4000, **lengths)
    assert guess.samples == 4000 and guess.total[0, 0] != known.total[0, 0]
    assert abs(guess.total[0, 0] - want) < 5 * np.ravel(guess.standard_error)[0]


class DoubledSigns(KnownSigns):
    def fourth_moment(self, Psi):
        return 2 * super().fourth_moment(Psi)


class ShrunkSigns(KnownSigns):
    def second_moment(self):
        return 0.9 * np.eye(2)


@pytest.mark.parametrize("law, which", [(DoubledSigns(), "fourth_moment"), (ShrunkSigns(), "second_moment")])
def test_a_moment_that_is_not_that_of_the_samples_gives_a_warning(law, which):
    with pytest.warns(UserWarning, match=rf"{which} of the law disagrees with its samples.*entry \(0, 0\) is"):
        ld.theory.risk(law=law, train_lengths=[6], test_lengths=[4])


def test_a_risk_is_printed_as_its_tables():
    lines = str(ld.theory.risk(CORR, train_lengths=[8, 16], test_lengths=[4])).splitlines()
    assert lines[0].startswith("features  gaussian, d = 3") and lines[3].split()[:4] == ["N", "M", "risk", "estimation"]
    assert [line.split()[0] for line in lines[4:6]] == ["8", "16"]


def test_the_class_of_a_law_is_no_law():
    with pytest.raises(UsageError, match=r"law must be .* a method sample.*; got <class .*Signs"):
        ld.theory.risk(law=Signs, train_lengths=[6], test_lengths=[4])


def test_the_ending_of_a_figure_is_checked_before_anything_is_computed(capsys, tmp_path):
    command = ["theory", "risk", "--covariance", str(tmp_path / "none.npy"), "--train-lengths", "8", "--test-lengths", "8"]
    assert main([*command, "--plot", "x.gif"]) == 2
    assert "--plot must end in .svg, .png, .pdf; got x.gif" in capsys.readouterr().err


def test_onehot_of_the_command_is_the_table_of_unit_vectors():
    rho = np.array([0.5, 0.3, 0.2])
    lengths = {"train_lengths": [4], "test_lengths": [3]}
    got = ld.theory.risk(np.diag(rho), law="onehot", **lengths)
    assert got.total[0, 0] == pytest.approx(enumerated(np.eye(3), rho, np.eye(3), 0.0, 4, 3), rel=1e-10)


WRONG = {
    "covariance must be a square matrix": {"covariance": np.ones((2, 3))},
    "covariance must be symmetric": {"covariance": [[1, 0.5], [0, 1]]},
    "covariance must be positive definite": {"covariance": [[1, 2], [2, 1]]},
    "covariance must be finite; got nan": {"covariance": [[np.nan, 0], [0, 1]]},
    r"task_covariance must have shape \[d, d\] = \(2, 2\)": {"task_covariance": np.eye(3)},
    "task_covariance must be positive definite": {"task_covariance": [[1, 1], [1, 1]]},
    "noise must be finite and not negative; got -1": {"noise": -1},
    "train_lengths must be a whole number of at least 1; got 0": {"train_lengths": [4, 0]},
    r"test_lengths must be a list of at least one .*; got \[\]": {"test_lengths": []},
    "law must be one of gaussian, onehot; got 'gausian'; did you mean gaussian": {"law": "gausian"},
    "law must be one of .*, or have a method sample": {"law": 3, "covariance": None},
    "trace 1 .*; got trace 2": {"law": "onehot"},
    "covariance, features or a law of your own must be given": {"covariance": None},
    "covariance must be left out with features": {"features": np.ones((4, 2))},
    "features must have more samples .*d = 4; got n = 3": {"features": np.ones((3, 4)), "covariance": None},
    "the second moment of the features must be positive definite": {"features": np.ones((8, 2)), "covariance": None},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named_with_its_rule(message):
    arguments = {"covariance": np.eye(2), "train_lengths": [4], "test_lengths": [4]} | WRONG[message]
    with pytest.raises(ValueError, match=message):
        ld.theory.risk(arguments.pop("covariance"), **arguments)


def test_the_command_prints_the_table_strict_json_and_a_figure(tmp_path, capsys):
    np.save(tmp_path / "L.npy", CORR)
    np.savetxt(tmp_path / "P.csv", np.eye(3) * 2, delimiter=",")
    words = ["theory", "risk", "--covariance", str(tmp_path / "L.npy"), "--train-lengths", "8", "--test-lengths", "4", "16"]
    figure = tmp_path / "out.png"
    assert main([*words, "--json", "--plot", str(figure)]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    table = ld.theory.risk(CORR, train_lengths=[8], test_lengths=[4, 16])
    assert [row["risk"] for row in printed["rows"]] == table.total.ravel().tolist()
    assert printed["best"][1]["balance_train_length"] == np.ravel(table.balance_lengths)[1]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--task-covariance", str(tmp_path / "P.csv")]) == 0
    page = capsys.readouterr().out
    assert "does not apply: the covariance of the tasks must be the identity" in page and "best N" in page
    assert main([*words, "--task-covariance", str(tmp_path / "missing.npy")]) == 3
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "bad.txt").write_text("1 2\n3 x\n")
    assert main([*words, "--task-covariance", str(tmp_path / "bad.txt")]) == 3
    assert "bad.txt must be" in capsys.readouterr().err
    assert main([*words[:3], str(tmp_path / "P.csv"), "--train-lengths", "0", "--test-lengths", "1"]) == 2
    assert "train_lengths must be a whole number" in capsys.readouterr().err
