r"""Beliefs and histories of an APOMDP: the joint kernel, the belief update, and the numbering of histories.

A history is a sequence of steps (a, m, o): the action, the model that nature took, the observation. A POMDP is an APOMDP with one
model, m = 0. From a belief b over the states under model m, which need not be normalized, a step leads to the joint measure

    b K_m[a, o],      K_m[a, o, s, s'] = P_m[s, a, s'] O_m[a, s', o],

of the observation and the next state. Its mass is the probability of the observation, and divided by its mass it is the next
belief under every model. At the start the belief under model m is rho_m.

Histories of stage t are numbered 0 .. (A M O)^t - 1, the last step most significant: step d = (a M + m) O + o after history i of
stage t makes history i + d (A M O)^t. The histories of one stage are then the fast axis of every array, and no array is permuted.
Tables over all stages hold them stage after stage (`first_history`).

`children`, `normalize`, `update_belief`, `step_index` and `child_history` accept numpy and JAX arrays.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lindm.types import APOMDP, at_stage

# --- the kernel and the update ---------------------------------------------------------------------------------------------


def joint_kernel(problem: APOMDP, t: ArrayLike) -> Array:
    """K [A, M, O, S, S] of stage t: the probability of the observation and the next state. t may be traced."""
    P = jax.vmap(lambda x: at_stage(x, t))(problem.models.P)
    O = jax.vmap(lambda x: at_stage(x, t))(problem.models.O)
    chex.assert_rank([P, O], 4)
    return jnp.einsum("msau,mauo->amosu", P, O)


def stage_rewards(problem: APOMDP, t: ArrayLike) -> Array:
    """r [A, M, S] of stage t."""
    return problem.models.r[:, t].transpose(2, 0, 1)


def children(K: Any, beliefs: Any) -> Any:
    """The joint measures b_m K_m[., o] [..., M, O, S] from beliefs [..., M, S] and kernels K [..., M, O, S, S]."""
    return beliefs.__array_namespace__().einsum("...mosu,...ms->...mou", K, beliefs)


def normalize(measure: Any) -> tuple[Any, Any]:
    """Beliefs [..., S] and masses [...] of measures [..., S]; the belief is zero where the mass is."""
    mass = measure.sum(-1)
    return measure / measure.__array_namespace__().where(mass > 0, mass, 1)[..., None], mass


def update_belief(K: Any, beliefs: Any, a: Any, m: Any, o: Any) -> Any:
    """The belief [M, S] after a step (a, m, o), the same under every model; zero after a step of probability zero.

    Args:
      K: [A, M, O, S, S], the joint kernel of the stage.
      beliefs: [M, S], the belief under each model before the step.
    """
    belief, _ = normalize(beliefs[m] @ K[a, m, o])
    return beliefs.__array_namespace__().broadcast_to(belief, beliefs.shape)


def advance(problem: APOMDP, t: ArrayLike, history: Array, beliefs: Array, a: Array, m: Array, o: Array) -> tuple[Array, Array]:
    """The number of the history and the belief [M, S] after one more step (a, m, o); `problem` and all else may be traced."""
    after = update_belief(joint_kernel(problem, t), beliefs, a, m, o)
    return child_history(problem, t, history, step_index(problem, a, m, o)), after


# --- the numbering of histories ------------------------------------------------------------------------------------------


def branching(problem: APOMDP) -> int:
    """A M O: the number of steps by which a history can continue."""
    return problem.num_actions * problem.num_models * problem.num_observations


def step_index(problem: APOMDP, a: Any, m: Any, o: Any) -> Any:
    """The number (a M + m) O + o of a step."""
    return (a * problem.num_models + m) * problem.num_observations + o


def child_history(problem: APOMDP, t: ArrayLike, history: Any, step: Any) -> Any:
    """The number within stage t + 1 of the history that continues `history` of stage t by `step`. t may be traced."""
    if isinstance(t, int):
        return history + step * branching(problem) ** t
    powers = [branching(problem) ** k for k in range(problem.horizon)]
    # no table contains histories with numbers above 2^31: those may be wrong
    return history + step * jnp.array([p if p < 2**31 else 0 for p in powers], jnp.int32)[t]


def first_history(branches: int, t: int) -> int:
    """The row at which stage t begins in a table over all stages; with t = H, the number of all histories."""
    return (branches**t - 1) // (branches - 1) if branches > 1 else t


def num_histories(problem: APOMDP) -> int:
    """The number of histories of all stages."""
    return first_history(branching(problem), problem.horizon)
