"""The trained tokenizer: one token per repeated piece, any text, and the same result every time."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lindm.llm.model_families import FAMILIES
from lindm.llm.tokens import action_tokens, decode, document_prefix, encode, load_tokenizer
from lindm.llm.train_tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from lindm.text import COMPACT, READABLE, Document, Step, render

ROOT = Path(__file__).parents[3]


def pieces_of(template, seed: int = 0, documents: int = 20) -> list[str]:
    rng = np.random.default_rng(seed)

    def episode() -> tuple[Step, ...]:
        return tuple(
            Step(action=int(rng.integers(3)), state=int(rng.integers(12)), reward=float(rng.integers(11)) / 10) for _ in range(6)
        )

    return [p.text for _ in range(documents) for p in render(Document((episode(), episode()), episode()), template)]


SMALL = train_tokenizer(pieces_of(COMPACT), 512)


@pytest.mark.parametrize("template", [COMPACT, READABLE], ids=lambda t: t.name)
def test_every_piece_is_one_token_and_a_step_is_three(template):
    tokenizer = train_tokenizer(pieces_of(template), 600)
    others = pieces_of(template, seed=1)  # other documents of the same law
    assert {len(ids) for ids in encode(tokenizer, others)} == {1}
    assert all(len(ids) == 1 for ids in action_tokens(tokenizer, template, 3))


def test_unseen_text_is_represented():
    for piece in (" Z", ":-1.25e-09", "\n4711", "Zürich 🂡", "<|end|>", "\x00"):
        (ids,) = encode(SMALL, [piece])
        assert decode(SMALL, ids) == piece and SMALL.eos_token_id not in ids


@given(text=st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_text_is_decoded_unchanged(text):
    assert decode(SMALL, encode(SMALL, [text])[0]) == text


def test_the_tokenizer_has_an_eos_token_and_no_bos_token():
    assert (SMALL.eos_token, SMALL.bos_token, document_prefix(SMALL)) == ("<|end|>", None, [])
    assert SMALL("<|end|>")["input_ids"] == [SMALL.eos_token_id]


def test_the_vocabulary_has_at_most_the_given_size():
    words = [f"word number {i}" for i in range(300)] * 2
    assert len(train_tokenizer(words, 400)) == 400
    assert len(SMALL) < 300  # the bytes, the pieces and their parts
    assert len(train_tokenizer([], MIN_VOCAB_SIZE)) == MIN_VOCAB_SIZE
    with pytest.raises(ValueError, match=r"size must be at least 257, for every byte and <\|end\|>; got 256"):
        train_tokenizer(words, 256)


def test_a_piece_that_occurs_once_gets_no_token():
    tokenizer = train_tokenizer([*pieces_of(COMPACT), ":0.123456789"], 600)
    assert ":0.123456789" not in tokenizer.get_vocab() and ":0.5" in tokenizer.get_vocab()


def test_the_same_pieces_give_the_same_vocabulary_in_another_process():
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from tests.lindm.llm.test_train_tokenizer import SMALL\n"
        "print(SMALL.backend_tokenizer.to_str())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == SMALL.backend_tokenizer.to_str()


@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_a_saved_trained_tokenizer_is_loaded_unchanged(tmp_path, family):
    SMALL.save_pretrained(tmp_path)
    if family:
        (tmp_path / "config.json").write_text(f'{{"model_type": "{family}"}}')
    again = load_tokenizer(tmp_path)
    pieces = [*dict.fromkeys(pieces_of(COMPACT)), "Zürich", "<|end|>"]
    assert encode(again, pieces) == encode(SMALL, pieces)
    assert len(again) == len(SMALL) and again.eos_token_id == SMALL.eos_token_id
    if family != "qwen2":  # whose rules transformers puts in the place of those in the file
        anyone = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
        assert encode(anyone, pieces) == encode(SMALL, pieces)
