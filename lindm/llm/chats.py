"""Conversations that train their answers.

A conversation is what the tokenizer's chat template makes of it. An answer begins where the template asks for one (the messages
so far and the generation prompt) and ends with its first control token; a newline that the template writes behind that is not
trained: a model that answers has stopped there. The control tokens are all the template's: a message with the name of one is
refused. A template that asks for today's date is told a fixed day, because data must not depend on a clock.
"""

import datetime
from collections.abc import Sequence
from typing import Any

from lindm.errors import DataError
from lindm.llm.tokens import Example, Tokenizer, example_of, facts_of, naming, short, tokens_of

DAY = datetime.datetime(2024, 7, 26)  # the one that Llama 3.1's template itself falls back to
# templates are given no functions, so the day is written by a macro of the same name
CLOCK = "".join(
    f" | replace('{code}', '{DAY.strftime(code)}')" for code in ("%d", "%b", "%B", "%m", "%Y", "%y", "%A", "%H", "%M")
)
CLOCK = f"{{% macro strftime_now(form) %}}{{{{ form{CLOCK} }}}}{{% endmacro %}}\n"


def chat_text(tokenizer: Tokenizer, messages: Sequence[dict], ask: bool = False) -> str:
    """What the chat template makes of messages, with `ask` up to where an answer begins. DataError where it refuses them."""
    try:
        template = tokenizer.get_chat_template()
        template = (CLOCK if "strftime_now" in template else "") + template
        return str(
            tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False, add_generation_prompt=ask)
        )
    except Exception as e:  # a template may raise anything
        if tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template") from e
        raise DataError(f"the chat template does not take it: {e}") from e


def chat_example(tokenizer: Tokenizer, messages: Sequence[dict], source: str, group: int = 0, since: int = 0) -> Example:
    """A conversation that trains the answers, from message number `since` on, with the token that ends each of them.

    DataError, naming the source: what is no message, the name of a control token in one, or a template that writes what is in
    front of an answer otherwise than it asked for it.
    """
    with naming(source):
        _check_messages(tokenizer, messages)
        whole = chat_text(tokenizer, messages)
        answers = [
            _answer(tokenizer, messages, i, whole) for i, m in enumerate(messages) if m["role"] == "assistant" and i >= since
        ]
        ids, trained, at = [], {}, 0
        for k, end in enumerate([*(place for answer in answers for place in answer), len(whole)]):
            upto = _extended(tokenizer, ids, whole, at, end)
            if k % 2:
                trained |= {place - 1: upto[place] for place in range(len(ids), len(upto))}
            ids, at = upto, end
    return example_of(ids, trained, source, group)


def _extended(tokenizer: Tokenizer, ids: list[int], text: str, at: int, end: int) -> list[int]:
    """The tokens of text[:end], of which those of text[:at] are given and stay.

    They are those of the whole text, unless one of those would reach over the place `at`: what a model is asked with ends there
    all the same, so there a token ends too. What is in front of a control token has no effect on what is behind it.
    """
    facts = facts_of(tokenizer)
    last = max((m.start() for m in facts.pattern.finditer(text, 0, at)), default=0)
    before = next((i for i in reversed(range(len(ids))) if ids[i] in facts.controls), 0)
    (part,) = tokens_of(tokenizer, [text[last:end]], controls=True)
    if part[: len(ids) - before] == ids[before:]:
        return ids[:before] + part
    (part,) = tokens_of(tokenizer, [facts.anchor + text[at:end]], controls=True)
    return ids + part[len(facts.front) :]


def _check_messages(tokenizer: Tokenizer, messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"messages must be a list of messages; got {short(str(messages))}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"message {i} must be an object with texts role and content; got {short(str(message))}")
        for key, text in message.items():
            if found := facts_of(tokenizer).pattern.search(str(text)):
                raise DataError(f"message {i} has the name of a control token in its {key}: {found[0]!r}")
    if messages[0]["role"] == "assistant":
        raise DataError("message 0 must not be an answer: nothing was asked")


def _answer(tokenizer: Tokenizer, messages: Sequence[dict], i: int, whole: str) -> tuple[int, int]:
    """Where the answer of message i starts and ends in the whole text, its end of turn included."""
    asked, told = chat_text(tokenizer, messages[:i], ask=True), whole
    if i < len(messages) - 1:
        told = chat_text(tokenizer, messages[: i + 1])
    if not whole.startswith(asked):
        raise DataError(f"the chat template asks for message {i} with another text than the conversation has in front of it")
    start, delimited = len(asked), whole.startswith(told)  # some templates write the last answer otherwise than those before
    end_of_turn = facts_of(tokenizer).pattern.search(whole, start, len(told) if delimited else len(whole))
    if end_of_turn is None and not delimited:
        raise DataError(f"the chat template writes no control token behind message {i}, so where it ends cannot be told")
    end = end_of_turn.end() if end_of_turn else len(told)
    if messages[i]["content"].strip() not in whole[start:end]:
        raise DataError(f"the chat template does not write message {i} as it is, in one piece and in front of its end of turn")
    return start, end
