r"""A sample of the posterior over the models of a suite whose state is hidden.

The data of a task are the steps of its demonstrations: the observations given actions (and given the models that nature took),
and the demonstrators' actions where these are data. Models of most suites are drawn from the suite once, for all tasks, and
weighted with the probability of the data (importance sampling). The law of a random suite has independent parameters, and its
posterior is sampled for each task by sequential Monte Carlo. With p_i(model) the probability of datum i among n_i possible ones,
the likelihoods

    L_x(model) = prod_i [ (1 - x) / n_i + x p_i(model) ],      0 <= x <= 1,

lead from the prior (x = 0) to the posterior (x = 1): the data of a source that a uniformly random one replaces with probability
1 - x. They are positive below x = 1 even where the demonstrators are never random. Models of the prior, drawn once for all tasks,
are weighted, resampled and moved at a rising x; each x is the largest at which the weights keep their effective size (Del Moral,
Doucet, Jasra, Sequential Monte Carlo samplers, 2006; Jasra et al., 2011). A move is a Metropolis-Hastings step: some of the rows
and rewards are drawn again from the prior, and the model is accepted with the ratio of L_x if it has the action gap of the suite.

After resampling all weights are equal, which says nothing of the dependence between models. The effective sample size is the
ratio of the variance of f in the sample to the variance of its mean, estimated from the genealogy of the sample (Chan, Lai, 2013;
Lee, Whiteley, Variance estimation in the particle filter, 2018) by

    sum_e ( sum_{k descends from e} w_k (f_k - mean) )^2

over models e of the prior. Copies of a model that have moved apart count as independent, and others as one model. The functions f
are the action values at the histories of the first two stages, less their mean over actions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm.evaluation.environments import double_precision
from lindm.evaluation.policies.bayes_evidence import (
    action_evidence,
    demonstrated_actions,
    normalized_weights,
    observation_probabilities,
)
from lindm.evaluation.policies.prior import Parameters, draw_models, draw_parameters, models_of, redrawn
from lindm.families.random_suites import MAX_CANDIDATES, RandomSuite, action_gap
from lindm.families.suites import Suite
from lindm.problems.apomdp import as_apomdp
from lindm.solvers import tree
from lindm.solvers.belief import branching, first_history
from lindm.solvers.ties import greedy
from lindm.text import Step
from lindm.types import APOMDP, MDP

TABLE_ENTRIES = 1 << 26  # of the tables of best actions of all models of the prior
MOVE_ENTRIES = 1 << 18  # of the tables of best actions that one move of all models computes
FEWEST = 128  # models that are moved, however long their tables
POOL = 4  # models of the prior for each model that is moved
MOVES = 10  # of every model at each x, and as many again at the end
LARGEST_SHARE = 0.5  # of the rows and rewards that a move draws again, in the mean
NEAREST = 1e-6  # of x to 1 where no model explains all data

Demonstrations = Sequence[Sequence[Step]]


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """A weighted sample of the posterior of one task."""

    models: Any  # APOMDP [K, ...]; a POMDP is one with a single model
    weight: np.ndarray  # [K], the sum is 1
    effective: float  # effective sample size
    distinct: int  # models of positive weight that differ from each other
    acceptance: float | None = None  # share of the moves that were accepted; None: there are none


def posterior_size(suite: Suite, samples: int) -> int:
    """The number of models of a sample: `samples`, or fewer where their tables of best actions would be too large."""
    B = suite.sizes.actions * max(suite.sizes.models, 1) * suite.sizes.observations
    histories = first_history(B, suite.horizon)
    if isinstance(suite, RandomSuite):
        return min(samples, max(FEWEST, MOVE_ENTRIES // histories))
    return max(16, min(samples, TABLE_ENTRIES // histories))


def draw_posterior(suite: Suite, demonstrations: Demonstrations, epsilon: float | None, count: int, seed: int) -> Posterior:
    """`count` models of the suite, with weights.

    Args:
      epsilon: the probability with which a demonstrator takes a random action; None: actions are no data.

    Raises:
      ValueError: no model has the action gap of a random suite, or as `draw_models`.
    """
    if isinstance(suite, RandomSuite):
        return _moved_posterior(suite, demonstrations, epsilon, count, seed)
    models, best = _drawn(suite, count, seed)
    with np.errstate(divide="ignore"):
        log_weight = np.log(observation_probabilities(models, demonstrations)).sum(-1)
    if epsilon is not None:
        histories, actions = demonstrated_actions(models, demonstrations)
        log_weight += action_evidence((best[:, histories] == actions).T, epsilon, suite.sizes.actions)
    weight = normalized_weights(log_weight)
    return Posterior(models=models, weight=weight, effective=1 / (weight**2).sum(), distinct=int((weight > 0).sum()))


@lru_cache(maxsize=2)
def _drawn(suite: Suite, count: int, seed: int) -> tuple[APOMDP, np.ndarray]:
    """Models of the suite, and the oracle's actions [K, histories]."""
    with double_precision():
        models = jax.vmap(as_apomdp)(jax.tree.map(jnp.asarray, draw_models(suite, count, seed)))
        return models, np.asarray(solve_models(models)[0])


@jax.jit
def solve_models(models: APOMDP) -> tuple[Array, Array, Array]:
    """The oracle's actions at the histories of all stages, int8 [K, histories]; the advantages [K, n] whose means tell the
    effective sample size; and the action gaps [K] (`lindm.families.random_suites.action_gap`)."""

    def solve(problem: APOMDP) -> tuple[Array, Array, Array]:
        solved = tree.tree(problem)
        early = solved.Q[: first_history(branching(problem), min(2, problem.horizon))]
        advantages = (early - early.mean(-1, keepdims=True)).ravel()
        return greedy(solved.Q, per_row=True).astype(jnp.int8), advantages, action_gap(problem, solved)

    return jax.lax.map(solve, models)


# --- sequential Monte Carlo ---------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Sample:
    """K models, and what they say of the data."""

    parameters: Parameters
    observed: np.ndarray  # [K, n] probabilities of the observations
    misses: np.ndarray  # [K] demonstrated actions that are not the best ones of the model
    advantages: np.ndarray  # [K, n] of `solve_models`
    ancestor: np.ndarray  # [K] number of the model of the prior from which a model descends


def _moved_posterior(
    suite: RandomSuite, demonstrations: Demonstrations, epsilon: float | None, count: int, seed: int
) -> Posterior:
    target = _Target(suite, demonstrations, epsilon)
    rng = np.random.default_rng([seed, *target.digest()])
    sample, x, accepted = target.sample(*_prior(suite, POOL * count, seed), np.arange(POOL * count)), 0.0, []
    while 1 - x > NEAREST:
        x, weight = _next(x, lambda at, s=sample: target.log_likelihood(s, at), count / 2)
        sample = _rows(sample, _resampled(weight, count, rng))
        for _ in range(2 * MOVES if 1 - x <= NEAREST else MOVES):
            sample, accept = _move(target, sample, x, rng)
            accepted.append(accept.mean())
    with double_precision():
        models = models_of(suite, sample.parameters)
    return Posterior(
        models=models,
        weight=np.full(count, 1 / count),
        effective=effective_size(sample.advantages, sample.ancestor),
        distinct=len(np.unique(sample.parameters.P.reshape(count, -1), axis=0)),
        acceptance=float(np.mean(accepted)),
    )


class _Target:
    """The laws of one task that lead from its prior to its posterior."""

    def __init__(self, suite: RandomSuite, demonstrations: Demonstrations, epsilon: float | None):
        self.suite, self.demonstrations, self.epsilon = suite, demonstrations, epsilon
        example = suite.example
        assert not isinstance(example, MDP)
        self.histories, self.actions = demonstrated_actions(as_apomdp(example), demonstrations)

    def digest(self) -> list[int]:
        """Numbers that tell tasks apart."""
        return [step.observation or 0 for steps in self.demonstrations for step in steps] + self.histories.tolist()

    def sample(
        self, parameters: Parameters, models: APOMDP, best: np.ndarray, advantages: np.ndarray, ancestor: np.ndarray
    ) -> _Sample:
        return _Sample(
            parameters=parameters,
            observed=observation_probabilities(models, self.demonstrations),
            misses=(best[:, self.histories] != self.actions).sum(1),
            advantages=advantages,
            ancestor=ancestor,
        )

    def log_likelihood(self, sample: _Sample, x: float) -> np.ndarray:
        """log L_x [K]."""
        n, A = len(self.actions), self.suite.actions
        with np.errstate(divide="ignore"):
            log_L = np.log((1 - x) / self.suite.observations + x * sample.observed).sum(1)
        if self.epsilon is None:
            return log_L
        random = 1 - x * (1 - self.epsilon)  # the probability of a random action
        miss = sample.misses * np.log(random / A) if random else np.where(sample.misses, -np.inf, 0.0)
        return log_L + (n - sample.misses) * np.log(1 - random + random / A) + miss


def _move(target: _Target, now: _Sample, x: float, rng: np.random.Generator) -> tuple[_Sample, np.ndarray]:
    """The sample after one move, and which models [K] have changed."""
    K, suite = len(now.misses), target.suite
    parts = sum(int(np.prod(rows.shape[1:4])) for rows in (now.parameters.P, now.parameters.noise[..., 0], now.parameters.r))
    share = LARGEST_SHARE * (LARGEST_SHARE * parts) ** -rng.random(K)  # from half of the parameters down to one of them
    parameters = redrawn(now.parameters, draw_parameters(suite, K, rng), share, rng)
    models, best, advantages, allowed = _solved(suite, parameters)
    proposed = target.sample(parameters, models, best, advantages, now.ancestor)
    before, after = target.log_likelihood(now, x), target.log_likelihood(proposed, x)
    accept = allowed & (after > -np.inf) & (np.log1p(-rng.random(K)) < after - before)

    def either(new: np.ndarray, old: np.ndarray) -> np.ndarray:
        return np.where(accept.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(either, proposed, now), accept


def _solved(suite: RandomSuite, parameters: Parameters) -> tuple[APOMDP, np.ndarray, np.ndarray, np.ndarray]:
    """Models, best actions, advantages, and which models [K] have the action gap of the suite."""
    with double_precision():
        models = models_of(suite, parameters)
        best, advantages, gap = map(np.asarray, solve_models(models))
    return jax.tree.map(np.asarray, models), best, advantages, gap >= suite.gap * (1 - 1e-9)


@lru_cache(maxsize=2)
def _prior(suite: RandomSuite, count: int, seed: int) -> tuple[Parameters, APOMDP, np.ndarray, np.ndarray]:
    """`count` models that have the action gap of the suite: parameters, models, best actions, advantages."""
    rng, kept, found = np.random.default_rng([seed, count]), [], 0
    for _ in range(MAX_CANDIDATES):
        parameters = draw_parameters(suite, count // POOL, rng)
        *solved, allowed = _solved(suite, parameters)
        kept.append(_rows((parameters, *solved), np.flatnonzero(allowed)[: count - found]))
        found += len(kept[-1][-1])
        if found == count:
            return jax.tree.map(lambda *x: np.concatenate(x), *kept)
    raise ValueError(f"gap must be so small, for this policy, that more than one in a thousand models has it; got {suite.gap}")


def _rows(tree: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda x: x[rows], tree)


def _next(x: float, log_likelihood: Callable[[float], np.ndarray], enough: float) -> tuple[float, np.ndarray]:
    """The largest x up to 1 at which the weights have the effective size `enough`, and the weights [K]."""
    before = log_likelihood(x)

    def weights(at: float) -> tuple[bool, np.ndarray]:
        log_weight = log_likelihood(at) - before
        weight = normalized_weights(log_weight)
        return bool(np.isfinite(log_weight).any() and enough * (weight**2).sum() <= 1), weight

    sufficient, weight = weights(1.0)
    if sufficient:
        return 1.0, weight
    low, high = x, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if weights(middle)[0] else (low, middle)
    x = high if low == x else low  # a step that is too large where none is small enough
    return x, weights(x)[1]


def _resampled(weight: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers [count] of models that are drawn with these weights, by systematic resampling."""
    sums = np.cumsum(weight)
    return np.searchsorted(sums / sums[-1], (np.arange(count) + rng.random()) / count, side="right")


def effective_size(values: np.ndarray, ancestor: np.ndarray) -> float:
    """Effective size of a sample of equal weights, by its genealogy: between 1 and K.

    Args:
      values: [K, n] functions of the models; their variances relative to those of independent models are averaged.
      ancestor: [K]
    """
    K, values = len(values), values - values.mean(0)
    variance = (values**2).mean(0)
    families = np.unique(ancestor, return_inverse=True)[1]
    sums = np.zeros((families.max() + 1, values.shape[1]))
    np.add.at(sums, families, values / K)
    varies = variance > 1e-24
    if len(sums) == 1 or not varies.any():
        return 1.0
    # the deviations of all families sum to zero, so their squares are too small by this factor
    ratio = ((sums**2).sum(0)[varies] / variance[varies]).mean() * len(sums) / (len(sums) - 1)
    return float(np.clip(1 / ratio, 1, K))
