"""The posterior over models where the state is hidden, and planning with it (`lindm.evaluation.policies.bayes_policies`).

The posterior given the demonstrations is a weighted sample of models for each task (`lindm.evaluation.policies.posterior`). A
history continues the weights: with w_k of model k before the episode and U_k(h) its unnormalized belief at history h, the weight
of model k at h is w_k |U_k(h)|.

A mixture of POMDPs is a POMDP, whose hidden state is the model and the state. Its optimal policy on all histories,

    Q(h, a) = sum_k w_k U_k(h) . r_k(., a) + sum_o max_a' Q(h a o, a'),

is the Bayes-optimal one for the sample. The alpha-maxmin criterion of an ambiguous problem has no such mixture: there the action
values of the models are averaged with their weights. What nature's choices tell of the model is not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm.evaluation.environments import BeliefEnvironment, PolicyTask, double_precision
from lindm.evaluation.policies.posterior import Posterior, draw_posterior, posterior_size
from lindm.evaluation.policy import Observation, Policy
from lindm.families.suites import Suite
from lindm.solvers import tree
from lindm.solvers.belief import branching, child_history, first_history, joint_kernel, stage_rewards, step_index
from lindm.solvers.ties import greedy
from lindm.types import APOMDP

Plan = Literal["mixture", "average", "thompson"]


@dataclass(frozen=True, kw_only=True)
class _Rows:
    environments: list[BeliefEnvironment]
    posteriors: list[Posterior]  # of each task
    tables: list[tuple[np.ndarray, ...]]  # of each task: probabilities and values [histories, A], effective sizes [histories]
    index: np.ndarray  # [n] number of the history within its stage
    effective: np.ndarray  # [n]
    Q: np.ndarray  # [n, A]


class HiddenPosterior(Policy):
    """Plans with a sample of the posterior over the models of a suite whose state is hidden.

    Args:
      epsilon: of the demonstrators, whose actions are data; None: they are not.
      samples: models of the sample, fewer where they have long tables of best actions.
      thompson: choose by the weight of the models for which an action is the best.
    """

    def __init__(self, suite: Suite, *, epsilon: float | None, samples: int, seed: int, thompson: bool = False):
        self.suite, self.epsilon, self.seed = suite, epsilon, seed
        self.samples = posterior_size(suite, samples)
        self.plan: Plan = "thompson" if thompson else "average" if suite.sizes.models else "mixture"

    def init(self, tasks: Sequence[PolicyTask]) -> _Rows:
        environments, posteriors, tables = [], [], []
        for task in tasks:
            if not isinstance(env := task.known, BeliefEnvironment) or env.bounded:
                raise ValueError("problem must have few enough histories for exact values: this policy needs them")
            environments.append(env)
        for task in tasks:
            posterior = draw_posterior(self.suite, task.required_demonstrations(), self.epsilon, self.samples, self.seed)
            with double_precision():
                table = _table(posterior.models, jnp.asarray(posterior.weight), self.plan)
            probabilities, values, effective = map(np.asarray, table)
            scale = posterior.effective * (posterior.weight**2).sum()  # equal weights do not mean independent models
            tables.append((probabilities, values, np.maximum(effective * scale, 1)))
            posteriors.append(replace(posterior, models=None))
        none = np.zeros(0)
        return _Rows(
            environments=environments, posteriors=posteriors, tables=tables, index=np.zeros(1, int), effective=none, Q=none
        )

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
        return replace(state, index=index, effective=effective, Q=Q), probabilities

    def q_bounds(self, state: _Rows, observation: Observation):
        return state.Q, state.Q


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
