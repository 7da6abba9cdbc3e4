"""The dose of a drug, where experts disagree about the patient's response."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lindm import validate
from lindm.families.suites import Sizes, Tables, TabularSuite, levels, rounded

# split -> largest distance of an expert's rates from the center; range of the accuracy of an assay
LAWS = {"id": (0.15, (0.7, 0.9)), "ood": (0.3, (0.5, 0.75))}
RESPONSE, CLEARANCE = (0.7, 1.0), (0.3, 0.6)  # ranges of the center
NOISE = 0.1  # probability of a rise, and of a fall, whatever the dose is


@dataclass(frozen=True, kw_only=True)
class Dosing(TabularSuite):
    """Choose the dose of a drug under the models of several experts; it is unknown which model is right.

    Source: S. Saghafian, J. Econ. Theory 178, 2018 (ambiguous POMDPs); A. Boloori, S. Saghafian, H. Chakkera, C. Cook,
    Manufacturing & Service Operations Management 22, 2020 (immunosuppressants after a transplantation). The criterion is
    that of `lindm.types.APOMDP`.

    States are levels of the drug in the blood; the middle one is the target. Dose a of 0, ..., A - 1 is the share a / (A
    - 1) of the largest one. The drift of the level is response * share - clearance: the level rises by one with
    probability NOISE + (1 - 2 NOISE) max(drift, 0), and falls by one with the same of -drift, so a dose that balances the
    clearance keeps the level. An assay reads the new level with the expert's accuracy, otherwise any level. The experts
    differ in response, clearance and accuracy, not in the rewards: a period on target is worth 1, other levels less with
    their distance from it, and doses have a burden. At the start every level is equally likely.
    """

    name: str = "dosing"
    horizon: int = 5
    """Number of periods."""
    states: int = 3
    """Number of levels of the drug, at least 2."""
    actions: int = 3
    """Number of doses, from none, at least 2."""
    observations: int = 3
    """Number of readings of the assay."""
    models: int = 2
    """Number of experts, at least 2."""
    alpha: float = 0.7
    """Attitude to ambiguity: 1 is the worst case over the experts, 0 the best."""

    def check(self) -> None:
        for size in ("states", "actions", "models"):
            validate.count(getattr(self, size), size, 2)
        validate.count(self.observations, "observations")
        validate.fraction(self.alpha, "alpha")

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.states, self.actions, self.observations, self.models)

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        def numbered(word: str, n: int) -> tuple[str, ...]:
            return tuple(f"{word}-{i}" for i in range(1, n + 1))

        return {
            "states": numbered("level", self.states),
            "actions": ("no-dose", *numbered("dose", self.actions - 1)),
            "observations": numbered("reading", self.observations),
            "models": numbered("expert", self.models),
        }

    @property
    def attitude(self) -> float:
        return self.alpha

    def tables(self, rng: np.random.Generator) -> Sequence[Tables]:
        distance, accuracy = LAWS[self.split]
        S, A, O, M = self.sizes
        center = np.array([rng.uniform(*RESPONSE), rng.uniform(*CLEARANCE)])
        target, level, dose = (S - 1) // 2, np.arange(S), np.linspace(0, 1, A)
        low, high, burden = rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.9), rng.uniform(0.0, 0.1)
        far = max(target, 1), max(S - 1 - target, 1)
        worth = 1 - np.where(level < target, low * (target - level) / far[0], high * (level - target) / far[1])
        r = np.round(rounded(worth)[:, None] - rounded(burden * dose), 10)
        models = []
        for _ in range(M):
            response, clearance = np.clip(center + rng.uniform(-distance, distance, 2), 0.05, 1)
            drift = (1 - 2 * NOISE) * (response * dose - clearance)
            up, down = NOISE + np.maximum(drift, 0), NOISE + np.maximum(-drift, 0)
            P = np.zeros((S, A, S))
            for s in range(S):
                P[s, :, min(s + 1, S - 1)] += up
                P[s, :, max(s - 1, 0)] += down
                P[s, :, s] += 1 - up - down
            assay = levels(S, O, rng.uniform(*accuracy))
            models.append(Tables(P=P, r=r, rho=np.full(S, 1 / S), O=np.broadcast_to(assay, (A, S, O))))
        return models
