"""Chat templates give the text that transformers gives, and a hostile one costs bounded time and memory and opens nothing."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lindm.errors import DataError, Preempted
from lindm.io import limits
from lindm.llm import chat_template
from lindm.llm.chat_template import apply_chat_template
from tests.lindm.llm.small import CHATML, INST, KINDS, TURNS, byte_level

PROGRAM = Path(chat_template.__file__).with_name("chat_renderer.py")
FEATURES = """
{%- set ns = namespace(count=0, self='s') %}
{%- macro show(m) %}{{ m.role | upper ~ ': ' ~ (m.content | trim) }}{% endmacro %}
{%- for m in messages if m.content is string %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- show(m) }}
    {%- if m.reasoning_content is defined %}[{{ m.reasoning_content }}|{{ m.thinking }}]{% endif %}
    {%- if m.name is defined %}{{ m.name }}{% endif %}
    {% generation %}{{ m | tojson(indent=2) }}{% endgeneration %}
    {{ {'b': 'é<', 'a': [1, 2.5, none]} | tojson }}{{ loop.index0 }}{{ dict(a=1) | length }}
    {%- if ns.count == 3 %}{% break %}{% endif %}
{%- endfor %}
{{ ns.count }} {{ eos_token }} {{ bos_token is defined }} {{ tools is none }}
{{ messages[::-1] | map(attribute='role') | join('.') }} {{ messages | selectattr('role', 'eq', 'user') | list | length }}
{{ '%s-%05d' | format('x', 3) }}{{ range(3) | list }}{{ 'a,b'.split(',')[-1] }}
{% if add_generation_prompt %}GO{% endif %}
"""
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": " hi <b> 😀", "name": None},
    {"role": "assistant", "content": "yes", "reasoning": "because"},
    {"role": "user", "content": "ho", "thinking": "none of it", "extra": {"a": [1, None]}},
    {"role": "assistant", "content": "never written"},
]
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "a long range": "{% for a in range(10**12) %}{% endfor %}",
    "product of a text": "{{ 'a' * 10**10 }}",
    "product of a list": "{{ ([0] * 10**10) | length }}",
    "output below the limit of memory": "{{ 'a' * 10**8 }}",
    "power": "{{ 7 ** (7 ** 9) }}",
    "doubling": "{% set x = namespace(a='a') %}{% for i in range(99) %}{% set x.a = x.a ~ x.a %}{% endfor %}",
    "shared lists": "{% set x = namespace(a=1) %}{% for i in range(20) %}{% set x.a = [x.a] * 9 %}{% endfor %}{{ x.a | tojson }}",
    "padding": "{{ 'a'.ljust(10**10) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "indent": "{{ 'a\nb' | indent(10**10) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "replace": "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep text": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep statements": "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
    "internals": "{{ ().__class__.__base__.__subclasses__() }}",
    "names of internals": "{{ namespace(_x=1) }}",
    "other files": "{% include '/etc/passwd' %}",
    "messages that change": "{{ messages.append(1) }}",
}


@pytest.fixture
def small_limits(monkeypatch):
    """Limits that a test reaches soon."""
    chat_template._RENDERER.close()
    monkeypatch.setattr(limits, "TEMPLATE_CPU_SECONDS", 0.3)
    monkeypatch.setattr(limits, "TEMPLATE_MEMORY", 400 * limits.MIB)
    yield
    chat_template._RENDERER.close()


@pytest.mark.parametrize("template", [CHATML, INST, FEATURES], ids=["chatml", "inst", "features"])
@pytest.mark.parametrize("prompt", [False, True])
def test_a_template_gives_the_text_of_transformers(template, prompt):
    tokenizer, messages = byte_level(template), TURNS if template == INST else MESSAGES
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert apply_chat_template(tokenizer, messages, prompt) == expected and len(expected) > 50


@pytest.mark.fault("F19", "F32")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_a_data_error_after_bounded_time_and_memory(name, small_limits):
    with pytest.raises(DataError, match=r"^the chat template (raises an error: |takes more than 0\.3 CPU-s|ends the process )"):
        apply_chat_template(byte_level(HOSTILE[name]), TURNS)
    assert apply_chat_template(KINDS["bytes"](), TURNS).startswith("<|im_start|>")  # the next one is rendered as ever


@pytest.mark.fault("F32")
def test_a_long_rendering_says_so(small_limits):
    with pytest.raises(DataError, match=r"^the chat template takes more than 0\.3 CPU-seconds for one conversation$"):
        apply_chat_template(byte_level(HOSTILE["nested loops"]), TURNS)


@pytest.mark.fault("F32")
def test_a_long_text_says_so(small_limits, monkeypatch):
    monkeypatch.setattr(limits, "TEMPLATE_OUTPUT", 100)
    with pytest.raises(DataError, match=r"raises an error: it writes 101 characters; at most 100$"):
        apply_chat_template(byte_level("{{ 'a' * 101 }}"), TURNS)


@pytest.mark.fault("F19")
@pytest.mark.parametrize(
    "attempt", ["open('/etc/hostname')", "import socket; socket.socket()", "import subprocess; subprocess.run(['true'])"]
)
def test_the_process_of_templates_opens_nothing(attempt):
    code = f"import socket, subprocess, sys; sys.path.insert(0, {str(PROGRAM.parent)!r})\nfrom chat_renderer import confine\n"
    code += f"confine({2 * limits.GIB})\ntry:\n    {attempt}\nexcept OSError as e:\n    print(e.strerror)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Too many open files\n"


@pytest.mark.fault("F27")
def test_a_stop_during_a_rendering_is_a_stop(monkeypatch):
    def stop(number, frame):
        raise Preempted("stopped")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)  # the rendering takes two CPU-seconds
        with pytest.raises(Preempted):
            apply_chat_template(byte_level(HOSTILE["nested loops"]), TURNS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert chat_template._RENDERER._process is None
    assert apply_chat_template(KINDS["bytes"](), TURNS).startswith("<|im_start|>")


def test_the_process_of_templates_ends_with_ours():
    code = "import os, sys; from lindm.llm import chat_template; chat_template._RENDERER.render('', {'messages': []});"
    code += "print(chat_template._RENDERER._process.pid, flush=True); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(600):
        if not _runs(pid):
            return
        signal.sigtimedwait([], 0.1)
    raise AssertionError(f"process {pid} still runs")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and ") Z " in status.read_text())


def test_a_template_is_compiled_once():
    """Compiling takes far longer than rendering, and a dataset has thousands of conversations."""
    tokenizer = byte_level("{% if false %}{{ 'x' | upper }}{% endif %}" * 500 + CHATML)

    def cpu_seconds(count: int) -> float:
        """Of a new process that renders so many conversations."""
        chat_template._RENDERER.close()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range(count):
            apply_chat_template(tokenizer, TURNS)
        chat_template._RENDERER.close()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert cpu_seconds(50) < 3 * cpu_seconds(1)
