"""The columns of a dataset: their names, meanings and types, and the rows as dataclasses.

To add a column of episodes, add a field to `Episodes` or `Labels` (`lindm.types`), an entry to `STEP_COLUMNS` or `LABEL_COLUMNS`,
and a field to `Episode`: writer, reader and data card follow. To add a column of tasks, add an entry to `TASK_COLUMNS`, a field
to `Task`, and its value to `make_shard` in `lindm.datasets.shards`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from lindm.text import Step
from lindm.types import APOMDP, MDP, POMDP, Episodes, Labels, Problem, RewardFunction

Kind = Literal["mdp", "pomdp", "apomdp"]
Role = Literal["demo", "query"]
ROLES: tuple[Role, ...] = ("demo", "query")


class Column(NamedTuple):
    """A column with a value at every step of an episode."""

    field: str  # of `Episodes` or `Labels`
    dtype: type
    description: str


KEY_COLUMNS = {
    "task": "the task that the episode belongs to",
    "episode": "its number within the task and the role",
    "role": "demo or query",
}
STEP_COLUMNS = {
    "state": Column("s", np.int32, "[H] before the action"),
    "model": Column("m", np.int32, "[H] that nature took, after the action"),
    "observation": Column("o", np.int32, "[H] of the next state, after the action"),
    "action": Column("a", np.int32, "[H] that was taken"),
    "reward": Column("paid", np.float64, "[H] that the environment paid, not discounted: R of this very step"),
    "discounted_mean_reward": Column(
        "r", np.float64, "[H] gamma^h E[R] given the state and the action: the reward of the step in values, Q and regret"
    ),
}
LABEL_COLUMNS = {
    "label": Column(
        "action",
        np.int32,
        "[H] the oracle's action: for the state of an mdp, otherwise for the history of actions, models and observations; "
        "greedy in the lower bounds, so where the certificate is bounded it may differ from the argmax of Q",
    ),
    "Q": Column(
        "Q",
        np.float64,
        "[H, A] the oracle's action values there, in units of reward: exact, or the middle of its bounds; null where an "
        "action is not legal",
    ),
    "certificate": Column(
        "certificate", np.int8, "[H] of the label: 0 exact, 1 certified (no other action can be better), 2 bounded"
    ),
    "regret": Column(
        "regret",
        np.float64,
        "[H] at most this much is lost by the label at this step, in units of reward; 0 where exact or certified",
    ),
    "legal": Column("legal", np.bool_, "[H, A] whether an action is legal there; only where a problem has actions that are not"),
}
TASK_COLUMNS = {
    "task": "number of the task, from 0",
    "kind": "mdp, pomdp or apomdp",
    "horizon": "H, the number of decisions of an episode",
    "num_states": "S",
    "num_actions": "A",
    "num_observations": "O",
    "num_models": "M, the number of models of an ambiguous POMDP",
    "discount": "gamma: values count the reward of stage h gamma^h times; the column reward is not discounted",
    "value": "of the oracle's policy from the start, in units of reward: exact, or the middle of its bounds",
    "lower": "certified lower bound of the optimal value; the value where the oracle is exact",
    "upper": "certified upper bound, likewise",
    "uniform_value": "of uniformly random actions; only where the oracle is exact",
    "method": "of the oracle: backward induction or tree (exact), hsvi or net (certified bounds)",
}
VALUES = ("value", "lower", "upper", "uniform_value")
PROBLEM_COLUMNS = {
    "P": "transition probabilities, flattened in C order",
    "P_shape": "their shape, [H or 1, S, A, S]; of an apomdp with the models in front, here and below",
    "O": "observation probabilities, flattened",
    "O_shape": "their shape, [H or 1, A, S, O]",
    "r": "mean rewards, discounted: r[h, s, a] = gamma^h E[R], flattened",
    "r_shape": "their shape, [H, S, A]",
    "rho": "law of the first state, flattened",
    "rho_shape": "its shape, [S]",
    "legal": "1 where a state allows an action and 0 elsewhere, flattened; absent where every action is legal",
    "legal_shape": "its shape, [S, A]",
    "R": "rewards that the environment pays, not discounted, flattened",
    "R_shape": "their shape, [H or 1, S, A, S or 1, O or 1]: by state, action, next state, observation",
    "alpha": "attitude to ambiguity in [0, 1]: 1 is the worst case",
}

REWARD_CONVENTION = (
    "reward is what the environment paid at this step, not discounted; discounted_mean_reward is gamma^h E[R] given the state "
    "and the action at stage h, so that values, Q and regret are sums of it; gamma is discount"
)

ARRAYS = ("P", "O", "r", "rho", "R", "legal")  # those of them that have a shape

STEP_FIELDS = frozenset({"state", "model", "observation", "reward", "legal"})
"""What a step of a text can show beside its action."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """A row of the table of episodes. Columns over steps are lists of length H; meanings: `STEP_COLUMNS`, `LABEL_COLUMNS`."""

    task: int
    episode: int
    role: Role
    state: list[int]
    model: list[int] | None = None
    observation: list[int] | None = None
    action: list[int]
    reward: list[float]
    discounted_mean_reward: list[float]
    label: list[int]
    Q: list[list[float | None]]
    certificate: list[int]
    regret: list[float]
    legal: list[list[bool]] | None = None

    def steps(self, shown: Collection[str] = STEP_FIELDS) -> tuple[Step, ...]:
        """The steps as a text shows them: actions, and those of `STEP_FIELDS` that are in `shown` and that the episode has."""
        columns = {name: column for name in STEP_FIELDS if name in shown and (column := getattr(self, name)) is not None}
        if "legal" in columns:
            columns["legal"] = [tuple(a for a, allowed in enumerate(row) if allowed) for row in columns["legal"]]
        return tuple(Step(action=a, **{name: x[t] for name, x in columns.items()}) for t, a in enumerate(self.action))


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A row of the table of tasks, with its episodes; None for what a problem of its kind does not have."""

    task: int
    kind: Kind
    horizon: int
    num_states: int
    num_actions: int
    num_observations: int | None = None
    num_models: int | None = None
    discount: float
    value: float
    lower: float
    upper: float
    uniform_value: float | None = None
    method: str
    arrays: Mapping[str, Any]  # the columns of the problem
    demonstrations: tuple[Episode, ...]
    queries: tuple[Episode, ...]

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """Demonstrations, then queries: the order of the table."""
        return self.demonstrations + self.queries

    def problem(self) -> Problem:
        """The problem, in the floating point precision that JAX has now."""
        return problem_of({"kind": self.kind, **self.arrays})


def task_of(row: Mapping[str, Any], episodes: Sequence[Episode]) -> Task:
    """A task from the columns of its row and its episodes."""
    scalars = {name: value for name, value in row.items() if name in TASK_COLUMNS}
    arrays = {name: value for name, value in row.items() if name in PROBLEM_COLUMNS or name == "discount"}
    by_role = {role: tuple(episode for episode in episodes if episode.role == role) for role in ROLES}
    return Task(**scalars, arrays=arrays, demonstrations=by_role["demo"], queries=by_role["query"])


def problem_of(row: Mapping[str, Any]) -> Problem:
    """The problem of a row of the Parquet or JSON-lines files (for a fixed problem, joined with the one row of `problem`)."""
    present = [name for name in ARRAYS if name in row]
    arrays: dict[str, Any] = {k: jnp.asarray(np.array(row[k], float).reshape(np.array(row[f"{k}_shape"]))) for k in present}
    if (R := arrays.pop("R", None)) is not None:
        models = R.shape[:-5]  # none, or M
        arrays["paid"] = RewardFunction(R=R, discount=jnp.full(models, row["discount"], R.dtype))
    if "legal" in arrays:
        arrays["legal"] = arrays["legal"] > 0
    if row["kind"] == "mdp":
        return MDP(**arrays)
    return POMDP(**arrays) if row["kind"] == "pomdp" else APOMDP(models=POMDP(**arrays), alpha=jnp.asarray(row["alpha"]))


def problem_columns(problems: Problem) -> dict[str, np.ndarray]:
    """The columns of problems with a leading axis [n, ...]: every array flattened, with its shape."""
    one = problems.models if isinstance(problems, APOMDP) else problems
    arrays = {name: getattr(one, name, None) for name in ARRAYS} | ({} if one.paid is None else {"R": one.paid.R})
    columns: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if array is not None:
            x = np.asarray(array, np.float64)
            columns[name] = x.reshape(len(x), -1)
            columns[f"{name}_shape"] = np.tile(x.shape[1:], (len(x), 1))
    return columns | ({"alpha": np.asarray(problems.alpha, np.float64)} if isinstance(problems, APOMDP) else {})


def sizes_of(problem: Problem) -> dict[str, Any]:
    """Kind, horizon and sizes of a problem, as columns of a task."""
    sizes = {"kind": type(problem).__name__.lower(), "horizon": problem.horizon}
    sizes |= {"num_states": problem.num_states, "num_actions": problem.num_actions}
    if not isinstance(problem, MDP):
        sizes["num_observations"] = problem.num_observations
    return sizes | ({"num_models": problem.num_models} if isinstance(problem, APOMDP) else {})


def episodes_of(rows: Sequence[Episode]) -> tuple[Episodes, Labels]:
    """Episodes and labels [n, H] of rows of one dataset, as numpy arrays."""

    def stack(columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
        present = {name: column for name, column in columns.items() if getattr(rows[0], name) is not None}
        return {c.field: np.array([getattr(row, name) for row in rows], c.dtype) for name, c in present.items()}

    arrays: dict[str, Any] = stack(STEP_COLUMNS)
    labels: dict[str, Any] = stack(LABEL_COLUMNS)
    return Episodes(**arrays), Labels(**labels)
