"""`lindm launch`: a job file that runs `lindm sft` on many hosts, on stdout."""

import sys
from collections.abc import Sequence

from lindm.cli import sft
from lindm.cli.option_parser import Command, parse
from lindm.errors import UsageError
from lindm.llm.cluster.jobs import LAUNCHERS, Job, check_options, job_file

SUMMARY = "Print a job file that runs `lindm sft` on many hosts"


def run(job: Job, words: Sequence[str]) -> int:
    """Print the file; `words` are the options of `lindm sft`."""
    if not words:
        raise UsageError("the options of lindm sft must follow a --: lindm launch ... -- --model DIR --data DIR --out DIR")
    check_options(job, parse(sft.COMMAND, words), words)
    sys.stdout.write(job_file(job, words))
    return 0


EXAMPLES = {
    "slurm": "--nodes 4 --gpus-per-node 8",
    "tpu": "--topology v5e:4x4 --zone us-west4-a --shared 10.0.0.2:/share --package 'lindm[tpu] @ file:///lindm/WHEEL'",
    "gke": "--topology v5e:4x4 --image registry/lindm:1 --claim disk",
    "ray": "--workers 4 --image registry/lindm:1 --claim disk",
}
COMMANDS = {
    name: Command(
        name=f"launch {name}",
        options=options,
        run=run,
        rest="-- OPTIONS OF LINDM SFT",
        examples=(f"lindm launch {name} {EXAMPLES[name]} -- --model /lindm/model --data /lindm/data --out /lindm/run",),
    )
    for name, options in LAUNCHERS.items()
}
