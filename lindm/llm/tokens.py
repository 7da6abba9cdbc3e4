"""Texts as token ids, and training examples with a target token at every position.

A text is encoded piece by piece. So the tokens of a history are a prefix of the tokens of each of its continuations, and the
positions of the answers are known by construction. Some tokenizers put a space in front of every text; with those a piece is
encoded after an anchor, whose tokens are removed again. Every distinct piece is decoded once for a check: a piece that the
tokenizer cannot represent raises an error. The name of a control token within a piece is plain text; control tokens come only
from chat templates (`chats.py`), from the tokenizer's own prefix of a document, and from the end of a completion.

The target of a position is the token to predict after it, -1 where nothing is trained. Let the tokens of a step's action be c_1
.. c_k and those of the label (the oracle's action) l_1 .. l_m. Then l_1 is the target in front of the action, and l_(j+1) the
target at c_j as long as c_1 .. c_j = l_1 .. l_j; where the two differ, the text does not continue as the label would, and no
further token is trained. So with actions of a single token every label is trained, whichever policy acted.
"""

import contextlib
import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from weakref import WeakKeyDictionary

import numpy as np

from lindm.choices import Supervise
from lindm.errors import DataError, LindmError
from lindm.io import inputs, limits
from lindm.io.files import read_json
from lindm.io.verification import verify_file_list
from lindm.text import Piece, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer
else:
    Tokenizer = Any  # transformers takes seconds to import

WEIGHT_ENDINGS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx", ".msgpack", ".h5")  # that no tokenizer opens
ANCHORS = ("", "\n", "a", ".")  # the first that works is used; "": no anchor


@dataclass(frozen=True, eq=False)
class Example:
    """A text with its targets."""

    ids: np.ndarray  # [n] int32
    target: np.ndarray  # [n] int32: the token to predict after each position, -1 where nothing is trained
    source: object  # origin of the text: its str is for messages
    group: int = 0  # examples of one group are held out together
    action_values: np.ndarray | None = None  # [targets, A] float32: the oracle's Q at each target, in order of position
    weights: np.ndarray | None = None  # [targets] float32: factor of the loss at each target, in order of position; None: 1


@dataclass(eq=False)
class TokenizerInfo:
    """Properties of a tokenizer that are determined at its first use. Has no reference to the tokenizer."""

    anchor: str  # text that a piece is encoded after
    anchor_ids: list[int]
    control_tokens: dict[int, str]  # names by token id
    control_pattern: re.Pattern[str]  # matches the names
    encoded: dict[str, list[int]]  # token ids of the pieces so far
    prefixes: tuple[list[int], list[int]] | None = None  # see `_prefixes`


_INFO: WeakKeyDictionary[Any, TokenizerInfo] = WeakKeyDictionary()


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, from its files alone. Raises: DataError, naming the directory."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not directory.is_dir():
        raise DataError(f"there is no tokenizer in {directory}: it is not a directory")
    _check_files(directory)
    verify_file_list(directory, lambda name: not name.endswith(".safetensors"))
    try:
        # with a config.json of Qwen2, AutoTokenizer would replace the rules of tokenizer.json by its own
        kind = PreTrainedTokenizerFast if _is_generic(directory) else AutoTokenizer
        tokenizer = kind.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except BaseException as e:  # it raises many kinds; a panic of the tokenizers library is not an Exception
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        if not any(any(directory.glob(name)) for name in ("tokenizer.json", "*.model", "vocab.*", "merges.txt")):
            reason = "tokenizer.json is missing"
        raise DataError(f"there is no tokenizer in {directory} that can be loaded: {reason}") from e
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"the tokenizer in {directory} has no tokenizer.json; save it in that format first")
    return tokenizer


def _check_files(directory: Path) -> None:
    """Raise DataError unless what transformers may open are regular files of bounded size."""
    inputs.check_directory(directory)
    for path in directory.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHT_ENDINGS):
            inputs.check_file(path, limits.TOKENIZER_FILE)
    if (templates := directory / "additional_chat_templates").is_dir():
        inputs.check_directory(templates)


def _is_generic(directory: Path) -> bool:
    """Whether the tokenizer class adds nothing to tokenizer.json."""
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.exists() and (directory / "tokenizer.json").exists() else {}
    return config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")


# --- pieces -----------------------------------------------------------------------------------------------------------------


def encode(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[list[int]]:
    """The token ids of every piece, whatever precedes it; concatenated they decode to the concatenated pieces.

    The prefix of a document (`document_prefix`) is not included. Raises: DataError, with a piece that cannot be represented.
    """
    cache = tokenizer_info(tokenizer).encoded
    if new := [piece for piece in dict.fromkeys(pieces) if piece not in cache]:
        cache.update(zip(new, _encode(tokenizer, new), strict=True))
    return [list(cache[piece]) for piece in pieces]


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids from anywhere in a document; control tokens appear as their names."""
    info = tokenizer_info(tokenizer)
    return _decode(tokenizer, [*info.anchor_ids, *ids]).removeprefix(info.anchor)


def document_prefix(tokenizer: Tokenizer) -> list[int]:
    """The tokens that a tokenizer puts in front of a document: the BOS token, a space, both or neither."""
    return list(_prefixes(tokenizer)[1])


def action_tokens(tokenizer: Tokenizer, template: Template, num_actions: int) -> tuple[tuple[int, ...], ...]:
    """The token ids of each of the first `num_actions` action symbols.

    Raises:
      ValueError: the template has fewer symbols.
      DataError: the tokens of one symbol are equal to, or a prefix of, those of another, so a decision would be ambiguous.
    """
    symbols = [template.action_symbol(a) for a in range(num_actions)]
    tokens = tuple(tuple(ids) for ids in encode(tokenizer, symbols))
    order = sorted(range(num_actions), key=lambda a: tokens[a])
    for a, b in itertools.pairwise(order):  # a prefix sorts just before one of its continuations
        if tokens[b][: len(tokens[a])] == tokens[a]:
            clash = f"{symbols[a]!r} is {list(tokens[a])} and {symbols[b]!r} is {list(tokens[b])}"
            raise DataError(f"the tokens of an action must not be a prefix of another's: with this tokenizer {clash}")
    return tokens


def tokenizer_info(tokenizer: Tokenizer) -> TokenizerInfo:
    """The properties of a tokenizer, determined at its first use."""
    if (info := _INFO.get(tokenizer)) is None:
        controls = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(controls.values(), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        anchor, anchor_ids = _find_anchor(tokenizer)
        info = _INFO[tokenizer] = TokenizerInfo(anchor, anchor_ids, controls, pattern, {})
    return info


def _find_anchor(tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The first anchor after which pieces can be concatenated: the tokens twice decode to the text twice."""
    for anchor in ANCHORS:
        anchor_ids, *encoded = encode_whole(tokenizer, [anchor, f"{anchor}x", f"{anchor} x"])
        if all(
            ids[: len(anchor_ids)] == anchor_ids and _decode(tokenizer, ids + ids[len(anchor_ids) :]) == f"{anchor}{probe}{probe}"
            for probe, ids in zip(("x", " x"), encoded, strict=True)
        ):
            return anchor, anchor_ids
    raise DataError(
        f"the tokenizer must represent texts piece by piece so that they decode to the same; {type(tokenizer).__name__} does not"
    )


def _prefixes(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts in front of the tokens of a whole text, and in front of those of its first piece."""
    info = tokenizer_info(tokenizer)
    if info.prefixes is None:
        prefixes: list[list[list[int]]] = [[], []]
        for text in ("\n", "#", "0", "x"):  # with some of them a space in front may be one token
            whole: Any = tokenizer(text, add_special_tokens=True, split_special_tokens=True, verbose=False)["input_ids"]
            for own, matches in zip((encode_whole(tokenizer, [text])[0], _encode(tokenizer, [text])[0]), prefixes, strict=True):
                places = [i for i in range(len(whole)) if list(whole[i : i + len(own)]) == own]
                matches += [list(whole[:i]) for i in places[:1]]
        if not prefixes[0]:
            raise DataError(f"the tokenizer must put its control tokens around a text; {type(tokenizer).__name__} does not")
        info.prefixes = prefixes[0][0], (prefixes[1] or prefixes[0])[0]
    return info.prefixes


def encode_whole(tokenizer: Tokenizer, texts: list[str], parse_control_tokens: bool = False) -> list[list[int]]:
    """The token ids of whole texts, without prefix or end; names of control tokens are text unless `parse_control_tokens`."""
    for text in texts:
        if text != text.encode(errors="replace").decode():
            raise DataError(f"text must be encodable as UTF-8; got {shorten(text)}")
    options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": not parse_control_tokens, "verbose": False}
    encoded: Any = tokenizer(texts, **options)["input_ids"]
    return [list(ids) for ids in encoded]


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _encode(tokenizer: Tokenizer, pieces: list[str]) -> list[list[int]]:
    """The token ids of every piece, encoded after the anchor and checked by decoding."""
    info = tokenizer_info(tokenizer)
    cut, encoded = len(info.anchor_ids), []
    for piece, ids in zip(pieces, encode_whole(tokenizer, [info.anchor + piece for piece in pieces]), strict=True):
        if control := [info.control_tokens[i] for i in ids[cut:] if i in info.control_tokens]:
            raise DataError(f"the tokenizer cannot represent {shorten(piece)}: it becomes the control token {control[0]!r}")
        back = _decode(tokenizer, ids)
        if ids[:cut] != info.anchor_ids or not _same_text(back, info.anchor + piece):
            decoded = back.removeprefix(info.anchor)
            raise DataError(
                f"the tokenizer cannot represent {shorten(piece)}: its tokens decode to {shorten(decoded)}"
                f"{_code_points(piece, decoded)}"
            )
        encoded.append(ids[cut:])
    return encoded


def _same_text(a: str, b: str) -> bool:
    """Whether two texts are equal but for the way in which Unicode composes characters: many tokenizers compose them (NFC)."""
    return a == b or unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)


def _code_points(text: str, decoded: str) -> str:
    """The characters at which two texts begin to differ, by number: some look alike."""
    at = next((i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b), min(len(text), len(decoded)))
    got, back = (" ".join(f"U+{ord(c):04X}" for c in t[at : at + 2]) or "nothing" for t in (text, decoded))
    return f" (character {at + 1}: {got} becomes {back})"


def shorten(text: str) -> str:
    """The repr of a text, shortened for an error message."""
    return repr(text) if len(text) <= 60 else f"{text[:40]!r}...{text[-15:]!r}"


@contextlib.contextmanager
def name_source(source: object) -> Iterator[None]:
    """Put the source of the data in front of the message of an error."""
    try:
        yield
    except LindmError as e:
        raise type(e)(f"{source}: {e.message}") from e


# --- examples ---------------------------------------------------------------------------------------------------------------


def document_example(
    tokenizer: Tokenizer,
    pieces: Sequence[Piece],
    labels: Sequence[Sequence[int] | None],
    actions: Sequence[Sequence[int]],
    supervise: Supervise,
    source: object,
    group: int = 0,
    values: Sequence[Sequence[Sequence[float | None]]] | None = None,
) -> Example:
    """The example of a rendered document.

    Args:
      pieces: from `lindm.text.render`; labels: [episode][step] the actions that are trained, those of the query last;
        None for an episode without.
      actions: the tokens of every action, from `action_tokens`.
      supervise: train every step of the demonstrations and of the query (all), or the steps of the query alone (query).
      values: [episode][step][A] action values of the oracle, None where the action is not legal, if the example shall have
        them; each action is one token.

    Raises:
      ValueError: an unknown value of supervise. DataError: the tokenizer cannot represent a piece.
    """
    if supervise not in get_args(Supervise):
        raise ValueError(f"supervise must be one of {', '.join(get_args(Supervise))}; got {supervise!r}")
    with name_source(source):
        ids, tokens = document_prefix(tokenizer), encode(tokenizer, [piece.text for piece in pieces])
    query, trained, trained_values = len(labels) - 1, {}, []
    for piece, taken in zip(pieces, tokens, strict=True):
        if piece.action is not None and piece.step is not None and (supervise == "all" or piece.episode == query):
            if values is not None:
                trained_values.append(values[piece.episode][piece.step])
            of_episode = labels[piece.episode]
            for j, token in enumerate(() if of_episode is None else actions[of_episode[piece.step]]):
                trained[len(ids) - 1 + j] = token  # an action is never the first piece
                if taken[j : j + 1] != [token]:
                    break
        ids += taken
    example = make_example(ids, trained, source, group)
    if values is None:
        return example
    numbers = np.array(trained_values, np.float32)  # None, of an action that is not legal, becomes NaN
    return replace(example, action_values=np.where(np.isnan(numbers), np.float32(-np.inf), numbers))


def prompt_tokens(tokenizer: Tokenizer, prompt: str, source: object) -> list[int]:
    """The token ids of a plain prompt: encoded as a whole, with the tokenizer's prefix, as a user of a model would encode it.

    Raises: DataError, naming the source, if the text cannot be represented.
    """
    with name_source(source):
        (ids,) = _encode(tokenizer, [prompt])
        if tokenizer_info(tokenizer).anchor:  # the tokenizer may put a space in front of a whole text
            (ids,) = encode_whole(tokenizer, [prompt])
        return _prefixes(tokenizer)[0] + ids


def completion_example(tokenizer: Tokenizer, prompt: str, completion: str, source: object, group: int = 0) -> Example:
    """The example of a prompt and a completion: the completion and the EOS token are trained.

    Raises: DataError, naming the source, if a text cannot be represented, the tokenizer has no EOS token, or no token precedes
    the completion.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{source}: the tokenizer has no EOS token, with which a completion must end")
    ids = prompt_tokens(tokenizer, prompt, source)
    with name_source(source):
        (completion_ids,) = _encode(tokenizer, [completion])
    completion_ids = [*completion_ids, tokenizer.eos_token_id]
    targets = {len(ids) - 1 + j: token for j, token in enumerate(completion_ids)}
    return make_example(ids + completion_ids, targets, source, group)


def text_example(tokenizer: Tokenizer, text: str, source: object, group: int = 0) -> Example:
    """The example of a document: every token after the first one, and the EOS token, are trained.

    Raises: DataError, naming the source, if the text cannot be represented or the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{source}: the tokenizer has no EOS token, with which a text must end")
    with name_source(source):
        _encode(tokenizer, [text])  # for its errors
        ids = [*_prefixes(tokenizer)[0], *encode_whole(tokenizer, [text])[0], tokenizer.eos_token_id]
    return make_example(ids, dict(enumerate(ids[1:])), source, group)


def make_example(
    ids: list[int], targets: dict[int, int], source: object, group: int, weights: Mapping[int, float] | None = None
) -> Example:
    """The example of token ids, and of targets at some positions, in order; weights: of these targets [default: 1]."""
    if -1 in targets:
        raise DataError(f"{source}: no token precedes the first trained one")
    target = np.full(len(ids), -1, np.int32)
    target[list(targets)] = list(targets.values())
    factors = None if weights is None else np.array([weights[place] for place in targets], np.float32)
    return Example(np.array(ids, np.int32), target, source, group, weights=factors)


def format_example(example: Example, tokenizer: Tokenizer, width: int = 2000) -> str:
    """An example as text, with the trained tokens in [[ ]]; [[label != text]] where the text differs from the label.

    Of a long text the first and the last width / 2 characters are shown. Control characters are escaped.
    """
    ids, labels = example.ids.tolist(), [-1, *example.target.tolist()[:-1]]
    parts = []
    for (trained, _), group in itertools.groupby(
        range(len(ids)), key=lambda i: (labels[i] >= 0, i if labels[i] not in (-1, ids[i]) else -1)
    ):
        places = list(group)
        text, label = decode(tokenizer, [ids[i] for i in places]), decode(tokenizer, [labels[i] for i in places if trained])
        parts.append(f"[[{text}]]" if label == text else f"[[{label} != {text}]]" if trained else text)
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in "".join(parts))
    if len(text) > width:
        half = width // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
    return f"{example.source}: {len(ids)} tokens, {sum(w >= 0 for w in labels)} of them trained\n{text}"
