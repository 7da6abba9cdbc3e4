"""`lindm sft`: fine-tune a language model."""

import os

from lindm.cli.exit_codes import EXIT_CODES
from lindm.cli.option_parser import Command
from lindm.io.compilation import use_compilation_cache
from lindm.llm.sft.options import SFTConfig


def run(options: SFTConfig) -> int:
    from lindm.llm.parallel import supervisor

    use_compilation_cache()  # also for the processes that are started here
    if (options.processes or 1) > 1 or (options.coordinator is None and supervisor.detect_launcher(dict(os.environ))):
        supervisor.supervise(EXIT_CODES)  # before the first thread is started: training goes on in a child process
    from lindm.llm.sft import trainer

    if (model := trainer.train(options)) is not None:
        print(f"model: {model}")
    return 0


COMMAND = Command(
    name="sft",
    options=SFTConfig,
    run=run,
    examples=(
        "lindm sft --preset tiny --data data/pomdp --out runs/tiny",
        "lindm sft --model models/SmolLM2-135M-Instruct --data data/pomdp --out runs/lora --method lora",
    ),
    sections={
        "method": "Training method",
        "supervise": "Data and text",
        "steps": "Optimization",
        "eval_every": "Evaluation and checkpoints",
        "mesh": "Devices and processes",
    },
)
