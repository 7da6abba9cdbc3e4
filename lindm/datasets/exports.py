r"""A dataset handed to other tools: prompts and conversations for TRL's SFTTrainer, transitions for Minari.

`trl` writes two JSON-lines files that SFTTrainer takes as they are (`load_dataset("json", data_files=...)`):

    prompt_completion.jsonl   {"prompt", "completion"}: a row per step of a query. The prompt is the demonstrations and the query
                              up to its next action; the completion is the symbol of the oracle's action and nothing else.
    messages.jsonl            {"messages"}: conversations. The user tells what happened, the assistant answers with an action.

The assistant's turns are the oracle's actions, whoever acted. Where the query's action is another one, what follows would be the
consequence of an action that the conversation does not contain; so the conversation ends with that answer, and the next row tells
the history as it was, in the user's first turn, and goes on from there. Every label is the answer of exactly one turn, and no
conversation contradicts itself. A query made by the oracle is one row.

Two settings of TRL matter: `max_length` (1024 tokens unless it is set) cuts rows at their end, where the answers are; and on
conversations `assistant_only_loss=True` trains the answers alone, as is always done with completions.

A text tells the state of an MDP, otherwise the observations (and the models that nature took), and the rewards unless they are
left out. Where the state is hidden, a reward may tell of it what the oracle's labels do not use: only demonstrations have them.

`minari` writes a Minari dataset, every demonstration and every query an episode of it:

    observations   MDP: the state, and S once the episode is over. POMDP: what was observed last, and O before anything was.
                   APOMDP: the same of the pair m O + o, and M O before anything was. H + 1 of them, as Minari has it.
    infos          label, Q, certificate, regret and state at every observation, at the last one, where nobody acts,
                   -1, 0, -1, 0 and -1
    metadata       of an episode: its task and its role (demo or query)

The horizon belongs to the problem, so an episode ends by termination; the stage is the number of the step.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lindm.datasets.reader import load, read_manifest
from lindm.errors import UsageError
from lindm.io import directories, files
from lindm.text import COMPACT, READABLE, Document, Piece, Step, Template, render, text
from lindm.text.grammar import TABLES, Ambiguous

FORMATS = ("trl", "minari")
SYSTEM = (
    "You are shown episodes of a decision problem, and then an episode in progress. "
    "Answer with the best next action and with nothing else."
)
NEEDS = {"mdp": ("state",), "pomdp": ("observation",), "apomdp": ("model", "observation")}

Progress = Callable[[int, int], None] | None


def export(
    directory: Path,
    to: str,
    out: Path,
    *,
    template: Template | None = None,
    rewards: bool = True,
    names: bool = False,
    system: str = SYSTEM,
    dataset_id: str | None = None,
    progress: Progress = None,
) -> list[Path]:
    """Write a finished dataset in the format of another tool; the paths of what was written.

    Args:
      to: trl or minari.
      out: a directory; what is there already is never replaced.
      template, rewards, names, system: of trl. How a document is written, whether it tells rewards, whether it uses the
        problem's names in place of the template's symbols, and the first message of a conversation (none where it is empty).
        The template is COMPACT unless it is given; with names READABLE, as COMPACT has nothing to keep words apart.
      dataset_id: of minari, such as name-v0 [default: made from the source]. Load it with `minari.load_dataset(dataset_id)` where
        MINARI_DATASETS_PATH is `out`, or with `minari.MinariDataset(out / dataset_id / "data")`.
      progress: hears (tasks done, tasks in all).

    Raises:
      ValueError: an unknown format, or an option that it has no use for; names of a dataset that has none, or that texts cannot
        be read back with; a template without a field that the problem needs, or with too few symbols.
      LindmError: the dataset is not finished or damaged (3); `out` holds what would be written, or a package is missing (2);
        `out` cannot be written (7).
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}; got {to!r}")
    if to == "minari":
        if not rewards:
            raise ValueError(f"rewards must be True for minari, which has no text to leave them out of; got {rewards!r}")
        unused = {"names": names or None, "template": template and template.name, "system": None if system == SYSTEM else system}
        for option, got in unused.items():
            if got is not None:
                raise ValueError(f"{option} must be left out for minari, which has no text; got {got!r}")
        manifest = read_manifest(directory)
        return _minari(directory, manifest, out, dataset_id or _default_id(manifest), progress)
    if dataset_id is not None:
        raise ValueError(f"dataset_id must be left out for trl, which has none; got {dataset_id!r}")
    manifest = read_manifest(directory)
    return _trl(directory, manifest, out, telling(directory, manifest, template, rewards, names), system, progress)


def named(template: Template, names: Mapping[str, Sequence[str]]) -> Template:
    """The template with the names of a problem as its symbols, where it has such symbols and the problem has names.

    Raises:
      ValueError: texts with these names could be read in two ways.
    """
    given = {part: tuple(words) for part, words in names.items() if words and getattr(template, part) is not None}
    if "actions" in given and symbol(template, 0).startswith(" "):
        given["actions"] = tuple(f" {name}" for name in given["actions"])  # a symbol brings its own leading space
    changes: dict[str, Any] = {**given}
    try:
        return dataclasses.replace(template, **changes)
    except Ambiguous as e:
        another = "a template of your own" if template == READABLE else "another template, such as readable"
        raise ValueError(f"with names {e}; try {another}") from e


def _told(directory: Path, total: int, progress: Progress) -> Iterator[tuple[dict, list[dict]]]:
    for done, pair in enumerate(load(directory)):
        if progress:
            progress(done, total)
        yield pair
    if progress:
        progress(total, total)


# --- text --------------------------------------------------------------------------------------------------------------------


class Telling(NamedTuple):
    """How the texts of a dataset are written."""

    template: Template
    shown: frozenset[str]  # the fields of a step that they tell


def telling(directory: Path, manifest: dict, template: Template | None, rewards: bool, names: bool) -> Telling:
    """How to write the texts of a dataset with this manifest; arguments and errors are those of `export`."""
    template = template or (READABLE if names else COMPACT)
    if names:
        if not manifest["config"]["names"]:
            raise ValueError(f"names must be left out: the dataset {directory} has no names; got {names!r}")
        template = named(template, manifest["config"]["names"])
    sizes = manifest["config"]["source"]["sizes"]
    shown = set(template.grammar.fields) - (set() if rewards else {"reward"})
    if missing := [field for field in NEEDS[sizes["kind"]] if field not in shown]:
        raise ValueError(f"template must have {{{missing[0]}}} in its step for this dataset; {template.name!r} has not")
    if sizes["kind"] != "mdp":
        shown -= {"state"}
    for field, part in TABLES.items():
        table, n = getattr(template, part), sizes.get(f"n_{part}", 0)
        if field in shown and isinstance(table, tuple) and len(table) < n:  # a pattern has a symbol for every index
            use = "names or a template of your own" if part in manifest["config"]["names"] else "a template of your own"
            raise ValueError(f"template {template.name!r} has {len(table)} {field} symbols and the dataset {n} {part}; use {use}")
    return Telling(template, frozenset(shown))


def document(demonstrations: Sequence[dict], query: dict, shown: frozenset[str]) -> Document:
    """What is told of rows of `load`: demonstrations and a query, every action taken.

    Where the state is hidden the query has no rewards: they could tell of the state what the oracle does not know.
    """
    of_query = shown if "state" in shown else shown - {"reward"}
    return Document(tuple(_steps(row, shown) for row in demonstrations), _steps(query, of_query))


def _trl(directory: Path, manifest: dict, out: Path, how: Telling, system: str, progress: Progress) -> list[Path]:
    sizes, total = manifest["config"]["source"]["sizes"], manifest["config"]["recipe"]["tasks"]
    symbols = [symbol(how.template, a) for a in range(sizes["n_actions"])]
    paths = [out / "prompt_completion.jsonl", out / "messages.jsonl"]
    with directories.sole_writer(out), _new_files(*paths) as (prompts, conversations):
        for _, episodes in _told(directory, total, progress):
            demos = [row for row in episodes if row["role"] == "demo"]
            for row in (row for row in episodes if row["role"] == "query"):
                pieces = render(document(demos, row, how.shown), how.template)
                for prompt, label in _questions(pieces, len(demos), row["label"]):
                    _line(prompts, {"prompt": prompt, "completion": symbols[label]})
                for turns in _conversations(pieces, len(demos), row):
                    first = [{"role": "system", "content": system}] if system else []
                    _line(conversations, {"messages": first + [_message(turn, symbols) for turn in turns]})
    return paths


def _steps(row: dict, shown: frozenset[str]) -> tuple[Step, ...]:
    columns = {field: row[field] for field in ("state", "model", "observation", "reward") if field in shown and field in row}
    return tuple(Step(action=a, **{field: x[t] for field, x in columns.items()}) for t, a in enumerate(row["action"]))


def symbol(template: Template, action: int) -> str:
    """How a template writes an action."""
    (piece,) = (p for p in render(Document(query=(Step(action=action),)), template) if p.action is not None)
    return piece.text


def _places(pieces: Sequence[Piece], query: int) -> list[int]:
    """Where the actions of the query are."""
    return [i for i, piece in enumerate(pieces) if piece.episode == query and piece.action is not None]


def _questions(pieces: Sequence[Piece], query: int, labels: Sequence[int]) -> Iterator[tuple[str, int]]:
    """For every step the text up to its action, and its label."""
    for place, label in zip(_places(pieces, query), labels, strict=True):
        yield text(pieces[:place]), label


def _conversations(pieces: Sequence[Piece], query: int, row: dict) -> Iterator[list[str | int]]:
    """The user (text) and the assistant (a label) by turns; after an action that was not the label a new conversation."""
    turns: list[str | int] = []
    since = 0
    for place, action, label in zip(_places(pieces, query), row["action"], row["label"], strict=True):
        turns += [text(pieces[since:place]), label]
        since = place + 1
        if action != label:
            yield turns
            turns, since = [], 0
    if turns:
        yield turns


def _message(turn: str | int, symbols: Sequence[str]) -> dict[str, str]:
    if isinstance(turn, str):
        return {"role": "user", "content": turn}
    return {"role": "assistant", "content": symbols[turn].strip()}  # a turn needs no space to part it from what is before


def _line(f: IO[str], row: dict) -> None:
    f.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _new_files(*paths: Path) -> Iterator[list[IO[str]]]:
    """Files of one directory that were not there before, and are there as a whole, all of them, or not at all."""
    for path in paths:
        if path.exists():
            raise UsageError(f"{path} is there already and is not replaced; choose another --out")
    # a signal may raise between any two lines: the names are known before there is a file, and kept before it gets its place
    partial = [path.with_name(f".{path.name}{files.TEMPORARY_SUFFIX}") for path in paths]
    opened: list[IO[str]] = []
    placed: list[Path] = []
    with files.storage_errors(paths[0].parent):
        try:
            for path in partial:
                opened.append(path.open("w", encoding="utf-8", newline="\n"))
            yield opened
            for f in opened:
                f.flush()
                os.fsync(f.fileno())
                f.close()
            for temporary, path in zip(partial, paths, strict=True):
                placed.append(path)
                os.replace(temporary, path)
        except BaseException:
            for f in opened:
                with contextlib.suppress(OSError):  # a full disk refuses what is in the buffer once more
                    f.close()
            for path in (*partial, *placed):
                with contextlib.suppress(OSError):
                    path.unlink()
            raise


# --- transitions -------------------------------------------------------------------------------------------------------------


def _default_id(manifest: dict) -> str:
    source = manifest["config"]["source"]
    law, sizes = source.get("suite"), source["sizes"]
    name = f"{law['name']}-{law['horizon']}-{law['split']}" if law else f"{sizes['kind']}-{sizes['horizon']}"
    return f"lindm-{re.sub(r'[^-_a-zA-Z0-9]', '-', name)}-v0"


def _minari(directory: Path, manifest: dict, out: Path, dataset_id: str, progress: Progress) -> list[Path]:
    try:
        import h5py  # noqa: F401  # pyright: ignore  (Minari's storage needs it)
        import minari
        from gymnasium.spaces import Discrete
        from minari.data_collector.episode_buffer import EpisodeBuffer
        from minari.dataset.minari_storage import MinariStorage
    except ImportError as e:
        raise UsageError(f"a Minari dataset needs minari and h5py: pip install 'lindm[minari]' ({e})") from e
    if not re.fullmatch(r"[-_a-zA-Z0-9]+-v\d+", dataset_id):
        raise ValueError(f"dataset_id must be letters, digits, - and _, and end in -v and a number; got {dataset_id!r}")
    sizes, recipe = manifest["config"]["source"]["sizes"], manifest["config"]["recipe"]
    seen = sizes["n_states"] if sizes["kind"] == "mdp" else sizes["n_observations"] * sizes.get("n_models", 1)

    def episodes() -> Iterator[Any]:
        for task, rows in _told(directory, recipe["tasks"], progress):
            for row in rows:
                where = {"task": task["task"], "role": row["role"]}
                yield EpisodeBuffer(options=where, **_transitions(row, sizes, seen))

    target, partial = out / dataset_id, out / f".{dataset_id}.lindm-partial"
    with directories.sole_writer(out), files.storage_errors(target):
        if target.exists():
            raise UsageError(f"{target} is there already and is not replaced; choose another --out or another dataset_id")
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            partial.mkdir()
            place = (partial / "data").resolve()  # Minari's get_size joins a relative path to itself
            storage = MinariStorage.new(place, Discrete(seen + 1), Discrete(sizes["n_actions"]), data_format="hdf5")
            about = f"{recipe['tasks']} tasks, of each {recipe['demos']} demonstrations (by {recipe['behavior']}) and "
            about += f"{recipe['queries']} queries (by {recipe['query_behavior']}), with the oracle's label at every step"
            facts = {"dataset_id": dataset_id, "minari_version": minari.__version__, "description": about}
            storage.update_metadata(facts | {"algorithm_name": recipe["behavior"], "made_from": manifest["seal"]})
            storage.update_episodes(episodes())
            os.replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return [target]


def _transitions(row: dict, sizes: dict, seen: int) -> dict[str, Any]:
    """One episode as Minari has it; `seen` is the index of what is no observation."""
    if sizes["kind"] == "mdp":
        observations = [*row["state"], seen]
    else:
        models = row.get("model", [0] * len(row["action"]))
        observations = [seen, *(m * sizes["n_observations"] + o for m, o in zip(models, row["observation"], strict=True))]
    H, A = len(row["action"]), sizes["n_actions"]
    infos = {
        "label": np.array([*row["label"], -1]),
        "Q": np.array([*row["Q"], [0.0] * A]),
        "certificate": np.array([*row["certificate"], -1], np.int8),
        "regret": np.array([*row["regret"], 0.0]),
        "state": np.array([*row["state"], -1]),
    }
    return {
        "observations": np.array(observations),
        "actions": np.array(row["action"]),
        "rewards": np.array(row["reward"]),
        "terminations": np.arange(H) == H - 1,
        "truncations": np.zeros(H, bool),
        "infos": infos,
    }
