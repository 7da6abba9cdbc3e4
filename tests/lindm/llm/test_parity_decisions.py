"""An exported run makes the same decisions in transformers with torch: a micro model, and a given run of SmolLM2."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from lindm.evaluation.environments import make_tasks
from lindm.evaluation.optimality_gap import evaluate_policy
from lindm.llm.io import weights
from lindm.llm.policy import LanguageModelPolicy
from lindm.llm.sft import setup, trainer
from lindm.llm.sft.options import SFTConfig
from lindm.llm.tokens import load_tokenizer
from tests.lindm.llm.reading import read_whole, tasks_of

torch = pytest.importorskip("torch", reason="needs torch: make parity")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


def torch_logits(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()

    def of(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    return of


@pytest.mark.fault("F18")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_exported_model_decides_the_same_in_torch(micro, tmp_path, method):
    options = SFTConfig(
        model=micro.model, data=micro.hidden, out=tmp_path / "out", steps=4, eval_tasks=0, method=method, learning_rate=5e-3
    )
    assert trainer.train(options).is_dir()
    directory = tmp_path / "out" / "model"
    tasks, text = tasks_of(micro.mdp, 3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    whole, scores, _ = read_whole(torch_logits(directory), tokenizer, text, 2)
    wanted = evaluate_policy(tasks, whole)
    assert len({int(np.argmax(s)) for s in scores}) == 2
    model = weights.load(directory)
    losses = evaluate_policy(tasks, LanguageModelPolicy(model, load_tokenizer(directory), text))
    assert [dataclasses.replace(loss, invalid=None) for loss in losses] == wanted


@pytest.mark.skipif("LINDM_RUN" not in os.environ, reason="LINDM_RUN names no run of `lindm sft`")
def test_a_given_run_decides_the_same_in_torch():
    out = Path(os.environ["LINDM_RUN"])
    given = json.loads((out / "config.json").read_text())["options"]
    paths = {k: Path(v) for k, v in given.items() if k in ("data", "out", "model", "eval_data") and v is not None}
    options = dataclasses.replace(SFTConfig(**(given | paths)), mesh="data=1,fsdp=8")
    decisions = setup.setup_training(dataclasses.replace(options, batch=8)).decision_tasks
    assert decisions is not None
    tasks = make_tasks([task.problem() for task in decisions.tasks[:4]], decisions.demonstrations[:4])
    policy = LanguageModelPolicy(weights.load(out / "model"), load_tokenizer(out / "model"), decisions.text)
    A = tasks[0].known.num_actions
    whole, scores, _ = read_whole(torch_logits(out / "model"), load_tokenizer(out / "model"), decisions.text, A)
    limits = {"episodes": 2, "max_histories": 64}
    wanted = evaluate_policy(tasks, whole, **limits)
    assert len(scores) > 30
    assert [dataclasses.replace(loss, invalid=None) for loss in evaluate_policy(tasks, policy, **limits)] == wanted
