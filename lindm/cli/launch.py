"""`lindm launch`: a job file that runs `lindm sft` on many hosts, on stdout."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from lindm.llm.cluster.jobs import Gke, Job, Ray, Slurm, Tpu, check_options, job_file
from lindm.llm.sft.options import Sft

LAUNCHERS: dict[str, type[Job]] = {"slurm": Slurm, "tpu": Tpu, "gke": Gke, "ray": Ray}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Print a job file that runs `lindm sft` on many hosts: lindm launch LAUNCHER [its options] -- [options of lindm sft]."""

    launcher: tyro.conf.Positional[str]
    """slurm, tpu, gke or ray; `lindm launch LAUNCHER --help` lists its own options"""


def run_launch(launcher: str, rest: Sequence[str]) -> int:
    """Print the file; `rest` is what stood after the launcher."""
    from lindm.cli import _parse

    if launcher not in LAUNCHERS:
        raise ValueError(f"LAUNCHER must be one of {', '.join(LAUNCHERS)}; got {launcher!r}")
    cut = rest.index("--") if "--" in rest else len(rest)
    kind, words = LAUNCHERS[launcher], rest[cut + 1 :]
    job = _parse(kind, rest[:cut], f"lindm launch {launcher}", kind.__doc__)
    if not words:
        raise ValueError("the options of lindm sft must follow a --: lindm launch ... -- --model DIR --data DIR --out DIR")
    check_options(job, _parse(Sft, words, "lindm sft", None), words)
    sys.stdout.write(job_file(job, words))
    return 0
