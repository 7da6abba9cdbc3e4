"""Finding experiments: modules of this package, and Python files from outside with their claims in a TOML file beside them.

An experiment is a module with

    Config       a frozen dataclass; its fields are the options of `lindm run`, `seeds` and `base_seed` among them
    QUICK, FULL, SMOKE    presets: instances of Config
    points(cfg)  JSON objects, one for each record; default: {"seed": s} for every seed
    measure(cfg, point)   the record of a point: a dict of numbers and lists, all finite
    check(records)        a Verdict for each claim of the experiment
    plot(records)         figures by name
    table(records)        optional: rows for table.csv
"""

import ast
import importlib
import importlib.util
import inspect
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lindm.errors import SHOWN, DataError, UsageError, unknown
from lindm.io import inputs, limits
from lindm_experiments.harness.claims import PACKAGE_CLAIMS, add_claims, claim_ids, read_claims

PACKAGE = PACKAGE_CLAIMS.parent
MINUTES: dict[str, float] = tomllib.loads(PACKAGE_CLAIMS.read_text(encoding="utf-8"))["minutes"]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment by name and source; `outside` the package it is loaded from its file."""

    name: str
    path: Path
    outside: bool = False

    @property
    def reference(self) -> str:
        """The name or path by which `find_experiment` loads it, also in another process."""
        return str(self.path) if self.outside else self.name

    @property
    def claims(self) -> tuple[str, ...]:
        """The ids of the claims that it decides."""
        return claim_ids(self.name)

    @property
    def source(self) -> str:
        """The text of its file."""
        return inputs.read_text(self.path, limits.SOURCE_FILE)

    @property
    def docstring(self) -> str:
        """The module's docstring, read without importing the module."""
        return inspect.cleandoc(ast.get_docstring(parse_source(self.path)) or "")

    @property
    def minutes(self) -> float:
        """Minutes of the quick preset on one core, compilation included; 1 where they are not known."""
        return MINUTES.get(self.name, 1.0)


def parse_source(path: Path) -> ast.Module:
    """The syntax tree of a Python file, which is not imported. DataError, with file:line, where it is not Python."""
    try:
        return ast.parse(inputs.read_text(path, limits.SOURCE_FILE), filename=str(path))
    except SyntaxError as e:
        raise DataError(f"{path}:{e.lineno}: not Python: {e.msg}") from e
    except (ValueError, RecursionError, MemoryError) as e:  # a null character, or expressions nested too deep
        raise DataError(f"{path}: not Python: {e}") from e


def experiment_names() -> tuple[str, ...]:
    """The experiments of the package."""
    return tuple(MINUTES)


def find_experiment(reference: str) -> Experiment:
    """An experiment by the name of a module of the package, or by the path of a Python file outside it.

    The claims of a file are read from the TOML file beside it. UsageError for an unknown name, DataError for
    claims that are wrong or missing, and for a file that is not Python.
    """
    path = Path(reference)
    if path.suffix != ".py" and os.sep not in reference:
        if reference not in MINUTES:
            raise UsageError(
                unknown("EXPERIMENT", reference, experiment_names())
                + " (a file outside the package: path/to/mine.py; `lindm run --list` lists all)"
            )
        return Experiment(name=reference, path=PACKAGE / f"{reference}.py")
    path = path.absolute()
    if not path.is_file():
        raise UsageError(f"EXPERIMENT must be a Python file that exists, or one of `lindm run --list`; got {reference!r}")
    if path.parent == PACKAGE:
        return find_experiment(path.stem)
    if path.stem in MINUTES or not path.stem.isidentifier():
        raise UsageError(f"the file of an experiment must have a name of its own that is a Python identifier; got {reference!r}")
    parse_source(path)
    claims = read_claims(path.with_suffix(".toml"), path.stem)
    if not claims:
        raise DataError(f"{path.with_suffix('.toml')} must have a [[claim]] at least; it has none")
    add_claims(claims)
    return Experiment(name=path.stem, path=path, outside=True)


def load(reference: str) -> ModuleType:
    """Import an experiment with 64-bit floats on."""
    experiment = find_experiment(reference)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_enable_x64", True)
    else:
        os.environ["JAX_ENABLE_X64"] = "1"
    name = f"lindm_experiments.{experiment.name}"
    if not experiment.outside:
        return importlib.import_module(name)
    if name in sys.modules and sys.modules[name].__file__ == str(experiment.path):
        return sys.modules[name]
    directory = str(experiment.path.parent)
    if directory not in sys.path:  # last, so that its files can import each other and shadow nothing
        sys.path.append(directory)
    spec = importlib.util.spec_from_file_location(name, experiment.path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def name_of(module: ModuleType) -> str:
    """The name of an experiment's module."""
    return module.__name__.rpartition(".")[2]


def preset_config(module: ModuleType, preset: str) -> Any:
    """The Config of a preset; UsageError for an unknown one."""
    presets = {"quick": module.QUICK, "full": module.FULL, "smoke": module.SMOKE}
    if preset not in presets:
        raise UsageError(unknown("preset", preset, list(presets)))
    return presets[preset]


def points_of(module: ModuleType, cfg: Any) -> list[dict]:
    """The points of a configuration: those of the experiment, or one for each seed."""
    return module.points(cfg) if hasattr(module, "points") else [{"seed": s} for s in range(cfg.seeds)]


def matching_claims(known: Mapping[str, Sequence[str]], id: str) -> dict[str, list[str]]:
    """Experiment -> its claims that one id of `--only` selects.

    An id is that of a claim; a main id selects its sub-claims, too. EXPERIMENT/ID selects among the claims of one experiment,
    where several experiments have claims with this id.

    Raises:
      UsageError: no claim has this id.
    """

    def select(qualified: bool) -> dict[str, list[str]]:
        names = {name: [(c, f"{name}/{c}" if qualified else c) for c in owned] for name, owned in known.items()}
        selected = {name: [c for c, full in pairs if full == id or full.startswith(f"{id}/")] for name, pairs in names.items()}
        return {name: owned for name, owned in selected.items() if owned}

    chosen = select(qualified=False) or ("/" in id and select(qualified=True))
    if not chosen:
        ids = [c for owned in known.values() for c in owned]
        parts = [c for c in ids if id in c]
        more = f", ... ({len(parts)} in all)" if len(parts) > SHOWN else ""
        said = f"only {id!r} is not known; did you mean {', '.join(parts[:SHOWN])}{more}?" if parts else unknown("only", id, ids)
        hint = "`lindm verify --experiments NAME` decides all claims of an experiment; `lindm run --list` lists the experiments"
        raise UsageError(f"{said} ({hint})")
    return chosen


def select_claims(known: Mapping[str, Sequence[str]], only: Sequence[str]) -> dict[str, list[str]]:
    """Experiment -> its claims among those that the ids of `only` select; no ids at all select every claim."""
    if not only:
        return {name: list(owned) for name, owned in known.items() if owned}
    selected = [matching_claims(known, id) for id in only]
    chosen = {name: [c for c in owned if any(c in each.get(name, ()) for each in selected)] for name, owned in known.items()}
    return {name: owned for name, owned in chosen.items() if owned}


def ambiguous_ids(known: Mapping[str, Sequence[str]], only: Sequence[str]) -> dict[str, list[str]]:
    """The ids of `only` that select claims of several experiments, with these experiments."""
    matches = {id: list(matching_claims(known, id)) for id in only}
    return {id: names for id, names in matches.items() if len(names) > 1}
