r"""Solved problems as environments: the histories that a policy reaches, their probabilities, and what a decision loses there.

A history ends before an action. In an MDP it is represented by the state; in a POMDP or an APOMDP it is a sequence of steps
(a, m, o), numbered within its stage as in `lindm.solvers.belief`. The histories of one stage of one task are rows of `Histories`,
children in the order of their parents.

Q* is known at every history where a table of all histories fits in memory. In a larger POMDP, V* has certified bounds, and losses
are measured against a lower bound of the values at beliefs (`BoundedEnvironment`).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import jax
import numpy as np

from lindm.evaluation.sampling import draw_indices
from lindm.problems.apomdp import as_apomdp
from lindm.solvers import dp, hsvi, legal_supports, tree
from lindm.solvers.belief import branching, child_history, first_history, normalize, step_index
from lindm.solvers.solve import MEMORY_BUDGET, Method, Solution, solve
from lindm.solvers.ties import optimal_actions
from lindm.text import Step
from lindm.types import APOMDP, MDP, POMDP, Problem


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Solvers compute in double precision and on the CPU, independently of the precision of a model."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Histories:
    """n histories of one stage of one task; None for fields that the problem or the first stage does not have."""

    weight: np.ndarray  # [n] probability of the history (in an APOMDP, of its actions alone); 1/episodes in a rollout
    index: np.ndarray  # [n] the state of an MDP, or the number of the history within its stage
    parent: np.ndarray  # [n] row of the history of the stage before that this one continues
    belief: np.ndarray | None = None  # [n, M, S] belief over the hidden state under each model
    state: np.ndarray | None = None  # [n] the state, where it is observed
    action: np.ndarray | None = None  # [n] of the step before, like the next three
    model: np.ndarray | None = None  # [n]
    observation: np.ndarray | None = None  # [n]
    reward: np.ndarray | None = None  # [n], where the state is observed

    def __len__(self) -> int:
        return len(self.weight)


NO_HISTORIES = Histories(weight=np.zeros(0), index=np.zeros(0, int), parent=np.zeros(0, int))


def check_memory(problem: Problem) -> None:
    """ValueError if all histories of an ambiguous problem with illegal actions, which has no bounds, do not fit in memory."""
    if not isinstance(problem, APOMDP) or problem.models.legal is None:
        return
    with double_precision():
        needed = tree.memory_bytes(problem)
    if needed > MEMORY_BUDGET:
        rule = "horizon of an ambiguous problem with illegal actions must be short enough that all histories fit in"
        raise ValueError(f"{rule} {MEMORY_BUDGET >> 30} GiB; they need {needed / 2**30:,.1f} GiB")


class MDPEnvironment:
    """An MDP, solved when Q* is first needed."""

    ambiguous = bounded = False

    def __init__(self, problem: MDP):
        self.problem = problem
        self.horizon, self.num_states, self.num_actions = problem.horizon, problem.num_states, problem.num_actions
        self.P, self.r, self.rho = (np.asarray(x) for x in (problem.P, problem.r, problem.rho))
        self.discount = float(problem.discount)
        self._paying = jax.tree.map(np.asarray, problem)  # the rewards that policies see are those that are paid

    @cached_property
    def Q(self) -> np.ndarray:
        """Q* [H, S, A]."""
        with double_precision():
            return np.asarray(dp.backward_induction(self.problem).Q)

    @cached_property
    def optimal(self) -> np.ndarray:
        """Which actions are optimal [H, S, A]."""
        return optimal_actions(self.Q)

    @cached_property
    def optimal_value(self) -> float:
        return float(self.rho @ self.Q[0].max(-1))

    @cached_property
    def uniform_value(self) -> float:
        """The value of uniformly random actions."""
        with double_precision():
            return float(self.rho @ np.asarray(dp.policy_value(self.problem, dp.uniform_policy(self.problem))[0]))

    def num_histories(self) -> int:
        """Upper limit of the number of histories of the last stage that a deterministic policy reaches."""
        return int((self.rho > 0).sum()) * int((self.P > 0).sum(-1).max()) ** (self.horizon - 1)

    def start(self, rng: np.random.Generator | None, episodes: int) -> Histories:
        """The histories of the first stage: all of them, or those of sampled episodes."""
        if rng is None:
            states = np.flatnonzero(self.rho > 0)
            weight = self.rho[states].astype(float)
        else:
            states = draw_indices(np.broadcast_to(self.rho, (episodes, self.num_states)), rng)
            weight = np.full(episodes, 1 / episodes)
        return Histories(weight=weight, index=states, state=states, parent=np.zeros(len(states), int))

    def step(
        self, stage: int, at: Histories, probabilities: np.ndarray, rng: np.random.Generator | None, actions: np.ndarray
    ) -> Histories:
        """The histories one stage later, by action probabilities [n, A]; in a rollout `actions` [n] are taken."""
        P = self.P[min(stage, len(self.P) - 1)]
        if rng is None:
            joint = probabilities[:, :, None] * P[at.index]
            parent, action, state = np.nonzero(joint > 0)
            weight = at.weight[parent] * joint[parent, action, state]
        else:
            parent, action = np.arange(len(at)), actions
            state, weight = draw_indices(P[at.index, actions], rng), at.weight
        reward = self._paying.pay(stage, at.index[parent], action, state)
        return Histories(weight=weight, index=state, parent=parent, state=state, action=action, reward=reward)

    def merged(self, histories: Histories) -> Histories:
        """One history per state, with the weight of all that end in it: sufficient for a Markov policy."""
        weight = np.bincount(histories.index, histories.weight, self.num_states)
        first = np.unique(histories.index, return_index=True)[1]
        return jax.tree.map(lambda x: x[first], replace(histories, weight=weight[histories.index]))

    def legal_at(self, stage: int, histories: Histories) -> np.ndarray:
        """Which actions are legal [n, A]."""
        return self.Q[stage, histories.index] > -np.inf

    def Q_at(self, stage: int, histories: Histories) -> tuple[np.ndarray, np.ndarray]:
        """Q* [n, A], and which actions are optimal [n, A]."""
        return self.Q[stage, histories.index], self.optimal[stage, histories.index]


class BeliefEnvironment:
    """A POMDP or an APOMDP, solved when Q* is first needed."""

    bounded = False

    def __init__(self, problem: POMDP | APOMDP):
        self.problem, self.ambiguous = problem, isinstance(problem, APOMDP)
        self.apomdp = as_apomdp(problem)
        self.P, self.O, self.r, self.rho = (np.asarray(getattr(self.apomdp.models, name)) for name in ("P", "O", "r", "rho"))
        self.num_models, self.horizon, self.num_states, self.num_actions = self.apomdp.models.r.shape
        self.num_observations = self.apomdp.num_observations
        self.branching = branching(self.apomdp)

    @cached_property
    def Q(self) -> np.ndarray:
        """Q* [histories of all stages, A]. ValueError where they do not fit in memory."""
        check_memory(self.problem)
        with double_precision():
            return np.asarray(tree.tree(self.apomdp).Q)

    @cached_property
    def optimal_value(self) -> float:
        return float(self.Q[0].max())

    @cached_property
    def uniform_value(self) -> float:
        """The value of uniformly random actions."""
        with double_precision():
            return float(tree.uniform_value(self.apomdp))

    def num_histories(self) -> int:
        """Upper limit of the number of histories of the last stage that a deterministic policy reaches."""
        return (self.num_models * self.num_observations) ** (self.horizon - 1)

    def joint(self, stage: int, action: int, beliefs: np.ndarray) -> np.ndarray:
        """The joint measures [n, M, O, S] of the observation and the next state, from beliefs [n, M, S]."""
        P = self.P[:, min(stage, self.P.shape[1] - 1), :, action]  # [M, S, S]
        O = self.O[:, min(stage, self.O.shape[1] - 1), action]  # [M, S, O]
        following = (beliefs.swapaxes(0, 1) @ P).swapaxes(0, 1)  # [n, M, S]
        return following[:, :, None] * O.swapaxes(1, 2)

    def start(self, rng: np.random.Generator | None, episodes: int) -> Histories:
        """The empty history of the first stage, once or for each sampled episode."""
        n = 1 if rng is None else episodes
        belief = np.broadcast_to(self.rho, (n, *self.rho.shape))
        return Histories(weight=np.full(n, 1 / n), index=np.zeros(n, int), parent=np.zeros(n, int), belief=belief)

    def step(
        self, stage: int, at: Histories, probabilities: np.ndarray, rng: np.random.Generator | None, actions: np.ndarray
    ) -> Histories:
        """The histories one stage later, by action probabilities [n, A]; in a rollout `actions` [n] are taken."""
        assert at.belief is not None
        O, taken, groups = self.num_observations, np.zeros_like(probabilities, bool), []
        if rng is None:
            taken = probabilities > 0
        else:
            taken[np.arange(len(at)), actions] = True
        for a in range(self.num_actions):
            rows = np.flatnonzero(taken[:, a])
            groups.append((rows, np.full(len(rows), a), self.joint(stage, a, at.belief[rows])))
        parents, chosen, joints = (np.concatenate(parts) for parts in zip(*groups, strict=True))
        order = np.argsort(parents, kind="stable")  # by history, then by action
        parents, chosen, joints = parents[order], chosen[order], joints[order]
        beliefs, mass = normalize(joints)  # [rows, M, O, S] and [rows, M, O]
        if rng is None:
            row, m, o = np.nonzero(mass > 0)
            weight = at.weight[parents] * probabilities[parents, chosen]
            weight = weight[row] if self.ambiguous else weight[row] * mass[row, m, o]
        else:
            row = np.arange(len(parents))
            m, o = np.divmod(draw_indices(mass.reshape(len(mass), -1), rng), O)
            weight = at.weight
        belief, parent, action = beliefs[row, m, o], parents[row], chosen[row]
        return Histories(
            weight=weight,
            index=self._number(stage, at.index[parent], action, m, o),
            parent=parent,
            belief=np.broadcast_to(belief[:, None], (len(row), *self.rho.shape)),
            action=action,
            model=m if self.ambiguous else None,
            observation=o,
        )

    def _number(self, stage: int, parents: np.ndarray, a: np.ndarray, m: np.ndarray, o: np.ndarray) -> np.ndarray:
        """The numbers [n] of the histories that continue those with the numbers `parents` of a stage."""
        return child_history(self.apomdp, stage, parents, step_index(self.apomdp, a, m, o))

    def legal_at(self, stage: int, histories: Histories) -> np.ndarray:
        """Which actions are legal [n, A], and lead to beliefs at which others are."""
        return self.Q_at(stage, histories)[0] > -np.inf

    def Q_at(self, stage: int, histories: Histories) -> tuple[np.ndarray, np.ndarray]:
        """Q* [n, A], and which actions are optimal [n, A]."""
        Q = self.Q[first_history(self.branching, stage) + histories.index]
        return Q, optimal_actions(Q, per_row=True)


class CertifiedEnvironment(BeliefEnvironment):
    """A problem with more histories than fit in memory: V* has certified bounds, computed when they are first needed."""

    bounded = True
    method: Method  # of the solver

    def __init__(self, problem: POMDP | APOMDP, effort: int | None = None):
        super().__init__(problem)
        self.effort = effort

    @cached_property
    def solution(self) -> Solution:
        with double_precision():
            return solve(self.problem, self.method, effort=self.effort)

    @cached_property
    def optimal_value(self) -> float:
        """The lower bound of V*."""
        return float(self.solution.lower)

    @cached_property
    def optimal_upper(self) -> float:
        """The upper bound of V*."""
        return float(self.solution.upper)


class BoundedEnvironment(CertifiedEnvironment):
    """A large POMDP. The alpha vectors of the solver are a lower bound W_h of V*_h at every belief; losses are measured from it:
    for any W with W_H = 0,

        V^pi = W_0 - sum_h E_{history_h ~ pi} [ W_h(b_h) - sum_a pi(a | history_h) Q^W_h(b_h, a) ],
        Q^W_h(b, a) = b . r_h(., a) + sum_o W_{h+1}(b K_h[a, o]).

    Over sampled episodes, W is a control variate: it changes no expectation, and the closer it is to V^pi, the less the sum
    varies.
    """

    method = "hsvi"

    @cached_property
    def vectors(self) -> list[np.ndarray]:
        """The alpha vectors [n, S] of each stage; zero after the last one."""
        bounds = self.solution.tables
        assert isinstance(bounds, hsvi.Bounds)
        return [*(np.unique(stage, axis=0) for stage in np.asarray(bounds.alphas)), np.zeros((1, self.num_states))]

    @cached_property
    def uniform_value(self) -> float | None:
        """The value of uniformly random legal actions (no observation changes them if all are); None: too many supports."""
        assert isinstance(self.problem, POMDP)
        if self.problem.legal is not None:
            return legal_supports.uniform_value(self.problem)
        law, value = self.rho[0], 0.0
        for stage in range(self.horizon):
            value += float((law @ self.r[0, stage]).mean())
            law = law @ self.P[0, min(stage, self.P.shape[1] - 1)].mean(1)
        return value

    def bound_at(self, stage: int, beliefs: np.ndarray) -> np.ndarray:
        """The lower bound W [...] at beliefs [..., S], which need not be normalized."""
        return legal_supports.without_bound((beliefs @ self.vectors[stage].T).max(-1))

    def Q_bound(self, stage: int, action: int, beliefs: np.ndarray) -> np.ndarray:
        """The lower bound Q^W [n] of the values of an action at beliefs [n, S]; -inf where it is not legal."""
        after = self.joint(stage, action, beliefs[:, None])[:, 0]
        Q = beliefs @ self.r[0, stage, :, action] + self.bound_at(stage + 1, after).sum(-1)
        if self.apomdp.models.legal is None:
            return Q
        illegal = ~np.asarray(self.apomdp.models.legal)[0, :, action]
        return np.where((beliefs[:, illegal] > 0).any(-1), -np.inf, Q)

    def lower_bounds(self, stage: int, beliefs: np.ndarray) -> np.ndarray:
        """Lower bounds [n, A] of the action values at beliefs [n, 1, S]."""
        return np.stack([self.Q_bound(stage, a, beliefs[:, 0]) for a in range(self.num_actions)], 1)

    def legal_at(self, stage: int, histories: Histories) -> np.ndarray:
        """Which actions are legal [n, A]."""
        assert histories.belief is not None
        return self.lower_bounds(stage, histories.belief) > -np.inf

    def losses(self, stage: int, histories: Histories, probabilities: np.ndarray) -> np.ndarray:
        """W less the mean of Q^W under action probabilities [n, A]: [n]."""
        assert histories.belief is not None
        beliefs = histories.belief[:, 0]
        loss = self.bound_at(stage, beliefs)
        for action in range(self.num_actions):
            rows = np.flatnonzero(probabilities[:, action])
            loss[rows] -= probabilities[rows, action] * self.Q_bound(stage, action, beliefs[rows])
        return loss

    def _number(self, stage: int, parents: np.ndarray, a: np.ndarray, m: np.ndarray, o: np.ndarray) -> np.ndarray:
        """Zeros: the numbers of long histories are no machine integers, and there is no table that they could index."""
        return np.zeros_like(parents)


Environment = MDPEnvironment | BeliefEnvironment


def environment(problem: Problem, budget: int = MEMORY_BUDGET, effort: int | None = None) -> Environment:
    """The environment of a problem in double precision; it is solved when its values are first needed, once.

    Args:
      budget: bytes that a table of all histories may take; a larger problem has bounds in place of exact values.
      effort: of these bounds, as in `lindm.solvers.solve`.
    """
    with double_precision():
        if isinstance(problem, MDP):
            return MDPEnvironment(problem)
        no_bounds = isinstance(problem, APOMDP) and problem.models.legal is not None
        if no_bounds or tree.memory_bytes(as_apomdp(problem)) <= budget:
            return BeliefEnvironment(problem)
        if isinstance(problem, POMDP):
            return BoundedEnvironment(problem, effort)
        from lindm.evaluation.ambiguous import NetEnvironment  # a subclass of the environments here

        return NetEnvironment(problem, effort)


@dataclass(frozen=True, kw_only=True)
class PolicyTask:
    """The information of a policy before it acts: the problem, demonstrations, and names of states, actions, ...."""

    environment: Environment | None  # None: the problem is not known
    demonstrations: Sequence[Sequence[Step]] = ()  # episodes, with rewards
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of states, actions, observations and models

    def required_demonstrations(self, rewards: bool = False) -> Sequence[Sequence[Step]]:
        """The demonstrations. ValueError where there are none, or where `rewards` are needed and a step has none."""
        if not self.demonstrations:
            raise ValueError("demonstrations must be given: this policy learns from them; got none")
        if rewards and any(step.reward is None for steps in self.demonstrations for step in steps):
            raise ValueError("demonstrations must have rewards: this policy learns from them; a step has none")
        return self.demonstrations

    @property
    def known(self) -> Environment:
        """The environment. ValueError if the problem is not known."""
        if self.environment is None:
            raise ValueError("problem must be given: this policy computes from it; got None")
        return self.environment


def make_tasks(
    problems: Sequence[Problem],
    demonstrations: Sequence[Sequence[Sequence[Step]]],
    names: Mapping[str, Sequence[str]] | None = None,
    *,
    budget: int = MEMORY_BUDGET,
    effort: int | None = None,
) -> list[PolicyTask]:
    """A task for each problem and its demonstrations; tasks of the same problem share one `environment`."""
    distinct = {id(problem): problem for problem in problems}
    environments = {key: environment(problem, budget, effort) for key, problem in distinct.items()}
    return [
        PolicyTask(environment=environments[id(problem)], demonstrations=episodes, names=names or {})
        for problem, episodes in zip(problems, demonstrations, strict=True)
    ]
