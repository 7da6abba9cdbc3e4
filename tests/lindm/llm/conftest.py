"""A micro model, its tokenizer and small datasets, shared by the tests of training and of policies."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lindm import datasets
from lindm.datasets import DatasetConfig
from lindm.families.random_suites import RandomSuite
from lindm.llm.config import ModelConfig
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm.llm.train_tokenizer import train_tokenizer

SUITE = RandomSuite(name="small", horizon=3, states=3, actions=2, concentration=0.5, step=0.25)
SIZES = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "init_std": 0.4,
}


@dataclass(frozen=True)
class Micro:
    """Directories of a small model and small datasets."""

    model: Path
    mdp: Path
    hidden: Path  # a POMDP
    ambiguous: Path  # an ambiguous POMDP


@pytest.fixture(autouse=True, scope="module")
def forgotten():
    """Programs of one module are of no use to the next; all of them together take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def micro(tmp_path_factory, brute) -> Micro:
    root = tmp_path_factory.mktemp("micro")
    config = DatasetConfig(tasks=24, demos=2, queries=2, query_epsilon=0.5)
    problems = [brute.random(5, S=2, A=2, O=2, M=m, H=3, alpha=0.7, same_start=True).problem() for m in (1, 2)]
    single = type(problems[0].models)(**{k: getattr(problems[0].models, k)[0] for k in ("P", "O", "r", "rho")})
    for name, source in (("mdp", SUITE), ("hidden", single), ("ambiguous", problems[1])):
        datasets.make_dataset(root / name, source, config)
    pieces = []
    for name in ("mdp", "hidden", "ambiguous"):
        dataset = datasets.Dataset(root / name)
        texts = datasets.documents(dataset, datasets.text_format(dataset))
        pieces += [piece.text for _, _, parts in texts for piece in parts]
    tokenizer = train_tokenizer(pieces, 320)
    tokenizer.save_pretrained(str(root / "tokenizer"))
    model_config = ModelConfig(model_type="llama", vocab_size=len(tokenizer), **SIZES)
    weights.save(Decoder(model_config, nnx.Rngs(0), jnp.float32), root / "model", like=root / "tokenizer")
    return Micro(model=root / "model", mdp=root / "mdp", hidden=root / "hidden", ambiguous=root / "ambiguous")
