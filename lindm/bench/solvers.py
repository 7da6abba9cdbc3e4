"""`lindm bench solvers [--json]`: the cost of exact solutions, and its growth.

MDPs. Batches of random models (flat Dirichlet rows, A = 5, H = 20, one kernel and one reward for all stages, double precision)
at four numbers of states, in batches too large for any cache. The peers, quantecon and pymdptoolbox, are timed in three ways:
the solver alone, objects built before (the most favorable, and the one to judge by); building and solving; and with the action
values. The first two are beside `optimal_policy`, which returns values and a policy as the peers do, the third beside
`backward_induction`. A peer gets the action values by one matrix product for all stages at once. Peers get arrays
in their own order, made before the timing. Neither peer takes rewards or kernels that change with the stage; ours reads an [H,
S, A] array of rewards even here, where it is constant. A side that reads the whole kernel, 8 A S^2 bytes, at every stage is
bounded by memory bandwidth from S = 100 on. `optimal_policy` reads the rows of the best actions alone once these have settled, 5
stages before the end in these models.

POMDPs. A batch of 1,000 random models with S = 3, A = 2, O = 2 by the belief tree: the value at the start alone, and the action
values of every history (in batches of 10, one table of which is 56 MB). The peer is the textbook's recursion in numpy, below:
level by level over the histories, normalized beliefs, one model at a time; it is run on a few models and scaled to the batch.
Leaves are the histories of the last stage.

POMDPs without an end: `lindm.bench.point_based`.

Costs, processes and rows are those of `lindm.bench.timing`; compilation and the first call are rows of their own. Memory is the
growth of the peak resident set while solving, after libraries are loaded, models are built and solvers are compiled.
The values of both sides are compared before the table is printed.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lindm.bench import point_based
from lindm.bench.timing import LESS, MORE, NEITHER, Row, answer, cpu_seconds, exponent, in_worker, peak_growth, row, timed
from lindm.problems.apomdp import single
from lindm.solvers import tree
from lindm.solvers.dp import backward_induction, optimal_policy, solve_many
from lindm.types import APOMDP, MDP, POMDP

MODULE = "lindm.bench.solvers"
A, H = 5, 20
MODELS = {20: 2000, 50: 400, 100: 128, 200: 48}  # states -> models of a batch: 32 to 77 MB
TREE_SIZE = (3, 2, 2)  # S, A, O
TREES = 1000
HORIZONS = (4, 5, 6, 7, 8, 9, 10)
TABLES = 10  # models whose action values are in memory together
SAMPLE = {4: 100, 5: 100, 6: 50, 7: 25, 8: 10, 9: 5, 10: 3}  # horizon -> models that the textbook's recursion is run on
STACKED = 1 << 20  # bytes of a kernel: the largest models that are solved in a stack
REPEATS = 7
CHECKED = 3  # models whose values both sides must agree on
PEERS = ("quantecon", "pymdptoolbox")
IMPORTED_AS = {"quantecon": "quantecon", "pymdptoolbox": "mdptoolbox"}
TEXTBOOK = "textbook recursion in numpy"
WAYS = {"solve": "V and policy", "build": "V and policy, from arrays", "Q": "V, policy and Q"}


# --- the models ---------------------------------------------------------------------------------------------------------


def _rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random distributions over the last axis, flat Dirichlet."""
    weights = rng.exponential(size=shape)
    return weights / weights.sum(-1, keepdims=True)


def mdp_models(S: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """P [count, S, A, S] and r [count, S, A], the same for every stage."""
    rng = np.random.default_rng(S)
    return _rows(rng, count, S, A, S), rng.uniform(size=(count, S, A))


def pomdp_models(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """P [count, S, A, S], O [count, A, S, O], r [count, S, A] and rho [count, S]; model i is the same for every count."""
    S, actions, O = TREE_SIZE
    models = []
    for i in range(count):
        rng = np.random.default_rng(i)
        models.append((_rows(rng, S, actions, S), _rows(rng, actions, S, O), rng.uniform(size=(S, actions)), _rows(rng, S)))
    P, O_, r, rho = (np.stack(arrays) for arrays in zip(*models, strict=True))
    return P, O_, r, rho


# --- ours ---------------------------------------------------------------------------------------------------------------


def our_mdps(S: int, count: int) -> MDP | list[MDP]:
    """The models of `mdp_models` as a stack [count]; those larger than `STACKED` as a list, because a stack copies each."""
    P, r = mdp_models(S, count)
    rewards = np.broadcast_to(r[:, None], (count, H, *r.shape[1:]))
    if P[0].nbytes <= STACKED:
        return MDP(P=jnp.asarray(P)[:, None], r=jnp.asarray(rewards), rho=jnp.full((count, S), 1 / S))
    return [MDP(P=jnp.array(P[i : i + 1]), r=jnp.array(rewards[i]), rho=jnp.full(S, 1 / S)) for i in range(count)]


def our_batch_solver(solver: Callable, batch: MDP | list[MDP]) -> Callable[[Any], Any]:
    """What solves a batch of `our_mdps`: one call for a stack, one call for each model of a list."""
    if isinstance(batch, MDP):
        return jax.jit(lambda stack: solve_many(solver, stack))
    return lambda models: [solver(model) for model in models]


def our_pomdps(count: int, horizon: int) -> APOMDP:
    """The stack [count] of `pomdp_models`, as APOMDPs with one model."""
    P, O, r, rho = pomdp_models(count)
    rewards = np.broadcast_to(r[:, None], (count, horizon, *r.shape[1:]))
    stack = POMDP(P=jnp.asarray(P)[:, None], O=jnp.asarray(O)[:, None], r=jnp.asarray(rewards), rho=jnp.asarray(rho))
    return jax.vmap(single)(stack)


def measure_our_mdps() -> dict[str, Any]:
    """Seconds a model for each size, seconds of compiling and the first call, and values to be checked."""
    seconds: dict[str, list[float]] = {"solve": [], "Q": []}
    starts, values = [], []
    for S, count in MODELS.items():
        batch = our_mdps(S, count)
        for way, solver in (("solve", optimal_policy), ("Q", backward_induction)):
            solve = our_batch_solver(solver, batch)
            first, answers = timed(lambda solve=solve, batch=batch: solve(batch))
            total = cpu_seconds(lambda solve=solve, batch=batch: solve(batch), REPEATS)
            seconds[way].append(total / count)
            starts.append(max(first - total, 0.0))
            if way == "solve":
                V = answers[0] if isinstance(batch, MDP) else np.stack([V for V, _ in answers])
                values.append(float(V[:CHECKED, 0].mean()))
    return {**seconds, "build": seconds["solve"], "start": max(starts), "values": values}


def measure_our_trees() -> dict[str, Any]:
    """Seconds for a batch of `TREES` at each horizon, the value alone and Q at every history, and what compiling them takes."""
    out: dict[str, Any] = {"value": [], "Q": [], "compile": {}, "values": []}
    for horizon in HORIZONS:
        stack, few = our_pomdps(TREES, horizon), our_pomdps(TABLES, horizon)
        for name, solver, problems in (("value", tree.value, stack), ("Q", tree.tree, few)):
            lowered = jax.jit(lambda stack, solver=solver: solve_many(solver, stack, batch_size=1)).lower(problems)
            out["compile"][name], solve = timed(lowered.compile)  # of the longest horizon, which comes last
            answers = jax.block_until_ready(solve(problems))  # a first call, which allocates memory
            total = cpu_seconds(lambda solve=solve, problems=problems: solve(problems), 2 if problems is stack else REPEATS)
            out[name].append(total * TREES / len(problems.alpha))
            if problems is stack:
                out["values"].append(float(answers[:CHECKED].mean()))
    return out


# --- the peers ----------------------------------------------------------------------------------------------------------

Built = Any
Answer = tuple[np.ndarray, np.ndarray]  # V [H+1, S] and the policy


def _quantecon() -> tuple[Callable[..., Built], Callable[[Built], Answer]]:
    from quantecon.markov import DiscreteDP, backward_induction  # pyright: ignore[reportMissingImports]

    return lambda P, r: DiscreteDP(r, P, 1.0), lambda built: backward_induction(built, H)


def _pymdptoolbox() -> tuple[Callable[..., Built], Callable[[Built], Answer]]:
    from mdptoolbox.mdp import FiniteHorizon  # pyright: ignore[reportMissingImports]

    def solve(built: Built) -> Answer:
        built.run()
        return built.V.T, built.policy.T

    return lambda P, r: FiniteHorizon(P, r, 1.0, H), solve


def with_q(P: np.ndarray, r: np.ndarray, V: np.ndarray) -> np.ndarray:
    """Q [S A, H] of all stages at once from V [H+1, S]; the order of (s, a) is that of P and r."""
    return r.reshape(-1, 1) + P.reshape(-1, P.shape[-1]) @ V[1:].T


def measure_peer_mdps(build: Callable[..., Built], solve: Callable[[Built], Answer], actions_first: bool) -> dict[str, Any]:
    """The same as `measure_our_mdps`, of a peer."""
    out: dict[str, Any] = {way: [] for way in WAYS} | {"values": []}
    for S, count in MODELS.items():
        P, r = mdp_models(S, count)
        native = np.ascontiguousarray(P.swapaxes(1, 2)) if actions_first else P
        flat_r = r.swapaxes(1, 2) if actions_first else r

        def made(i: int, native=native, r=r) -> Built:
            return build(native[i], r[i])

        def full(i: int, native=native, flat_r=flat_r, made=made) -> np.ndarray:
            return with_q(native[i], flat_r[i], solve(made(i))[0])

        everything = range(count)
        if "start" not in out:
            first = timed(lambda made=made: solve(made(0)))[0]
            out["start"] = max(first - cpu_seconds(lambda made=made: solve(made(0)), REPEATS), 0.0)
        objects = [made(i) for i in everything]
        jobs: dict[str, Callable[[], Any]] = {
            "solve": lambda objects=objects: [solve(built) for built in objects],
            "build": lambda made=made, everything=everything: [solve(made(i)) for i in everything],
            "Q": lambda full=full, everything=everything: [full(i) for i in everything],
        }
        for way, job in jobs.items():
            out[way].append(cpu_seconds(job, REPEATS) / count)
        out["values"].append(float(np.mean([solve(built)[0][0] for built in objects[:CHECKED]])))
    return out


def textbook(P: np.ndarray, O: np.ndarray, r: np.ndarray, rho: np.ndarray, horizon: int) -> list[np.ndarray]:
    """Q [histories, A] of every stage of one POMDP: Bayes' rule down the tree, the Bellman equation up.

    A history's children follow each other in the order of (a, o); what has probability 0 has a belief of zeros.
    """
    beliefs, chances = [rho[None]], []
    for _ in range(horizon - 1):
        joint = np.einsum("ns,sau,auo->naou", beliefs[-1], P, O, optimize=True)
        chance = joint.sum(-1)
        beliefs.append((joint / np.where(chance > 0, chance, 1)[..., None]).reshape(-1, len(r)))
        chances.append(chance)
    tables = [beliefs[-1] @ r]
    for belief, chance in zip(beliefs[-2::-1], chances[::-1], strict=True):
        V = tables[-1].max(-1).reshape(chance.shape)
        tables.append(belief @ r + (chance * V).sum(-1))
    return tables[::-1]


def measure_textbook() -> dict[str, Any]:
    """The same as `measure_our_trees`, from a few models; the value alone takes this recursion as long as the action values."""
    seconds, values = [], []
    for horizon in HORIZONS:
        models = list(zip(*pomdp_models(max(SAMPLE[horizon], CHECKED)), strict=True))
        some = models[: SAMPLE[horizon]]
        total = cpu_seconds(lambda some=some, horizon=horizon: [textbook(*model, horizon) for model in some], 3)
        seconds.append(total * TREES / len(some))
        values.append(float(np.mean([textbook(*model, horizon)[0].max() for model in models[:CHECKED]])))
    return {"value": seconds, "Q": seconds, "values": values}


# --- processes ----------------------------------------------------------------------------------------------------------


def measure(side: str, task: str) -> dict[str, Any]:
    """One measurement in this process: sides `ours`, `numpy` and the peers; tasks `mdp`, `tree`, `mdp memory`, `tree memory`.

    The task `without an end` has the rows of all sides.
    """
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both peers warn, for every model, of a problem without a discount
        if task == "without an end":
            return {"rows": point_based.benchmark()}
        if task == "mdp memory":
            return {"memory": _mdp_memory(side)}
        if task == "tree memory":
            return {"memory": _tree_memory(side)}
        if side == "ours":
            return measure_our_mdps() if task == "mdp" else measure_our_trees()
        if side == "numpy":
            return measure_textbook()
        return measure_peer_mdps(*_peer(side), actions_first=side == "pymdptoolbox")


def _peer(side: str) -> tuple[Callable[..., Built], Callable[[Built], Answer]]:
    return _quantecon() if side == "quantecon" else _pymdptoolbox()


def _mdp_memory(side: str) -> float:
    """MiB that a batch of the largest size takes beyond its models."""
    S, count = max(MODELS), MODELS[max(MODELS)]
    if side == "ours":
        batch = our_mdps(S, count)
        solve: Any = our_batch_solver(optimal_policy, batch)
        if isinstance(batch, MDP):
            solve = solve.lower(batch).compile()
        else:
            jax.block_until_ready(solve(batch[:1]))  # compiles; its memory is that of one model's answers
        return peak_growth(lambda: solve(batch))
    build, call = _peer(side)
    P, r = mdp_models(S, count)
    native = np.ascontiguousarray(P.swapaxes(1, 2)) if side == "pymdptoolbox" else P
    call(build(native[0], r[0]))  # quantecon compiles
    return peak_growth(lambda: [call(build(native[i], r[i])) for i in range(count)])


def _tree_memory(side: str) -> list[float]:
    """MiB that one model of the longest horizon takes: the value alone, then Q at every history."""
    horizon = HORIZONS[-1]
    if side == "ours":
        one = jax.tree.map(lambda x: x[0], our_pomdps(1, horizon))
        solvers = [jax.jit(solver).lower(one).compile() for solver in (tree.value, tree.tree)]
        return [peak_growth(lambda solve=solve: solve(one)) for solve in solvers]
    P, O, r, rho = (arrays[0] for arrays in pomdp_models(1))
    textbook(P, O, r, rho, 2)
    return [peak_growth(lambda: textbook(P, O, r, rho, horizon))] * 2


def _version(peer: str) -> str | None:
    """`quantecon 0.11.4`; None where it is not installed."""
    if importlib.util.find_spec(IMPORTED_AS[peer]) is None:
        return None
    return f"{peer} {importlib.metadata.version(peer)}"


# --- the table ----------------------------------------------------------------------------------------------------------


def _agree(ours: list[float], peer: list[float], name: str) -> None:
    if not np.allclose(ours, peer, rtol=1e-9, atol=0):
        raise RuntimeError(f"{name} and ours have different values: {peer} and {ours}")


def rows(
    ours: dict[str, Any],
    trees: dict[str, Any],
    peers: dict[str, dict[str, Any] | None],
    book: dict[str, Any],
    names: dict[str, str],
) -> list[Row]:
    """The table, from the measurements of all sides."""
    table: list[Row] = []
    sizes, longest = list(MODELS), HORIZONS[-1]
    for peer, costs in peers.items():
        if costs:
            _agree(ours["values"], costs["values"], names[peer])
    _agree(trees["values"], book["values"], TEXTBOOK)

    for way, what in WAYS.items():
        for i, S in enumerate(sizes):
            for peer, costs in peers.items():
                theirs = 1e6 * costs[way][i] if costs else None
                table.append(
                    row(f"MDP, S={S}, A={A}, H={H}: {what}", 1e6 * ours[way][i], theirs, names[peer], "CPU-us/model", LESS)
                )
    span = f"{sizes[0]}..{sizes[-1]}"
    for peer, costs in peers.items():
        slopes = exponent(sizes, ours["solve"]), exponent(sizes, costs["solve"]) if costs else None
        table.append(row(f"MDP, growth with S in {span}: exponent", *slopes, names[peer], "d log CPU-s / d log S", NEITHER))
        start = costs["start"] if costs else None
        table.append(row("MDP, compile and first call", ours["start"], start, names[peer], "CPU-s", NEITHER))
        work = f"MDP, S={sizes[-1]}, {MODELS[sizes[-1]]} models: peak memory"
        table.append(row(work, ours["memory"], costs["memory"] if costs else None, names[peer], "MiB", LESS))

    size = "S={}, A={}, O={}".format(*TREE_SIZE)
    for name, what in (("value", "value"), ("Q", "Q at every history")):
        for i, horizon in enumerate(HORIZONS):
            work = f"POMDP tree, {size}, H={horizon}: {what} of {TREES:,} models"
            table.append(row(work, trees[name][i], book[name][i], f"{TEXTBOOK}, {SAMPLE[horizon]} models", "CPU-s", LESS))
    leaves = TREES * (TREE_SIZE[1] * TREE_SIZE[2]) ** (longest - 1)
    for k, (name, what) in enumerate((("value", "value"), ("Q", "Q at every history"))):
        work = f"POMDP tree, {size}, H={longest}: {what}"
        table.append(row(work, leaves / trees[name][-1], leaves / book[name][-1], TEXTBOOK, "leaves/CPU-s", MORE))
        growth = exponent([np.exp(h) for h in HORIZONS], trees[name]), exponent([np.exp(h) for h in HORIZONS], book[name])
        table.append(row(f"POMDP tree, {what}, growth with H: exponent", *growth, TEXTBOOK, "d log CPU-s / d H", NEITHER))
        table.append(row(f"{work}, compile", trees["compile"][name], None, TEXTBOOK, "CPU-s", NEITHER))
        table.append(row(f"{work}, peak memory, one model", trees["memory"][k], book["memory"][k], TEXTBOOK, "MiB", LESS))
    return table


def _side(side: str, task: str) -> dict[str, Any]:
    return {**in_worker(MODULE, side, task), **in_worker(MODULE, side, f"{task} memory")}


def benchmark() -> list[Row]:
    """The rows of the table. Takes about two minutes."""
    versions = {peer: _version(peer) for peer in PEERS}
    names = {peer: version or f"{peer} (not installed)" for peer, version in versions.items()}
    peers = {peer: _side(peer, "mdp") if version else None for peer, version in versions.items()}
    table = rows(_side("ours", "mdp"), _side("ours", "tree"), peers, _side("numpy", "tree"), names)
    return table + in_worker(MODULE, "all", "without an end")["rows"]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    answer(measure)
