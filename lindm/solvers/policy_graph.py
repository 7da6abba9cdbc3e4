r"""Policies as graphs (finite-state controllers: Hansen, UAI 1998): a node takes an action, an observation leads to the next one.

A policy of alpha vectors becomes a graph by following it from the start: the node of a belief is the vector that is best there,
and its successors are those of the beliefs that can follow the first belief of the node. A node that was met before is taken
again where it is nearly best; the smallest graph that loses next to nothing is kept. The value of a graph is exact: it solves

    v_n = r_{a_n} + gamma sum_o P_{a_n} diag(O_{a_n}(., o)) v_{next(n, o)},

linear equations without an end, a recursion over the stages of a finite horizon.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lindm.problems.identity import problem_digests
from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.legal_supports import LIMIT, penalized, saturated

if TYPE_CHECKING:
    from lindm.solvers.stationary_solution import StationarySolution

SLACKS = (0.1, 0.03, 0.01, 1e-3, 1e-4, 0.0)  # how far from best a node may be to be taken again, in spans of the vectors
SHARE = 0.1  # of the width of the bounds that a graph may lose
PRECISION = 1e-12  # of the values of a graph, relative to the largest reward's value
MAX_NODES = 2000
MAX_BACKUPS = 20_000
MAX_WORK = 5e9  # products of numbers that following vectors of unknown origin may take: some seconds


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyGraph:
    """A policy as a graph; execution begins at node 0.

    >>> graph = ld.solve_stationary(ld.read_stationary_pomdp("tiger.pomdp"), tolerance=1e-6).graph()
    >>> len(graph.actions), round(graph.value, 4)
    (5, 19.3714)
    """

    problem: StationaryPOMDP
    horizon: float  # stages, or inf
    actions: np.ndarray  # [n] of each node
    successors: np.ndarray  # [n, O] the next node after each observation; -1 at the last stage
    expected: np.ndarray  # [n, O] bool: observations that are possible at the first belief that led to the node
    stages: np.ndarray  # [n] the stage of each node; -1 where the graph is the same at every stage
    # [n, S] value of a node, in every state; over a finite horizon from its stage on, discounted to it; -1e300 in states from
    # which it leads to an action that is not legal
    values: np.ndarray
    value: float  # at the start

    @property
    def is_stationary(self) -> bool:
        """Whether the nodes serve every stage."""
        return bool(self.stages[0] < 0)

    def rules(self) -> list[str]:
        """The graph in words, a line for each node.

        >>> ld.solve_stationary(ld.read_stationary_pomdp("tiger.pomdp"), horizon=2, tolerance=1e-9).graph().rules()
        ['1 (start, stage 1): listen; after hear-left or hear-right go to 2', '2 (stage 2): listen']
        """
        return list(_rules(self))

    def describe(self) -> dict[str, Any]:
        """The graph as JSON values, with names where there are names."""
        problem = self.problem
        actions = problem.actions or tuple(range(problem.num_actions))
        observations = problem.observations or tuple(map(str, range(problem.num_observations)))
        nodes = [
            {
                "action": actions[a],
                "next": {observations[o]: int(to) for o, to in enumerate(row) if to >= 0},
                "values": [value if value > LIMIT else None for value in values.tolist()],
            }
            | ({} if stage < 0 else {"stage": int(stage)})
            for a, row, values, stage in zip(self.actions, self.successors, self.values, self.stages, strict=True)
        ]
        return {
            "horizon": None if self.horizon == math.inf else int(self.horizon),
            "discount": problem.discount,
            "value": self.value,
            "states": list(problem.states) or problem.num_states,
            "actions": list(actions),
            "observations": list(observations),
            "nodes": nodes,
            "rules": self.rules(),
            "problem": problem_digests(problem),
        }


def policy_graph(solution: "StationarySolution") -> PolicyGraph:
    """The graph of a solution's policy. ValueError: it has more than `MAX_NODES` nodes."""
    graph = None
    for slack in SLACKS:
        graph = _follow(
            solution.problem,
            solution.actions,
            solution.vectors,
            promises=solution.promises,
            horizon=solution.horizon,
            staged=not solution.is_stationary,
            slack=slack * float(np.ptp(solution.vectors[solution.vectors > LIMIT])),
            max_nodes=MAX_NODES,
        )
        if graph and graph.value >= solution.lower - SHARE * (solution.upper - solution.lower) - 1e-9 * abs(solution.lower):
            return graph
    if graph is None:
        raise ValueError(f"a policy graph must have at most {MAX_NODES} nodes; this policy needs more: save its alpha vectors")
    return graph


def earned_graph(problem: StationaryPOMDP, actions: np.ndarray, vectors: np.ndarray) -> PolicyGraph | None:
    """The graph of alpha vectors of any origin, without an end: its values are what they earn in this problem, not what they say.

    Args:
      actions, vectors: [n] the action of each vector [n, S].

    Returns: None where it has too many nodes, or where it would take long.
    """
    work = vectors.size * max(problem.num_observations, 1)
    return _follow(
        problem,
        actions,
        vectors,
        promises=lambda belief, stages: np.where(problem.legal_at(belief[None])[0, actions], vectors @ belief, -np.inf),
        horizon=math.inf,
        staged=False,
        slack=0.0,
        max_nodes=min(MAX_NODES, int(MAX_WORK / work)),
    )


def _follow(
    problem: StationaryPOMDP,
    actions_of: np.ndarray,
    vectors: np.ndarray,
    *,
    promises: Callable[[np.ndarray, float], np.ndarray],
    horizon: float,
    staged: bool,
    slack: float,
    max_nodes: int,
) -> PolicyGraph | None:
    """The graph with a slack in the choice of nodes; None where it has too many.

    Args:
      promises: what each vector is worth at a belief with so many stages to go.
      staged: whether nodes belong to stages.
    """
    nodes: list[tuple[int, int]] = []  # stage (-1: every stage) and vector of each node
    witnesses: list[np.ndarray] = []

    def node(belief: np.ndarray, stage: int) -> int:
        """The node of a belief: one that is there if it is nearly best."""
        promised = promises(belief, horizon - stage if staged else math.inf)
        best = int(promised.argmax())
        key = stage if staged else -1
        known = [(promised[v], n) for n, (h, v) in enumerate(nodes) if h == key and promised[v] >= promised[best] - slack]
        if problem.legal is not None:  # with the same possible states, the same actions are legal after the same observations
            known = [(value, n) for value, n in known if ((witnesses[n] > 0) == (belief > 0)).all()]
        if known:
            return max(known)[1]
        nodes.append((key, best))
        witnesses.append(belief)
        return len(nodes) - 1

    node(problem.rho, 0)
    successors, expected = [], []
    for n in _growing(nodes):
        if len(nodes) > max_nodes:
            return None
        stage, vector = nodes[n]
        a = int(actions_of[vector])
        O = problem.O[a]
        row, seen = np.full(problem.num_observations, -1), np.zeros(problem.num_observations, bool)
        if not staged or stage + 1 < horizon:
            after = problem.P[a].T @ witnesses[n]
            joint = O.multiply(after[:, None]).tocsc()
            mass = np.asarray(joint.sum(0)).ravel()
            seen = mass > 1e-12
            for o in np.flatnonzero(seen):
                row[o] = node(joint[:, [o]].toarray().ravel() / mass[o], stage + 1 if staged else 0)
        successors.append(row)
        expected.append(seen)
    stages = np.array([stage for stage, _ in nodes])
    actions = actions_of[[vector for _, vector in nodes]]
    table = np.array(successors)
    _complete(problem, actions, table, stages, vectors[[vector for _, vector in nodes]])
    values = _values(problem, actions, table, stages, horizon)
    return PolicyGraph(
        problem=problem,
        horizon=horizon,
        actions=actions,
        successors=table,
        expected=np.array(expected),
        stages=stages,
        values=values,
        value=float(values[0] @ problem.rho),
    )


def _growing(items: list) -> Iterator[int]:
    """The indices of a list that grows during the iteration."""
    n = 0
    while n < len(items):
        yield n
        n += 1


def _complete(problem: StationaryPOMDP, actions: np.ndarray, table: np.ndarray, stages: np.ndarray, vectors: np.ndarray) -> None:
    """Successors, in place, after observations that the first belief of a node excludes: by what they say of the state alone."""
    for n, o in np.argwhere(table < 0):
        following = np.flatnonzero(stages == (stages[n] + 1 if stages[n] >= 0 else -1))
        if len(following):
            said = problem.O[int(actions[n])][:, [int(o)]].toarray().ravel()
            table[n, o] = following[(vectors[following] @ said).argmax()]


def _values(problem: StationaryPOMDP, actions: np.ndarray, table: np.ndarray, stages: np.ndarray, horizon: float) -> np.ndarray:
    """v [n, S] of the equations above."""
    rewards, gamma = penalized(problem.r, problem.legal)[:, actions].T, problem.discount
    kept = saturated if problem.legal is not None else lambda values: values
    if stages[0] >= 0:
        values = rewards.copy()
        for stage in range(int(horizon) - 2, -1, -1):
            here = np.flatnonzero(stages == stage)
            values[here] = kept(values[here] + gamma * _next(problem, actions[here], table[here], values))
        return values
    values = rewards / (1 - gamma) if horizon == math.inf else np.zeros_like(rewards)
    enough = PRECISION * float(np.abs(problem.r).max()) + np.finfo(float).tiny
    for _ in range(MAX_BACKUPS if horizon == math.inf else int(horizon)):
        values, last = kept(rewards + gamma * _next(problem, actions, table, values)), values
        if horizon == math.inf and np.abs(values - last).max() <= enough:
            break
    return values


def _next(problem: StationaryPOMDP, actions: np.ndarray, table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """P_a sum_o O_a(., o) v_{next(n, o)} [n, S]."""
    result = np.empty((len(actions), problem.num_states))
    for a in np.unique(actions):
        here = np.flatnonzero(actions == a)
        O = problem.O[a].tocsc()
        following = np.zeros((len(here), problem.num_states))
        for o in range(O.shape[1]):
            rows = O.indices[O.indptr[o] : O.indptr[o + 1]]
            following[:, rows] += values[np.ix_(table[here, o], rows)] * O.data[O.indptr[o] : O.indptr[o + 1]]
        result[here] = (problem.P[a] @ following.T).T
    return result


def _rules(graph: PolicyGraph) -> Iterator[str]:
    actions, observations = graph.problem.actions, graph.problem.observations
    for n, a in enumerate(graph.actions):
        marks = ["start"] * (n == 0) + [f"stage {graph.stages[n] + 1}"] * (not graph.is_stationary)
        groups: dict[int, list[str]] = {}
        for o in np.flatnonzero(graph.expected[n]):
            groups.setdefault(int(graph.successors[n, o]), []).append(observations[o] if observations else f"observation {o}")
        parts = []
        for to, names in groups.items():
            where = "stay" if to == n else f"go to {to + 1}"
            parts.append(f"after {' or '.join(names)} {where}" if len(groups) > 1 or len(names) < 4 else f"then {where}")
        head = f"{n + 1} ({', '.join(marks)})" if marks else f"{n + 1}"
        yield f"{head}: {actions[a] if actions else f'action {a}'}" + "".join(f"; {part}" for part in parts)
