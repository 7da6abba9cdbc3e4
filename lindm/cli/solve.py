"""`lindm solve`: the value of a decision problem and its best first action."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from lindm.cli.option_parser import Command, Positional
from lindm.cli.problems import FAMILY_OPTIONS, FamilyOptions, one_problem
from lindm.errors import UsageError, unknown
from lindm.io.files import strict_json

if TYPE_CHECKING:
    from lindm.api.solutions import Solution, StationaryResult
    from lindm.problems.stationary import StationaryPOMDP

SHOWN_STATES = 6
PLOT_SECONDS = 60.0  # after which a figure takes the bounds as they are


@dataclass(frozen=True, kw_only=True)
class Solve(FamilyOptions):
    """Compute the value of a decision problem, with bounds, and the best first action."""

    problem: Annotated[tuple[str, ...], Positional("PROBLEM")]
    """A .pomdp file (an MDP if it has no observations), or a family, such as prostate. Several files are the models of an
    ambiguous POMDP."""
    horizon: int | Literal["inf"]
    """Number of stages. inf is possible for one .pomdp file or family that is not ambiguous and has a discount below 1."""
    discount: float | None = None
    """Discount factor. [default: that of the file or family]"""
    alpha: float | None = None
    """Attitude to ambiguity: 1 is the worst case over the models, 0 the best case."""
    method: Literal["auto", "tree", "hsvi", "net", "point-based", "value-iteration", "policy-iteration"] = "auto"
    """auto is exact if the belief tree fits in 2 GiB, and computes certified bounds otherwise. point-based searches one .pomdp
    file along optimal play; auto chooses it if the horizon is inf or too long for a tree. policy-iteration (the choice of auto)
    and value-iteration solve an MDP with horizon inf."""
    effort: int | None = None
    """Number of trials of hsvi [default: 256] or of points of net [default: 20000]."""
    tolerance: str | None = None
    """For point-based and iteration: stop when the bounds are this close. A number, or a percentage of the value. [default:
    0.1%, 1e-7% for an MDP]"""
    timeout: float | None = None
    """For point-based and iteration: stop after this many seconds with the bounds found so far. [default: 60]"""
    save: Path | None = None
    """File of the policy. For point-based: alpha vectors (.alpha; horizon inf only), the policy graph with vectors and rules
    (.json), or a picture of the graph (.svg, .png, .pdf). For an MDP: the action of each state (.json)."""
    rules: bool = False
    """For point-based: print the policy graph in words."""
    plot: Path | None = None
    """File of a figure (.png, .pdf, .svg). It shows value and best action over the beliefs of two or three states; for several
    models, the best action over belief and attitude to ambiguity."""
    json: bool = False
    """Print one JSON object."""
    seed: int | None = None
    """Seed of the parameters of a family. [default: 0]"""


OF_POINT_BASED = ("tolerance", "timeout", "save")
PICTURES = (".svg", ".png", ".pdf")
SAVED = (".alpha", ".json", *PICTURES)
STATIONARY = ("point-based", "value-iteration", "policy-iteration")


def run(options: Solve) -> int:
    start = time.perf_counter()
    check_plot(options.plot)
    one = len(options.problem) == 1 and options.perturb is None
    if options.horizon == "inf" and not one:
        raise UsageError("--horizon inf takes one model: an ambiguous problem must have a finite horizon")
    if options.horizon == "inf" or options.method in STATIONARY:
        return run_stationary(options, start)
    file = Path(options.problem[0])
    searched = options.rules or any(getattr(options, name) is not None for name in OF_POINT_BASED)
    if options.method == "auto" and one and file.is_file() and (searched or is_long(options)):
        return run_stationary(options, start)
    if options.method == "auto" and options.effort is None and is_endless(options):
        return run_stationary(options, start)
    refuse(options, OF_POINT_BASED, "is an option of point-based")
    if options.rules:
        raise UsageError("--rules is an option of point-based, which solves one .pomdp file")
    from lindm.api.solutions import solve
    from lindm.types import MDP

    source = one_problem(options)
    solution = solve(source, options.method, effort=options.effort)
    observed = isinstance(source.problem, MDP)
    action, seconds = solution.first_actions if observed else solution.first_action, time.perf_counter() - start
    if options.plot:
        plot(solution, options.plot)
    if options.json:
        answer = {"value": solution.value, "lower": solution.lower, "upper": solution.upper, "method": solution.method}
        print(strict_json({**answer, "seconds": round(seconds, 3), "first_action": action}))
        return 0
    bounds = "exact" if solution.exact else f"certified to lie in [{solution.lower:.10g}, {solution.upper:.10g}]"
    print(f"value         {solution.value:.10g}  ({bounds})")
    print(f"first action  {by_state(action)}")
    print(f"method        {solution.method}, {seconds:.1f} s")
    if options.plot:
        print(f"figure        {options.plot}")
    return 0


def by_state(action: int | str | Mapping[int | str, int | str]) -> str:
    """An action, or the actions of an MDP by the state in which it begins: the first ones."""
    if not isinstance(action, Mapping):
        return str(action)
    some = [f"{what} in {state}" for state, what in list(action.items())[:SHOWN_STATES]]
    return ", ".join(some) + (f", ... ({len(action)} states; --json prints all)" if len(action) > SHOWN_STATES else "")


def refuse(options: Solve, names: tuple[str, ...], reason: str) -> None:
    """UsageError for an option that is given and does not apply."""
    for name in names:
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} {reason}; got {getattr(options, name)}")


def asks_for_search(options: Solve) -> str | None:
    """The option that makes `auto` search a problem that a tree solves exactly; None where it was not the reason."""
    if options.method != "auto" or options.horizon == "inf" or not Path(options.problem[0]).is_file():
        return None
    given = [name for name in ("rules", *OF_POINT_BASED) if getattr(options, name)]
    return f"--{given[0]}" if given and not is_long(options) and has_observations(options) else None


def has_observations(options: Solve) -> bool:
    """Whether the one file is a POMDP."""
    from lindm.problems.cassandra import read_sizes

    return read_sizes(options.problem[0])[2] > 0


def is_long(options: Solve) -> bool:
    """Whether the horizon is too long for a tree of the problem in the one file."""
    if options.horizon == "inf" or options.effort is not None or options.alpha is not None:
        return False
    from lindm.problems.cassandra import read_sizes
    from lindm.solvers.solve import tree_fits

    _, actions, observations = read_sizes(options.problem[0])
    return observations > 0 and not tree_fits(actions, actions * observations, options.horizon)


def is_endless(options: Solve) -> bool:
    """Whether the problem is a family without a horizon of its own."""
    from lindm.families.registry import FAMILIES

    word = options.problem[0]
    one = len(options.problem) == 1 and options.split is None and not Path(word).is_file()
    return one and word in FAMILIES and FAMILIES[word].endless


def stationary_problem(options: Solve, method: str) -> "StationaryPOMDP":
    """The problem without a horizon of its own that the words name: a file, or a family."""
    from lindm.api.problems import read_stationary_pomdp
    from lindm.cli.problems import warnings_as_lines
    from lindm.families import registry

    if len(options.problem) != 1:
        raise UsageError(f"{method} solves one problem, not several models; got {len(options.problem)} files")
    word = options.problem[0]
    if word in registry.FAMILIES and not Path(word).is_file():
        if is_endless(options):
            refuse(options, ("seed",), f"does not apply to {word}, which has nothing random")
        given = {name: value for name in ("discount", *FAMILY_OPTIONS) if (value := getattr(options, name)) is not None}
        made = registry.without_horizon(word, seed=options.seed or 0, **given)
        if made.discount == 1 and options.horizon == "inf":
            raise UsageError(f"--discount must be given, below 1, where the horizon is inf: {word} has none of its own")
        return made
    if not Path(word).suffix and not Path(word).is_file():
        raise UsageError(unknown("PROBLEM", word, (*registry.FAMILIES, "a .pomdp file")))
    refuse(options, ("seed", *FAMILY_OPTIONS), "is an option of families; PROBLEM is a file")
    with warnings_as_lines():
        return read_stationary_pomdp(options.problem[0], discount=options.discount)


def run_stationary(options: Solve, start: float) -> int:
    """A file or a family without a horizon of its own: a POMDP by search along optimal play, an MDP by iteration."""
    if options.method not in ("auto", *STATIONARY):
        raise UsageError(f"--method must be {', '.join(STATIONARY)} where the horizon is inf; got {options.method!r}")
    method = "point-based" if options.method == "auto" else options.method
    refuse(options, ("alpha", "effort"), f"does not apply to {method}")
    if options.save and options.save.suffix not in SAVED:
        raise UsageError(f"--save must end in {', '.join(SAVED)}; got {options.save}")
    horizon = math.inf if options.horizon == "inf" else options.horizon
    from lindm.api.solutions import solve_stationary
    from lindm.figures.policy_graph import draw_policy_graph
    from lindm.figures.style import save
    from lindm.io.progress import Progress
    from lindm.solvers.stationary_mdp import MDPSolution

    problem = stationary_problem(options, method)
    observed = not problem.O
    if options.save and observed and options.save.suffix != ".json":
        raise UsageError(f"--save must end in .json for an MDP, whose policy is an action for each state; got {options.save}")
    if options.rules and observed:
        raise UsageError("--rules does not apply to an MDP, whose policy is an action for each state; use --save policy.json")
    given = {name: value for name in ("tolerance", "timeout") if (value := getattr(options, name)) is not None}
    with Progress() as progress:
        task = progress.add("iterations" if observed else "trials")
        solution = solve_stationary(
            problem,
            horizon,
            method=options.method,
            **given,
            on_trial=lambda n, low, high: task.update(n, detail=f"[{low:.6g}, {high:.6g}]"),
        )
    is_mdp = isinstance(solution, MDPSolution)
    graph = solution.graph() if not is_mdp and (options.rules or (options.save and options.save.suffix != ".alpha")) else None
    if options.save and options.save.suffix in PICTURES:
        assert graph is not None
        save(partial(draw_policy_graph, graph), options.save)
    elif options.save:
        solution.save(options.save)
    seconds = time.perf_counter() - start
    if options.plot:
        plot(solution, options.plot)
    action = solution.first_actions if is_mdp else solution.first_action
    method, steps = (solution.method, "iterations") if is_mdp else ("point-based", "trials")
    if options.json:
        answer = {"value": solution.lower, "lower": solution.lower, "upper": solution.upper, "method": method}
        answer |= {"horizon": None if horizon == math.inf else horizon, steps: getattr(solution, steps)}
        answer |= {"seconds": round(seconds, 3), "first_action": action, "regret": solution.regret}
        print(strict_json(answer | ({"graph_value": graph.value, "rules": graph.rules()} if graph else {})))
        return 0
    earner = "the policy earns" if is_mdp else "its alpha vectors earn"
    print(f"value         at least {solution.lower:.10g}, which {earner}; at most {solution.upper:.10g}")
    best = "certified to be best" if solution.regret == 0 else f"loses at most {solution.regret:.3g}"
    print(f"first action  {by_state(action)}  ({best})")
    policy = "an action for each state" if is_mdp else f"{len(solution.vectors)} alpha vectors"
    if graph:
        policy = f"a graph of {len(graph.actions)} nodes, which earns {graph.value:.10g}"
    print(f"policy        {policy}" + (f", in {options.save}" if options.save else ""))
    print(f"method        {method}, {getattr(solution, steps)} {steps}, {seconds:.1f} s")
    if asked := asks_for_search(options):
        print(f"note          {asked} needs a policy, so the problem was solved by {method}; without it, by an exact tree")
    if options.plot:
        print(f"figure        {options.plot}")
    for rule in graph.rules() if graph and options.rules else ():
        print(f"  {rule}")
    return 0


def check_plot(path: Path | None) -> None:
    """UsageError where the file of a figure has another ending than those of `PICTURES`."""
    if path is not None and path.suffix not in PICTURES:
        raise UsageError(f"--plot must end in {', '.join(PICTURES)}; got {path}")


def plot(solution: "Solution | StationaryResult", path: Path) -> None:
    """Draw value and best action over the beliefs, or the best action over belief and attitude to ambiguity."""
    from lindm.api import figures
    from lindm.io.progress import progress_bar

    if not figures.has_beliefs(solution):
        raise UsageError("--plot draws over the beliefs of a POMDP; the state of an MDP is observed")
    with progress_bar("beliefs") as progress:
        figures.plot(solution, path, timeout=PLOT_SECONDS, on_belief=progress)


COMMAND = Command(
    name="solve",
    options=Solve,
    run=run,
    examples=(
        "lindm solve tiger.pomdp --horizon 10",
        "lindm solve good.pomdp bad.pomdp --horizon 5 --alpha 0.8",
        "lindm solve prostate --horizon 4 --json",
        "lindm solve tiger.pomdp --horizon inf --save policy.alpha",
    ),
    sections={"split": "Options of a family"},
)
