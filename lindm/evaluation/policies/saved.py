"""Policies that `lindm solve --save` wrote as JSON: the graph of a POMDP's policy, and an MDP's action for each state."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lindm.errors import DataError
from lindm.evaluation.environments import PolicyTask
from lindm.evaluation.history import ProblemInfo
from lindm.evaluation.policy import Observation, Policy, one_hot
from lindm.io import files
from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers import stationary_mdp, stationary_solution
from lindm.solvers.alpha_values import action_bounds, beliefs_after
from lindm.solvers.legal_supports import ILLEGAL

GraphState = tuple[np.ndarray, np.ndarray | None]
"""Of n histories: nodes [n], and beliefs [n, S] where the problem is known."""


class GraphPolicy(Policy):
    """A policy graph, followed from its first node; the state is the nodes at the histories, and the beliefs where known.

    After an action that is not the node's own, no edge leads on. Where the problem is known, the graph then goes on at the node
    whose values are best at the belief; over a finite horizon, of the nodes of the next stage.

    Args:
      problem: sizes, names and horizon of the problem, and the problem itself where it is known.
      actions: [n] of each node.
      successors: [n, O] the next node after each observation; -1 at the last stage.
      values: [n, S] of each node, which it earns in each state.
      stages: [n] the stage of each node; -1 where the nodes serve every stage.
      digests: of the problem that the graph was made for (`lindm.problems.identity`); empty where the file has none.
    """

    def __init__(
        self,
        problem: ProblemInfo,
        actions: np.ndarray,
        successors: np.ndarray,
        values: np.ndarray,
        stages: np.ndarray,
        digests: Mapping[str, str],
    ):
        self.problem, self.actions, self.successors, self.values = problem, actions, successors, values
        self.stages, self.digests = stages, digests

    @property
    def known(self) -> StationaryPOMDP | None:
        """The problem where it is known."""
        return self.problem.problem if isinstance(self.problem.problem, StationaryPOMDP) else None

    def init(self, tasks: Sequence[PolicyTask]) -> GraphState:
        return np.zeros(1, int), None if self.known is None else self.known.rho[None]

    def step(self, state: GraphState, observation: Observation) -> tuple[GraphState, np.ndarray]:
        """Raises: ValueError after an action that the graph does not take, where the problem is not known."""
        nodes, beliefs = (None if part is None else part[observation.parent] for part in state)
        assert nodes is not None
        if observation.stage:
            assert observation.action is not None and observation.observation is not None
            if beliefs is not None and self.known is not None:
                beliefs = beliefs_after(self.known, beliefs, observation.action, observation.observation)
            left = observation.action != self.actions[nodes]
            following = self.successors[nodes, observation.observation]
            for row in np.flatnonzero(left | (following < 0)):
                following[row] = self._entered(observation.stage, nodes[row], int(observation.action[row]), beliefs, int(row))
            nodes = following
        return (nodes, beliefs), one_hot(self.actions[nodes], self.problem.sizes["actions"])

    def q_bounds(self, state: GraphState, observation: Observation) -> tuple[np.ndarray, None] | None:
        """Lower bounds [n, A] of the optimal action values: one step of lookahead, then the nodes; None without a problem."""
        if self.known is None or state[1] is None or not self.digests or self._ends_without_stages():
            return None
        nodes = self._nodes_of(observation.stage + 1)
        values = self.values[nodes] if len(nodes) else np.zeros((1, self.values.shape[1]))
        return action_bounds(self.known, state[1], values), None

    def _ends_without_stages(self) -> bool:
        """Whether the nodes serve every stage of a finite horizon: their values are those of the whole horizon alone."""
        return bool(self.stages[0] < 0) and not math.isinf(self.problem.horizon)

    def _nodes_of(self, stage: int) -> np.ndarray:
        return np.flatnonzero((self.stages < 0) | (self.stages == stage))

    def _entered(self, stage: int, node: int, action: int, beliefs: np.ndarray | None, row: int) -> int:
        """The node at which a history goes on that has left the graph."""
        words, own = self.problem.words("actions"), int(self.actions[node])
        if stage >= self.problem.horizon:
            raise ValueError(f"a policy graph of {self.problem.horizon} stages makes no decision after {stage} steps")
        if beliefs is None:
            rule = f"a policy graph goes on after its own action alone, {words[own]!r}; got {words[action]!r}"
            raise ValueError(f"history: step {stage}: {rule}: with the PROBLEM it goes on at the node that is best at the belief")
        nodes = self._nodes_of(stage)
        return int(nodes[(self.values[nodes] @ beliefs[row]).argmax()])


class StateActions(Policy):
    """An action for each state of an MDP.

    Args:
      problem: sizes, names and horizon of the problem.
      table: [1, S] for every stage, or [H, S].
      digests: of the problem that the actions were computed for; empty where the file has none.
    """

    markov = True

    def __init__(self, problem: ProblemInfo, table: np.ndarray, digests: Mapping[str, str]):
        self.problem, self.table, self.digests = problem, table, digests

    def init(self, tasks: Sequence[PolicyTask]) -> None:
        return None

    def step(self, state: None, observation: Observation) -> tuple[None, np.ndarray]:
        rows = self.table[min(observation.stage, len(self.table) - 1)]
        return None, one_hot(rows[observation.state], self.problem.sizes["actions"])


def read_policy(path: Path) -> GraphPolicy | StateActions:
    """The policy of a file .json. DataError where it is damaged or none that `lindm solve --save` wrote."""
    content = files.read_json(path)
    try:
        if content.get("format") == stationary_mdp.FORMAT:
            return _state_actions(stationary_mdp.load_policy(path))
        return _graph(files.read_json(path, stationary_solution.FORMAT))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise DataError(f"{path}: not a policy of `lindm solve --save`: {type(e).__name__}: {e}") from e


def _info(content: dict[str, Any], kind: Any, parts: Sequence[str]) -> ProblemInfo:
    """Sizes and names; a part without names has its number in their place."""
    named = {part: content[part] for part in parts if isinstance(content[part], list)}
    sizes = {part: len(named[part]) if part in named else int(content[part]) for part in parts}
    horizon = math.inf if content["horizon"] is None else int(content["horizon"])
    names = {part: [str(word) for word in words] for part, words in named.items()}
    return ProblemInfo(kind=kind, horizon=horizon, sizes=sizes, names=names)


def _graph(content: dict[str, Any]) -> GraphPolicy:
    info, nodes = _info(content, "pomdp", ("states", "actions", "observations")), content["nodes"]
    actions = np.array([info.words("actions").index(str(node["action"])) for node in nodes])
    successors = np.array([[int(node["next"].get(o, -1)) for o in info.words("observations")] for node in nodes])
    if not nodes or successors.max() >= len(nodes):
        raise ValueError(f"it has {len(nodes)} nodes, and an edge to node {successors.max() if nodes else 0}")
    values = np.array([[ILLEGAL if x is None else float(x) for x in node["values"]] for node in nodes])
    stages = np.array([int(node.get("stage", -1)) for node in nodes])
    if values.shape != (len(nodes), info.sizes["states"]) or not np.isfinite(values).all():
        raise ValueError(f"the values of each node must be {info.sizes['states']} finite numbers, one for each state")
    return GraphPolicy(info, actions, successors, values, stages, _digests(content))


def _state_actions(content: dict[str, Any]) -> StateActions:
    info = _info(content, "mdp", ("states", "actions"))
    table = np.atleast_2d(np.array(content["policy"], int))
    stages = 1 if math.isinf(info.horizon) else info.horizon
    if table.shape != (stages, info.sizes["states"]) or not ((table >= 0) & (table < info.sizes["actions"])).all():
        raise ValueError(f"policy must have an action for each of {stages} stages and {info.sizes['states']} states")
    return StateActions(info, table, _digests(content))


def _digests(content: dict[str, Any]) -> dict[str, str]:
    return {str(part): str(digest) for part, digest in content.get("problem", {}).items()}
