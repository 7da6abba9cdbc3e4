"""`lindm generate`: answers of a language model."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lindm.cli.option_parser import Command, Positional
from lindm.errors import DataError, UsageError
from lindm.io.files import make_parent, strict_json, write_atomic

if TYPE_CHECKING:
    from lindm.llm.text_generation import TextGenerator


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Answer prompts with a language model: a chat, a text to continue, or the rows of a file. Without --prompt and --data,
    each line of standard input is a message of a chat, and the answer appears as it is generated."""

    directory: Annotated[Path, Positional("DIR")]
    """A Hugging Face directory, or the directory of a finished `lindm sft` run."""
    prompt: str | None = None
    """Continue this text, without the chat template."""
    data: Path | None = None
    """Answer the rows of a file in the formats of `lindm sft` (messages, or a prompt). An answer in the row is optional and is
    not shown to the model."""
    out: Path | None = None
    """With --data: .jsonl file for the rows, with the columns answer and finish_reason (stop or length). An existing file is
    replaced."""
    system: str | None = None
    """System message of the chat."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template as JSON, such as {"enable_thinking": false}. [default: those of the run]"""

    max_tokens: int | None = None
    """Maximum number of tokens of an answer. [default: 512, or the rest of the model's context]"""
    temperature: float | None = None
    """0 takes the likeliest token. Otherwise tokens are sampled in proportion to p(token)^(1/temperature). [default: that of
    generation_config.json if it asks for sampling, otherwise 0]"""
    top_k: int | None = None
    """Sample from the k likeliest tokens; 0: from all. [default: as for --temperature]"""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability. [default: as for --temperature]"""
    seed: int = 0
    """Seed of the sampling."""
    batch: int = 16
    """Number of rows that are answered together."""

    def __post_init__(self):
        if (self.data is None) != (self.out is None):
            raise UsageError("--data and --out must be given together")
        if self.prompt is not None and self.data is not None:
            raise UsageError("--prompt must be left out with --data")
        if self.out is not None and self.out.suffix != ".jsonl":
            raise UsageError(f"--out must be a .jsonl file; got {self.out}")
        if (
            self.data is not None
            and self.out is not None
            and self.data.resolve() in (self.out.resolve(), self.out.resolve().parent)
        ):
            raise UsageError(f"--out must not be --data, or a file in its directory; got {self.out}")
        if self.system is not None and (self.prompt is not None or self.data is not None):
            raise UsageError("--system is for a chat; a row of --data may have a column system")


def run(options: Generate) -> int:
    from lindm import validate

    validate.count(options.batch, "batch")
    rows = [] if options.data is None else read_rows(options.data)
    if options.out is not None:
        make_parent(options.out)  # an error comes before the model is loaded and the answers are computed
    from lindm.llm.text_generation import load_generator

    generator = load_generator(
        options.directory,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        chat_template_kwargs=_variables(options.chat_template_kwargs),
    )
    for setting in generator.ignored:
        print(f"lindm: warning: generation_config.json has {setting}, which is not applied", file=sys.stderr)
    if options.data is not None and options.out is not None:
        return answer_rows(generator, options.data, rows, options.out, options.batch)
    if options.prompt is not None:
        print_stream(generator, generator.prompt(options.prompt), 0)
        return 0
    return chat(generator, options.system)


def _variables(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        variables = json.loads(text)
    except (ValueError, RecursionError):
        variables = None
    if not isinstance(variables, dict):
        raise UsageError(f"--chat-template-kwargs must be a JSON object; got {text!r}")
    return variables


def print_stream(generator: "TextGenerator", prompt: list[int], number: int) -> str:
    """Print an answer as it is generated, and a line break; the answer."""
    pieces = []
    for piece in generator.stream(prompt, number):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print(flush=True)
    return "".join(pieces)


# --- a chat ------------------------------------------------------------------------------------------------------------------


def chat(generator: "TextGenerator", system: str | None) -> int:
    """Answer one message after another, until the input ends; one that cannot be answered is named and left out.

    The exit code, 0.
    """
    if generator.tokenizer.chat_template is None:
        raise UsageError("a chat needs a model with a chat template; give --prompt, or --data with prompts")
    terminal = sys.stdin.isatty()
    if terminal:
        print("Enter a message; Ctrl-D ends.")
    messages = [] if system is None else [{"role": "system", "content": system}]
    if messages:  # an error here would be one of every message
        generator.prompt([*messages, {"role": "user", "content": "?"}], "--system")
    number = 0
    while True:
        try:
            text = input("> " if terminal else "").strip()
        except EOFError:
            print(end="\n" * terminal)
            return 0
        if text:
            number += 1
            try:
                messages = _exchange(generator, messages, text, number)
            except DataError as e:
                print(f"lindm: {e.message}; the conversation goes on without message {number}", file=sys.stderr)


def _exchange(generator: "TextGenerator", messages: list[dict[str, str]], text: str, number: int) -> list[dict[str, str]]:
    """Print the answer to a message; the conversation with both. DataError where they cannot be a part of it."""
    question = {"role": "user", "content": text}
    messages = [*messages, question]
    answer = print_stream(generator, generator.prompt(messages, f"message {number}"), number - 1)
    answered = [*messages, {"role": "assistant", "content": answer}]
    generator.prompt([*answered, question], f"the answer to message {number}")  # its error would be one of every later message
    return answered


# --- the rows of a file ------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[tuple[object, Any]]:
    """The rows of a file, each with its place. DataError where there is none, or a row cannot get the columns of an answer."""
    from lindm.llm.sft.row_files import find_files, find_parts

    rows: list[tuple[object, Any]] = [row for part in find_parts(find_files(path)) for row in part.rows()]
    if not rows:
        raise DataError(f"{path} has no rows")
    for place, row in rows:
        if not isinstance(row, dict):
            continue  # the error is that of `row_prompt`
        if taken := [key for key in ("answer", "finish_reason") if key in row]:
            raise DataError(f"{place}: the row has the column {taken[0]}, which the answer would replace; rename it")
        try:
            strict_json(row)
        except TypeError as e:  # a table can have dates, and other values that JSON has not
            raise DataError(f"{place}: the row cannot be written as JSON: {e}") from e
    return rows


def answer_rows(generator: "TextGenerator", data: Path, rows: list[tuple[object, Any]], out: Path, batch: int) -> int:
    """Write the rows with their answers, all or none. The exit code, 0."""
    from lindm.io.progress import progress_bar

    prompts = [generator.row(row, source) for source, row in rows]
    sources = [source for source, _ in rows]
    with progress_bar("answers") as progress:
        answers = generator.answer(prompts, sources, batch, progress)
    columns = [{"answer": answer.text, "finish_reason": answer.finish_reason} for answer in answers]
    lines = [strict_json(row | column, ensure_ascii=False) for (_, row), column in zip(rows, columns, strict=True)]
    write_atomic(out, "".join(f"{line}\n" for line in lines))
    cut = sum(answer.finish_reason == "length" for answer in answers)
    cut_off = f"; {cut:,} cut off at the maximum number of tokens" if cut else ""
    print(f"{len(answers):,} answers, {sum(a.num_tokens for a in answers):,} tokens, in {out}{cut_off}")
    return 0


COMMAND = Command(
    name="generate",
    options=Generate,
    run=run,
    examples=(
        'lindm generate models/qwen3 --system "Answer in one sentence."',
        "lindm generate runs/chat --data questions.jsonl --out answers.jsonl --max-tokens 256",
        'lindm generate models/smollm2 --prompt "Once upon a time" --temperature 0.8 --seed 3',
    ),
    sections={"max_tokens": "Generation"},
)
