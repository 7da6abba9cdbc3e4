"""Sizes of suites that the oracle can label.

Every task of a suite is solved, and its tables are written to the dataset. So a suite is refused where a task has more than
`NUMBERS` numbers; where bounds of a POMDP would take more than `WORK` operations a task; and where an ambiguous POMDP is too
large for a tree and has more than `NET_STATES` states, for which the belief net gives no useful bounds
(`lindm.solvers.belief_net`).
"""

import bisect
from dataclasses import replace

import jax

from lindm.families.suites import Suite
from lindm.problems.apomdp import as_apomdp
from lindm.solvers import hsvi
from lindm.solvers.solve import MEMORY_BUDGET, method_for
from lindm.types import MDP, Problem

NUMBERS = 3_000_000  # a line of a table has up to 20 bytes a number, and at most `lindm.io.limits.LINE`
WORK = 6e10  # about a minute on one core
NET_STATES = 3


def check_labels(suite: Suite) -> None:
    """Check that the oracle can label the tasks of a suite.

    Raises:
      ValueError: it cannot; the message says up to which horizon it can.
    """
    if not (reason := why_not(suite.example)):
        return
    fits = bisect.bisect_left(range(1, suite.horizon), True, key=lambda h: bool(why_not(replace(suite, horizon=h).example)))
    sizes = ", ".join(f"{size:,} {part}" for part, size in suite.sizes._asdict().items() if size)
    possible = f"at most {fits} for {sizes}" if fits else f"less than 1 for {sizes}: choose smaller sizes"
    raise ValueError(f"horizon must be {possible}, since {reason}; got {suite.horizon}")


def why_not(problem: Problem) -> str:
    """Why the oracle cannot label a problem of these sizes; empty where it can."""
    numbers = sum(x.size for x in jax.tree.leaves(problem))
    if numbers > NUMBERS:
        return f"a task may have at most {NUMBERS:,} numbers (here {numbers:,})"
    if isinstance(problem, MDP) or (method := method_for(problem)) == "tree":
        return ""
    H, S, A = problem.horizon, problem.num_states, problem.num_actions
    if method == "net":
        rule = f"the tree fits in {MEMORY_BUDGET >> 30} GiB, and beyond it ambiguous problems have at most {NET_STATES} states"
        return "" if S <= NET_STATES else rule
    work = float(hsvi.TRIALS) * H * A * as_apomdp(problem).num_observations * S**2
    return f"bounds of a task may take at most {WORK:.0e} operations (here {work:.0e})" if work > WORK else ""
