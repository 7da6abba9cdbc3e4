r"""Linear attention whose layers are steps of batch TD(0), and what such layers cannot compute: the maximum over actions.

A context holds N transitions (x_i, r_i, x'_i), x_i and x'_i in R^d the features of a pair and of the pair after it. With
b = (1/N) sum x_i r_i, G = (1/N) sum x_i x_i', F = (gamma/N) sum x_i x'_i', batch TD(0) with matrices C_k is

    w_{k+1} = w_k + C_k (b - G w_k + F w_k).

On columns (x_i; gamma x'_i) with label r_i it is linear attention (Wang, Blaser, Daneshmand, Zhang, arXiv 2405.13861; derived
here for the layers of [ZFB] and [ACDS]): the blocks of the reduced layer are [[C_k, 0], [-C_k, 0]], and its regression weights
stay of the form (w; -w). Blocks [[C_k, 0], [-E_k, 0]] bootstrap from a second vector u with a matrix of its own (ours):

    w_{k+1} = w_k + C_k (b - G w_k + F u_k),      u_{k+1} = u_k + E_k (b - G w_k + F u_k).

Proofs: notes/temporal-difference.md.
"""

import jax
import jax.numpy as jnp
from jax import Array


def td_statistics(x: Array, x_next: Array, r: Array, gamma: Array | float) -> tuple[Array, Array, Array]:
    """b [d], G and F [d, d] of a context: x and x_next [N, d], r [N]."""
    N = len(r)
    return x.T @ r / N, x.T @ x / N, gamma * x.T @ x_next / N


def batch_td(C: Array, b: Array, G: Array, F: Array, E: Array | None = None) -> Array:
    """w after every step of batch TD(0) from w = u = 0: C and E [k, d, d] (E = C if not given) -> [k, d]."""

    def step(carry: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (w, u), (C, E) = carry, at
        error = b - G @ w + F @ u
        return (w + C @ error, u + E @ error), w + C @ error

    zero = jnp.zeros_like(b)
    return jax.lax.scan(step, (zero, zero), (C, C if E is None else E))[1]


def td_blocks(C: Array, E: Array | None = None) -> Array:
    """Blocks [[C, 0], [-E, 0]] of a reduced layer whose k layers are k steps of batch TD(0); E = C if not given.

    C and E [k, d, d] -> [k, 2d, 2d].
    """
    zero = jnp.zeros_like(C)
    return jnp.block([[C, zero], [-(C if E is None else E), zero]])


def residual_gradient_blocks(C: Array) -> Array:
    """[[C, -C], [-C, C]]: steps w <- w + C mean_i (x_i - gamma x'_i)(r_i + gamma x'_i'w - x_i'w), the residual gradient.

    That linear attention can do it is due to Wang, Blaser, Daneshmand, Zhang, arXiv 2405.13861; derived here for these layers.
    """
    return jnp.block([[C, -C], [-C, C]])


def td_attention(C: Array) -> tuple[Array, Array]:
    """W_PV and W_KQ [k, 2d+1, 2d+1] of the full layer for batch TD(0): u = 1 and U = [[C, 0], [-C, 0]]', all else zero.

    The score of column j with key i is x_i'C'(x_j - gamma x'_j), so a layer takes (x_j - gamma x'_j)'(w_{k+1} - w_k) from the
    label row: context columns carry the TD errors, query columns minus their value.
    """
    k, d, _ = C.shape
    W_PV = jnp.zeros((k, 2 * d + 1, 2 * d + 1), C.dtype).at[:, -1, -1].set(1)
    W_KQ = jnp.zeros_like(W_PV).at[:, : 2 * d, : 2 * d].set(jnp.swapaxes(td_blocks(C), -1, -2))
    return W_PV, W_KQ


def td_error(C: Array, b: Array, G: Array, F: Array, k: int) -> Array:
    """w_k - w_TD = -(I - C (G - F))^k w_TD for one matrix C [d, d], w_TD = (G - F)^{-1} b the fixed point (LSTD).  -> [d].

    So depth converges to LSTD for every b iff the spectral radius of I - C (G - F) is below one. G - F must be invertible.
    """
    step = jnp.linalg.matrix_power(jnp.eye(len(b), dtype=b.dtype) - C @ (G - F), k)
    return -step @ jnp.linalg.solve(G - F, b)


def softmax_td(
    W: Array, x: Array, x_next: Array, r: Array, query: Array, gamma: Array | float, rate: Array | float, steps: int
) -> Array:
    """Values [Q] after `steps` sweeps of TD(0) in kernel space, k_i(q) = softmax_i(x_i' W q):

        v(q) <- v(q) + rate sum_i k_i(q) (r_i + gamma v(x'_i) - v(x_i))       at q = x_j, x'_j and the queries.

    Each sweep is softmax attention from q to the context, whose values are the TD errors (derived here; cf. Xie et al., arXiv
    2605.07333). In the limit of a large multiple of I as W, on distinct normalized features that are all in x, it is tabular TD.
    """
    points = jnp.concatenate([x, x_next, query])
    kernel = jax.nn.softmax(points @ (x @ W).T, axis=-1)  # [N + N + Q, N]
    N = len(r)

    def sweep(_: int, v: Array) -> Array:
        return v + rate * kernel @ (r + gamma * v[N : 2 * N] - v[:N])

    return jax.lax.fori_loop(0, steps, sweep, jnp.zeros(len(points), r.dtype))[2 * N :]


def softmax_td_attention(W: Array, gamma: Array | float, rate: Array | float, steps: int) -> tuple[Array, Array]:
    """W_PV and W_KQ [steps, 2, 2d+1, 2d+1] of softmax attention with two heads whose layers are sweeps of `softmax_td` (ours).

    Columns (x; x') with label r. The heads score with x_i'W x_j and x_i'W x'_j and have the value weights rate and -gamma rate. A
    query column (q; q') then predicts v(q) - gamma v(q'), so v(q) = yhat(q; 0) + gamma/(1 - gamma) yhat(0; 0).
    """
    d = W.shape[0]
    zero = jnp.zeros((steps, 2, 2 * d + 1, 2 * d + 1), W.dtype)
    W_PV = zero.at[:, :, -1, -1].set(rate * jnp.array([1.0, -gamma]))
    return W_PV, zero.at[:, 0, :d, :d].set(W).at[:, 1, :d, d : 2 * d].set(W)


def odd_floor(value: Array, negated: Array, weights: Array, center: Array | float = 0.0) -> Array:
    """E[((v(q) + v^-(q))/2 - c(q))^2]: no predictor c + f with f odd in the rewards has a smaller risk (ours).  -> [].

    value, negated [n, Q]: targets of a task and of the task with all rewards negated, equally likely and with the same context
    features, labels without noise; weights [Q] of the queries; c [Q] an intercept. Reduced linear attention of any depth is
    linear in the rewards, hence odd. Q* is not: v + v^- >= 0, with equality only where the maximum over actions never matters.
    """
    even = (value + negated) / 2 - center
    return jnp.mean(jnp.square(even) @ weights)
