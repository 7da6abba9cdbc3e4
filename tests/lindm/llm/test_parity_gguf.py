"""GGUF files that are written here, read by the loader of transformers."""

from dataclasses import replace

import numpy as np
import pytest
import transformers

import lindm as ld
from lindm.llm.io import gguf, weights
from lindm.llm.io.gguf_tokenizer import QWEN2
from tests.lindm.llm.io.tensors import everything
from tests.lindm.llm.io.test_gguf_writer import CONFIGS, directory, fitted, split_by
from tests.lindm.llm.reading import logits_of
from tests.lindm.llm.small import TURNS, byte_level

torch = pytest.importorskip("torch", reason="needs torch: make parity")
from tests.lindm.llm.test_parity import their_logits, theirs  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
# the loader reads no scaling of rotary embeddings, and takes 128 for the head size of Qwen3
MODELS = {name: CONFIGS[name] for name in ("llama", "mistral", "qwen2")} | {"qwen3": replace(CONFIGS["qwen3"], head_dim=128)}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_a_file_has_the_same_logits_in_transformers(tmp_path, name, dtype):
    source = directory(tmp_path, MODELS[name], scale=0.3)
    ld.export(source, tmp_path / "m.gguf", dtype=dtype)
    there = theirs(tmp_path, gguf_file="m.gguf")
    tensors = {key: fitted(key, tensor, dtype) for key, tensor in everything(source).items()}
    state = there.state_dict()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(state[key].numpy(), tensor, err_msg=key)
    (tmp_path / "back").mkdir()
    gguf.convert(tmp_path / "m.gguf", tmp_path / "back")
    ids = np.random.default_rng(1).integers(0, 300, (1, 40))
    true = their_logits(there, ids)[0]
    ours = logits_of(weights.load(tmp_path / "back"))(ids[0].tolist())
    np.testing.assert_allclose(ours, true, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["smollm", "qwen2"])
def test_the_tokenizer_of_a_file_is_the_same_in_transformers(tmp_path, kind):
    tokenizer = byte_level() if kind == "smollm" else split_by(QWEN2, nfc=True)
    source = directory(tmp_path, CONFIGS["llama" if kind == "smollm" else "qwen2"], tokenizer)
    ld.export(source, tmp_path / "m.gguf")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert back.chat_template == tokenizer.chat_template
    assert back.eos_token == tokenizer.eos_token
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    for example in ("The state is 3.", "x it's", text):
        assert back(example, add_special_tokens=False)["input_ids"] == tokenizer(example, add_special_tokens=False)["input_ids"]
