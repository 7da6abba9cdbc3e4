"""Policies by the names of `lindm eval`: those of `lindm.evaluation.policies`, and models (base:MODELDIR, sft:RUNDIR)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lindm.datasets import Dataset, DatasetConfig
from lindm.datasets.columns import sizes_of
from lindm.datasets.text import check_rewards
from lindm.datasets.writer import source_identity
from lindm.errors import DataError, UsageError
from lindm.evaluation.policies.alpha_vectors import AlphaVectors
from lindm.evaluation.policies.registry import check_name, make_policy
from lindm.evaluation.policy import Policy
from lindm.families.registry import NamedProblem
from lindm.families.suites import Suite
from lindm.io.verification import verify_file_list
from lindm.llm.policy import load_policy, model_directory, training_data
from lindm.llm.sft.options import run_options
from lindm.problems.stationary import from_pomdp
from lindm.types import POMDP, Problem


class PoliciesByName(Mapping[str, Policy]):
    """The policies of `lindm eval` by name; a language model is read each time it is looked up, and not kept here.

    Args:
      names: of `lindm.evaluation.policies.registry.POLICIES`, `base:MODELDIR` or `sft:RUNDIR`.
      source, dataset: of the tasks.
      template, rewards: of language models' texts, as of `load_policy`.

    Raises:
      ValueError: a name that no policy of such tasks has, twice the same, or an option without a language model.
      DataError: a model that is not there, or is damaged. UsageError: a run that was trained on these very tasks.
    """

    def __init__(
        self,
        names: Sequence[str],
        source: Suite | NamedProblem | Problem,
        dataset: DatasetConfig,
        *,
        template: str | None = None,
        rewards: str | None = None,
    ):
        self.source = source
        self.names, self.dataset = tuple(names), dataset
        self.options: dict[str, Any] = {"template": template, "rewards": rewards}
        for name in names:
            check_policy(name, source)
            if name.startswith("sft:"):
                check_not_trained_on(Path(name.removeprefix("sft:")), source, dataset)
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ValueError(f"policy must be given once; got {twice[0]!r} twice")
        if rewards is not None:
            check_rewards(rewards)
        given = [(option, value) for option, value in self.options.items() if value is not None]
        if given and not any(name.startswith(("base:", "sft:")) for name in names):
            raise ValueError(f"{given[0][0]} must be left out without a language model; got {given[0][1]!r}")

    def __getitem__(self, name: str) -> Policy:
        if name not in self.names:
            raise KeyError(name)
        return policy_by_name(name, self.source, self.dataset, **self.options)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def check_policy(name: str, source: Suite | NamedProblem | Problem | None) -> None:
    """Raise an error unless tasks of a source have a policy of this name. Without a source only language models are policies.

    Raises:
      ValueError: there is no such policy. DataError: the model is not there, or is damaged.
    """
    kind, colon, path = name.partition(":")
    if not colon:
        if source is None:
            raise ValueError(f"PROBLEM must be given for the policy {name!r}, which computes from it")
        return check_name(name, source)
    if kind not in ("base", "sft", "alpha") or not path:
        hint = "; a model without training is base:MODELDIR" if kind == "icl" else ""
        raise ValueError(f"policy must be base:MODELDIR, sft:RUNDIR or alpha:FILE where it has a colon; got {name!r}{hint}")
    if kind == "alpha":
        _alpha_vectors(name, source)
        return
    if kind == "sft" and run_options(Path(path)) is None:
        raise DataError(f"policy {name}: {path} holds no run of `lindm sft`")
    try:
        verify_file_list(model_directory(Path(path)))  # before tasks are made, which can take minutes
    except DataError as e:
        raise DataError(f"policy {name}: {e.message}") from e


def policy_by_name(
    name: str,
    source: Suite | NamedProblem | Problem | None,
    dataset: DatasetConfig,
    *,
    template: str | None = None,
    rewards: str | None = None,
    temperature: float = 0.0,
) -> Policy:
    """The policy of this name; a language model is read. Options as of `load_policy`, errors as of `check_policy`."""
    check_policy(name, source)
    if name.startswith("alpha:"):
        return _alpha_vectors(name, source)
    if path := name.partition(":")[2]:
        return load_policy(path, name=f"policy {name}", template=template, rewards=rewards, temperature=temperature)
    assert source is not None
    return make_policy(name, source, dataset)


def _alpha_vectors(name: str, source: Suite | NamedProblem | Problem | None) -> AlphaVectors:
    problem = source.problem if isinstance(source, NamedProblem) else source
    if not isinstance(problem, POMDP):
        raise ValueError(f"PROBLEM must be one POMDP, as of a .pomdp file, for the policy {name!r}")
    return AlphaVectors.read(Path(name.removeprefix("alpha:")), from_pomdp(problem))


def check_not_trained_on(run: Path, source: Suite | NamedProblem | Problem, dataset: DatasetConfig) -> None:
    """UsageError where a run was trained on tasks of the same suite or problem and seed, which have the same demonstrations."""
    options = run_options(run) or {}
    if (trained := training_data(run, options)) is None:
        return  # a file, or no longer there: nothing to compare with
    if _identity(source) == _trained_identity(trained) and trained.config.seed == dataset.seed:
        raise UsageError(f"seed must not be {dataset.seed}: {run} was trained on these tasks ({trained.directory})")


def training_notes(name: str, trained: Dataset | None, source: Suite | NamedProblem | Problem | Dataset | None) -> list[str]:
    """In what the problem of a question or an evaluation differs from the training data of a language model; a sentence each.

    Tasks of the other split of the same suite are no other problem: they are what a model is tested on.

    Args:
      name: of the policy.
      trained: the data; None where it is not known.
    """
    if trained is None or source is None:
        return []
    sizes, names = _about(source)
    own_sizes, own_names = _about(trained)
    different = [f"{part} {own_sizes.get(part)}, here {sizes.get(part)}" for part in sizes if own_sizes.get(part) != sizes[part]]
    different += [
        f"{part} {_some(own_names.get(part))}, here {_some(names.get(part))}"
        for part in ("states", "actions", "observations", "models")
        if own_sizes.get(f"num_{part}") == sizes.get(f"num_{part}") and own_names.get(part) != names.get(part)
    ]
    if not different and (own := _trained_identity(trained)) != (here := _identity(source)):
        suites = [identity.get("suite", {}) for identity in (own, here)]
        if all(suites):
            options = [key for key in suites[0] | suites[1] if key != "split" and suites[0].get(key) != suites[1].get(key)]
            different = [f"{key} {suites[0].get(key)}, here {suites[1].get(key)}" for key in options]
        else:
            kinds = [f"the suite {suite['name']}" if suite else "one problem" for suite in suites]
            different = [f"{kinds[0]}, here {kinds[1] if kinds[0] != kinds[1] else 'another one, with other numbers'}"]
    return [f"{name} was trained on another problem ({trained.directory}): {'; '.join(different)}"] if different else []


def text_notes(name: str, template: str | None, rewards: str | None) -> list[str]:
    """In what the texts of a question differ from those of the training of a run of `lindm sft`; None: they do not."""
    trained = run_options(Path(name.removeprefix("sft:"))) or {}
    given = {"template": template, "rewards": rewards}
    different = [
        f"{option} {trained.get(option) or 'of lindm sft'}, here {value}"
        for option, value in given.items()
        if value is not None and trained.get(option) != value
    ]
    return [f"{name} was trained on other texts: {'; '.join(different)}"] if different else []


def _about(source: Suite | NamedProblem | Problem | Dataset) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Kind, horizon and sizes, and names."""
    if isinstance(source, Dataset):
        return {**source.description["source"]["sizes"]}, {part: list(words) for part, words in source.names.items()}
    names = source.names if isinstance(source, Suite | NamedProblem) else {}
    problem = source.problem if isinstance(source, NamedProblem) else source.example if isinstance(source, Suite) else source
    return sizes_of(problem), {part: list(words) for part, words in names.items()}


def _some(words: Sequence[str] | None) -> str:
    return "without names" if not words else " ".join(words[:4]) + (" ..." if len(words) > 4 else "")


def _identity(source: Suite | NamedProblem | Problem | Dataset) -> dict[str, Any]:
    if isinstance(source, Dataset):
        return _trained_identity(source)
    identity = source_identity(source.problem if isinstance(source, NamedProblem) else source)
    return json.loads(json.dumps(identity))


def _trained_identity(trained: Dataset) -> dict[str, Any]:
    source = trained.description["source"]
    return json.loads(json.dumps({key: source[key] for key in ("suite", "problem") if key in source}))
