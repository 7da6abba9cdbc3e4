"""Tokenizers of GGUF files: byte-level BPE and SentencePiece."""

import json

import pytest
from transformers import AutoTokenizer

from lindm.llm.io import gguf
from tests.lindm.llm.io.test_gguf import BYTES, byte_level, converted, refused, write
from tests.lindm.llm.io.test_gguf import directories as directories  # fixtures of every test
from tests.lindm.llm.io.test_gguf import room_for_bytes as room_for_bytes


def spelled(directory, text, **options):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text, **options).input_ids
    return tokenizer.convert_ids_to_tokens(ids), tokenizer.decode(ids)


def test_byte_level_bpe_splits_digits(tmp_path):
    _, out = converted(tmp_path, "smollm")
    assert spelled(out, "hello world") == (["hello", "Ġw", "o", "r", "l", "d"], "hello world")
    assert spelled(out, "x  12") == (["x", "ĠĠ", "1", "2"], "x  12")
    assert spelled(out, "é\n")[0] == ["Ã", "©", "Ċ"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token) == (1, 2, None, None)
    assert tokenizer("<|im_start|>he").input_ids == [1, BYTES.index("he")]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>user\nhello<|im_end|>\n"
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)


@pytest.mark.parametrize(
    "pre, pieces, begins",
    [
        ("gpt-2", ["x", "Ġ", "Ġ", "12"], False),
        ("llama-bpe", ["x", "Ġ", "Ġ", "12"], True),
        ("qwen2", ["x", "Ġ", "Ġ", "1", "2"], False),
        ("tekken", ["x", "Ġ", "Ġ", "1", "2"], True),
    ],
)
def test_every_pre_tokenizer_splits_text_as_the_original(tmp_path, pre, pieces, begins):
    _, out = converted(tmp_path, "smollm", tokens=lambda w: byte_level(w, pre))
    first = ["<|im_start|>"] if begins else []
    assert spelled(out, "x  12")[0] == first + pieces
    assert spelled(out, "x  12", add_special_tokens=False) == (pieces, "x  12")


def test_add_bos_token_is_read_from_the_file(tmp_path):
    _, out = converted(tmp_path, "smollm", tokens=lambda w: byte_level(w, "llama-bpe", begins=False))
    assert spelled(out, "he")[0] == ["he"]
    (tmp_path / "x" / "out").mkdir()
    path = write(tmp_path / "x" / "m.gguf", "smollm", tokens=lambda w: byte_level(w, "smollm", begins=True))
    gguf.convert(path, tmp_path / "x" / "out")
    assert spelled(tmp_path / "x" / "out", "he")[0] == ["<|im_start|>", "he"]


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "c", "▁a", "ab", "bc", "▁ab", "abc"]
SCORES = [0.0] * 3 + [0.0] * 256 + [-90.0, -91.0, -92.0, -93.0, -3.0, -2.0, -1.0, -4.0, -5.0]


def sentence_piece(writer, **options):
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(PIECES)
    writer.add_token_scores(SCORES)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 9)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if options:
        writer.add_add_space_prefix(False)


def test_sentencepiece_merges_the_best_pair_first(tmp_path):
    """bc has a better score than ab, so abc is a + bc; a space goes in front; what is no piece is bytes."""
    _, out = converted(tmp_path, "smollm", tokens=sentence_piece)
    assert spelled(out, "abc", add_special_tokens=False) == (["▁a", "bc"], "abc")
    assert spelled(out, "ab ab")[0] == ["<s>", "▁ab", "▁ab"]
    assert spelled(out, "é", add_special_tokens=False) == (["▁", "<0xC3>", "<0xA9>"], "é")
    (tmp_path / "x" / "out").mkdir()
    gguf.convert(
        write(tmp_path / "x" / "m.gguf", "smollm", tokens=lambda w: sentence_piece(w, bare=True)), tmp_path / "x" / "out"
    )
    assert spelled(tmp_path / "x" / "out", "abc", add_special_tokens=False) == (["abc"], "abc")


@pytest.mark.parametrize(
    "tokens, message",
    [
        (lambda w: byte_level(w, "gpt-4o"), "tokenizer.ggml.pre must be one of gpt-2, smollm, .*; got 'gpt-4o'"),
        (lambda w: w.add_tokenizer_model("gpt2"), "tokenizer.ggml.tokens must be at most 300 different texts"),
        (
            lambda w: (w.add_tokenizer_model("bert"), w.add_token_list(["a"])),
            "tokenizer.ggml.model must be gpt2 or llama; got 'bert'",
        ),
        (
            lambda w: (w.add_tokenizer_model("gpt2"), w.add_token_list([f"{i}" for i in range(301)])),
            "must be at most 300 different texts",
        ),
        (lambda w: (w.add_tokenizer_model("gpt2"), w.add_token_list(["a", "a"])), "must be at most 300 different texts"),
        (
            lambda w: (w.add_tokenizer_model("llama"), w.add_token_list(["a"])),
            "tokenizer.ggml.scores must have one entry for each of 1",
        ),
    ],
)
def test_an_unknown_tokenizer_raises_an_error_that_names_the_key(tmp_path, tokens, message):
    refused(tmp_path, message, "smollm", tokens=tokens)


def test_merges_of_unknown_tokens_raise_an_error(tmp_path):
    def tokens(writer, merges=("a b",), eos=0):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b"])
        writer.add_token_merges(list(merges))
        writer.add_eos_token_id(eos)

    for i, merges in enumerate((["a b"], ["a c"], ["a"], ["a b b"])):
        (tmp_path / f"{i}").mkdir()
        message = f"tokenizer.ggml.merges must join tokens into tokens; got '{merges[0]}'"
        refused(tmp_path / f"{i}", message, "smollm", tokens=lambda w, merges=merges: tokens(w, merges))
    refused(
        tmp_path / "x",
        "tokenizer.ggml.eos_token_id must be the number of a token; got 9",
        "smollm",
        tokens=lambda w: tokens(w, (), 9),
    )
