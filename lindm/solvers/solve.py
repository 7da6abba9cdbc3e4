r"""`solve`: one call for every kind of problem, exact where the tables fit a memory budget, with certified bounds otherwise.

    MDP      backward induction        exact
    POMDP    belief tree | HSVI        exact | certified bounds
    APOMDP   belief tree | net         exact | certified bounds

Every solution has a value with a lower and an upper bound, and `labels` gives the optimal action, the action values
and a certificate at every step of any episodes. Bounds of V_{t+1} give bounds of Q_t by one step of lookahead,

    G_m(a) = b r_m(., a) + sum_o |b K_m[a, o]|_1 V_{t+1}(tau_m(b, a, o)),    Q(a) = alpha min_m G_m + (1 - alpha) max_m G_m,

which is monotone in V: lower bounds give lower bounds, upper bounds upper ones. An action is certified when its lower bound is
not below the upper bound of any other action; otherwise the difference bounds what the action can lose.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from lindm import validate
from lindm.errors import unknown
from lindm.problems.apomdp import alpha_maxmin, as_apomdp
from lindm.solvers import belief_net, dp, hsvi, tree
from lindm.solvers.belief import (
    advance,
    branching,
    child_history,
    children,
    first_history,
    joint_kernel,
    normalize,
    stage_rewards,
)
from lindm.solvers.ties import greedy, tie_tolerance
from lindm.types import APOMDP, BOUNDED, CERTIFIED, EXACT, MDP, Episodes, Labels, Plan, Problem

MEMORY_BUDGET = 2 << 30  # bytes
Method = Literal["auto", "tree", "hsvi", "net"]
METHODS = get_args(Method)
MAX_TREE_STAGES = 40  # for method auto: each stage of a tree is compiled by itself

Tables = Plan | tree.Tree | hsvi.Bounds | belief_net.Net


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Solution:
    """A solved problem."""

    problem: Problem
    value: Array  # [] at the start: exact, or the middle of the bounds
    lower: Array  # []
    upper: Array  # []
    tables: Tables  # what the method computes: action values at every state or history, or bounds at every belief
    method: str = field(metadata={"static": True})  # backward induction, tree, hsvi or net

    @property
    def exact(self) -> bool:
        return isinstance(self.tables, Plan | tree.Tree)


def method_for(problem: Problem, budget: int = MEMORY_BUDGET) -> str:
    """The method that `solve` chooses under `auto`; it depends on the sizes alone."""
    if isinstance(problem, MDP):
        return "backward induction"
    apomdp = as_apomdp(problem)
    if tree_fits(apomdp.num_actions, branching(apomdp), apomdp.horizon, budget):
        return "tree"
    return "hsvi" if apomdp.num_models == 1 else "net"


def tree_fits(actions: int, branches: int, horizon: int, budget: int = MEMORY_BUDGET) -> bool:
    """Whether `auto` takes the tree; branches: steps by which a history can continue."""
    return horizon <= MAX_TREE_STAGES and tree.table_bytes(actions, branches, horizon) <= budget


def solve(problem: Problem, method: Method = "auto", budget: int = MEMORY_BUDGET, effort: int | None = None) -> Solution:
    """Solve one problem.

    Args:
      problem: an MDP, POMDP or APOMDP in double precision, without leading axes (`lax.map` outside; the net runs on the host).
      method: auto, or tree, hsvi (a POMDP, or an APOMDP with one model) or net.
      budget: bytes that the tables of a method may take. Where the tree exceeds it, `auto` chooses a certified method. A
        certified method with its default effort reduces the effort to fit.
      effort: of a certified method, more for narrower bounds: trials of hsvi [default: 256] or points of the net at each stage
        [default: 20,000].

    Raises:
      ValueError: the method does not exist, does not fit the problem or the budget, or the problem is not in double precision.
    """
    if effort is not None:
        validate.count(effort, "effort")
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    numbers = [x for x in jax.tree.leaves(problem) if x.dtype != bool]
    if any(x.dtype != np.float64 for x in numbers):
        got = ", ".join(sorted({x.dtype.name for x in numbers}))
        raise ValueError(f"problem must be in double precision (jax_enable_x64), which certificates rest on; got {got}")
    if isinstance(problem, MDP) and method != "auto":
        raise ValueError(f"method must be auto for an MDP; got {method!r}")
    chosen = method_for(problem, budget) if method == "auto" else method
    if effort is not None and chosen not in ("hsvi", "net"):
        raise ValueError(f"effort must be left out where the answer is exact ({chosen}); got {effort}")
    if isinstance(problem, MDP):
        plan = dp.backward_induction(problem)
        value = problem.rho @ plan.V[0]
        return Solution(problem=problem, value=value, lower=value, upper=value, tables=plan, method=chosen)
    legal = as_apomdp(problem).models.legal
    if legal is not None and chosen == "net":  # V jumps where the probability of a state becomes zero
        rule = "a shorter horizon can be solved by its tree" if method == "auto" else "tree is the method for it"
        raise ValueError(f"method net has no illegal actions, at which no slope bounds the value of a belief: {rule}")
    tables = _tables(as_apomdp(problem), chosen, budget, effort)
    bounds = jnp.sort(
        jnp.stack([bound.max() for bound in _at_start(as_apomdp(problem), tables)])
    )  # rounding may swap equal bounds
    lower, upper = bounds[0], bounds[1]
    if legal is not None and not isinstance(lower, Tracer) and not np.isfinite(lower):
        raise ValueError("legal must allow an action at every belief that can be reached; every policy comes to one without any")
    return Solution(problem=problem, value=(lower + upper) / 2, lower=lower, upper=upper, tables=tables, method=chosen)


def _tables(problem: APOMDP, method: str, budget: int, effort: int | None) -> Tables:
    if method == "tree":
        need = tree.memory_bytes(problem)
        if need > budget:
            size = f"{need:,}" if need < 2**60 else "more than 2^60"
            raise ValueError(f"method tree must fit the budget of {budget:,} bytes; the tree of this problem takes {size}")
        return tree.tree(problem)
    if method == "net":
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(problem)):
            raise ValueError("method net runs on the host, not under jit or vmap; got a traced problem")
        points = _affordable(lambda points: belief_net.memory_bytes(problem, points), effort, belief_net.POINTS, budget)
        return belief_net.net(problem, points=points)
    if problem.num_models != 1:
        raise ValueError(f"method hsvi needs one model, whose value is convex; got an APOMDP with {problem.num_models}")
    model = jax.tree.map(lambda x: x[0], problem.models)
    trials = _affordable(lambda trials: hsvi.memory_bytes(model, trials), effort, hsvi.TRIALS, budget)
    return hsvi.hsvi(model, trials=trials)


def _affordable(memory: Callable[[int], int], effort: int | None, default: int, budget: int) -> int:
    """The given effort if it fits the budget, or the default halved until it does."""
    wanted = effort or default
    while effort is None and wanted > 1 and memory(wanted) > budget:
        wanted //= 2
    if memory(wanted) > budget:
        raise ValueError(f"effort must fit the budget of {budget:,} bytes; {wanted:,} takes {memory(wanted):,}")
    return wanted


def first_action(solution: Solution) -> Array:
    """The action [] at the start: of a POMDP or an APOMDP before any observation, of an MDP in its first state.

    Raises:
      ValueError: the problem is an MDP with several possible first states, on which its first action depends.
    """
    if isinstance(solution.problem, MDP):
        assert isinstance(solution.tables, Plan)
        possible = np.flatnonzero(np.asarray(solution.problem.rho))
        if len(possible) > 1:
            raise ValueError("problem must have one first state: the first action of an MDP depends on it")
        return greedy(solution.tables.Q[0])[possible[0]]
    return greedy(_at_start(as_apomdp(solution.problem), solution.tables)[0])


@jax.jit
def _at_start(problem: APOMDP, tables: Tables) -> tuple[Array, Array]:
    """Bounds of Q at the start: lower [A], upper [A]."""
    lower, upper, _ = q_bounds(problem, tables, 0, jnp.zeros((), jnp.int32), problem.models.rho)
    return lower, upper


# --- one history -------------------------------------------------------------------------------------------------------------


def q_bounds(problem: APOMDP, tables: Tables, t, history: Array, beliefs: Array) -> tuple[Array, Array, Array]:
    """Bounds of Q at one history: lower [A], upper [A], and the middle of the bounds of G [A, M].

    Args:
      t: stage, may be traced.
      history: [] its number within the stage; only a tree uses it.
      beliefs: [M, S] the belief under each model; the rows are equal but at the first stage.
    """
    H = problem.horizon
    chex.assert_shape(beliefs, (problem.num_models, problem.num_states))
    belief, mass = normalize(children(joint_kernel(problem, t), beliefs))
    next_stage = jnp.minimum(t + 1, H - 1)  # nothing follows the last stage: bounds of any stage will do, they are not used
    if isinstance(tables, tree.Tree):
        B = branching(problem)
        starts = jnp.array([first_history(B, k) for k in range(H)], jnp.int32)
        steps = jnp.arange(B, dtype=jnp.int32).reshape(mass.shape)
        rows = starts[next_stage] + child_history(problem, jnp.asarray(t), history, steps)
        V = tables.Q.at[rows].get(mode="clip").max(-1)
        bounds = (V, V)
    elif isinstance(tables, hsvi.Bounds):
        bounds = hsvi.value_bounds(tables, next_stage, belief)
    else:
        assert isinstance(tables, belief_net.Net)
        bounds = belief_net.value_bounds(tables, next_stage, belief)
    now = jnp.einsum("ams,ms->am", stage_rewards(problem, t), beliefs)
    G = [now + jnp.where(t + 1 < H, jnp.where(mass > 0, mass * V, 0).sum(-1), 0) for V in bounds]
    if isinstance(tables, tree.Tree):  # the number in the table, not rounded a second time
        lower = upper = tables.Q[starts[t] + history]
    else:
        lower, upper = (alpha_maxmin(problem.alpha, g, 1) for g in G)
    if problem.models.legal is not None and isinstance(tables, hsvi.Bounds):
        illegal = (beliefs[0] > 0).astype(lower.dtype) @ ~problem.models.legal[0] > 0
        lower = jnp.where(illegal, -jnp.inf, lower)
        upper = jnp.where(jnp.isneginf(lower), -jnp.inf, upper)  # the bounds start with a policy wherever there is one
    return lower, upper, (G[0] + G[1]) / 2


def label(lower: Array, upper: Array, exact: bool, all_legal: bool = True) -> Labels:
    """The label at one history, from bounds [A] of its action values, -inf where an action is not legal."""
    action = greedy(lower)
    others = jnp.where(jnp.arange(lower.shape[-1]) == action, -jnp.inf, upper).max()
    regret = jnp.maximum(others - lower[action], 0)
    certain = regret <= tie_tolerance(upper.max())
    certificate = jnp.where(exact, EXACT, jnp.where(certain, CERTIFIED, BOUNDED)).astype(jnp.int8)
    regret = jnp.where(certificate == BOUNDED, regret, 0)
    legal = None if all_legal else lower > -jnp.inf
    return Labels(action=action, Q=(lower + upper) / 2, certificate=certificate, regret=regret, legal=legal)


def labels(solution: Solution, episodes: Episodes) -> Labels:
    """The label at every step of episodes [..., H], whose actions need not be optimal.

    A step of probability zero under the problem has Q = 0 in a tree, and bounds at the belief zero otherwise.
    """
    problem = solution.problem
    if isinstance(problem, MDP):
        assert isinstance(solution.tables, Plan)
        stages = jnp.arange(problem.horizon)
        Q = solution.tables.Q[stages, episodes.s]
        zero = jnp.zeros(Q.shape[:-1], Q.dtype)
        action = greedy(solution.tables.Q)[stages, episodes.s]
        legal = None if problem.legal is None else problem.legal[episodes.s]
        return Labels(action=action, Q=Q, certificate=zero.astype(jnp.int8), regret=zero, legal=legal)
    m = jnp.zeros_like(episodes.a) if episodes.m is None else episodes.m
    assert episodes.o is not None
    flat = [jnp.asarray(x, jnp.int32).reshape(-1, x.shape[-1]) for x in (episodes.a, m, episodes.o)]
    rows = _labels(as_apomdp(problem), solution, *flat)
    return jax.tree.map(lambda x: x.reshape(*episodes.a.shape, *x.shape[2:]), rows)


@jax.jit
def _labels(problem: APOMDP, solution: Solution, a: Array, m: Array, o: Array) -> Labels:
    def episode(a: Array, m: Array, o: Array) -> Labels:
        def step(carry, at):
            t, *taken = at
            lower, upper, _ = q_bounds(problem, solution.tables, t, *carry)
            labeled = label(lower, upper, solution.exact, problem.models.legal is None)
            return advance(problem, t, *carry, *taken), labeled

        start = (jnp.zeros((), jnp.int32), problem.models.rho)
        return jax.lax.scan(step, start, (jnp.arange(a.shape[0]), a, m, o))[1]

    return jax.vmap(episode)(a, m, o)
