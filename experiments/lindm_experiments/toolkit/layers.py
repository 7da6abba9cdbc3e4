"""A layer of your own beside the theory of the linear layer: its measured risk, and the loss and the bounds of its policy.

A layer is any `nnx.Module` that maps one `Prompt` to predictions yhat [Q]. The unit is the seed: every seed trains a copy of the
layer on its own draws and tests it on tasks that no training saw, and intervals are Student t over seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from lindm import validate
from lindm.errors import UsageError
from lindm.evaluation.environments import double_precision
from lindm.icl.feature_laws import FeatureLaw
from lindm.icl.label_laws import noisy_labels, oracle_labels
from lindm.icl.prompts import stage_prompts
from lindm.icl.trainer import predict_many, train_many
from lindm.problems.linear_mdp import MDPFamily, tabulate
from lindm.random import flat
from lindm.solvers.rollout import cumulative
from lindm.types import Prompt
from lindm_experiments.harness.statistics import mean_ci
from lindm_experiments.lib import linear_mdps
from lindm_experiments.toolkit.risks import Risk, risk
from lindm_experiments.toolkit.rungs import RUNGS, Case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF_ONE_POLICY = tuple(name for name, rung in RUNGS.items() if not rung.needs)  # the loss and the rungs that need Qhat alone
QUERIES = 8  # in a prompt of the training


def _intervals(columns: np.ndarray) -> np.ndarray:
    """95 % t-intervals over the seeds: [seeds, m] -> [m, 2]."""
    return np.array([mean_ci(column)[1] for column in columns.T])


@dataclass(frozen=True, kw_only=True)
class MeasuredRisk:
    """The risk of trained copies of a layer beside the exact risk of the best linear layer A_N.

    >>> import jax.numpy as jnp
    >>> law, layer = ld.icl.feature_laws.gaussian(jnp.eye(2)), ld.icl.ReducedAttention(2)
    >>> result = ld.measure_risk(layer, law, train_length=8, test_lengths=[8, 32], seeds=3, steps=20, tasks=16)
    >>> result.measured.shape, result.interval.shape, result.losses.shape
    ((3, 2), (2, 2), (3, 20))
    """

    exact: Risk  # of A_N, for the one training length
    measured: np.ndarray  # [seeds, m] mean of (yhat - <x_q, w>)^2 over test tasks
    losses: np.ndarray  # [seeds, steps] of the training

    @property
    def mean(self) -> np.ndarray:
        """[m]: the measured risk."""
        return self.measured.mean(0)

    @property
    def interval(self) -> np.ndarray:
        """[m, 2]: 95 % t-interval over the seeds."""
        return _intervals(self.measured)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Measured points and the exact line along M: a figure for a notebook, and a file (its ending is the format)."""
        from lindm_experiments.toolkit.result_plots import measured_risk_figure, render

        return render(lambda: measured_risk_figure(self), path)


@dataclass(frozen=True, kw_only=True)
class MeasuredLadder:
    """The exact loss of the policies of a layer, and the bounds that hold for every single policy, by rung.

    >>> from lindm.problems.linear_mdp import onehot_family
    >>> sizes = dict(train_length=16, test_length=16, seeds=2, steps=20, tasks=8)
    >>> result = ld.measure_ladder(ld.icl.ReducedAttention(4), onehot_family(2, 2, 2), **sizes)
    >>> result.values["sup_norm"].shape, result.violations["sup_norm"]
    ((2, 8), 0)
    """

    values: dict[str, np.ndarray]  # [seeds, tasks] of "suboptimality" and of every rung, names as in `ld.theory.RUNGS`
    losses: np.ndarray  # [seeds, H, steps] of the training

    @property
    def mean(self) -> dict[str, float]:
        """The mean over tasks and seeds."""
        return {name: float(value.mean()) for name, value in self.values.items()}

    @property
    def interval(self) -> dict[str, tuple[float, float]]:
        """95 % t-interval over the seeds."""
        return {name: mean_ci(value.mean(1))[1] for name, value in self.values.items()}

    @property
    def violations(self) -> dict[str, int]:
        """Policies whose loss is above the bound by more than rounding: zero, if the bound is one."""
        loss = self.values["suboptimality"]
        slack = 1e-9 * max(1.0, float(np.abs(loss).max()))
        return {name: int((loss > value + slack).sum()) for name, value in self.values.items() if name != "suboptimality"}

    def plot(self, path: str | Path | None = None) -> "Figure":
        """The loss and its bounds, seeds as ticks: a figure for a notebook, and a file (its ending is the format)."""
        from lindm_experiments.toolkit.result_plots import ladder_figure, render

        return render(lambda: ladder_figure(self), path)


def _fit(layer: nnx.Module, draw: Callable, keys: Array, steps: int, learning_rate: float, data: tuple = ()):
    """A copy of the layer for every key, trained (steps > 0) or as it is, with losses [R, steps]."""
    if steps:
        return train_many(layer, draw, keys, steps=steps, learning_rate=learning_rate, data=data)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    stacked = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(keys), *a.shape)), params)
    return nnx.merge(graphdef, stacked, rest), np.zeros((len(keys), 0))


def _check(layer: nnx.Module, **counts: int) -> None:
    if not isinstance(layer, nnx.Module):
        raise UsageError(f"layer must be an nnx.Module that maps a Prompt to yhat[Q]; got {type(layer).__name__}")
    for name, value in counts.items():
        validate.count(value, name, {"steps": 0, "seed": 0, "seeds": 2}.get(name, 1))


def measure_risk(
    layer: nnx.Module,
    law: FeatureLaw,
    *,
    train_length: int,
    test_lengths: Sequence[int],
    task_covariance: ArrayLike | None = None,
    noise: float = 0.0,
    seeds: int = 10,
    steps: int = 1000,
    batch: int = 64,
    tasks: int = 512,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> MeasuredRisk:
    """Train copies of a layer on prompts of a feature law and measure their risk beside the exact risk of A_N.

    Tasks are w ~ N(0, Psi), labels <x, w> + noise N(0, 1), fresh at every step.

    Args:
      layer: any `nnx.Module` that maps one `Prompt` to yhat [Q].
      law: of `ld.icl.feature_laws`, or of your own.
      train_length: pairs N in a training prompt.
      test_lengths: pairs M in a test prompt, m numbers.
      task_covariance: [d, d], Psi; the identity if not given.
      seeds: trainings, at least 2.
      steps: of a training; 0 measures the layer as it is.
      batch: prompts of a step.
      tasks: test prompts for every seed and length, each with 8 queries.
      learning_rate: of Adam, as in `ld.icl.train`.

    Raises:
      ValueError: an argument breaks its rule. FloatingPointError: a loss that is not finite.

    >>> layer, law = ld.icl.ReducedAttention(3), ld.icl.feature_laws.onehot([0.5, 0.3, 0.2])
    >>> result = ld.measure_risk(layer, law, train_length=8, test_lengths=[8], steps=200, seeds=3)
    >>> bool(0.9 < result.mean[0] / result.exact.total[0, 0] < 1.1)
    True
    """
    _check(layer, seeds=seeds, steps=steps, batch=batch, tasks=tasks, seed=seed)
    exact = risk(
        law=law,
        train_lengths=[train_length],
        test_lengths=test_lengths,
        task_covariance=task_covariance,
        noise=noise,
        seed=seed,
    )
    root = np.linalg.cholesky(exact.task_covariance)

    def prompts(key: Array, count: int, n: int) -> tuple[Prompt, Array]:
        features, queries, task, labels = jax.random.split(key, 4)
        w = flat(jax.random.normal, task, (count, len(root))) @ jnp.asarray(root, float).T
        x, query = law.sample(features, (count, n)), law.sample(queries, (count, QUERIES))
        y = noisy_labels(labels, x, w, noise) if noise else oracle_labels(x, w)
        return Prompt(x=x, y=y, query=query), oracle_labels(query, w)

    with jax.enable_x64(False):
        training, testing = jax.random.split(jax.random.key(seed))
        draw = lambda key: prompts(key, batch, train_length)  # noqa: E731
        layers, losses = _fit(layer, draw, jax.random.split(training, seeds), steps, learning_rate)
        measured = []
        for M in exact.test_lengths.tolist():
            keys = jax.random.split(jax.random.fold_in(testing, M), seeds)
            test, target = jax.jit(jax.vmap(lambda key, M=M: prompts(key, tasks, M)))(keys)
            measured.append(jnp.mean(jnp.square(jax.jit(predict_many)(layers, test) - target), axis=(1, 2)))
    return MeasuredRisk(exact=exact, measured=np.stack(measured, 1).astype(float), losses=np.asarray(losses))


def measure_ladder(
    layer: nnx.Module,
    family: MDPFamily | Callable[[Array], MDPFamily],
    *,
    train_length: int,
    test_length: int,
    noise: float = 0.0,
    seeds: int = 10,
    steps: int = 1000,
    batch: int = 64,
    tasks: int = 128,
    learning_rate: float = 0.3,
    seed: int = 0,
) -> MeasuredLadder:
    """Train a copy of a layer for every stage of a family of linear MDPs; the exact loss of its policies and their bounds.

    Labels are the oracle's, <x, w*_h> + noise N(0, 1); the policy of a task is greedy in the predictions for all pairs (s, a).
    The arguments that are not listed are those of `measure_risk`.

    Args:
      layer: any `nnx.Module` that maps one `Prompt` to yhat [Q].
      family: of `lindm.problems.linear_mdp`, or a function of a key that draws one: every seed then has its own features.
      train_length, test_length: pairs N and M in the context of a stage.
      tasks: test tasks of every seed.

    Raises:
      ValueError: an argument breaks its rule. FloatingPointError: a loss that is not finite.

    >>> from lindm.problems.linear_mdp import simplex_family
    >>> sizes = dict(train_length=32, test_length=32, seeds=2, steps=50, tasks=16)
    >>> result = ld.measure_ladder(ld.icl.ReducedAttention(3), lambda key: simplex_family(key, 5, 3, 3, 2), **sizes)
    >>> result.mean["suboptimality"] <= result.mean["span_per_stage"] <= result.mean["sup_norm"]
    True
    """
    _check(layer, seeds=seeds, steps=steps, batch=batch, tasks=tasks, seed=seed, train_length=train_length)
    M = validate.count(test_length, "test_length")
    validate.nonnegative(noise, "noise")
    with double_precision():
        features, pools, training, testing = jax.random.split(jax.random.key(seed), 4)
        make = (lambda _: family) if isinstance(family, MDPFamily) else family
        families = [make(key) for key in jax.random.split(features, seeds)]
        if not all(isinstance(f, MDPFamily) for f in families):
            raise UsageError("family must be an MDPFamily or a function of a key that returns one")
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves).astype(float), *families)
        H = stacked.theta_low.shape[1]
        drawn = zip(jax.random.split(pools, seeds), families, strict=True)
        pool = jnp.concatenate([linear_mdps.task_pool(k, f, 2 * linear_mdps.BLOCK) for k, f in drawn])  # [seeds * H, tasks, d]
        repeated = jax.tree.map(lambda a: jnp.repeat(a, H, axis=0), stacked)
        data = linear_mdps.single_precision((repeated, pool, jnp.full(seeds * H, float(noise))))
        draw = linear_mdps.pool_draw(train_length, batch, QUERIES)
        layers, losses = _fit(layer, draw, jax.random.split(training, seeds * H), steps, learning_rate, data)
        keys = jax.random.split(testing, (seeds, tasks))
        cases, prompts = jax.jit(_test_cases, static_argnums=(2, 3))(keys, stacked, M, float(noise))
        dtype = jax.tree.leaves(nnx.state(layers, nnx.Param))[0].dtype
        by_layer = jax.tree.map(lambda a: jnp.swapaxes(a, 1, 2).reshape(seeds * H, tasks, *a.shape[3:]).astype(dtype), prompts)
        Qhat = jax.jit(predict_many)(layers, by_layer).reshape(seeds, H, tasks, *cases.Qstar.shape[3:])
        found = jax.jit(_bounds)(cases, jnp.swapaxes(Qhat, 1, 2).astype(float))
    return MeasuredLadder(
        values={name: np.asarray(found[name]) for name in OF_ONE_POLICY}, losses=np.asarray(losses).reshape(seeds, H, -1)
    )


def _test_cases(keys: Array, families: MDPFamily, M: int, noise: float) -> tuple[Case, Prompt]:
    """Fresh tasks with the prompts of all stages: leading axes [seeds, tasks], the prompts [seeds, tasks, H]."""

    def one(key: Array, family: MDPFamily) -> tuple[Case, Prompt]:
        of_task, of_context = jax.random.split(key)
        problem, plan, w = linear_mdps.draw_oracle(of_task, family)

        def labels(key: Array, _: Array, x: Array) -> Array:
            return noisy_labels(key, x, w, noise) if noise else oracle_labels(x, w)

        prompts = stage_prompts(of_context, family.phi, cumulative(family.design), len(w), M, labels)
        return Case(mdp=tabulate(problem), Qstar=plan.Q, Qhat=plan.Q), prompts

    return jax.vmap(lambda k, f: jax.vmap(lambda key: one(key, f))(k))(keys, families)


def _bounds(cases: Case, Qhat: Array) -> dict[str, Array]:
    def one(case: Case, Qhat: Array) -> dict[str, Array]:
        case = Case(mdp=case.mdp, Qstar=case.Qstar, Qhat=Qhat)
        return {name: RUNGS[name].compute(case) for name in OF_ONE_POLICY}

    return jax.vmap(jax.vmap(one))(cases, Qhat)
