"""The tokenizer of a GGUF file: byte-level BPE or SentencePiece, with the chat template of the file.

A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`) but does not contain the pattern. The patterns here are those of the
original tokenizers. An unknown name raises an error: another pattern would give other tokens than those the model was trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lindm.errors import DataError
from lindm.io import limits

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """How a text is normalized and split before BPE merges."""

    steps: tuple[Callable[[], Any], ...]
    ignore_merges: bool = False  # a piece that is in the vocabulary is one token, whatever the merges
    add_bos: bool = False  # default of tokenizer.ggml.add_bos_token
    nfc: bool = False  # Unicode normalization NFC


def _split(pattern: str) -> Callable[[], Any]:
    return lambda: pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _byte_level(use_regex: bool) -> Callable[[], Any]:
    return lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


_GPT2 = PreTokenizer(steps=(_byte_level(True),))
_SMOLLM = PreTokenizer(steps=(lambda: pre_tokenizers.Digits(individual_digits=True), _byte_level(True)))
_LLAMA3 = PreTokenizer(steps=(_split(LLAMA3), _byte_level(False)), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer(steps=(_split(QWEN2), _byte_level(False)), nfc=True)
_TEKKEN = PreTokenizer(steps=(_split(TEKKEN), _byte_level(False)), ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), _LLAMA3),
    "qwen2": _QWEN2,
    "tekken": _TEKKEN,
}


def build_tokenizer(metadata: dict[str, Any], source: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer described by the metadata of a file. Raises: DataError, naming the key, if a value is unknown or invalid."""
    given = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    tokens, kinds = given.get("tokens"), given.get("token_type")
    if not isinstance(tokens, list) or not tokens or len(tokens) > vocab_size or len(set(tokens)) != len(tokens):
        raise DataError(f"{source}: tokenizer.ggml.tokens must be at most {vocab_size} different texts")
    if kinds is None:
        kinds = [1] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise DataError(f"{source}: tokenizer.ggml.token_type must have one entry for each of {len(tokens)} tokens")
    model = given.get("model")
    if model not in ("gpt2", "llama"):
        raise DataError(f"{source}: tokenizer.ggml.model must be gpt2 or llama; got {model!r}")
    try:
        tokenizer, add_bos = _byte_level_bpe(given, source) if model == "gpt2" else _sentence_piece(given, kinds, source)
    except (TypeError, ValueError, KeyError) as e:
        raise DataError(f"{source}: its tokens and merges do not make a tokenizer: {e}") from e
    for kind in (CONTROL, USER_DEFINED):
        marked = [t for t, k in zip(tokens, kinds, strict=True) if k == kind]
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=kind == CONTROL) for t in marked])
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    special = {f"{name}_token": _token(given, key, tokens, source) for name, key in names.items() if key in given}
    if given.get("add_bos_token", add_bos) and "bos_token" in special:
        bos = special["bos_token"]
        around = [(bos, tokens.index(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 $B:1", special_tokens=around
        )
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise DataError(f"{source}: tokenizer.chat_template must be a text; got {template!r}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False, **special
    )


def _token(given: dict[str, Any], key: str, tokens: list[str], source: str) -> str:
    if not isinstance(given[key], int) or not 0 <= given[key] < len(tokens):
        raise DataError(f"{source}: tokenizer.ggml.{key} must be the number of a token; got {given[key]!r}")
    return tokens[given[key]]


def _byte_level_bpe(given: dict[str, Any], source: str) -> tuple[Tokenizer, bool]:
    pre = given.get("pre")
    if pre not in PRE_TOKENIZERS:
        raise DataError(f"{source}: tokenizer.ggml.pre must be one of {', '.join(PRE_TOKENIZERS)}; got {pre!r}")
    pre_tokenizer = PRE_TOKENIZERS[pre]
    vocab = _token_ids(given)
    merges = [tuple(merge.split(" ")) for merge in given.get("merges", ())]
    for merge in merges:  # `tokenizers` does not check them
        if len(merge) != 2 or any(part not in vocab for part in (*merge, "".join(merge))):
            raise DataError(f"{source}: tokenizer.ggml.merges must join tokens into tokens; got {' '.join(merge)!r}")
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre_tokenizer.ignore_merges))
    if pre_tokenizer.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([step() for step in pre_tokenizer.steps])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre_tokenizer.add_bos


def _sentence_piece(given: dict[str, Any], kinds: list[int], source: str) -> tuple[Tokenizer, bool]:
    tokens, scores = given["tokens"], given.get("scores")
    if long := [token for token in tokens if len(token) > limits.TOKEN]:
        raise DataError(f"{source}: tokenizer.ggml.tokens must have at most {limits.TOKEN} characters each; got {len(long[0])}")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise DataError(f"{source}: tokenizer.ggml.scores must have one entry for each of {len(tokens)} tokens")
    unknown = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    merges = _merges(tokens, scores)
    tokenizer = Tokenizer(BPE(vocab=_token_ids(given), merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = given.get("add_space_prefix", True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never", split=False)
    after = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    return tokenizer, True


def _merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose result has the highest score: all splits of each token into two, best token first."""
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = sorted((ids[a], ids[b]) for a, b in halves if a in ids and b in ids)
        merges += [(-score, len(merges) + i, tokens[a], tokens[b]) for i, (a, b) in enumerate(known)]
    return [(a, b) for _, _, a, b in sorted(merges)]


def _token_ids(given: dict[str, Any]) -> dict[str, int]:
    return {token: i for i, token in enumerate(given["tokens"])}
