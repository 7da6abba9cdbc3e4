"""The tokenizer that a GGUF file holds: byte-level BPE or SentencePiece, with the file's own chat template.

A GGUF file names how text is split before pairs are merged (`tokenizer.ggml.pre`); it does not hold the pattern. The patterns
here are those of the models' own tokenizers. A name that is not among them is refused: with another pattern the same text would
become other tokens than those the model learned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lindm.errors import DataError

UNKNOWN, CONTROL, USER = 2, 3, 4  # kinds of tokens
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """What happens to a text before pairs of bytes are merged."""

    steps: tuple[Callable[[], Any], ...]
    whole: bool = False  # a piece that is a token is not merged together
    begins: bool = False  # with the token BOS, if the file does not say
    composed: bool = False  # characters are composed first (NFC)


def _pattern(pattern: str) -> Callable[[], Any]:
    return lambda: pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _bytes(own: bool) -> Callable[[], Any]:
    return lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)


_GPT2 = Splitting(steps=(_bytes(True),))
_SMOLLM = Splitting(steps=(lambda: pre_tokenizers.Digits(individual_digits=True), _bytes(True)))
_LLAMA3 = Splitting(steps=(_pattern(LLAMA3), _bytes(False)), whole=True, begins=True)
_QWEN2 = Splitting(steps=(_pattern(QWEN2), _bytes(False)), composed=True)
_TEKKEN = Splitting(steps=(_pattern(TEKKEN), _bytes(False)), whole=True, begins=True)
SPLITTINGS = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), _LLAMA3),
    "qwen2": _QWEN2,
    "tekken": _TEKKEN,
}


def tokenizer(metadata: dict[str, Any], source: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a file's metadata; DataError, naming the key, where it is not known or not sound."""
    given = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    tokens, kinds = given.get("tokens"), given.get("token_type")
    if not isinstance(tokens, list) or not tokens or len(tokens) > vocabulary or len(set(tokens)) != len(tokens):
        raise DataError(f"{source}: tokenizer.ggml.tokens must be at most {vocabulary} texts that differ")
    if kinds is None:
        kinds = [1] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise DataError(f"{source}: tokenizer.ggml.token_type must have one entry for each of {len(tokens)} tokens")
    model = given.get("model")
    if model not in ("gpt2", "llama"):
        raise DataError(f"{source}: tokenizer.ggml.model must be gpt2 or llama; got {model!r}")
    try:
        found, begins = _byte_level(given, source) if model == "gpt2" else _sentence_piece(given, kinds, source)
    except (TypeError, ValueError, KeyError) as e:
        raise DataError(f"{source}: its tokens and merges do not make a tokenizer: {e}") from e
    for kind in (CONTROL, USER):
        marked = [t for t, k in zip(tokens, kinds, strict=True) if k == kind]
        found.add_tokens([AddedToken(t, normalized=False, special=kind == CONTROL) for t in marked])
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    special = {f"{name}_token": _token(given, key, tokens, source) for name, key in names.items() if key in given}
    if given.get("add_bos_token", begins) and "bos_token" in special:
        bos = special["bos_token"]
        around = [(bos, tokens.index(bos))]
        found.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 $B:1", special_tokens=around
        )
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise DataError(f"{source}: tokenizer.chat_template must be a text; got {template!r}")
    return PreTrainedTokenizerFast(tokenizer_object=found, chat_template=template, clean_up_tokenization_spaces=False, **special)


def _token(given: dict[str, Any], key: str, tokens: list[str], source: str) -> str:
    if not isinstance(given[key], int) or not 0 <= given[key] < len(tokens):
        raise DataError(f"{source}: tokenizer.ggml.{key} must be the number of a token; got {given[key]!r}")
    return tokens[given[key]]


def _byte_level(given: dict[str, Any], source: str) -> tuple[Tokenizer, bool]:
    pre = given.get("pre")
    if pre not in SPLITTINGS:
        raise DataError(f"{source}: tokenizer.ggml.pre must be one of {', '.join(SPLITTINGS)}; got {pre!r}")
    how = SPLITTINGS[pre]
    vocabulary = _numbered(given)
    merges = [tuple(merge.split(" ")) for merge in given.get("merges", ())]
    for merge in merges:  # the library trusts them
        if len(merge) != 2 or {*merge, "".join(merge)} - vocabulary.keys():
            raise DataError(f"{source}: tokenizer.ggml.merges must make tokens of tokens; got {' '.join(merge)!r}")
    found = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=how.whole))
    if how.composed:
        found.normalizer = normalizers.NFC()
    found.pre_tokenizer = pre_tokenizers.Sequence([step() for step in how.steps])
    found.decoder = decoders.ByteLevel()
    return found, how.begins


def _sentence_piece(given: dict[str, Any], kinds: list[int], source: str) -> tuple[Tokenizer, bool]:
    tokens, scores = given["tokens"], given.get("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise DataError(f"{source}: tokenizer.ggml.scores must have one entry for each of {len(tokens)} tokens")
    unknown = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    merges = _merges(tokens, scores)
    found = Tokenizer(BPE(vocab=_numbered(given), merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = given.get("add_space_prefix", True)
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never", split=False)
    after = [decoders.Strip(content=" ", left=1)] if prefix else []
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    return found, True


def _merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair that makes the token of the highest score: every way to make each token, best token first."""
    number = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = sorted((number[a], number[b]) for a, b in halves if a in number and b in number)
        found += [(-score, len(found) + i, tokens[a], tokens[b]) for i, (a, b) in enumerate(known)]
    return [(a, b) for _, _, a, b in sorted(found)]


def _numbered(given: dict[str, Any]) -> dict[str, int]:
    return {token: i for i, token in enumerate(given["tokens"])}
