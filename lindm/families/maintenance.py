"""Maintenance of a machine that wears out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lindm import validate
from lindm.families.suites import Sizes, Tables, TabularSuite, levels, rounded

# split -> ranges of: probability of wear in a period, share of two grades at once, cost of a new machine
LAWS = {"id": ((0.2, 0.5), (0.0, 0.3), (0.2, 0.8)), "ood": ((0.4, 0.8), (0.2, 0.6), (0.6, 1.5))}
ACCURACY = {"id": (0.4, 0.8), "ood": (0.2, 0.5)}  # of the signals of a running machine whose condition is hidden


@dataclass(frozen=True, kw_only=True)
class Maintenance(TabularSuite):
    """A machine wears out while it runs, and can be replaced; with `hidden`, its condition shows only in signals.

    Source: C. Derman, On optimal replacement rules when changes of state are Markovian, 1963; M. Puterman, Markov
    Decision Processes, 1994, section 4.7. With `hidden`: R. Smallwood and E. Sondik, Operations Research 21, 1973.

    Conditions are 0 (new), ..., S - 1 (failed). A machine that runs earns the profit of its condition, which never rises
    with wear, and wears by one grade or two with probabilities that never fall with wear. So the more a machine is worn
    the worse are its next condition and its profit, and a control limit is optimal: at every stage, replace from some
    condition on (Derman). To replace costs the price of a machine and the period; the next period begins with a new
    machine. Episodes begin with a machine in any condition, a new one most likely.

    Where the condition is hidden, a running machine gives a signal, the level of its new condition with a drawn accuracy
    and otherwise any level. To inspect is to run the machine and to pay for the level of its new condition without an
    error.
    """

    name: str = "maintenance"
    horizon: int = 8
    """Number of periods."""
    states: int = 5
    """Number of conditions, from new to failed, at least 2."""
    hidden: bool = False
    """Hide the condition, and add the action inspect."""
    observations: int | None = None
    """Number of levels of the signals, with hidden. [default: 2]"""

    def check(self) -> None:
        validate.count(self.states, "states", 2)
        if self.observations is not None:
            if not self.hidden:
                raise ValueError(f"observations must be left out unless hidden is given; got {self.observations}")
            validate.count(self.observations, "observations")

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.states, len(self.names["actions"]), (self.observations or 2) if self.hidden else 0)

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        worn = tuple(f"worn-{grade}" for grade in range(1, self.states - 1)) if self.states > 3 else ("worn",)[: self.states - 2]
        seen = {"states": ("new", *worn, "failed"), "actions": ("run", "replace")}
        if not self.hidden:
            return seen
        signals = tuple(f"signal-{level}" for level in range(1, (self.observations or 2) + 1))
        return seen | {"actions": ("run", "inspect", "replace"), "observations": signals}

    def tables(self, rng: np.random.Generator) -> Sequence[Tables]:
        S, A, O, _ = self.sizes
        (wear, twice, price), last = LAWS[self.split], self.states - 1
        P, r = np.zeros((S, A, S)), np.zeros((S, A))
        worn, share = np.sort(rng.uniform(*wear, last)), rng.uniform(*twice)
        for s in range(last):
            P[s, 0, s] = 1 - worn[s]
            P[s, 0, s + 1] = worn[s] * (1 - share)
            P[s, 0, min(s + 2, last)] += worn[s] * share
        P[last, 0, last] = 1
        profits = np.sort(rng.uniform(0.1, 1.0, max(last - 1, 0)))[::-1]
        r[:, 0] = rounded([1.0, *profits, -rng.uniform(0.0, 0.5)])
        P[:, -1, 0] = 1
        r[:, -1] = -rounded(rng.uniform(*price))
        rho = np.arange(S, 0, -1) / (S * (S + 1) / 2)
        if not self.hidden:
            return [Tables(P=P, r=r, rho=rho)]
        P[:, 1] = P[:, 0]
        r[:, 1] = np.round(r[:, 0] - rounded(rng.uniform(0.05, 0.1)), 10)
        signal = levels(S, O, rng.uniform(*ACCURACY[self.split]))
        return [Tables(P=P, r=r, rho=rho, O=np.stack([signal, levels(S, O, 1.0), signal]))]
