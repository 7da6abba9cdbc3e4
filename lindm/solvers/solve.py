"""One call for every kind of problem: the exact method where it fits the memory budget, the certified one otherwise.

    MDP      backward induction        exact
    POMDP    belief tree | HSVI        exact | certified bounds
    APOMDP   belief tree | net         exact | certified bounds

Whatever the method, the answer has a value with a lower and an upper bound, and `labels` gives the oracle's action, its action
values and a certificate at every step of any episodes. From bounds on V_{t+1} come bounds on Q_t by one step of lookahead,

    G_m(a) = b r_m(., a) + sum_o |b K_m[a, o]|_1 V_{t+1}(tau_m(b, a, o)),    Q(a) = alpha min_m G_m + (1 - alpha) max_m G_m,

monotone in V, so that lower gives lower and upper gives upper. An action is certified when its lower bound is not below the upper
bound of any other; otherwise the difference bounds what it can lose.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from lindm import validate
from lindm.problems.apomdp import as_apomdp
from lindm.solvers import dp, hsvi, net, tree
from lindm.types import APOMDP, BOUNDED, CERTIFIED, EXACT, MDP, Episodes, Labels, Plan, Problem

BUDGET = 2 << 30  # bytes
METHODS = ("auto", "tree", "hsvi", "net")
STAGES = 40  # of a tree that is taken without being asked for: each stage is compiled by itself
ROUNDING = 1e-12  # relative to the value of a history: differences below it are ties

Tables = Plan | tree.Tree | hsvi.Bounds | net.Net


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Solution:
    """What an oracle knows about one problem."""

    value: Array  # [] at the start: exact, or the middle of the bounds
    lower: Array  # []
    upper: Array  # []
    tables: Tables  # what the method keeps: action values at every state or history, or bounds at every belief
    method: str = field(metadata={"static": True})  # backward induction, tree, hsvi or net

    @property
    def exact(self) -> bool:
        return isinstance(self.tables, Plan | tree.Tree)


def method_for(problem: Problem, budget: int = BUDGET) -> str:
    """What `solve` takes by itself: decided by the sizes alone."""
    if isinstance(problem, MDP):
        return "backward induction"
    cloud = as_apomdp(problem)
    if cloud.horizon <= STAGES and tree.memory_bytes(cloud) <= budget:
        return "tree"
    return "hsvi" if cloud.num_models == 1 else "net"


def solve(problem: Problem, method: str = "auto", budget: int = BUDGET, effort: int | None = None) -> Solution:
    """Value, bounds and labels of one problem.

    Args:
      problem: an MDP, POMDP or APOMDP in double precision, without leading axes (`lax.map` outside, but the net is host code).
      method: auto, or tree, hsvi (a POMDP, or a cloud of one model) or net.
      budget: bytes that the tables of a method may take. Beyond it `auto` takes a certified method in the place of the tree, and
        a certified method with its default effort takes as much less of it.
      effort: of a certified method, for narrower or for cheaper bounds: trials of hsvi [default: 256] or points of the net at a
        stage [default: 20,000].

    Raises:
      ValueError: the method does not exist, does not fit the problem or the budget, or the problem is not in double precision.
    """
    if effort is not None:
        validate.count(effort, "effort")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if any(x.dtype != np.float64 for x in jax.tree.leaves(problem)):
        got = ", ".join(sorted({x.dtype.name for x in jax.tree.leaves(problem)}))
        raise ValueError(f"problem must be in double precision (jax_enable_x64), which certificates rest on; got {got}")
    if isinstance(problem, MDP) and method != "auto":
        raise ValueError(f"method must be auto for an MDP; got {method!r}")
    chosen = method_for(problem, budget) if method == "auto" else method
    if effort is not None and chosen not in ("hsvi", "net"):
        raise ValueError(f"effort must be left out where the answer is exact ({chosen}); got {effort}")
    if isinstance(problem, MDP):
        plan = dp.backward_induction(problem)
        value = problem.rho @ plan.V[0]
        return Solution(value=value, lower=value, upper=value, tables=plan, method=chosen)
    cloud = as_apomdp(problem)
    if chosen == "tree":
        need = tree.memory_bytes(cloud)
        if need > budget:
            size = f"{need:,}" if need < 2**60 else "more than 2^60"
            raise ValueError(f"method must fit the budget of {budget:,} bytes; a tree of this problem takes {size}")
        return _solution(cloud, tree.tree(cloud), chosen)
    if chosen == "net":
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(cloud)):
            raise ValueError("method net runs on the host, not under jit or vmap; got a traced problem")
        points = _affordable(lambda points: net.memory_bytes(cloud, points), effort, net.POINTS, budget)
        return _solution(cloud, net.net(cloud, points=points), chosen)
    if cloud.num_models != 1:
        raise ValueError(f"method hsvi needs one model, whose value is convex; got a cloud of {cloud.num_models}")
    model = jax.tree.map(lambda x: x[0], cloud.models)
    trials = _affordable(lambda trials: hsvi.memory_bytes(model, trials), effort, hsvi.TRIALS, budget)
    return _solution(cloud, hsvi.hsvi(model, trials=trials), chosen)


def _affordable(memory: Callable[[int], int], effort: int | None, default: int, budget: int) -> int:
    """The effort that was asked for if it fits the budget, or the default halved until it does."""
    wanted = effort or default
    while effort is None and wanted > 1 and memory(wanted) > budget:
        wanted //= 2
    if memory(wanted) > budget:
        raise ValueError(f"effort must fit the budget of {budget:,} bytes; {wanted:,} takes {memory(wanted):,}")
    return wanted


def _solution(problem: APOMDP, tables: Tables, method: str) -> Solution:
    bounds = jnp.sort(jnp.stack([bound.max() for bound in _at_start(problem, tables)]))  # where they meet rounding may swap them
    lower, upper = bounds[0], bounds[1]
    return Solution(value=(lower + upper) / 2, lower=lower, upper=upper, tables=tables, method=method)


def first_action(problem: Problem, solution: Solution) -> Array:
    """The oracle's action [] at the start, where nothing has been seen; an MDP has one for each state, in `solution.tables`."""
    if isinstance(problem, MDP):
        raise ValueError("problem must be a POMDP or an APOMDP: the first action of an MDP depends on its first state")
    return dp.greedy(_at_start(as_apomdp(problem), solution.tables)[0])


@jax.jit
def _at_start(problem: APOMDP, tables: Tables) -> tuple[Array, Array]:
    """Bounds of Q at the start: lower [A], upper [A]."""
    lower, upper, _ = q_bounds(problem, tables, 0, jnp.zeros((), jnp.int32), problem.models.rho)
    return lower, upper


# --- at one history ------------------------------------------------------------------------------------------------------


def q_bounds(problem: APOMDP, tables: Tables, t, history: Array, beliefs: Array) -> tuple[Array, Array, Array]:
    """Bounds of Q at one history: lower [A], upper [A], and the middle of the bounds of G [A, M].

    Args:
      t: stage, may be traced; history: [] its number within the stage (only a tree asks for it);
      beliefs: [M, S] the belief under each model, all rows alike but at the first stage.
    """
    H = problem.horizon
    K, r = tree.kernel(problem, t), tree.rewards(problem, t)
    child = jnp.einsum("amosu,ms->amou", K, beliefs)
    mass = child.sum(-1)
    child = child / jnp.where(mass > 0, mass, 1)[..., None]
    following = jnp.minimum(t + 1, H - 1)  # of the last stage nothing follows: any bounds will do, they are not used
    if isinstance(tables, tree.Tree):
        B = tree.branching(problem)
        starts = jnp.array([tree.first_history(B, k) for k in range(H)], jnp.int32)
        places = jnp.array([B**k for k in range(H)], jnp.int32)
        steps = jnp.arange(B, dtype=jnp.int32).reshape(mass.shape)
        V = tables.Q.at[starts[following] + history + steps * places[t]].get(mode="clip").max(-1)
        bounds = (V, V)
    elif isinstance(tables, hsvi.Bounds):
        bounds = hsvi.value_bounds(tables, following, child)
    else:
        assert isinstance(tables, net.Net)
        bounds = net.value_bounds(tables, following, child)
    now = jnp.einsum("ams,ms->am", r, beliefs)
    G = [now + jnp.where(t + 1 < H, jnp.where(mass > 0, mass * V, 0).sum(-1), 0) for V in bounds]
    if isinstance(tables, tree.Tree):  # the table's own number, not rounded again
        lower = upper = tables.Q[starts[t] + history]
    else:
        lower, upper = (tree.mixed(problem.alpha, g, 1) for g in G)
    return lower, upper, (G[0] + G[1]) / 2


def advance(problem: APOMDP, t, history: Array, beliefs: Array, a: Array, m: Array, o: Array) -> tuple[Array, Array]:
    """The history's number and the beliefs [M, S] one step (a, m, o) later."""
    M, O = problem.num_models, problem.num_observations
    powers = [tree.branching(problem) ** k for k in range(problem.horizon)]
    # numbers that no tree could hold are not needed: they may wrap
    places = jnp.array([p if p < 2**31 else 0 for p in powers], jnp.int32)
    u = beliefs[m] @ tree.kernel(problem, t)[a, m, o]
    u = u / jnp.where(u.sum() > 0, u.sum(), 1)
    return history + ((a * M + m) * O + o) * places[t], jnp.broadcast_to(u, beliefs.shape)


def label(lower: Array, upper: Array, exact: bool) -> Labels:
    """What the oracle says at one history, from the bounds [A] of its action values."""
    action = dp.greedy(lower)
    others = jnp.where(jnp.arange(lower.shape[-1]) == action, -jnp.inf, upper).max()
    regret = jnp.maximum(others - lower[action], 0)
    sure = regret <= ROUNDING * jnp.abs(upper.max())
    certificate = jnp.where(exact, EXACT, jnp.where(sure, CERTIFIED, BOUNDED)).astype(jnp.int8)
    regret = jnp.where(certificate == BOUNDED, regret, 0)
    return Labels(action=action, Q=(lower + upper) / 2, certificate=certificate, regret=regret)


def labels(problem: Problem, solution: Solution, episodes: Episodes) -> Labels:
    """What the oracle says at every step of episodes [..., H] (their actions need not be the oracle's).

    A step that has probability zero under the problem gets Q = 0 from a tree, and bounds at the belief zero otherwise.
    """
    if isinstance(problem, MDP):
        assert isinstance(solution.tables, Plan)
        Q = solution.tables.Q[jnp.arange(problem.horizon), episodes.s]
        zero = jnp.zeros(Q.shape[:-1], Q.dtype)
        action = dp.greedy(solution.tables.Q)[jnp.arange(problem.horizon), episodes.s]
        return Labels(action=action, Q=Q, certificate=zero.astype(jnp.int8), regret=zero)
    cloud = as_apomdp(problem)
    m = jnp.zeros_like(episodes.a) if episodes.m is None else episodes.m
    assert episodes.o is not None
    flat = [jnp.asarray(x, jnp.int32).reshape(-1, x.shape[-1]) for x in (episodes.a, m, episodes.o)]
    found = _labels(cloud, solution, *flat)
    return jax.tree.map(lambda x: x.reshape(*episodes.a.shape, *x.shape[2:]), found)


@jax.jit
def _labels(problem: APOMDP, solution: Solution, a: Array, m: Array, o: Array) -> Labels:
    def one(a: Array, m: Array, o: Array) -> Labels:
        def step(carry, at):
            t, *taken = at
            lower, upper, _ = q_bounds(problem, solution.tables, t, *carry)
            return advance(problem, t, *carry, *taken), label(lower, upper, solution.exact)

        start = (jnp.zeros((), jnp.int32), problem.models.rho)
        return jax.lax.scan(step, start, (jnp.arange(a.shape[0]), a, m, o))[1]

    return jax.vmap(one)(a, m, o)
