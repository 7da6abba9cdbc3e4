"""Rows of a file as training examples, in the formats that people have.

    {"messages": [{"role", "content", ...}]}                  a conversation, as OpenAI and TRL have it
    {"conversations": [{"from", "value"}]}                    the same, as ShareGPT has it
    {"prompt", "completion"}                                  two texts, or two lists of messages
    {"instruction", "input", "output"}                        as Alpaca has it: a conversation where the tokenizer has a chat
                                                              template; otherwise a prompt of instruction and input
    {"text"}                                                  a document: every token is trained

Beside them a row may have `system` (a first message of that role), `tools` and `chat_template_kwargs` (for the chat template).
Other columns are ignored unless they hold what a model would read, such as images.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lindm.errors import DataError
from lindm.llm.chats import OTHER_ROLES, Conversation, chat_examples, chat_prompt
from lindm.llm.tokens import Example, Tokenizer, completion_example, prompt_tokens, shorten, text_example

Row = dict[str, Any]
UNSUPPORTED = ("documents", "images", "image", "audio", "audios", "videos")  # columns that other trainers read
CHAT_COLUMNS = ("system", "tools", "chat_template_kwargs")  # beside a conversation
# the columns that tell a format, in order: a row of messages may carry the first of them as its prompt, too
FORMATS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))
COLUMNS = (*(key for columns in FORMATS for key in columns), "input", *CHAT_COLUMNS, *UNSUPPORTED)  # that are read
ANSWER = "answer"  # stands where a row that is to be answered has none
SHAREGPT_ROLES = {
    **OTHER_ROLES,
    **{"user": "user", "assistant": "assistant", "system": "system", "tool": "tool", "observation": "tool"},
}


def row_examples(
    tokenizer: Tokenizer, row: Any, source: object, group: int, kwargs: Mapping[str, Any] | None = None
) -> list[Example]:
    """The examples of a row, a value of JSON: several where a chat template renders the last answer differently.

    Args:
      source: file and row, for errors; group: of the examples; kwargs: variables of the chat template for all rows.

    Raises: DataError, naming the source.
    """
    made = _read(tokenizer, row, source, kwargs or {})
    if isinstance(made, Conversation):
        return chat_examples(tokenizer, made, source, group)
    if isinstance(made, str):
        return [text_example(tokenizer, made, source, group)]
    return [completion_example(tokenizer, *made, source, group)]


def row_prompt(tokenizer: Tokenizer, row: Any, source: object, kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """The token ids after which a model answers a row. The row's own answer may be there, and is left out.

    Args:
      row: a JSON value; source, kwargs: as of `row_examples`.

    Raises: DataError, naming the source.
    """
    if isinstance(row, dict):
        if "prompt" in row and "messages" not in row and not row.get("completion"):
            answer = [{"role": "assistant", "content": ANSWER}] if isinstance(row["prompt"], list) else ANSWER
            row = row | {"completion": answer}
        elif "instruction" in row:
            row = row | {"output": row.get("output") or ANSWER}
    made = _read(tokenizer, row, source, kwargs or {})
    if isinstance(made, Conversation):
        return chat_prompt(tokenizer, made, source)
    if isinstance(made, str):
        raise DataError(f"{source}: a row of text has no prompt to answer; give messages or a prompt")
    if not (ids := prompt_tokens(tokenizer, made[0], source)):
        raise DataError(f"{source}: the prompt has no tokens")
    return ids


def _read(tokenizer: Tokenizer, row: Any, source: object, kwargs: Mapping[str, Any]) -> Conversation | tuple[str, str] | str:
    """The conversation, the prompt and completion, or the text of a row."""
    if not isinstance(row, dict):
        raise DataError(f"{source}: a row must be an object; got {type(row).__name__}")
    if unsupported := [key for key in UNSUPPORTED if row.get(key)]:
        raise DataError(f"{source}: {unsupported[0]} must be left out: it has no effect here")
    columns = _columns(row, source)
    try:
        made = READERS[columns](tokenizer, row)
    except DataError as e:
        raise DataError(f"{source}: {e.message}") from e
    if isinstance(made, Conversation):
        return _with_chat_columns(made, row, kwargs, source)
    if beside := [key for key in CHAT_COLUMNS if row.get(key)]:
        rule = "is for conversations; put it into the text, or give messages"
        raise DataError(f"{source}: {beside[0]} {rule}; the row has {' and '.join(columns)}")
    return made


def _columns(row: Row, source: object) -> tuple[str, ...]:
    """The columns of the one format that the row has."""
    found = [columns for columns in FORMATS if all(key in row for key in columns)]
    if not found:
        formats = ", ".join("{" + ", ".join(columns) + "}" for columns in FORMATS)
        raise DataError(f"{source}: a row must have the columns of one of {formats}; got {', '.join(map(repr, row)) or 'none'}")
    if len(found) > 1:
        both = " and ".join("{" + ", ".join(columns) + "}" for columns in found)
        raise DataError(f"{source}: a row must have the columns of one format; got those of {both}")
    return found[0]


def _messages(tokenizer: Tokenizer, row: Row) -> Conversation:
    return Conversation(row["messages"])


def _sharegpt(tokenizer: Tokenizer, row: Row) -> Conversation:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise DataError(f"conversations must be a list of messages; got {shorten(str(turns))}")
    messages = []
    for i, turn in enumerate(turns):
        if isinstance(turn, dict) and "role" in turn:  # some files have this name and the other keys
            messages.append(turn)
            continue
        if not isinstance(turn, dict) or turn.get("from") not in tuple(SHAREGPT_ROLES) or not isinstance(turn.get("value"), str):
            rule = f'must be an object with "from", one of {", ".join(SHAREGPT_ROLES)}, and the text "value"'
            raise DataError(f"message {i} of conversations {rule}; got {shorten(str(turn))}")
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} | rest)
    return Conversation(messages)


def _prompt_completion(tokenizer: Tokenizer, row: Row) -> Conversation | tuple[str, str]:
    prompt, completion = row["prompt"], row["completion"]
    if not prompt and not completion:
        raise DataError("prompt and completion must not both be empty")
    if isinstance(prompt, list) and isinstance(completion, list):
        return Conversation([*prompt, *completion], first_trained=len(prompt))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataError("prompt and completion must both be texts or both be lists of messages")
    return prompt, completion


def _alpaca(tokenizer: Tokenizer, row: Row) -> Conversation | tuple[str, str]:
    instruction, given, output = (row.get(key) or "" for key in ("instruction", "input", "output"))
    for key, value in (("instruction", instruction), ("input", given), ("output", output)):
        if not isinstance(value, str) or (key != "input" and not value):
            raise DataError(f"{key} must be a text that is not empty; got {shorten(str(value))}")
    prompt = "\n\n".join(filter(None, (instruction, given)))
    if tokenizer.chat_template is None:
        return f"{prompt}\n\n", output
    return Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": output}])


def _text(tokenizer: Tokenizer, row: Row) -> str:
    if not isinstance(row["text"], str) or not row["text"]:
        raise DataError(f"text must be a text that is not empty; got {shorten(str(row['text']))}")
    return row["text"]


READERS: dict[tuple[str, ...], Callable[[Tokenizer, Row], Conversation | tuple[str, str] | str]] = dict(
    zip(FORMATS, (_messages, _sharegpt, _prompt_completion, _alpaca, _text), strict=True)
)


def _with_chat_columns(conversation: Conversation, row: Row, kwargs: Mapping[str, Any], source: object) -> Conversation:
    """The conversation with the columns `system`, `tools` and `chat_template_kwargs` of its row."""
    messages, system = conversation.messages, row.get("system")
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return conversation  # `chat_examples` says what is wrong
    first = conversation.first_trained
    if system:
        if not isinstance(system, str):
            raise DataError(f"{source}: system must be a text; got {shorten(str(system))}")
        if any(isinstance(m, dict) and m.get("role") == "system" for m in messages):
            raise DataError(f"{source}: the row has system, and its messages have one, too")
        messages, first = [{"role": "system", "content": system}, *messages], first and first + 1
    tools, own = (
        _parsed(row.get("tools"), "tools", list, source),
        _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs", dict, source),
    )
    return Conversation(messages, tools or None, dict(kwargs) | (own or {}), first)


def _parsed(value: Any, name: str, kind: type, source: object) -> Any:
    """A column that is JSON, or its text: tables have one type for a column."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{source}: {name} must be JSON; got {shorten(str(value))}") from e
    if value and not isinstance(value, kind):
        raise DataError(f"{source}: {name} must be {'a list' if kind is list else 'an object'}; got {shorten(str(value))}")
    return value
