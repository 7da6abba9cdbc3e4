r"""Certified bounds of an APOMDP's value that need no convexity: a layered net of beliefs with intervals and slopes.

The value of an APOMDP with three models (or with two and alpha > 1/2) is not convex: alpha vectors do not bound it from below,
nor interpolation from above. A net requires continuity alone. Layer h holds beliefs that cover every belief reachable at stage
h: the children of layer h - 1 under every (a, m, o), merged in cells of a grid. Backward, a child takes the interval of its
cell's point, widened by the largest possible change of the value between the two. If every reachable belief is in the net, the
value is exact.

**Slopes.** Extend V_h to the cone x >= 0 by the recursion itself; every step of it is positively homogeneous, so
V(x) = |x|_1 V(x / |x|_1). With F_m(x, a) = x r_m(., a) + sum_o V_{h+1}(x K_m[a, o]) it reads

    V_h(x) = max_a [ alpha min_m F_m(x, a) + (1 - alpha) max_m F_m(x, a) ].

Say that V has slopes in [low, high] (vectors over the states) on a convex cone X if for all x, y in X and d = x - y

    sum_s min(d_s low_s, d_s high_s)  <=  V(x) - V(y)  <=  sum_s max(d_s low_s, d_s high_s) =: rise(d; low, high).       (1)

Let V_{h+1} have slopes in [low', high'] on a cone that holds every x K_m[a, o], x in X. As K >= 0, F_m(., a) has slopes in
r_m(., a) + sum_o K_m[a, o] [low', high'] on X. Along a segment in X, V_h is piecewise linear and on each piece one a, one
smallest m and one largest m' are in force, V_h = alpha F_m + (1 - alpha) F_m': so V_h has slopes in the hull, over the a, m, m'
that can be in force somewhere in X, of alpha slopes(F_m) + (1 - alpha) slopes(F_m'). Two cones are used:

- all x >= 0, where anything can be in force: high_h(s) = max_{m,a} [r_m(s, a) + sum_{o,s'} K_m[a,o,s,s'] high_{h+1}(s')], and low
  with min. Hence V_h(b) - V_h(g) <= (b - g)^+ high - (b - g)^- low, and b low <= V_h(b) <= b high;
- the cone over a ball |b - g|_1 <= R about a point g of the net. A model (an action) that is worse at g by more than the ball
allows
  is never in force: the difference of two functions with slopes in [l, w] and [l*, w*] changes by at most
  R/2 (max_s (w - l*) - min_s (l - w*)) within it, since d sums to zero. Where one a, m, m' is left all the way down, low = high,
  V_h is linear on the ball and merging costs nothing; elsewhere it costs the size of the kinks in the ball.

That x K_m[a, o] stays in the ball of its cell's point g' is checked, not assumed: for x = g + d, |d|_1 <= R, k_s = |K[s]|_1,

    | x K - |x K|_1 g' |_1 <= | g K - |g K|_1 g' |_1 + R/2 max_{i,j} (c_i + c_j),   c_s = | K[s] - k_s g' |_1,
    |x K|_1 >= |g K|_1 - R/2 (max_s k_s - min_s k_s).

Where it fails the slopes of all x >= 0 are used: the radii determine how tight the bounds are, not their validity.

**In l1.** Also V_h(b) - V_h(g) <= lipschitz_h |b - g|_1: b - g is a sum of moves of mass from j to i, |b - g|_1 / 2 in all, thus

    2 lipschitz_h = max_{m,a,i,j} ( r_i - r_j + sum_o change of V_{h+1} along D_o ),   D_o = K_m[a, o, i] - K_m[a, o, j],

and along D with masses p, q of its two parts V_{h+1} changes by at most rise(D; low, high), and by at most
2 lipschitz_{h+1} min(p, q) + (p - q)^+ max high - (q - p)^+ min low, which accounts for mixing kernels. (Charging the range
max high - min low for all mass that moves gives the simpler (span r + Dobrushin coefficient of (o, s') given s  x  range) / 2.)

All of this holds in exact arithmetic; rounding (1e-13 relative in double precision) is not accounted for.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lindm.solvers.belief import joint_kernel
from lindm.types import APOMDP, at_stage
from lindm.validate import count

POINTS = 20_000  # of a stage, by default
FINEST = 40  # beliefs that agree to 2^-40 = 9e-13 are merged
SLACK = 1e-12  # relative: actions that tie up to rounding are kept
QUERY_BATCH = 8  # their distances to 20 000 points still fit in a cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Net:
    """Beliefs, intervals of their values, slopes around them. A stage with fewer than n points repeats its first one.

    Stage 0 holds the rho_m of the models, each with the interval of the one value at the start.
    """

    beliefs: Array  # [..., H, n, S]
    lower: Array  # [..., H, n] V is not below
    upper: Array  # [..., H, n] V is not above
    radius: Array  # [..., H, n] in l1, of the ball in which the point's own slopes hold
    slope_low: Array  # [..., H, n, S] slopes of V in the ball, as in (1)
    slope_high: Array  # [..., H, n, S]
    low: Array  # [..., H, S] slopes of V everywhere
    high: Array  # [..., H, S]
    lipschitz: Array  # [..., H] of V in l1
    points: Array  # [..., H] int32 how many of the n are different


def net(problem: APOMDP, *, points: int = POINTS) -> Net:
    """Intervals at no more than `points` beliefs a stage, for any number of models and any alpha; host code, not for `jit`.

    Where no stage has more than `points` reachable beliefs the intervals close (to rounding). Otherwise cells are of the size
    points^(-1/(S-1)), and the intervals as wide as the kinks in them: narrow for S <= 3, valid for every S. Time and memory grow
    with H points M A O S; see `memory_bytes`. n is the largest number of points of a stage, rounded up by at most an
    eighth, so that similar problems share one compiled `value_bounds`.

    Raises:
      ValueError: points is not a whole number above zero, or for a stack of problems.
    """
    count(points, "points")
    models = problem.models
    if models.r.ndim != 4:
        raise ValueError(f"problem must be a single one, with rewards [M, H, S, A]; got rewards of shape {models.r.shape}")
    r, rho = np.asarray(models.r, np.float64).transpose(1, 0, 3, 2), np.asarray(models.rho, np.float64)
    alpha, H, (M, S) = float(problem.alpha), len(r), rho.shape
    K = [np.asarray(joint_kernel(problem, h)).swapaxes(0, 1) for h in range(max(models.P.shape[1], models.O.shape[1]))]
    K = K * H if len(K) == 1 else K
    low, high, lipschitz = _global_slopes(K, r)

    # forward; x [n, M, S] is what each model starts from, the same for all of them from stage 1 on
    x, balls, links = [rho[None]], [np.zeros(1)], []
    reach = 0.0
    for h in range(H - 1):
        beliefs, ball, link, merged = next_layer(x[h], K[h], balls[h], reach, points)
        reach += merged
        x.append(np.broadcast_to(beliefs[:, None], (len(beliefs), M, S)))
        balls.append(ball)
        links.append(link)

    # backward
    V = [maximum(_alpha_maxmin(alpha, _rewards(x[-1], r[-1]), balls[-1]), balls[-1])]
    for h in reversed(range(H - 1)):
        everywhere = low[h + 1], high[h + 1], lipschitz[h + 1]
        F = _continuation(_rewards(x[h], r[h]), x[h], K[h], x[h + 1][:, 0], V[0], links[h], everywhere)
        V.insert(0, maximum(_alpha_maxmin(alpha, F, balls[h]), balls[h]))

    layers = [rho] + [each[:, 0] for each in x[1:]]
    V[0] = LocalBounds(*(np.repeat(part, M, 0) for part in (V[0].lower, V[0].upper, low[:1], high[:1])))
    balls[0] = np.zeros(M)
    n = _rounded_up(max(map(len, layers)), max(points, M))

    def padded(arrays: list[np.ndarray]) -> Array:
        return jnp.asarray(np.stack([np.concatenate([a, np.repeat(a[:1], n - len(a), 0)]) for a in arrays]))

    return Net(
        beliefs=padded(layers),
        lower=padded([np.minimum(v.lower, v.upper) for v in V]),  # rounding may cross them where they are equal
        upper=padded([np.maximum(v.lower, v.upper) for v in V]),
        radius=padded(balls),
        slope_low=padded([v.low for v in V]),
        slope_high=padded([v.high for v in V]),
        low=jnp.asarray(low),
        high=jnp.asarray(high),
        lipschitz=jnp.asarray(lipschitz),
        points=jnp.asarray(np.array([len(layer) for layer in layers], np.int32)),
    )


def value_bounds(net: Net, h: ArrayLike, beliefs: Array) -> tuple[Array, Array]:
    """Lower and upper bounds [...] of V_h at any beliefs [..., S], reachable or not; h from 1 to H - 1, traced or not.

    The best bounds over all points of the net, in batches of queries; `vmap` over beliefs costs no more than a leading axis.
    About 20 n S operations a query: 0.1 ms for 20 000 points.

    Raises:
      ValueError: h is a Python integer outside of 1 .. H - 1.
    """
    H = net.beliefs.shape[-3]
    if isinstance(h, int) and not 1 <= h < H:
        raise ValueError(f"h must be a stage after the first, from 1 to {H - 1}; got {h}")
    return _value_bounds(net, jnp.asarray(h), beliefs)


@jax.custom_batching.custom_vmap
def _value_bounds(net: Net, h: Array, beliefs: Array) -> tuple[Array, Array]:
    S = beliefs.shape[-1]
    g, slope_low, slope_high = (at_stage(part, h).T for part in (net.beliefs, net.slope_low, net.slope_high))
    lower, upper, radius = (at_stage(part, h)[None] for part in (net.lower, net.upper, net.radius))
    low, high, lipschitz = at_stage(net.low, h), at_stage(net.high, h), at_stage(net.lipschitz, h)

    def some(b: Array) -> tuple[Array, Array]:
        # a loop over the states: a sum over a short axis costs ten times as much
        d = [b[:, s, None] - g[s][None] for s in range(S)]  # each [queries, n]
        distance = sum((abs(each) for each in d), jnp.zeros(()))
        fall, rise = _change(d, list(low), list(high))
        fall, rise = jnp.maximum(fall, -lipschitz * distance), jnp.minimum(rise, lipschitz * distance)
        own_fall, own_rise = _change(d, [each[None] for each in slope_low], [each[None] for each in slope_high])
        near = distance <= radius
        fall = jnp.where(near, jnp.maximum(own_fall, fall), fall)
        rise = jnp.where(near, jnp.minimum(own_rise, rise), rise)
        return jnp.maximum((lower + fall).max(-1), b @ low), jnp.minimum((upper + rise).min(-1), b @ high)

    flat = beliefs.reshape(-1, S)
    missing = -len(flat) % QUERY_BATCH
    chunks = jnp.concatenate([flat, jnp.zeros((missing, S), flat.dtype)]).reshape(-1, QUERY_BATCH, S)
    bounds = [part.reshape(-1)[: len(flat)].reshape(beliefs.shape[:-1]) for part in jax.lax.map(some, chunks)]
    return jnp.minimum(*bounds), jnp.maximum(*bounds)  # ordered also where rounding crosses them


@_value_bounds.def_vmap
def _many_value_bounds(size: int, batched, *arguments):
    """Batched beliefs are more queries; batched nets or stages are evaluated one after the other, to limit memory."""
    if not any(jax.tree.leaves(batched[:2])):
        return _value_bounds(*arguments), (True, True)
    leaves, tree = jax.tree.flatten(arguments)
    where = jax.tree.leaves(batched)

    def one(i: Array) -> tuple[Array, Array]:
        return _value_bounds(*jax.tree.unflatten(tree, [x[i] if its else x for x, its in zip(leaves, where, strict=True)]))

    return jax.lax.map(one, jnp.arange(size)), (True, True)


def memory_bytes(problem: APOMDP, points: int) -> int:
    """Peak bytes of `net`: two copies of its arrays, the links between layers, the work on one layer."""
    M, H, S, A = problem.models.r.shape
    children = M * A * problem.num_observations
    sizes = [1]
    for _ in range(H - 1):
        sizes.append(min(points, sizes[-1] * children))
    n = _rounded_up(max(max(sizes), M), max(points, M))
    arrays = 8 * (3 * S + 3) * (n * H + sum(sizes))
    links = 5 * children * sum(sizes[:-1])
    return arrays + links + 8 * (8 * S + 8) * children * max(sizes[:-1], default=1)


# --- slopes of a difference


def _rise(d: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.maximum(d * low, d * high).sum(-1)


def _change(d: list[Array], low: list[Array], high: list[Array]) -> tuple[Array, Array]:
    """Both sides of (1), from the entries of d and of the slopes."""
    fall, rise = jnp.zeros(()), jnp.zeros(())
    for x, l, w in zip(d, low, high, strict=True):
        fall, rise = fall + jnp.minimum(x * l, x * w), rise + jnp.maximum(x * l, x * w)
    return fall, rise


def _global_slopes(K: list[np.ndarray], r: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slopes [H, S], twice, and Lipschitz constants [H] of V on all beliefs; r [H, M, A, S]."""
    H, *_, S = r.shape
    low, high, lipschitz = np.zeros((H + 1, S)), np.zeros((H + 1, S)), np.zeros(H + 1)
    for h in reversed(range(H)):
        (l, w, c), (k, reward) = (low[h + 1], high[h + 1], lipschitz[h + 1]), (K[h], r[h])
        low[h] = (reward + (k @ l).sum(2)).min((0, 1))
        high[h] = (reward + (k @ w).sum(2)).max((0, 1))
        for j in range(S):  # from j to every i
            D = k - k[..., j : j + 1, :]
            p, q = np.maximum(D, 0).sum(-1), np.maximum(-D, 0).sum(-1)
            moved = 2 * c * np.minimum(p, q) + np.maximum(p - q, 0) * w.max() - np.maximum(q - p, 0) * l.min()
            change = reward - reward[..., j : j + 1] + np.minimum(_rise(D, l, w), moved).sum(2)
            lipschitz[h] = max(lipschitz[h], change.max() / 2)
    return low[:H], high[:H], lipschitz[:H]


# --- forward: layers of beliefs


def _children(x: np.ndarray, K: np.ndarray) -> np.ndarray:
    """x K: unnormalized beliefs [n, M, A, O, S]."""
    return np.einsum("nms,maosx->nmaox", x, K)


def next_layer(x: np.ndarray, K: np.ndarray, ball: np.ndarray, reach: float, points: int):
    """The merged children of a layer: beliefs [n', S], the radii of their balls, and for every child its cell and whether the
    image of its parent's ball stays in the ball of the cell's point; and the largest distance from a child to its cell's point.

    A ball contains the images of its parents' balls, but its radius is at most the merging distance so far: the child of a rare
    observation can move far for a small step of its parent, and should not enlarge all balls.
    """
    u = _children(x, K)
    mass = u.sum(-1)
    seen = mass > 0
    beliefs, member = merge(u[seen] / mass[seen][:, None], points)
    cell = np.zeros(mass.shape, np.int32)
    cell[seen] = member
    g = beliefs[cell]
    apart = np.abs(u - mass[..., None] * g).sum(-1)
    merged = (apart[seen] / mass[seen]).max()

    k = K.sum(-1)
    largest, total = np.zeros(mass.shape), np.zeros(mass.shape)
    for s in range(K.shape[-1]):
        c = np.abs(K[..., s, :] - k[..., s, None] * g).sum(-1)
        largest, total = np.maximum(largest, c), total + c
    R = ball[:, None, None, None]
    least = mass - R / 2 * (k.max(-1) - k.min(-1))
    apart = apart + R * np.minimum(largest, total / 2)  # both no less than half the sum of any two
    needed = np.where(least > 0, apart / np.where(least > 0, least, 1), np.where(apart > 0, np.inf, 0))
    balls = np.zeros(len(beliefs))
    np.maximum.at(balls, member, np.minimum(needed[seen], reach + merged))
    balls = balls * (1 + 1e-9) + 2.0**-FINEST  # a child on the boundary is inside, whatever the rounding of its distance
    return beliefs, balls, (cell, needed <= balls[cell]), merged


def merge(beliefs: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """The means [n, S] of the cells of the finest grid with n <= points, and the cell [k] of each of the beliefs [k, S]."""
    axes = max(beliefs.shape[1] - 1, 1)
    _, first, finest = np.unique(_keys(beliefs, FINEST * axes), return_index=True, return_inverse=True)
    x, few, many = beliefs[first], -axes, FINEST * axes  # at the level -axes there is one cell
    if len(x) <= points:
        few = many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if len(np.unique(_keys(x, middle))) <= points else (few, middle)
    _, cell, sizes = np.unique(_keys(x, few), return_inverse=True, return_counts=True)
    means = np.stack([np.bincount(cell, column) for column in x.T], 1) / sizes[:, None]
    return means / means.sum(1, keepdims=True), cell[finest]


def _keys(beliefs: np.ndarray, level: int) -> np.ndarray:
    """One number for each cell; every level halves the cells along one of the first S - 1 coordinates.

    The grid is shifted off round numbers, where rounding would separate equal beliefs. Two cells with the same number (one pair
    in 2^64) are merged, which costs tightness and not validity: distances are computed, not assumed.
    """
    axes = beliefs.shape[1] - 1
    keys = np.zeros(len(beliefs), np.uint64)
    for i in range(axes):
        width = 0.5 ** ((level + i) // axes)
        place = np.floor((beliefs[:, i] + (i + 1) * 0.6180339887498949 % 1) / width)
        keys = (keys + place.astype(np.int64).astype(np.uint64)) * np.uint64(0xD1342543DE82EF95)
    return keys


def _rounded_up(n: int, most: int) -> int:
    step = 1 << max(n.bit_length() - 4, 0)
    return min(-(-n // step) * step, most)


# --- backward: functions near the points


class LocalBounds(NamedTuple):
    """A function around each point: an interval of its value there [n, ...], its slopes in the ball [n, ..., S]."""

    lower: np.ndarray
    upper: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _rewards(x: np.ndarray, r: np.ndarray) -> LocalBounds:
    now, slopes = np.einsum("nms,mas->nma", x, r), np.broadcast_to(r, (len(x), *r.shape))
    return LocalBounds(now, now, slopes, slopes)


def _continuation(
    rewards: LocalBounds, x: np.ndarray, K: np.ndarray, g: np.ndarray, after: LocalBounds, link, everywhere
) -> LocalBounds:
    """F [n, M, A]: the reward and what follows."""
    (cell, inside), (low, high, lipschitz) = link, everywhere
    u = _children(x, K)
    mass = u.sum(-1)
    d = u - mass[..., None] * g[cell]
    l, w = after.low[cell], after.high[cell]
    in_l1 = lipschitz * np.abs(d).sum(-1)
    lower = (mass * after.lower[cell] - np.minimum(_rise(-d, l, w), in_l1)).sum(-1)
    upper = (mass * after.upper[cell] + np.minimum(_rise(d, l, w), in_l1)).sum(-1)
    l, w = (np.einsum("maosx,nmaox->nmas", K, np.where(inside[..., None], *both)) for both in ((l, low), (w, high)))
    return LocalBounds(rewards.lower + lower, rewards.upper + upper, rewards.low + l, rewards.high + w)


def maximum(f: LocalBounds, ball: np.ndarray) -> LocalBounds:
    """The maximum over the first axis after the points; the slopes are those of all that can be the largest in the ball."""
    best = f.lower.argmax(1)
    lower, low, high = (np.take_along_axis(part, _broadcast_like(best, part), 1) for part in (f.lower, f.low, f.high))
    change = (f.high - low).max(-1) - (f.low - high).min(-1)
    slack = SLACK * max(np.abs(f.low).max(), np.abs(f.high).max())
    candidate = (f.upper + _broadcast_like(ball, f.upper) / 2 * change >= lower - slack)[..., None]
    slopes = np.where(candidate, f.low, np.inf).min(1), np.where(candidate, f.high, -np.inf).max(1)
    return LocalBounds(f.lower.max(1), f.upper.max(1), *slopes)


def _alpha_maxmin(alpha: float, F: LocalBounds, ball: np.ndarray) -> LocalBounds:
    """alpha min + (1 - alpha) max over the models: [n, A]."""
    best, worst = maximum(F, ball), maximum(LocalBounds(-F.upper, -F.lower, -F.high, -F.low), ball)
    worst = LocalBounds(-worst.upper, -worst.lower, -worst.high, -worst.low)
    return LocalBounds(*(alpha * bad + (1 - alpha) * good for bad, good in zip(worst, best, strict=True)))


def _broadcast_like(x: np.ndarray, array: np.ndarray) -> np.ndarray:
    """x with a second axis and trailing axes of length one, to broadcast against the array."""
    x = x[:, None]
    return x.reshape(x.shape + (1,) * (array.ndim - x.ndim))
