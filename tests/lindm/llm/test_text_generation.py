"""Answers as text: prompts as in training, the settings of a directory, pieces as they come, and what is refused."""

import json
from dataclasses import replace

import jax.numpy as jnp
import pytest
from flax import nnx

import lindm as ld
from lindm.errors import DataError, UsageError
from lindm.io.files import write_json
from lindm.llm import text_generation
from lindm.llm.chats import Conversation, chat_examples, chat_prompt
from lindm.llm.generate import Sampling, generate
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm.llm.sft.options import RUN_FORMAT
from lindm.llm.sft.rows import row_examples, row_prompt
from lindm.llm.text_generation import load_generator
from lindm.llm.tokens import decode, load_tokenizer
from tests.lindm.llm.small import CHATML, KINDS, TURNS, byte_level
from tests.lindm.llm.tiny import TINY


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model with a byte-level tokenizer, a chat template, and 40 positions."""
    root = tmp_path_factory.mktemp("generation")
    tokenizer = byte_level()
    tokenizer.save_pretrained(str(root / "tokenizer"))
    config = replace(TINY, qkv_bias=False, vocab_size=len(tokenizer), max_position_embeddings=64)
    weights.save(Decoder(config, nnx.Rngs(1), jnp.float32), root / "model", like=root / "tokenizer")
    return root / "model"


def settings(directory, tmp_path, **values):
    """A copy of a model with this generation_config.json."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in directory.iterdir():
        if path.name != "manifest.json":
            (copy / path.name).write_bytes(path.read_bytes())
    (copy / "generation_config.json").write_text(json.dumps(values))
    return copy


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_the_tokens_that_it_had_in_training(kind):
    """Each answer of the conversation, and the completion of a prompt; and BOS is there once, if at all."""
    tokenizer = KINDS[kind]()
    (whole,) = chat_examples(tokenizer, Conversation(TURNS), "here")
    for end in (1, 3):
        prompt = chat_prompt(tokenizer, Conversation(TURNS[:end]), "here")
        assert prompt == whole.ids[: len(prompt)].tolist()
        assert whole.target[len(prompt) - 1] >= 0 and whole.target[len(prompt) - 2] < 0, "the answer begins here"
        assert chat_prompt(tokenizer, Conversation(TURNS[: end + 1]), "here") == prompt, "the answer itself is left out"
        written = "bos_token" in tokenizer.chat_template  # the tokenizer would put a second one in front
        assert prompt.count(tokenizer.bos_token_id) == written
    row = {"prompt": "The state is 3.", "completion": "A"}
    (example,) = row_examples(tokenizer, row, "here", 0)
    prompt = row_prompt(tokenizer, {"prompt": row["prompt"]}, "here")
    assert prompt == row_prompt(tokenizer, row, "here") == example.ids[: len(prompt)].tolist()
    assert example.target[len(prompt) - 1] >= 0 and (example.target[: len(prompt) - 1] < 0).all()
    assert tokenizer.bos_token_id is None or prompt.count(tokenizer.bos_token_id) == 1


ROWS = [
    {"messages": TURNS[:3]},
    {"messages": TURNS},
    {"prompt": TURNS[:3]},
    {"prompt": TURNS[:3], "completion": TURNS[3:]},
    {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TURNS]},
]


def test_every_format_of_a_row_gives_the_prompt_of_its_conversation():
    tokenizer = byte_level()
    expected = chat_prompt(tokenizer, Conversation(TURNS[:3]), "here")
    assert all(row_prompt(tokenizer, row, "here") == expected for row in ROWS)
    system = [{"role": "system", "content": "You help"}, *TURNS[:3]]
    for row in ROWS:
        assert row_prompt(tokenizer, row | {"system": "You help"}, "here") == chat_prompt(tokenizer, Conversation(system), "here")
    alpaca = row_prompt(tokenizer, {"instruction": "The state", "input": "is 3."}, "here")
    assert alpaca == chat_prompt(tokenizer, Conversation([{"role": "user", "content": "The state\n\nis 3."}]), "here")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "The state is 3."}, "here: a row of text has no prompt to answer"),
        ({"prompt": ""}, "here: the prompt has no tokens"),
        ({"question": "x"}, "here: a row must have the columns of one of"),
        ([1], "here: a row must be an object; got list"),
        ({"prompt": "x", "tools": [1]}, "here: tools is for conversations"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "does not render tool_calls of message 0"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "message 0 has the name of a control token"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "message 0 must not be of the assistant"),
    ],
)
def test_a_row_that_cannot_be_answered_is_refused(row, message):
    with pytest.raises(DataError, match=message):
        row_prompt(byte_level(), row, "here")


def test_answers_stream_as_they_are_given_and_do_not_depend_on_the_batch(directory):
    generator = load_generator(directory, max_tokens=12, temperature=1.0, seed=5)
    prompts = [generator.prompt(text) for text in ("The state is 3.", "x", [TURNS[0]], "#\n0 A:0.5\n", "é")]
    answers = generator.answer(prompts)
    assert generator.answer(prompts, batch=2) == answers
    assert ["".join(generator.stream(prompt, i)) for i, prompt in enumerate(prompts)] == [a.text for a in answers]
    assert {a.num_tokens for a in answers if a.finish_reason == "length"} == {12}
    assert ld.generate(directory, ["The state is 3."], max_tokens=12, temperature=1.0, seed=5) == [answers[0].text]
    assert generator.answer([prompts[1]]) != [answers[1]], "the key is that of the prompt's number"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_decoded_piece_by_piece_as_they_are_together_and_a_few_at_a_time(kind, monkeypatch):
    tokenizer, decoded = KINDS[kind](), []
    monkeypatch.setattr(text_generation, "decode", lambda t, ids: decoded.append(len(ids)) or decode(t, ids))
    text = "The state is 3.\n  The reward, 0.5:  you help. é 😀 你好" * 8
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(text_generation.decoded_pieces(tokenizer, ids))
    assert "".join(pieces) == decode(tokenizer, ids) and len(pieces) > len(ids) / 3
    assert sum(decoded) < 10 * len(ids) and max(decoded) < 10


def test_a_character_of_several_tokens_is_shown_when_its_last_byte_is_there():
    tokenizer = byte_level()
    ids = tokenizer("a😀é", add_special_tokens=False)["input_ids"]
    assert len(ids) > 5 and list(text_generation.decoded_pieces(tokenizer, ids)) == ["a", "😀", "é"]
    assert list(text_generation.decoded_pieces(tokenizer, ids[:3])) == ["a", decode(tokenizer, ids[:3])[1:]]


def test_an_answer_ends_at_an_end_of_generation_and_does_not_show_it(directory, tmp_path):
    plain = load_generator(directory, max_tokens=8)
    tokenizer = load_tokenizer(directory)
    assert plain.stops == (tokenizer.eos_token_id,)
    (prompt,) = [plain.prompt("x")]
    (answer,) = plain.answer([prompt])
    assert answer.finish_reason == "length"
    (ids,) = generate(plain.model, [prompt], 8)
    assert answer.text == tokenizer.decode(ids)
    copy = settings(directory, tmp_path, eos_token_id=[ids[3], 0], temperature=0.5, top_p=0.5)
    stopping = load_generator(copy, max_tokens=8)
    assert stopping.stops == (ids[3], 0)
    assert stopping.sampling == Sampling(), "settings of sampling apply where do_sample is true"
    (stopped,) = stopping.answer([prompt])
    assert stopped.finish_reason == "stop" and stopped.num_tokens == ids.index(ids[3]) + 1
    assert stopped.text == "".join(stopping.stream(prompt)) == tokenizer.decode(ids[: ids.index(ids[3])])


def test_settings_of_generation_come_from_the_directory_unless_they_are_given(directory, tmp_path):
    values = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1, "num_beams": 1}
    copy = settings(directory, tmp_path, **values)
    generator = load_generator(copy)
    assert generator.sampling == Sampling(0.6, 20, 0.95)
    assert generator.ignored == ("repetition_penalty 1.1",)
    assert load_generator(copy, temperature=0.0, top_k=0, top_p=1.0).sampling == Sampling()
    assert load_generator(directory).sampling == Sampling()
    for wrong in ({"top_p": 0.0}, {"top_k": 2.5}, {"temperature": -1.0}):
        (name,) = wrong
        with pytest.raises(UsageError, match=f"^{name} must be"):
            load_generator(directory, **wrong)
    (copy / "generation_config.json").write_text(json.dumps(values | {"top_p": "all"}))
    with pytest.raises(DataError, match=r"generation_config.json: top_p must be above 0"):
        load_generator(copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ["</s>"]}))
    with pytest.raises(DataError, match="eos_token_id must be the number of a token"):
        load_generator(copy)


def test_a_prompt_without_room_is_refused_with_its_source(directory):
    prompt = "0" * 60
    generator = load_generator(directory)
    assert generator.room(generator.prompt(prompt)) == 4, "what the 64 positions leave"
    with pytest.raises(DataError, match=r"row 1: a prompt and an answer of 5 must have at most the 64 tokens .* prompt has 60"):
        load_generator(directory, max_tokens=5).answer([[1], generator.prompt(prompt)], ["row 0", "row 1"])
    with pytest.raises(DataError, match=r"prompt 0: .* the prompt has 64"):
        ld.generate(directory, ["0" * 64])


def test_variables_of_the_chat_template_are_those_of_the_run_or_given(directory, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    template = CHATML + "{% if shout is defined %}{{ shout }}{% endif %}"
    tokenizer = byte_level(template)
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    weights.save(weights.load(directory), run / "model", like=tmp_path / "tokenizer")
    write_json(run / "config.json", {"options": {"chat_template_kwargs": '{"shout": "A"}'}}, format=RUN_FORMAT)
    plain = load_generator(run, chat_template_kwargs={}).prompt([TURNS[0]])
    own, other = (load_generator(run, chat_template_kwargs=k).prompt([TURNS[0]]) for k in (None, {"shout": "B"}))
    text = [str(tokenizer.decode(ids)) for ids in (plain, own, other)]
    assert text[1] == text[0] + "A" and text[2] == text[0] + "B"
