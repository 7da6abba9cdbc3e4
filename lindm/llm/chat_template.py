"""Conversations as text, by the chat template of a tokenizer.

A template is the program of whoever made the model: it runs in a process of its own with limits (`chat_renderer.py`).
"""

import atexit
import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lindm.errors import DataError, LindmError
from lindm.io import limits
from lindm.io.signals import deferred
from lindm.llm.tokens import Tokenizer


def chat_template(tokenizer: Tokenizer, tools: bool = False) -> str:
    """The source of the chat template; of several, that for conversations with `tools`, or the default one. Raises: DataError."""
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template; `lindm sft --chat-template FILE` gives it one")
    try:
        return tokenizer.get_chat_template(tools=[{}] if tools else None)
    except ValueError as e:  # several templates, none of them the default
        raise DataError(f"the tokenizer has no single chat template: {e}") from e


def apply_chat_template(
    tokenizer: Tokenizer,
    messages: Sequence[dict],
    add_generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as text.

    Args:
      messages: {"role", "content", ...}; add_generation_prompt: end with what opens an answer.
      tools: descriptions of functions, for the variable `tools` of the template.
      kwargs: further variables of the template, such as enable_thinking.

    Raises:
      DataError: there is no chat template, it raises an error, or it exceeds the limits of `lindm.io.limits` on time, memory and
        the length of the text.
    """
    variables = tokenizer.special_tokens_map | {"documents": None} | dict(kwargs or {}) | {"tools": tools}
    variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
    return _RENDERER.render(chat_template(tokenizer, bool(tools)), variables)


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
