r"""What a policy over texts loses on a problem: it is asked at the histories that it reaches, all of one stage at once.

A policy sees the history, as steps that a template can write, and answers with an action. What it loses against the optimal
value is, by the performance difference identity (Kakade, Langford, 2002),

    V* - V^pi = sum_h E_{history_h ~ pi} [ max_a Q*_h(history_h, a) - Q*_h(history_h, pi(history_h)) ],

an expectation of exact one-step losses. Where the histories that the policy reaches are few they are all asked, each with its
probability, and the loss is exact; otherwise the expectation is taken over sampled episodes: an estimate that is far less noisy
than returns, and without error for an optimal policy. In an ambiguous problem nature's choice depends on the policy, so the
identity does not hold; there the policy's answers fill a table over all histories, and the recursion of `lindm.solvers.tree`
gives its value.

The policy is not told the rewards where the state is hidden: they could tell it of the state what the oracle does not know, and
the difference to the oracle would no longer be a loss.

A policy that is known as a table, over stages and states of an MDP or over histories (`tree.Policy`), needs no asking: `tabled`
has its loss by dynamic programming.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lindm.problems.apomdp import as_apomdp
from lindm.solvers import dp, tree
from lindm.solvers.belief import branching, child_history, children, first_history, joint_kernel, normalize, step_index
from lindm.solvers.ties import optimal_actions
from lindm.text import Step
from lindm.types import APOMDP, MDP, POMDP, Problem

LISTED = 2048  # histories of one stage of one task that are all asked


@dataclass(frozen=True)
class Asked:
    """One history at which the policy is asked."""

    parent: int  # which history of the stage before it continues; -1 at the first stage
    steps: tuple[Step, ...]  # of the episode so far; the last one is open


Policy = Callable[[int, list[list[Asked]]], Sequence[Sequence[int]]]
"""(stage, the histories of each task) -> an action for each. Stages come in order, from 0, once."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """What a policy loses on one task, in units of reward."""

    gap: float  # V* - V^pi
    agreement: float  # how often it takes an optimal action, over the histories it reaches
    optimal: float  # V*
    uniform: float  # V of uniformly random actions
    exact: bool

    @property
    def relative(self) -> float:
        """The gap as a share of what random play loses."""
        return self.gap / (self.optimal - self.uniform)


@dataclass(frozen=True)
class Node:
    stage: int
    weight: float  # probability, or one over the number of episodes
    at: int  # the state, or the number of the history within its stage
    steps: tuple[Step, ...]
    belief: np.ndarray | None = None
    parent: int = -1


class _States:
    """An MDP: histories end in the state that is seen."""

    def __init__(self, problem: MDP, rewards: bool):
        plan = dp.backward_induction(problem)
        A = problem.num_actions
        uniform = dp.policy_value(problem, jnp.full(problem.r.shape, 1 / A, problem.r.dtype))
        self.problem = problem
        self.P, self.r, self.rho = (np.asarray(x) for x in (problem.P, problem.r, problem.rho))
        self.table, self.rewards, self.horizon = np.asarray(plan.Q), rewards, len(self.r)
        self.best = optimal_actions(self.table)
        self.optimal, self.uniform = float(self.rho @ plan.V[0]), float(self.rho @ uniform[0])

    def most(self) -> int:
        return int((self.rho > 0).sum()) * int((self.P > 0).sum(-1).max()) ** (self.horizon - 1)

    def start(self, sampled: np.random.Generator | None, episodes: int) -> list[Node]:
        if sampled is None:
            return [Node(0, float(p), s, (Step(None, state=s),)) for s, p in enumerate(self.rho) if p > 0]
        states = [_draw(sampled, self.rho) for _ in range(episodes)]
        return [Node(0, 1 / episodes, s, (Step(None, state=s),)) for s in states]

    def expand(self, node: Node, a: int, sampled: np.random.Generator | None) -> list[Node]:
        law = self.P[min(node.stage, len(self.P) - 1), node.at, a]
        reward = float(self.r[node.stage, node.at, a]) if self.rewards else None
        past = (*node.steps[:-1], Step(a, state=node.at, reward=reward))
        nexts = [(s, p) for s, p in enumerate(law) if p > 0] if sampled is None else [(_draw(sampled, law), 1.0)]
        return [Node(node.stage + 1, node.weight * float(p), s, (*past, Step(None, state=s))) for s, p in nexts]

    def Q(self, node: Node) -> tuple[np.ndarray, np.ndarray]:
        """Q* [A], and which actions are optimal [A]."""
        return self.table[node.stage, node.at], self.best[node.stage, node.at]

    def tabled(self, table: Any) -> Played:
        table = np.asarray(table)
        reach = np.asarray(dp.occupancy(self.problem, jnp.asarray(table)))
        value = self.rho @ np.asarray(dp.policy_value(self.problem, jnp.asarray(table)))[0]
        right = sum(float(reach[h] @ _agreed(self.best[h], table[h])[1]) for h in range(self.horizon))
        agreement = right / float(reach.sum())
        return Played(
            gap=self.optimal - float(value), agreement=agreement, optimal=self.optimal, uniform=self.uniform, exact=True
        )


class _Histories:
    """A POMDP or an ambiguous one: histories of actions, models and observations, numbered as in `lindm.solvers.tree`."""

    def __init__(self, problem: POMDP | APOMDP):
        cloud = as_apomdp(problem)
        self.apomdp, self.branches, self.ambiguous = cloud, branching(cloud), isinstance(problem, APOMDP)
        self.table, self.horizon = np.asarray(tree.tree(cloud).Q), cloud.horizon
        self.best = optimal_actions(self.table, per_row=True)
        self.optimal, self.uniform = float(self.table[0].max()), float(tree.uniform_value(cloud))
        self.K = [np.asarray(joint_kernel(cloud, t)) for t in range(self.horizon)]

    def most(self) -> int:
        _, M, O = self.K[0].shape[:3]
        return (M * O) ** (self.horizon - 1)

    def start(self, sampled: np.random.Generator | None, episodes: int) -> list[Node]:
        n = 1 if sampled is None else episodes
        return [Node(0, 1 / n, 0, (Step(None),), np.asarray(self.apomdp.models.rho)) for _ in range(n)]

    def expand(self, node: Node, a: int, sampled: np.random.Generator | None) -> list[Node]:
        assert node.belief is not None
        K = self.K[node.stage][a]  # [M, O, S, S]
        M, O = K.shape[:2]
        beliefs, mass = normalize(children(K, node.belief))
        if sampled is None:
            nexts = [(m, o) for m in range(M) for o in range(O) if mass[m, o] > 0]
        else:
            nexts = [divmod(_draw(sampled, mass.reshape(-1)), O)]
        found = []
        for m, o in nexts:
            step = Step(a, model=m if self.ambiguous else None, observation=o)
            at = child_history(self.apomdp, node.stage, node.at, step_index(self.apomdp, a, m, o))
            weight = node.weight * (float(mass[m, o]) if sampled is None else 1.0)
            belief = np.broadcast_to(beliefs[m, o], node.belief.shape)
            found.append(Node(node.stage + 1, weight, at, (*node.steps[:-1], step, Step(None)), belief))
        return found

    def Q(self, node: Node) -> tuple[np.ndarray, np.ndarray]:
        """Q* [A], and which actions are optimal [A]."""
        row = first_history(self.branches, node.stage) + node.at
        return self.table[row], self.best[row]

    def tabled(self, table: Any) -> Played:
        value = float(tree.policy_value(self.apomdp, tuple(map(jnp.asarray, table))))
        belief = np.asarray(self.apomdp.models.rho)[None]  # [histories, M, S], not normalised
        weight, right, reached = np.ones(1), 0.0, 0.0
        for t in range(self.horizon):
            first = first_history(self.branches, t)
            weights, agreed = _agreed(self.best[first : first + self.branches**t], np.asarray(table[t]))
            mass = belief.sum(-1).max(-1)
            met = weight * ((mass > 0) if self.ambiguous else mass)
            right, reached = right + float(met @ agreed), reached + float(met.sum())
            if t + 1 < self.horizon:
                K = self.K[t]
                belief = np.einsum("amosu,nms->amonu", K, belief).reshape(-1, 1, K.shape[-1])
                belief = np.broadcast_to(belief, (len(belief), *self.apomdp.models.rho.shape))
                shape = (*K.shape[:3], len(weight))
                weight = np.broadcast_to((weight[:, None] * weights).T[:, None, None], shape).reshape(-1)
        return Played(gap=self.optimal - value, agreement=right / reached, optimal=self.optimal, uniform=self.uniform, exact=True)


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Oracles compute in double precision and on the CPU, whatever the model beside them computes in."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def _draw(rng: np.random.Generator, law: np.ndarray) -> int:
    cdf = np.cumsum(law)
    return int(np.searchsorted(cdf, rng.random() * cdf[-1], side="right"))


World = _States | _Histories


def world(problem: Problem, rewards: bool = False) -> World:
    """A problem solved, ready to be played any number of times; `rewards`: whether the steps of an MDP tell them."""
    with double_precision():
        return _States(problem, rewards) if isinstance(problem, MDP) else _Histories(problem)


def asked_at_once(world: World, episodes: int, listed: int = LISTED) -> int:
    """At most so many histories of the world are asked about at one stage."""
    return most if (most := world.most()) <= listed else episodes


def play(
    worlds: Sequence[World], policy: Policy, *, episodes: int = 8, seed: int = 0, first: int = 0, listed: int = LISTED
) -> list[Played | None]:
    """What the policy loses on each world, all of one horizon; the tasks are asked together, stage by stage.

    Args:
      episodes: sampled where a task has more than `listed` histories at its last stage; world i draws them from
        (seed, first + i), so that some worlds at a time are played as all of them would be.
    Returns: None for an ambiguous problem that has more than `listed`.
    """
    if len({world.horizon for world in worlds}) != 1:
        raise ValueError(f"worlds must have one horizon; got {sorted({world.horizon for world in worlds})}")
    every = [world.most() <= listed for world in worlds]
    lists = [e or not (isinstance(w, _Histories) and w.ambiguous) for e, w in zip(every, worlds, strict=True)]
    rngs = [None if e else np.random.default_rng([seed, first + i]) for i, e in enumerate(every)]
    level = [w.start(rng, episodes) if ok else [] for w, rng, ok in zip(worlds, rngs, lists, strict=True)]
    lost, agreed, reached = np.zeros(len(worlds)), np.zeros(len(worlds)), np.zeros(len(worlds))
    tables: list[list[np.ndarray]] = [[] for _ in worlds]
    for t in range(worlds[0].horizon):
        answers = policy(t, [[Asked(node.parent, node.steps) for node in nodes] for nodes in level])
        following: list[list[Node]] = []
        for i, (world, nodes, actions) in enumerate(zip(worlds, level, answers, strict=True)):
            ambiguous = world if isinstance(world, _Histories) and world.ambiguous else None
            if ambiguous:
                tables[i].append(np.zeros(ambiguous.branches**t if nodes else 0, np.int32))  # what is not reached does not matter
            children: list[Node] = []
            for number, (node, action) in enumerate(zip(nodes, actions, strict=True)):
                a, (Q, best) = int(action), world.Q(node)
                loss = float(Q.max() - Q[a])
                lost[i] += node.weight * loss
                weight = 1.0 if ambiguous else node.weight
                agreed[i] += weight * bool(best[a])
                reached[i] += weight
                if ambiguous:
                    tables[i][t][node.at] = a
                if t + 1 < world.horizon:
                    children += [_child(child, number) for child in world.expand(node, a, rngs[i])]
            following.append(children)
        level = following
    found: list[Played | None] = []
    for i, (world, ok) in enumerate(zip(worlds, lists, strict=True)):
        if not ok:
            found.append(None)
            continue
        gap = float(lost[i])
        if isinstance(world, _Histories) and world.ambiguous:
            with double_precision():
                gap = world.optimal - float(tree.policy_value(world.apomdp, tuple(map(jnp.asarray, tables[i]))))
        share = float(agreed[i] / reached[i])
        found.append(Played(gap=gap, agreement=share, optimal=world.optimal, uniform=world.uniform, exact=every[i]))
    return found


def play_all(
    worlds: Sequence[World],
    given: Sequence[Any],
    policy: Callable[[Sequence[Any]], Policy],
    *,
    episodes: int,
    seed: int,
    listed: int,
    at_once: int,
) -> list[Played | None]:
    """`play` of a policy made from what is given of each task; about `at_once` histories are asked at a time."""
    together = max(1, at_once // max(asked_at_once(one, episodes, listed) for one in worlds))
    found: list[Played | None] = []
    for at in range(0, len(worlds), together):
        some = slice(at, at + together)
        found += play(worlds[some], policy(given[some]), episodes=episodes, seed=seed, first=at, listed=listed)
    return found


def tabled(world: World, table: Any) -> Played:
    """What a policy given as a table loses, exactly.

    Args:
      table: of an MDP actions [H, S] or probabilities [H, S, A]; otherwise a `tree.Policy`: at every history of each stage.
    """
    with double_precision():
        return world.tabled(table)


def _agreed(best: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, A] of a table's rows, and of each row that its action is an optimal one [n]; best [n, A] bool."""
    weights = np.eye(best.shape[-1])[table] if np.issubdtype(table.dtype, np.integer) else table
    return weights, (weights * best).sum(-1)


def quality(played: Sequence[Played]) -> dict[str, Any]:
    """Means over tasks, with 95 % intervals by a t-distribution over tasks.

    gap: (V* - V^pi) / (V* - V^random); gap_of_value: (V* - V^pi) / |V*|; agreement: how often the action is an optimal one.
    """
    from scipy import stats

    def mean(values: Sequence[float]) -> tuple[float, list[float]]:
        one, half = float(np.mean(values)), 0.0
        if len(values) > 1:
            half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
        return one, [one - half, one + half]

    gap, gap_ci = mean([one.relative for one in played])
    share, share_ci = mean([one.gap / abs(one.optimal) for one in played])
    return {
        **{"gap": gap, "gap_ci": gap_ci, "gap_of_value": share, "gap_of_value_ci": share_ci},
        "agreement": float(np.mean([one.agreement for one in played])),
        "n": len(played),
        "method": "exact" if all(one.exact for one in played) else "rollout",
    }


def _child(node: Node, parent: int) -> Node:
    return Node(node.stage, node.weight, node.at, node.steps, node.belief, parent)


def vote(demonstrations: Sequence[Sequence[Sequence[Step]]], A: int) -> Policy:
    """The policy that does what the demonstrations of the task did most often where the same was seen last.

    What is seen last is the state, or the model and the observation of the step before; where no demonstration saw the same, what
    they did most often at all. Ties go to the lowest action.
    """

    def seen(steps: Sequence[Step], t: int) -> tuple:
        before = (None, None) if t == 0 else (steps[t - 1].model, steps[t - 1].observation)
        return (steps[t].state, *before)

    counts: list[dict[tuple, np.ndarray]] = []
    for episodes in demonstrations:
        found: dict[tuple, np.ndarray] = {}
        for steps in episodes:
            for t, step in enumerate(steps):
                for key in (seen(steps, t), ()):
                    found.setdefault(key, np.zeros(A))[step.action] += 1
        counts.append(found)

    def answer(stage: int, level: list[list[Asked]]) -> list[list[int]]:
        return [
            [int(found.get(seen(asked.steps, stage), found[()]).argmax()) for asked in asks]
            for found, asks in zip(counts, level, strict=True)
        ]

    return answer
