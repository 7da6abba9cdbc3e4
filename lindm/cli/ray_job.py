"""The command of a Ray job: python -m lindm.cli.ray_job --workers 4 --cpus 8 -- --model DIR --data DIR --out DIR"""

import sys
from collections.abc import Sequence

from lindm.cli import sft
from lindm.cli.lifecycle import LIFECYCLES
from lindm.cli.main import run_process
from lindm.cli.option_parser import Command, parse, run_command
from lindm.llm.cluster.jobs import RayWorkers, check_options


def run(job: RayWorkers, words: Sequence[str]) -> int:
    """Train on the workers of Ray; `words` are the options of `lindm sft`."""
    options = parse(sft.COMMAND, words)
    check_options(job, options, words)
    from lindm.llm.cluster import ray_job

    return ray_job.run(job, options)


COMMAND = Command(name="ray_job", options=RayWorkers, run=run, rest="-- OPTIONS OF LINDM SFT")

if __name__ == "__main__":
    sys.exit(run_process(lambda: run_command(COMMAND, sys.argv[1:]), LIFECYCLES[COMMAND.name].stop))
