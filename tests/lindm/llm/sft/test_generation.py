"""On which tokens a generation of the exported model ends, and what a run says of its own answer."""

import json

import pytest

from lindm.llm.chats import Conversation, chat_examples
from lindm.llm.sft import trainer
from lindm.llm.sft.example_table import ListedExamples
from lindm.llm.sft.generation import describe_generation, write_chat_settings
from lindm.llm.sft.options import SFTConfig
from lindm.llm.tokens import completion_example, load_tokenizer
from tests.lindm.llm.small import CHATML, TURNS, byte_level
from tests.lindm.llm.tiny import decoder

OTHER_END = CHATML.replace("<|im_end|>", "<|endoftext|>")


def test_end_tokens_are_the_last_ones_of_the_trained_answers():
    tokenizer = byte_level()
    chats = chat_examples(tokenizer, Conversation(TURNS), "here")
    end, other = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert ListedExamples(chats).end_tokens() == (end,)
    others = chat_examples(byte_level(OTHER_END), Conversation(TURNS[:2]), "here")
    assert ListedExamples([*others, *chats]).end_tokens() == (end, other)
    assert ListedExamples([completion_example(tokenizer, "x", " A", "here")]).end_tokens() == (end,)


@pytest.mark.parametrize(
    "ends, config, generation, expected",
    [
        (["<|im_end|>"], "<|endoftext|>", None, ["<|im_end|>", "<|endoftext|>"]),  # a base model with a chat template
        (["<|im_end|>"], "<|endoftext|>", ["<|endoftext|>", "<|im_end|>"], ["<|endoftext|>", "<|im_end|>"]),  # it is there
        (["<|im_end|>"], None, None, "<|im_end|>"),
        (["\n"], "<|endoftext|>", None, None),  # no control token: nothing that could be named
    ],
)
def test_an_export_ends_on_what_was_trained_and_on_what_the_base_model_ends_on(tmp_path, ends, config, generation, expected):
    tokenizer = byte_level()

    def ids(names):
        return tokenizer.convert_tokens_to_ids(names) if isinstance(names, list) else tokenizer.encode(names)[0]

    (tmp_path / "config.json").write_text(
        json.dumps({"eos_token_id": None if config is None else ids(config), "pad_token_id": 0})
    )
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": ids(generation)}))
    write_chat_settings(tmp_path, tokenizer, [ids(end) for end in ends], None)
    if expected is None:
        assert not (tmp_path / "generation_config.json").exists()
        return
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["eos_token_id"] == ids(expected) and written.get("temperature") == (None if generation is None else 0.6)
    if generation is None:
        assert (
            json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == ids(expected) and written["pad_token_id"] == 0
        )


def test_the_sentence_about_an_answer_says_whether_it_stops():
    tokenizer, model = byte_level(), decoder()
    example = completion_example(tokenizer, "#", " A", "here")
    example.ids[:] %= 64
    says = describe_generation(model, tokenizer, example, [tokenizer.vocab["The"]])  # a token that this model does not have
    assert "it does not stop within 64 tokens: the trained ends are 'The'" in says
    says = describe_generation(model, tokenizer, example, range(64))
    assert says.endswith("; it stops after 1 tokens")


@pytest.mark.slow
def test_a_run_on_conversations_exports_a_model_that_stops(micro, tmp_path, capsys):
    """The end of turn of the template is not the end of the base model."""
    rows = [
        {"messages": [{"role": "user", "content": f"#\n{i % 3}"}, {"role": "assistant", "content": "AB"[i % 2]}]}
        for i in range(40)
    ]
    data, template = tmp_path / "rows.jsonl", tmp_path / "own.jinja"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(micro.model)
    end = next(t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special)
    turn = "{{ m['content'] + '\n' + (END if m['role'] == 'assistant' else '') }}"
    template.write_text(f"{{{{ mood }}}}{{% for m in messages %}}{turn.replace('END', repr(end))}{{% endfor %}}")
    options = SFTConfig(
        **{"model": micro.model, "data": data, "out": tmp_path / "out", "steps": 60, "batch": 8, "learning_rate": 3e-3},
        chat_template=template,
        chat_template_kwargs='{"mood": "#"}',
    )
    assert trainer.train(options) == tmp_path / "out" / "model"
    said = capsys.readouterr().err
    assert "answer    " in said and "it stops after" in said
    written = json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text())
    assert written["eos_token_id"] == tokenizer.convert_tokens_to_ids(end)
    assert load_tokenizer(tmp_path / "out" / "model").chat_template == template.read_text()
