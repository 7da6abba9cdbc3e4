"""A tokenizer of one's own, for models that start from nothing.

Byte-pair encoding over bytes, so that every text can be written. Its words are the pieces of documents: with room enough, each
piece that comes twice (a state with what is around it, an action, a reward) is one token, and a step is three.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
else:
    PreTrainedTokenizerFast = Any  # transformers takes seconds to import

END = "<|end|>"
LEAST = 256 + 1  # every byte, and the end


def small_tokenizer(pieces: Iterable[str], size: int) -> "PreTrainedTokenizerFast":
    """A tokenizer with at most `size` tokens, the same for the same pieces; <|end|> ends a sequence, and nothing begins one.

    Args:
      pieces: of rendered documents, as often as they come. `save_pretrained` writes what `load_tokenizer` reads.

    Raises:
      ValueError: a size without room for every byte and the end.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if size < LEAST:
        raise ValueError(f"size must be at least {LEAST}, for every byte and {END}; got {size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,  # what comes once (a reward with many digits) is spelt in parts that come again
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(pieces), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)
