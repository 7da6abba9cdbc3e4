"""Training examples of conversations: the answers of the assistant are trained.

The tokenizer's chat template renders a conversation. The answer of message i is what the template writes between the generation
prompt of the messages before it and the end of the conversation that ends with it, through its last control token; a newline that
the template writes after that is not trained, because a model has stopped generating by then. Some templates render the last
answer differently from earlier ones (Qwen3 drops the reasoning of earlier answers). A model always generates the last one.
There each answer gets an example of its own, of the conversation up to it, so that all are trained as they will be generated.

Every non-empty field of a message must have an effect on the text: a field that the template ignores raises an error. Control
tokens come from the template alone: a message that contains the name of one raises an error.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lindm.errors import DataError
from lindm.llm.chat_template import apply_chat_template, chat_template
from lindm.llm.tokens import Example, Tokenizer, encode_whole, make_example, name_source, shorten, tokenizer_info

MAX_WEIGHT = 1e6  # of a message: sums of losses stay far from the limits of f32
TRAINING_KEYS = ("weight", "train")  # of a message: whether it is trained; no template reads them
# roles of the ShareGPT format, which most templates would write into the text as they are
OTHER_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
# fields that link a tool's answer to its call; their order says the same, so a template may leave them out
LINKS = {"tool": ("name", "tool_call_id"), "call": ("id", "type", "index")}
Render = Callable[..., str]
"""Messages, and `add_generation_prompt`, to text."""


@dataclass(frozen=True)
class Conversation:
    """Messages with what their chat template needs beside them."""

    messages: Sequence[dict[str, Any]]  # {"role", "content", ...}
    tools: Sequence[Any] | None = None  # descriptions of functions that the assistant may call
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # further variables of the template, such as enable_thinking
    first_trained: int = 0  # assistant messages before this one are not trained


class _Answer(NamedTuple):
    message: int
    text: str  # the conversation that ends with the answer
    start: int  # of the answer in the text
    end: int  # its control token included


def chat_examples(tokenizer: Tokenizer, conversation: Conversation, source: object, group: int = 0) -> list[Example]:
    """The examples of a conversation: one, or one for each answer where the template renders the last answer differently.

    Trained are assistant messages with their end-of-turn tokens, but for those before `first_trained` and those with
    `"weight": 0` or `"train": false`. Another `weight` is the factor of the loss at the tokens of that message.

    Raises: DataError, naming the source, for an invalid message, a field that the template ignores, the name of a control token
    in a message, or a template that renders a prompt differently from the conversation up to it.
    """
    with name_source(source):
        messages = _checked_messages(tokenizer, conversation)
        weights = [_weight(m, i) if i >= conversation.first_trained else 0.0 for i, m in enumerate(conversation.messages)]
        trained = [i for i, weight in enumerate(weights) if weight]
        render = _renderer(tokenizer, conversation)
        whole = render(messages)
        answers = [_answer(tokenizer, render, messages, i, whole) for i in trained]
        _check_variables(tokenizer, conversation, render, messages, whole)
        _check_fields(render, messages, whole, {answer.message: answer for answer in answers})
        if all(whole.startswith(answer.text[: answer.end]) for answer in answers):
            texts = [(whole, [(answer.start, answer.end, weights[answer.message]) for answer in answers])]
        else:
            texts = [(answer.text, [(answer.start, answer.end, weights[answer.message])]) for answer in answers]
        return [_example(tokenizer, text, spans, source, group) for text, spans in texts]


def chat_prompt(tokenizer: Tokenizer, conversation: Conversation, source: object) -> list[int]:
    """The token ids after which a model writes the next answer of a conversation.

    A last message of the assistant is left out, and with `first_trained` that message and all later ones: it is the answer.
    Raises: DataError, naming the source, for what raises one in `chat_examples`.
    """
    with name_source(source):
        messages = _checked_messages(tokenizer, conversation)
        messages = messages[: conversation.first_trained or len(messages) - (messages[-1]["role"] == "assistant")]
        render = _renderer(tokenizer, conversation)
        whole = render(messages)
        _check_variables(tokenizer, conversation, render, messages, whole)
        _check_fields(render, messages, whole, {})
        (ids,) = encode_whole(tokenizer, [render(messages, add_generation_prompt=True)], parse_control_tokens=True)
        return ids


def _renderer(tokenizer: Tokenizer, conversation: Conversation) -> Render:
    """Renders messages with the tools and variables of a conversation, unless others are given."""

    def render(messages: Sequence[dict], add_generation_prompt: bool = False, **changes: Any) -> str:
        options = {"tools": conversation.tools, "kwargs": conversation.kwargs} | changes
        return apply_chat_template(tokenizer, messages, add_generation_prompt, **options)

    return render


def _example(tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int, float]], source: object, group: int) -> Example:
    """The example of a text, of which the spans (start, end, weight) are trained."""
    ids, targets, factors, at = [], {}, {}, 0
    for start, end, weight in spans:
        ids = _extend_ids(tokenizer, ids, text, at, start)
        longer = _extend_ids(tokenizer, ids, text, start, end)
        places = range(len(ids) - 1, len(longer) - 1)
        targets |= {place: longer[place + 1] for place in places}
        factors |= dict.fromkeys(places, weight)
        ids, at = longer, end
    ids = _extend_ids(tokenizer, ids, text, at, len(text))
    if tokenizer.unk_token_id in ids and str(tokenizer.unk_token) not in text:
        raise DataError(f"the tokenizer has no token for a part of {shorten(text)}")
    return make_example(ids, targets, source, group, None if set(factors.values()) <= {1.0} else factors)


def _extend_ids(tokenizer: Tokenizer, ids: list[int], text: str, at: int, end: int) -> list[int]:
    """The token ids of text[:end], given those of text[:at], which are kept.

    They are those of the whole text unless one of its tokens would extend over `at`: a prompt ends there, so a token must end
    there too. Text before a control token does not affect the tokens after it.
    """
    info = tokenizer_info(tokenizer)
    last = max((m.start() for m in info.control_pattern.finditer(text, 0, at)), default=0)
    before = next((i for i in reversed(range(len(ids))) if ids[i] in info.control_tokens), 0)
    (part,) = encode_whole(tokenizer, [text[last:end]], parse_control_tokens=True)
    if part[: len(ids) - before] == ids[before:]:
        return ids[:before] + part
    (part,) = encode_whole(tokenizer, [info.anchor + text[at:end]], parse_control_tokens=True)
    return ids + part[len(info.anchor_ids) :]


def _answer(tokenizer: Tokenizer, render: Render, messages: Sequence[dict], i: int, whole: str) -> _Answer:
    """The answer of message i in the conversation that ends with it."""
    prompt = render(messages[:i], add_generation_prompt=True)
    text = whole if i == len(messages) - 1 else render(messages[: i + 1])
    if not text.startswith(prompt):
        raise DataError(f"the chat template renders the prompt of message {i} differently from the conversation up to it")
    start = len(prompt)
    controls = list(tokenizer_info(tokenizer).control_pattern.finditer(text, start))
    end = controls[-1].end() if controls and not text[controls[-1].end() :].strip() else len(text)
    if messages[i]["content"].strip() not in text[start:end]:
        raise DataError(f"the chat template does not render message {i} unchanged, in one piece before its end-of-turn token")
    return _Answer(i, text, start, end)


# --- messages ----------------------------------------------------------------------------------------------------------------


def _checked_messages(tokenizer: Tokenizer, conversation: Conversation) -> list[dict[str, Any]]:
    """The messages as templates expect them. Raises: DataError, with the number of the message."""
    messages: Any = conversation.messages
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"messages must be a list of messages; got {shorten(str(messages))}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"message {i} must be an object with the string role; got {shorten(str(message))}")
        for key, value in message.items():
            if match := tokenizer_info(tokenizer).control_pattern.search(str(value)):
                raise DataError(f"message {i} has the name of a control token in its {key}: {match[0]!r}")
        role = message["role"]
        if role in OTHER_ROLES and not re.search(rf"""['"]{role}['"]""", chat_template(tokenizer, bool(conversation.tools))):
            raise DataError(
                f"message {i} has the role {role!r}, which the chat template does not name; use {OTHER_ROLES[role]!r}"
            )
        if role != "assistant" and message.get("content") is None:
            raise DataError(f"message {i} of role {role!r} must have a content; got none")
    if messages[0]["role"] == "assistant":
        raise DataError("message 0 must not be of the assistant")
    cleaned = [_cleaned(message, i) for i, message in enumerate(messages)]
    for i, message in enumerate(cleaned):
        if message["role"] == "assistant" and not any(value for key, value in message.items() if key != "role"):
            raise DataError(f"message {i} of the assistant must not be empty")
    return cleaned


def _cleaned(message: dict[str, Any], i: int) -> dict[str, Any]:
    """The message as templates expect it: the content is a text, arguments of calls are objects, no key is about training."""
    message = {key: value for key, value in message.items() if key not in TRAINING_KEYS and value is not None}
    parts = message.get("content", "")
    if isinstance(parts, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        if other := [part for part in parts if part.get("type", "text") != "text"]:
            raise DataError(f"the parts of message {i} must be of type text; got {other[0]['type']!r}")
        parts = "".join(part["text"] for part in parts)
    if not isinstance(parts, str):
        raise DataError(f"the content of message {i} must be a text or a list of text parts; got {shorten(str(parts))}")
    message["content"] = parts
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_with_arguments(call) for call in calls]
    return message


def _with_arguments(call: Any) -> Any:
    """A call whose arguments are an object, which templates write as JSON; given as a text, they would be quoted once more."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def _weight(message: dict[str, Any], i: int) -> float:
    """The weight of a message in the loss, by its role and its own keys `weight` and `train`; 0: not trained."""
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and not (isinstance(weight, int | float) and 0 <= weight <= MAX_WEIGHT):
        raise DataError(f"the weight of message {i} must be a number from 0 to {MAX_WEIGHT:g}; got {weight!r}")
    if train not in (None, True, False):
        raise DataError(f"train of message {i} must be true or false; got {train!r}")
    return 0.0 if message["role"] != "assistant" or train is False else 1.0 if weight is None else float(np.float32(weight))


# --- what a template ignores -------------------------------------------------------------------------------------------------


def _check_variables(
    tokenizer: Tokenizer, conversation: Conversation, render: Render, messages: Sequence[dict], whole: str
) -> None:
    """Raise DataError where the template does not read the tools or one of the further variables."""
    template = chat_template(tokenizer, bool(conversation.tools))
    for name in conversation.kwargs:
        if name not in template:
            raise DataError(f"the chat template does not read the variable {name!r} of chat_template_kwargs")
    if conversation.tools and (not _changes(lambda: render(messages, tools=None), whole) or _missing(conversation.tools, whole)):
        raise DataError("the chat template does not render tools; give one that does, or leave them out")


def _check_fields(render: Render, messages: Sequence[dict], whole: str, answers: Mapping[int, _Answer]) -> None:
    """Raise DataError for a non-empty field of a message that has no effect on the text, or whose values are not in it.

    An answer is looked up where it is the last message: a template may shorten earlier ones, as it will for the trained model.
    """
    for i, message in enumerate(messages):
        links = LINKS["tool"] if message["role"] == "tool" else ()
        keys = [key for key, value in message.items() if value and key not in ("role", *links)]
        if i in answers:
            keys.remove("content") if "content" in keys else None  # `_answer` has found it
        rest = () if message["role"] == "assistant" else messages[i + 1 :]
        text = answers[i].text if i in answers else whole if rest or i == len(messages) - 1 else None
        for key in keys:
            if text is None:
                text = render(messages[: i + 1])
            other = message | {key: ""} if key == "content" else {k: v for k, v in message.items() if k != key}
            ignored = not _changes(lambda other=other, rest=rest, i=i: render([*messages[:i], other, *rest]), text)
            if ignored or (key != "content" and _missing(message[key], text)):
                rule = "leave it out, or give a chat template that renders it"
                raise DataError(f"the chat template does not render {key} of message {i}, of role {message['role']!r}; {rule}")


def _changes(render: Callable[[], str], text: str) -> bool:
    """Whether a rendering differs from `text`. A template that refuses the change reads what was changed."""
    try:
        return render() != text
    except DataError:
        return True


def _missing(value: Any, text: str) -> list[Any]:
    """The texts and numbers within a value that the text does not contain, plain or as JSON."""
    return [leaf for leaf in _leaves(value) if not any(form in text for form in _forms(leaf))]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in LINKS["call"]:
                yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif value not in (None, ""):
        yield value


def _forms(leaf: Any) -> tuple[str, ...]:
    """How a template may write a text or a number."""
    if isinstance(leaf, str):
        return leaf.strip(), json.dumps(leaf)[1:-1], json.dumps(leaf, ensure_ascii=False)[1:-1]
    return str(leaf), json.dumps(leaf)
