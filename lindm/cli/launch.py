"""`lindm launch`: a job file that runs `lindm sft` on many hosts, on stdout."""

import sys
from collections.abc import Sequence

from lindm.cli import sft
from lindm.cli.arguments import Command, parse
from lindm.llm.cluster.jobs import Gke, Job, Ray, Slurm, Tpu, check_options, job_file

SUMMARY = "Print a job file that runs `lindm sft` on many hosts"


def run(job: Job, words: Sequence[str]) -> int:
    """Print the file; `words` are the options of `lindm sft`."""
    if not words:
        raise ValueError("the options of lindm sft must follow a --: lindm launch ... -- --model DIR --data DIR --out DIR")
    check_options(job, parse(sft.COMMAND, words), words)
    sys.stdout.write(job_file(job, words))
    return 0


def _command(name: str, options: type[Job], words: str) -> Command:
    example = f"lindm launch {name} {words} -- --model /lindm/model --data /lindm/data --out /lindm/run"
    return Command(name=f"launch {name}", options=options, run=run, rest="-- OPTIONS OF LINDM SFT", examples=(example,))


COMMANDS = {
    "slurm": _command("slurm", Slurm, "--nodes 4 --gpus-per-node 8"),
    "tpu": _command("tpu", Tpu, "--topology v5e:4x4 --zone us-west4-a --shared 10.0.0.2:/share"),
    "gke": _command("gke", Gke, "--topology v5e:4x4 --image registry/lindm:1 --claim disk"),
    "ray": _command("ray", Ray, "--workers 4 --image registry/lindm:1 --claim disk"),
}
