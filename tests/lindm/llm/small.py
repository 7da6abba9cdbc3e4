"""Small tokenizers of the common kinds: byte-level, and two that put a space in front of a text."""

from functools import cache

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lindm.llm.tokens import Example, decode

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
TEXTS = (
    "The state is 3. The decision is A. The reward is 0.25.\n",
    "#\n0 A:0.5\n1 B:0.75\n2 C:1.0\n",
    "user assistant system You help",
)


def byte_level(template: str | None = CHATML, bos: str | None = None, normalizer=None) -> PreTrainedTokenizerFast:
    """As SmolLM2, Qwen and Llama 3 have it: bytes, no space in front, `bos` in front where it is given."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    t.decoder = decoders.ByteLevel()
    if normalizer:
        t.normalizer = normalizer
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *([bos] if bos else [])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    if bos:
        t.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])
    fast = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", bos_token=bos, clean_up_tokenization_spaces=False)
    fast.chat_template = template
    return fast


def dummy_space(kind: str = "prepend", template: str | None = INST, normalizer=None) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it: ▁ for a space, one in front of a text, bytes for what has no token, <s> in front.

    Args:
      kind: prepend (a normalizer writes the space) or metaspace (a pre-tokenizer does).
    """
    characters = ["▁", *(chr(c) for c in range(33, 127))]
    merges = [("▁", c) for c in "ABCTx"] + [("T", "h"), ("Th", "e"), ("▁", "The"), ("0", "."), ("i", "s"), ("▁", "is")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *characters, *("".join(pair) for pair in merges)]
    t = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "prepend":
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        t.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    t.decoder = decoders.Sequence(parts)
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=t, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = template
    return fast


def unknown_characters() -> PreTrainedTokenizerFast:
    """Characters of ASCII alone; any other becomes <unk>."""
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "\n", *(chr(c) for c in range(32, 127))]
    t = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    t.decoder = decoders.Fuse()
    t.add_special_tokens(words[:3])
    names = {"unk_token": "<unk>", "eos_token": "<|im_end|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=t, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = CHATML
    return fast


KINDS = {
    "bytes": cache(byte_level),
    "bytes with a beginning": cache(lambda: byte_level(bos="<|begin|>")),
    "prepend": cache(dummy_space),
    "metaspace": cache(lambda: dummy_space("metaspace")),
}

TURNS = [
    {"role": "user", "content": "#\n0"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": ":0.5\n1"},
    {"role": "assistant", "content": "B or C"},
]


def trained_texts(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[str]:
    """The trained tokens of an example, runs of them put together; each must be the token that follows."""
    places = np.flatnonzero(example.target >= 0)
    np.testing.assert_array_equal(example.ids[places + 1], example.target[places])
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [decode(tokenizer, example.target[run].tolist()) for run in runs]
