"""The page about a new family is right: the entry and the configuration that it shows make a family that works."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.errors import DataError
from lindm.llm import model_families
from lindm.llm.config import parse_model_config
from lindm.llm.io import weights
from tests.lindm.llm import reference
from tests.lindm.llm.io.tensors import everything, same

PAGE = Path(__file__).parents[3] / "docs" / "where-to-change-what.md"


@pytest.fixture
def family(monkeypatch):
    """The name of the family of the page, registered while a test runs."""
    section = PAGE.read_text().partition("## A model family")[2]
    entry, config = (re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)[0] for language in ("python", "json"))
    config = json.loads(config)
    with pytest.raises(DataError, match="model_type must be one of"):
        parse_model_config(config, "config.json")
    before = dict(model_families.FAMILIES)
    exec(entry, {})
    monkeypatch.setitem(reference.CONFIGS, config["model_type"], config)
    yield config["model_type"]
    model_families.FAMILIES.clear()
    model_families.FAMILIES.update(before)


def logits(model, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    return np.asarray(jax.jit(lambda i: model.logits(model.last_hidden_state(i, positions)))(jnp.asarray(ids, jnp.int32)))


def test_the_family_of_the_page_computes_what_plain_numpy_does(tmp_path, family):
    directory = reference.write(tmp_path / "model", family)
    ids = np.random.default_rng(1).integers(0, 58, (1, 12))
    model = weights.load(directory)
    true = reference.logits(family, reference.weights(family), ids[0])
    np.testing.assert_allclose(logits(model, ids)[0], true, rtol=0, atol=3e-6 * np.abs(true).max())
    weights.save(model, tmp_path / "out", like=directory)
    assert same(everything(tmp_path / "out"), reference.weights(family)) and weights.load(tmp_path / "out").config == model.config


@pytest.mark.parity
def test_the_family_of_the_page_computes_what_transformers_does(tmp_path, family):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    directory = reference.write(tmp_path / "model", family)
    ids = np.random.default_rng(1).integers(0, 58, (2, 48))
    ours = weights.load(directory)
    weights.save(ours, tmp_path / "out", like=directory)
    for path in (directory, tmp_path / "out"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            np.testing.assert_allclose(logits(ours, ids), theirs(torch.tensor(ids)).logits.numpy(), rtol=0, atol=1e-4)
