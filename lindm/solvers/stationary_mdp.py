r"""Stationary MDPs with sparse kernels: value and policy iteration without an end, backward induction over a finite horizon.

One backup of any vector V bounds the discounted optimal value at every state (MacQueen, J. Math. Anal. Appl. 14, 1966). With
Q(s, a) = r(s, a) + gamma sum_{s'} P(s' | s, a) V(s'), a policy a(s), c = gamma / (1 - gamma) and d_a(s) = Q(s, a(s)) - V(s),

    Q(s, a(s)) + c min d_a  <=  V^a(s)  <=  V*(s)  <=  max_a Q(s, a) + c max_s (max_a Q(s, a) - V(s)),

so the greedy policy earns the lower bound, however V was found. The bounds are widened by the rounding of the backup. Their width
is c times the span of what the backup changes; it shrinks at least by the factor gamma with each backup.

Value iteration backs V up until the bounds are close. Policy iteration (Howard, 1960) replaces V by the value of its greedy
policy: from linear equations up to `DENSE` states, and otherwise by backups under the policy alone (Puterman and Shin, Management
Science 24, 1978), until their bounds are a small share of those that are open.

The work of a backup and the memory grow with the nonzeros of the kernel. Everything is on the host.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from scipy import sparse

from lindm.errors import DataError, unknown
from lindm.io.files import make_parent, read_json, write_json
from lindm.io.provenance import provenance
from lindm.problems.identity import problem_digests
from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.ties import greedy, tie_tolerance

Method = Literal["auto", "value-iteration", "policy-iteration"]
METHODS = get_args(Method)
FORMAT = "lindm-mdp-policy-1"
DENSE = 1000  # states up to which policies are evaluated by linear equations
EVALUATION = 0.1  # share of the open bounds to which policies of more states are evaluated
SWEEPS = 500  # the most backups of one evaluation

Progress = Callable[[int, float, float], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class MDPSolution:
    """A solved stationary MDP: bounds of its value at every state, and a policy that earns the lower ones.

    >>> solution = ld.solve_stationary(ld.read_stationary_pomdp("forest.pomdp"))
    >>> round(solution.lower, 3), solution.first_action, solution.act("middle")
    (26.244, 'wait', 'wait')
    """

    problem: StationaryPOMDP
    horizon: float  # stages, or inf
    method: str  # value-iteration, policy-iteration, or backward induction
    iterations: int  # backups of value iteration, or policies
    lower_values: np.ndarray  # [S] certified lower bounds of the value, which the policy earns
    upper_values: np.ndarray  # [S] certified upper bounds
    policy: np.ndarray  # [1, S] int32 actions, or [H, S] over a finite horizon

    @property
    def lower(self) -> float:
        """Certified lower bound of the value at the start: the policy earns it."""
        return float(self.problem.rho @ self.lower_values)

    @property
    def upper(self) -> float:
        """Certified upper bound of the value at the start."""
        return float(self.problem.rho @ self.upper_values)

    @property
    def first_actions(self) -> dict[int | str, int | str]:
        """The first action in each state in which the problem can begin."""
        states, actions = self.problem.states, self.problem.actions
        possible = np.flatnonzero(self.problem.rho).tolist()
        taken = self.policy[0].tolist()
        return {states[s] if states else s: actions[taken[s]] if actions else taken[s] for s in possible}

    @property
    def first_action(self) -> int | str:
        """The first action where it is the same in every first state. ValueError where it is not."""
        if len(actions := set(self.first_actions.values())) > 1:
            raise ValueError("problem must have one first action: `first_actions` has them by state")
        return actions.pop()

    @property
    def regret(self) -> float:
        """Upper bound of what a first action loses against the best one, over the first states; 0 where certified to be best."""
        problem, rows = self.problem, np.flatnonzero(self.problem.rho)
        if self.horizon < math.inf:
            return 0.0
        low, high = (back_up(problem, V)[rows] for V in (self.lower_values, self.upper_values))
        taken = self.policy[0][rows]
        kept = np.take_along_axis(low, taken[:, None], 1)[:, 0]
        np.put_along_axis(high, taken[:, None], -np.inf, 1)
        return float(np.maximum(high.max(1, initial=-np.inf) - kept, 0).max())

    def act(self, state: int | str, stage: int = 0) -> int | str:
        """The policy's action in a state, given and returned by name where the problem has names. ValueError: no such state."""
        names = self.problem.states
        if isinstance(state, str) and state not in names:
            raise ValueError(unknown("state", state, names))
        s = names.index(state) if isinstance(state, str) else state
        if not 0 <= s < self.problem.num_states:
            raise ValueError(f"state must be from 0 to {self.problem.num_states - 1}; got {state}")
        a = int(self.policy[min(stage, len(self.policy) - 1), s])
        return self.problem.actions[a] if self.problem.actions else a

    def save(self, path: str | Path) -> None:
        """Write the policy and the bounds of the value by state as JSON, which `load_mdp_policy` reads.

        Raises:
          ValueError: the name does not end in .json.
          StorageError: the file cannot be written.

        >>> ld.solve_stationary(ld.read_stationary_pomdp("forest.pomdp")).save("forest.json")
        """
        if Path(path).suffix != ".json":
            raise ValueError(f"the path of a saved policy of an MDP must end in .json; got {str(path)!r}")
        finite = self.horizon < math.inf
        content: dict[str, Any] = {
            "horizon": int(self.horizon) if finite else None,
            "discount": self.problem.discount,
            "method": self.method,
            "value": {"lower": self.lower, "upper": self.upper},
            "states": list(self.problem.states) or self.problem.num_states,
            "actions": list(self.problem.actions) or self.problem.num_actions,
            "policy": self.policy.tolist() if finite else self.policy[0].tolist(),
            "lower": self.lower_values.tolist(),
            "upper": self.upper_values.tolist(),
            "problem": problem_digests(self.problem),
            "provenance": provenance(),
        }
        make_parent(Path(path))
        write_json(Path(path), content, FORMAT)


def load_policy(path: str | Path) -> dict[str, Any]:
    """What `MDPSolution.save` wrote: names (or their numbers), the policy, and bounds of the value by state.

    Raises:
      DataError: the file is missing, damaged, or another one.
    """
    content = read_json(Path(path), FORMAT)
    missing = [name for name in ("horizon", "states", "actions", "policy", "lower", "upper") if name not in content]
    if missing:
        raise DataError(f"{path}: {missing[0]!r} is missing: expected a policy of `lindm solve --save`")
    return content


def back_up(problem: StationaryPOMDP, V: np.ndarray) -> np.ndarray:
    """Q [S, A] = r + gamma P V; -inf where an action is not legal."""
    Q = problem.r + problem.discount * np.stack([P @ V for P in problem.P], axis=1)
    return Q if problem.legal is None else np.where(problem.legal, Q, -np.inf)


def solve(
    problem: StationaryPOMDP,
    horizon: float = math.inf,
    *,
    method: Method = "auto",
    tolerance: float = 0.0,
    relative: float = 0.0,
    timeout: float = math.inf,
    on_iteration: Progress = lambda iterations, lower, upper: None,
) -> MDPSolution:
    """Iterate until the bounds at the start meet, or until the time is over.

    Args:
      horizon: number of stages, which are solved exactly by backward induction, or inf.
      method: of an infinite horizon; auto is policy iteration.
      tolerance: width of the bounds at which it ends.
      relative: the same, as a fraction of the larger bound's magnitude.
      timeout: seconds after which it ends with the bounds that it has.
      on_iteration: called with the number of iterations and the bounds at the start.

    Raises:
      ValueError: an unknown method, a method for a finite horizon, or an infinite horizon without a discount.
    """
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    if horizon < math.inf:
        if method != "auto":
            raise ValueError(f"method must be auto over a finite horizon of an MDP; got {method!r}")
        return _backward_induction(problem, int(horizon))
    if not problem.discount < 1:
        raise ValueError(f"discount must be below 1 where the horizon is infinite; got {problem.discount:g}")
    deadline = time.monotonic() + timeout
    evaluate = None if method == "value-iteration" else _Evaluation(problem, deadline)
    rounding = _Rounding(problem)
    V, policy, iterations = back_up(problem, np.zeros(problem.num_states)).max(1), None, 0
    while True:
        Q = back_up(problem, V)
        chosen = greedy(Q)
        if policy is not None:  # among ties the action stays: the policies do not cycle
            best = Q.max(1, keepdims=True)
            stays = np.take_along_axis(Q, policy[:, None], 1) >= best - tie_tolerance(best)
            chosen = np.where(stays[:, 0], policy, chosen).astype(np.int32)
        iterations += 1
        lower, upper, slack = _bounds(problem, V, Q, chosen, rounding)
        low, high = float(problem.rho @ lower), float(problem.rho @ upper)
        on_iteration(iterations, low, high)
        settled = evaluate is not None and evaluate.exact and policy is not None and (chosen == policy).all()
        width = max(tolerance, relative * max(abs(low), abs(high)), 4 * slack)
        if high - low <= width or settled or time.monotonic() >= deadline:
            return MDPSolution(
                problem=problem,
                horizon=math.inf,
                method="value-iteration" if evaluate is None else "policy-iteration",
                iterations=iterations,
                lower_values=lower,
                upper_values=upper,
                policy=chosen[None],
            )
        # a constant added to V changes no bound; the middle of the bounds is the best guess
        V = Q.max(1) if evaluate is None else evaluate(chosen, (lower + upper) / 2, EVALUATION * (high - low))
        policy = None if evaluate is None else chosen


class _Rounding:
    """What the rounding of a backup, and rows that do not sum to one exactly, can change in a bound."""

    def __init__(self, problem: StationaryPOMDP):
        entries = max(int(np.diff(P.indptr).max(initial=0)) for P in problem.P)
        error = max(float(np.abs(P.sum(1) - 1).max()) for P in problem.P)
        self.relative = ((entries + 4) * np.finfo(float).eps + error) / (1 - problem.discount)
        self.rewards = float(np.abs(problem.r).max())

    def __call__(self, V: np.ndarray) -> float:
        return self.relative * (self.rewards + float(np.abs(V).max()))


def _bounds(
    problem: StationaryPOMDP, V: np.ndarray, Q: np.ndarray, policy: np.ndarray, rounding: _Rounding
) -> tuple[np.ndarray, np.ndarray, float]:
    """Bounds of the value [S] from one backup Q of V, and what rounding adds to them."""
    kept, best = np.take_along_axis(Q, policy[:, None], 1)[:, 0], Q.max(1)
    c, slack = problem.discount / (1 - problem.discount), rounding(V)
    return kept + c * (kept - V).min() - slack, best + c * (best - V).max() + slack, slack


class _Evaluation:
    """The values of stationary policies."""

    def __init__(self, problem: StationaryPOMDP, deadline: float):
        self.problem, self.deadline = problem, deadline
        self.exact = problem.num_states <= DENSE
        self.kernel = sparse.csr_array(sparse.vstack(problem.P))  # [A S, S]

    def __call__(self, policy: np.ndarray, V: np.ndarray, width: float) -> np.ndarray:
        """The value [S] of a policy, from a guess V; above `DENSE` states with bounds of that width."""
        states, gamma = np.arange(len(policy)), self.problem.discount
        P, r = self.kernel[policy * len(policy) + states], self.problem.r[states, policy]
        if self.exact:
            return np.linalg.solve(np.eye(len(policy)) - gamma * P.toarray(), r)
        for _ in range(SWEEPS):
            V, last = r + gamma * (P @ V), V
            change = V - last
            if gamma / (1 - gamma) * np.ptp(change) <= width or time.monotonic() >= self.deadline:
                break
        return V + gamma / (1 - gamma) * (change.min() + change.max()) / 2


def _backward_induction(problem: StationaryPOMDP, horizon: int) -> MDPSolution:
    V = np.zeros(problem.num_states)
    policy = np.empty((horizon, len(V)), np.int32)
    for h in reversed(range(horizon)):
        Q = back_up(problem, V)
        policy[h], V = greedy(Q), Q.max(1)
    return MDPSolution(
        problem=problem,
        horizon=horizon,
        method="backward induction",
        iterations=horizon,
        lower_values=V,
        upper_values=V,
        policy=policy,
    )
