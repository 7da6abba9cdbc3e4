r"""Datasets in the formats of other tools: prompts and conversations for TRL's SFTTrainer, transitions for Minari.

`trl` writes two JSON-lines files for SFTTrainer (`load_dataset("json", data_files=...)`):

    prompt_completion.jsonl   {"prompt", "completion"}: a row per step of a query. The prompt is the demonstrations and the query
                              up to its next action; the completion is the symbol of the oracle's action alone.
    messages.jsonl            {"messages"}: conversations. The user describes what happened, the assistant answers with an action.
    README.md                 data card: names of the two for `load_dataset(OUT, "messages")`, the discount, and what a reward is

Rewards in the texts are those that the environment paid, not discounted.

The assistant's turns are the oracle's actions, also where the behavior policy took another action. In that case the following
steps are not the consequence of the assistant's action. So the conversation ends there, and the next row has the history as it
was, in the user's first turn, and continues. Every label is the answer of exactly one turn, and no conversation contradicts
itself. A query made by the oracle is one row. Which fields of a step the texts show: `lindm.datasets.text`.

Two settings of TRL matter: `max_length` (default 1024 tokens) truncates rows at their end, where the answers are; on
conversations `assistant_only_loss=True` trains the answers alone, as is always done with completions.

`minari` writes a Minari dataset with every demonstration and every query as an episode:

    observations   H + 1 of them. MDP: the state, and S once the episode is over. POMDP: the last observation, and O before the
                   first one. APOMDP: the same of the pair m O + o, and M O before the first one.
    rewards        that the environment paid, not discounted
    infos          label, Q, certificate, regret, state and discounted_mean_reward at every observation; at the last one, where
                   there is no action, -1, 0, -1, 0, -1 and 0
    metadata       of an episode: its task and its role (demo or query); of the dataset: discount and rewards (what they mean)

The horizon belongs to the problem, so an episode ends by termination; the stage is the number of the step.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np

from lindm.choices import ExportFormat, Rewards
from lindm.datasets.card import CARD, MINARI_REWARDS, trl_card
from lindm.datasets.columns import Episode, Task
from lindm.datasets.reader import Dataset
from lindm.datasets.text import TextFormat, text_format
from lindm.errors import UsageError, unknown
from lindm.io import directories, files, temporaries
from lindm.io.verification import FILES_FORMAT, MANIFEST, add_to_file_list, read_manifest, verify_file_list, write_file_list
from lindm.text import Piece, Template, text

FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
SYSTEM = (
    "You are shown episodes of a decision problem, and then an episode in progress. "
    "Answer with the best next action and with nothing else."
)

Progress = Callable[[int, int], None]


def export(
    directory: Path,
    to: ExportFormat,
    out: Path,
    *,
    template: str | Template | None = None,
    rewards: Rewards = "shown",
    names: bool = False,
    system: str = SYSTEM,
    dataset_id: str | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Path]:
    """Write a finished dataset in the format of another tool; the paths of the new files.

    Args:
      to: trl or minari.
      out: a directory; existing files are never replaced. An export that is there already, in whole or in part, is completed.
      template, rewards, names: of trl, as in `text_format`.
      system: of trl, the first message of a conversation (none where it is empty).
      dataset_id: of minari, such as name-v0 [default: made from the source]. Load it with `minari.load_dataset(dataset_id)` where
        MINARI_DATASETS_PATH is `out`, or with `minari.MinariDataset(out / dataset_id / "data")`.
      progress: called with (tasks done, tasks in all).

    Raises:
      ValueError: an unknown format, an option that does not apply to it, or an error of `text_format`.
      DataError: the dataset is not finished or damaged.
      UsageError: a file to be written exists, or a package is missing.
      StorageError: `out` cannot be written.
    """
    if to not in FORMATS:
        raise ValueError(unknown("to", to, FORMATS))
    if to == "minari":
        if rewards != "shown":
            raise ValueError(f"rewards must be left out for minari, which has no text; got {rewards!r}")
        name = template.name if isinstance(template, Template) else template
        unused = {"names": names or None, "template": name, "system": None if system == SYSTEM else system}
        for option, got in unused.items():
            if got is not None:
                raise ValueError(f"{option} must be left out for minari, which has no text; got {got!r}")
        dataset = Dataset(directory)
        return _minari(dataset, out, dataset_id or _default_id(dataset), progress)
    if dataset_id is not None:
        raise ValueError(f"dataset_id must be left out for trl, which has none; got {dataset_id!r}")
    dataset = Dataset(directory)
    return _trl(dataset, out, text_format(dataset, template, rewards, names), system, progress)


def _with_progress(dataset: Dataset, progress: Progress) -> Iterator[Task]:
    for done, task in enumerate(dataset):
        progress(done, len(dataset))
        yield task
    progress(len(dataset), len(dataset))


# --- text --------------------------------------------------------------------------------------------------------------------


def _trl(dataset: Dataset, out: Path, how: TextFormat, system: str, progress: Progress) -> list[Path]:
    symbols = [how.template.action_symbol(a) for a in range(dataset.num_actions)]
    paths = [out / "prompt_completion.jsonl", out / "messages.jsonl", out / CARD]
    with directories.sole_writer(out):
        if (out / MANIFEST).exists():
            read_manifest(out, FILES_FORMAT)  # that of another export, which this one is added to
        with _new_files(*paths) as (prompts, conversations, about):
            about(trl_card(dataset.discount, "reward" in how.fields))
            for task in _with_progress(dataset, progress):
                number = len(task.demonstrations)
                for query in task.queries:
                    pieces = how.pieces(task, query)
                    for prompt, label in _prompts(pieces, number, query.label):
                        prompts(_line({"prompt": prompt, "completion": symbols[label]}))
                    for turns in _conversations(pieces, number, query):
                        first = [{"role": "system", "content": system}] if system else []
                        conversations(_line({"messages": first + [_message(turn, symbols) for turn in turns]}))
        add_to_file_list(out, [path.name for path in paths])
    return paths


def _action_places(pieces: Sequence[Piece], query: int) -> list[int]:
    """Indices of the pieces that are actions of the query, which is episode number `query`."""
    return [i for i, piece in enumerate(pieces) if piece.episode == query and piece.action is not None]


def _prompts(pieces: Sequence[Piece], query: int, labels: Sequence[int]) -> Iterator[tuple[str, int]]:
    """For every step the text up to its action, and its label."""
    for place, label in zip(_action_places(pieces, query), labels, strict=True):
        yield text(pieces[:place]), label


def _conversations(pieces: Sequence[Piece], query: int, episode: Episode) -> Iterator[list[str | int]]:
    """Turns of the user (text) and of the assistant (a label); a new conversation after an action that was not the label."""
    turns: list[str | int] = []
    since = 0
    for place, action, label in zip(_action_places(pieces, query), episode.action, episode.label, strict=True):
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
    return {"role": "assistant", "content": symbols[turn].strip()}  # a turn needs no space in front


def _line(row: dict) -> str:
    return files.strict_json(row, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _new_files(*paths: Path) -> Iterator[list[Callable[[str], None]]]:
    """Functions that each add text to a new file; the files of one directory get their names together at the end.

    After an error none of the new files exists. A killed export may leave some of them: a file that exists must be what would be
    written, and then it stays.

    Raises:
      UsageError: a file exists and has other content.
      StorageError: the disk is full or not writable.
    """
    with files.storage_errors(paths[0].parent), contextlib.ExitStack() as stack:
        opened: dict[Path, IO[bytes]] = {}
        new: list[Path] = []
        for path in paths:
            if path.exists():
                opened[path] = stack.enter_context(path.open("rb"))
            else:
                fd = stack.enter_context(temporaries.temporary_file(path))
                opened[path] = os.fdopen(fd, "wb", closefd=False)
                new.append(path)

        def check(path: Path, same: bool) -> None:
            if not same:
                raise UsageError(f"{path} already exists with other content and is not replaced; choose another --out")

        def write(path: Path, text: str) -> None:
            data = text.encode()
            if path in new:
                opened[path].write(data)
            else:
                check(path, opened[path].read(len(data)) == data)

        yield [functools.partial(write, path) for path in paths]
        for path, f in opened.items():
            if path in new:
                f.flush()
                os.fsync(f.fileno())
            else:
                check(path, not f.read(1))
        placed: list[Path] = []
        try:
            for path in new:
                placed.append(path)  # before it gets its name: a signal may raise between any two lines
                os.replace(temporaries.temporary_path(path), path)
        except BaseException:
            for path in placed:
                path.unlink(missing_ok=True)
            raise


# --- transitions -------------------------------------------------------------------------------------------------------------


def _default_id(dataset: Dataset) -> str:
    suite = dataset.suite
    name = f"{suite['name']}-{suite['horizon']}-{suite['split']}" if suite else f"{dataset.kind}-{dataset.horizon}"
    return f"lindm-{re.sub(r'[^-_a-zA-Z0-9]', '-', name)}-v0"


def _minari(dataset: Dataset, out: Path, dataset_id: str, progress: Progress) -> list[Path]:
    try:
        import h5py  # noqa: F401  # pyright: ignore  (Minari's storage needs it)
        import minari
        from gymnasium.spaces import Discrete
        from minari.data_collector.episode_buffer import EpisodeBuffer
        from minari.dataset.minari_storage import MinariStorage
    except ImportError as e:
        raise UsageError(f"a Minari dataset needs minari and h5py: pip install -e '.[minari]' ({e})") from e
    if not re.fullmatch(r"[-_a-zA-Z0-9]+-v\d+", dataset_id):
        raise ValueError(f"dataset_id must be letters, digits, - and _, and end in -v and a number; got {dataset_id!r}")
    config = dataset.config
    num_seen = dataset.num_states if dataset.kind == "mdp" else dataset.num_observations * max(dataset.num_models, 1)

    def episodes() -> Iterator[Any]:
        for task in _with_progress(dataset, progress):
            for episode in task.episodes:
                where = {"task": task.task, "role": episode.role}
                yield EpisodeBuffer(options=where, **_transitions(episode, dataset, num_seen))

    target = out / dataset_id
    with directories.sole_writer(out):
        if target.exists():
            if _made_from(target) != dataset.checksum:
                raise UsageError(f"{target} already exists and is not replaced; choose another --out or another dataset_id")
            verify_file_list(target, required=True)
            return [target]
        with directories.atomic_directory(target) as temporary, files.storage_errors(target):
            place = (temporary / "data").resolve()  # Minari's get_size joins a relative path to itself
            storage = MinariStorage.new(place, Discrete(num_seen + 1), Discrete(dataset.num_actions), data_format="hdf5")
            about = f"{config.tasks} tasks, of each {config.demos} demonstrations (by {config.behavior}) and "
            about += f"{config.queries} queries (by {config.query_behavior}), with the oracle's label at every step"
            facts = {"dataset_id": dataset_id, "minari_version": minari.__version__, "description": about}
            facts |= {"algorithm_name": config.behavior, "made_from": dataset.checksum}
            storage.update_metadata(facts | {"discount": dataset.discount, "rewards": MINARI_REWARDS})
            storage.update_episodes(episodes())
            write_file_list(temporary)
    return [target]


def _made_from(dataset: Path) -> str | None:
    """Checksum of the dataset that a Minari dataset was made from; None where it is another one or damaged."""
    try:
        return json.loads((dataset / "data" / "metadata.json").read_bytes()).get("made_from")
    except (OSError, ValueError, AttributeError):
        return None


def _transitions(episode: Episode, dataset: Dataset, num_seen: int) -> dict[str, Any]:
    """One episode as Minari has it; `num_seen` is the index that stands for no observation."""
    if dataset.kind == "mdp":
        observations = [*episode.state, num_seen]
    else:
        assert episode.observation is not None
        models = episode.model or [0] * len(episode.action)
        pairs = zip(models, episode.observation, strict=True)
        observations = [num_seen, *(m * dataset.num_observations + o for m, o in pairs)]
    H, A = len(episode.action), dataset.num_actions
    infos = {
        "label": np.array([*episode.label, -1]),
        "Q": np.array([*episode.Q, [0.0] * A], float),
        "certificate": np.array([*episode.certificate, -1], np.int8),
        "regret": np.array([*episode.regret, 0.0]),
        "state": np.array([*episode.state, -1]),
        "discounted_mean_reward": np.array([*episode.discounted_mean_reward, 0.0]),
    }
    return {
        "observations": np.array(observations),
        "actions": np.array(episode.action),
        "rewards": np.array(episode.reward),
        "terminations": np.arange(H) == H - 1,
        "truncations": np.zeros(H, bool),
        "infos": infos,
    }
