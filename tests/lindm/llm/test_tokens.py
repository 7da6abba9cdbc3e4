"""Encoding of pieces, examples of documents and completions, and loading of tokenizers."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lindm.errors import DataError, LindmError
from lindm.llm import tokens
from lindm.llm.tokens import (
    action_tokens,
    completion_example,
    decode,
    document_example,
    document_prefix,
    encode,
    format_example,
    load_tokenizer,
)
from lindm.llm.train_tokenizer import train_tokenizer
from lindm.text import COMPACT, READABLE, Document, Step, Template, action_spans, render, text
from tests.lindm.llm.small import KINDS, byte_level, trained_texts

WORDS = Template(
    name="words", step=("|", "{state}", "{action}", ":{reward}"), closing="\n", states="{}", actions=(" go", " good", " wait")
)


def a_document(seed: int, K: int = 3, H: int = 4, A: int = 3) -> tuple[Document, list[list[int]]]:
    """Random steps and labels, which half of the time are the actions taken."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(A, size=(K + 1, H))
    labels = np.where(rng.random((K + 1, H)) < 0.5, actions, rng.integers(A, size=(K + 1, H)))
    episodes = [
        tuple(Step(action=int(a), state=int(rng.integers(12)), reward=float(rng.integers(9)) / 4) for a in row) for row in actions
    ]
    return Document(tuple(episodes[:-1]), episodes[-1]), labels.tolist()


# --- pieces


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [COMPACT, READABLE, WORDS], ids=lambda t: t.name)
def test_the_tokens_of_a_document_decode_to_it(kind, template):
    tokenizer = KINDS[kind]()
    pieces = render(a_document(0)[0], template)
    ids = list(itertools.chain(*encode(tokenizer, [piece.text for piece in pieces])))
    assert decode(tokenizer, ids) == text(pieces)
    assert tokenizer.decode(document_prefix(tokenizer) + ids, skip_special_tokens=True) == text(pieces)


@pytest.mark.parametrize("kind", KINDS)
@given(pieces=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, max_size=5))
def test_any_text_in_any_pieces_is_decoded_unchanged(kind, pieces):
    tokenizer = KINDS[kind]()
    if kind in ("prepend", "metaspace"):
        pieces = [piece.replace("▁", "_") for piece in pieces]  # these tokenizers read this character as a space
    encoded = encode(tokenizer, pieces)
    assert decode(tokenizer, list(itertools.chain(*encoded))) == "".join(pieces)
    assert [encode(tokenizer, [piece])[0] for piece in reversed(pieces)][::-1] == encoded


@pytest.mark.fault("F19")
@pytest.mark.parametrize("kind", KINDS)
def test_names_of_control_tokens_in_a_text_are_text(kind):
    tokenizer = KINDS[kind]()
    for name in tokenizer.all_special_tokens:
        tokenizer(f"{name}x")  # as anything else may have used it before
        for piece in (name, f" x{name}", f"{name}\n"):
            (ids,) = encode(tokenizer, [piece])
            assert decode(tokenizer, ids) == piece and not set(ids) & set(tokenizer.all_special_ids)
            assert tokenizer.convert_tokens_to_ids(name) in tokenizer(piece)["input_ids"]  # left to itself it would be


def test_text_that_becomes_a_control_token_raises_an_error():
    words = ["</s>", "a", *"</s>x. \n"]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(dict.fromkeys(words))}, [], ignore_merges=True))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert [decode(tokenizer, ids) for ids in encode(tokenizer, ["</s", "x"])] == ["</s", "x"]
    with pytest.raises(LindmError, match="the tokenizer cannot represent '</s>': it becomes the control token '</s>'"):
        encode(tokenizer, ["</s>"])


def test_a_piece_that_cannot_be_represented_is_shown():
    lossy = byte_level(normalizer=normalizers.NFKC())
    assert encode(lossy, ["caf\u00e9"]) == encode(lossy, ["cafe\u0301"])  # one text, composed in two ways
    shown = (
        r"the tokenizer cannot represent 'x\ufb01': its tokens decode to 'xfi' \(character 2: U\+FB01 becomes U\+0066 U\+0069\)"
    )
    with pytest.raises(LindmError, match=shown) as e:
        encode(lossy, ["fine", "x\ufb01"])
    assert isinstance(e.value, DataError)
    with pytest.raises(LindmError, match="text must be encodable as UTF-8"):
        encode(KINDS["bytes"](), ["\ud800"])
    with pytest.raises(LindmError, match=r"the tokenizer cannot represent 'a▁b': its tokens decode to 'a b'"):
        encode(KINDS["prepend"](), ["a▁b"])


def test_a_word_level_tokenizer_raises_an_error():
    backend = Tokenizer(models.WordLevel({"x": 0, "a": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(LindmError, match="the tokenizer must represent texts piece by piece"):
        encode(PreTrainedTokenizerFast(tokenizer_object=backend), ["x"])


def test_every_distinct_piece_is_encoded_once(monkeypatch):
    tokenizer, encoded = byte_level(), []
    encode(tokenizer, ["x"])
    whole = tokens.encode_whole
    monkeypatch.setattr(tokens, "encode_whole", lambda t, texts, *args: encoded.extend(texts) or whole(t, texts, *args))
    first = encode(tokenizer, ["#", " A", "#", " A", "x"])
    first[0].append(0)  # the returned lists are copies
    assert encode(tokenizer, [" A", "#"]) == [first[1], first[2]] and encoded == ["#", " A"]


def test_the_document_prefix_of_every_kind_of_tokenizer():
    prefixes = {kind: KINDS[kind]().convert_ids_to_tokens(document_prefix(KINDS[kind]())) for kind in KINDS}
    space = ["<s>", "▁"]
    assert prefixes == {"bytes": [], "bytes with a beginning": ["<|begin|>"], "prepend": space, "metaspace": space}


# --- actions


def test_every_action_has_its_tokens():
    for kind in KINDS:
        tokenizer = KINDS[kind]()
        ids_of_actions = action_tokens(tokenizer, COMPACT, 26)
        assert [decode(tokenizer, ids) for ids in ids_of_actions] == [f" {c}" for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]


@given(names=st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=4, unique=True))
def test_an_action_that_is_a_prefix_of_another_raises_an_error(names):
    template = Template(name="t", step=("|", "{action}"), closing=";", actions=tuple(names))
    clash = any(a != b and b.startswith(a) for a in names for b in names)
    tokenizer = KINDS["bytes"]()  # of these letters every character is a token
    if not clash:
        assert len(action_tokens(tokenizer, template, len(names))) == len(names)
        return
    with pytest.raises(LindmError, match="the tokens of an action must not be a prefix of another's") as e:
        action_tokens(tokenizer, template, len(names))
    shown = [name for name in names if f"{name!r} is [" in e.value.message]
    assert isinstance(e.value, DataError) and any(a != b and b.startswith(a) for a in shown for b in shown)


# --- documents


@pytest.mark.fault("F23")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("supervise", ["all", "query"])
@pytest.mark.parametrize("template", [COMPACT, READABLE], ids=lambda t: t.name)
def test_trained_tokens_are_those_of_the_action_characters(kind, supervise, template):
    """Every token has its place in the text; one that begins where an action does is predicted, the label in its place."""
    tokenizer = KINDS[kind]()
    document, labels = a_document(3)
    pieces = render(document, template)
    example = document_example(tokenizer, pieces, labels, action_tokens(tokenizer, template, 3), supervise, "here")
    front = len(document_prefix(tokenizer))
    ends = np.cumsum([len(decode(tokenizer, [i])) for i in example.ids[front:].tolist()])
    assert ends[-1] == len(text(pieces))
    starts = [0, *ends[:-1].tolist()]
    expected = np.full(len(example.ids), -1)
    for start, end, episode, step in action_spans(pieces):
        if supervise == "all" or episode == 3:
            assert end in ends
            expected[front + starts.index(start) - 1] = tokenizer.convert_tokens_to_ids(
                encode_by_name(tokenizer, labels[episode][step])
            )
    np.testing.assert_array_equal(example.target, expected)
    assert (example.target >= 0).sum() == (16 if supervise == "all" else 4)
    assert example.ids.dtype == example.target.dtype == np.int32


def encode_by_name(tokenizer, label: int) -> str:
    """The one token that every one of these tokenizers has for an action."""
    space = "Ġ" if "ĠA" in tokenizer.get_vocab() else "▁"
    return f"{space}{'ABC'[label]}"


def test_a_label_of_several_tokens_is_trained_as_far_as_the_text_agrees():
    tokenizer = KINDS["bytes"]()
    names = (" A B", " A CD", "x")
    template = Template(name="t", step=("|", "{action}"), closing=";", actions=names)
    actions = action_tokens(tokenizer, template, 3)
    one, *rest = (tokenizer.convert_ids_to_tokens(list(ids)) for ids in actions)
    assert (one, *rest) == (["ĠA", "ĠB"], ["ĠA", "ĠC", "D"], ["x"])
    for taken, label, expected in [
        (0, 0, ["ĠA", "ĠB", None]),
        (0, 1, ["ĠA", "ĠC", None]),
        (1, 0, ["ĠA", "ĠB", None, None]),
        (1, 1, ["ĠA", "ĠC", "D", None]),
        (1, 2, ["x", None, None, None]),
        (2, 1, ["ĠA", None]),
    ]:
        pieces = render(Document((), (Step(action=taken),)), template)
        example = document_example(tokenizer, pieces, [[label]], actions, "all", "")
        assert [None if t < 0 else tokenizer.convert_ids_to_tokens(int(t)) for t in example.target] == expected


def test_supervise_must_be_known():
    with pytest.raises(ValueError, match="supervise must be one of all, query; got 'demos'"):
        document_example(KINDS["bytes"](), (), [[]], (), "demos", "")


def test_the_tokens_of_a_history_are_a_prefix_of_those_of_its_continuations():
    tokenizer = KINDS["prepend"]()
    document, labels = a_document(5)
    actions = action_tokens(tokenizer, COMPACT, 3)
    long = document_example(tokenizer, render(document, COMPACT), labels, actions, "all", "")
    for t in range(4):
        part = Document(document.demonstrations, (*document.query[:t], Step(action=None, state=document.query[t].state)))
        short = document_example(tokenizer, render(part, COMPACT), labels, actions, "all", "")
        np.testing.assert_array_equal(short.ids, long.ids[: len(short.ids)])


# --- prompts and completions


@pytest.mark.fault("F23")
@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_and_its_eos_token_are_trained_after_the_prompt(kind):
    tokenizer = KINDS[kind]()
    for prompt in ("The state is 3. The", "\n0", " x"):
        example = completion_example(tokenizer, prompt, " A</s><|im_end|>.", "here")
        prompt_ids = tokenizer(prompt)["input_ids"]
        assert example.ids[: len(prompt_ids)].tolist() == prompt_ids
        assert (example.target[: len(prompt_ids) - 1] == -1).all() and example.target[-1] == -1
        assert (example.target[len(prompt_ids) - 1 : -1] == example.ids[len(prompt_ids) :]).all()
        assert decode(tokenizer, example.ids[len(prompt_ids) :].tolist()) == f" A</s><|im_end|>.{tokenizer.eos_token}"
        assert (example.ids[len(prompt_ids) :] == tokenizer.eos_token_id).sum() == 1
    hostile = completion_example(tokenizer, "x</s><|im_end|>", "y", "here")
    assert tokenizer.eos_token_id not in hostile.ids[:-1]


def test_an_empty_prompt_needs_a_bos_token():
    example = completion_example(KINDS["bytes with a beginning"](), "", "x", "here")
    assert trained_texts(KINDS["bytes with a beginning"](), example) == ["x<|im_end|>"] and len(example.ids) == 3
    with pytest.raises(LindmError, match="here: no token precedes the first trained one"):
        completion_example(KINDS["bytes"](), "", "x", "here")
    assert trained_texts(KINDS["bytes"](), completion_example(KINDS["bytes"](), "x", "", "")) == ["<|im_end|>"]


def test_a_completion_needs_an_eos_token():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    with pytest.raises(LindmError, match="here: the tokenizer has no EOS token"):
        completion_example(tokenizer, "x", "y", "here")


# --- for a reader


def test_a_formatted_example_marks_the_trained_tokens():
    tokenizer = KINDS["bytes with a beginning"]()
    pieces = render(Document((), (Step(action=0, state=0, reward=0.5), Step(action=1, state=1))), COMPACT)
    example = document_example(tokenizer, pieces, [[0, 2]], action_tokens(tokenizer, COMPACT, 3), "all", "task 0")
    shown = f"task 0: {len(example.ids)} tokens, 2 of them trained\n<|begin|>#\n0[[ A]]:0.5\n1[[ C !=  B]]"
    assert format_example(example, tokenizer) == shown


def test_a_formatted_example_is_shortened_and_escaped():
    tokenizer = KINDS["bytes"]()
    example = completion_example(tokenizer, "\x1b[2J" + "x" * 5000, " A", "row 1")
    shown = format_example(example, tokenizer, width=100)
    assert "\\x1b[2J" in shown and "\x1b" not in shown and len(shown) < 250 and shown.endswith("[[ A<|im_end|>]]")
    assert "\n[... 4" in shown


# --- on disk


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [None, "llama", "mistral", "qwen2", "qwen3"])
def test_a_saved_tokenizer_is_loaded_unchanged(kind, family, tmp_path):
    tokenizer = KINDS[kind]()
    tokenizer.save_pretrained(tmp_path)
    if family:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    again = load_tokenizer(tmp_path)
    pieces = ["#", "\n3", " A", ":0.35", "</s>", "é"]
    assert encode(again, pieces) == encode(tokenizer, pieces) and document_prefix(again) == document_prefix(tokenizer)
    assert again.chat_template == tokenizer.chat_template


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(LindmError, match=f"there is no tokenizer in {tmp_path / 'nothing'}: it is not a directory") as e:
        load_tokenizer(tmp_path / "nothing")
    assert isinstance(e.value, DataError)
    with pytest.raises(LindmError, match=rf"there is no tokenizer in {tmp_path} that can be loaded: tokenizer\.json is missing$"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(LindmError, match=f"there is no tokenizer in {tmp_path}"):
        load_tokenizer(tmp_path)


@pytest.mark.fault("F19")
def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path):
    byte_level().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    try:
        load_tokenizer(tmp_path)
    except LindmError as e:
        assert isinstance(e, DataError) and str(tmp_path) in e.message
    assert not (tmp_path / "ran").exists()


def test_a_trained_tokenizer_encodes_documents_and_completions():
    pieces = render(a_document(1)[0], COMPACT)
    tokenizer = train_tokenizer([piece.text for piece in pieces] * 2, 400)
    assert document_prefix(tokenizer) == [] and encode(tokenizer, ["<|end|>"]) != [[tokenizer.eos_token_id]]
    assert trained_texts(tokenizer, completion_example(tokenizer, "#", " A", "")) == [" A<|end|>"]
