"""The posterior over models where the state is hidden, and policies that plan with it (`lindm.evaluation.policies.bayes`).

Models are drawn from the suite once, for all tasks, and weighted for each task with the probability of its demonstrations: of the
observations given actions (and given the models that nature took), and of the demonstrators' actions where these are data. A
history continues the weights: with w_k of model k before the episode and U_k(h) its unnormalized belief at history h, the weight
of model k at h is w_k |U_k(h)|.

A mixture of POMDPs is a POMDP, whose hidden state is the model and the state. Its optimal policy on all histories,

    Q(h, a) = sum_k w_k U_k(h) . r_k(., a) + sum_o max_a' Q(h a o, a'),

is the Bayes-optimal one for the sample. The alpha-maxmin criterion of an ambiguous problem has no such mixture: there the action
values of the models are averaged with their weights. What nature's choices tell of the model is not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm.evaluation.environments import BeliefEnvironment, PolicyTask, double_precision
from lindm.evaluation.policies.bayes_evidence import action_evidence, normalized_weights
from lindm.evaluation.policies.prior import draw_models
from lindm.evaluation.policy import Observation, Policy
from lindm.families.suites import Suite
from lindm.problems.apomdp import as_apomdp
from lindm.solvers import tree
from lindm.solvers.belief import branching, child_history, first_history, joint_kernel, stage_rewards, step_index
from lindm.solvers.ties import greedy
from lindm.types import APOMDP

TABLE_ENTRIES = 1 << 26  # of the tables of best actions of all models

Plan = Literal["mixture", "average", "thompson"]


@dataclass(frozen=True, kw_only=True)
class _Rows:
    environments: list[BeliefEnvironment]
    tables: list[tuple[np.ndarray, ...]]  # of each task: probabilities and values [histories, A], effective sizes [histories]
    index: np.ndarray  # [n] number of the history within its stage
    effective: np.ndarray  # [n]
    Q: np.ndarray  # [n, A]


class HiddenPosterior(Policy):
    """Plans with the posterior over sampled models of a suite whose state is hidden.

    Args:
      epsilon: of the demonstrators, whose actions are data; None: they are not.
      samples: models drawn, fewer where the tables of their best actions would be too large.
      thompson: choose by the weight of the models for which an action is the best.
    """

    def __init__(self, suite: Suite, *, epsilon: float | None, samples: int, seed: int, thompson: bool = False):
        B = suite.sizes.actions * max(suite.sizes.models, 1) * suite.sizes.observations
        self.suite, self.epsilon, self.seed = suite, epsilon, seed
        self.samples = max(16, min(samples, TABLE_ENTRIES // first_history(B, suite.horizon)))
        self.plan: Plan = "thompson" if thompson else "average" if suite.sizes.models else "mixture"

    def init(self, tasks: Sequence[PolicyTask]) -> _Rows:
        environments = []
        for task in tasks:
            if not isinstance(env := task.known, BeliefEnvironment) or env.bounded:
                raise ValueError("problem must have few enough histories for exact values, for this policy")
            environments.append(env)
        models = _models(self.suite, self.samples, self.seed)
        tables = []
        with double_precision():
            for task in tasks:
                weight = normalized_weights(self._evidence(models, task))
                tables.append(tuple(map(np.asarray, _table(models, jnp.asarray(weight), self.plan))))
        none = np.zeros(0)
        return _Rows(environments=environments, tables=tables, index=np.zeros(1, int), effective=none, Q=none)

    def step(self, state: _Rows, observation: Observation) -> tuple[_Rows, np.ndarray]:
        index = np.zeros(len(observation), int)
        if observation.stage:
            env = state.environments[0]
            m = 0 if observation.model is None else observation.model
            taken = step_index(env.apomdp, observation.action, m, observation.observation)
            index = child_history(env.apomdp, observation.stage - 1, state.index[observation.parent], taken)
        at = first_history(state.environments[0].branching, observation.stage) + index
        rows = [[table[at[row]] for table in state.tables[task]] for row, task in enumerate(observation.task)]
        probabilities, Q, effective = (np.array(parts) for parts in zip(*rows, strict=True))
        return _Rows(environments=state.environments, tables=state.tables, index=index, effective=effective, Q=Q), probabilities

    def q_bounds(self, state: _Rows, observation: Observation):
        return state.Q, state.Q

    def _evidence(self, models: APOMDP, task: PolicyTask) -> np.ndarray:
        """Log probability [K] of the demonstrations under each model."""
        P, O, rho = (np.asarray(getattr(models.models, name)) for name in ("P", "O", "rho"))
        env = task.known
        assert isinstance(env, BeliefEnvironment)
        K, B, A = len(P), env.branching, env.num_actions
        log_p, best = np.zeros(K), []
        table = None if self.epsilon is None else _best_actions(self.suite, self.samples, self.seed)
        for steps in task.required_demonstrations():
            belief, history = rho[:, 0], 0
            for t, step in enumerate(steps):
                m, o, a = step.model or 0, step.observation, step.action
                if table is not None:
                    best.append(table[:, first_history(B, t) + history] == a)
                belief = rho[:, m] if t == 0 else belief
                kernel, signal = P[:, m, min(t, P.shape[2] - 1), :, a], O[:, m, min(t, O.shape[2] - 1), a, :, o]
                joint = np.einsum("ks,ksu->ku", belief, kernel) * signal
                mass = joint.sum(-1)
                with np.errstate(divide="ignore"):
                    log_p += np.log(mass)
                belief = joint / np.where(mass > 0, mass, 1)[:, None]
                history = int(child_history(env.apomdp, t, history, step_index(env.apomdp, a, m, o)))
        return log_p if self.epsilon is None else log_p + action_evidence(np.array(best), self.epsilon, A)


def _models(suite: Suite, count: int, seed: int) -> APOMDP:
    """Drawn models as ambiguous problems [K, ...]: a POMDP is one with a single model."""
    with double_precision():
        return jax.vmap(as_apomdp)(jax.tree.map(jnp.asarray, draw_models(suite, count, seed)))


@lru_cache(maxsize=2)
def _best_actions(suite: Suite, count: int, seed: int) -> np.ndarray:
    """The oracle's action of every model at every history of all stages, int8 [K, histories]."""

    @jax.jit
    def solve(models: APOMDP) -> Array:
        return jax.lax.map(lambda problem: greedy(tree.tree(problem).Q, per_row=True).astype(jnp.int8), models)

    with double_precision():
        return np.asarray(solve(_models(suite, count, seed)))


@partial(jax.jit, static_argnames="plan")
def _table(models: APOMDP, weight: Array, plan: Plan) -> tuple[Array, Array, Array]:
    """Action probabilities and values [histories of all stages, A], and effective sample sizes [histories]."""
    example = jax.tree.map(lambda x: x[0], models)
    H, A, B = example.horizon, example.num_actions, branching(example)

    def parts(problem: APOMDP, w: Array) -> list[Any]:
        """Of one model: w |U(h)| and w |U(h)| times a value of each action, stage by stage."""
        K, values = [joint_kernel(problem, t) for t in range(H - 1)], []
        Q = None if plan == "mixture" else tree.tree(problem).Q
        U = problem.models.rho[:, :, None]  # [M, S, 1], alike under every model after the first stage
        for t in range(H):
            mass = U[0].sum(0)
            if Q is None:
                value = jnp.einsum("as,sn->na", stage_rewards(problem, t)[:, 0], U[0])
            else:
                at = tree.Tree(Q=Q)
                own = tree.stage_Q(at, t, B)
                value = mass[:, None] * (jax.nn.one_hot(greedy(own, per_row=True), A) if plan == "thompson" else own)
            values.append((w * mass, (w * mass) ** 2, w * value))
            if t < H - 1:
                after = jnp.einsum("amosu,msn->uamon", K[t], jnp.broadcast_to(U, (example.num_models, *U.shape[1:])))
                U = after.reshape(1, example.num_states, -1)
        return values

    def add(total: list[Any], model: tuple[APOMDP, Array]) -> tuple[list[Any], None]:
        def added() -> list[Any]:
            return jax.tree.map(jnp.add, total, parts(*model))

        return jax.lax.cond(model[1] > 0, added, lambda: total), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(parts, example, weight[0]))
    stages, _ = jax.lax.scan(add, zero, (models, weight))
    probabilities, values, effective, V = [], [], [], None
    for t in reversed(range(H)):
        mass, squares, value = stages[t]
        if V is not None:
            value = value + V.reshape(A, -1, B**t).sum(1).T
        if plan == "mixture":
            V = value.max(-1)
        value = value / jnp.where(mass > 0, mass, 1)[:, None]
        best = jax.nn.one_hot(greedy(value, per_row=True), A)
        probabilities.append(jnp.where(mass[:, None] > 0, value, 1 / A) if plan == "thompson" else best)
        values.append(value)
        effective.append(mass**2 / jnp.where(squares > 0, squares, 1))
    return jnp.concatenate(probabilities[::-1]), jnp.concatenate(values[::-1]), jnp.concatenate(effective[::-1])
