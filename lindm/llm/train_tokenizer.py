"""Training of a small tokenizer, for randomly initialized models.

Byte-level BPE, so that every text can be represented. Merges stay within the pieces of documents: with a large enough vocabulary,
each piece that occurs twice (a state with its surroundings, an action, a reward) is one token, and a step is three tokens.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
else:
    PreTrainedTokenizerFast = Any  # transformers takes seconds to import

EOS_TOKEN = "<|end|>"
MIN_VOCAB_SIZE = 256 + 1  # every byte, and the EOS token


def train_tokenizer(pieces: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A tokenizer with at most `vocab_size` tokens, determined by the pieces; its EOS token is <|end|>, and it has no BOS token.

    Args:
      pieces: of rendered documents, repetitions included.

    Raises:
      ValueError: vocab_size is too small for every byte and the EOS token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB_SIZE}, for every byte and {EOS_TOKEN}; got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a piece that occurs once (a reward with many digits) is split into parts that occur again
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(pieces), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN, clean_up_tokenization_spaces=False)
