"""No command opens a network connection: the kernel ends a process that opens a socket to another machine."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lindm.cli.main import NAMES
from tests.clock import HANGS

ROOT = Path(__file__).parents[1]

# each uses what those before it wrote
COMMANDS = """
doctor
families
estimate log.csv --out learned.pomdp
data make mdp --horizon 4 --tasks 4 --demos 1 --out data
data make {tiger} --horizon 3 --tasks 2 --demos 1 --out tiger
data export data --to trl --out trl
solve {tiger} --horizon 3 --json
sft --preset tiny --data data --out sft --steps 1 --batch 2 --eval-tasks 1
model show sft/model
model import sft/model --out model
export sft --out exported
eval mdp --horizon 4 --tasks 2 --demos 1 --policy sft:sft --policy bc --out eval
generate sft --prompt "0 A" --max-tokens 4
act sft:sft data --history 0 --json
run {toy} --out run
verify --preset quick --experiments {toy} --out verified
plot verified --experiments {toy}
report verified sft eval --out report
theory risk --covariance L.npy --train-lengths 8 --test-lengths 8 --plot risk.png
plan --model sft/model --topology host --batch 2 --seq 64 --mesh data=1
launch slurm --nodes 2 --gpus-per-node 8 -- --model sft/model --data data --out pod
check run
"""
WITHOUT = {"bench": "measures for minutes, with what `sft`, `eval` and `solve` run"}

# the filter is set before anything of lindm is imported. Where there is none, Python's own audit events have to do
CHILD = """
import json, os, sys
if sys.platform == "linux":
    from tests.limits import forbid_network
    forbid_network()
def watch(event, arguments):
    if event == "socket.__new__" and arguments[1] not in (1, 16):
        os._exit(99)
sys.addaudithook(watch)
from lindm.cli.main import main
for words in json.loads(sys.argv[1]):
    print("next:", *words, file=sys.stderr, flush=True)
    if main(words) != 0:
        sys.exit(f"{words} failed")
"""


@pytest.fixture
def directory(tmp_path) -> Path:
    from tests.experiments.conftest import build_lab

    (tmp_path / "toys").mkdir()
    build_lab(tmp_path / "toys")
    np.save(tmp_path / "L.npy", np.diag([1.0, 2.0]))
    (tmp_path / "log.csv").write_text("episode,step,state,action,reward\n1,0,on,run,1\n1,1,off,fix,-1\n1,2,on,run,1\n")
    return tmp_path


def offline(commands: list[list[str]], directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_ENABLE_X64",)}
    environment |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    words = [sys.executable, "-c", CHILD, json.dumps(commands)]
    return subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True, timeout=3600)


@pytest.mark.slow
@pytest.mark.fault("F20")
def test_no_command_opens_a_socket_to_another_machine(directory, trials):
    places = {"tiger": ROOT / "tests/lindm/problems/files/tiger.pomdp", "toy": directory / "toys/lab/toy.py"}
    commands = [shlex.split(line.format(**places)) for line in COMMANDS.strip().splitlines()]
    assert {words[0] for words in commands} | WITHOUT.keys() == set(NAMES), "every command is tried, or has a reason not to be"
    done = offline(commands, directory)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
    assert done.stderr.count("next:") == len(commands)
    trials.add(len(commands))


@pytest.mark.fault("F20")
@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_INET6)",
        "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', 'import socket; socket.socket()']).returncode)",
    ],
    ids=["IPv4", "IPv6", "in a child"],
)
def test_a_socket_to_another_machine_ends_the_process(code):
    begin = "import sys\nfrom tests.limits import forbid_network\nforbid_network()\n" if sys.platform == "linux" else CHILD
    done = subprocess.run([sys.executable, "-c", begin + code, "[]"], cwd=ROOT, capture_output=True, timeout=HANGS)
    assert done.returncode in (-31, 256 - 31, 99)  # SIGSYS, or the exit code that a parent makes of it
