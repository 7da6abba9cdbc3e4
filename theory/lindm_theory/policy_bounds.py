"""From Qhat to the policy: a ladder of upper bounds on V*_1 - V^pihat_1, from the identity down to rung 4.

Every function takes the arrays of one task; `vmap` over tasks. Arrays: occupancy [H, S] is d_h^pihat, Qstar and Qhat [H, S, A],
pihat [H, S] integer and greedy in Qhat (any tie rule). D_h = Qhat_h - Q*_h. The rungs on whole contexts (mean policy,
high probability) are in `theory/lindm_theory/mean_policy.py` and `theory/lindm_theory/concentration.py`. Proofs: notes/policy.md.
"""

import jax
import jax.numpy as jnp
from jax import Array

from lindm_theory.concentration import difference_norm, feature_norm

__all__ = [
    "best_scale",
    "decomposed_rung",
    "difference_norm",
    "error_parts",
    "expected_rung",
    "expected_rung_tight",
    "feature_norm",
    "loss_identity",
    "margin_rung",
    "margin_statewise_rung",
    "scale_free_risk",
    "span_rung",
    "span_statewise_rung",
    "strict_gap",
    "sup_rung",
]


def _span(x: Array) -> Array:
    return jnp.max(x, axis=-1) - jnp.min(x, axis=-1)


def loss_identity(occupancy: Array, Qstar: Array, pihat: Array) -> Array:
    """Rung 0: sum_h E_{s ~ d_h^pihat}[V*_h(s) - Q*_h(s, pihat_h(s))], equal to V*_1 - V^pihat_1 [KL].  -> []."""
    chosen = jnp.take_along_axis(Qstar, pihat[..., None], axis=-1)[..., 0]
    return jnp.sum(occupancy * (jnp.max(Qstar, axis=-1) - chosen))


def best_scale(weights: Array, Qstar: Array, Qhat: Array, steps: int = 60) -> Array:
    """c >= 0 that minimizes f(c) = sum_s weights_s span_a(c Qhat(s,.) - Q*(s,.)).  weights [S], Q [S, A] -> [].

    f is convex and piecewise linear, and f(c) >= f(0) once c >= 2 f(0) / sum_s weights_s span Qhat(s,.): bisection of its
    subgradient on that interval. c = 1 is among the candidates, so rung 1 never exceeds rung 2. Every c >= 0 gives a valid bound.
    """

    def objective(c: Array) -> Array:
        return jnp.sum(weights * _span(c * Qhat - Qstar))

    def slope(c: Array) -> Array:
        D = c * Qhat - Qstar
        top = jnp.take_along_axis(Qhat, jnp.argmax(D, axis=-1)[..., None], axis=-1)
        low = jnp.take_along_axis(Qhat, jnp.argmin(D, axis=-1)[..., None], axis=-1)
        return jnp.sum(weights * (top - low)[..., 0])

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        falling = slope(middle) < 0
        return jnp.where(falling, middle, low), jnp.where(falling, high, middle)

    size = jnp.sum(weights * _span(Qhat))
    zero = jnp.zeros((), Qhat.dtype)
    top = jnp.where(size > 0, 2.0 * objective(zero) / jnp.where(size > 0, size, 1.0), 0.0)
    ends = jax.lax.fori_loop(0, steps, halve, (zero, top))
    candidates = jnp.stack([zero, *ends, jnp.ones_like(zero)])
    return candidates[jnp.argmin(jax.vmap(objective)(candidates))]


def span_rung(occupancy: Array, Qstar: Array, Qhat: Array) -> tuple[Array, Array]:
    """Rung 1 (ours): sum_h min_{c_h >= 0} E_{d_h^pihat} span_a(c_h Qhat_h - Q*_h).  -> bound [], c [H].

    The greedy policy does not depend on a positive scale or on a function of s, nor does this bound.
    """
    c = jax.vmap(best_scale)(occupancy, Qstar, Qhat)
    return jnp.sum(occupancy * _span(c[:, None, None] * Qhat - Qstar)), c


def span_statewise_rung(occupancy: Array, Qstar: Array, Qhat: Array) -> Array:
    """Rung 1 with c free in every state (ours): sum_h E_{d_h^pihat} min_{c >= 0} span_a(c Qhat_h - Q*_h).  -> [].

    Never above rung 1; with two actions it equals the truth.
    """
    spans = _span(_statewise_scale(Qstar, Qhat)[..., None] * Qhat - Qstar)
    return jnp.sum(occupancy * spans)


def _statewise_scale(Qstar: Array, Qhat: Array) -> Array:
    def one(q: Array, p: Array) -> Array:
        return best_scale(jnp.ones(1, q.dtype), q[None], p[None])

    return jax.vmap(jax.vmap(one))(Qstar, Qhat)


def strict_gap(Qstar: Array, tolerance: float = 1e-9) -> Array:
    """Delta(s): V*(s) minus the value of the best *strictly* worse action (ours).  [..., A] -> [...]; infinity if there is none.

    Actions within tolerance * max|Q*| of the best are optimal: a tie broken by rounding is not a gap, at any scale of the
    rewards.
    """
    gap = jnp.max(Qstar, axis=-1, keepdims=True) - Qstar
    level = tolerance * jnp.max(jnp.abs(Qstar))
    return jnp.min(jnp.where(gap > level, gap, jnp.inf), axis=-1)


def margin_rung(occupancy: Array, Qstar: Array, Qhat: Array, c: Array | None = None) -> Array:
    """Rung 1b (ours): sum_h E_{d_h^pihat}[span 1{span >= Delta_h(s)}], span = span_a(c_h Qhat_h - Q*_h).  -> [].

    c [H] of rung 1 (any c >= 0 is valid). The loss in a state is zero or at least Delta_h(s), and never above the span.
    """
    scale = span_rung(occupancy, Qstar, Qhat)[1] if c is None else c
    return _margin(occupancy, Qstar, _span(scale[:, None, None] * Qhat - Qstar))


def margin_statewise_rung(occupancy: Array, Qstar: Array, Qhat: Array) -> Array:
    """Rung 1b with c free in every state (ours).  -> []."""
    return _margin(occupancy, Qstar, _span(_statewise_scale(Qstar, Qhat)[..., None] * Qhat - Qstar))


def _margin(occupancy: Array, Qstar: Array, spans: Array) -> Array:
    # the slack keeps a span that equals the gap up to rounding inside the indicator, so that the bound stays one
    slack = 1e-9 * jnp.max(jnp.abs(Qstar))
    return jnp.sum(occupancy * jnp.where(spans >= strict_gap(Qstar) - slack, spans, 0.0))


def sup_rung(occupancy: Array, Qstar: Array, Qhat: Array) -> Array:
    """Rung 2 (folklore): 2 sum_h E_{d_h^pihat} max_a |D_h|.  -> []."""
    return 2.0 * jnp.sum(occupancy * jnp.max(jnp.abs(Qhat - Qstar), axis=-1))


def error_parts(phi: Array, A: Array, Lambda: Array, w: Array, S: Array) -> tuple[Array, Array]:
    """phi'(A_h Lambda_h - I) w_h and phi' A_h (S_h - Lambda_h w_h): they sum to D_h when Qhat_h = phi' A_h S_h.

    phi [S, A, d], A [H, d, d], Lambda [d, d] or [H, d, d], w and S [H, d] -> two arrays [H, S, A]. The optimization part of
    weights Ahat is phi'(Ahat_h - A_h) S_h.
    """
    mean = jnp.einsum("hij,hj->hi", jnp.broadcast_to(Lambda, A.shape), w)
    bias = jnp.einsum("hij,hj->hi", A, mean) - w
    estimation = jnp.einsum("hij,hj->hi", A, S - mean)
    return jnp.einsum("sad,hd->hsa", phi, bias), jnp.einsum("sad,hd->hsa", phi, estimation)


def decomposed_rung(occupancy: Array, bias: Array, estimation: Array, optimization: Array | None = None) -> Array:
    """Rung 3: 2 sum_h E_{d_h^pihat}[max_a |bias| + max_a |estimation| (+ max_a |optimization|)], parts [H, S, A].  -> []."""
    parts = [bias, estimation] if optimization is None else [bias, estimation, optimization]
    return 2.0 * sum((jnp.sum(occupancy * jnp.max(jnp.abs(part), axis=-1)) for part in parts), jnp.zeros((), bias.dtype))


def expected_rung(L: Array, estimation: Array, bias: Array) -> Array:
    """Rung 4 (ours): E SubOpt <= 2 sum_h L_h (sqrt(est_h) + sqrt(bias_h)).  All [H] (L may be a number); L of `feature_norm`."""
    return 2.0 * jnp.sum(L * (jnp.sqrt(estimation) + jnp.sqrt(bias)))


def expected_rung_tight(span: Array, estimation: Array, bias: Array) -> Array:
    """Rung 4, tightened (ours): E SubOpt <= sum_h span_h sqrt(est_h + bias_h); span_h = 2 L_h or, better, `difference_norm`.

    All [H] (span may be a number). est + bias may be replaced by `scale_free_risk`.
    """
    return jnp.sum(span * jnp.sqrt(estimation + bias))


def scale_free_risk(A: Array, ESw: Array, ESS: Array, Psi: Array, Lambda_q: Array) -> Array:
    """min_c E ||c A S - w||^2_{Lq} = tr(Lq Psi) - max(tr(Lq A ESw), 0)^2 / tr(Lq A ESS A') (ours).  All [d, d] -> [].

    ESw = E[S w'], ESS = E[S S'] of the test contexts. The greedy policy does not depend on c, so this can replace est + bias in
    the tightened rung 4, which then charges nothing for a bias that only rescales Qhat.
    """
    agreement = jnp.maximum(jnp.trace(Lambda_q @ A @ ESw), 0.0)
    return jnp.trace(Lambda_q @ Psi) - jnp.square(agreement) / jnp.trace(Lambda_q @ A @ ESS @ A.T)
