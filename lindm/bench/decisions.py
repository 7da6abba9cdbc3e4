"""`lindm bench decisions [--json]`: the cost of a decision of a language model, beside `transformers.generate`.

A model of SmolLM2-135M's shape (random weights, f32) decides at every step of sampled episodes of MDPs of the suite `mdp`, with
five demonstrations per task. Ours is `lindm.llm.policy`: demonstrations are read once per task, a history extends the cache of
its parent by one step, and the actions are scored. The peer reads the whole prompt for every decision, one at a time, like
evaluation scripts: `generate` with one new token, restricted to the action tokens. It is timed on every `STRIDE`-th of these
decisions, over all tasks and stages, and must give the same answers. Costs and rows are those of `lindm.bench.timing`;
compilation is a row of its own.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from lindm.bench.sft import MISSING, MODEL
from lindm.bench.timing import LESS, MORE, NEITHER, Row, answer, cpu_seconds, in_worker, peak_growth, row, timed
from lindm.datasets import Dataset, DatasetConfig, documents, make_dataset, text_format
from lindm.evaluation.compare import read_tasks
from lindm.evaluation.environments import PolicyTask, double_precision
from lindm.evaluation.optimality_gap import evaluate_policy
from lindm.evaluation.policy import Observation
from lindm.families.random_suites import suite
from lindm.io.temporaries import scratch_directory
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm.llm.policy import LanguageModelPolicy
from lindm.llm.tokens import action_tokens, load_tokenizer
from lindm.llm.train_tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from lindm.text import COMPACT

MODULE = "lindm.bench.decisions"
TASKS, DEMOS, EPISODES, HORIZON = 4, 5, 8, 8
STRIDE = 7
# one token per byte and one per action: prompts have about 370 tokens, as with SmolLM2's own tokenizer
TEMPLATE = dataclasses.replace(COMPACT, name="letters", actions=("A", "B", "C"))
QUESTIONS = "questions.json"


def prepare(directory: Path) -> None:
    """A model, its tokenizer and a dataset."""
    with double_precision():
        make_dataset(directory / "data", suite("mdp", HORIZON), DatasetConfig(tasks=TASKS, demos=DEMOS))
    dataset = Dataset(directory / "data")
    pieces = (piece.text for _, _, parts in documents(dataset, text_format(dataset, TEMPLATE)) for piece in parts)
    train_tokenizer(pieces, MIN_VOCAB_SIZE).save_pretrained(str(directory / "tokenizer"))
    weights.save(Decoder(MODEL, nnx.Rngs(0)), directory / "model", like=directory / "tokenizer")


class _Recording(LanguageModelPolicy):
    """Keeps the text of every decision and the action taken."""

    def init(self, tasks: Sequence[PolicyTask]):
        self.taken: list[tuple[list[int], int]] = []
        state = super().init(tasks)
        return state, [self.prompt(task, state.text) for task in tasks]

    def step(self, state: Any, observation: Observation):
        state, texts = state
        parents = observation.parent if observation.stage else observation.task
        texts = [[*texts[parent], *self.new_tokens(observation, row, state.text)] for row, parent in enumerate(parents)]
        state, probabilities = super().step(state, observation)
        self.taken += zip(texts, probabilities.argmax(-1).tolist(), strict=True)
        return (state, texts), probabilities


def run_ours(directory: Path) -> dict[str, Any]:
    """CPU-seconds per decision and of compilation; writes the prompts and our answers to a file for the peer."""
    dataset = Dataset(directory / "data")
    tasks = read_tasks(dataset)
    model = weights.load(directory / "model"), load_tokenizer(directory / "model"), text_format(dataset, TEMPLATE)
    policy, recording = LanguageModelPolicy(*model), _Recording(*model)

    def decide(policy: LanguageModelPolicy = policy) -> int:
        losses = evaluate_policy(tasks, policy, episodes=EPISODES, max_histories=0)
        return sum(loss.decisions for loss in losses if loss is not None)

    first, decisions = timed(decide)
    cost = cpu_seconds(decide, 2)
    decide(recording)
    actions = [tokens[0] for tokens in action_tokens(recording.tokenizer, TEMPLATE, dataset.num_actions)]
    questions, answers = zip(*recording.taken[::STRIDE], strict=True)
    given = {"actions": actions, "questions": questions, "answers": answers}
    (directory / QUESTIONS).write_text(json_module.dumps(given))
    tokens = sum(map(len, questions)) / len(questions)
    return {"cost": cost / decisions, "compile": first - cost, "decisions": decisions, "tokens": tokens}


def run_torch(directory: Path) -> dict[str, Any]:
    """CPU-seconds per decision, and the number of equal answers."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    given = json_module.loads((directory / QUESTIONS).read_text())
    model = LlamaForCausalLM.from_pretrained(directory / "model", attn_implementation="sdpa", dtype=torch.float32)
    model.eval()
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    answers: list[int] = []

    def decide() -> None:
        answers.clear()
        with torch.inference_mode():
            for ids in given["questions"]:
                prompt = torch.tensor([ids])
                out = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    prefix_allowed_tokens_fn=lambda batch, so_far: given["actions"],
                    **options,
                )
                answers.append(given["actions"].index(int(out[0, -1])))

    cost = cpu_seconds(decide, 2)
    same = sum(a == b for a, b in zip(answers, given["answers"], strict=True))
    return {"cost": cost / len(answers), "same": same, "answers": len(answers)}


def measure(side: str, directory: str) -> dict[str, Any]:
    """One side, measured in this process: its outcome, and its peak memory in MiB."""
    outcome: dict[str, Any] = {}
    run = run_ours if side == "ours" else run_torch
    memory = peak_growth(lambda: outcome.update(run(Path(directory))))
    return outcome | {"memory": memory}


def rows(ours: dict[str, Any], peer: dict[str, Any] | None, name: str) -> list[Row]:
    """The table. RuntimeError if the sides decide differently: they did not do the same work."""
    if peer is not None and peer["same"] != peer["answers"]:
        raise RuntimeError(f"{name} and ours differ in {peer['answers'] - peer['same']} of {peer['answers']} decisions")
    work = f"{ours['decisions']} decisions in {TASKS} tasks, prompts of {ours['tokens']:.0f} tokens"

    def of(key: str) -> float | None:
        return peer[key] if peer is not None else None

    rate = None if peer is None else 1 / peer["cost"]
    return [
        row(work, 1 / ours["cost"], rate, name, "decisions/CPU-s", MORE),
        row(f"{work}: peak memory", ours["memory"], of("memory"), name, "MiB", LESS),
        row(f"{work}: compile", ours["compile"], None, name, "CPU-s", NEITHER),
        row("answers compared, all the same", ours["decisions"], of("answers"), name, "decisions", NEITHER),
    ]


def benchmark() -> list[Row]:
    """The rows of the table. Takes about two minutes and 3 GB of memory."""
    installed = all(importlib.util.find_spec(library) is not None for library in ("torch", "transformers"))
    name = MISSING
    if installed:
        name = (
            f"generate of transformers {importlib.metadata.version('transformers')}, torch {importlib.metadata.version('torch')}"
        )
    with scratch_directory() as directory:
        prepare(directory)
        ours = in_worker(MODULE, "ours", str(directory))
        peer = in_worker(MODULE, "torch", str(directory)) if installed else None
    return rows(ours, peer, name)


if __name__ == "__main__":
    answer(measure)
