"""Policies that `lindm solve --save` wrote as JSON: the graph of a POMDP's policy, and an MDP's action for each state."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lindm.errors import DataError
from lindm.evaluation.environments import PolicyTask
from lindm.evaluation.history import ProblemInfo
from lindm.evaluation.policy import Observation, Policy, one_hot
from lindm.io import files
from lindm.solvers import stationary_mdp, stationary_solution


class GraphPolicy(Policy):
    """A policy graph, followed from its first node; the state is the nodes at the histories.

    Args:
      problem: sizes, names and horizon of the problem.
      actions: [n] of each node.
      successors: [n, O] the next node after each observation; -1 at the last stage.
    """

    def __init__(self, problem: ProblemInfo, actions: np.ndarray, successors: np.ndarray):
        self.problem, self.actions, self.successors = problem, actions, successors

    def init(self, tasks: Sequence[PolicyTask]) -> np.ndarray:
        return np.zeros(1, int)

    def step(self, state: np.ndarray, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
        """Raises: ValueError after an action that the graph does not take: no edge leads on from it."""
        nodes = state[observation.parent]
        if observation.stage:
            assert observation.action is not None and observation.observation is not None
            if len(wrong := np.flatnonzero(observation.action != self.actions[nodes])):
                words, row = self.problem.words("actions"), wrong[0]
                own, got = words[int(self.actions[nodes[row]])], words[int(observation.action[row])]
                rule = f"a policy graph goes on after its own action alone, {own!r}; got {got!r}"
                raise ValueError(f"history: step {observation.stage}: {rule}: alpha vectors go on after every action")
            nodes = self.successors[nodes, observation.observation]
            if (nodes < 0).any():
                raise ValueError(f"history: step {observation.stage}: the policy graph ends before this observation")
        return nodes, one_hot(self.actions[nodes], self.problem.sizes["actions"])


class StateActions(Policy):
    """An action for each state of an MDP.

    Args:
      problem: sizes, names and horizon of the problem.
      table: [1, S] for every stage, or [H, S].
    """

    markov = True

    def __init__(self, problem: ProblemInfo, table: np.ndarray):
        self.problem, self.table = problem, table

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
    return GraphPolicy(info, actions, successors)


def _state_actions(content: dict[str, Any]) -> StateActions:
    info = _info(content, "mdp", ("states", "actions"))
    table = np.atleast_2d(np.array(content["policy"], int))
    stages = 1 if math.isinf(info.horizon) else info.horizon
    if table.shape != (stages, info.sizes["states"]) or not ((table >= 0) & (table < info.sizes["actions"])).all():
        raise ValueError(f"policy must have an action for each of {stages} stages and {info.sizes['states']} states")
    return StateActions(info, table)
