"""A language model that answers prompts and conversations with text: the work of `lindm generate`.

Generation ends on the tokens of `eos_token_id` in generation_config.json, or else in config.json, or else on the tokenizer's. The
settings of sampling are those of generation_config.json where it asks for sampling; otherwise the likeliest token is taken.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lindm import validate
from lindm.errors import DataError, UsageError
from lindm.io.files import read_json
from lindm.llm.chats import Conversation, chat_prompt
from lindm.llm.config import CONFIG, GENERATION_CONFIG
from lindm.llm.generate import Sampling, generate, stream
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm.llm.parallel.sharding import make_mesh
from lindm.llm.policy import model_directory
from lindm.llm.sft.options import run_options
from lindm.llm.sft.rows import row_prompt
from lindm.llm.tokens import Tokenizer, decode, load_tokenizer, prompt_tokens

DEFAULT_MAX_TOKENS = 512
# settings of generation_config.json that are applied, or that have no effect on the tokens of one answer
APPLIED = {"eos_token_id", "do_sample", "temperature", "top_k", "top_p"}
APPLIED |= {"bos_token_id", "pad_token_id", "max_length", "max_new_tokens", "transformers_version", "_from_model_config"}
NEUTRAL = (None, False, 0, 1, [], {})  # values of other settings that ask for nothing
SAMPLING_RULES: dict[str, tuple[Any, str, Callable[[float], bool]]] = {
    "temperature": (int | float, "at least 0", lambda x: 0 <= x < math.inf),
    "top_k": (int, "a whole number, at least 0", lambda x: x >= 0),
    "top_p": (int | float, "above 0, and at most 1", lambda x: 0 < x <= 1),
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One generated answer."""

    text: str  # without the token that ends it
    num_tokens: int  # that token included
    finish_reason: Literal["stop", "length"]  # it ended itself, or it has as many tokens as it may have


@dataclass(frozen=True, kw_only=True)
class TextGenerator:
    """A model with its tokenizer and the settings of generation. `load_generator` makes one."""

    model: Decoder
    tokenizer: Tokenizer
    stops: tuple[int, ...]  # tokens that end an answer
    sampling: Sampling
    max_tokens: int | None = None  # of an answer; None: `DEFAULT_MAX_TOKENS`, or what the model has room for
    seed: int = 0
    template_variables: Mapping[str, Any]
    ignored: tuple[str, ...] = ()  # settings of generation_config.json that are not applied
    dtype: DTypeLike = jnp.float32

    def prompt(self, prompt: str | Sequence[dict[str, Any]], source: str = "the prompt") -> list[int]:
        """The token ids of a plain text, or of a conversation that the model is to answer. DataError, naming the source."""
        if not isinstance(prompt, str):
            return chat_prompt(self.tokenizer, Conversation(prompt, kwargs=self.template_variables), source)
        if not (ids := prompt_tokens(self.tokenizer, prompt, source)):
            raise DataError(f"{source} has no tokens")
        return ids

    def row(self, row: Any, source: object) -> list[int]:
        """The token ids of a row of a file, in a format of `lindm.llm.sft.rows`. DataError, naming the source."""
        return row_prompt(self.tokenizer, row, source, self.template_variables)

    def room(self, prompt: Sequence[int], source: object = "the prompt") -> int:
        """How many tokens the answer to a prompt may have. DataError, naming the source, where the model has no room for it."""
        limit = self.model.config.max_position_embeddings
        wanted = self.max_tokens or 1
        if len(prompt) + wanted > limit:
            rule = f"a prompt and an answer of {wanted} must have at most the {limit} tokens of the model"
            raise DataError(f"{source}: {rule}; the prompt has {len(prompt)}")
        return self.max_tokens or min(DEFAULT_MAX_TOKENS, limit - len(prompt))

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        sources: Sequence[object] | None = None,
        batch: int = 16,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Answer]:
        """The answer to each prompt. It depends on the prompt, its number and the settings, and not on the others or on `batch`.

        Args:
          prompts: token ids; sources: of each, for errors; batch: prompts that are answered together.
          progress: called with the number of answers so far, and of all.
        """
        rooms = [self.room(p, f"prompt {i}" if sources is None else sources[i]) for i, p in enumerate(prompts)]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), batch):
            progress(start, len(order))
            taken = order[start : start + batch]
            filled = taken + taken[:1] * (batch - len(taken) if start else 0)  # no program of its own for the last batch
            tokens = generate(
                self.model,
                [prompts[i] for i in filled],
                [rooms[i] for i in filled],
                self.stops,
                sampling=self.sampling,
                keys=[self._key(i) for i in filled],
                dtype=self.dtype,
            )
            answers |= {i: self._answer(ids) for i, ids in zip(taken, tokens, strict=False)}
        progress(len(order), len(order))
        return [answers[i] for i in range(len(prompts))]

    def stream(self, prompt: Sequence[int], number: int = 0) -> Iterator[str]:
        """The answer to one prompt, piece by piece as it is generated: that of `answer` with the prompt at this number."""
        room = self.room(prompt)
        tokens = stream(self.model, prompt, room, self.stops, sampling=self.sampling, key=self._key(number), dtype=self.dtype)
        return decoded_pieces(self.tokenizer, (token for token in tokens if token not in self.stops))

    def _key(self, number: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), number)

    def _answer(self, ids: list[int]) -> Answer:
        stopped = bool(ids) and ids[-1] in self.stops
        text = decode(self.tokenizer, ids[:-1] if stopped else ids)
        return Answer(text=text, num_tokens=len(ids), finish_reason="stop" if stopped else "length")


def decoded_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens piece by piece, each as soon as its characters are complete.

    A token is decoded after those of the last piece, which say whether a space is in front of it; all tokens again would take
    time proportional to the square of their number. Bytes that are no character may show otherwise than in all tokens together.
    """
    last: list[int] = []  # tokens of the last piece
    new: list[int] = []  # tokens whose text is not shown
    for token in tokens:
        new.append(token)
        shown, text = decode(tokenizer, last), decode(tokenizer, last + new)
        if len(text) > len(shown) and text.startswith(shown) and not text.endswith("\ufffd"):  # the last bytes may be missing
            yield text[len(shown) :]
            last, new = new, []
    if rest := decode(tokenizer, last + new)[len(decode(tokenizer, last)) :]:
        yield rest


def load_generator(
    directory: str | Path,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TextGenerator:
    """The model of a run of `lindm sft`, or of a Hugging Face directory, ready to generate text on the first device.

    Args:
      max_tokens: of an answer [default: 512, or fewer where the model has no room].
      temperature: 0 takes the likeliest token; top_k, top_p: see `lindm.llm.generate.Sampling`. [default: those of
        generation_config.json where it asks for sampling; otherwise 0]
      chat_template_kwargs: variables of the chat template [default: those that the run was trained with].

    Raises:
      ValueError: a setting out of its range.
      DataError: the directory holds no model, or a damaged one.
    """
    options = run_options(Path(directory)) or {}
    path, device = model_directory(Path(directory)), jax.devices()[:1]
    config = read_json(path / CONFIG)
    settings = read_json(path / GENERATION_CONFIG) if (path / GENERATION_CONFIG).exists() else {}
    sampling = _sampling(settings, path / GENERATION_CONFIG, temperature, top_k, top_p)
    validate.count(1 if max_tokens is None else max_tokens, "max_tokens")
    validate.count(seed, "seed", least=0)
    tokenizer = load_tokenizer(path)
    stops = _stops(settings, config, tokenizer, path)
    trained_with = json.loads(options.get("chat_template_kwargs") or "{}")
    ignored = tuple(f"{k} {v}" for k, v in settings.items() if k not in APPLIED and v not in NEUTRAL)
    return TextGenerator(
        model=weights.load(path, mesh=make_mesh({"fsdp": 1}, device)),
        tokenizer=tokenizer,
        stops=stops,
        sampling=sampling,
        max_tokens=max_tokens,
        seed=seed,
        template_variables=trained_with if chat_template_kwargs is None else chat_template_kwargs,
        ignored=ignored,
        dtype=jnp.float32 if device[0].platform == "cpu" else jnp.bfloat16,
    )


def _sampling(
    settings: Mapping[str, Any], path: Path, temperature: float | None, top_k: int | None, top_p: float | None
) -> Sampling:
    """The given settings of sampling, and those of generation_config.json for the rest."""
    samples = settings.get("do_sample") is True
    default, values = Sampling(temperature=1.0) if samples else Sampling(), {}
    for name, given in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        own = settings.get(name) if samples else None
        value = given if given is not None else own if own is not None else getattr(default, name)
        kind, rule, holds = SAMPLING_RULES[name]
        if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
            if given is not None:
                raise UsageError(f"{name} must be {rule}; got {value!r}")
            raise DataError(f"{path}: {name} must be {rule}; got {value!r}")
        values[name] = value
    return Sampling(**values)


def _stops(settings: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer, path: Path) -> tuple[int, ...]:
    given: Any = next(
        (c["eos_token_id"] for c in (settings, config) if c.get("eos_token_id") is not None), tokenizer.eos_token_id
    )
    stops = given if isinstance(given, list) else [] if given is None else [given]
    if wrong := [s for s in stops if isinstance(s, bool) or not isinstance(s, int) or s < 0]:
        raise DataError(f"{path}: eos_token_id must be the number of a token, or a list of them; got {wrong[0]!r}")
    return tuple(stops)
