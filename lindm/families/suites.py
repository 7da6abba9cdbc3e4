"""Suites of random decision problems: `mdp`, `pomdp` and `apomdp`, each with three horizons, in and out of distribution.

Tasks have Dirichlet kernels and rewards in round numbers (short in text, exact in a file). A learner is trained on the split
`id`; the split `ood` draws from other laws: kernels closer to deterministic, rewards that may be negative, noisier
observations, models that differ more, a more cautious attitude. Nothing is discounted.

Random problems have many near-ties, where labels carry little information. So a task is drawn again until its action gap
reaches the suite's: the best action leads the second best by at least that much at every stage and state of an MDP, and at
every history of a POMDP or an APOMDP that the optimal policy reaches with probability `REACH` or more (under the models that
nature took). Tasks follow the laws above conditioned on that; 20 to 70 % of the candidates pass. A larger gap favors tasks in
which one action is always best. With the gaps chosen here observations matter: at the shortest horizons the best fixed sequence
of actions loses 14 to 22 % of what the optimal policy gains over the uniformly random one, in the mean over tasks.
"""

from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array

from lindm import validate
from lindm.choices import Split
from lindm.errors import unknown
from lindm.problems.apomdp import as_apomdp, draw_apomdp
from lindm.problems.mdp import draw_stationary_mdp
from lindm.problems.pomdp import draw_pomdp
from lindm.solvers import tree
from lindm.solvers.belief import branching, child_history, children, joint_kernel, step_index
from lindm.solvers.dp import backward_induction
from lindm.solvers.ties import greedy
from lindm.types import APOMDP, MDP, Problem

SPLITS = get_args(Split)
REACH = 0.05
MAX_CANDIDATES = 1000


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A law of tasks. Sizes and horizon are Python numbers: a suite is hashable, and static under `jit`."""

    name: str
    horizon: int
    split: Split = "id"
    S: int
    A: int
    O: int = 0  # 0: the state is observed
    M: int = 0  # 0: the model is known
    concentration: float = 1.0  # of the Dirichlet rows of P: below one closer to deterministic
    quality: float = 1.0  # of the observations: 0 is uninformative, 1 determines the state (where O >= S)
    distance: float = 0.0  # between models: their rows differ by at most this in total variation
    alpha: float = 1.0  # attitude: 1 worst case, 0 best case
    gap: float = 0.0  # smallest difference between the best and the second best action, in units of reward
    low: float = 0.0  # rewards are uniform in [low, high], in multiples of step
    high: float = 1.0
    step: float = 0.05


HORIZONS = {"mdp": (4, 8, 16), "pomdp": (4, 6, 8), "apomdp": (3, 4, 5)}
_IN_DISTRIBUTION = {
    "mdp": Suite(name="mdp", horizon=0, S=5, A=3, concentration=0.5, gap=0.05),
    "pomdp": Suite(name="pomdp", horizon=0, S=4, A=3, O=2, concentration=0.3, quality=0.9, gap=0.02),
    "apomdp": Suite(
        name="apomdp", horizon=0, S=3, A=3, O=2, M=3, concentration=0.3, quality=0.9, distance=0.3, alpha=0.7, gap=0.02
    ),
}
_OUT_OF_DISTRIBUTION = {
    "mdp": {"concentration": 0.1, "low": -1.0},
    "pomdp": {"concentration": 0.1, "quality": 0.8, "low": -1.0},
    "apomdp": {"concentration": 0.1, "quality": 0.8, "low": -1.0, "distance": 0.6, "alpha": 0.9},
}
NAMES = tuple(_IN_DISTRIBUTION)


def suite(name: str, horizon: int | None = None, split: Split = "id", **sizes: Any) -> Suite:
    """A named suite; by default its middle horizon.

    Args:
      sizes: other fields of `Suite`, in place of the suite's own.

    Raises:
      ValueError: an unknown name, horizon, split or field, or a size out of its range.
    """
    if name not in NAMES:
        raise ValueError(unknown("suite", name, NAMES))
    if split not in SPLITS:
        raise ValueError(unknown("split", split, SPLITS))
    horizon = HORIZONS[name][1] if horizon is None else horizon
    if horizon not in HORIZONS[name]:
        raise ValueError(f"horizon of the suite {name} must be one of {', '.join(map(str, HORIZONS[name]))}; got {horizon}")
    known = [field.name for field in fields(Suite)]
    if wrong := [size for size in sizes if size not in known]:
        raise ValueError(unknown("a size of a suite", wrong[0], known))
    other_laws = _OUT_OF_DISTRIBUTION[name] if split == "ood" else {}
    made = replace(_IN_DISTRIBUTION[name], horizon=horizon, split=split, **other_laws | sizes)
    for size, least in (("S", 1), ("A", 1), ("O", 0), ("M", 0)):
        validate.count(getattr(made, size), size, least)
    for number in ("quality", "distance", "alpha"):
        validate.fraction(getattr(made, number), number)
    for number in ("gap", "step"):
        validate.nonnegative(getattr(made, number), number)
    validate.positive(made.concentration, "concentration")
    return made


def draw_task(key: Array, suite: Suite) -> Problem:
    """One task: an MDP, POMDP or APOMDP as the suite has observations and models.

    Candidates are drawn until one has the suite's gap. If none of `MAX_CANDIDATES` has, the rewards are NaN.
    """
    validate.nonnegative(suite.gap, "gap")

    def candidate(tried: Array) -> Problem:
        return _draw(jax.random.fold_in(key, tried), suite)

    if suite.gap == 0:
        return candidate(jnp.zeros((), jnp.int32))

    def insufficient(carry: tuple[Array, Array]) -> Array:
        return (carry[1] < suite.gap * (1 - 1e-9)) & (carry[0] < MAX_CANDIDATES)

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
    ambiguity = {"quality": suite.quality, "distance": suite.distance, "alpha": suite.alpha}
    return draw_apomdp(key, S, A, suite.O, H, suite.M, **ambiguity, **law)


def action_gap(problem: Problem) -> Array:
    """The smallest difference [] between the best and the second best action, over the histories in question (see above).

    Infinite for a single action.
    """
    if isinstance(problem, MDP):
        return _action_gap(backward_induction(problem).Q).min()
    apomdp = as_apomdp(problem)
    B, M, S = branching(apomdp), apomdp.num_models, apomdp.num_states
    table = tree.tree(apomdp)
    m, o = jnp.divmod(jnp.arange(M * apomdp.num_observations, dtype=jnp.int32)[None], apomdp.num_observations)
    history, gap = jnp.zeros(1, jnp.int32), jnp.asarray(inf)
    beliefs = apomdp.models.rho[None]  # [n, M, S] not normalized; the same under each model but at the first stage
    for t in range(apomdp.horizon):
        Q = tree.stage_Q(table, t, B)[history]
        reached = beliefs.sum(-1).max(-1) >= REACH
        gap = jnp.minimum(gap, jnp.where(reached, _action_gap(Q), inf).min())
        action = greedy(Q, per_row=True)
        joint = children(joint_kernel(apomdp, t)[action], beliefs)
        history = child_history(apomdp, t, history[:, None], step_index(apomdp, action[:, None], m, o)).reshape(-1)
        beliefs = jnp.broadcast_to(joint.reshape(-1, 1, S), (len(history), M, S))
    return gap


def _action_gap(Q: Array) -> Array:
    """The best minus the second best value [...] of Q [..., A]."""
    if Q.shape[-1] == 1:
        return jnp.full(Q.shape[:-1], inf, Q.dtype)
    best = jax.lax.top_k(Q, 2)[0]
    return best[..., 0] - best[..., 1]
