"""Examples of conversations: answers and end-of-turn tokens are trained; control tokens come from the template alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lindm.errors import DataError, LindmError
from lindm.llm.chats import apply_chat_template, chat_example
from lindm.llm.tokens import decode, format_example
from tests.lindm.llm.small import CHATML, KINDS, TURNS, byte_level, trained_texts


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


def test_a_template_may_render_the_last_answer_differently():
    """As Qwen3 does: only the last answer has a thinking block."""
    answer = "{{ '<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' }}"
    tokenizer = byte_level(CHATML.replace("+ m['content']", f"}}}}{answer}{{{{ m['content']"))
    assert "<think>" in apply_chat_template(tokenizer, TURNS[:2]) and apply_chat_template(tokenizer, TURNS).count("<think>") == 1
    example = chat_example(tokenizer, TURNS, "here")
    assert trained_texts(tokenizer, example) == ["A<|im_end|>", "<think>\n\n</think>\n\nB or C<|im_end|>"]


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
        ([turn("hi", "user"), {"role": "assistant"}], "message 1 must be an object with the strings role and content"),
        (
            [turn("hi", "user"), {"role": "assistant", "content": ["a"]}],
            "message 1 must be an object with the strings role and content",
        ),
        (["hi"], "message 0 must be an object with the strings role and content; got 'hi'"),
        ([], "messages must be a list of messages"),
        ("hi", "messages must be a list of messages"),
        ([turn("\ud800", "user"), turn("a")], "text must be encodable as UTF-8"),
    ],
)
def test_invalid_messages_raise_an_error_that_names_them(messages, why):
    with pytest.raises(LindmError, match=f"^rows.jsonl:7: {why}") as e:
        chat_example(KINDS["bytes"](), messages, "rows.jsonl:7")
    assert isinstance(e.value, DataError)


@pytest.mark.parametrize(
    "template, why",
    [
        (None, "the tokenizer has no chat template"),
        ("{{ raise_exception('no system, please') }}", "the chat template raises an error: no system, please"),
        (
            "{{ messages | length }}" + CHATML,
            "the chat template renders the prompt of message 1 differently from the conversation",
        ),
        (CHATML.replace("m['content']", "m['content'] | upper"), "the chat template does not render message 1 unchanged"),
        (
            "{% for m in messages %}{{ m['content'] + ('!' if loop.last and m['role'] == 'assistant' else '') }}{% endfor %}",
            "the chat template writes no control token after message 1, so its end is unknown",
        ),
        ("{{ ().__class__.__base__.__subclasses__() }}", "the chat template raises an error"),
    ],
)
def test_an_unsuitable_template_raises_an_error(template, why):
    messages = [turn("hi", "user"), turn("a b c"), turn("ho", "user"), turn("d")]
    with pytest.raises(LindmError, match=f"^row 1: {why}"):
        chat_example(byte_level(template), messages, "row 1")


def test_templates_get_a_fixed_date():
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}, {{ strftime_now('%Y-%m-%d') }}{% endif %}"
    tokenizer = byte_level(dated + CHATML)
    assert apply_chat_template(tokenizer, TURNS) == "26 Jul 2024, 2024-07-26" + apply_chat_template(KINDS["bytes"](), TURNS)


words = st.lists(st.sampled_from(["A", " B", "\n", "x", "\n\n", "0", " ", "The", "é"]), max_size=4).map("".join)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@given(contents=st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_any_conversation_keeps_its_text_and_its_prompts_are_those_of_the_template(kind, contents):
    tokenizer = KINDS[kind]()
    messages = [m for prompt, answers in contents for m in (turn(prompt, "user"), turn(answers))]
    example = chat_example(tokenizer, messages, "here")
    assert (example.target == tokenizer.eos_token_id).sum() == len(contents)
    if kind == "bytes":  # where a tokenizer writes no spaces of its own
        assert decode(tokenizer, example.ids.tolist()) == apply_chat_template(tokenizer, messages)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert example.ids[: len(prompt)].tolist() == prompt and (example.target[: len(prompt) - 1] == -1).all()
    answers = trained_texts(tokenizer, example)
    assert [text.strip().removesuffix(tokenizer.eos_token).strip() for text in answers] == [
        answer.strip() for _, answer in contents
    ]


def test_a_formatted_conversation_marks_its_answers():
    tokenizer = KINDS["bytes"]()
    shown = format_example(chat_example(tokenizer, TURNS, "row 1"), tokenizer)
    assert shown.startswith("row 1: ") and "assistant\n[[A<|im_end|>]]\n<|im_start|>user\n:0.5\n1<|im_end|>" in shown
