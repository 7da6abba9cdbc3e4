r"""Faster random arrays on a CPU, where drawing the pairs takes most of a training step.

`flat` draws one long vector and reshapes it. The numbers are the same (to rounding), but XLA compiles a sampler of a shape with
several axes several times slower (2.9 s against 0.2 s for four axes), and the compiled loop runs slower where the last axis is
short.

`normal` is Gaussian noise at a quarter of the cost. `jax.random.normal` in float32 discards half of every Threefry block, inverts
the error function, and fails to vectorize when the last axis is short. Here both words of a block are used, and the transform of
Box and Muller (1958) makes two variates of them,

    r = sqrt(-2 log U),   z = r sin(2 pi V),  r cos(2 pi V),

with U on a grid of 2^-23 in (0, 1] and the angle as a point of a half circle (23 bits) and a sign (1 bit). On a half circle sine
and cosine are short polynomials, which XLA vectorizes. The generator and the independence of streams are those of
`jax.random.normal`; the numbers for the same key differ.

`dirichlet` normalizes independent gamma variates of shape c. A gamma of shape a >= 1 is drawn by rejection (Marsaglia and
Tsang, ACM Trans. Math. Softw. 26, 2000): with d = a - 1/3, y = N(0, 1) / (3 sqrt d) and a standard exponential E,

    d (1 + y)^3  is accepted if y > -1 and  E > 3 d (y - y^2/2 + y^3/3 - log(1 + y)),

at least 95 of 100 are. For c < 1, a gamma of shape c + 1 times U^(1/c) has shape c. All of it is computed in logarithms, where
U^(1/c) is -E/c and cannot underflow; the factor d, common to a row, is left out.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.random import threefry_2x32
from jax.typing import ArrayLike, DTypeLike

# fitted below to 1e-7 on |t| <= pi/2: sin t = t p(t^2), cos t = q(t^2)
_GRID = (np.pi / 2 * np.cos(np.pi * (np.arange(400) + 0.5) / 800)) ** 2
_SIN = np.polynomial.Polynomial.fit(_GRID, np.sinc(np.sqrt(_GRID) / np.pi), 4).convert().coef.astype(np.float32)
_COS = np.polynomial.Polynomial.fit(_GRID, np.cos(np.sqrt(_GRID)), 5).convert().coef.astype(np.float32)

_ROUNDS = 64


def flat(sampler: Callable[..., Array], key: Array, shape: tuple[int, ...], *args, **kwargs) -> Array:
    """`sampler(key, shape, *args, **kwargs)` of `jax.random`, number for number up to rounding, drawn as one vector: [*shape]."""
    return sampler(key, (math.prod(shape),), *args, **kwargs).reshape(shape)


def normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Independent N(0, 1), [*shape]; `jax.random.normal` itself for other types than float32 and other keys than Threefry."""
    words, size = jax.random.key_data(key), math.prod(shape)
    if jnp.dtype(dtype) != jnp.float32 or words.shape[-1] != 2 or size == 0:
        return jax.random.normal(key, shape, dtype)
    half = (size + 1) // 2
    bits = threefry_2x32(words, lax.iota(jnp.uint32, 2 * half))
    radius = jnp.sqrt(-2 * jnp.log(2 - _one_to_two(bits[:half])))
    sign = lax.bitcast_convert_type((bits[half:] << jnp.uint32(31)) | jnp.uint32(0x3F800000), jnp.float32)
    angle = (_one_to_two(bits[half:]) - np.float32(1.5 - 2**-24)) * np.float32(np.pi)
    square, radius = angle * angle, radius * sign
    z = jnp.concatenate([radius * angle * _polynomial(_SIN, square), radius * _polynomial(_COS, square)])
    return z[:size].reshape(shape)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def dirichlet(key: Array, concentration: ArrayLike, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Array:
    """Random probability vectors along the last axis of [*shape], by the symmetric Dirichlet law.

    Args:
      concentration: [], may be traced. Below one a row has few large entries, one is flat on the simplex, above one rows are near
        uniform. Other values than finite numbers above zero give rows of NaN.
      shape: at least one axis.

    Raises:
      ValueError: `shape` has no axis.
    """
    if not shape:
        raise ValueError("shape must have a last axis, the simplex; got ()")
    dtype, size = jnp.dtype(dtype or jnp.result_type(float)), math.prod(shape)
    c = jnp.asarray(concentration, dtype)
    d = jnp.where(c < 1, c + 1, c) - 1 / 3
    keys = jax.random.split(key, _ROUNDS)

    def propose(u: Array) -> Array:
        """Logarithms of gammas over d from two uniforms each, [2, n] as one vector; NaN where rejected."""
        for_normal, for_test = jnp.split(u, 2)
        y = lax.erf_inv(jnp.maximum(2 * for_normal - 1, jnp.finfo(dtype).epsneg - 1)) * math.sqrt(2) / (3 * jnp.sqrt(d))
        log = jnp.log1p(jnp.maximum(y, -1))
        # Taylor's remainder: the test as it is usually printed is a difference of large numbers when d is large
        accepted = -jnp.log1p(-for_test) > 3 * d * (y - y * y / 2 + y * y * y / 3 - log)
        return jnp.where(accepted, 3 * log, jnp.nan)

    few = min(size, size // 16 + 16)  # the first round rejects less than 5 in 100; later rounds draw those again

    def again(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        i, logs = carry
        (at,) = jnp.nonzero(jnp.isnan(logs), size=few, fill_value=size)
        return i + 1, logs.at[at].set(propose(jax.random.uniform(keys[i], (2 * few,), dtype)), mode="drop")

    u = jax.random.uniform(keys[0], (3 * size,), dtype)
    # the limit ends the loop for a concentration that no proposal satisfies
    _, logs = lax.while_loop(
        lambda carry: (carry[0] < _ROUNDS) & jnp.isnan(carry[1]).any(), again, (jnp.int32(1), propose(u[: 2 * size]))
    )
    boost = -jnp.log1p(-u[2 * size :]) / jnp.where(c > 0, c, jnp.nan)
    return jax.nn.softmax((logs - jnp.where(c < 1, boost, 0)).reshape(shape), axis=-1)


def _one_to_two(bits: Array) -> Array:
    """Uniform in [1, 2) from the 23 highest bits."""
    return lax.bitcast_convert_type((bits >> jnp.uint32(9)) | jnp.uint32(0x3F800000), jnp.float32)


def _polynomial(coefficients: np.ndarray, x: Array) -> Array:
    value = jnp.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * x + c
    return value
