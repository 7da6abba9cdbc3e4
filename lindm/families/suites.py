"""Named families of random decision problems: `mdp`, `pomdp`, `apomdp`, in three horizons, in and out of distribution.

Every task is drawn anew: Dirichlet kernels, rewards in round numbers (short in text, exact in a file). A learner is trained on
the `id` split; the `ood` split draws from other laws: kernels closer to deterministic, rewards that may be negative, blurred
observations, models further apart, a more cautious attitude. Nothing is discounted.

Random problems are full of near-ties, where labels say little and agreement with them says less. So a task is drawn again until
no decision that matters is closer than the suite's gap: the best action leads the second best by at least that much at any stage
and state of an MDP, and at any history that the oracle's own play meets with probability `REACH` or more (under the models that
nature took) of the others. The laws of the tasks are those above, conditioned on that; 20 to 70 % of the candidates pass. A
larger gap favours tasks in which one action is best whatever is seen. As they are, seeing matters: at the shortest horizons the
best sequence of actions fixed beforehand loses 14 to 22 % of what the oracle gains over random play, in the mean over tasks.
"""

from dataclasses import dataclass, replace
from math import inf

import jax
import jax.numpy as jnp
from jax import Array

from lindm import validate
from lindm.problems.apomdp import as_apomdp, draw_apomdp
from lindm.problems.mdp import draw_stationary_mdp
from lindm.problems.pomdp import draw_pomdp
from lindm.solvers import tree
from lindm.solvers.dp import backward_induction, greedy
from lindm.types import APOMDP, MDP, Problem

SPLITS = ("id", "ood")
REACH = 0.05
TRIES = 1000


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A law of tasks. Sizes and horizon are Python numbers: a suite is hashable, and static under `jit`."""

    name: str
    horizon: int
    split: str = "id"
    S: int
    A: int
    O: int = 0  # 0: the state is seen
    M: int = 0  # 0: the model is known
    concentration: float = 1.0  # of the Dirichlet rows of P: below one closer to deterministic
    quality: float = 1.0  # of the observations: 0 says nothing, 1 tells the state (where O >= S)
    distance: float = 0.0  # between the models of a cloud: their rows differ by at most this in total variation
    alpha: float = 1.0  # attitude: 1 worst case, 0 best case
    gap: float = 0.0  # the least lead of the best action, in units of reward
    low: float = 0.0  # rewards are uniform in [low, high], in multiples of step
    high: float = 1.0
    step: float = 0.05


HORIZONS = {"mdp": (4, 8, 16), "pomdp": (4, 6, 8), "apomdp": (3, 4, 5)}
_IN = {
    "mdp": Suite(name="mdp", horizon=0, S=5, A=3, concentration=0.5, gap=0.05),
    "pomdp": Suite(name="pomdp", horizon=0, S=4, A=3, O=2, concentration=0.3, quality=0.9, gap=0.02),
    "apomdp": Suite(
        name="apomdp", horizon=0, S=3, A=3, O=2, M=3, concentration=0.3, quality=0.9, distance=0.3, alpha=0.7, gap=0.02
    ),
}
_OUT = {
    "mdp": {"concentration": 0.1, "low": -1.0},
    "pomdp": {"concentration": 0.1, "quality": 0.8, "low": -1.0},
    "apomdp": {"concentration": 0.1, "quality": 0.8, "low": -1.0, "distance": 0.6, "alpha": 0.9},
}
NAMES = tuple(_IN)


def suite(name: str, horizon: int | None = None, split: str = "id") -> Suite:
    """A named suite; the middle one of its three horizons by default. ValueError for unknown names, horizons and splits."""
    if name not in NAMES:
        raise ValueError(f"suite must be one of {', '.join(NAMES)}; got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    horizon = HORIZONS[name][1] if horizon is None else horizon
    if horizon not in HORIZONS[name]:
        raise ValueError(f"horizon of the suite {name} must be one of {', '.join(map(str, HORIZONS[name]))}; got {horizon}")
    return replace(_IN[name], horizon=horizon, split=split, **(_OUT[name] if split == "ood" else {}))


def draw_task(key: Array, suite: Suite) -> Problem:
    """One task: an MDP, POMDP or APOMDP as the suite has observations and models.

    Candidates are drawn until one has the suite's gap. If none of `TRIES` has, the rewards are NaN: the gap is too large.
    """
    validate.nonnegative(suite.gap, "gap")

    def candidate(tried: Array) -> Problem:
        return _draw(jax.random.fold_in(key, tried), suite)

    if suite.gap == 0:
        return candidate(jnp.zeros((), jnp.int32))

    def insufficient(carry: tuple[Array, Array]) -> Array:
        return (carry[1] < suite.gap * (1 - 1e-9)) & (carry[0] < TRIES)

    def again(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return carry[0] + 1, action_gap(candidate(carry[0]))

    tried, gap = jax.lax.while_loop(insufficient, again, (jnp.zeros((), jnp.int32), jnp.asarray(-inf)))
    task = candidate(tried - 1)
    fault = jnp.where(gap < suite.gap * (1 - 1e-9), jnp.nan, 0)
    if isinstance(task, APOMDP):
        return replace(task, models=replace(task.models, r=task.models.r + fault))
    return replace(task, r=task.r + fault)


def _draw(key: Array, suite: Suite) -> Problem:
    law = {"concentration": suite.concentration, "low": suite.low, "high": suite.high, "step": suite.step}
    S, A, H = suite.S, suite.A, suite.horizon
    if suite.O == 0:
        return draw_stationary_mdp(key, S, A, H, **law)
    if suite.M == 0:
        return draw_pomdp(key, S, A, suite.O, H, quality=suite.quality, **law)
    cloud = {"quality": suite.quality, "distance": suite.distance, "alpha": suite.alpha}
    return draw_apomdp(key, S, A, suite.O, H, suite.M, **cloud, **law)


def action_gap(problem: Problem) -> Array:
    """The least lead [] of the best action over the second best, where it matters (see above); infinite for a single action."""
    if isinstance(problem, MDP):
        return _lead(backward_induction(problem).Q).min()
    cloud = as_apomdp(problem)
    B, A = tree.branching(cloud), cloud.num_actions
    table = tree.tree(cloud)
    history, gap = jnp.zeros(1, jnp.int32), jnp.asarray(inf)
    U = cloud.models.rho[None]  # [n, M, S]: the belief under each model, all alike but at the first stage
    for t in range(cloud.horizon):
        Q = tree.stage_Q(table, t, B)[history]
        met = U.sum(-1).max(-1) >= REACH
        gap = jnp.minimum(gap, jnp.where(met, _lead(Q), inf).min())
        action = jax.vmap(greedy)(Q)
        U = jnp.einsum("nmosu,nms->nmou", tree.kernel(cloud, t)[action], U)
        seen = jnp.arange(B // A, dtype=jnp.int32)[None]
        steps = (action[:, None] * (B // A) + seen) * B**t + history[:, None]
        history, U = steps.reshape(-1), U.reshape(-1, 1, U.shape[-1])
        U = jnp.broadcast_to(U, (len(U), cloud.models.rho.shape[0], U.shape[-1]))
    return gap


def _lead(Q: Array) -> Array:
    """Best minus second best [...] of Q [..., A]."""
    if Q.shape[-1] == 1:
        return jnp.full(Q.shape[:-1], inf, Q.dtype)
    best = jax.lax.top_k(Q, 2)[0]
    return best[..., 0] - best[..., 1]
