"""`lindm generate`, without the process around it."""

import io
import json
from dataclasses import replace

import jax.numpy as jnp
import pytest
from flax import nnx

from lindm.cli.generate import Generate, run
from lindm.errors import DataError, StorageError, UsageError
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm.llm.text_generation import TextGenerator, load_generator
from tests.lindm.llm.small import byte_level
from tests.lindm.llm.tiny import TINY

QUESTION = [{"role": "user", "content": "The state is 3."}]


def model(directory, template=True):
    tokenizer = byte_level() if template else byte_level(None)
    tokenizer.save_pretrained(str(directory / "tokenizer"))
    config = replace(TINY, qkv_bias=False, vocab_size=len(tokenizer), max_position_embeddings=128)
    weights.save(Decoder(config, nnx.Rngs(1), jnp.float32), directory / "model", like=directory / "tokenizer")
    return directory / "model"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return model(tmp_path_factory.mktemp("generate"))


def expected(directory, prompts, **settings):
    generator = load_generator(directory, **settings)
    return [answer.text for answer in generator.answer([generator.prompt(prompt) for prompt in prompts])]


def test_a_prompt_is_continued(directory, capsys):
    run(Generate(directory=directory, prompt="0 A", max_tokens=6))
    assert capsys.readouterr().out == expected(directory, ["0 A"], max_tokens=6)[0] + "\n"


def test_each_line_of_the_input_is_a_message_of_a_chat(directory, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("The state is 3.\n\n  The reward?  \n"))
    run(Generate(directory=directory, system="You help", max_tokens=6))
    start = [{"role": "system", "content": "You help"}, *QUESTION]
    (first,) = expected(directory, [start], max_tokens=6)
    second = [*start, {"role": "assistant", "content": first}, {"role": "user", "content": "The reward?"}]
    assert capsys.readouterr().out == first + "\n" + expected(directory, [second], max_tokens=6)[0] + "\n"


def test_a_message_that_cannot_be_answered_is_named_and_the_chat_goes_on(directory, capsys, monkeypatch):
    """A control token, a message with no room, an answer that is empty, and one that holds a control token."""
    answers = iter(["first", "", "<|im_end|>", "last"])
    monkeypatch.setattr(TextGenerator, "stream", lambda self, prompt, number: self.room(prompt) and iter([next(answers)]))
    asked, prompt = [], TextGenerator.prompt
    monkeypatch.setattr(TextGenerator, "prompt", lambda self, m, source: asked.append((source, m)) or prompt(self, m, source))
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n<|im_end|>\n" + "0" * 130 + "\nb\nc\nd\n"))
    assert run(Generate(directory=directory)) == 0
    said = capsys.readouterr()
    assert said.out.split() == ["first", "<|im_end|>", "last"]
    errors = said.err.splitlines()
    assert [line.rpartition("without ")[2] for line in errors] == [f"message {n}" for n in (2, 3, 4, 5)]
    for line, rule in zip(
        errors, ("name of a control token", "the 128 tokens of the model", "not be empty", "control"), strict=True
    ):
        assert line.startswith("lindm: ") and rule in line
    contents = [message["content"] for message in dict(asked)["message 6"]]
    assert contents == ["a", "first", "d"]
    with pytest.raises(DataError, match="--system: message 0 has the name of a control token"):
        run(Generate(directory=directory, system="<|im_end|>"))


def test_rows_are_written_with_their_answers(directory, tmp_path, capsys):
    rows = [{"messages": QUESTION, "id": 7}, {"prompt": "0 é", "completion": "B"}]
    data, out = tmp_path / "rows.jsonl", tmp_path / "new" / "answers.jsonl"
    data.write_text("\n\n".join(json.dumps(row) for row in rows))
    options = Generate(directory=directory, data=data, out=out, max_tokens=6, temperature=1.0, batch=1)
    run(options)
    answers = expected(directory, [QUESTION, "0 é"], max_tokens=6, temperature=1.0)
    written = out.read_text(encoding="utf-8")
    assert [json.loads(line) for line in written.splitlines()] == [
        row | {"answer": answer, "finish_reason": "length"} for row, answer in zip(rows, answers, strict=True)
    ]
    assert "é" in written and "2 answers, 12 tokens" in capsys.readouterr().out
    out.write_text("old")
    run(options)
    assert out.read_text(encoding="utf-8") == written


@pytest.mark.parametrize(
    "lines, message",
    [
        ("", "rows.jsonl has no rows"),
        ('{"prompt": "a"}\n{"prompt": ', "rows.jsonl:2: not JSON"),
        ('{"prompt": "a"}\n\n{"text": "b"}', "rows.jsonl:3: a row of text has no prompt"),
        ('{"prompt": "a", "answer": "b"}', "rows.jsonl:1: the row has the column answer, which the answer would replace"),
        (
            '{"prompt": "' + "0" * 125 + '"}',
            "rows.jsonl:1: a prompt and an answer of 6 .* the 128 tokens of the model; the prompt has",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_and_nothing_is_written(directory, tmp_path, lines, message):
    (tmp_path / "rows.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        run(Generate(directory=directory, data=tmp_path / "rows.jsonl", out=tmp_path / "out.jsonl", max_tokens=6))
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_that_cannot_be_written_is_an_error_before_the_model_is_loaded(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        run(Generate(directory=tmp_path / "no model", data=tmp_path / "rows.jsonl", out=tmp_path / "file" / "out.jsonl"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "x.jsonl"}, "--data and --out must be given together"),
        ({"out": "x.jsonl"}, "--data and --out must be given together"),
        ({"data": "x.jsonl", "out": "y.jsonl", "prompt": "x"}, "--prompt must be left out with --data"),
        ({"data": "x.jsonl", "out": "y.csv"}, r"--out must be a \.jsonl file; got .*y\.csv"),
        ({"data": "x.jsonl", "out": "x.jsonl"}, "--out must not be --data"),
        ({"data": ".", "out": "y.jsonl"}, "--out must not be --data, or a file in its directory"),
        ({"prompt": "x", "system": "y"}, "--system is for a chat"),
        ({"prompt": "x", "batch": 0}, "batch must be a whole number of at least 1"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
        ({"prompt": "x", "chat_template_kwargs": "[1]"}, "--chat-template-kwargs must be a JSON object"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(directory, tmp_path, options, message):
    paths = {name: tmp_path / value for name, value in options.items() if name in ("data", "out")}
    with pytest.raises(ValueError, match=message):
        run(Generate(directory=directory, **(options | paths)))


def test_a_chat_needs_a_chat_template(tmp_path):
    with pytest.raises(UsageError, match="a chat needs a model with a chat template; give --prompt"):
        run(Generate(directory=model(tmp_path, template=False)))
