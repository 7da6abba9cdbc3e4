"""`lindm solve`: the value of a decision problem and its best first action."""

import time
from dataclasses import dataclass
from typing import Annotated, Literal

from lindm.cli.option_parser import Command, Positional
from lindm.io.files import strict_json


@dataclass(frozen=True, kw_only=True)
class Solve:
    """Compute the value of a decision problem, with bounds, and the best first action."""

    problem: Annotated[tuple[str, ...], Positional("PROBLEM")]
    """A .pomdp file, or prostate. Several files are the models of an ambiguous POMDP."""
    horizon: int
    """Number of stages."""
    discount: float | None = None
    """Discount factor, in place of the file's."""
    alpha: float | None = None
    """Attitude to ambiguity: 1 is the worst case over the models, 0 the best."""
    method: Literal["auto", "tree", "hsvi", "net"] = "auto"
    """auto is exact if the belief tree fits in 2 GiB, and gives certified bounds otherwise."""
    effort: int | None = None
    """Trials of hsvi [default: 256] or points of the net [default: 20000]."""
    json: bool = False
    """Print one JSON object."""


def run(options: Solve) -> int:

    start = time.perf_counter()
    from lindm.api.solutions import solve
    from lindm.cli.problems import read_problem

    source = read_problem(options.problem, options.horizon, options.discount, options.alpha)
    solution = solve(source, options.method, effort=options.effort)
    action, seconds = solution.first_action, time.perf_counter() - start
    if options.json:
        answer = {"value": solution.value, "lower": solution.lower, "upper": solution.upper, "method": solution.method}
        print(strict_json({**answer, "seconds": round(seconds, 3), "first_action": action}))
        return 0
    bounds = "exact" if solution.exact else f"certified to lie in [{solution.lower:.10g}, {solution.upper:.10g}]"
    print(f"value         {solution.value:.10g}  ({bounds})")
    print(f"first action  {action}")
    print(f"method        {solution.method}, {seconds:.1f} s")
    return 0


COMMAND = Command(
    name="solve",
    options=Solve,
    run=run,
    examples=(
        "lindm solve tiger.pomdp --horizon 10",
        "lindm solve good.pomdp bad.pomdp --horizon 5 --alpha 0.8",
        "lindm solve prostate --horizon 4 --json",
    ),
)
