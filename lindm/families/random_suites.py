"""Suites of random decision problems: `mdp`, `pomdp` and `apomdp`, in and out of distribution.

Tasks have Dirichlet kernels and rewards in round numbers (short in text, exact in a file). A learner is trained on the split
`id`; the split `ood` draws from other laws: kernels closer to deterministic, rewards that may be negative, noisier
observations, models that differ more, a more cautious attitude. Nothing is discounted.

Random problems have many near-ties, where labels carry little information. So a task is drawn again until its action gap
reaches the suite's: the best action leads the second best by at least that much at every stage and state of an MDP, and at
every history of a POMDP or an APOMDP that the optimal policy reaches with probability `REACH` or more (under the models that
nature took). Tasks follow the laws above conditioned on that; at the default sizes 20 to 70 % of the candidates pass. A larger
gap favors tasks in which one action is always best. With the gaps chosen here observations matter: at the shortest horizons the
best fixed sequence of actions loses 14 to 22 % of what the optimal policy gains over the uniformly random one, in the mean over
tasks. More states, actions or stages make near-ties more frequent, and the gap is smaller in proportion (`default_gap`).
"""

from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from lindm import validate
from lindm.choices import Split
from lindm.errors import unknown
from lindm.families.suites import SPLITS, Sizes, Suite
from lindm.problems.apomdp import as_apomdp, draw_apomdp
from lindm.problems.mdp import draw_stationary_mdp
from lindm.problems.pomdp import draw_pomdp
from lindm.solvers import tree
from lindm.solvers.belief import branching, child_history, children, joint_kernel, step_index
from lindm.solvers.dp import backward_induction
from lindm.solvers.solve import method_for
from lindm.solvers.ties import greedy
from lindm.types import APOMDP, MDP, Problem

REACH = 0.05
MAX_CANDIDATES = 1000
MOST_TIES = 4.0


@dataclass(frozen=True, kw_only=True)
class RandomSuite(Suite):
    """A law of random tasks."""

    states: int
    """Number of states."""
    actions: int
    """Number of actions."""
    observations: int = 0
    """Number of observations; 0: the state is observed."""
    models: int = 0
    """Number of models; 0: the model is known."""
    concentration: float = 1.0
    """Concentration of the Dirichlet rows of P: below one closer to deterministic."""
    quality: float = 1.0
    """Quality of the observations: 0 is uninformative, 1 determines the state (with as many observations as states)."""
    distance: float = 0.0
    """Distance between models: their rows differ by at most this in total variation."""
    alpha: float = 1.0
    """Attitude to ambiguity: 1 is the worst case over the models, 0 the best."""
    gap: float = 0.0
    """Smallest difference between the best and the second best action, in units of reward."""
    low: float = 0.0
    """Smallest reward."""
    high: float = 1.0
    """Largest reward."""
    step: float = 0.05
    """Rewards are multiples of this number."""

    traceable: ClassVar[bool] = True

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.states, self.actions, self.observations, self.models)

    def draw(self, key: Array) -> Problem:
        return draw_task(key, self)


HORIZONS = {"mdp": (4, 8, 16), "pomdp": (4, 6, 8), "apomdp": (3, 4, 5)}
_IN_DISTRIBUTION = {
    "mdp": RandomSuite(name="mdp", horizon=0, states=5, actions=3, concentration=0.5, gap=0.05),
    "pomdp": RandomSuite(name="pomdp", horizon=0, states=4, actions=3, observations=2, concentration=0.3, quality=0.9, gap=0.02),
    "apomdp": RandomSuite(
        name="apomdp",
        horizon=0,
        states=3,
        actions=3,
        observations=2,
        models=3,
        concentration=0.3,
        quality=0.9,
        distance=0.3,
        alpha=0.7,
        gap=0.02,
    ),
}
_OUT_OF_DISTRIBUTION = {
    "mdp": {"concentration": 0.1, "low": -1.0},
    "pomdp": {"concentration": 0.1, "quality": 0.8, "low": -1.0},
    "apomdp": {"concentration": 0.1, "quality": 0.8, "low": -1.0, "distance": 0.6, "alpha": 0.9},
}
_AMBIGUOUS = {"models", "distance", "alpha"}
_HIDDEN = {"observations", "quality"}
NAMES = tuple(_IN_DISTRIBUTION)


def options_of(name: str) -> tuple[str, ...]:
    """The options of a suite: the fields of `RandomSuite` that its kind of problem has."""
    absent = {"name"} | (_HIDDEN | _AMBIGUOUS if name == "mdp" else _AMBIGUOUS if name == "pomdp" else set())
    return tuple(field.name for field in fields(RandomSuite) if field.name not in absent)


def suite(name: str, horizon: int | None = None, split: Split = "id", **options: Any) -> RandomSuite:
    """A named suite; by default the middle one of `HORIZONS`.

    Args:
      options: other fields of `RandomSuite`, in place of the suite's own. Without `gap` it is `default_gap`.

    Raises:
      ValueError: an unknown name, split or option, or a value out of its range.
    """
    if name not in NAMES:
        raise ValueError(unknown("suite", name, NAMES))
    if split not in SPLITS:
        raise ValueError(unknown("split", split, SPLITS))
    if wrong := [option for option in options if option not in options_of(name)]:
        raise ValueError(unknown(f"an option of {name}", wrong[0], options_of(name)))
    horizon = HORIZONS[name][1] if horizon is None else validate.count(horizon, "horizon")
    other_laws = _OUT_OF_DISTRIBUTION[name] if split == "ood" else {}
    made = replace(_IN_DISTRIBUTION[name], horizon=horizon, split=split, **other_laws | options)
    for size in options_of(name):
        if size in Sizes._fields:
            validate.count(getattr(made, size), size)
    for number in ("quality", "distance", "alpha"):
        validate.fraction(getattr(made, number), number)
    for number in ("gap", "step"):
        validate.nonnegative(getattr(made, number), number)
    validate.positive(made.concentration, "concentration")
    validate.interval(made.low, made.high)
    return made if "gap" in options else replace(made, gap=default_gap(made))


def default_gap(suite: RandomSuite) -> float:
    """The gap of a suite of these sizes: inversely proportional to the number of rivals that the best actions have.

    These are S A H in an MDP and M A H otherwise (the number of histories that are reached with probability `REACH` is bounded).
    Up to the suite's own sizes at its longest horizon, the gap is the suite's own. It is 0 where the oracle is not exact, and for
    MDPs where about S A step / (high - low) states, more than `MOST_TIES`, have two best actions at the last stage.
    """
    own = replace(_IN_DISTRIBUTION[suite.name], horizon=HORIZONS[suite.name][-1])
    ties = suite.states * suite.actions * suite.step / max(suite.high - suite.low, suite.step or inf)
    if method_for(suite.example) not in ("backward induction", "tree") or (not suite.observations and ties > MOST_TIES):
        return 0.0
    rivals, most = (
        made.horizon * made.actions * (max(made.models, 1) if made.observations else made.states) for made in (suite, own)
    )
    return own.gap * min(1.0, most / rivals)


def draw_task(key: Array, suite: RandomSuite) -> Problem:
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


def _draw(key: Array, suite: RandomSuite) -> Problem:
    law = {"concentration": suite.concentration, "low": suite.low, "high": suite.high, "step": suite.step}
    S, A, H = suite.states, suite.actions, suite.horizon
    if suite.observations == 0:
        return draw_stationary_mdp(key, S, A, H, **law)
    if suite.models == 0:
        return draw_pomdp(key, S, A, suite.observations, H, quality=suite.quality, **law)
    ambiguity = {"quality": suite.quality, "distance": suite.distance, "alpha": suite.alpha}
    return draw_apomdp(key, S, A, suite.observations, H, suite.models, **ambiguity, **law)


def action_gap(problem: Problem, solved: tree.Tree | None = None) -> Array:
    """The smallest difference [] between the best and the second best action, over the histories in question (see above).

    Infinite for a single action. `solved`: Q* of a POMDP or an APOMDP where it is known.
    """
    if isinstance(problem, MDP):
        return _action_gap(backward_induction(problem).Q).min()
    apomdp = as_apomdp(problem)
    B, M, S = branching(apomdp), apomdp.num_models, apomdp.num_states
    table = tree.tree(apomdp) if solved is None else solved
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
