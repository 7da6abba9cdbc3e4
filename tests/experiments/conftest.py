"""A toy experiment in a directory of its own, and a door that knows it: faults are tested with real processes."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TOY = '''"""Does a toy survive?

    lindm run toy
"""

import os
import random
import signal
import time
from dataclasses import dataclass

from lindm_experiments.harness.verdicts import mean_verdict


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 6
    base_seed: int = 0
    pause: float = 0.0
    nan_at: int = -1
    die_at: int = -1
    raise_at: int = -1

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1; got {self.seeds}")


QUICK = Config()
FULL = Config(seeds=12)
SMOKE = Config(seeds=2)


def points(cfg):
    return [{"seed": cfg.base_seed + i} for i in range(cfg.seeds)]


def measure(cfg, point):
    seed = point["seed"]
    time.sleep(cfg.pause)
    if seed == cfg.die_at or (os.environ.get("TOY_DIES") == "1" and seed == 3):
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == cfg.raise_at:
        raise RuntimeError("the toy is broken")
    r = random.Random(seed)
    bad = float("nan") if seed == cfg.nan_at else 0.0
    ratio = 1 + 1e-3 * r.gauss(0, 1)
    return {"ratio": ratio, "swapped": ratio + 1, "curve": [r.random() for _ in range(50)] + [bad]}


def check(records):
    return [
        mean_verdict("q-risk", [r["ratio"] for r in records], figure="toy"),
        mean_verdict("controls/swap", [r["swapped"] for r in records]),
    ]


def plot(records):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    for r in records:
        axes.plot(r["curve"])
    return {"toy": figure}
'''


@dataclass(frozen=True)
class Lab:
    """Where the toy lives; `lindm(...)` runs the command line there in a process of its own."""

    directory: Path

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)} | environment
        command = [sys.executable, str(self.directory / "door.py"), *map(str, arguments)]
        return subprocess.Popen(
            command,
            cwd=self.directory,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def lindm(self, *arguments: object, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


def build_lab(directory: Path) -> Lab:
    experiments = directory / "lab"
    experiments.mkdir()
    (experiments / "toy.py").write_text(TOY)
    # the machinery is a part of the same package: import it first, then let only the toy be found
    (directory / "door.py").write_text(
        "import sys\nfrom pathlib import Path\n\n"
        "from dataclasses import replace\n\n"
        "import lindm_experiments.harness.style\nimport lindm_experiments.harness.verify\n"
        "from lindm_experiments.harness.claims import CLAIMS\n\n"
        'owners = {"q-risk": "toy", "controls/swap": "toy", "few-tasks": "other"}\n'
        "kept = {k: replace(CLAIMS[k], experiment=v) for k, v in owners.items()}\n"
        "CLAIMS.clear()\n"
        f"CLAIMS.update({{k: c for k, c in kept.items() if Path({str(experiments)!r}, c.experiment + '.py').exists()}})\n"
        f"lindm_experiments.__path__[:] = [{str(experiments)!r}]\n"
        "from lindm.cli.main import main\n\n"
        'if __name__ == "__main__":\n    sys.exit(main())\n'
    )
    return Lab(directory)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A directory with `toy.py`, the only experiment of a command line started there."""
    return build_lab(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The run directory of an uninterrupted run of the toy: copy it, do not write there."""
    lab = build_lab(tmp_path_factory.mktemp("finished"))
    code, _, err = lab.lindm("run", "toy", "--out", "r")
    assert code == 0, err
    return lab.directory / "r"
