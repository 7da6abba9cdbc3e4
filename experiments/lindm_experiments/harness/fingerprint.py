"""The fingerprint of an experiment's code: a hash of the sources that it imports, transitively, and of nothing else.

Imports are read from the sources, those inside functions included; nothing is imported. A name that a package imports lazily
resolves to the module that defines it, by the package's `if TYPE_CHECKING:` imports or by a dict literal from names to modules.
Data that a module reads when it is imported is part of it (`DATA`).
"""

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from lindm_experiments.harness.experiments import Experiment, parse_source

PACKAGES = ("lindm", "lindm_theory", "lindm_experiments")
DATA = {"lindm.text": "../templates/*.json"}  # module -> files, relative to the directory of its source


def code_fingerprint(experiment: Experiment) -> str:
    """SHA-256 over the sources of an experiment; those of a file outside the package include modules beside it."""
    digest = hashlib.sha256()
    for name, path in sorted(sources(experiment).items()):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def sources(experiment: Experiment) -> dict[str, Path]:
    """Module (or module:data file) -> its file, for the experiment and all that it imports from these packages."""
    beside = experiment.path.parent if experiment.outside else None
    name = f"lindm_experiments.{experiment.name}"
    files = {name: experiment.path}
    waiting = [(name, experiment.path)]
    while waiting:
        for imported in _imports(*waiting.pop(), beside):
            path = _path(imported, beside)
            if path is not None and imported not in files:
                files[imported] = path
                waiting.append((imported, path))
    for module, pattern in DATA.items():
        if module in files:
            files |= {f"{module}:{p.name}": p for p in sorted(files[module].parent.glob(pattern))}
    return files


@functools.cache
def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _path(module: str, beside: Path | None) -> Path | None:
    """The source of a module of these packages, or of a module beside an experiment; None for any other."""
    top, *rest = module.split(".")
    base = _root(top) if top in PACKAGES else beside / top if beside else None
    if base is None:
        return None
    base = base.joinpath(*rest)
    return next((p for p in (base / "__init__.py", base.with_name(f"{base.name}.py")) if p.is_file()), None)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return parse_source(path)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING:`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(tree, ast.If) and _checks_types(tree) and child in tree.body:
            continue
        yield from _nodes(child)


def _checks_types(node: ast.If) -> bool:
    return ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING"


def _imports(module: str, path: Path, beside: Path | None) -> Iterator[str]:
    """Names of modules that a source imports; some of them do not exist, or belong to other packages."""
    aliases: dict[str, str] = {}
    tree = _tree(path)
    for node in _nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _parents(alias.name)
                top = alias.name.partition(".")[0]
                aliases[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, module, path)
            yield from _parents(base)
            for alias in node.names:
                yield from _member(base, alias.name, beside)
                aliases[alias.asname or alias.name] = f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))
            yield from (parent for name in names for parent in _parents(name))
    for node in _nodes(tree):  # `import lindm as ld; ld.solve(...)`
        if isinstance(node, ast.Attribute):
            root, *names = ast.unparse(node).split(".")
            current = aliases.get(root, "")
            for name in names:
                if not current or (where := _path(current, beside)) is None or where.name != "__init__.py":
                    break
                yield from _member(current, name, beside)
                current = f"{current}.{name}"


def _parents(module: str) -> Iterator[str]:
    """A module and the packages that it is in: they are imported with it."""
    parts = module.split(".")
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _base(node: ast.ImportFrom, module: str, path: Path) -> str:
    """The absolute name of what `from ... import` names."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    package = parts if path.name == "__init__.py" else parts[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def _member(package: str, name: str, beside: Path | None) -> Iterator[str]:
    """The modules behind `from package import name`: a submodule, or the module that a lazy name comes from."""
    if _path(f"{package}.{name}", beside) is not None:
        yield f"{package}.{name}"
    elif (path := _path(package, beside)) is not None and path.name == "__init__.py":
        yield from _lazy_names(package, path).get(name, ())


@functools.cache
def _lazy_names(package: str, path: Path) -> dict[str, tuple[str, ...]]:
    """Name -> modules, of the names that a package imports lazily."""
    names: dict[str, tuple[str, ...]] = {}
    for node in _tree(path).body:
        if isinstance(node, ast.If) and _checks_types(node):
            for statement in node.body:
                if isinstance(statement, ast.ImportFrom):
                    base = _base(statement, package, path)
                    for alias in statement.names:
                        names[alias.asname or alias.name] = (*_parents(base), f"{base}.{alias.name}")
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    target = value.value.replace(":", ".")
                    names[str(key.value)] = tuple(_parents(f"{package}{target}" if target.startswith(".") else target))
    return names
