"""Text that a language model generates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def generate(
    directory: str | Path,
    prompts: Sequence[str | Sequence[dict[str, Any]]],
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    batch: int = 16,
) -> list[str]:
    """Generate the answers of a language model. The model is loaded in each call, so give all prompts at once.

    Args:
      directory: a Hugging Face directory, or a finished run of `finetune`.
      prompts: texts to continue, or conversations to answer: lists of messages {"role", "content"}.
      max_tokens: maximum number of tokens of an answer. [default: 512, or the rest of the model's context]
      temperature, top_k, top_p: temperature 0 takes the likeliest token; top_k and top_p restrict the sampling to the
        likeliest tokens. [default: those of generation_config.json if it asks for sampling, otherwise the likeliest token]
      seed: seed of the sampling. An answer does not depend on the other prompts.
      chat_template_kwargs: variables of the chat template. [default: those of the training]
      batch: number of prompts that are answered together.

    Returns:
      The text of each answer, up to the token that ends it, or to `max_tokens`.

    Raises:
      ValueError: a setting out of its range, or prompts that are no list.
      DataError: no model, a damaged one, or a prompt that is empty or that the model has no room for.

    >>> len(ld.generate("run", ["0 A", "1 B"], max_tokens=4))
    2
    """
    from lindm import validate
    from lindm.errors import UsageError
    from lindm.llm.text_generation import load_generator

    if isinstance(prompts, str):
        raise UsageError(f"prompts must be a list; got {prompts!r}")
    validate.count(batch, "batch")
    generator = load_generator(
        directory,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        chat_template_kwargs=chat_template_kwargs,
    )
    ids = [generator.prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    return [answer.text for answer in generator.answer(ids, batch=batch)]
