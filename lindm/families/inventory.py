"""Control of the stock of one product, whose orders take time to arrive."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, factorial

import numpy as np

from lindm import validate
from lindm.families.suites import Sizes, Tables, TabularSuite, rounded

# split -> ranges of: mean demand as a share of the capacity, price of a unit, fixed cost of an order
LAWS = {"id": ((0.2, 0.4), (0.2, 0.5), (0.0, 0.0)), "ood": ((0.3, 0.6), (0.3, 0.7), (0.2, 0.6))}
MAX_STATES = 5000


@dataclass(frozen=True, kw_only=True)
class Inventory(TabularSuite):
    """A store orders a product with a lead time; demand is random, and unmet demand is lost.

    Source: K. Arrow, T. Harris, J. Marschak, Econometrica 19, 1951; M. Puterman, Markov Decision Processes, 1994, section
    3.2; for lead times with lost sales P. Zipkin, Operations Research 56, 2008.

    A period: an order is placed, demand comes, sales earn 1 a unit, what is left costs a holding fee a unit, unmet demand
    is lost and costs a penalty a unit. A unit costs its price when it is ordered. With lead time 0 the order is there
    before the demand of its period; with lead time L >= 1 it arrives at the end of the period L - 1 periods later. What
    does not fit is sent away. Demand is Poisson, cut off at the capacity and in round numbers. The state is the stock and
    the L - 1 orders that are on their way, the next to arrive first. Orders cost nothing beside their units on `id`,
    where base-stock policies are optimal for lead time 0, and a fixed cost on `ood` (H. Scarf, 1960: (s, S) policies).
    Episodes begin with any stock and no orders on their way.
    """

    name: str = "inventory"
    horizon: int = 8
    """Number of periods."""
    capacity: int = 5
    """Largest stock."""
    actions: int = 4
    """Number of order sizes, from 0."""
    lead_time: int = 2
    """Periods from an order to its arrival."""

    def check(self) -> None:
        validate.count(self.capacity, "capacity")
        validate.count(self.actions, "actions")
        validate.count(self.lead_time, "lead_time", 0)
        S = (self.capacity + 1) * self.actions ** max(self.lead_time - 1, 0)
        if S > MAX_STATES:
            rule = f"(capacity + 1) * actions^(lead_time - 1), the number of states, must be at most {MAX_STATES}"
            raise ValueError(f"{rule}; got {S:,} of capacity {self.capacity}, actions {self.actions}, lead_time {self.lead_time}")

    @property
    def positions(self) -> list[tuple[int, ...]]:
        """Stock and orders on their way of every state."""
        return list(product(range(self.capacity + 1), *[range(self.actions)] * max(self.lead_time - 1, 0)))

    @property
    def sizes(self) -> Sizes:
        return Sizes(len(self.positions), self.actions)

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        states = tuple("+".join(map(str, state)) for state in self.positions)
        return {"states": states, "actions": tuple(f"order-{units}" for units in range(self.actions))}

    def tables(self, rng: np.random.Generator) -> Sequence[Tables]:
        C, (demand, price, fixed) = self.capacity, LAWS[self.split]
        unit, order = rounded(rng.uniform(*price)), rounded(rng.uniform(*fixed))
        holding, penalty = rounded(rng.uniform(0.05, 0.15)), rounded(rng.uniform(0.0, 0.3))
        mean = C * rng.uniform(*demand)
        below = np.cumsum([exp(-mean) * mean**k / factorial(k) for k in range(C)])
        law = np.diff(rounded([0.0, *below, 1.0]))  # in round numbers, as the rewards
        S, A = self.sizes[:2]
        index = {state: i for i, state in enumerate(self.positions)}
        P, r = np.zeros((S, A, S)), np.zeros((S, A))
        for (stock, *coming), s in index.items():
            for a in range(A):
                arrives, *later = [*coming, a] if self.lead_time else [a]
                offered = stock if self.lead_time else min(stock + a, C)
                for d, p in enumerate(law):
                    left = max(offered - d, 0)
                    r[s, a] += p * (offered - left - holding * left - penalty * max(d - offered, 0))
                    P[s, a, index[(min(left + arrives, C) if self.lead_time else left, *later)]] += p
                r[s, a] -= unit * a + order * (a > 0)
        r = np.round(r, 10)
        rho = np.array([float(not any(coming)) for _, *coming in self.positions])
        return [Tables(P=P, r=r, rho=rho / rho.sum())]
