"""A fixture that runs commands and kills them at chosen points."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from lindm_experiments.harness import claims
from tests.clock import HANGS
from tests.experiments.conftest import build_lab
from tests.experiments.conftest import finished as finished
from tests.lindm.conftest import brute as brute
from tests.lindm.llm.conftest import micro as micro
from tests.promises import Trials

TIGER = "tests/lindm/problems/files/tiger.pomdp"

SERVER = Path(__file__).with_name("kill_server.py")
ROOT = SERVER.parents[2]
COMMAND = "import sys; from lindm.cli.main import main; sys.exit(main())"
KILLED = -9


def words(line: str) -> list[str]:
    """The words of a command line, in which TIGER stands for the file of a problem."""
    return [str(ROOT / TIGER) if word == "TIGER" else word for word in line.split()]


Content = dict[str, str]  # path -> what must be the same after an interruption


@dataclass(frozen=True)
class Run:
    """How a process ended, and where it changed the disk."""

    code: int
    points: list[tuple[str, str]]  # kind and path
    output: str


class KillServer:
    """Processes that are forked from one that has imported `modules`: each starts in milliseconds."""

    def __init__(self, directory: Path, modules: Sequence[str] = ()):
        self.directory = directory
        kept = {name: value for name, value in os.environ.items() if name != "JAX_ENABLE_X64"}
        environment = kept | {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
        environment |= {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(directory / "cache")}
        words = [sys.executable, str(SERVER), *modules]
        self.process = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        root: Path,
        argv: Sequence[object],
        die: int | tuple[str, str] | None = None,
        half: bool = False,
        code: str = COMMAND,
    ) -> Run:
        """Run `code` with the arguments, in `root`, and with a directory for temporary files in it.

        Args:
          die: the point at which the process is killed: its number, from 1, or its kind and a pattern of its path.
          half: half of a write is done before.
        """
        output, log = self.directory / "output", self.directory / "points"
        request = {"code": code, "argv": [str(word) for word in argv], "root": str(root), "output": str(output), "log": str(log)}
        request |= {"die": die, "half": half}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the server has ended"
        points = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
        return Run(int(answer), points, output.read_text(errors="replace"))

    def stop(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(HANGS)
        self.process.stdout.close()


def content(root: Path, same: Callable[[Path], str] = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()) -> Content:
    """Every file and directory below `root`; `same` says what of a file must be equal."""
    paths = sorted(root.rglob("*"))
    kinds = ("link" if path.is_symlink() else "directory" if path.is_dir() else same(path) for path in paths)
    return {path.relative_to(root).as_posix(): kind for path, kind in zip(paths, kinds, strict=True)}


@dataclass
class KillTest:
    """One command, killed at its points and run again.

    Attributes:
      start: a directory that is copied for every trial; None: an empty one.
      same: what of a file must be the same after an interruption. [default: all bytes]
      code: the exit code of the command.
    """

    server: KillServer
    directory: Path
    trials: Trials
    argv: Sequence[object]
    start: Path | None = None
    same: Callable[[Path], str] | None = None
    code: int = 0
    source: str = COMMAND

    def _begin(self) -> Path:
        root = self.directory / "root"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.start, root, symlinks=True) if self.start else root.mkdir()
        return root

    def _content(self, root: Path) -> Content:
        return content(root) if self.same is None else content(root, self.same)

    def points(self) -> list[tuple[str, str]]:
        """The points of an uninterrupted run."""
        return self.server.run(self._begin(), self.argv, code=self.source).points

    def check(self, choose: Callable[[list[tuple[str, str]]], list[int]] = lambda points: list(range(len(points)))) -> None:
        """Kill at each point that `choose` names by its index, run again, and compare with an uninterrupted run.

        Two kills that leave the same bytes are two trials, and one run again is enough for both.
        """
        root = self._begin()
        whole = self.server.run(root, self.argv, code=self.source)
        assert whole.code == self.code, whole.output
        expected, again = self._content(root), self.server.run(root, self.argv, code=self.source)
        assert (again.code, self._content(root)) == (self.code, expected), f"run again after the end:\n{again.output}"
        known: set[str] = set()
        for index in choose(whole.points):
            for half in (False, True) if whole.points[index][0] == "write" else (False,):
                where = f"killed at point {index + 1} of {len(whole.points)}, {' '.join(whole.points[index])}, half: {half}"
                killed = self.server.run(root := self._begin(), self.argv, index + 1, half, code=self.source)
                assert killed.code == KILLED, f"{where}: not reached:\n{killed.output}"
                self.trials.add()
                if (state := json.dumps(content(root))) in known:
                    continue
                known.add(state)
                rerun = self.server.run(root, self.argv, code=self.source)
                assert rerun.code == self.code, f"{where}: run again:\n{rerun.output}"
                assert self._content(root) == expected, f"{where}: run again: other content"


def both_ends_and(number: int) -> Callable[[list[tuple[str, str]]], list[int]]:
    """The first and the last three points, and `number` points that are spread over the others."""

    def choose(points: list[tuple[str, str]]) -> list[int]:
        n = len(points)
        return sorted({*range(min(3, n)), *range(max(n - 3, 0), n), *(n * i // (number + 1) for i in range(1, number + 1))})

    return choose


@pytest.fixture(scope="module")
def kill_server(tmp_path_factory, request) -> Iterator[KillServer]:
    server = KillServer(tmp_path_factory.mktemp("server"), getattr(request.module, "IMPORTS", ()))
    yield server
    server.stop()


@pytest.fixture
def killed(kill_server, tmp_path, trials) -> Callable[..., KillTest]:
    """killed(argv, start=..., same=..., code=...)"""
    return lambda argv, **options: KillTest(kill_server, tmp_path, trials, argv, **options)


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Iterator[str]:
    """The file of the toy, for commands in this process: its module and its claims do not stay."""
    monkeypatch.setattr(claims, "CLAIMS", dict(claims.CLAIMS))
    yield str(build_lab(tmp_path).directory / "lab" / "toy.py")
    sys.modules.pop("lindm_experiments.toy", None)
