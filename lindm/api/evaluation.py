"""The comparison of policies on new tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lindm import validate
from lindm.api.problems import as_source
from lindm.choices import Behavior
from lindm.datasets import DatasetConfig
from lindm.errors import OccupiedError, UsageError
from lindm.evaluation import EVAL_FORMAT, compare
from lindm.evaluation.compare import SEED, PolicyResult
from lindm.evaluation.optimality_gap import MAX_HISTORIES
from lindm.evaluation.policies.bayes_policies import Bayes
from lindm.evaluation.policies.registry import default_policies
from lindm.evaluation.reliability import draw_reliability
from lindm.families.registry import NamedProblem
from lindm.families.suites import Suite
from lindm.figures.style import FORMATS, save
from lindm.io import directories, files, manifest, verification
from lindm.llm.named_policies import PoliciesByName
from lindm.types import LinearMDP, Problem

EVAL = "eval.json"
POSTERIOR_SEEDS = 3


def evaluate(
    problem: Suite | NamedProblem | Problem | LinearMDP,
    policies: Mapping[str, Any] | Sequence[str] = (),
    *,
    tasks: int = 50,
    demos: int = 5,
    behavior: Behavior = "oracle",
    epsilon: float = 0.2,
    seed: int = SEED,
    episodes: int = 8,
    effort: int | None = None,
    max_histories: int = MAX_HISTORIES,
    posterior_seeds: int | None = None,
    template: str | None = None,
    rewards: str | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_result: Callable[[PolicyResult], None] = lambda result: None,
) -> dict[str, PolicyResult]:
    """Evaluate policies on new tasks by their normalized optimality gap (0 = optimal, 1 = uniformly random policy).

    Args:
      problem: a suite, whose tasks are different problems, or one problem.
      policies: policies by name, or names of `policies.POLICIES`, base:MODELDIR or sft:RUNDIR. A policy has `init` and `step`,
        or is a function of demonstrations and history. [default: all policies that apply to the problem and are cheap]
      tasks, demos: number of tasks, and of demonstrations per task.
      behavior, epsilon: behavior policy of the demonstrations.
      seed: seed of the tasks. It must differ from the seed of the data that a model was trained on.
      episodes: number of sampled episodes for a task with too many histories for an exact evaluation.
      effort: effort of the bounds of V*, as in `ld.solve`, for a problem that is too large for an exact solution.
      max_histories: maximum number of histories per stage for an exact evaluation. If a policy reaches more, episodes are
        sampled; in an ambiguous problem the policy then has no value. Policies that are cheap to step have no limit if Q* is
        known.
      posterior_seeds: number of independent samples of a Bayes policy whose posterior is sampled. The gap is that of the first
        sample. Its standard error due to the sample is the standard deviation over all samples, and unknown with 1. [default:
        3]
      template, rewards: text template and rewards for language models given by name. [default: as in the training]
      data: directory of the tasks; they are made there if they are missing. It also keeps the losses of named policies that
        are not language models, so that another evaluation on these tasks does not compute them again. [default: `data` in
        out]
      out: directory for the tasks, eval.json and, if a policy is not deterministic, calibration.png, .pdf and .svg. [default:
        nothing is kept]
      progress: called with (tasks made, tasks in all); on_result: called with every result.

    Returns:
      The result of each policy: `.gap`, its confidence interval `.ci`, `.suboptimality` in units of reward, `.action_agreement`,
      `.method`, the `.difference` to the first policy, the `.calibration` of its probabilities and others.

    Raises:
      UsageError: `data` holds other tasks; `out` holds another evaluation, or something else that lindm wrote.
      ValueError: a policy that the problem does not have; an argument out of range; an ambiguous problem with illegal actions and
        more histories than fit in memory.

    >>> tiger = ld.read_pomdp("tiger.pomdp", horizon=3)
    >>> listen = lambda demonstrations, history: 0
    >>> results = ld.evaluate(tiger, {"qmdp": ld.policies.qmdp(), "always listen": listen}, tasks=2, demos=1)
    >>> [(name, result.gap < 0.5, result.method) for name, result in results.items()]
    [('qmdp', True, 'exact'), ('always listen', True, 'exact')]
    """
    validate.count(episodes, "episodes")
    validate.count(max_histories, "max_histories")
    if posterior_seeds is not None:
        validate.count(posterior_seeds, "posterior_seeds")
    if effort is not None:
        validate.count(effort, "effort")
    source = problem if isinstance(problem, Suite) else as_source(problem)
    dataset = DatasetConfig(tasks=tasks, demos=demos, behavior=behavior, epsilon=epsilon, seed=seed)
    if isinstance(policies, str) or (not isinstance(policies, Mapping) and not all(isinstance(p, str) for p in policies or ())):
        raise ValueError(f'policies must be a list of names, or policies by name, such as {{"mine": policy}}; got {policies!r}')
    if not isinstance(policies, Mapping):
        policies = PoliciesByName(policies or default_policies(source), source, dataset, template=template, rewards=rewards)
    if posterior_seeds is not None and not _has_sample(policies):
        rule = "must be left out without a Bayes policy whose posterior is a sample"
        raise ValueError(f"posterior_seeds {rule}; got {posterior_seeds}")
    posterior_seeds = POSTERIOR_SEEDS if posterior_seeds is None else posterior_seeds
    arguments = {"dataset": dataset, "episodes": episodes, "effort": effort, "max_histories": max_histories}
    arguments |= {"posterior_seeds": posterior_seeds, "progress": progress, "on_result": on_result}
    data = None if data is None else Path(data)
    if data is not None and out is not None and data.absolute() == Path(out).absolute():
        raise UsageError(f"data must be another directory than out; got {data} for both")
    if data is not None and out is not None and Path(out).resolve().is_relative_to(data.resolve()):
        raise UsageError(f"out must not be inside of data, which holds a dataset alone; got {out} in {data}")
    if out is None:
        results = compare.evaluate(source, policies, data=data, **arguments)
    else:
        options = {"policies": list(policies), "episodes": episodes, "effort": effort, "template": template, "rewards": rewards}
        options = {**asdict(dataset), **options} | ({} if max_histories == MAX_HISTORIES else {"max_histories": max_histories})
        options |= {} if posterior_seeds == POSTERIOR_SEEDS else {"posterior_seeds": posterior_seeds}
        with directories.sole_writer(out := Path(out)):
            _check_same_evaluation(out, options)
            results = compare.evaluate(source, policies, data=data or out / "data", **arguments)
            files.write_json(out / EVAL, {"rows": [asdict(result) for result in results]}, format=EVAL_FORMAT)
            figures = _write_figures(out, results)
            tasks_made = [] if data else ["data/manifest.json"]
            manifest.write_manifest(out, [EVAL, *figures, *tasks_made], options=options)
    return {result.policy: result for result in results}


def _has_sample(policies: Mapping[str, Any]) -> bool:
    """Whether one of the policies has a sampled posterior; language models are not read."""
    given = (policies[name] for name in policies if not (isinstance(policies, PoliciesByName) and ":" in name))
    return any(isinstance(policy, Bayes) and policy.has_sample for policy in given)


def _check_same_evaluation(out: Path, options: Mapping[str, Any]) -> None:
    """OccupiedError where a directory holds another evaluation, or something else that lindm wrote."""
    directories.require_kind(out, EVAL, "an evaluation")
    if not (out / verification.MANIFEST).exists():
        return
    old = verification.read_manifest(out, manifest.FORMAT).get("options", {})
    if changed := [f"{key} was {old.get(key)!r} and is now {value!r}" for key, value in options.items() if old.get(key) != value]:
        raise OccupiedError(f"{out} holds another evaluation: {'; '.join(changed)}; choose another --out")


def _write_figures(out: Path, results: Sequence[PolicyResult]) -> list[str]:
    """Draw the calibration of the policies that are not deterministic; the names of the files."""
    found = {one.policy: one.calibration for one in results if one.calibration is not None and not one.calibration.deterministic}
    names = [f"calibration{ending}" for ending in FORMATS] if found else []
    return [save(partial(draw_reliability, found), out / name).name for name in names]
