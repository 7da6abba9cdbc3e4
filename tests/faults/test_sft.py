"""`lindm sft`, killed in every phase of its work: each run starts from what the killed one left, and dies one phase later."""

import json
import shutil

import pytest

from lindm.io import files
from lindm.llm.sft import checkpoints
from tests.faults.conftest import KILLED, content, words

pytestmark = [pytest.mark.slow, pytest.mark.fault("F1", "F26")]
IMPORTS = ("jax", "matplotlib.pyplot", "transformers", "lindm.cli.main", "lindm.api.data", "lindm.llm.sft.trainer")

MODEL = """
from pathlib import Path
import jax.numpy as jnp
from flax import nnx
from lindm import datasets
from lindm.llm.config import ModelConfig
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm.llm.train_tokenizer import train_tokenizer
data = datasets.Dataset(Path("data"))
texts = datasets.documents(data, datasets.text_format(data))
tokenizer = train_tokenizer([piece.text for _, _, pieces in texts for piece in pieces], 320)
tokenizer.save_pretrained("tokenizer")
sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "intermediate_size": 16}
sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
config = ModelConfig(model_type="llama", tie_word_embeddings=True, **sizes)
weights.save(Decoder(config, nnx.Rngs(0), jnp.float32), Path("model"), like=Path("tokenizer"))
"""
STEPS = 4
OPTIONS = f"--steps {STEPS} --batch 2 --save-every 2 --eval-every 2 --held-out 0.2 --eval-tasks 0 --keep 1"
FULL = words(f"sft --model model --data data --out out --patience 5 {OPTIONS}")
LORA = words(f"sft --model model --data data --out lora --method lora {OPTIONS}")
ROWS = words(f"sft --model model --data shards --token-cache cache --out rows {OPTIONS}")
FIRST, LAST = checkpoints.checkpoint_name(2), checkpoints.checkpoint_name(STEPS)

# in the order of the work. A run that starts again is beyond an earlier point as soon as the next checkpoint is there
TRAINING = [
    ("os.mkdir", "out"),
    ("os.rename", "out/config.json"),
    ("write", "out/metrics.jsonl"),
    ("os.rename", "out/best/00000000"),
    ("open", f"out/best/.{FIRST}.lindm-tmp/state*/_METADATA"),  # while Orbax writes
    ("os.rename", f"out/best/{FIRST}"),
    ("os.remove", "out/best/.00000000.removed.lindm-tmp/state/*"),
    ("open", f"out/checkpoints/.{FIRST}.lindm-tmp/state*/commit_success.txt"),
    ("os.rename", f"out/checkpoints/{FIRST}"),
]
LAST_SAVE = [
    ("os.rename", "out/best/.00000002.removed.lindm-tmp"),
    ("os.rename", f"out/checkpoints/.{LAST}.lindm-tmp/state"),
    ("write", f"out/checkpoints/.{LAST}.lindm-tmp/.manifest.json.lindm-tmp"),
    ("os.rename", f"out/checkpoints/{LAST}"),
    ("os.rename", "out/checkpoints/.00000002.removed.lindm-tmp"),
]
EXPORT = [
    ("os.mkdir", "out/.model.lindm-tmp"),
    ("open", "out/.model.lindm-tmp/model.safetensors"),
    ("write", "out/.model.lindm-tmp/.manifest.json.lindm-tmp"),
    ("os.rename", "out/model"),
    ("write", "out/.curves.png.lindm-tmp"),
    ("os.rename", "out/curves.pdf"),
    ("os.rename", "out/.best.removed.lindm-tmp"),
    ("os.remove", "out/.best.removed.lindm-tmp/*/state/manifest.ocdbt"),
    ("write", "out/.manifest.json.lindm-tmp"),
    ("os.rename", "out/manifest.json"),
]


@pytest.fixture(scope="module")
def start(kill_server, tmp_path_factory):
    """A small model and a small dataset."""
    root = tmp_path_factory.mktemp("start")
    make = words("data make TIGER --horizon 2 --tasks 8 --demos 1 --out data")
    for argv, code in ((make, {}), ([], {"code": MODEL})):
        done = kill_server.run(root, argv, **code)
        assert done.code == 0, done.output
    (root / "shards").mkdir()
    for name in "ab":
        rows = [{"prompt": f"{i}", "completion": f" {'AB'[i % 2]}"} for i in range(12)]
        (root / "shards" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def whole(kill_server, start, tmp_path_factory):
    """The same runs, uninterrupted."""
    root = tmp_path_factory.mktemp("whole") / "root"
    shutil.copytree(start, root)
    for argv in (FULL, LORA, ROWS):
        done = kill_server.run(root, argv)
        assert done.code == 0, done.output
    return root


def result(out):
    """What two runs must have in common: every byte but Orbax's, which are compared as arrays by what was made from them."""
    names = {name: what for name, what in content(out).items() if not name.startswith("checkpoints/")}
    names["manifest.json"] = [files.read_json(out / "manifest.json")[key] for key in ("outputs", "steps", "best_step")]
    names["checkpoints"] = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert all(checkpoints.find_damage(out / "checkpoints" / name) is None for name in names["checkpoints"])
    return names


def check_chain(kill_server, trials, root, argv, points):
    for kind, pattern in points:
        run = kill_server.run(root, argv, (kind, pattern), half=True)
        assert run.code == KILLED, f"{kind} {pattern} was not reached:\n{run.output}"
        trials.add()
    run = kill_server.run(root, argv)
    assert run.code == 0, run.output


def test_killed_in_every_phase_it_ends_with_the_same_bytes(kill_server, start, whole, tmp_path, trials):
    root = tmp_path / "root"
    shutil.copytree(start, root)
    check_chain(kill_server, trials, root, FULL, TRAINING + LAST_SAVE + EXPORT)
    assert result(root / "out") == result(whole / "out")


def test_killed_while_it_exports_an_adapter_it_ends_with_the_same_bytes(kill_server, start, whole, tmp_path, trials):
    root = tmp_path / "root"
    shutil.copytree(start, root)
    points = [("os.rename", "lora/.model.lindm-tmp/config.json"), ("open", "lora/.adapter.lindm-tmp/*.safetensors")]
    check_chain(kill_server, trials, root, LORA, [*points, ("os.rename", "lora/adapter")])
    assert result(root / "lora") == result(whole / "lora")


def test_killed_while_it_writes_tokens_it_ends_with_the_same_bytes(kill_server, start, whole, tmp_path, trials):
    root = tmp_path / "root"
    shutil.copytree(start, root)
    points = [
        ("write", "cache/.hashes.json.lindm-tmp"),
        ("write", "cache/*/.part-00000.safetensors.lindm-tmp"),
        ("os.rename", "cache/*/part-00001.safetensors"),
        ("os.rename", "rows/config.json"),
    ]
    check_chain(kill_server, trials, root, ROWS, points)
    assert result(root / "rows") == result(whole / "rows")
    parts, others = ({p.name: p.read_bytes() for p in (r / "cache").rglob("part-*")} for r in (root, whole))
    assert parts == others and len(parts) == 2


def test_leftovers_of_any_kind_and_a_kill_while_it_starts_over_stop_no_later_run(kill_server, whole, tmp_path, trials):
    root = tmp_path / "root"
    shutil.copytree(whole, root)
    (root / "out" / ".model.a.lindm-tmp" / "below").mkdir(parents=True)
    (root / "out" / "checkpoints" / ".00000009.lindm-tmp").mkdir()
    (root / "out" / ".curves.png.x.lindm-tmp").write_text("half")
    assert kill_server.run(root, FULL).code == 0
    assert result(root / "out") == result(whole / "out")
    old = root / "out" / "checkpoints"  # of a run that was killed between its last save and the removal of older ones
    shutil.copytree(old / LAST, old / FIRST)
    (root / "out" / "manifest.json").unlink()
    assert kill_server.run(root, FULL).code == 0
    assert result(root / "out") == result(whole / "out")
    fresh = [("os.remove", f"out/{name}") for name in (".checkpoints.removed.lindm-tmp/*", "metrics.jsonl", "config.json")]
    check_chain(kill_server, trials, root, [*FULL, "--fresh"], fresh)
    again, first = result(root / "out"), result(whole / "out")
    for one in (again, first):
        del one["config.json"], one["manifest.json"]  # the option --fresh is in them
    assert again == first
