"""Episodes of decision problems, one step at a time, in numpy; and the same as environments of Gymnasium.

observation   MDP: the state. POMDP: the last observation, and O before the first one. Ambiguous POMDP: the same of m O + o,
              with the model m of the step, and M O before the first one
reward        that the problem pays for the step, not discounted: R(s, a, s', o). The value of a policy is the mean of the
              sum of discount^h times the reward of stage h
terminated    the horizon is over (it belongs to the problem: nothing is earned afterward), or the state keeps itself under
              every action and pays nothing. An episode is never truncated; one without a horizon may never end
info          stage and state (which a policy of a POMDP does not see); where not every action is legal, action_mask; after a
              step discounted_mean_reward, discount^h E[R | s, a], and, in an ambiguous POMDP, model
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax import Array
from scipy import sparse

from lindm.errors import UsageError
from lindm.evaluation.environments import double_precision
from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.belief import advance
from lindm.solvers.solve import Tables, q_bounds, solve
from lindm.types import APOMDP, MDP, POMDP

GAME = "game"
Info = dict[str, Any]


class Simulator:
    """One episode of a problem at a time."""

    def __init__(self, problem: MDP | POMDP | APOMDP | StationaryPOMDP, nature: int | str | None = None):
        """nature: of an ambiguous POMDP: the model that makes every step, or `GAME`: nature's choice against each action."""
        self.discount = float(problem.discount)
        self.horizon = None if isinstance(problem, StationaryPOMDP) else problem.horizon
        self.num_states, self.num_actions = problem.num_states, problem.num_actions
        self.num_observations = 0 if isinstance(problem, MDP) else problem.num_observations
        self.observed, self.ambiguous = self.num_observations == 0, isinstance(problem, APOMDP)
        self.models = [_Model(model) for model in _models(problem)]
        self.model = nature if isinstance(nature, int) else 0  # makes every step where there is no game
        self.game = _Game(problem) if isinstance(problem, APOMDP) and nature == GAME else None
        ended = np.all([model.ended for model in self.models], axis=0)
        self.ended = np.zeros_like(ended) if ended.all() else ended  # where nothing is ever paid, episodes have their length
        self.stage: int | None = None  # None: no episode is in progress
        self.state: int | None = None  # None: drawn with the first step

    @property
    def num_seen(self) -> int:
        """The number of values that an observation can have."""
        return self.num_states if self.observed else len(self.models) * self.num_observations + 1

    def reset(self, random: np.random.Generator) -> tuple[int, Info]:
        """A new episode: its first observation and info."""
        self.stage, self.state = 0, None
        if self.game is not None:
            self.game.reset()  # nature's first choice comes before the first state: each model has its own law
        else:
            self.state = _draw(self.models[self.model].rho, random)
        seen = self.state if self.observed else None
        return self.num_seen - 1 if seen is None else seen, self._info()

    def step(self, a: int, random: np.random.Generator) -> tuple[int, float, bool, Info]:
        """Observation, reward, terminated and info of an action, while an episode is in progress."""
        assert self.stage is not None
        t, m = self.stage, self.model if self.game is None else self.game.choose(a, random)
        model = self.models[m]
        s = _draw(model.rho, random) if self.state is None else self.state
        if model.legal is not None and not model.legal[s, a]:
            raise ValueError(
                f"action must be legal in the state: {np.flatnonzero(model.legal[s]).tolist()} in state {s}; got {a}"
            )
        following = _draw(model.next_states(t, s, a), random)
        o = 0 if self.observed else _draw(model.observations(t, a, following), random)
        reward = model.pay(t, s, a, following, o)
        self.state, self.stage = following, t + 1
        terminated = self.stage == self.horizon or bool(self.ended[following])
        info = self._info() | {"discounted_mean_reward": model.mean_reward(t, s, a)} | ({"model": m} if self.ambiguous else {})
        if terminated:
            self.stage = None
        elif self.game is not None:
            self.game.advance(a, m, o)
        return following if self.observed else m * self.num_observations + o, reward, terminated, info

    def _info(self) -> Info:
        mask = {} if self.models[0].legal is None else {"action_mask": self.action_mask()}
        return {"stage": self.stage} | ({} if self.state is None else {"state": self.state}) | mask

    def action_mask(self) -> np.ndarray:
        """[A] int8, 1 where an action is legal: in the state, or before there is one in all that an episode may begin in."""
        legal = self.models[0].legal
        if legal is None:
            return np.ones(self.num_actions, np.int8)
        if self.state is None:
            possible = np.any([model.rho > 0 for model in self.models], axis=0)
            return np.all(legal[possible], axis=0).astype(np.int8)
        return legal[self.state].astype(np.int8)


def gymnasium_environment(
    problem: MDP | POMDP | APOMDP | StationaryPOMDP, nature: int | str | None, names: Mapping[str, Sequence[str]]
) -> Any:
    """The `Simulator` of a problem as an environment; see `lindm.to_gymnasium`. UsageError where gymnasium is missing."""
    try:
        import gymnasium
        from gymnasium.error import ResetNeeded
        from gymnasium.spaces import Discrete
    except ImportError as e:
        raise UsageError(f"an environment needs gymnasium: pip install -e '.[gym]' ({e})") from e
    simulator = Simulator(problem, nature)

    class LegalActions(Discrete):
        """Actions as numbers, of which `sample` without a mask draws those that are legal."""

        def sample(self, mask: Any = None, **options: Any) -> Any:
            return super().sample(simulator.action_mask() if mask is None and not options else mask, **options)

    class ProblemEnv(gymnasium.Env):
        """A problem of lindm: `discount`, `horizon`, `nature` and `names` are those of the problem."""

        metadata = {"render_modes": []}  # noqa: RUF012  (as gymnasium has it)

        def __init__(self):
            self.discount, self.horizon, self.nature, self.names = simulator.discount, simulator.horizon, nature, dict(names)
            model = simulator.models[0]
            self.observation_space = Discrete(simulator.num_seen)
            self.action_space = (Discrete if model.legal is None else LegalActions)(simulator.num_actions)
            if simulator.observed and model.stationary and model.legal is None:
                self.P, self.initial_state_distrib = model.table(simulator.ended), model.rho

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, Info]:
            super().reset(seed=seed)
            return simulator.reset(self.np_random)

        def step(self, action: Any) -> tuple[int, float, bool, bool, Info]:
            if simulator.stage is None:
                raise ResetNeeded("call reset before step: no episode is in progress")
            if not self.action_space.contains(action):
                raise ValueError(f"action must be a whole number from 0 to {simulator.num_actions - 1}; got {action!r}")
            seen, reward, terminated, info = simulator.step(int(action), self.np_random)
            return seen, reward, terminated, False, info

    return ProblemEnv()


class _Model:
    """One model in numpy: laws and rewards of a step."""

    def __init__(self, problem: MDP | POMDP | StationaryPOMDP):
        self.discount, self.rho = float(problem.discount), np.asarray(problem.rho)
        if isinstance(problem, StationaryPOMDP):
            self.P, self.O, self.r = problem.P, problem.O, problem.r
            self.R = problem.rewards if isinstance(problem.rewards, tuple) else problem.reward_table()
            self.stationary = True
        else:
            folded = np.asarray(problem.r)
            R = folded[..., None, None] if problem.paid is None else np.asarray(problem.paid.R)
            R = R[:1] if (R[:1] == R).all() else R
            self.P, self.r, self.R = np.asarray(problem.P), folded, R
            self.O = None if isinstance(problem, MDP) else np.asarray(problem.O)
            self.stationary = len(self.P) == len(self.R) == 1
        self.legal = None if problem.legal is None else np.asarray(problem.legal)  # [S, A]
        self.ended = self._ended()

    def _ended(self) -> np.ndarray:
        """[S] whether a state keeps itself under every legal action, and pays nothing."""
        S, A = self.r.shape[-2:]
        if isinstance(self.P, tuple):
            kept = np.stack([P.diagonal() == 1 for P in self.P], axis=1)
        else:
            kept = (self.P[:, np.arange(S), :, np.arange(S)] == 1).all(1)
        if isinstance(self.R, tuple):
            unpaid = np.stack([_own_unpaid(R) for R in self.R], axis=1)
        else:
            own = np.arange(S) if self.R.shape[3] > 1 else np.zeros(S, int)
            unpaid = (self.R[:, np.arange(S), :, own] == 0).all((1, 3))
        possible = np.ones((S, A), bool) if self.legal is None else self.legal
        return np.all((kept & unpaid) | ~possible, axis=1)

    def next_states(self, t: int, s: int, a: int) -> np.ndarray:
        return _row(self.P[a], s) if isinstance(self.P, tuple) else self.P[_stage(self.P, t), s, a]

    def observations(self, t: int, a: int, following: int) -> np.ndarray:
        assert self.O is not None
        return _row(self.O[a], following) if isinstance(self.O, tuple) else self.O[_stage(self.O, t), a, following]

    def pay(self, t: int, s: int, a: int, following: int, o: int) -> float:
        if isinstance(self.R, tuple):
            S, columns = _shape(self.R[a])
            O = columns // S  # one where no reward depends on the observation
            return float(self.R[a][s, following * O + (o if O > 1 else 0)])
        _, _, _, next_states, observations = self.R.shape
        return float(self.R[_stage(self.R, t), s, a, following if next_states > 1 else 0, o if observations > 1 else 0])

    def mean_reward(self, t: int, s: int, a: int) -> float:
        return float(self.discount**t * self.r[s, a] if self.r.ndim == 2 else self.r[t, s, a])

    def table(self, ended: np.ndarray) -> dict[int, dict[int, list[tuple[float, int, float, bool]]]]:
        """Transitions as in Gymnasium's toy-text environments."""

        def step(s: int, a: int) -> list[tuple[float, int, float, bool]]:
            law = self.next_states(0, s, a)
            following = np.flatnonzero(law).tolist()
            return [(float(law[u]), u, self.pay(0, s, a, u, 0), bool(ended[u])) for u in following]

        S, A = self.r.shape[-2:]
        return {s: {a: step(s, a) for a in range(A)} for s in range(S)}


class _Game:
    """Nature's side of an ambiguous POMDP: against the action it takes the worst model, under optimal continuation, with
    probability alpha, and the best one otherwise."""

    def __init__(self, problem: APOMDP):
        self.problem, self.alpha = problem, float(problem.alpha)
        with double_precision():
            self.tables = solve(problem).tables
        self.reset()

    def reset(self) -> None:
        self.stage, self.history, self.beliefs = 0, np.zeros((), np.int32), np.asarray(self.problem.models.rho)

    def choose(self, action: int, random: np.random.Generator) -> int:
        """The model that makes the step."""
        with double_precision():
            G = np.asarray(_model_values(self.problem, self.tables, self.stage, self.history, self.beliefs))[action]
        return int(G.argmin() if random.random() < self.alpha else G.argmax())

    def advance(self, a: int, m: int, o: int) -> None:
        with double_precision():
            after = _advance(self.problem, self.stage, self.history, self.beliefs, a, m, o)
        self.stage, self.history, self.beliefs = self.stage + 1, *map(np.asarray, after)


@jax.jit
def _model_values(problem: APOMDP, tables: Tables, t: int, history: Array, beliefs: Array) -> Array:
    """G [A, M]."""
    return q_bounds(problem, tables, t, history, beliefs)[2]


_advance = jax.jit(advance)


def _models(problem: MDP | POMDP | APOMDP | StationaryPOMDP) -> list[MDP | POMDP | StationaryPOMDP]:
    if not isinstance(problem, APOMDP):
        return [problem]
    return [jax.tree.map(lambda x, m=m: np.asarray(x)[m], problem.models) for m in range(problem.num_models)]


def _own_unpaid(R: sparse.csr_array) -> np.ndarray:
    """[S] whether a state that keeps itself is paid nothing, from rewards [S, S] or [S, S O] as of `StationaryPOMDP`."""
    S, columns = _shape(R)
    entries = R.tocoo()
    paid = entries.row[(entries.col // (columns // S) == entries.row) & (entries.data != 0)]
    return np.bincount(paid, minlength=S) == 0


def _shape(R: sparse.csr_array) -> tuple[int, int]:
    return cast("tuple[int, int]", R.shape)  # scipy's stubs: None


def _stage(x: np.ndarray, t: int) -> int:
    return t if len(x) > 1 else 0


def _row(matrix: sparse.csr_array, at: int) -> np.ndarray:
    return matrix[[at]].toarray()[0]


def _draw(law: np.ndarray, random: np.random.Generator) -> int:
    """An index of probabilities [n], by inverse CDF."""
    cdf = np.cumsum(law)
    return int((cdf <= random.random() * cdf[-1]).sum())
