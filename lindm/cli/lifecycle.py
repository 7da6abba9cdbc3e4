"""What each command does with a stop, the phases that it goes through, and what kind of directory it writes.

A command that is not in the table cannot run. `tests/lindm/cli/test_stops.py` sends SIGTERM and SIGINT in every phase of every
command.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lindm.cli.exit_codes import EXIT_CODES
from lindm.errors import Preempted
from lindm.io.signals import Ending

Phase = Literal["import", "reading", "compiling", "training", "evaluating", "saving", "exporting", "drawing"]
Stop = Literal["resumes", "starts over"]
Writes = Literal["verification", "experiment run", "dataset", "data export", "training run", "evaluation", "model", "report"]


@dataclass(frozen=True, kw_only=True)
class Lifecycle:
    """One command.

    Attributes:
      stop: what the same command does after a stop. One that resumes has finished parts on disk and ends with the exit code of
        `Preempted`; one that starts over ends at once with 143 (SIGTERM) or 130 (SIGINT).
      phases: in which a stop can arrive, in order.
      writes: the kind of its output directory; None where it writes no directory, or only into one that exists.
    """

    stop: Stop
    phases: tuple[Phase, ...]
    writes: Writes | None = None


LIFECYCLES: dict[str, Lifecycle] = {
    "verify": Lifecycle(stop="resumes", phases=("import", "evaluating", "saving", "drawing"), writes="verification"),
    "run": Lifecycle(stop="resumes", phases=("import", "compiling", "evaluating", "saving", "drawing"), writes="experiment run"),
    "theory risk": Lifecycle(stop="starts over", phases=("import", "reading", "evaluating", "drawing")),
    "plot": Lifecycle(stop="starts over", phases=("import", "reading", "drawing")),
    "report": Lifecycle(stop="starts over", phases=("import", "reading", "drawing"), writes="report"),
    "families": Lifecycle(stop="starts over", phases=("import",)),
    "estimate": Lifecycle(stop="starts over", phases=("import", "reading", "compiling", "saving")),
    "solve": Lifecycle(stop="starts over", phases=("import", "reading", "compiling")),
    "data make": Lifecycle(stop="resumes", phases=("import", "reading", "compiling", "saving"), writes="dataset"),
    "data export": Lifecycle(stop="starts over", phases=("import", "reading", "exporting"), writes="data export"),
    "model import": Lifecycle(stop="starts over", phases=("import", "reading", "exporting"), writes="model"),
    "model show": Lifecycle(stop="starts over", phases=("import", "reading")),
    "sft": Lifecycle(
        stop="resumes",
        phases=("import", "reading", "compiling", "training", "evaluating", "saving", "exporting", "drawing"),
        writes="training run",
    ),
    "generate": Lifecycle(stop="starts over", phases=("import", "reading", "compiling", "saving")),
    "eval": Lifecycle(stop="starts over", phases=("import", "reading", "compiling", "evaluating", "saving"), writes="evaluation"),
    "act": Lifecycle(stop="starts over", phases=("import", "reading", "compiling")),
    "export": Lifecycle(stop="starts over", phases=("import", "reading", "exporting"), writes="model"),
    "check": Lifecycle(stop="starts over", phases=("import", "reading")),
    "doctor": Lifecycle(stop="starts over", phases=("import", "reading")),
    "plan": Lifecycle(stop="starts over", phases=("import", "reading", "compiling")),
    **{f"launch {name}": Lifecycle(stop="starts over", phases=("import",)) for name in ("slurm", "tpu", "gke", "ray")},
    "bench": Lifecycle(stop="starts over", phases=("import", "compiling", "evaluating")),
    "ray_job": Lifecycle(stop="resumes", phases=("import",), writes="training run"),  # a program of its own, in the job of Ray
}


def ending(stop: Stop) -> Callable[[int, str], Ending]:
    """How `lindm.io.signals.watch` ends a command."""

    def end(number: int, kept: str) -> Ending:
        name = signal.Signals(number).name
        if stop == "starts over":
            return Ending(128 + number, f"stopped by {name}; the same command starts over")
        return Ending(EXIT_CODES[Preempted], f"stopped by {name}{': ' * bool(kept)}{kept}; the same command resumes")

    return end
