"""Screening for a disease and its treatment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lindm import validate
from lindm.families.suites import Sizes, Tables, TabularSuite, rounded


@dataclass(frozen=True, kw_only=True)
class Law:
    """Ranges of the parameters, for a period."""

    ill: tuple[float, float] = (0.1, 0.4)  # that the disease has begun when the patient comes
    onset: tuple[float, float] = (0.1, 0.3)  # probability that the disease begins
    progress: tuple[float, float] = (0.2, 0.4)  # that a stage leads to the next, the last one to death
    symptoms: tuple[float, float] = (0.2, 0.7)  # that there are symptoms, by stage
    sensitivity: tuple[float, float] = (0.6, 0.95)  # that a test finds the disease, by stage
    false_alarm: tuple[float, float] = (0.02, 0.15)  # that there are symptoms, or that a test is positive, without the disease
    cure: tuple[float, float] = (0.5, 0.95)  # that a treatment cures, by stage
    burden: tuple[float, float] = (0.1, 0.3)  # loss of a period of treatment


LAWS = {
    "id": Law(),
    "ood": Law(
        ill=(0.3, 0.6), onset=(0.05, 0.2), progress=(0.35, 0.55), symptoms=(0.1, 0.5), sensitivity=(0.4, 0.75), cure=(0.3, 0.8)
    ),
}


@dataclass(frozen=True, kw_only=True)
class Screening(TabularSuite):
    """A disease develops unseen: wait, test or treat a patient who shows symptoms or none.

    Source: T. Ayer, O. Alagoz, N. Stout, Operations Research 60, 2012 (screening as a POMDP); L. Steimle and B. Denton,
    Markov decision processes for screening and treatment of chronic diseases, 2017.

    States are healthy, the stages of the disease, and dead. In a period the disease begins, or moves by one stage; the
    last stage leads to death. Then the patient is seen: with symptoms or without after wait and treat, with a positive or
    a negative test after test. Both findings are more likely in later stages; one word, suspicious, stands for symptoms
    and for a positive test. Death is seen. A treatment cures with a probability that falls with the stage, otherwise the
    disease goes on; a cured patient is healthy and may fall ill again. Some patients are ill when they come, in any
    stage. A period is worth 1 to the healthy, less in later stages, nothing after death; a test and a treatment cost a
    part of it. Numbers are ranges of the order that this literature has, not estimates for a disease.
    """

    name: str = "screening"
    horizon: int = 6
    """Number of periods."""
    states: int = 4
    """Number of states: healthy, at least one stage of the disease, dead."""

    def check(self) -> None:
        validate.count(self.states, "states", 3)

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.states, 3, 3)

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        stages = tuple(f"stage-{stage}" for stage in range(1, self.states - 1))
        return {
            "states": ("healthy", *stages, "dead"),
            "actions": ("wait", "test", "treat"),
            "observations": ("clear", "suspicious", "dead"),
        }

    def tables(self, rng: np.random.Generator) -> Sequence[Tables]:
        law, S = LAWS[self.split], self.states
        stages, dead = S - 2, S - 1
        course = np.eye(S)
        course[0, :2] = 1 - (onset := rng.uniform(*law.onset)), onset
        for s, p in enumerate(rng.uniform(*law.progress, stages), start=1):
            course[s, s], course[s, s + 1] = 1 - p, p
        cured = np.array([0.0, *np.sort(rng.uniform(*law.cure, stages))[::-1], 0.0])[:, None]
        P = np.stack([course, course, cured * np.eye(S)[0] + (1 - cured) * course], axis=1)
        alarm, false_positive = np.sort(rng.uniform(*law.false_alarm, 2))[::-1]
        symptoms = np.array([alarm, *np.sort(rng.uniform(*law.symptoms, stages)), 0.0])
        positive = np.array([false_positive, *np.sort(rng.uniform(*law.sensitivity, stages)), 0.0])
        findings = [np.stack([1 - p, p, 0 * p], axis=-1) for p in (symptoms, positive, symptoms)]
        O = np.stack(findings)
        O[:, dead] = [0, 0, 1]
        life = np.array([1.0, *np.sort(rng.uniform(0.1, 0.9, stages))[::-1], 0.0])
        costs = np.array([0.0, rng.uniform(0.05, 0.1), rng.uniform(*law.burden)])
        r = rounded(life)[:, None] - rounded(costs)
        r[dead] = 0
        ill = rng.uniform(*law.ill)
        rho = np.array([1 - ill, *np.full(stages, ill / stages), 0.0])
        return [Tables(P=P, r=np.round(r, 10), rho=rho, O=O)]
