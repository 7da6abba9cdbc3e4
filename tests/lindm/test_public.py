"""The public surface: what `import lindm as ld` costs, and that the example of every name runs."""

import ast
import contextlib
import doctest
import inspect
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium  # noqa: F401  (its import sets a variable of the environment, which is not lindm's doing)
import jax
import matplotlib
import numpy as np
import pytest

import lindm as ld
from tests.clock import HANGS

TIGER = Path(__file__).parent / "problems" / "files" / "tiger.pomdp"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_is_fast_and_imports_nothing_else():
    code = "import sys, time\nbefore, start = set(sys.modules), time.process_time()\nimport lindm as ld\n"
    code += "print(time.process_time() - start)\n"
    code += "assert not [m for m in set(sys.modules) - before if m.startswith(('jax', 'numpy', 'lindm.'))]"
    assert min(float(run(code)) for _ in range(3)) < 0.1


def test_every_name_completes_and_an_unknown_name_is_an_attribute_error():
    assert {*ld.PUBLIC, "__version__"} == set(dir(ld))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ld.nothing  # noqa: B018


def test_type_checkers_see_the_names_that_exist():
    tree = ast.parse(inspect.getsource(ld))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            seen[alias.asname] = whole
    assert seen == {name: target.replace(":", ".") for name, target in ld.PUBLIC.items()}


def settings() -> dict:
    """The settings of this process that other code of a user depends on."""
    values = {name: value for name, value in jax.config.values.items()}
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return {
        "jax": values,
        # importing transformers sets a variable of its own
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")},
        "signals": handlers,
        "directory": Path.cwd(),
        "backend": matplotlib.get_backend(),
        "figures": {name: value for name, value in matplotlib.rcParams.items()},
        "numpy": np.geterr(),
        "stdout": sys.stdout,
    }


@contextlib.contextmanager
def settings_of_a_user():
    """The global settings as a user has them; not those of a `with` block, which would hide what a function leaves behind."""
    jax.config.update("jax_enable_x64", False)
    before = settings()
    try:
        yield
        after = settings()
        changed = [name for name, value in before.items() if value != after[name]]
        assert not changed, {name: (before[name], after[name]) for name in changed}
    finally:
        jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """What the examples work with."""
    work = tmp_path_factory.mktemp("examples")
    shutil.copy(TIGER, work)
    shutil.copy(TIGER.with_name("forest.pomdp"), work)
    rows = [f"{e},{t},on,{action},1\n" for e in range(2) for t, action in enumerate(("run", "stop"))]
    (work / "log.csv").write_text("episode,step,state,action,reward\n" + "".join(rows))
    with settings_of_a_user(), jax.numpy_rank_promotion("allow"):
        ld.make_dataset(ld.suite("mdp", horizon=4), work / "data", tasks=6, demos=2)
        with contextlib.chdir(work):
            ld.finetune("data", "run", preset="tiny", steps=2, eval_tasks=0)
    return work


@pytest.mark.parametrize("name", ld.PUBLIC)
def test_the_example_of_a_name_runs(name, directory, monkeypatch):
    monkeypatch.chdir(directory)
    value = getattr(ld, name)
    finder = doctest.DocTestFinder(recurse=inspect.isclass(value))
    examples = [test for test in finder.find(value, name, globs={"ld": ld}) if test.examples]
    assert inspect.getdoc(value) and examples, f"{name} has no example"
    with settings_of_a_user(), jax.numpy_rank_promotion("allow"):
        for example in examples:
            assert doctest.DocTestRunner().run(example).failed == 0


def test_double_precision_needs_no_flag_and_changes_none():
    code = "import lindm as ld, jax, jax.numpy as jnp\n"
    code += f"solution = ld.solve(ld.read_pomdp({str(TIGER)!r}, horizon=5))\n"
    code += "assert solution.solution.value.dtype == 'float64' and abs(solution.value - 0) > 1\n"
    code += "assert not jax.config.jax_enable_x64 and jnp.zeros(1).dtype == 'float32'\n"
    code += "print(solution.value)"
    with jax.enable_x64(True):
        assert float(run(code)) == pytest.approx(ld.solve(ld.read_pomdp(TIGER, horizon=5)).value, rel=1e-12)


def wrong_inputs():
    tiger = ld.read_pomdp(TIGER, horizon=3)
    alike = {"tasks": 1, "demos": 1}
    return {
        "problem must be an MDP, .*; got 'tiger.pomdp'": lambda: ld.solve("tiger.pomdp"),  # pyright: ignore
        "horizon must be a whole number of at least 1; got '3'": lambda: ld.read_pomdp(TIGER, horizon="3"),  # pyright: ignore
        "models must be POMDPs; got MDP": lambda: ld.apomdp([ld.make("mdp", horizon=4)], 0.5),
        "states must be a whole number of at least 1; got 0": lambda: ld.suite("mdp", states=0),
        "quality must be a number in .*; got 2": lambda: ld.suite("pomdp", quality=2),
        "policies must be a list of names.*; got 'qmdp'": lambda: ld.evaluate(tiger, "qmdp", **alike),
        "policies must be a list of names.*; got .<function": lambda: ld.evaluate(tiger, [lambda demos, history: 0], **alike),
        "option must be one of .*; got 'sed'; did you mean seed": lambda: ld.make_dataset(tiger, "d", sed=1, **alike),
        "executor must be one of serial, local, ray; got 'lcal'": lambda: ld.make_dataset(tiger, "d", executor="lcal", **alike),
        "option 'stps' is not known; did you mean steps": lambda: ld.finetune("d", "r", preset="tiny", stps=2),
        "nodes must be given": lambda: ld.job_file("slurm", {}, preset="tiny", data="d", out="r"),
        "preset must be one of quick, full, smoke; got 'quik'": lambda: ld.verify("quik"),
        "only must be a list; got 'ladder'": lambda: ld.verify("smoke", only="ladder"),
        "option .*'sedes'.*; did you mean seeds": lambda: ld.run_experiment("controls", "smoke", sedes=2),
        "prompts must be a list; got 'x'": lambda: ld.generate("run", "x"),
        "directories must be a list; got 'run'": lambda: ld.report("run"),
    }


@pytest.mark.parametrize("message", wrong_inputs())
def test_a_wrong_input_is_named_with_its_rule(message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        wrong_inputs()[message]()


def test_models_that_were_read_from_files_make_an_ambiguous_problem():
    tiger = ld.read_pomdp(TIGER, horizon=3)
    assert ld.solve(ld.apomdp([tiger, tiger], 0.5)).value == pytest.approx(ld.solve(tiger).value, rel=1e-12)
