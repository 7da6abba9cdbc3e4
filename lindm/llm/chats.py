"""Training examples of conversations: the answers of the assistant are trained.

The tokenizer's chat template renders a conversation. An answer starts after the generation prompt and ends with its first
control token; a newline that the template writes after that is not trained, because a model has stopped generating by then.
Control tokens come from the template alone: a message that contains the name of one raises an error. A template is the program of
whoever made the model: it runs in a process of its own with limits (`chat_renderer.py`).
"""

import atexit
import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lindm.errors import DataError, LindmError
from lindm.io import limits
from lindm.io.signals import deferred
from lindm.llm.tokens import Example, Tokenizer, encode_whole, make_example, name_source, shorten, tokenizer_info


def apply_chat_template(tokenizer: Tokenizer, messages: Sequence[dict], add_generation_prompt: bool = False) -> str:
    """The conversation as text. Raises: DataError if there is no chat template, or if it raises an error or exceeds the limits of
    `lindm.io.limits` on time, memory and the length of the text.
    """
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template")
    try:
        template = tokenizer.get_chat_template()
    except ValueError as e:  # several templates, none of them the default
        raise DataError(f"the tokenizer has no single chat template: {e}") from e
    variables = tokenizer.special_tokens_map | {"tools": None, "documents": None}
    return _RENDERER.render(template, variables | {"messages": messages, "add_generation_prompt": add_generation_prompt})


class _Renderer:
    """The process of `lindm.llm.chat_renderer`: started for the first template, and again after one that ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, template: Any, variables: dict[str, Any]) -> str:
        try:
            request = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as e:
            raise DataError(f"messages must be JSON: {e}") from e
        with self._lock:
            line = self._ask(request)
        reply = json.loads(line)
        if "error" in reply:
            raise DataError(f"the chat template raises an error: {reply['error']}")
        return reply["text"]

    def _ask(self, request: bytes) -> bytes:
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            if line := process.stdout.readline():
                return line
            died = process.wait()
        except BrokenPipeError:
            died = process.wait()
        except BaseException:  # a signal between a request and its answer: the next request gets a new process
            process.kill()
            self.close()
            raise
        self.close()
        if died == -signal.SIGPROF:
            raise DataError(f"the chat template takes more than {limits.TEMPLATE_CPU_SECONDS:g} CPU-seconds for one conversation")
        if died < 0:
            raise DataError(f"the chat template ends the process that renders it with {signal.Signals(-died).name}")
        raise LindmError(f"the process that renders chat templates ended with exit code {died}")

    def _start(self) -> "subprocess.Popen[bytes]":
        program = Path(__file__).with_name("chat_renderer.py")
        bounds = (limits.TEMPLATE_CPU_SECONDS, limits.TEMPLATE_MEMORY, limits.TEMPLATE_OUTPUT)
        command = [sys.executable, "-I", "-S", str(program), json.dumps(sys.path), *map(str, bounds)]
        with deferred():  # Ctrl-C goes to both processes, and this one may have work to save
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None and process.stdout is not None:
            with contextlib.suppress(BrokenPipeError):  # a request that it did not read
                process.stdin.close()
            process.stdout.close()
            process.wait()


_RENDERER = _Renderer()
atexit.register(_RENDERER.close)


def chat_example(tokenizer: Tokenizer, messages: Sequence[dict], source: str, group: int = 0, first_trained: int = 0) -> Example:
    """The example of a conversation; trains assistant messages from number `first_trained` on with their end-of-turn tokens.

    Raises: DataError, naming the source, for an invalid message, the name of a control token in a message, or a template that
    renders a prompt differently from the conversation up to it.
    """
    with name_source(source):
        _check_messages(tokenizer, messages)
        whole = apply_chat_template(tokenizer, messages)
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first_trained]
        spans = [_answer_span(tokenizer, messages, i, whole) for i in numbers]
        ids, targets, at = [], {}, 0
        for k, end in enumerate([*(place for span in spans for place in span), len(whole)]):
            longer = _extend_ids(tokenizer, ids, whole, at, end)
            if k % 2:  # an answer; prompts and answers alternate
                targets |= {place - 1: longer[place] for place in range(len(ids), len(longer))}
            ids, at = longer, end
    return make_example(ids, targets, source, group)


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


def _check_messages(tokenizer: Tokenizer, messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"messages must be a list of messages; got {shorten(str(messages))}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"message {i} must be an object with the strings role and content; got {shorten(str(message))}")
        for key, text in message.items():
            if match := tokenizer_info(tokenizer).control_pattern.search(str(text)):
                raise DataError(f"message {i} has the name of a control token in its {key}: {match[0]!r}")
    if messages[0]["role"] == "assistant":
        raise DataError("message 0 must not be of the assistant")


def _answer_span(tokenizer: Tokenizer, messages: Sequence[dict], i: int, whole: str) -> tuple[int, int]:
    """Start and end of the answer of message i in the whole text, end-of-turn token included."""
    prompt, through = apply_chat_template(tokenizer, messages[:i], add_generation_prompt=True), whole
    if i < len(messages) - 1:
        through = apply_chat_template(tokenizer, messages[: i + 1])
    if not whole.startswith(prompt):
        raise DataError(f"the chat template renders the prompt of message {i} differently from the conversation up to it")
    start = len(prompt)
    delimited = whole.startswith(through)  # some templates render the last answer differently from earlier ones
    end_of_turn = tokenizer_info(tokenizer).control_pattern.search(whole, start, len(through) if delimited else len(whole))
    if end_of_turn is None and not delimited:
        raise DataError(f"the chat template writes no control token after message {i}, so its end is unknown")
    end = end_of_turn.end() if end_of_turn else len(through)
    if messages[i]["content"].strip() not in whole[start:end]:
        raise DataError(f"the chat template does not render message {i} unchanged, in one piece before its end-of-turn token")
    return start, end
