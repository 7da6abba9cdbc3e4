"""Models that are drawn from the law of a suite: a sample of the prior.

A random suite whose state is hidden has a law of independent parameters, given the condition on the action gap. They are drawn
by numpy's generators, which are far faster here than those of JAX, and may be drawn again one by one.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from lindm.datasets.generate import BLOCK, draw_block
from lindm.evaluation.environments import double_precision
from lindm.families.random_suites import RandomSuite
from lindm.families.suites import Suite
from lindm.problems.apomdp import around_center, single
from lindm.problems.mdp import over_stages, reward_levels
from lindm.problems.pomdp import noisy_signals
from lindm.types import APOMDP, MDP, POMDP, Problem

STREAM = 2**32 - 1  # of the random keys of models, apart from those of tasks


@lru_cache(maxsize=4)
def draw_models(suite: Suite, count: int, seed: int) -> Problem:
    """`count` problems of the suite as one with a leading axis, in numpy; none is a task of a dataset with the same seed.

    Raises:
      ValueError: the kernel of an MDP changes with the stage, the legal actions depend on the state, or a reward of an MDP on the
        next state.
    """
    with double_precision():
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), STREAM)
        blocks = []
        for first in range(0, count, BLOCK):
            last = min(first + BLOCK, count)
            blocks.append(jax.tree.map(lambda x, n=last - first: np.asarray(x)[:n], draw_block(key, first, last, suite)))
    models: Problem = jax.tree.map(lambda *x: np.concatenate(x), *blocks)
    tables: MDP | POMDP = models.models if isinstance(models, APOMDP) else models
    if tables.legal is not None:
        raise ValueError(f"source must have the same legal actions in all states for this policy; got {suite.name}")
    if not suite.sizes.observations and tables.P.shape[1] > 1:
        raise ValueError(f"source must have one kernel for all stages for this policy; got {suite.name}")
    if not suite.sizes.observations and tables.paid is not None and max(tables.paid.R.shape[-2:]) > 1:
        raise ValueError(f"source must have rewards of state and action alone for this policy; got {suite.name}")
    return models


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The independent parameters of K models of a random suite whose state is hidden.

    C is 1 in a POMDP and 1 + M in an ambiguous problem: of the center, and of the others that are mixed with it.
    """

    P: np.ndarray  # [K, C, S, A, S] rows of kernels
    noise: np.ndarray  # [K, C, A, O] rows of the noise of observations
    r: np.ndarray  # [K, S, A] rewards


def draw_parameters(suite: RandomSuite, count: int, rng: np.random.Generator) -> Parameters:
    """Parameters of `count` models, without the condition on the action gap."""
    S, A, O, M = suite.sizes
    C = 1 + M if M else 1
    if suite.step:
        r = rng.choice(reward_levels(suite.low, suite.high, suite.step), (count, S, A))
    else:
        r = rng.uniform(suite.low, suite.high, (count, S, A))
    return Parameters(
        P=_dirichlet(suite.concentration, (count, C, S, A, S), rng), noise=_dirichlet(1.0, (count, C, A, O), rng), r=r
    )


def redrawn(now: Parameters, fresh: Parameters, share: np.ndarray, rng: np.random.Generator) -> Parameters:
    """Models in which every row and every reward is that of `fresh` with probability `share` [K]."""

    def some(x: np.ndarray, y: np.ndarray, axes: int) -> np.ndarray:
        chosen = rng.random((*x.shape[:axes], *(1,) * (x.ndim - axes))) < share.reshape(-1, *(1,) * (x.ndim - 1))
        return np.where(chosen, y, x)

    return Parameters(P=some(now.P, fresh.P, 4), noise=some(now.noise, fresh.noise, 3), r=some(now.r, fresh.r, 3))


@partial(jax.jit, static_argnames="suite")
def models_of(suite: RandomSuite, parameters: Parameters) -> APOMDP:
    """The models [K, ...] of the suite with these parameters; a POMDP is an ambiguous problem with a single model."""

    def model(own: Parameters) -> APOMDP:
        laws = (jnp.asarray(own.P)[:, None], noisy_signals(jnp.asarray(own.noise), suite.states, suite.quality)[:, None])
        if suite.models:
            laws = tuple(around_center(rows, suite.distance) for rows in laws)
        r, rho = over_stages(jnp.asarray(own.r), suite.horizon), jnp.full(suite.states, 1 / suite.states)
        models = [POMDP(P=P, O=O, r=r, rho=rho) for P, O in zip(*laws, strict=True)]
        if not suite.models:
            return single(models[0])
        return APOMDP(models=jax.tree.map(lambda *x: jnp.stack(x), *models), alpha=jnp.asarray(suite.alpha, r.dtype))

    return jax.vmap(model)(parameters)


def _dirichlet(concentration: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Symmetric Dirichlet rows along the last axis, in logarithms: a small concentration does not underflow."""
    logs = np.log(rng.standard_gamma(concentration + 1, shape)) - rng.standard_exponential(shape) / concentration
    logs -= logs.max(-1, keepdims=True)
    gammas = np.exp(logs)
    return gammas / gammas.sum(-1, keepdims=True)
