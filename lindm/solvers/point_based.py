r"""Certified bounds for large stationary POMDPs, over a finite or an infinite horizon, by search along sampled optimal play.

V_n(u), the optimal value with n stages to go, is convex and, written for unnormalized beliefs u, positively homogeneous, so no
bound divides by the probability of an observation:

    V_n(u) = max_a { u . r_a + gamma sum_o V_{n-1}(u K_{a,o}) },    K_{a,o}(s, s') = P_a(s, s') O_a(s', o),    V_0 = 0.

Rewards are shifted by a constant to be >= 0, and the values are shifted back at the end. Then V_n only grows with n, and stages
share what is found at any of them: a lower bound that holds with n stages to go holds with more, an upper bound with fewer. An
infinite horizon (gamma < 1) is the case n = infinity, where everything is shared.

Lower bound: max over alpha vectors. Each is the value of a policy: take its action, then follow the vector that its successors
name for the observation. A vector is never changed, so whoever follows it earns exactly what it promises. The first ones are the
policies "always a".

Upper bound: the fast informed bound at the corners of the simplex, and the sawtooth of Hauskrecht (JAIR 13, 2000) at the beliefs
that were visited:

    V(u) <= u . C - max_i ratio_i [p_i . C - v_i]^+,      ratio_i = min_{s: p_i(s) > 0} u(s) / p_i(s).

A trial (heuristic search value iteration: Smith and Simmons, UAI 2004 and 2005) descends from the start by the action with the
best upper bound and the observation whose gap, weighted by its probability, is widest, as long as that gap is above its share of
the gap at the start; then it backs up its beliefs from the last to the first. The beliefs are those that optimal play reaches, as
in SARSOP (Kurniawati, Hsu and Lee, RSS 2008). Vectors that are best at no visited belief are put aside: they stay only as long as
a vector in use names them. Between the trials, random visited beliefs are backed up until the lower bound has risen at all of
them (Perseus: Spaan and Vlassis, JAIR 24, 2005).

A finite horizon H whose tail gamma^H max r / (1 - gamma) is small beside the tolerance is searched as an infinite one: with
rewards >= 0 a policy earns at most as much in H stages as without an end, and at most the tail less.

Where a state does not allow every action, the bounds are those of a reward of -inf (`lindm.solvers.legal_supports`), a trial
takes actions that are viable without an end, and a policy that takes them by the set of possible states comes before the search
(`lindm.solvers.point_actions`).

Models are sparse and stay on the host: the work at a belief grows with the states that it reaches, not with S.
"""

import math
import time
from collections.abc import Callable

import numpy as np

from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.point_bounds import EPSILON
from lindm.solvers.point_search import Search
from lindm.solvers.stationary_solution import StationarySolution


def solve(
    problem: StationaryPOMDP,
    horizon: float = math.inf,
    *,
    tolerance: float = 0.0,
    relative: float = 0.0,
    timeout: float = math.inf,
    trials: float = math.inf,
    on_trial: Callable[[int, float, float], None] = lambda trials, lower, upper: None,
) -> StationarySolution:
    """Search until the bounds at the start meet, or until it has to end.

    Args:
      horizon: number of stages, or inf.
      tolerance: width of the bounds at which the search ends.
      relative: the same, as a fraction of the larger bound's magnitude.
      timeout: seconds after which it ends.
      trials: number after which it ends.
      on_trial: called with the number of trials and the bounds, before the first trial and after every one.

    Raises:
      ValueError: an infinite horizon has no discount; or of `point_actions.LegalActions`.
    """
    search = Search(problem, horizon, timeout, accuracy(problem, horizon, tolerance, relative))
    search.run(tolerance, relative, trials, on_trial)
    return search.solution()


def bounds_at(
    problem: StationaryPOMDP,
    beliefs: np.ndarray,
    horizon: float = math.inf,
    *,
    tolerance: float = 0.0,
    relative: float = 0.0,
    timeout: float = math.inf,
    on_belief: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the action values at several first beliefs, by one search that has each of them as its start in turn.

    Args:
      beliefs: [n, S].
      tolerance, relative: as of `solve`, at each belief.
      timeout: seconds in all.
      on_belief: called with the number of beliefs that are done, and of all.

    Returns:
      Lower and upper bounds [n, A].
    """
    search = Search(problem, horizon, timeout, accuracy(problem, horizon, tolerance, relative), beliefs)
    end = search.deadline
    starts = []
    for i, belief in enumerate(beliefs):
        states = np.flatnonzero(belief)
        search.start = search.belief(states, belief[states])
        starts.append(search.start)
        search.deadline = time.monotonic() + (end - time.monotonic()) / (len(beliefs) - i)
        search.run(tolerance, relative)
        on_belief(i + 1, len(beliefs))
    bounds = []
    for search.start in starts:
        bounds.append(search.q_bounds())
    lower, upper = np.array(bounds).swapaxes(0, 1)
    return lower, upper


def accuracy(problem: StationaryPOMDP, horizon: float, tolerance: float, relative: float) -> float:
    """The accuracy that tolerances ask for. ValueError: an infinite horizon has no discount."""
    if horizon == math.inf and problem.discount == 1:
        raise ValueError("discount must be below 1 where the horizon is infinite; got 1")
    size = float(np.abs(problem.r).max())
    return max(tolerance, relative * size, EPSILON * size)
