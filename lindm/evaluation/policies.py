r"""Who decides: the policies beside which a language model is measured, each from what a text of the task could tell.

    oracle                 an optimal action, at every history
    random                 every action alike
    behaviour              who made the demonstrations: the oracle, but with probability epsilon a random action
    bc                     what the demonstrations did most often where the same was seen (`lindm.evaluation.losses.vote`)
    certainty-equivalence  an estimate taken for the truth. State seen: the kernel and the rewards that the demonstrations show,
                           planned in. State hidden: the model is known, the likeliest state is taken for the state
    lsvi, pevi             least-squares value iteration on the demonstrations' transitions, and its pessimistic form
    qmdp                   the model is known; the action values of the seen state, averaged over the belief (Littman, Cassandra,
                           Kaelbling, 1995); of a cloud, alpha-maxmin over the models of these
    layer                  one linear attention layer a stage, trained on other tasks: its context is the demonstrations' pairs of
                           that stage with their returns, its weights are those that gradient descent ends at

The demonstrations tell rewards here, also where a text would not. Kernels and rewards are taken not to change with the stage,
as in the suites, so every transition serves every stage. What is known of an MDP's policy is a table over stages and states, of
the others' one a table over histories or answers at histories; `lindm.evaluation.losses` has the loss of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lindm.datasets import DatasetConfig
from lindm.datasets.generate import TaskGenerator
from lindm.evaluation.losses import Asked, Policy, double_precision, vote
from lindm.families.suites import Suite
from lindm.icl import predictors
from lindm.problems.apomdp import alpha_maxmin, as_apomdp
from lindm.solvers import dp, ties, tree
from lindm.solvers.belief import joint_kernel, update_belief
from lindm.text import Step
from lindm.types import APOMDP, MDP, POMDP, Problem

LAM = 1.0  # of the regressions
BETA = 1.0  # of PEVI's bonus, the rewards scaled to [0, 1]: its theory asks for more, and would then never leave zero
TASKS, SEED = 2048, 2**31  # that the layer is trained on: none that a seed below 2^31 draws

Episodes = Sequence[Sequence[Step]]
Made = TypeVar("Made")


class Answers(NamedTuple):
    """A policy that is asked at histories."""

    given: Sequence[Any]  # of each task, what it needs to know of it
    policy: Callable[[Sequence[Any]], Policy]  # of some of the tasks, from what is given of them


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks of one source."""

    problems: Sequence[Problem]
    demonstrations: Sequence[Episodes]  # of each; with rewards
    source: Suite | Problem
    recipe: DatasetConfig

    @property
    def seen(self) -> bool:
        return isinstance(self.problems[0], MDP)


def once_each(problems: Sequence[Problem], make: Callable[[Problem], Made]) -> list[Made]:
    """What `make` makes of each; where several tasks are the same problem, once."""
    made = {key: make(problem) for key, problem in {id(problem): problem for problem in problems}.items()}
    return [made[id(problem)] for problem in problems]


def oracle(tasks: Tasks) -> list[Any]:
    """Tables: actions [H, S], or at every history."""

    def table(problem: Problem) -> Any:
        if isinstance(problem, MDP):
            return np.asarray(ties.greedy(dp.backward_induction(problem).Q))
        cloud = as_apomdp(problem)
        return tuple(map(np.asarray, tree.optimal_policy(cloud, tree.tree(cloud))))

    return once_each(tasks.problems, table)


def behaviour(tasks: Tasks) -> list[Any]:
    """Tables of probabilities [..., A]."""
    epsilon = tasks.recipe.exploration[0]
    return [_mixed(table, epsilon, problem.num_actions) for table, problem in zip(oracle(tasks), tasks.problems, strict=True)]


def random(tasks: Tasks) -> list[Any]:
    """Tables of probabilities [..., A]."""

    def table(problem: Problem) -> Any:
        if isinstance(problem, MDP):
            return np.full(problem.r.shape, 1 / problem.num_actions)
        return tuple(map(np.asarray, tree.uniform_policy(as_apomdp(problem))))

    return once_each(tasks.problems, table)


def _mixed(table: Any, epsilon: float, A: int) -> Any:
    if isinstance(table, tuple):
        return tuple(_mixed(stage, epsilon, A) for stage in table)
    return (1 - epsilon) * np.eye(A)[table] + epsilon / A


def _mdp(problem: Problem) -> MDP:
    assert isinstance(problem, MDP)
    return problem


def bc(tasks: Tasks) -> list[Any] | Answers:
    """Tables [H, S] of an MDP; answers otherwise."""
    A = tasks.problems[0].num_actions
    if not tasks.seen:
        return Answers(tasks.demonstrations, lambda demonstrations: vote(demonstrations, A))
    H, S, _ = _mdp(tasks.problems[0]).r.shape
    states = [[Asked(-1, (Step(None, state=s),)) for s in range(S)]]
    rows = [vote([demos], A)(0, states)[0] for demos in tasks.demonstrations]
    return [np.tile(np.asarray(row), (H, 1)) for row in rows]


# --- the state is seen -----------------------------------------------------------------------------------------------------


def _transitions(demos: Episodes) -> np.ndarray:
    """(s, a, r, s') of all steps [n, 4]; s' is -1 at the end of an episode."""
    rows = []
    for steps in demos:
        after = [*(step.state for step in steps[1:]), -1]
        rows += [(step.state, step.action, step.reward, u) for step, u in zip(steps, after, strict=True)]
    return np.array(rows, float)


def certainty_equivalence(tasks: Tasks) -> list[np.ndarray]:
    """Tables [H, S]. To what was seen comes one transition that leads everywhere alike, and one average reward."""
    found = []
    for problem, demos in zip(map(_mdp, tasks.problems), tasks.demonstrations, strict=True):
        H, S, A = problem.r.shape
        s, a, r, u = _transitions(demos).T
        at = (s.astype(int), a.astype(int))
        counts, rewards, n = np.full((S, A, S), 1 / S), np.full((S, A), r.mean()), np.ones((S, A))
        np.add.at(rewards, at, r)
        np.add.at(n, at, 1)
        known = u >= 0
        np.add.at(counts, (at[0][known], at[1][known], u[known].astype(int)), 1)
        estimate = MDP(
            P=jnp.asarray(counts / counts.sum(-1, keepdims=True))[None],
            r=jnp.broadcast_to(jnp.asarray(rewards / n), (H, S, A)),
            rho=problem.rho,
        )
        found.append(np.asarray(ties.greedy(dp.backward_induction(estimate).Q)))
    return found


def value_iteration(tasks: Tasks, pessimistic: bool) -> list[np.ndarray]:
    """Qhat [H, S, A] of LSVI or PEVI with one feature for each state and action; rewards scaled to [0, 1] by each task's own."""
    found = []
    for problem, demos in zip(map(_mdp, tasks.problems), tasks.demonstrations, strict=True):
        H, S, A = problem.r.shape
        s, a, r, u = _transitions(demos).T
        low, high = r.min(), r.max()
        phi = np.eye(S * A).reshape(S, A, S * A)
        x = np.repeat(phi[s.astype(int), a.astype(int)][None], H, axis=0)
        x[: H - 1, u < 0] = 0  # what came next is not known, and is asked for but at the last stage
        after = np.repeat(phi[u.astype(int)][None], H, axis=0)
        scaled = np.repeat(((r - low) / (high - low if high > low else 1.0))[None], H, axis=0)
        phi, x, scaled, after = map(jnp.asarray, (phi, x, scaled, after))
        given = phi, x, scaled, after, LAM
        found.append(np.asarray(predictors.pevi(*given, BETA) if pessimistic else predictors.lsvi(*given)[0]))
    return found


def layer(tasks: Tasks) -> list[np.ndarray]:
    """Qhat [H, S, A], Qhat_h = A_h S_h, S_h = (1/K) sum y x over the pairs of stage h, y the return from there on.

    A_h minimises the squared error of Qhat_h over `TASKS` other tasks of the same source with as many demonstrations, which is
    where training of the layer ends (`lindm.icl.prompts`, `theory/notes`): A = E[Q* S'] E[S S']^-1, pseudo-inverse where a pair
    never occurs.
    """
    generator = TaskGenerator(
        tasks.source, DatasetConfig(tasks=TASKS, demos=tasks.recipe.demos, behavior=tasks.recipe.behavior, seed=SEED)
    )
    problems, _, episodes, _ = generator.generate(0, TASKS)
    if not isinstance(problems, MDP):
        raise ValueError("policy layer needs tasks that differ; got a source whose every task is the same problem")
    _, H, S, A = problems.r.shape
    many = dp.solve_many(dp.backward_induction, MDP(**{k: jnp.asarray(getattr(problems, k)) for k in ("P", "r", "rho")}))
    K = tasks.recipe.demos
    returns = np.cumsum(np.asarray(episodes.r)[:, :K, ::-1], axis=-1)[..., ::-1]
    S_train = _pairs(np.asarray(episodes.s)[:, :K], np.asarray(episodes.a)[:, :K], returns, S, A)  # [tasks, H, S A]
    wanted = np.asarray(many.Q).reshape(TASKS, H, S * A)
    cross, second = np.einsum("nhi,nhj->hij", wanted, S_train), np.einsum("nhi,nhj->hij", S_train, S_train)
    weights = cross @ np.linalg.pinv(second, hermitian=True)
    found = []
    for demos in tasks.demonstrations:
        s, a, r = (np.array([[getattr(step, k) for step in steps] for steps in demos]) for k in ("state", "action", "reward"))
        mine = _pairs(s[None], a[None], np.cumsum(r[None, :, ::-1], axis=-1)[..., ::-1], S, A)[0]
        found.append(np.einsum("hij,hj->hi", weights, mine).reshape(H, S, A))
    return found


def greedy(tables: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Actions [H, S] of values [H, S, A]."""
    return [np.asarray(ties.greedy(jnp.asarray(Q))) for Q in tables]


def _pairs(s: np.ndarray, a: np.ndarray, y: np.ndarray, S: int, A: int) -> np.ndarray:
    """(1/K) sum over episodes of y x, x one for each (s, a): s, a, y [n, K, H] -> [n, H, S A]."""
    return np.einsum("nkh,nkhi->nhi", y, np.eye(S * A)[s * A + a]) / s.shape[1]


# --- the state is hidden ---------------------------------------------------------------------------------------------------


Rule = Callable[[np.ndarray, int], np.ndarray]
"""The belief under each model [M, S] and the stage -> a score of every action [A]."""


def qmdp(tasks: Tasks) -> Answers:
    def rule(cloud: APOMDP) -> Rule:
        Q = seen_values(cloud)
        return lambda belief, stage: alpha_maxmin(cloud.alpha, np.einsum("ms,msa->ma", belief, Q[stage]), 0)

    return _believing(tasks, rule)


def likeliest_state(tasks: Tasks) -> Answers:
    """`certainty-equivalence` where the state is hidden; of a cloud, the mean of its models and of the beliefs under them."""

    def rule(cloud: APOMDP) -> Rule:
        mean = jax.tree.map(lambda x: x.mean(0, keepdims=True), cloud.models)
        Q = seen_values(APOMDP(models=mean, alpha=cloud.alpha))[:, 0]
        return lambda belief, stage: Q[stage, int(belief.mean(0).argmax())]

    return _believing(tasks, rule)


def _believing(tasks: Tasks, rule: Callable[[APOMDP], Rule]) -> Answers:
    def policy(problems: Sequence[POMDP | APOMDP]) -> Policy:
        with double_precision():
            clouds = [jax.tree.map(np.asarray, as_apomdp(problem)) for problem in problems]
            kernels = [[np.asarray(joint_kernel(cloud, t)) for t in range(cloud.horizon)] for cloud in clouds]
        rules = [rule(cloud) for cloud in clouds]
        beliefs: list[list[np.ndarray]] = []  # of each task, at the histories of the last stage

        def answer(stage: int, level: list[list[Asked]]) -> list[list[int]]:
            nonlocal beliefs
            now = []
            for i, asks in enumerate(level):
                start, K = clouds[i].models.rho, kernels[i][stage - 1]
                now.append([_updated(K, beliefs[i][asked.parent], asked) if stage else start for asked in asks])
            beliefs = now
            return [[int(score(belief, stage).argmax()) for belief in of] for score, of in zip(rules, now, strict=True)]

        return answer

    return Answers(tasks.problems, policy)


def _updated(K: np.ndarray, belief: np.ndarray, asked: Asked) -> np.ndarray:
    """The belief [M, S] after the last step of a history, the same under every model; K [A, M, O, S, S]."""
    last = asked.steps[-2]
    return update_belief(K, belief, last.action, last.model or 0, last.observation)


def seen_values(cloud: APOMDP) -> np.ndarray:
    """Q [H, M, S, A] under each model if the state were seen: V_h = max_a of the alpha-maxmin over the models."""
    M, H, S, A = cloud.models.r.shape
    Q, V = np.zeros((H, M, S, A)), np.zeros(S)
    for h in reversed(range(H)):
        P = cloud.models.P[:, h if cloud.models.P.shape[1] > 1 else 0]
        Q[h] = cloud.models.r[:, h] + P @ V
        V = alpha_maxmin(cloud.alpha, Q[h], 0).max(-1)
    return Q


# --- by name ---------------------------------------------------------------------------------------------------------------

EVERYWHERE = {"oracle": oracle, "random": random, "behaviour": behaviour, "bc": bc}
SEEN = {
    "certainty-equivalence": certainty_equivalence,
    "lsvi": lambda tasks: greedy(value_iteration(tasks, pessimistic=False)),
    "pevi": lambda tasks: greedy(value_iteration(tasks, pessimistic=True)),
    "layer": lambda tasks: greedy(layer(tasks)),
}
HIDDEN = {"certainty-equivalence": likeliest_state, "qmdp": qmdp}
MODELS = ("icl:MODELDIR", "sft:RUNDIR")  # language models, which `lindm.evaluation.compare` reads


def known(name: str, seen: bool) -> Callable[[Tasks], list[Any] | Answers]:
    """What makes the policy of that name where the state is seen or hidden; ValueError where there is none."""
    found = EVERYWHERE | (SEEN if seen else HIDDEN)
    if name not in found:
        allowed = f"{', '.join((*found, *MODELS))} where the state is {'seen' if seen else 'hidden'}"
        raise ValueError(f"policy must be one of {allowed}; got {name!r}")
    return found[name]


def policy(name: str, tasks: Tasks) -> list[Any] | Answers:
    """The policy of that name; ValueError where these tasks have none."""
    with double_precision():
        return known(name, tasks.seen)(tasks)
