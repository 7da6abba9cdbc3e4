"""Which tokens the loss weighs, for every kind of data: here answers are capital letters, and prompts have none."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import logsumexp

from lindm.llm.config import ModelConfig
from lindm.llm.model import Decoder
from lindm.llm.sft.loss import ComputeConfig, lm_loss
from lindm.llm.sft.packing import batch_shape, make_batch, one_per_row, pack
from lindm.llm.tokens import Example
from tests.lindm.llm.sft.test_examples import load_examples
from tests.lindm.llm.small import byte_level

TOKENIZER = byte_level()
END = TOKENIZER.eos_token_id
MODEL = ModelConfig(
    model_type="llama",
    vocab_size=len(TOKENIZER),
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=24,
    init_std=0.5,
)
SYSTEM = {"role": "system", "content": "you answer with capital letters"}


def rows(kind: str) -> list[dict]:
    rng = np.random.default_rng(0)

    def question() -> str:
        return "".join(rng.choice(list("abc 0.5:#\n"), int(rng.integers(1, 12)))) + "x"

    def answer() -> str:
        return "".join(rng.choice(list("ABCDE"), int(rng.integers(1, 6))))

    def turns(n: int) -> list[dict]:
        pairs = [({"role": "user", "content": question()}, {"role": "assistant", "content": answer()}) for _ in range(n)]
        return [SYSTEM, *(turn for pair in pairs for turn in pair)]

    return {
        "completions": [{"prompt": question(), "completion": answer()} for _ in range(20)],
        "conversations": [{"messages": turns(int(rng.integers(1, 4)))} for _ in range(8)],
    }[kind]


def load(kind: str, micro, directory: Path) -> list[Example]:
    if kind in ("mdp", "hidden", "ambiguous"):
        return load_examples(getattr(micro, kind), TOKENIZER)
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))
    return load_examples(path, TOKENIZER)


def answer_places(example: Example) -> list[int]:
    """Positions before a token of an answer: it has a capital letter, or ends a turn that had one just before."""
    texts = [TOKENIZER.decode([token]) for token in example.ids.tolist()]
    capital = [any(c.isupper() for c in text) and len(text) < 6 for text in texts]  # <|im_start|> has none either
    return [i for i in range(len(texts) - 1) if capital[i + 1] or (example.ids[i + 1] == END and capital[i])]


def expected_loss(model: Decoder, examples: Sequence[Example]) -> float:
    """Minus the log-probabilities of the answers, one document at a time and by every logit."""
    total = 0.0
    for e in examples:
        ids = jnp.asarray(e.ids[None])
        hidden = model.last_hidden_state(ids, jnp.arange(len(e.ids), dtype=jnp.int32)[None])
        logits = np.asarray(model.logits(hidden), np.float64)[0]
        places = answer_places(e)
        total += sum(logsumexp(logits[i]) - logits[i][e.target[i]] for i in places)
    return total


@pytest.mark.slow
@pytest.mark.fault("F23")
@pytest.mark.parametrize("kind", ["completions", "conversations", "mdp", "hidden", "ambiguous"])
def test_the_loss_has_all_answers_and_nothing_else(micro, tmp_path, trials, kind):
    examples = load(kind, micro, tmp_path)[:20]
    for e in examples:
        places = answer_places(e)
        assert places and np.flatnonzero(e.target >= 0).tolist() == places, e.source
        if kind in ("completions", "conversations"):  # labels of a dataset are the oracle's, whatever was done
            assert e.target[places].tolist() == e.ids[np.array(places) + 1].tolist()
        trials.add(len(e.ids))
    model = Decoder(MODEL, nnx.Rngs(0), jnp.float32)
    wanted = expected_loss(model, examples)
    lengths = [len(e.ids) for e in examples]
    for plan in (one_per_row(lengths), pack(lengths, 2 * max(lengths))):
        batch_rows = [[examples[i] for i in row] for row in plan]
        loss, _ = lm_loss(model, make_batch(batch_rows, *batch_shape(batch_rows)), ComputeConfig())
        assert float(loss) == pytest.approx(wanted, rel=2e-5)
