"""The mutants: every mistake makes a bound that is false, or far from the truth, on the instances of some seed."""

import json

import numpy as np
import pytest

from lindm.errors import UsageError
from lindm_experiments import bellman_horizon, risk
from lindm_experiments.harness import mutants as harness
from lindm_experiments.harness.claims import CLAIMS, PASS, Mutant
from lindm_experiments.harness.mutants import Trial, print_mutants, select_mutants, try_mutants, verify_mutants
from lindm_experiments.harness.tasks import plan
from lindm_experiments.lib import attained, attained_margin, attained_offline, feature_laws
from lindm_experiments.mutants import MUTANTS


@pytest.fixture(scope="module")
def instances() -> list[dict]:
    pairs = (attained.ladder_pairs, attained_offline.pairs, attained_margin.pairs)
    return [{"instances": s, "attained": {k: v for p in pairs for k, v in p(s).items()}} for s in range(3)]


BY_INSTANCE = [m for m in MUTANTS if CLAIMS[m.claim].experiment in ("ladder", "bellman_horizon", "margin")]


@pytest.mark.fault("F24")
@pytest.mark.parametrize("mutant", BY_INSTANCE, ids=lambda m: f"{m.claim}: {m.mistake}")
def test_a_mistake_makes_a_false_or_a_loose_bound(mutant, instances):
    changed = json.loads(json.dumps(instances))
    mutant.change(changed)
    pairs = [(a["attained"][k], b["attained"][k]) for a, b in zip(changed, instances, strict=True) for k in b["attained"]]
    different = [new for new, old in pairs if new != old]
    assert different, "the mistake changes nothing"
    loose = mutant.claim.endswith("/attained")
    assert any(bound < truth * (1 - 1e-9) or (loose and bound > 1.5 * truth) for truth, bound in different)


def test_mutants_are_of_claims_that_must_pass_and_have_different_names():
    assert all(CLAIMS[m.claim].expected == PASS for m in MUTANTS)
    assert len({(m.claim, m.mistake) for m in MUTANTS}) == len(MUTANTS) >= 40


def test_the_constants_of_the_risk_bounds_are_recomputed_from_the_moments():
    L, Psi, K, noise = np.eye(feature_laws.D) * 2, np.eye(feature_laws.D), np.eye(feature_laws.D) * 40, np.eye(feature_laws.D)
    names = [
        f"{form}, {part}, {law}" for form in ("eq. (6)", "every law") for part in ("estimation", "bias") for law in risk.LAWS
    ]
    record = {"cells": {law: {"moments": [x.tolist() for x in (L, Psi, K, noise)]} for law in risk.LAWS}}

    def constants(mistake: str) -> dict[str, float]:
        here = [json.loads(json.dumps(record | {"attained": {name: [1.0, 1.0] for name in names}}))]
        next(m for m in MUTANTS if m.mistake == mistake).change(here)
        return {k: v[1] for k, v in here[0]["attained"].items() if v[1] != 1.0}

    assert constants("eq. (6): d in place of d + 1") == {f"eq. (6), estimation, {law}": 72.0 for law in risk.MATCHED}
    C = (40 - 4 + 1) / 4
    assert constants("bias: without Psi^-1")[f"every law, bias, {risk.ONEHOT}"] == pytest.approx(6 * 2 * C**2)


@pytest.mark.fault("F24")
def test_a_mutant_that_survives_is_seen(capsys):
    from rich.console import Console

    records = {"bellman_horizon": _records()}
    nothing = Mutant(claim="bellman-horizon/pessimism", mistake="none at all", change=lambda records: None)
    killed, survived = try_mutants([_pessimism(), nothing], records)
    assert killed.killed and not survived.killed and survived.correct == survived.mutated == PASS
    print_mutants([killed, survived], Console(width=160))
    printed = capsys.readouterr().out
    assert "killed (PASS -> FAIL)" in printed and "SURVIVED (PASS -> PASS)" in printed and "1 of 2 mutants killed" in printed
    assert not Trial(claim="a", mistake="b", correct="INCONCLUSIVE", mutated="FAIL").killed


def _pessimism() -> Mutant:
    return next(m for m in MUTANTS if m.claim == "bellman-horizon/pessimism")


def _records() -> list[dict]:
    """Six seeds of the experiment without an oracle, as its `check` wants them."""
    H = list(range(1, 9))
    mean = {k: [float(h) for h in H] for k in ("bellman", "oracle", "injected", "error", "span", "linear", "quadratic")}
    return [
        {
            "instances": s,
            "horizons": H,
            "mean": mean,
            "n": 2000,
            "violations": {"span": 0, "linear": 0, "quadratic": 0},
            "pessimism": {"violations": 0, "loss": 1.0, "bound": 2.0},
            "attained": attained_offline.pairs(s),
        }
        for s in range(6)
    ]


@pytest.mark.fault("F24")
def test_a_claim_without_a_mutant_is_named():
    assert {m.claim for m in select_mutants(MUTANTS, ["ladder"])} == {"ladder", "ladder/attained"}
    assert select_mutants(MUTANTS, []) == list(MUTANTS)
    with pytest.raises(ValueError, match="softmax"):
        select_mutants(MUTANTS, ["softmax"])
    with pytest.raises(ValueError, match="'ladder/atained' is not known; did you mean ladder/attained"):
        select_mutants(MUTANTS, ["ladder/atained"])


@pytest.mark.parametrize("kept", ["nothing", "directory", "some records", "all records", "another kind"])
def test_experiments_that_are_not_finished_are_named_before_they_run(monkeypatch, tmp_path, capsys, kept):
    directory = tmp_path / "v"
    if kept != "nothing":
        (directory / "bellman_horizon").mkdir(parents=True)
    if kept in ("some records", "all records"):
        (directory / "bellman_horizon" / "records.jsonl").touch()
    if kept == "all records":
        (directory / "bellman_horizon" / "manifest.json").touch()
    if kept == "another kind":
        (directory / "manifest.json").touch()

    def measure_nothing(jobs, locks, executor, workers):
        raise UsageError("nothing is measured here")

    monkeypatch.setattr(harness, "run_with_progress", measure_nothing)
    refused = "holds manifest.json but no verdicts.json" if kept == "another kind" else "nothing is measured"
    with pytest.raises(UsageError, match=refused):
        verify_mutants("smoke", directory, only=["bellman-horizon"])
    note = "lindm: note: bellman_horizon"
    advice = "to use the records of an earlier `lindm verify`, give its directory as --out\n"
    assert (
        capsys.readouterr().err
        == {
            "nothing": f"{note} runs first: {directory} does not exist; {advice}",
            "directory": f"{note} runs first: {directory} has no records of it; {advice}",
            "some records": f"{note} is completed first: its run in {directory} is not finished\n",
            "all records": "",
            "another kind": "",  # the directory is refused, so nothing runs
        }[kept]
    )
    if kept == "all records":
        with pytest.raises(UsageError, match="nothing is measured"):
            verify_mutants("smoke", directory, only=["bellman-horizon"], fresh=True)
        assert capsys.readouterr().err == f"{note} runs first: --fresh removes the records in {directory}\n"


def test_the_options_of_verify_reach_the_runs_of_mutants(monkeypatch, tmp_path):
    started = []

    def measure_nothing(jobs, locks, executor, workers):
        started.extend(jobs)
        raise UsageError("nothing is measured here")

    monkeypatch.setattr(harness, "run_with_progress", measure_nothing)
    with pytest.raises(UsageError, match="nothing is measured"):
        verify_mutants("smoke", tmp_path, only=["bellman-horizon"], seeds=3, seed_offset=500)
    (job,) = started
    config = plan(job).config
    assert config["seeds"] == 3 and config["base_seed"] == bellman_horizon.SMOKE.base_seed + 500
    with pytest.raises(UsageError, match="seed_offset must be >= 0; got -1"):
        verify_mutants("smoke", tmp_path, seed_offset=-1)
