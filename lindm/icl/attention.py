r"""Attention layers that map one prompt to predictions: linear (reduced and full) and softmax.

The embedding matrix of one prompt has d+1 rows, N context columns and Q query columns,

    E = [ x_1 ... x_N   q_1 ... q_Q ]
        [ y_1 ... y_N    0  ...  0  ],

and one block of linear self-attention [Zhang, Frei, Bartlett, JMLR 2024] with the mask of
[Ahn, Cheng, Daneshmand, Sra, NeurIPS 2023] (query columns are never keys) adds to it

    F(E) = W_PV E_ctx (E_ctx' W_KQ E) / N = W_PV Z W_KQ E,        Z = E_ctx E_ctx' / N = [ G  S  ]
                                                                                         [ S' c  ].

The N x N matrix of scores is never built: Z is (d+1) x (d+1), so the cost is linear in N. And because queries are not keys,
any number of query columns shares one context.

Depth. Every block subtracts its increment, E <- E - F(E), from the context and the query columns, and the prediction is minus
the sum of what the blocks add to the label row of the query column. At depth 1 that is F(E)_{d+1,q}, the prediction of the
papers. In general each block is E <- B E with B = I - W_PV Z W_KQ, hence Z <- B Z B': the whole network is a recursion on
(d+1) x (d+1) matrices. Where only the blocks U of W_KQ and u of W_PV are non-zero, the label row carries residuals
y_i - x_i' w of the regression weights w <- w + A (S - G w), A = (u U)': k blocks are k preconditioned gradient steps.

The parameter of `ReducedAttention` is that A, those of `FullAttention` are W_PV and W_KQ; `SoftmaxAttention` has a softmax over
the context in place of the average. All three map one `Prompt` (x[N,d], y[N], query[Q,d]) to yhat[Q];
`jax.vmap` outside.

Batches. `predict_batch` of `ReducedAttention` and `FullAttention` makes the same predictions for a batch of prompts, by
`lindm.icl.batched_moments` at depth 1 and mapped over the batch at other depths; the trainer uses it.
"""

import math

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from lindm.icl.batched_moments import batch_last, inner_products, moments_times, sum_pairs
from lindm.types import Prompt


def embed(prompt: Prompt) -> tuple[Array, Array]:
    """The columns of E: context [d+1, N] with the labels in the last row, queries [d+1, Q] with a zero there."""
    chex.assert_rank([prompt.x, prompt.y, prompt.query], [2, 1, 2])
    context = jnp.concatenate([prompt.x, prompt.y[:, None]], axis=1).T
    query = jnp.concatenate([prompt.query, jnp.zeros_like(prompt.query[:, :1])], axis=1).T
    return context, query


def moments(prompt: Prompt) -> Array:
    """Z[d+1,d+1] = E_ctx E_ctx' / N: the only statistic of a context that a linear layer uses."""
    context, _ = embed(prompt)
    return context @ context.T / context.shape[1]


def pad(prompt: Prompt, n: Array | int) -> Prompt:
    """The first `n` pairs of a prompt, padded to all N, so that several lengths share one compiled program.

    Pairs from the n-th on become zero and the others are multiplied by sqrt(N/n), which gives the Z of a prompt of n pairs.
    Exact for the linear layers at any depth, because they use Z alone; wrong for `SoftmaxAttention`, where a zero column is
    still a key. `n` may be traced (1 <= n <= N, not checked then); x[...,N,d] and y[...,N] may have leading axes.
    """
    total = prompt.y.shape[-1]
    if isinstance(n, int) and not 1 <= n <= total:
        raise ValueError(f"n must be between 1 and the number of pairs N = {total}; got {n}")
    scale = jnp.where(jnp.arange(total) < n, jnp.sqrt(total / jnp.asarray(n, prompt.y.dtype)), 0).astype(prompt.y.dtype)
    y = prompt.y * scale.reshape((1,) * (prompt.y.ndim - 1) + (total,))
    x = prompt.x * scale.reshape((1,) * (prompt.x.ndim - 2) + (total, 1))
    return Prompt(x=x, y=y, query=prompt.query)


def query_columns(Lambda_q: Array) -> Array:
    """Query columns [d, d] whose second moment is `Lambda_q` exactly: the rows of sqrt(d) L', with L L' = Lambda_q.

    A linear layer is linear in the query, so the mean of (yhat - target)^2 over these d columns equals the expectation over
    random queries with that second moment, without sampling noise.
    """
    return math.sqrt(Lambda_q.shape[0]) * jnp.linalg.cholesky(Lambda_q).T


class ReducedAttention(nnx.Module):
    """One free matrix per block: w <- w + A_k (S - G w), yhat = query @ w; at depth 1, yhat = query @ A @ S.

    Args:
        d: number of features.
        depth: number of blocks.
        A: initial matrices [depth, d, d], or [d, d] for all blocks; zero if not given. From depth 2 on, equal blocks are a
            saddle of the risk: start from unequal ones (`rngs` and `scale`).
        rngs, scale: instead of `A`, independent entries N(0, scale^2 / d).
        dtype: of the parameters, unless `A` has its own.

    Attributes:
        A: parameter [depth, d, d].
    """

    def __init__(
        self,
        d: int,
        depth: int = 1,
        *,
        A: Array | None = None,
        rngs: nnx.Rngs | None = None,
        scale: float = 0.0,
        dtype: DTypeLike = jnp.float32,
    ):
        _check_sizes(d, depth)
        if A is None:
            A = jnp.zeros((depth, d, d), dtype) if rngs is None else scale / math.sqrt(d) * rngs.normal((depth, d, d), dtype)
        elif A.shape not in ((d, d), (depth, d, d)):
            raise ValueError(f"A must have shape ({d}, {d}) or ({depth}, {d}, {d}); got {A.shape}")
        self.d, self.depth = d, depth
        self.A = nnx.Param(jnp.broadcast_to(A, (depth, d, d)))

    def __call__(self, prompt: Prompt) -> Array:
        """yhat[Q] of one prompt."""
        _check_prompt(prompt, self.d)
        n = prompt.y.shape[0]
        blocks = self.A[...]
        S = prompt.x.T @ prompt.y / n
        w = blocks[0] @ S
        if self.depth > 1:  # G costs d times as much as S, and the first step from w = 0 does not need it
            G = prompt.x.T @ prompt.x / n
            for k in range(1, self.depth):
                w = w + blocks[k] @ (S - G @ w)
        return prompt.query @ w

    def predict_batch(self, prompts: Prompt) -> Array:
        """yhat[B,Q] of a batch of prompts x[B,N,d], y[B,N], query[B,Q,d]."""
        if self.depth > 1:
            return jax.vmap(self)(prompts)
        _check_prompt(jax.tree.map(lambda a: a[0], prompts), self.d)
        x, y, query = batch_last(prompts)
        S = sum_pairs(y, x) / y.shape[0]
        return inner_products(query, self.A[0] @ S).T


class _Embedding(nnx.Module):
    """The parameters W_KQ, W_PV [depth, d+1, d+1], the initialization of [ZFB] Assumption 3.3, and names for the blocks.

    U = s Theta Theta' with ||Theta Theta'||_F = 1, u = s, all else zero. Theta is Gaussian if `rngs` is given, else a multiple of
    the identity (U = s I / sqrt(d)). [ZFB] prove convergence for s^2 ||Gamma||_op sqrt(d) < 2. With several heads every parameter
    has an axis [depth, heads, ...].
    """

    def __init__(self, d: int, depth: int, rngs: nnx.Rngs | None, scale: float, dtype: DTypeLike, heads: int = 1):
        _check_sizes(d, depth)
        if heads < 1:
            raise ValueError(f"heads must be at least 1; got {heads}")
        if not scale > 0:
            raise ValueError(f"scale must be positive (at zero the gradient vanishes); got {scale}")
        blocks = (depth,) if heads == 1 else (depth, heads)
        eye = jnp.eye(d, dtype=dtype)
        theta = jnp.broadcast_to(eye, (*blocks, d, d)) if rngs is None else rngs.normal((*blocks, d, d), dtype)
        square = theta @ jnp.swapaxes(theta, -1, -2)
        square = square / jnp.linalg.norm(square, axis=(-2, -1), keepdims=True)
        zero = jnp.zeros((*blocks, d + 1, d + 1), dtype)
        self.d, self.depth = d, depth
        self.W_KQ = nnx.Param(zero.at[..., :d, :d].set(scale * square))
        self.W_PV = nnx.Param(zero.at[..., d, d].set(scale))

    @property
    def U(self) -> Array:
        """[..., depth, d, d]: scores of a query's features against the keys' features."""
        return self.W_KQ[...][..., : self.d, : self.d]

    @property
    def z(self) -> Array:
        """[..., depth, d]: scores of a query's features against the keys' labels. Zero at initialization."""
        return self.W_KQ[...][..., self.d, : self.d]

    @property
    def v(self) -> Array:
        """[..., depth, d]: weight of a key's features in the label row. Zero at initialization."""
        return self.W_PV[...][..., self.d, : self.d]

    @property
    def u(self) -> Array:
        """[..., depth]: weight of a key's label in the label row."""
        return self.W_PV[...][..., self.d, self.d]

    @property
    def A(self) -> Array:
        """[..., depth, d, d]: (u U)', the matrix of the reduced layer that this layer equals where v = z = 0."""
        return self.u[..., None, None] * jnp.swapaxes(self.U, -1, -2)

    def leak(self) -> Array:
        """[..., depth]: sqrt(||v||^2 + ||z||^2), zero where the layer equals a reduced one."""
        return jnp.sqrt(jnp.sum(self.v**2, axis=-1) + jnp.sum(self.z**2, axis=-1))


class FullAttention(_Embedding):
    """Linear attention with all of W_KQ and W_PV free. At depth 1,

        yhat_q = [ v' G U + u S' U + (v' S) z' + u c z' ] x_q.

    Args:
        d: number of features.
        depth: number of blocks.
        rngs: for Theta; without it Theta is a multiple of the identity.
        scale: s of the initialization.
        dtype: of the parameters.
    """

    def __init__(
        self,
        d: int,
        depth: int = 1,
        *,
        rngs: nnx.Rngs | None = None,
        scale: float = 0.1,
        dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(d, depth, rngs, scale, dtype)

    def __call__(self, prompt: Prompt) -> Array:
        """yhat[Q] of one prompt."""
        _check_prompt(prompt, self.d)
        W_PV, W_KQ, n = self.W_PV[...], self.W_KQ[...], prompt.y.shape[0]
        if self.depth == 1:  # the label row of W_PV Z W_KQ without forming Z: d times fewer products
            values = prompt.x @ W_PV[0, -1, :-1] + W_PV[0, -1, -1] * prompt.y
            row = (values @ prompt.x) @ W_KQ[0, :-1, :-1] + (values @ prompt.y) * W_KQ[0, -1, :-1]
            return prompt.query @ row / n
        _, query = embed(prompt)
        Z = moments(prompt)
        for k in range(self.depth - 1):
            B = jnp.eye(self.d + 1, dtype=Z.dtype) - W_PV[k] @ Z @ W_KQ[k]
            query = B @ query
            Z = B @ Z @ B.T  # E_ctx <- B E_ctx
        return (W_PV[-1, -1] @ Z @ W_KQ[-1]) @ query - query[-1]  # only the label row of the last increment is needed

    def predict_batch(self, prompts: Prompt) -> Array:
        """yhat[B,Q] of a batch of prompts x[B,N,d], y[B,N], query[B,Q,d].

        At depth 1 only reverse mode differentiates it (`jax.grad`, `jax.vjp`); `jax.jvp`, `jax.jacfwd` and `jax.hessian` raise a
        `TypeError`. For those use `jax.vmap(layer)`, which makes the same predictions.
        """
        if self.depth > 1:
            return jax.vmap(self)(prompts)
        _check_prompt(jax.tree.map(lambda a: a[0], prompts), self.d)
        x, y, query = batch_last(prompts)
        row = moments_times(x, y, self.W_PV[0, -1][:, None])
        return inner_products(query, self.W_KQ[0, :, :-1].T @ row / y.shape[0]).T


class SoftmaxAttention(_Embedding):
    """Softmax attention on the same embedding, with the same interface:

        F(E) = W_PV E_ctx softmax(E_ctx' W_KQ E),       softmax over the N context columns.

    A query attends to N keys at any depth (cost N Q); from depth 2 on the context columns attend to each other (cost N^2).
    Linearized at W_KQ = 0 it is the label mean plus linear attention on centered pairs.
    The arguments that are not listed are those of `FullAttention`.

    Args:
        heads: number of heads, each with its own W_PV and W_KQ; F is the sum of theirs.
        positions: table [P, d+1] added to the columns: row i to pair i, row N to every query (all of them follow
            the context). A prompt of more than P - 1 pairs raises an error. Rows beyond the training length receive no gradient,
            so a longer prompt has positions that were never trained. What the table adds to the label row of a query is not
            part of the prediction.
        train_positions: whether the table is a parameter (learned absolute positions) or fixed.
    """

    def __init__(
        self,
        d: int,
        depth: int = 1,
        *,
        rngs: nnx.Rngs | None = None,
        scale: float = 0.1,
        heads: int = 1,
        positions: Array | None = None,
        train_positions: bool = True,
        dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(d, depth, rngs, scale, dtype, heads)
        if positions is not None and (positions.ndim != 2 or positions.shape[1] != d + 1 or positions.shape[0] < 2):
            raise ValueError(f"positions must have shape [P, d+1] = [P, {d + 1}] with P >= 2; got {positions.shape}")
        kind = nnx.Param if train_positions else nnx.Variable
        self.positions = nnx.data(None if positions is None else kind(positions.astype(dtype)))

    def __call__(self, prompt: Prompt) -> Array:
        """yhat[Q] of one prompt."""
        _check_prompt(prompt, self.d)
        context, query = embed(prompt)
        if self.positions is not None:
            n, rows = context.shape[1], self.positions.shape[0]
            if n + 1 > rows:
                raise ValueError(
                    f"positions must have a row for each of the N = {n} pairs and one for the query; got {rows} rows"
                )
            table = self.positions[...].T
            context = context + table[:, :n]
            query = query + table[:, n : n + 1]
        start = query[-1]
        for k in range(self.depth):
            values = self.W_PV[k] @ context  # [heads, d+1, N], without the axis of heads if there is one
            scores = context.T @ self.W_KQ[k]
            query_step = _sum_heads(values @ jax.nn.softmax(scores @ query, axis=-2))
            if k + 1 < self.depth:
                context = context - _sum_heads(values @ jax.nn.softmax(scores @ context, axis=-2))
            query = query - query_step
        return start - query[-1]


def _sum_heads(x: Array) -> Array:
    return x if x.ndim == 2 else x.sum(0)


def sinusoidal(rows: int, width: int, scale: float = 1.0) -> Array:
    """Position table [rows, width] of [Vaswani et al., NeurIPS 2017]: sines in the even columns, cosines in the odd ones."""
    column = jnp.arange(width)
    angle = jnp.arange(rows)[:, None] / (10_000.0 ** ((column - column % 2) / width))[None, :]
    return scale * jnp.where((column % 2 == 0)[None, :], jnp.sin(angle), jnp.cos(angle))


def _check_sizes(d: int, depth: int) -> None:
    if d < 1:
        raise ValueError(f"d must be at least 1; got {d}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1; got {depth}")


def _check_prompt(prompt: Prompt, d: int) -> None:
    x, y, query = prompt.x.shape, prompt.y.shape, prompt.query.shape
    if len(x) != 2 or len(query) != 2 or y != x[:1]:
        raise ValueError(f"prompt must be one prompt, x[N,d], y[N], query[Q,d] (vmap for more); got x{x}, y{y}, query{query}")
    if x[1] != d or query[1] != d:
        raise ValueError(f"prompt must have d = {d} features; got x{x}, query{query}")
    if x[0] < 1:
        raise ValueError("prompt must have at least one pair; got N = 0")
