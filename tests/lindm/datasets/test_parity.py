"""Exports in the tools that they are for: TRL's SFTTrainer trains on the rows, d3rlpy evaluates a policy from Minari datasets."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import lindm as ld
from tests.clock import HANGS
from tests.lindm.llm.small import byte_level

ROOT = Path(__file__).parents[3]
D3RLPY = ROOT / ".venv-d3rlpy" / "bin" / "python"  # d3rlpy pins an older gymnasium: `make parity` makes its environment
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt_completion", "messages"])
def test_a_step_of_sfttrainer_trains_the_oracles_actions_and_nothing_else(made, tmp_path, monkeypatch, name):
    pytest.importorskip("torch", reason="needs torch: make parity")
    trl = pytest.importorskip("trl", reason="needs trl: make parity")
    datasets = pytest.importorskip("datasets", reason="needs trl, which installs it: make parity")
    import transformers

    ld.export_dataset(made.mdp, tmp_path / "trl")
    path = tmp_path / "trl" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = byte_level(CHATML)
    tokenizer.pad_token = "<|endoftext|>"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes)
    model = transformers.LlamaForCausalLM(config)
    before = model.lm_head.weight.detach().clone()
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        max_length=4096,
        learning_rate=0.1,
        assistant_only_loss=name == "messages",
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(rows) == len(data)
    for row, example in zip(rows, trainer.train_dataset, strict=True):
        batch = trainer.data_collator([example])
        trained = batch["labels"][0]
        answers = str(tokenizer.decode(trained[trained != -100])).split("<|im_end|>")
        expected = [m["content"] for m in row.get("messages", ()) if m["role"] == "assistant"] or [row["completion"]]
        assert answers == [*expected, ""]
    result = trainer.train()
    assert np.isfinite(result.training_loss) and not (model.lm_head.weight == before).all()


ARRIVE = """discount: 0.8
states: far near goal
actions: walk rest
start: 1 0 0
T: walk
0.3 0.7 0
0 0.4 0.6
0 0 1
T: rest identity
E: goal
R: * : * : * : * -1
R: walk : near : goal : * 10
"""
T = np.array([[[0.3, 0.7, 0], [0, 0.4, 0.6], [0, 0, 1]], np.eye(3)])
R = np.array([[[-1, -1, -1], [-1, -1, 10], [0, 0, 0]], [[-1, -1, -1], [-1, -1, -1], [0, 0, 0]]], float)
POLICY = [[0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]]  # action at every stage and state


def value(discount):
    """Of the policy, by backward recursion."""
    V = np.zeros(3)
    for actions in reversed(POLICY):
        V = np.array([T[a, s] @ (R[a, s] + discount * V) for s, a in enumerate(actions)])
    return V[0]


@pytest.mark.slow
@pytest.mark.skipif(not D3RLPY.exists(), reason="needs d3rlpy in an environment of its own: make parity")
def test_fitted_q_evaluation_from_the_minari_dataset_is_within_its_error_of_the_exact_value(tmp_path):
    (tmp_path / "arrive.pomdp").write_text(ARRIVE)
    (tmp_path / "policy.json").write_text(json.dumps(POLICY))
    problem, places = ld.read_pomdp(tmp_path / "arrive.pomdp", horizon=4), []
    for seed in range(4):  # independent datasets tell the error of an estimate
        ld.make_dataset(problem, tmp_path / f"data{seed}", tasks=1, demos=600, behavior="uniform", seed=seed)
        (exported,) = ld.export_dataset(tmp_path / f"data{seed}", tmp_path / f"minari{seed}", to="minari")
        places.append(str(exported / "data"))
    command = [str(D3RLPY), str(Path(__file__).with_name("fqe.py")), str(tmp_path / "policy.json"), *places]
    env = {name: word for name, word in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANGS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    estimates = np.array(json.loads(done.stdout.splitlines()[-1]))
    error = estimates.std(ddof=1) / np.sqrt(len(estimates))
    print(f"FQE {estimates.round(3).tolist()}, mean {estimates.mean():.3f} +- {error:.3f}; exact {value(0.8):.3f}")
    assert abs(estimates.mean() - value(0.8)) < 4 * error and error < 0.25
    assert abs(estimates.mean() - value(0.64)) > 4 * error  # rewards that are discounted already, and then once more
