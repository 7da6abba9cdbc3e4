"""Policies by the names of `lindm eval`: those of `lindm.evaluation.policies`, and language models (icl:MODELDIR, sft:RUNDIR)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lindm.datasets import DatasetConfig
from lindm.datasets.text import check_rewards
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
      names: of `lindm.evaluation.policies.registry.POLICIES`, `icl:MODELDIR` or `sft:RUNDIR`.
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
        if given and not any(name.startswith(("icl:", "sft:")) for name in names):
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
    if kind not in ("icl", "sft", "alpha") or not path:
        raise ValueError(f"policy must be icl:MODELDIR, sft:RUNDIR or alpha:FILE where it has a colon; got {name!r}")
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
    """UsageError where a run was trained on tasks of the same suite and seed, which are the same tasks."""
    options = run_options(run) or {}
    if (trained := training_data(options)) is None:
        return  # a file, or no longer there: nothing to compare with
    same = isinstance(source, Suite) and trained.suite == json.loads(json.dumps(asdict(source)))  # one problem is always the same
    if same and trained.config.seed == dataset.seed:
        raise UsageError(f"seed must not be {dataset.seed}: {run} was trained on these tasks ({options['data']})")
