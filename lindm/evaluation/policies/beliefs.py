"""Policies of a POMDP or an APOMDP that know the model and act on the belief: QMDP, and the likeliest state."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from lindm.evaluation.ambiguous import NetEnvironment
from lindm.evaluation.environments import BeliefEnvironment, BoundedEnvironment, PolicyTask
from lindm.evaluation.policies.registry import HIDDEN
from lindm.evaluation.policy import Observation, Policy, one_hot
from lindm.problems.apomdp import alpha_maxmin
from lindm.solvers.belief import normalize
from lindm.types import APOMDP

Score = Callable[[np.ndarray, int], np.ndarray]
"""Beliefs [n, M, S] under each model, and the stage -> a score [n, A] of every action."""


class BeliefPolicy(Policy):
    """The action of the highest score, lowest index among ties; the state is the beliefs at the histories."""

    def score(self, env: BeliefEnvironment) -> Score:
        """The scores of one task, computed from its models before the first stage."""
        raise NotImplementedError

    def init(self, tasks: Sequence[PolicyTask]) -> tuple[list[BeliefEnvironment], list[Score], np.ndarray | None]:
        environments = [_belief_environment(task) for task in tasks]
        scores = {id(env): self.score(env) for env in {id(env): env for env in environments}.values()}
        return environments, [scores[id(env)] for env in environments], None

    def step(self, state, observation: Observation):
        environments, scores, before = state
        beliefs = np.zeros((len(observation), *environments[0].rho.shape))
        actions = np.zeros(len(observation), int)
        for i, env in enumerate(environments):
            rows = np.flatnonzero(observation.task == i)
            beliefs[rows] = (
                env.rho if observation.stage == 0 else _updated(env, before[observation.parent[rows]], observation, rows)
            )
            score = scores[i](beliefs[rows], observation.stage)
            if observation.legal is not None:
                score = np.where(observation.legal[rows], score, -np.inf)
            actions[rows] = score.argmax(-1)
        return (environments, scores, beliefs), one_hot(actions, environments[0].num_actions)

    def q_bounds(self, state, observation: Observation):
        environments, scores, beliefs = state
        Q = np.zeros((len(observation), environments[0].num_actions))
        for i, score in enumerate(scores):
            rows = np.flatnonzero(observation.task == i)
            Q[rows] = score(beliefs[rows], observation.stage)
        return Q, Q


def _belief_environment(task: PolicyTask) -> BeliefEnvironment:
    if not isinstance(env := task.known, BeliefEnvironment):
        raise ValueError(f"problem must be a POMDP or an APOMDP for this policy; got {type(env.problem).__name__}")
    return env


def _updated(env: BeliefEnvironment, beliefs: np.ndarray, observation: Observation, rows: np.ndarray) -> np.ndarray:
    """The beliefs [n, M, S] after the last step of these rows, alike under every model."""
    assert observation.action is not None and observation.observation is not None
    a, o = observation.action[rows], observation.observation[rows]
    m = np.zeros_like(a) if observation.model is None else observation.model[rows]
    measure = np.zeros((len(rows), env.num_states))
    for action in np.unique(a):
        taken = a == action
        joint = env.joint(observation.stage - 1, action, beliefs[taken])
        measure[taken] = joint[np.arange(len(joint)), m[taken], o[taken]]
    belief, _ = normalize(measure)
    return np.broadcast_to(belief[:, None], beliefs.shape)


def observed_state_values(problem: APOMDP) -> np.ndarray:
    """Q [H, M, S, A] under each model if the state were observed: V_h = max_a of the alpha-maxmin over the models."""
    M, H, S, A = problem.models.r.shape
    Q, V = np.zeros((H, M, S, A)), np.zeros(S)
    kernels, rewards = np.asarray(problem.models.P), np.asarray(problem.models.r)
    for h in reversed(range(H)):
        Q[h] = rewards[:, h] + kernels[:, h if kernels.shape[1] > 1 else 0] @ V
        best = alpha_maxmin(np.asarray(problem.alpha), Q[h], 0)
        V = (best if problem.models.legal is None else np.where(problem.models.legal[0], best, -np.inf)).max(-1)
    return Q


class QMDP(BeliefPolicy):
    """Action values of the observed state, averaged over the belief (Littman, Cassandra, Kaelbling, 1995).

    Of an APOMDP, alpha-maxmin over the models of these averages.
    """

    knows_problem = HIDDEN

    def score(self, env: BeliefEnvironment) -> Score:
        Q, alpha = observed_state_values(env.apomdp), np.asarray(env.apomdp.alpha)
        return lambda beliefs, stage: alpha_maxmin(alpha, np.einsum("nms,msa->nma", beliefs, Q[stage]), 1)


class LikeliestState(BeliefPolicy):
    """The best action if the likeliest state were the state; of an APOMDP, of the mean of its models and of the beliefs."""

    def score(self, env: BeliefEnvironment) -> Score:
        mean = jax.tree.map(lambda x: np.asarray(x).mean(0, keepdims=True), env.apomdp.models)
        Q = observed_state_values(APOMDP(models=mean, alpha=env.apomdp.alpha))[:, 0]
        return lambda beliefs, stage: Q[stage, beliefs.mean(1).argmax(-1)]


class BestBound(BeliefPolicy):
    """The action with the best certified lower bound, in a problem that is too large for exact action values."""

    def score(self, env: BeliefEnvironment) -> Score:
        assert isinstance(env, BoundedEnvironment | NetEnvironment)
        return lambda beliefs, stage: env.lower_bounds(stage, beliefs)

    def q_bounds(self, state, observation: Observation):
        lower, _ = super().q_bounds(state, observation)
        return lower, None
