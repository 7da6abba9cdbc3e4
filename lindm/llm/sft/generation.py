"""How a trained model ends its answers: the settings of its export, and a generation that shows whether it stops.

A base model may have the chat template of its fine-tuned sibling and yet end its texts with another token. Trained on
conversations it writes the end-of-turn token, on which nobody would stop, so the export names it as an end of generation.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lindm.io.files import read_json, write_json
from lindm.llm.config import CONFIG, GENERATION_CONFIG
from lindm.llm.generate import generate
from lindm.llm.model import Decoder
from lindm.llm.tokens import Example, Tokenizer, decode, shorten

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
MAX_NEW_TOKENS = 64  # of the generation that is shown


def write_chat_settings(directory: Path, tokenizer: Tokenizer, ends: Sequence[int], chat_template: str | None) -> None:
    """Write into an export on which tokens a generation ends, and the chat template of the training if it is not the model's.

    Args:
      ends: from `ExampleTable.end_tokens`. Those that are control tokens come before the ends of the original model; a template
        without control tokens leaves its answers without an end that a program could look for.
    """
    config, path = read_json(directory / CONFIG), directory / GENERATION_CONFIG
    generation = read_json(path) if path.exists() else {}
    original = generation.get("eos_token_id", config.get("eos_token_id"))
    originals = original if isinstance(original, list) else [] if original is None else [original]
    controls = [token for token in ends if is_control(tokenizer, token)]
    eos: Any = list(dict.fromkeys([*controls, *originals]))
    if controls and not set(controls) <= set(originals):
        eos = eos[0] if len(eos) == 1 else eos
        ids = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
        write_json(directory / CONFIG, config | {"eos_token_id": eos})
        write_json(path, ids | generation | {"eos_token_id": eos})
    if chat_template is not None:
        (directory / TEMPLATE).write_text(chat_template, encoding="utf-8")
        if (directory / TOKENIZER_CONFIG).exists():
            content = read_json(directory / TOKENIZER_CONFIG)
            content.pop("chat_template", None)
            write_json(directory / TOKENIZER_CONFIG, content)


def is_control(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a token is a control token, such as an end of turn."""
    return token in tokenizer.all_special_ids or ((t := tokenizer.added_tokens_decoder.get(token)) is not None and t.special)


def describe_generation(
    model: Decoder, tokenizer: Tokenizer, example: Example, ends: Sequence[int], dtype: DTypeLike = jnp.float32
) -> str:
    """A sentence about the model's own, greedy answer to the first prompt of an example: its text, and whether it stops."""
    start = int(np.flatnonzero(example.target >= 0)[0]) + 1
    room = model.config.max_position_embeddings - start
    (answer,) = generate(model, [example.ids[:start].tolist()], min(MAX_NEW_TOKENS, room), ends, dtype=dtype)
    text = shorten(decode(tokenizer, answer))
    if answer and answer[-1] in ends:
        return f"{text} after {shorten(decode(tokenizer, example.ids[:start].tolist()))}; it stops after {len(answer)} tokens"
    named = ", ".join(repr(decode(tokenizer, [token])) for token in ends[:3])
    return f"{text}; it does not stop within {len(answer)} tokens: the trained ends are {named}"
