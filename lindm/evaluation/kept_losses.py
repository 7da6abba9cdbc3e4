"""The losses of named policies, computed once for the tasks of a dataset and kept beside them.

    DATA/losses/NAME-DIGEST.json    the losses of one policy with its settings, and all that they depend on

A file is used where the tasks, the limits of the evaluation and the code are those with which it was written. Otherwise, and
where it is damaged, the losses are computed again and the file is replaced. Only losses of policies of the registry are kept: the
code of other policies, language models among them, is not part of `code_hash`.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lindm.errors import DataError
from lindm.evaluation.calibration import ScoredHistories
from lindm.evaluation.optimality_gap import PolicyLoss
from lindm.evaluation.policies.registry import POLICIES
from lindm.io import files
from lindm.io.verification import MANIFEST

FORMAT = "lindm-losses-1"
DIRECTORY = "losses"
CODE = ("types.py", "random.py", "validate.py", "problems", "solvers", "families", "icl", "datasets", "text", "evaluation")
LIBRARIES = ("flax", "jax", "jaxlib", "numpy", "optax")
MOST_ROWS = 100_000  # scored histories of all tasks: a file of some 10 MB

Losses = list[PolicyLoss | None]


def kept_losses(
    data: Path | None, name: str, policy: Any, limits: Mapping[str, Any], compute: Callable[[], Losses]
) -> tuple[Losses, float]:
    """The losses of a policy on all tasks of a dataset, and the seconds that computing them took.

    Args:
      data: directory of the dataset, which is complete; None: nothing is kept.
      name: of the policy, for the name of the file.
      limits: what the losses depend on beside tasks, policy and code, as JSON values.
      compute: computes the losses where none are kept.

    Raises:
      StorageError: the file cannot be written.
    """
    settings = None if data is None else policy_settings(policy)
    path, basis = None, {}
    if data is not None and settings is not None:
        digest = hashlib.sha256(files.canonical_json([settings, limits]).encode()).hexdigest()[:12]
        path = data / DIRECTORY / f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:40]}-{digest}.json"
        basis = {"policy": settings, "limits": limits, "tasks": files.sha256(data / MANIFEST), "code": code_hash()}
        with contextlib.suppress(DataError):  # missing, damaged, or of another version
            kept = files.read_json(path, format=FORMAT)
            if all(kept.get(key) == value for key, value in basis.items()):
                return [_from_json(loss) for loss in kept["losses"]], kept["seconds"]
    start = time.perf_counter()
    losses = compute()
    seconds = time.perf_counter() - start
    if path is not None and sum(len(loss.scored.weight) for loss in losses if loss and loss.scored) <= MOST_ROWS:
        with files.storage_errors(path):
            path.parent.mkdir(exist_ok=True)
        rows = [None if loss is None else _to_json(loss) for loss in losses]
        files.write_json(path, basis | {"seconds": seconds, "losses": rows}, format=FORMAT)
    return losses, seconds


def policy_settings(policy: Any) -> str | None:
    """The class of a policy of the registry and its attributes; None for any other policy, whose losses are not kept."""
    kind = type(policy)
    if (kind.__module__, kind.__qualname__) not in _named_classes():
        return None
    settings = vars(policy)
    return f"{kind.__qualname__}({settings!r})" if all(map(_has_plain_repr, settings.values())) else None


@functools.cache
def _named_classes() -> frozenset[tuple[str, str]]:
    paths = [info.policy.partition(":") for info in POLICIES.values()]
    return frozenset((f"lindm.evaluation.policies.{module}", name) for module, _, name in paths)


def _has_plain_repr(value: Any) -> bool:
    """Whether the text of a value says all of it: a number, a name, or a suite of lindm with its options."""
    if isinstance(value, bool | int | float | str | type(None)):
        return True
    return (
        is_dataclass(value)
        and type(value).__module__.startswith("lindm.")
        and all(_has_plain_repr(getattr(value, field.name)) for field in fields(value))
    )


@functools.cache
def code_hash() -> str:
    """SHA-256 of the sources on which losses depend, the versions of the libraries and the kind of device that computes them."""
    root = Path(__file__).parents[1]
    paths = [path for name in CODE for path in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py"))]
    sources = [[path.relative_to(root).as_posix(), files.sha256(path)] for path in sorted(paths)]
    versions = [importlib.metadata.version(library) for library in LIBRARIES]
    device = [jax.default_backend(), jax.devices()[0].device_kind]
    return hashlib.sha256(files.canonical_json([sources, versions, device]).encode()).hexdigest()


def _to_json(loss: PolicyLoss) -> dict[str, Any]:
    values = {field.name: getattr(loss, field.name) for field in fields(loss) if field.name != "scored"}
    if loss.scored is None:
        return values | {"scored": None}
    log_p = [[None if x == -np.inf else x for x in row] for row in loss.scored.log_p.tolist()]  # JSON has no infinity
    weight, optimal = loss.scored.weight.tolist(), loss.scored.optimal.tolist()
    return values | {"scored": {"weight": weight, "log_p": log_p, "optimal": optimal}}


def _from_json(values: Mapping[str, Any] | None) -> PolicyLoss | None:
    if values is None:
        return None
    scored: Mapping[str, Sequence[Any]] | None = values["scored"]
    if scored is None:
        return PolicyLoss(**values)
    log_p = np.array([[-np.inf if x is None else x for x in row] for row in scored["log_p"]], float)
    arrays = {"weight": np.array(scored["weight"], float), "log_p": log_p, "optimal": np.array(scored["optimal"], bool)}
    return PolicyLoss(**{**values, "scored": ScoredHistories(**arrays)})
