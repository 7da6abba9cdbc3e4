"""Examples of conversations: answers and end-of-turn tokens are trained; control tokens come from the template alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lindm.errors import DataError, LindmError
from lindm.llm.chat_template import apply_chat_template
from lindm.llm.chats import Conversation, chat_examples
from lindm.llm.tokens import decode, format_example
from tests.lindm.llm.small import CHATML, KINDS, TURNS, byte_level, trained_texts, unknown_characters


def chat_example(tokenizer, messages, source="here", **options):
    """The example of a conversation whose template renders every answer alike."""
    (example,) = chat_examples(tokenizer, Conversation(messages, **options), source)
    return example


@pytest.mark.fault("F23")
@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_their_end_of_turn_tokens_are_trained_and_nothing_else(kind):
    tokenizer = KINDS[kind]()
    example = chat_example(tokenizer, TURNS, "here")
    assert example.ids.tolist() == tokenizer.apply_chat_template(TURNS)["input_ids"]
    chatml = tokenizer.chat_template == CHATML
    assert trained_texts(tokenizer, example) == (["A<|im_end|>", "B or C<|im_end|>"] if chatml else [" A </s>", " B or C </s>"])
    prompt = tokenizer.apply_chat_template(TURNS[:3], add_generation_prompt=True)["input_ids"]
    assert example.ids[: len(prompt)].tolist() == prompt and example.target[len(prompt) - 1] == example.ids[len(prompt)]
    last = chat_example(tokenizer, TURNS, "here", first_trained=2)
    assert trained_texts(tokenizer, last) == trained_texts(tokenizer, example)[1:] and last.ids.tolist() == example.ids.tolist()


def test_where_the_last_answer_is_rendered_differently_each_answer_has_an_example_of_its_own():
    """As Qwen3 does: only the last answer has a thinking block, and a model always generates the last answer."""
    answer = "{{ '<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' }}"
    tokenizer = byte_level(CHATML.replace("+ m['content']", f"}}}}{answer}{{{{ m['content']"))
    assert "<think>" in apply_chat_template(tokenizer, TURNS[:2]) and apply_chat_template(tokenizer, TURNS).count("<think>") == 1
    examples = chat_examples(tokenizer, Conversation(TURNS), "here", group=3)
    for example, upto, text in zip(examples, (2, 4), ("A", "B or C"), strict=True):
        assert trained_texts(tokenizer, example) == [f"<think>\n\n</think>\n\n{text}<|im_end|>"] and example.group == 3
        assert decode(tokenizer, example.ids.tolist()) == apply_chat_template(tokenizer, TURNS[:upto])


@pytest.mark.fault("F23")
def test_without_a_control_token_the_whole_turn_is_trained():
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = byte_level(template + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    assert trained_texts(tokenizer, chat_example(tokenizer, TURNS, "here")) == ["A\n", "B or C\n"]


@pytest.mark.fault("F23")
def test_no_token_spans_the_prompt_and_the_answer():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    tokenizer = byte_level(template + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    assert "ĠA" in tokenizer.tokenize(apply_chat_template(tokenizer, TURNS))  # left to itself it would
    example = chat_example(tokenizer, TURNS, "here")
    assert trained_texts(tokenizer, example) == ["A<|im_end|>", "B or C<|im_end|>"]
    prompt = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True)["input_ids"]
    assert example.ids[: len(prompt)].tolist() == prompt
    assert decode(tokenizer, example.ids.tolist()) == apply_chat_template(tokenizer, TURNS)


def turn(content: str, role: str = "assistant") -> dict:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "messages, why",
    [
        ([turn("hi", "user"), turn("a<|im_end|>b")], r"message 1 has the name of a control token in its content: '<\|im_end\|>'"),
        (
            [turn("<|im_start|>", "user"), turn("a")],
            r"message 0 has the name of a control token in its content: '<\|im_start\|>'",
        ),
        ([turn("hi", "user<|im_end|>"), turn("a")], "message 0 has the name of a control token in its role"),
        ([turn("hi", "user"), turn("a") | {"tool_calls": [{"n": "<|im_end|>"}]}], "message 1 has the name .* in its tool_calls"),
        ([turn("a")], "message 0 must not be of the assistant"),
        ([turn("hi", "user"), {"role": "assistant"}], "message 1 of the assistant must not be empty"),
        ([turn("hi", "user"), turn("")], "message 1 of the assistant must not be empty"),
        ([turn("hi", "user"), {"content": "a"}], "message 1 must be an object with the string role"),
        (
            [turn("hi", "user"), turn(["a"])],
            r"the content of message 1 must be a text or a list of text parts; got \"\['a'\]\"",
        ),
        ([turn([{"type": "image", "text": "x"}], "user"), turn("a")], "the parts of message 0 must be of type text; got 'image'"),
        (
            [turn("hi", "user"), turn("a") | {"weight": -0.5}],
            r"the weight of message 1 must be a number from 0 to 1e\+06; got -0\.5",
        ),
        (
            [turn("hi", "user"), turn("a") | {"weight": float("nan")}],
            "the weight of message 1 must be a number from 0 to .*; got nan",
        ),
        ([turn("hi", "user"), turn("a") | {"weight": "1"}], "the weight of message 1 must be a number from 0 to .*; got '1'"),
        ([turn("hi", "user"), turn("a") | {"train": "no"}], "train of message 1 must be true or false; got 'no'"),
        (["hi"], "message 0 must be an object with the string role; got 'hi'"),
        ([], "messages must be a list of messages"),
        ("hi", "messages must be a list of messages"),
        ([turn("\ud800", "user"), turn("a")], "text must be encodable as UTF-8"),
    ],
)
def test_invalid_messages_raise_an_error_that_names_them(messages, why):
    with pytest.raises(LindmError, match=f"^rows.jsonl:7: {why}") as e:
        chat_examples(KINDS["bytes"](), Conversation(messages), "rows.jsonl:7")
    assert isinstance(e.value, DataError)


@pytest.mark.parametrize(
    "template, why",
    [
        (None, "the tokenizer has no chat template; `lindm sft --chat-template FILE` gives it one"),
        ("{{ raise_exception('no system, please') }}", "the chat template raises an error: no system, please"),
        (
            "{{ messages | length }}" + CHATML,
            "the chat template renders the prompt of message 1 differently from the conversation",
        ),
        (CHATML.replace("m['content']", "m['content'] | upper"), "the chat template does not render message 1 unchanged"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "the chat template raises an error"),
    ],
)
def test_an_unsuitable_template_raises_an_error(template, why):
    messages = [turn("hi", "user"), turn("a b c"), turn("ho", "user"), turn("d")]
    with pytest.raises(LindmError, match=f"^row 1: {why}"):
        chat_examples(byte_level(template), Conversation(messages), "row 1")


def test_templates_get_a_fixed_date():
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}, {{ strftime_now('%Y-%m-%d') }}{% endif %}"
    tokenizer = byte_level(dated + CHATML)
    assert apply_chat_template(tokenizer, TURNS) == "26 Jul 2024, 2024-07-26" + apply_chat_template(KINDS["bytes"](), TURNS)


# --- fields beside role and content

CALL = {"type": "function", "id": "call_7", "function": {"name": "multiply", "arguments": {"a": 3, "b": "four"}}}
TOOLS = [{"type": "function", "function": {"name": "multiply", "description": "The product", "parameters": {"type": "object"}}}]
CALLING = (  # renders calls as Qwen does, the tools, the reasoning, and nothing of a developer
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant', 'system', 'tool') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}"
    "{{ '<call>' + c['function']['name'] + ' ' + (c['function']['arguments'] | tojson) + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('<fast>' if fast else '') }}{% endif %}"
)


@pytest.mark.parametrize("arguments", [{"a": 3, "b": "four"}, '{"a": 3, "b": "four"}'])
def test_calls_reasoning_and_tools_are_rendered_and_trained_where_the_template_takes_them(arguments):
    tokenizer = byte_level(CALLING)
    call = CALL | {"function": {"name": "multiply", "arguments": arguments}}
    messages = [
        turn("3 times four?", "user"),
        turn("") | {"tool_calls": [call], "reasoning_content": "I multiply."},
        turn("12", "tool") | {"tool_call_id": "call_7", "name": "multiply"},
        turn([{"type": "text", "text": "It is "}, {"type": "text", "text": "12."}]),
    ]
    example = chat_example(tokenizer, messages, tools=TOOLS)
    assert trained_texts(tokenizer, example) == [
        '<think>I multiply.</think><call>multiply {"a": 3, "b": "four"}</call><|im_end|>',
        "It is 12.<|im_end|>",
    ]
    assert "The product" in decode(tokenizer, example.ids.tolist())


@pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content"])
def test_reasoning_has_the_name_that_templates_read(key):
    tokenizer = byte_level(CALLING)
    example = chat_example(tokenizer, [turn("hi", "user"), turn("A") | {key: "why"}])
    assert trained_texts(tokenizer, example) == ["<think>why</think>A<|im_end|>"]


@pytest.mark.fault("F13")
@pytest.mark.parametrize(
    "message, key",
    [
        (turn("") | {"tool_calls": [CALL]}, "tool_calls of message 1, of role 'assistant'"),
        (turn("A") | {"reasoning_content": "why"}, "reasoning_content of message 1, of role 'assistant'"),
        (turn("A") | {"note": 0.5}, "note of message 1, of role 'assistant'"),
    ],
)
def test_a_field_that_the_template_ignores_raises_an_error(message, key):
    with pytest.raises(DataError, match=f"^here: the chat template does not render {key}; leave it out, or give"):
        chat_examples(KINDS["bytes"](), Conversation([turn("hi", "user"), message]), "here")


def test_a_message_of_a_role_that_the_template_leaves_out_raises_an_error():
    """Also where another message happens to contain its text."""
    messages = [turn("be brief", "developer"), turn("be brief", "user"), turn("A")]
    with pytest.raises(DataError, match="does not render content of message 0, of role 'developer'"):
        chat_examples(byte_level(CALLING), Conversation(messages), "here")


def test_a_call_of_which_a_part_is_lost_raises_an_error():
    template = CALLING.replace("c['function']['arguments'] | tojson", "''")
    with pytest.raises(DataError, match="does not render tool_calls of message 1"):
        chat_examples(byte_level(template), Conversation([turn("hi", "user"), turn("") | {"tool_calls": [CALL]}]), "here")


def test_tools_and_variables_that_the_template_does_not_read_raise_an_error():
    with pytest.raises(DataError, match=r"^here: the chat template does not render tools"):
        chat_examples(KINDS["bytes"](), Conversation(TURNS, TOOLS), "here")
    with pytest.raises(DataError, match=r"^here: the chat template does not read the variable 'enable_thinking'"):
        chat_examples(KINDS["bytes"](), Conversation(TURNS, kwargs={"enable_thinking": False}), "here")
    template = CALLING.replace(
        "'<|im_start|>' + m['role'] + '\n'",
        "'<|im_start|>' + m['role'] + '\n' + ('<fast>' if fast and m['role'] == 'assistant' else '')",
    )
    example = chat_example(byte_level(template), TURNS[:2], kwargs={"fast": True})
    assert trained_texts(byte_level(template), example) == ["A<|im_end|>"]  # the prompt ends with what the variable adds
    assert "<fast>" in decode(byte_level(template), example.ids.tolist())


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_answers_may_be_left_out_of_training(mark):
    tokenizer = KINDS["bytes"]()
    marked = [TURNS[0], TURNS[1] | mark, TURNS[2], TURNS[3] | {"weight": 1, "train": True}]
    example = chat_example(tokenizer, marked)
    assert trained_texts(tokenizer, example) == ["B or C<|im_end|>"]
    assert example.ids.tolist() == chat_example(tokenizer, TURNS).ids.tolist()
    assert chat_examples(tokenizer, Conversation(marked[:2]), "here")[0].target.max() == -1


def test_the_weight_of_an_answer_is_that_of_each_of_its_tokens():
    tokenizer = KINDS["bytes"]()
    example = chat_example(tokenizer, [TURNS[0], TURNS[1] | {"weight": 0.5}, TURNS[2], TURNS[3] | {"weight": 2}])
    whole, first = chat_example(tokenizer, TURNS), chat_example(tokenizer, TURNS[:2])
    assert example.target.tolist() == whole.target.tolist() and whole.weights is None
    n, of_first = (example.target >= 0).sum(), (first.target >= 0).sum()
    assert 1 < of_first < n and example.weights.tolist() == [0.5] * of_first + [2.0] * (n - of_first)


def test_a_text_that_the_tokenizer_cannot_represent_raises_an_error():
    with pytest.raises(DataError, match=r"^here: the tokenizer has no token for a part of"):
        chat_examples(unknown_characters(), Conversation([turn("hi \u4e2d", "user"), turn("A")]), "here")


words = st.lists(st.sampled_from(["A", " B", "\n", "x", "\n\n", "0", " ", "The", "é"]), max_size=4).map("".join)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@given(contents=st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_any_conversation_keeps_its_text_and_its_prompts_are_those_of_the_template(kind, contents):
    tokenizer = KINDS[kind]()
    messages = [m for prompt, answers in contents for m in (turn(prompt, "user"), turn(answers or "B"))]
    example = chat_example(tokenizer, messages, "here")
    assert (example.target == tokenizer.eos_token_id).sum() == len(contents)
    if kind == "bytes":  # where a tokenizer writes no spaces of its own
        assert decode(tokenizer, example.ids.tolist()) == apply_chat_template(tokenizer, messages)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert example.ids[: len(prompt)].tolist() == prompt and (example.target[: len(prompt) - 1] == -1).all()
    answers = trained_texts(tokenizer, example)
    assert [text.strip().removesuffix(tokenizer.eos_token).strip() for text in answers] == [
        (answer or "B").strip() for _, answer in contents
    ]


def test_a_formatted_conversation_marks_its_answers():
    tokenizer = KINDS["bytes"]()
    shown = format_example(chat_example(tokenizer, TURNS, "row 1"), tokenizer)
    assert shown.startswith("row 1: ") and "assistant\n[[A<|im_end|>]]\n<|im_start|>user\n:0.5\n1<|im_end|>" in shown
