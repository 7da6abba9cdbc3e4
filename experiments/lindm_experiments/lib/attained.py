"""Instances on which the rungs are attained, up to a stated slack, so that a claim fails if its bound is too small.

A bound that is 100 times the truth also holds with a wrong constant. Each family is drawn from a seed and makes the proof's
steps equalities. A record holds, for each bound, the pair [truth, bound]; `lib/rung_mutants.py` draws the same instances again
and evaluates wrong formulas on them. Instances of the margin are in `lib/attained_margin.py`, those of the bounds without an
oracle in `lib/attained_offline.py`.

    flipped      any MDP; Qhat exchanges the two best actions of every state, with errors -e, +e: rungs 1, 1b, 2, 3
    signs        features (1, +-c), H stages of independent decisions: rungs 4, 5 and 6, by the weights and the label noise
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lindm_experiments.harness.statistics import Decision, no_violations
from lindm_theory import concentration, mean_policy, policy_bounds
from lindm_theory.in_context import risk
from lindm_theory.moments import design_fourth, design_moment

SLACK = 0.02  # a strict inequality of a construction is by this share
Floats = NDArray[np.float64]
Pair = list[float]  # [truth, bound]


def generator(seed: int) -> np.random.Generator:
    """The random numbers of the instances of a seed."""
    return np.random.default_rng([2043000, seed])


# --- pairs of a record -------------------------------------------------------------------------------------------------------


def pairs_of(
    instances: dict[str, Any], bounds_of: Callable[[Any], dict[str, Any]], where: dict[str, tuple[str, str]]
) -> dict[str, Pair]:
    """[truth, bound] by name; `where`: name -> (instance, bound among those that `bounds_of` gives for the instance)."""
    bounds = {name: bounds_of(instance) for name, instance in instances.items()}
    return {name: [instances[i].truth, float(bounds[i][bound])] for name, (i, bound) in where.items()}


def ratios(records: list[dict], *names: str) -> list[Floats]:
    """bound / truth of each name, one array over seeds."""
    return [np.array([r["attained"][name][1] / r["attained"][name][0] for r in records]) for name in names]


def none_below(records: list[dict], *names: str) -> Decision:
    """Whether no bound is below its truth (beyond rounding). The instances are exact: one violation refutes."""
    values = np.concatenate(ratios(records, *names))
    return no_violations(int((values < 1 - 1e-9).sum()), values.size, 1.0, seeds=len(records))


# --- MDPs in numpy -----------------------------------------------------------------------------------------------------------


def optimal_values(P: Floats, r: Floats) -> Floats:
    """Q* [H, S, A] of kernels P [H, S, A, S] and rewards r [H, S, A]."""
    Q = np.zeros_like(r)
    V = np.zeros(r.shape[1])
    for h in reversed(range(len(r))):
        Q[h] = r[h] + P[h] @ V
        V = Q[h].max(-1)
    return Q


def value_of(P: Floats, r: Floats, pi: NDArray[np.int64]) -> Floats:
    """V_1 [S] of a policy [H, S]."""
    V, S = np.zeros(r.shape[1]), np.arange(r.shape[1])
    for h in reversed(range(len(r))):
        V = (r[h] + P[h] @ V)[S, pi[h]]
    return V


def occupancy_of(P: Floats, rho: Floats, pi: NDArray[np.int64]) -> Floats:
    """The law of the state at every stage under a policy, [H, S]."""
    d, S = [rho], np.arange(len(rho))
    for h in range(len(P) - 1):
        d.append(d[-1] @ P[h, S, pi[h]])
    return np.array(d)


# --- rungs 1, 1b, 2, 3 -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Flipped:
    """A random MDP, and Qhat with errors -e at the best action and +e at the second best, e a little above half of their gap.

    Greedy takes the second best action everywhere and loses the gap, 2 e. The errors are split into parts of one sign: bias,
    estimation, optimization.
    """

    truth: float
    occupancy: Floats  # [H, S] of the greedy policy
    occupancy_star: Floats  # of the optimal policy
    Qstar: Floats  # [H, S, A]
    Qhat: Floats
    parts: Floats  # [3, H, S, A]: they sum to Qhat - Qstar

    @property
    def D(self) -> Floats:
        return self.Qhat - self.Qstar


def flipped(rng: np.random.Generator, draws: int = 32) -> Flipped:
    """Of so many MDPs the one in which it matters most by which policy, and at which stage, the states are weighted."""

    def share(i: Flipped) -> float:
        e = np.abs(i.D).max(-1)
        others = (i.occupancy_star * e).sum(), (np.roll(i.occupancy, 1, axis=0) * e).sum()
        return max(others) / (i.occupancy * e).sum()

    return min((_flipped(rng) for _ in range(draws)), key=share)


def _flipped(rng: np.random.Generator, H: int = 4, S: int = 5, A: int = 3) -> Flipped:
    P, rho = rng.dirichlet(np.ones(S), (H, S, A)), rng.dirichlet(np.ones(S))
    r = rng.uniform(0, 1, (H, S, A))
    Q = optimal_values(P, r)
    order = np.argsort(-Q, axis=-1)
    best, second = (np.arange(A) == order[..., [k]] for k in (0, 1))
    V, runner_up = np.sort(Q, axis=-1)[..., -1], np.sort(Q, axis=-1)[..., -2]
    e = (V - runner_up)[..., None] / 2 * (1 + SLACK)
    D = e * second - e * best
    pi, pi_star = order[..., 1], order[..., 0]
    return Flipped(
        truth=float(rho @ (value_of(P, r, pi_star) - value_of(P, r, pi))),
        occupancy=occupancy_of(P, rho, pi),
        occupancy_star=occupancy_of(P, rho, pi_star),
        Qstar=Q,
        Qhat=Q + D,
        parts=rng.dirichlet(np.ones(3))[:, None, None, None] * D,
    )


@jax.jit
def _rungs(d, Q, Qhat, bias, estimation, optimization) -> dict[str, jax.Array]:
    by_stage, c = policy_bounds.span_rung(d, Q, Qhat)
    return {
        "span_per_state": policy_bounds.span_statewise_rung(d, Q, Qhat),
        "span_per_stage": by_stage,
        "margin": policy_bounds.margin_rung(d, Q, Qhat, c),
        "sup_norm": policy_bounds.sup_rung(d, Q, Qhat),
        "error_parts": policy_bounds.decomposed_rung(d, bias, estimation, optimization),
    }


# --- rungs 4, 5, 6: one decision a stage -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Signs:
    """A linear MDP with phi(s, a) = (1, +-c_s) and w_h = (0, g_h): the first action is better by 2 c_s g_h at every stage.

    Both actions lead to the state of the largest c, whatever the state, where the first stage starts too. Weights A = diag(0, a),
    so that Qhat_h(s, .) = +-c_s a S_2 and the only error is that of the second coordinate.
    """

    phi: Floats  # [S, 2, 2]
    design: Floats  # [2 S] law of the pairs in a context
    g: Floats  # [H]
    a: float
    noise_bound: float = 0.0
    noise_variance: Floats | float = 0.0  # a number, or [H]
    W: Floats  # [2, 2] the matrix of the norms; a free choice
    M: int = 1
    delta: float = 0.1
    truth: float  # expected loss, or the loss that is exceeded or reached with a probability above delta

    @property
    def flat(self) -> Floats:
        return self.phi.reshape(-1, 2)

    @property
    def A(self) -> Floats:
        return np.broadcast_to(np.diag([0.0, self.a]), (len(self.g), 2, 2))

    @property
    def w(self) -> Floats:
        return np.stack([np.zeros_like(self.g), self.g], 1)

    @property
    def kernel(self) -> Floats:
        H, S = len(self.g), len(self.phi)
        return np.broadcast_to(np.eye(S)[-1], (H, S, 2, S))

    @property
    def gap(self) -> Floats:
        """V* - Q* [H, S, A]."""
        c = self.phi[:, 0, 1]
        return self.g[:, None, None] * np.stack([0 * c, 2 * c], -1)


def sign_features(rng: np.random.Generator, everywhere: bool) -> dict[str, Any]:
    """Features with c = 1 and a larger c, from 1.5 to 3; pairs everywhere or at the second state alone."""
    c = np.array([1.0, rng.uniform(1.5, 3.0)])
    phi = np.stack([np.stack([np.ones(2), sign * c], -1) for sign in (1.0, -1.0)], 1)
    return {"phi": phi, "design": np.full(4, 0.25) if everywhere else np.array([0.0, 0.0, 0.5, 0.5])}


def biased(rng: np.random.Generator, H: int = 3) -> Signs:
    """Weights a little below zero: the error is all bias, and the worse action is taken always."""
    shared = sign_features(rng, everywhere=True)
    g, c = rng.uniform(0.5, 1.5, H), shared["phi"][1, 0, 1]
    second = np.square(shared["phi"][..., 1]).mean()
    W = np.diag([1e6, second])
    return Signs(**shared, g=g, a=-SLACK / second, W=W, M=256, truth=float(2 * c * g.sum()))


def noisy(rng: np.random.Generator, H: int = 3) -> Signs:
    """No bias, one pair, labels off by +-e with e a little above c g: wrong half of the time, E|error| = sqrt(E error^2)."""
    shared = sign_features(rng, everywhere=False)
    c, e = shared["phi"][1, 0, 1], rng.uniform(0.5, 1.5)
    g = np.full(H, e / c / (1 + SLACK))
    W = np.diag([1e6, c**2])
    return Signs(**shared, g=g, a=c**-2, noise_bound=e, noise_variance=e**2, W=W, truth=float(c * g.sum()))


def two_valued(rng: np.random.Generator, H: int = 3) -> Signs:
    """One pair, its label just on the wrong side with probability p and far on the right one otherwise: Cantelli is attained."""
    shared = sign_features(rng, everywhere=False)
    c, p, g = shared["phi"][1, 0, 1], rng.uniform(0.1, 0.15, H), rng.uniform(0.5, 1.5, H)
    low = c * g * (1 + SLACK)  # the label is x2 g - sign(x2) low with probability p
    truth = float((2 * c * g * p).sum())
    return Signs(
        **shared, g=g, a=1.0, noise_bound=float(low.max()), noise_variance=low**2 * p / (1 - p), W=np.eye(2), truth=truth
    )


def shared_context(rng: np.random.Generator, H: int = 3, delta: float = 1e-3, M: int = 4096) -> Signs:
    """Labels off by +-e, one context for all stages, g the largest at which the stages fail together with probability > delta."""
    shared = sign_features(rng, everywhere=False)
    c, e = shared["phi"][1, 0, 1], rng.uniform(0.5, 1.5)
    g = np.full(H, e * reached_sum(M, delta) / M / c)
    W = np.diag([1e6, c**2 / 100])  # any matrix will do: with this one L = 10
    truth = float(2 * c * g.sum())
    return Signs(**shared, g=g, a=c**-2, noise_bound=e, noise_variance=e**2, W=W, M=M, delta=delta, truth=truth)


def reached_sum(M: int, delta: float) -> int:
    """The largest k such that a sum of M signs is at most -k with probability above delta."""
    low = int(stats.binom.ppf(delta * (1 + SLACK), M, 0.5))
    assert stats.binom.cdf(low, M, 0.5) > delta
    return M - 2 * low


@dataclass(frozen=True, kw_only=True)
class Radius:
    """Labels without a signal, off by +-e with probability p and right otherwise: the norm of the error is e |walk| / M."""

    e: float
    p: float
    M: int
    delta: float
    truth: float  # a norm that is reached with probability above delta


def radius(rng: np.random.Generator, p: float, M: int, delta: float) -> Radius:
    e = rng.uniform(0.5, 1.5)
    moves = np.arange(min(M, int(M * p + 40)) + 1) if p < 1 else np.array([M])
    weights = stats.binom.pmf(moves, M, p)
    k = 0
    while sum(w * 2 * stats.binom.cdf((n - k - 1) // 2, n, 0.5) for n, w in zip(moves, weights, strict=True)) > delta:
        k += 1  # P(|walk| >= k + 1) is above delta
    return Radius(e=e, p=p, M=M, delta=delta, truth=e * k / M)


@jax.jit
def _bounds_of_signs(phi, A, w, design, g, W, M, delta, noise_bound, noise_variance, kernel, gap) -> dict[str, jax.Array]:
    flat, rho = phi.reshape(-1, 2), jnp.eye(len(phi))[-1]
    Lambda = design_moment(flat, design)

    def stage(A, w, variance):
        Psi = jnp.outer(w, w)
        parts = risk(A, Lambda, Psi, design_fourth(flat, design, Psi), M, W, variance * Lambda)
        bias = jnp.abs(flat @ (A @ Lambda @ w - w)).max()
        return parts.estimation, parts.bias, bias, *concentration.error_size(flat, design, A, w, W, noise_bound, variance)

    estimation, bias, sup_bias, b, v = jax.vmap(stage)(A, w, noise_variance)
    L, difference = policy_bounds.feature_norm(phi, W), policy_bounds.difference_norm(phi, W)
    noise = noise_bound, noise_variance[:, None]
    flip = mean_policy.flip_probability(*mean_policy.difference_moments(phi, A, w, design, *noise), M)
    return {
        "expected": policy_bounds.expected_rung(L, estimation, bias),
        "expected_tight": policy_bounds.expected_rung_tight(difference, estimation, bias),
        "high_probability": concentration.high_probability_rung(phi, A, w, design, M, delta, W, *noise),
        "mean_policy": mean_policy.mean_policy_rung(kernel, gap, rho, mean_policy.action_caps(flip)),
        "estimation": estimation,
        "bias": bias,
        "L": L,
        "sup_bias": sup_bias,
        "b": b,
        "v": v,
        "flip": flip,
    }


def bounds_of_signs(i: Signs) -> dict[str, Floats]:
    """Rungs 4, 5 and 6, and their pieces: L, `estimation`, `bias`, `sup_bias`, `b`, `v` [H], `flip` [H, S, A, A]."""
    variance = np.broadcast_to(np.asarray(i.noise_variance, float), len(i.g))
    arrays = (i.phi, i.A, i.w, i.design, i.g, i.W, float(i.M), i.delta, float(i.noise_bound), variance, i.kernel, i.gap)
    return {k: np.asarray(v) for k, v in _bounds_of_signs(*arrays).items()}


def radius_bound(i: Radius) -> float:
    """The radius of rung 5 at H = 1 for the error in the norm."""
    return float(concentration.smale_zhou(np.float64(i.e), np.float64(i.e**2 * i.p), i.M, i.delta))


def ladder_instances(seed: int) -> dict[str, Any]:
    """The instances of a seed, by name."""
    rng = generator(seed)
    return {
        "flipped": flipped(rng),
        "biased": biased(rng),
        "noisy": noisy(rng),
        "two_valued": two_valued(rng),
        "shared": shared_context(rng),
        "walk": radius(rng, 1.0, 4096, 0.01),
        "rare": radius(rng, 0.12 / 512, 512, 0.1),
    }


PER_POLICY = ("span_per_state", "span_per_stage", "margin", "sup_norm", "error_parts")
EXPECTED_BIAS = ("expected, bias", "expected_tight, bias")
EXPECTED_NOISE = ("expected, noise", "expected_tight, noise")
# name of a pair -> (instance, rung)
LADDER = {
    **{rung: ("flipped", rung) for rung in PER_POLICY},
    **{name: ("biased", name.removesuffix(", bias")) for name in EXPECTED_BIAS},
    **{name: ("noisy", name.removesuffix(", noise")) for name in EXPECTED_NOISE},
    "high_probability, bias": ("biased", "high_probability"),
    "high_probability, noise": ("shared", "high_probability"),
    "mean_policy": ("two_valued", "mean_policy"),
    "radius": ("walk", "radius"),
    "radius, rare": ("rare", "radius"),
}


def bounds_of(instance: Flipped | Signs | Radius) -> dict[str, Any]:
    """The rungs that an instance has, by name."""
    if isinstance(instance, Flipped):
        return _rungs(instance.occupancy, instance.Qstar, instance.Qhat, *instance.parts)
    return {"radius": radius_bound(instance)} if isinstance(instance, Radius) else bounds_of_signs(instance)


def ladder_pairs(seed: int) -> dict[str, Pair]:
    """Of every rung [truth, bound] on the instances of a seed."""
    return pairs_of(ladder_instances(seed), bounds_of, LADDER)
