"""A toy experiment outside the package: faults are tested with real processes."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lindm.io import files
from lindm_experiments.harness.experiments import points_of
from tests.clock import HANGS

ROOT = Path(__file__).parents[2]


def smoke_records(experiment) -> list[dict]:
    """The records of the smoke preset, as they are read from the file of a run."""
    points = points_of(experiment, experiment.SMOKE)
    records = [{"point": p} | files.to_jsonable(experiment.measure(experiment.SMOKE, p)) for p in points]
    return json.loads(json.dumps(records, allow_nan=False))


TOY = '''"""Does a toy survive?

    lindm run toy
"""

import os
import random
import signal
import time
from dataclasses import dataclass

from lindm_experiments.harness.unfinished import point_directory
from lindm_experiments.harness.verdicts import mean_verdict


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 6
    base_seed: int = 0
    pause: float = 0.0
    nan_at: int = -1
    die_at: int = -1
    raise_at: int = -1
    parts: int = 0
    """of a point, each of which is finished once however often the run is killed"""

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
    with point_directory() as directory:
        for part in range(cfg.parts):
            if not (finished := directory / str(part)).exists():
                time.sleep(0.02)
                with open(f"parts-{seed}", "a") as log:
                    log.write(f"{part}\\n")
                finished.touch()  # last: a kill in between repeats a part, and omits none
    if seed == cfg.raise_at:
        raise RuntimeError("the toy is broken")
    r = random.Random(seed)
    bad = float("nan") if seed == cfg.nan_at else 0.0
    ratio = 1 + 1e-3 * r.gauss(0, 1)
    return {"ratio": ratio, "swapped": ratio + 1, "curve": [r.random() for _ in range(50)] + [bad]}


def check(records):
    return [
        mean_verdict("toy-ratio", [r["ratio"] for r in records], figure="toy"),
        mean_verdict("toy-control/swap", [r["swapped"] for r in records]),
    ]


def plot(records):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    for r in records:
        axes.plot(r["curve"])
    return {"toy": figure}
'''


TOY_CLAIMS = """
[[claim]]
id = "toy-ratio"
statement = "The ratio is one, exactly."
source = "toy"
predicted = "measured / predicted = 1"
criterion = "mean ratio over seeds within [{lo}, {hi}]"
lo = 0.97
hi = 1.03

[[claim]]
id = "toy-control/swap"
statement = "The ratio is one after a swap."
source = "negative control"
predicted = "measured / predicted differs from 1"
criterion = "mean ratio over seeds within [{lo}, {hi}]"
lo = 0.97
hi = 1.03
expected = "FAIL"
"""


@dataclass(frozen=True)
class Lab:
    """A directory with `lab/toy.py` and `lab/toy.toml`; `lindm(...)` runs the command line there in a process of its own.

    The word `toy` stands for the file of the toy, and `verify` runs the experiments of `lab`, unless others are named.
    """

    directory: Path

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)} | environment
        words = ["lab/toy.py" if word == "toy" else str(word) for word in arguments]
        if words[0] == "verify" and "--experiments" not in words:
            words += ["--experiments", *(f"lab/{p.name}" for p in sorted((self.directory / "lab").glob("*.py")))]
        return subprocess.Popen(
            [sys.executable, "-m", "lindm", *words],
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
        out, err = process.communicate(timeout=HANGS)
        return process.returncode, out, err


def build_lab(directory: Path) -> Lab:
    (directory / "lab").mkdir()
    (directory / "lab" / "toy.py").write_text(TOY)
    (directory / "lab" / "toy.toml").write_text(TOY_CLAIMS)
    return Lab(directory)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A directory with the toy, the only experiment of a `verify` started there."""
    return build_lab(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The run directory of an uninterrupted run of the toy: copy it, do not write there."""
    lab = build_lab(tmp_path_factory.mktemp("finished"))
    code, _, err = lab.lindm("run", "toy", "--out", "r")
    assert code == 0, err
    return lab.directory / "r"
