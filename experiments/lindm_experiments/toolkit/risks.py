"""Exact risk of the trained layer for a feature law of your own, as a table over training and test lengths."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lindm import validate
from lindm.errors import UsageError, unknown
from lindm.evaluation.environments import double_precision
from lindm.icl.feature_laws import FeatureLaw, Mixture, Table, gaussian, onehot
from lindm.io.tables import format_table
from lindm_experiments.lib.feature_laws import fourth, moment
from lindm_theory import in_context
from lindm_theory.moments import design_fourth, design_moment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPLICATES = 200  # of the bootstrap
FAR = 8  # standard errors between a moment that a law knows and that of its samples, beyond which a warning says so
MOMENT_ENTRIES = 10_000_000  # of the products of samples that are in memory for it
SINGULAR = 1e-10  # eigenvalue of a pair's covariance, relative, below which the balance length is not computed
LAWS = ("gaussian", "onehot")
NamedLaw = Literal["gaussian", "onehot"]


@dataclass(frozen=True, kw_only=True)
class Risk:
    """E (x_q'A_N S_M - x_q'w)^2 for n training lengths N and m test lengths M; test contexts follow the law of the training.

    The smallest risk for a given M is at N = M. That is a statement about the error of Qhat, not about the policy.

    >>> table = ld.theory.risk([[1.0]], train_lengths=[8], test_lengths=[8, 16])
    >>> table.best_train_lengths.tolist(), table.samples is None
    ([8, 16], True)
    """

    law: str  # name of the law of the features
    samples: int | None  # features from which unknown moments were estimated; None: all moments are exact
    noise: float  # standard deviation of the label noise
    covariance: np.ndarray  # [d, d] Lambda = E[x x']
    task_covariance: np.ndarray  # [d, d] Psi = E[w w']
    fourth_moment: np.ndarray  # [d, d] K = E[x x' Psi x x']
    train_lengths: np.ndarray  # [n] int
    test_lengths: np.ndarray  # [m] int
    estimation: np.ndarray  # [n, m], falls as 1/M
    bias: np.ndarray  # [n, m], the same for all M
    standard_error: np.ndarray | None  # [n, m] of the total, by the bootstrap; None where the moments are exact
    general_bound: np.ndarray  # [n, m], valid for every law
    paper_bound: np.ndarray | None  # [n, m], eq. (6); None where it does not apply
    paper_bound_reason: str  # why it does not apply; empty where it does
    balance_lengths: np.ndarray | None  # [m] real N with bias = estimation; None if the covariance of a pair is singular

    @property
    def total(self) -> np.ndarray:
        """The risk [n, m] = estimation + bias."""
        return self.estimation + self.bias

    @property
    def best_train_lengths(self) -> np.ndarray:
        """[m]: the N with the smallest risk among all N, which is N = M."""
        return self.test_lengths

    @property
    def best_given_train_lengths(self) -> np.ndarray:
        """[m]: the N with the smallest risk among `train_lengths`."""
        return self.train_lengths[self.total.argmin(0)]

    def as_json(self) -> dict[str, Any]:
        """Numbers, texts, lists and None alone: what `lindm theory risk --json` prints."""

        def cells(values: np.ndarray | None) -> list[float | None]:
            return [None] * self.total.size if values is None else values.ravel().tolist()

        pairs = [(N, M) for N in self.train_lengths.tolist() for M in self.test_lengths.tolist()]
        names = ("risk", "estimation", "bias", "standard_error", "paper_bound", "general_bound")
        fields = (self.total, self.estimation, self.bias, self.standard_error, self.paper_bound, self.general_bound)
        columns = zip(*map(cells, fields), strict=True)
        rows = [
            {"train_length": N, "test_length": M, **dict(zip(names, row, strict=True))}
            for (N, M), row in zip(pairs, columns, strict=True)
        ]
        balance = [None] * len(self.test_lengths) if self.balance_lengths is None else self.balance_lengths.tolist()
        best = zip(
            self.test_lengths.tolist(),
            balance,
            self.best_train_lengths.tolist(),
            self.best_given_train_lengths.tolist(),
            strict=True,
        )
        keys = ("test_length", "balance_train_length", "best_train_length", "best_given_train_length")
        return {
            "law": self.law,
            "moments": "exact" if self.samples is None else "estimated",
            "samples": self.samples,
            "d": len(self.covariance),
            "noise": self.noise,
            "paper_bound_applies": self.paper_bound is not None,
            "paper_bound_reason": self.paper_bound_reason or None,
            "rows": rows,
            "best": [dict(zip(keys, row, strict=True)) for row in best],
        }

    def __str__(self) -> str:
        """The tables over training and test lengths, as `lindm theory risk` prints them."""
        moments = "exact" if self.samples is None else f"estimated from {self.samples} samples; SE is their standard error"
        about = self.as_json()
        header = ["N", "M", "risk", "estimation", "bias", "general bound", "eq. (6)", "SE"]
        rows = [header]
        for cell in about["rows"]:
            names = ("risk", "estimation", "bias", "general_bound", "paper_bound", "standard_error")
            values = ["-" if cell[name] is None else f"{cell[name]:.4g}" for name in names]
            rows.append([str(cell["train_length"]), str(cell["test_length"]), *values])
        kept = [i for i in range(len(header)) if i == 0 or any(row[i] != "-" for row in rows[1:])]
        lengths = [["M", "N where bias = estimation", "best N", "best of the given N"]]
        for cell in about["best"]:
            balance = cell["balance_train_length"]
            line = "-" if balance is None else f"{balance:.4g}"
            lengths.append([str(cell["test_length"]), line, str(cell["best_train_length"]), str(cell["best_given_train_length"])])
        return "\n".join(
            [
                f"features  {self.law}, d = {len(self.covariance)}, label noise {self.noise:g}; moments {moments}",
                f"eq. (6)   {f'does not apply: {self.paper_bound_reason}' if self.paper_bound_reason else 'applies'}",
                "",
                format_table([[row[i] for i in kept] for row in rows]),
                "",
                format_table(lengths),
                "",
                "The best N minimizes the squared error of Qhat; the policy may lose least at another N.",
            ]
        )

    def plot(self, path: str | Path | None = None) -> "Figure":
        """The risk over (N, M), and along M with its bounds: a figure for a notebook, and a file (its ending is the format)."""
        from lindm_experiments.toolkit.result_plots import render, risk_figure

        return render(lambda: risk_figure(self), path)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Lambda and K(Psi) of a law, with replicates of the bootstrap where they were estimated."""

    Lambda: Array  # [d, d]
    K: Array  # [d, d]
    samples: int | None = None
    replicates: tuple[Array, Array] | None = None  # Lambda and K [b, d, d] each


def sampled_moments(x: Array, Psi: Array | None, seed: int, known: Array | None = None) -> Moments:
    """Moments of the law of the samples x [n, d]. Psi None: the identity. `known`: Lambda, where the law knows it."""
    Psi = jnp.eye(x.shape[1]) if Psi is None else Psi
    n = len(x)
    chances = np.full(n, 1 / n)
    drawn = np.random.default_rng(seed).multinomial(n, chances, size=REPLICATES) / n

    def moments(weights: Array) -> tuple[Array, Array]:
        return design_moment(x, weights) if known is None else known, design_fourth(x, weights, Psi)

    Lambda, K = moments(jnp.asarray(chances))
    return Moments(Lambda=Lambda, K=K, samples=n, replicates=jax.lax.map(moments, jnp.asarray(drawn)))


def moments_of(law: FeatureLaw, Psi: Array | None, samples: int, seed: int) -> Moments:
    """The moments of a law: those it knows, and for the rest those of samples."""
    if isinstance(law, Mixture):
        Lambda = moment(law)
        return Moments(Lambda=jnp.asarray(Lambda), K=fourth(law, jnp.eye(len(Lambda)) if Psi is None else Psi))
    second, power = getattr(law, "second_moment", None), getattr(law, "fourth_moment", None)
    known = None if second is None else validate.covariance(second(), "the second moment of the law")
    if known is not None and power is not None:
        shape = known.shape
        K = power(jnp.eye(len(known)) if Psi is None else Psi)
        K = validate.shaped(validate.finite(K, "the fourth moment of the law"), shape, "the fourth moment of the law", "d, d")
        _warn_of_wrong_moments(law, known, np.asarray(K), Psi, samples, seed)
        return Moments(Lambda=jnp.asarray(known, float), K=jnp.asarray(K, float))
    x = law.sample(jax.random.key(seed), (samples,))
    x = validate.shaped(validate.finite(x, "the samples of the law"), (samples, None), "the samples of the law", "n, d")
    return sampled_moments(jnp.asarray(x, float), Psi, seed, None if known is None else jnp.asarray(known, float))


def _warn_of_wrong_moments(
    law: FeatureLaw, second: np.ndarray, fourth: np.ndarray, Psi: Array | None, samples: int, seed: int
) -> None:
    """Warn where the moments that a law knows are far from those of its samples: the risk would be wrong, even negative."""
    d = len(second)
    n = min(samples, max(1000, MOMENT_ENTRIES // d**2))
    x = np.asarray(law.sample(jax.random.key(seed), (n,)), float)
    outer = x[:, :, None] * x[:, None, :]
    weight = np.einsum("ni,ij,nj->n", x, np.eye(d) if Psi is None else np.asarray(Psi), x)
    for name, given, drawn in (("second_moment", second, outer), ("fourth_moment", fourth, outer * weight[:, None, None])):
        mean, error = drawn.mean(0), drawn.std(0) / np.sqrt(n) + 1e-9 * np.abs(given).max()
        z = np.abs(mean - given) / error
        if z.max() > FAR:
            i, j = np.unravel_index(z.argmax(), z.shape)
            there = f"entry ({i}, {j}) is {given[i, j]:.4g}, and {mean[i, j]:.4g} +- {error[i, j]:.2g} in {n} samples"
            warnings.warn(f"{name} of the law disagrees with its samples, so the risk may be wrong: {there}", stacklevel=4)


def name_of(law: FeatureLaw) -> str:
    """gaussian for a mixture of one centered row, the number of vectors of a table, else the name of its class."""
    if isinstance(law, Mixture) and len(law.design) == 1 and not np.any(law.phi):
        return "gaussian"
    if isinstance(law, Table):
        return f"{len(law.design)} feature vectors"
    return type(law).__name__


def _law(covariance: ArrayLike | None, law: NamedLaw | FeatureLaw, features: ArrayLike | None) -> tuple[str, FeatureLaw | Array]:
    """Name of the law, and the law or the samples of it."""
    if features is not None or not isinstance(law, str):
        what = "features" if features is not None else "a law of your own"
        if covariance is not None:
            raise UsageError(f"covariance must be left out with {what}, since the features have a covariance of their own")
        if features is None:
            if isinstance(law, type) or not callable(getattr(law, "sample", None)):
                raise UsageError(f"law must be one of {', '.join(LAWS)}, or have a method sample(key, shape); got {law!r}")
            return name_of(law), law  # pyright: ignore
        if law != "gaussian":
            raise UsageError(f"law does not apply to features; got {law!r}")
        x = validate.shaped(validate.finite(features, "features"), (None, None), "features", "n, d")
        if len(x) <= x.shape[1]:
            raise UsageError(f"features must have more samples than dimensions, n > d = {x.shape[1]}; got n = {len(x)}")
        return "samples", jnp.asarray(x, float)
    if law not in LAWS:
        raise UsageError(unknown("law", law, LAWS))
    if covariance is None:
        raise UsageError("covariance, features or a law of your own must be given")
    if law == "gaussian":
        return law, gaussian(validate.covariance(covariance, "covariance"))
    rho = np.diagonal(validate.covariance(covariance, "covariance"))
    off = np.abs(np.asarray(covariance) - np.diag(rho)).max()
    if off > 0 or abs(rho.sum() - 1) > validate.SUM_TOLERANCE:
        rule = "covariance of one-hot features must be diagonal with trace 1 (the probabilities)"
        raise UsageError(f"{rule}; got trace {rho.sum():.6g} and entries up to {off:.3g} beside the diagonal")
    return law, onehot(rho)


def _lengths(values: Sequence[int], name: str) -> np.ndarray:
    if isinstance(values, str) or not np.iterable(values) or not len(values):
        raise UsageError(f"{name} must be a list of at least one number of pairs; got {values!r}")
    return np.array([validate.count(value, name) for value in values])


def risk(
    covariance: ArrayLike | None = None,
    *,
    train_lengths: Sequence[int],
    test_lengths: Sequence[int],
    task_covariance: ArrayLike | None = None,
    noise: float = 0.0,
    law: NamedLaw | FeatureLaw = "gaussian",
    features: ArrayLike | None = None,
    samples: int = 20_000,
    seed: int = 0,
) -> Risk:
    """Exact risk of the trained layer A_N on test prompts of M pairs, with its bounds, its balance line and its best N.

    Args:
      covariance: [d, d], Lambda = E[x x'] of Gaussian features, or of one-hot features (diagonal, the probabilities).
      train_lengths: pairs N in a training prompt, n numbers of at least 1.
      test_lengths: pairs M in a test prompt, m numbers of at least 1.
      task_covariance: [d, d], Psi = E[w w'] of the tasks; the identity if not given.
      noise: standard deviation of the label noise.
      law: gaussian, onehot, or a law of your own (`ld.icl.FeatureLaw`), which has no `covariance` here.
      features: [n, d], samples of the features in place of a law. Moments are then estimates, with a standard error.
      samples: features drawn from a law of your own that does not know its moments.
      seed: of these samples and of the bootstrap.

    Returns:
      A `Risk` with arrays [n, m].

    Raises:
      ValueError: an argument breaks its rule: a matrix that is not square, symmetric and positive definite, or of another size
        than the features, a number that is not finite, a length below 1.

    >>> ld.theory.risk([[4.0, 0], [0, 1.0]], train_lengths=[20], test_lengths=[5]).total.round(3).tolist()
    [[2.259]]
    """
    validate.nonnegative(noise, "noise")
    validate.count(samples, "samples", 2)
    N, M = _lengths(train_lengths, "train_lengths"), _lengths(test_lengths, "test_lengths")
    with double_precision():
        name, source = _law(covariance, law, features)
        Psi = None if task_covariance is None else jnp.asarray(validate.covariance(task_covariance, "task_covariance"), float)
        d = source.shape[1] if isinstance(source, Array) else source.sample(jax.random.key(0), (1,)).shape[-1]
        if Psi is not None:
            validate.shaped(Psi, (d, d), "task_covariance", "d, d")
        of_law = sampled_moments(source, Psi, seed) if isinstance(source, Array) else moments_of(source, Psi, samples, seed)
        validate.covariance(of_law.Lambda, "the second moment of the features")
        Psi = jnp.eye(d) if Psi is None else Psi
        parts, general, balance, spread = _tables(of_law, Psi, noise, N, M)
        reason = _no_paper_bound(name, Psi, noise)
        paper = None
        if not reason:
            paper = np.asarray(in_context.paper_bound(of_law.Lambda, M[None, :].astype(float), N[:, None].astype(float)).total)
    return Risk(
        law=name,
        samples=of_law.samples,
        noise=float(noise),
        covariance=np.asarray(of_law.Lambda),
        task_covariance=np.asarray(Psi),
        fourth_moment=np.asarray(of_law.K),
        train_lengths=N,
        test_lengths=M,
        estimation=np.asarray(parts.estimation),
        bias=np.asarray(parts.bias),
        standard_error=spread,
        general_bound=general,
        paper_bound=paper,
        paper_bound_reason=reason,
        balance_lengths=balance,
    )


@jax.jit
def risk_grid(Lambda: Array, K: Array, Psi: Array, noise: float, N: Array, M: Array) -> in_context.Prediction:
    """Both parts of the risk of A_N, [n, m] each, for real lengths N [n] and M [m]."""

    def cell(n: Array, m: Array) -> in_context.Prediction:
        V = noise**2 * Lambda
        return in_context.risk(in_context.optimal_weights(Lambda, Psi, K, n, V), Lambda, Psi, K, m, Lambda, V)

    return jax.vmap(lambda n: jax.vmap(lambda m: cell(n, m))(M))(N)


@jax.jit
def general_bounds(Lambda: Array, K: Array, Psi: Array, noise: float, N: Array, M: Array) -> Array:
    """The general bound [n, m]."""
    first, second = N[:, None], M[None, :]
    return in_context.general_bound(Lambda, Psi, K, second, first, Lambda, noise**2 * Lambda).total


@jax.jit
def balance_lengths(Lambda: Array, K: Array, Psi: Array, noise: float, M: Array) -> tuple[Array, Array]:
    """N [m] at which bias = estimation, and the least eigenvalue of the covariance of a pair, which must be positive for it."""
    V = noise**2 * Lambda
    x, q = in_context.modes(Lambda, Psi, K, Lambda, V)
    least = jnp.linalg.eigvalsh(in_context.pair_variance(Lambda, Psi, K, V))[0]
    return jax.vmap(lambda m: in_context.balance_length(x, q, m))(M), least / jnp.trace(Lambda @ Psi @ Lambda)


@jax.jit
def bootstrap_totals(replicates: tuple[Array, Array], Psi: Array, noise: float, N: Array, M: Array) -> Array:
    """The risk [b, n, m] of every replicate."""
    return jax.lax.map(lambda r: risk_grid(*r, Psi, noise, N, M).total, replicates)


def _tables(of_law: Moments, Psi: Array, noise: float, N: np.ndarray, M: np.ndarray):
    """Parts, general bound [n, m], balance lengths [m] and standard error [n, m]."""
    arrays, lengths = (of_law.Lambda, of_law.K, Psi, noise), (jnp.asarray(N, float), jnp.asarray(M, float))
    balance, least = balance_lengths(*arrays, lengths[1])
    spread = None
    if of_law.replicates is not None:
        spread = np.asarray(bootstrap_totals(of_law.replicates, Psi, noise, *lengths)).std(0, ddof=1)
    kept = np.asarray(balance) if least > SINGULAR else None
    return risk_grid(*arrays, *lengths), np.asarray(general_bounds(*arrays, *lengths)), kept, spread


def _no_paper_bound(law: str, Psi: Array, noise: float) -> str:
    """Why eq. (6) does not apply; empty where it does."""
    if law != "gaussian":
        return f"the features must be Gaussian; got {law}"
    off = float(jnp.abs(Psi - jnp.eye(len(Psi))).max())
    if off > 1e-12:
        return f"the covariance of the tasks must be the identity; got one that differs by up to {off:.3g}"
    return f"labels must have no noise; got standard deviation {noise:g}" if noise else ""
