"""`lindm sft`: fine-tune a language model."""

import os

from lindm.cli.data import words_of_tasks
from lindm.cli.exit_codes import EXIT_CODES
from lindm.cli.option_parser import Command
from lindm.io.compilation import use_compilation_cache
from lindm.llm.sft.options import SFTConfig


def run(options: SFTConfig) -> int:
    from lindm.llm.parallel import supervisor

    draw = None if options.draw is None else words_of_tasks(options.draw)
    use_compilation_cache()  # also for the processes that are started here
    if (options.processes or 1) > 1 or (options.coordinator is None and supervisor.detect_launcher(dict(os.environ))):
        supervisor.supervise(EXIT_CODES)  # before the first thread is started: training goes on in a child process
    from lindm.llm.sft import trainer

    if (model := trainer.train(options, draw=draw)) is not None:
        print(f"model: {model}")
    return 0


COMMAND = Command(
    name="sft",
    options=SFTConfig,
    run=run,
    examples=(
        "lindm sft --preset tiny --data data/pomdp --out runs/tiny",
        'lindm sft --preset tiny --draw "mdp --horizon 4 --tasks 4000 --demos 5" --out runs/mdp',
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
