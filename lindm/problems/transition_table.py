"""MDPs from the tables of Gymnasium's toy-text environments (FrozenLake, Taxi, CliffWalking), or any table of that form.

A table P[s][a] lists (probability, next state, reward, terminated). An episode ends with a transition that is terminated, and
nothing is earned afterward: its next state absorbs and pays nothing. Where an episode can also come to that state without an end
(the table may go on there), the transition leads to an absorbing state of its own instead, the last one. An action that a state
does not list is not legal there.

Transitions of a state and an action into one state that pay differently pay their mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from scipy import sparse

from lindm import validate
from lindm.problems.stationary import StationaryPOMDP, stationary_mdp

Table = Mapping[int, Mapping[int, Sequence[tuple[float, int, float, bool]]]]


def read_table(table: Table, start: ArrayLike, discount: float) -> StationaryPOMDP:
    """The MDP of a table.

    Args:
      table: for each state and action the transitions.
      start: law [S] of the first state, or the number of one.
      discount: in [0, 1].

    Raises:
      ValueError: names the entry of the table, or the argument, the rule and what was got.
    """
    S, A = len(table), len(set().union(*table.values()))
    rows = _transitions(table, S, A)
    legal = np.array([[action in table[state] for action in range(A)] for state in range(S)])
    rho = np.asarray(validate.finite(start, "start"), float)
    if rho.ndim == 0:
        if not (rho == int(rho) and 0 <= rho < S):
            raise ValueError(f"start must be a state from 0 to {S - 1}, or a law of {S} states; got {start}")
        rho = np.eye(S)[int(rho)]
    if rho.shape != (S,):
        raise ValueError(f"start must be a law of the {S} states; got shape {rho.shape}")
    s, a, probability, after, reward, ended = rows.T
    s, a, after, ended = s.astype(int), a.astype(int), after.astype(int), ended > 0
    r = np.zeros((S, A))
    np.add.at(r, (s, a), probability * reward)
    ends = np.unique(after[ended & (probability > 0)])
    apart = bool(np.isin(ends, _reachable(rho, s[~ended], after[~ended], probability[~ended], S)).any())
    if apart:
        after[ended], ends, S = S, np.array([S]), S + 1
        r, rho, legal = np.vstack([r, np.zeros(A)]), np.append(rho, 0.0), np.vstack([legal, np.ones(A, bool)])
    legal[ends] = True
    kernels, paid = [], []
    for action in range(A):
        rows_of = (a == action) & ~np.isin(s, ends)
        entries = (probability[rows_of], (s[rows_of], after[rows_of]))
        kept = np.union1d(ends, np.flatnonzero(~legal[:, action]))  # an action that is not legal is never taken
        stays = sparse.coo_array((np.ones(len(kept)), (kept, kept)), shape=(S, S))
        kernels.append(sparse.csr_array(sparse.coo_array(entries, shape=(S, S)) + stays))
        cells, values, _ = _mean_rewards(s[rows_of] * S + after[rows_of], reward[rows_of], probability[rows_of])
        paid.append(sparse.csr_array(sparse.coo_array((values, np.divmod(cells, S)), shape=(S, S))))
    r[ends] = 0.0
    problem = stationary_mdp(kernels, r, rho, discount, None if legal.all() else legal)
    goes_on = ~np.isin(s, ends)
    *_, same = _mean_rewards((s * A + a)[goes_on], reward[goes_on], probability[goes_on])
    return problem if same.all() else replace(problem, rewards=tuple(paid))


def _mean_rewards(cells: np.ndarray, reward: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, ...]:
    """The cells that are possible, the mean reward of each, and whether it is always the same (then it is exact)."""
    possible = probability > 0
    cells, at = np.unique(cells[possible], return_inverse=True)
    reward, probability = reward[possible], probability[possible]
    low, high = np.full(len(cells), np.inf), np.full(len(cells), -np.inf)
    np.minimum.at(low, at, reward)
    np.maximum.at(high, at, reward)
    mean = np.bincount(at, probability * reward, len(cells)) / np.bincount(at, probability, len(cells))
    return cells, np.where(low == high, low, mean), low == high


def _transitions(table: Table, S: int, A: int) -> np.ndarray:
    """(s, a, probability, next state, reward, terminated) of every transition [n, 6]."""
    rows: list[tuple[float, ...]] = []
    if not S or not A or sorted(table) != list(range(S)):
        raise ValueError(f"P must be a table with the states 0 to S - 1, each with actions; got {S} states")
    for s in range(S):
        if not table[s] or not set(table[s]) <= set(range(A)):
            raise ValueError(f"P[{s}] must have some of the actions 0 to {A - 1}; got {list(table[s])}")
        for a in sorted(table[s]):
            for entry in table[s][a]:
                if len(entry) != 4 or not 0 <= int(entry[1]) < S:
                    rule = f"(probability, next state from 0 to {S - 1}, reward, terminated)"
                    raise ValueError(f"P[{s}][{a}] must list {rule}; got {tuple(entry)}")
                rows.append((s, a, *map(float, entry)))
            total = sum(entry[0] for entry in table[s][a])
            if not abs(total - 1) <= validate.SUM_TOLERANCE:
                raise ValueError(f"the probabilities of P[{s}][{a}] must sum to one; they sum to {total:.6g}")
    return np.array(rows)


def _reachable(rho: np.ndarray, s: np.ndarray, after: np.ndarray, probability: np.ndarray, S: int) -> np.ndarray:
    """The states to which an episode can come without an end."""
    step = sparse.csr_array((np.asarray(probability > 0, float), (s, after)), shape=(S, S))
    reached, last = rho > 0, np.zeros(S, bool)
    while (reached != last).any():
        last, reached = reached, reached | ((reached @ step) > 0)
    return np.flatnonzero(reached)


def find_table(environment: Any) -> tuple[Table, Any, Any]:
    """The table of an environment (or a table itself), its law of the first state and its time limit; None where it has none.

    Raises:
      ValueError: it has no table.
    """
    if isinstance(environment, Mapping):
        return environment, None, None
    inner = getattr(environment, "unwrapped", environment)
    table = getattr(inner, "P", None)
    if not isinstance(table, Mapping):
        has = "a table P, as FrozenLake, Taxi and CliffWalking have"
        raise ValueError(f"environment must be an id of Gymnasium, or have {has}; got {type(inner).__name__}")
    limit = getattr(getattr(environment, "spec", None), "max_episode_steps", None)
    return table, getattr(inner, "initial_state_distrib", None), limit
