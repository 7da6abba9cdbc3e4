"""The process that renders chat templates: one JSON object a line in, one a line out. It is run by its path, without lindm.

A chat template is a program that comes with a model, in the language of Jinja: it has loops, arithmetic and string formatting.
Jinja's sandbox keeps it from Python's internals, but bounds neither time nor memory, and a loop inside a filter cannot be
interrupted in Python. So templates run in this process. The operating system ends a rendering that takes too long (SIGPROF), and
once the imports are done, no file, socket or process can be opened, even by a template that escapes from the sandbox.

Filters, functions and whitespace rules are those of transformers, so that a template gives the same text.

    in    {"template", "variables": {"messages", ...}}
    out   {"text"}, or {"error"}: an exception of the template
"""

import codecs
import datetime
import functools
import json
import sys

if __name__ == "__main__":  # options of the interpreter leave its path empty; this is that of the process that asks
    sys.path[:] = json.loads(sys.argv[1])

import resource
import signal
from typing import Any

import jinja2.debug
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

DATE = datetime.datetime(2024, 7, 26)  # for templates that ask for today's date, because data must not depend on the clock
ENCODINGS = ("ascii", "unicode_escape", "utf-8")  # that Jinja uses
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a message; the first is what templates read


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks answers in some templates, and writes its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """Variables that outlive a loop; no name begins with an underscore, as those of Python's internals do."""

    def __init__(*arguments: Any, **values: Any) -> None:  # pyright: ignore  (`self` may be the name of a variable)
        self, *given = arguments
        values = dict(*given, **values)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a variable of a namespace must not begin with an underscore; got {name!r}")


def _dict(*arguments: Any, **values: Any) -> dict:
    """A function in place of the type, whose attributes lead to other types."""
    return dict(*arguments, **values)


def _raise(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> jinja2.Environment:
    """The environment of every template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": DATE.strftime, "dict": _dict, "namespace": Namespace}
    del environment.globals["lipsum"], environment.filters["random"]  # data must not depend on chance
    return environment


def normalize(message: dict[str, Any]) -> dict[str, Any]:
    """A message without keys whose value is null, and with its reasoning under the names that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning} | message | {"reasoning_content": reasoning}


def confine(memory: int) -> None:
    """From now on this process opens no file, socket or process; on Linux its address space is limited to `memory` bytes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # of a whole process group; this process ends with its standard input
        signal.signal(number, signal.SIG_IGN)
    limits = {resource.RLIMIT_NOFILE: 3, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}  # standard input, output and errors
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


@functools.lru_cache(maxsize=8)
def compiled(environment: jinja2.Environment, template: str) -> jinja2.Template:
    """The template as a program; compiling takes far longer than rendering, and a run has one template."""
    return environment.from_string(template)


def answer(environment: jinja2.Environment, request: dict[str, Any], max_output: int) -> dict[str, str]:
    """The text of one request, or the error of its template."""
    variables = request["variables"]
    try:
        messages = [normalize(message) for message in variables["messages"]]
        text = compiled(environment, request["template"]).render(variables | {"messages": messages})
    except MemoryError:
        return {"error": "out of memory"}
    except Exception as e:  # a template may raise anything
        return {"error": (str(e) or type(e).__name__)[:1000]}
    if len(text) > max_output:
        return {"error": f"it writes {len(text)} characters; at most {max_output}"}
    return {"text": text}


def serve(cpu_seconds: float, memory: int, max_output: int) -> None:
    """Answer requests until standard input ends."""
    environment = make_environment()
    for encoding in ENCODINGS:  # otherwise imported at their first use, when no file can be opened any more, as `jinja2.debug`
        codecs.lookup(encoding)
    confine(memory)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # its signal ends the process
        reply = json.dumps(answer(environment, json.loads(line), max_output)).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
