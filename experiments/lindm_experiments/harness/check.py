"""`lindm check`: verify whatever lindm wrote, from its files alone. Nothing is written or repaired.

Every kind of directory has a function in `CHECKS` that gives the state of a directory and the problems in it: each SHA-256, each
line with a checksum, each file that should be there, and how what is missing or damaged can be had again.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lindm.errors import DataError, LindmError, UsageError
from lindm.io import files, inputs, limits, manifest, provenance, verification
from lindm.io.verification import MANIFEST, PROVENANCE
from lindm_experiments.harness.report import VERDICTS_FORMAT
from lindm_experiments.harness.tasks import RUN_FORMAT

AGAIN = "the same command writes it again"
OVER = "start over with --fresh, or take it from a copy"
COMPLETE_RECORDS = "remove what is damaged, and the same command measures its points again"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is missing or damaged."""

    what: str  # names the file, and the line where there is one
    repair: str
    no_checkpoint: bool = False  # a training run has checkpoints, and none of them can be used


@dataclass(frozen=True, kw_only=True)
class CheckedDirectory:
    """A directory (or a file of a solution) that was verified."""

    path: Path
    kind: str
    state: str
    problems: list[Problem] = field(default_factory=list)


Check = Callable[[Path, list[Problem]], str]  # appends to the problems; the state of the directory, in a few words


def check(*directories: str | Path) -> list[CheckedDirectory]:
    """Verify what lindm wrote: runs, checkpoints, models, datasets, verifications, evaluations, reports, exports, solutions,
    estimated models.

    Args:
      directories: written by a command or a function of lindm, or directories that contain such directories; or files of
        `Solution.save` and `lindm estimate`.

    Returns:
      Each directory with its kind, its state, and its `problems`: what is missing or damaged, and how it can be had again.

    Raises:
      UsageError: no directory is given, or another process is writing one.
      DataError: a directory does not exist or has nothing that lindm wrote.

    >>> [(checked.path.name, checked.kind, checked.problems) for checked in ld.check("data", "run")]
    [('data', 'dataset', []), ('run', 'training run', [])]
    """
    if not directories:
        raise UsageError("DIR must be given: a directory that lindm wrote, or one that contains such directories")
    checked = []
    for top in map(Path, directories):
        found = list(_find(top))
        if not found:
            raise DataError(f"{top} {'contains nothing that lindm wrote' if top.exists() else 'does not exist'}")
        for path, kind in found:
            _require_no_writer(path)
            problems: list[Problem] = []
            state = CHECKS[kind](path, problems)
            checked.append(CheckedDirectory(path=path, kind=kind, state=state, problems=problems))
    return checked


def _find(path: Path) -> Iterator[tuple[Path, str]]:
    """The outermost directories (or solutions) at or below a path that lindm wrote, with their kinds."""
    if (kind := kind_of(path)) is not None:
        yield path, kind
    elif path.is_dir():
        for child in sorted(path.iterdir()):
            if not child.name.startswith("."):
                yield from _find(child)


def kind_of(path: Path) -> str | None:
    """The kind of a directory, by formats in its files and by names of files, so that one damaged file does not hide it."""
    if path.is_file():
        is_policy = path.suffix == ".json" and _policy_format(path) is not None
        if path.suffix == ".pomdp":
            from lindm.estimation import model_file

            return "estimated model" if model_file.is_estimate(path) else None
        return "solution" if path.suffix == ".npz" else "policy" if is_policy else None
    if not path.is_dir():
        return None
    names = {p.name for p in path.iterdir()}
    formats = " ".join(_format(path / name) for name in ("config.json", MANIFEST))
    has_weights = any(name.endswith(".safetensors") for name in names)
    signs = {
        "experiment run": "records.jsonl" in names or "lindm-run-" in formats,
        "verification": "verdicts.json" in names,
        "evaluation": "eval.json" in names,
        "training run": bool({"checkpoints", "metrics.jsonl"} & names) or "lindm-sft-" in formats,
        "dataset": "progress.jsonl" in names or any(n.startswith("tasks-") for n in names) or "lindm-dataset-" in formats,
        "checkpoint": "progress.json" in names or "lindm-checkpoint-" in formats,
        "model": has_weights,
        "data export": "lindm-files-" in formats or "prompt_completion.jsonl" in names,
        "report": {"index.html", "tables"} <= names or "lindm-manifest-" in formats,
    }
    return next((kind for kind, sign in signs.items() if sign), None)


def _format(path: Path) -> str:
    """The format that a JSON file says it has; empty where it says none."""
    try:
        content = json.loads(path.read_bytes())
        return str(content.get("format") or content["config"]["format"])
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return ""


def _require_no_writer(path: Path) -> None:
    """UsageError where another process is writing the directory: its files change while they are read."""
    if not path.is_dir():
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UsageError(f"{path} is being written by another process: check it when that has ended") from e
    finally:
        os.close(fd)  # the lock ends here: a check of hours must not keep a writer from starting


# --- parts of several kinds --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _noted(problems: list[Problem], repair: str) -> Iterator[None]:
    """An error of the block becomes a problem."""
    try:
        yield
    except LindmError as e:
        problems.append(Problem(what=e.message, repair=repair))
    except OSError as e:
        problems.append(Problem(what=f"cannot read {e.filename}: {e.strerror}", repair=repair))


def _check_outputs(path: Path, problems: list[Problem], format: str, repair: str, skip: Sequence[str] = ()) -> bool:
    """Verify the files in the manifest of a directory but those to skip; whether there is a manifest."""
    if not (path / MANIFEST).exists():
        return False
    with _noted(problems, f"remove it, and {AGAIN}"):
        outputs = verification.read_manifest(path, format)["outputs"]
        damaged = verification.find_damage(path, {name: digest for name, digest in outputs.items() if name not in skip})
        problems += [Problem(what=str(damage), repair=repair) for damage in damaged]
    return True


def _check_provenance(path: Path, problems: list[Problem]) -> None:
    if (path / PROVENANCE).exists():
        with _noted(problems, "remove it"):
            files.read_json(path / PROVENANCE, format=provenance.FORMAT)


# --- the kinds ---------------------------------------------------------------------------------------------------------------


def check_experiment_run(path: Path, problems: list[Problem]) -> str:
    with _noted(problems, OVER):
        files.read_json(path / "config.json", format=RUN_FORMAT)
    count = 0
    with _noted(problems, COMPLETE_RECORDS):
        count = len(files.read_json_lines(path / "records.jsonl"))
        manifest.verify_output(path, "records.jsonl")
    with _noted(problems, "remove what is damaged: it holds the times of the points alone"):
        files.read_json_lines(path / "metrics.jsonl")
    if (path / "verdicts.json").exists():
        with _noted(problems, AGAIN):
            files.read_json(path / "verdicts.json", format=VERDICTS_FORMAT)
    read = ("config.json", "records.jsonl")
    finished = _check_outputs(path, problems, manifest.FORMAT, repair=f"`lindm plot`, or {AGAIN}", skip=read)
    return f"{'finished' if finished else 'not finished'}, {count} records"


def check_verification(path: Path, problems: list[Problem]) -> str:
    with _noted(problems, AGAIN):
        files.read_json(path / "verdicts.json", format=VERDICTS_FORMAT)
    finished = _check_outputs(path, problems, manifest.FORMAT, repair=AGAIN, skip=["verdicts.json"])
    runs = [child for child in sorted(path.iterdir()) if kind_of(child) == "experiment run"]
    for run in runs:
        check_experiment_run(run, problems)
    return f"{'finished' if finished else 'not finished'}, {len(runs)} experiments"


def check_training_run(path: Path, problems: list[Problem]) -> str:
    from lindm.llm.sft import checkpoints
    from lindm.llm.sft.metrics import METRICS
    from lindm.llm.sft.options import RUN_FORMAT as SFT_FORMAT

    with _noted(problems, OVER):
        files.read_json(path / "config.json", format=SFT_FORMAT)
    with _noted(problems, f"remove {METRICS} and {MANIFEST}: the run goes on from its last checkpoint without earlier records"):
        files.read_json_lines(path / METRICS)
        manifest.verify_output(path, METRICS)
    steps = checkpoints.checkpoint_steps(path / "checkpoints")
    usable = [step for step in steps if _check_checkpoint(path / "checkpoints", step, problems)]
    if steps and not usable:
        problems.append(
            Problem(what=f"{path / 'checkpoints'} has no usable checkpoint", repair="start over with --fresh", no_checkpoint=True)
        )
    for step in checkpoints.checkpoint_steps(path / "best"):
        _check_checkpoint(path / "best", step, problems)
    for name in ("model", "adapter"):
        if (path / name).is_dir():
            with _noted(problems, f"remove {path / name}, and the same command writes it again from its checkpoint"):
                verification.verify_file_list(path / name, required=True)
    read = ("config.json", METRICS)
    finished = _check_outputs(path, problems, manifest.FORMAT, repair=AGAIN, skip=read)
    saved = f"{len(usable)} of {len(steps)} checkpoints usable" if steps else "no checkpoint"
    return f"{'finished' if finished else 'not finished'}, {saved}"


def _check_checkpoint(directory: Path, step: int, problems: list[Problem]) -> bool:
    from lindm.llm.sft import checkpoints

    damage = checkpoints.find_damage(directory / checkpoints.checkpoint_name(step))
    if damage is not None:
        repair = "the same command goes on from the newest usable checkpoint and trains the steps after it again"
        problems.append(Problem(what=damage, repair=repair))
    return damage is None


def check_checkpoint(path: Path, problems: list[Problem]) -> str:
    from lindm.llm.sft import checkpoints

    if (damage := checkpoints.find_damage(path)) is not None:
        problems.append(Problem(what=damage, repair="take it from a copy", no_checkpoint=True))
    return "complete" if damage is None else "damaged"


def check_model(path: Path, problems: list[Problem]) -> str:
    with _noted(problems, "export it again, or import it with `lindm model import`"):
        verification.verify_file_list(path, required=True)
    _check_provenance(path, problems)
    return "complete"


def check_data_export(path: Path, problems: list[Problem]) -> str:
    repair = "export the dataset again into another directory"
    if not _check_outputs(path, problems, verification.FILES_FORMAT, repair=repair):
        problems.append(Problem(what=f"{path / MANIFEST} is missing", repair="the same command completes the export"))
    return "complete"


def check_dataset(path: Path, problems: list[Problem]) -> str:
    from lindm.datasets import reader, writer

    repair = "the same `lindm data make` command makes it again"
    if (path / MANIFEST).exists():
        records, state = [], "finished"
        with _noted(problems, repair):
            content = reader.read_manifest(path)
            records = [*content["shards"], {"files": {name: {"sha256": h} for name, h in content.get("outputs", {}).items()}}]
        with _noted(problems, repair):
            reader.read_config(path / reader.CONFIG)
    else:
        records, state = [], "not finished"
        with _noted(problems, "remove the directory, and make the dataset again"):
            reader.read_config(path / reader.CONFIG)
        with _noted(problems, repair):
            files.read_json_lines(path / writer.JOURNAL)
        records = files.read_json_lines(path / writer.JOURNAL, skip_damaged=True)
        if not records and any(path.glob("tasks-*")):
            problems.append(Problem(what=f"{path / MANIFEST} is missing", repair=repair))
    _check_provenance(path, problems)
    for record in records:
        hashes = {name: file["sha256"] for name, file in record["files"].items()}
        problems += [Problem(what=str(damage), repair=repair) for damage in verification.find_damage(path, hashes)]
    _check_losses(path, problems)
    return f"{state}, {sum('point' in record for record in records)} shards"


def _check_losses(path: Path, problems: list[Problem]) -> None:
    """The losses that evaluations keep beside the tasks of a dataset."""
    from lindm.evaluation import kept_losses

    for kept in sorted((path / kept_losses.DIRECTORY).glob("*.json")):
        with _noted(problems, "the next evaluation of this policy on these tasks computes it again"):
            files.read_json(kept, format=kept_losses.FORMAT)


def check_evaluation(path: Path, problems: list[Problem]) -> str:
    from lindm.evaluation import EVAL_FORMAT

    with _noted(problems, AGAIN):
        files.read_json(path / "eval.json", format=EVAL_FORMAT)
    finished = _check_outputs(path, problems, manifest.FORMAT, repair=AGAIN, skip=["eval.json"])
    if kind_of(path / "data") == "dataset":
        check_dataset(path / "data", problems)
    return "finished" if finished else "not finished"


def check_report(path: Path, problems: list[Problem]) -> str:
    if not _check_outputs(path, problems, manifest.FORMAT, repair=AGAIN):
        problems.append(Problem(what=f"{path / MANIFEST} is missing", repair=AGAIN))
    return "complete"


def check_solution(path: Path, problems: list[Problem]) -> str:
    from lindm.solvers import solution_file

    with _noted(problems, "solve the problem and save it again"):
        solution_file.load_solution(path)
    return "complete"


def check_policy(path: Path, problems: list[Problem]) -> str:
    with _noted(problems, "solve the problem and save the policy again"):
        files.read_json(path, _policy_format(path))
    return "complete"


def _policy_format(path: Path) -> str | None:
    """The format of a saved policy, also of a file whose JSON is damaged; None of another file."""
    from lindm.solvers import stationary_mdp, stationary_solution

    with contextlib.suppress(DataError):
        content = inputs.read_bytes(path, limits.JSON_FILE)
        return next((f for f in (stationary_mdp.FORMAT, stationary_solution.FORMAT) if f'"{f}"'.encode() in content), None)
    return None


def check_estimate(path: Path, problems: list[Problem]) -> str:
    from lindm.estimation import model_file

    with _noted(problems, "estimate the model again"):
        model_file.verify(path)
    return "complete"


CHECKS: dict[str, Check] = {
    "experiment run": check_experiment_run,
    "verification": check_verification,
    "evaluation": check_evaluation,
    "training run": check_training_run,
    "dataset": check_dataset,
    "checkpoint": check_checkpoint,
    "model": check_model,
    "data export": check_data_export,
    "report": check_report,
    "solution": check_solution,
    "policy": check_policy,
    "estimated model": check_estimate,
}
"""Kind of a directory -> the function that verifies it. The kinds that commands write are among them (a test)."""
