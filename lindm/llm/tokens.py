"""Text as token ids, and which token is to be predicted where.

A text is encoded piece by piece, each by itself: the tokens of a history are the first tokens of each of its continuations, and
where the answers are is known by construction. Many tokenizers put a space in front of a text; with those a piece is encoded
behind an anchor, whose tokens are cut off again. Every distinct piece is decoded once: what a tokenizer cannot write is refused.
What looks like a control token in a piece is text; control tokens come from chat templates (`chats.py`), from what a tokenizer
itself puts in front of a document, and from the end of a completion, and from nowhere else.

An `Example` has a target at every position: the token to be predicted after it, -1 where nothing is trained. Let a step's action
be written c_1 .. c_k and the oracle's l_1 .. l_m. Then l_1 is trained in front of the action, and l_(j+1) behind c_j as long as
c_1 .. c_j = l_1 .. l_j; where the two part, the text does not go on as the label would, and nothing more is trained. So where
actions are single tokens every label is trained, whoever acted.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from lindm.errors import DataError, LindmError
from lindm.text import Piece, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer
else:
    Tokenizer = Any  # transformers takes seconds to import

SUPERVISE = ("all", "query")
ANCHORS = ("", "\n", "a", ".")  # of the first that does, "" being none


@dataclass(frozen=True, eq=False)
class Example:
    """A text that trains."""

    ids: np.ndarray  # [n] int32
    target: np.ndarray  # [n] int32: the token to be predicted after each position, -1 where nothing is trained
    source: str  # what it was made of, for a reader
    group: int = 0  # examples of one group are never parted when some are held out


@dataclass(eq=False)
class Facts:
    """Of a tokenizer, to which it holds no reference."""

    anchor: str  # what a piece is encoded behind
    front: list[int]  # its tokens
    controls: dict[int, str]  # the control tokens by their ids
    pattern: re.Pattern[str]  # of their names
    pieces: dict[str, list[int]]  # the tokens of those that came
    fronts: tuple[list[int], list[int]] | None = None  # of `_fronts`


_FACTS: WeakKeyDictionary[Any, Facts] = WeakKeyDictionary()


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, from its files alone. DataError, naming the directory, where there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not directory.is_dir():
        raise DataError(f"there is no tokenizer in {directory}: it is not a directory")
    try:
        # beside a config.json of Qwen2, AutoTokenizer would put Qwen2's own rules in the place of those in tokenizer.json
        kind = PreTrainedTokenizerFast if _is_generic(directory) else AutoTokenizer
        tokenizer = kind.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as e:  # it raises many kinds
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise DataError(f"there is no tokenizer in {directory} that can be loaded: {reason}") from e
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"the tokenizer in {directory} has no tokenizer.json; save it in that format first")
    return tokenizer


def _is_generic(directory: Path) -> bool:
    """Whether tokenizer.json says everything, because the class beside it adds nothing."""
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_bytes()) if path.exists() and (directory / "tokenizer.json").exists() else {}
    return config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")


# --- pieces -----------------------------------------------------------------------------------------------------------------


def encode(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[list[int]]:
    """The token ids of every piece, the same wherever it stands; put together they decode to the pieces put together.

    What stands in front of a whole document (`prefix`) is not among them. DataError shows a piece that cannot be written.
    """
    cache = facts_of(tokenizer).pieces
    if new := [piece for piece in dict.fromkeys(pieces) if piece not in cache]:
        cache.update(zip(new, _encoded(tokenizer, new), strict=True))
    return [list(cache[piece]) for piece in pieces]


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids from anywhere in a document, control tokens by their names."""
    facts = facts_of(tokenizer)
    return _decoded(tokenizer, [*facts.front, *ids]).removeprefix(facts.anchor)


def prefix(tokenizer: Tokenizer) -> list[int]:
    """The tokens that a tokenizer puts in front of a document: the beginning of a sequence, a space, both or neither."""
    return list(_fronts(tokenizer)[1])


def action_tokens(tokenizer: Tokenizer, template: Template, A: int) -> tuple[tuple[int, ...], ...]:
    """The tokens of each of A action symbols.

    Raises:
      ValueError: the template has fewer symbols.
      LindmError: the tokens of one symbol are those of another, or their beginning, so a decision could not be read off (3).
    """
    symbols = [template.action_symbol(a) for a in range(A)]
    tokens = tuple(tuple(ids) for ids in encode(tokenizer, symbols))
    order = sorted(range(A), key=lambda a: tokens[a])
    for a, b in itertools.pairwise(order):  # a beginning sorts just before one of its continuations
        if tokens[b][: len(tokens[a])] == tokens[a]:
            tells = f"{symbols[a]!r} is {list(tokens[a])} and {symbols[b]!r} is {list(tokens[b])}"
            raise DataError(f"actions must have tokens of which none begins another's: with this tokenizer {tells}")
    return tokens


def facts_of(tokenizer: Tokenizer) -> Facts:
    """What is found out about a tokenizer when it is first used."""
    if (facts := _FACTS.get(tokenizer)) is None:
        controls = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(controls.values(), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        anchor, front = _found_anchor(tokenizer)
        facts = _FACTS[tokenizer] = Facts(anchor, front, controls, pattern, {})
    return facts


def _found_anchor(tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The first anchor behind which pieces are written as they stand: twice the tokens, twice the text."""
    for anchor in ANCHORS:
        front, *found = tokens_of(tokenizer, [anchor, f"{anchor}x", f"{anchor} x"])
        if all(
            ids[: len(front)] == front and _decoded(tokenizer, ids + ids[len(front) :]) == f"{anchor}{probe}{probe}"
            for probe, ids in zip(("x", " x"), found, strict=True)
        ):
            return anchor, front
    raise DataError(
        f"tokenizer must write texts piece by piece so that they can be read back; {type(tokenizer).__name__} does not"
    )


def _fronts(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What a tokenizer, left to itself, puts in front of a text's own tokens, and of the tokens of its pieces."""
    facts = facts_of(tokenizer)
    if facts.fronts is None:
        found: list[list[list[int]]] = [[], []]
        for text in ("\n", "#", "0", "x"):  # with some of them a space in front may be one token
            whole: Any = tokenizer(text, add_special_tokens=True, split_special_tokens=True, verbose=False)["input_ids"]
            for own, fronts in zip((tokens_of(tokenizer, [text])[0], _encoded(tokenizer, [text])[0]), found, strict=True):
                places = [i for i in range(len(whole)) if list(whole[i : i + len(own)]) == own]
                fronts += [list(whole[:i]) for i in places[:1]]
        if not found[0]:
            raise DataError(f"tokenizer must put its control tokens around a text; {type(tokenizer).__name__} does not")
        facts.fronts = found[0][0], (found[1] or found[0])[0]
    return facts.fronts


def tokens_of(tokenizer: Tokenizer, texts: list[str], controls: bool = False) -> list[list[int]]:
    """The tokens of whole texts, nothing added; whether names of control tokens are control tokens."""
    for text in texts:
        if text != text.encode(errors="replace").decode():
            raise DataError(f"text must be what UTF-8 can encode; got {short(text)}")
    found: Any = tokenizer(texts, add_special_tokens=False, split_special_tokens=not controls, verbose=False)["input_ids"]
    return [list(ids) for ids in found]


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _encoded(tokenizer: Tokenizer, pieces: list[str]) -> list[list[int]]:
    """Every piece behind the anchor, which is cut off, and read back."""
    facts = facts_of(tokenizer)
    cut, found = len(facts.front), []
    for piece, ids in zip(pieces, tokens_of(tokenizer, [facts.anchor + piece for piece in pieces]), strict=True):
        if control := [facts.controls[i] for i in ids[cut:] if i in facts.controls]:
            raise DataError(f"tokenizer cannot write {short(piece)}: it would become the control token {control[0]!r}")
        back = _decoded(tokenizer, ids)
        if ids[:cut] != facts.front or back != facts.anchor + piece:
            raise DataError(f"tokenizer cannot write {short(piece)}: its tokens read {short(back.removeprefix(facts.anchor))}")
        found.append(ids[cut:])
    return found


def short(text: str) -> str:
    """A text as an error message shows it."""
    return repr(text) if len(text) <= 60 else f"{text[:40]!r}...{text[-15:]!r}"


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Errors about data begin with what they are about."""
    try:
        yield
    except LindmError as e:
        raise type(e)(f"{source}: {e.message}") from e


# --- examples ---------------------------------------------------------------------------------------------------------------


def document_example(
    tokenizer: Tokenizer,
    pieces: Sequence[Piece],
    labels: Sequence[Sequence[int]],
    actions: Sequence[Sequence[int]],
    supervise: str,
    source: str,
    group: int = 0,
) -> Example:
    """A rendered document that trains its labels.

    Args:
      pieces: of `lindm.text.render`; labels: [episode][step] the oracle's actions, of the query last.
      actions: the tokens of every action, of `action_tokens`.
      supervise: all (every step of every demonstration and of the query) or query (those of the query alone).

    Raises:
      ValueError: an unknown value of supervise. LindmError: a piece cannot be written (3).
    """
    if supervise not in SUPERVISE:
        raise ValueError(f"supervise must be one of {', '.join(SUPERVISE)}; got {supervise!r}")
    with naming(source):
        ids, tokens = prefix(tokenizer), encode(tokenizer, [piece.text for piece in pieces])
    query, trained = len(labels) - 1, {}
    for piece, taken in zip(pieces, tokens, strict=True):
        if piece.action is not None and piece.step is not None and (supervise == "all" or piece.episode == query):
            for j, token in enumerate(actions[labels[piece.episode][piece.step]]):
                trained[len(ids) - 1 + j] = token  # there is text in front of every action
                if taken[j : j + 1] != [token]:
                    break
        ids += taken
    return example_of(ids, trained, source, group)


def completion_example(tokenizer: Tokenizer, prompt: str, completion: str, source: str, group: int = 0) -> Example:
    """A prompt whose completion is trained, and that it ends there.

    The prompt is encoded as a whole, with what the tokenizer puts in front: as whoever asks the trained model will encode it.
    DataError, naming the source: a text cannot be written, the tokenizer has no token that ends a sequence, or nothing would
    stand in front of the completion.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{source}: the tokenizer has no token that ends a sequence, with which a completion must end")
    with naming(source):
        (asked,), (answer,) = _encoded(tokenizer, [prompt]), _encoded(tokenizer, [completion])
        if facts_of(tokenizer).anchor:  # as a text begins, a space may be put in front of it
            (asked,) = tokens_of(tokenizer, [prompt])
        ids = _fronts(tokenizer)[0] + asked
    answer = [*answer, tokenizer.eos_token_id]
    return example_of(ids + answer, {len(ids) - 1 + j: token for j, token in enumerate(answer)}, source, group)


def example_of(ids: list[int], trained: dict[int, int], source: str, group: int) -> Example:
    """These ids with the tokens that are to be predicted after some places."""
    if -1 in trained:
        raise DataError(f"{source}: nothing stands in front of the first token that is trained")
    target = np.full(len(ids), -1, np.int32)
    target[list(trained)] = list(trained.values())
    return Example(np.array(ids, np.int32), target, source, group)


def audit(example: Example, tokenizer: Tokenizer, width: int = 2000) -> str:
    """An example for a reader: what is trained stands in [[ ]], with != and what the text has there if that is something else.

    Of a long text about `width` characters are shown, its beginning and its end. Control characters are shown by their escapes.
    """
    ids, wanted = example.ids.tolist(), [-1, *example.target.tolist()[:-1]]
    parts = []
    for (trained, _), group in itertools.groupby(
        range(len(ids)), key=lambda i: (wanted[i] >= 0, i if wanted[i] not in (-1, ids[i]) else -1)
    ):
        places = list(group)
        text, label = decode(tokenizer, [ids[i] for i in places]), decode(tokenizer, [wanted[i] for i in places if trained])
        parts.append(f"[[{text}]]" if label == text else f"[[{label} != {text}]]" if trained else text)
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in "".join(parts))
    if len(text) > width:
        half = width // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
    return f"{example.source}: {len(ids)} tokens, {sum(w >= 0 for w in wanted)} of them trained\n{text}"
