"""Rows of files in the formats that people have, and what beside them must not be lost."""

import pytest

from lindm.errors import DataError
from lindm.llm.sft.rows import row_examples
from lindm.llm.tokens import decode, encode_whole
from tests.lindm.llm.small import CHATML, byte_level, trained_texts

TOKENIZER = byte_level()
SYSTEM, USER, ANSWER = "You maintain a machine.", "state worn", "inspect"
TURNS = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
WITH_SYSTEM = [{"role": "system", "content": SYSTEM}, *TURNS]


def examples(row, tokenizer=TOKENIZER, **options):
    return row_examples(tokenizer, row, "rows.jsonl:7", 3, **options)


def chat(messages) -> str:
    (example,) = examples({"messages": messages})
    return decode(TOKENIZER, example.ids.tolist())


@pytest.mark.parametrize(
    "row",
    [
        {"messages": WITH_SYSTEM, "prompt": USER, "prompt_id": "7f3a"},
        {"messages": TURNS, "system": SYSTEM},
        {"prompt": WITH_SYSTEM[:2], "completion": TURNS[1:], "id": 1, "source": None},
        {"prompt": TURNS[:1], "completion": TURNS[1:], "system": SYSTEM},
        {"conversations": [{"from": f, "value": v} for f, v in (("system", SYSTEM), ("human", USER), ("gpt", ANSWER))]},
        {"conversations": [{"from": "human", "value": USER}, {"from": "gpt", "value": ANSWER}], "system": SYSTEM},
        {"conversations": WITH_SYSTEM},
        {"instruction": USER, "output": ANSWER, "system": SYSTEM, "input": ""},
        {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in WITH_SYSTEM]},
    ],
)
def test_conversations_in_other_formats_are_those_of_messages(row):
    (example,) = examples(row)
    assert decode(TOKENIZER, example.ids.tolist()) == chat(WITH_SYSTEM) and (example.source, example.group) == ("rows.jsonl:7", 3)
    assert trained_texts(TOKENIZER, example) == [f"{ANSWER}<|im_end|>"]


def test_an_instruction_with_its_input_is_a_conversation_or_a_prompt():
    row = {"instruction": "Choose an action.", "input": USER, "output": ANSWER}
    (example,) = examples(row)
    assert decode(TOKENIZER, example.ids.tolist()) == chat(
        [{"role": "user", "content": f"Choose an action.\n\n{USER}"}, TURNS[1]]
    )
    plain = byte_level(template=None)
    (example,) = examples(row, plain)
    assert decode(plain, example.ids.tolist()) == f"Choose an action.\n\n{USER}\n\n{ANSWER}<|im_end|>"
    assert trained_texts(plain, example) == [f"{ANSWER}<|im_end|>"]


@pytest.mark.parametrize("bos", [None, "<|begin|>"])
def test_of_a_text_every_token_is_trained(bos):
    tokenizer = byte_level(bos=bos)
    (example,) = examples({"text": "#\n0 A:0.5"}, tokenizer)
    text = f"{bos or ''}#\n0 A:0.5<|im_end|>"
    assert decode(tokenizer, example.ids.tolist()) == text and example.target[:-1].tolist() == example.ids[1:].tolist()
    assert example.target[-1] == -1


def test_a_last_answer_that_is_rendered_differently_makes_several_examples_of_one_group():
    template = CHATML.replace("m['content']", "m['content'] + ('!' if loop.last and m['role'] == 'assistant' else '')")
    made = examples({"messages": [*TURNS, *TURNS]}, byte_level(template))
    assert [trained_texts(TOKENIZER, example) for example in made] == [["inspect!<|im_end|>"]] * 2
    assert [example.group for example in made] == [3, 3]


def test_variables_of_the_template_are_given_for_all_rows_or_for_one():
    tokenizer = byte_level("{{ mood }}" + CHATML)
    texts = [
        decode(tokenizer, examples(row, tokenizer, kwargs={"mood": "calm"})[0].ids.tolist())
        for row in ({"messages": TURNS}, {"messages": TURNS, "chat_template_kwargs": '{"mood": "glad"}'})
    ]
    assert [text[:4] for text in texts] == ["calm", "glad"]


@pytest.mark.fault("F13")
@pytest.mark.parametrize(
    "row, why",
    [
        ({"messages": WITH_SYSTEM, "system": "x"}, "the row has system, and its messages have one, too"),
        ({"messages": TURNS, "system": 3}, "system must be a text; got '3'"),
        ({"prompt": USER, "completion": ANSWER, "system": "x"}, "system is for conversations; put it into the text"),
        ({"text": USER, "tools": [{"name": "f"}]}, "tools is for conversations"),
        ({"messages": TURNS, "tools": "{"}, "tools must be JSON"),
        ({"messages": TURNS, "tools": {"name": "f"}}, "tools must be a list"),
        ({"messages": TURNS, "chat_template_kwargs": [1]}, "chat_template_kwargs must be an object"),
        ({"conversations": "hi"}, "conversations must be a list of messages; got 'hi'"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, 'message 0 of conversations must be an object with "from"'),
        ({"conversations": [{"from": "human", "value": 1}]}, 'message 0 of conversations must be an object with "from"'),
        ({"instruction": "", "output": "x"}, "instruction must be a text that is not empty"),
        ({"instruction": "x", "output": None}, "output must be a text that is not empty"),
        ({"instruction": "x", "output": "y", "input": 3}, "input must be a text"),
        ({"text": ""}, "text must be a text that is not empty"),
        ({"text": 3}, "text must be a text that is not empty; got '3'"),
        ({"text": "x", "messages": TURNS}, "a row must have the columns of one format; got those of {messages} and {text}"),
    ],
)
def test_a_bad_row_is_an_error_that_names_it(row, why):
    with pytest.raises(DataError) as e:
        examples(row)
    assert e.value.message.startswith(f"rows.jsonl:7: {why}")


def test_a_token_that_would_reach_over_the_start_of_an_answer_is_divided_there():
    """The whole text has one token for `The`; a model is given the prompt alone, and writes the rest."""
    prompt, completion = "#\nT", "he state is ż"
    (whole,) = encode_whole(TOKENIZER, [prompt + completion])
    (own,) = encode_whole(TOKENIZER, [prompt])
    assert whole[: len(own)] != own
    (example,) = examples({"prompt": prompt, "completion": completion})
    assert trained_texts(TOKENIZER, example) == [f"{completion}<|im_end|>"]
    assert example.ids[: len(own)].tolist() == own and (example.target[: len(own) - 1] == -1).all()
