"""Every command that writes, killed at its kill points: the same command finishes, and nothing is lost or left.

`lindm sft` is in test_sft.py. Commands with many points are killed at both ends and at a sample of the points between.
"""

import hashlib
import json
import shutil

import numpy as np
import pytest

from lindm.cli.lifecycle import LIFECYCLES
from lindm.io.temporaries import TEMPORARY_SUFFIX
from tests.experiments.conftest import TOY, TOY_CLAIMS
from tests.faults.conftest import both_ends_and, content, words
from tests.faults.test_sft import MODEL
from tests.lindm.llm import reference
from tests.lindm.llm.io import test_gguf
from tests.lindm.llm.io.test_import_model import wheel

pytestmark = [pytest.mark.slow, pytest.mark.fault("F17", "F26")]
IMPORTS = (
    *("jax", "matplotlib.pyplot", "transformers", "minari", "h5py", "lindm.cli.main", "lindm.api.data", "lindm.api.evaluation"),
    *(
        "lindm.api.models",
        "lindm.bench.sft",
        "lindm.llm.io.gguf",
        "lindm.solvers.point_based",
        "lindm_experiments.harness.verify",
        "lindm_experiments.harness.summary",
        "lindm_experiments.toolkit.risks",
    ),
)
# keys of JSON files that are about time and place, and the files that are HTML of them
CHANGING = {
    "date",
    "command",
    "git",
    "seconds",
    "wall_s",
    "decisions_per_s",
    "checksum",
    "metrics.jsonl",
    "report.html",
    "index.html",
}
CHANGING |= {"verdicts.json", "eval.json", "provenance.json"}  # among the outputs of a manifest: their SHA-256


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in CHANGING}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def same(path):
    """What of a file must be equal after an interruption: all but times, and what shows them."""
    if path.suffix in (".html", ".hdf5") or path.name == "metrics.jsonl":
        return "there"
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return hashlib.sha256(b"".join(arrays[name].tobytes() for name in arrays if name != "header")).hexdigest()
    if path.suffix == ".pomdp":  # its comments have the date
        return "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    if path.suffix == ".json":
        return json.dumps(without_times(json.loads(path.read_bytes())), sort_keys=True)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def start(kill_server, tmp_path_factory):
    """A dataset, a model, a model as GGUF and in a wheel, an experiment, its run, and a file of the user."""
    root = tmp_path_factory.mktemp("start")
    (root / "lab").mkdir()
    (root / "lab" / "toy.py").write_text(TOY)
    (root / "lab" / "toy.toml").write_text(TOY_CLAIMS)
    (root / "notes.txt").write_text("mine")
    (root / "prompts.jsonl").write_text('{"prompt": "0 A"}\n')
    (root / "log.csv").write_text("episode,step,state,action,reward\n1,0,on,run,1\n1,1,off,fix,-1\n1,2,on,run,1\n")
    make, run = words("data make TIGER --horizon 2 --tasks 8 --demos 1 --out data"), words("run lab/toy.py --out run")
    for argv, code in ((make, {}), ([], {"code": MODEL}), (run, {})):
        done = kill_server.run(root, argv, **code)
        assert done.code == 0, done.output
    (root / "packed").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference.CONFIGS, "smollm", reference.CONFIGS["smollm"] | {"vocab_size": 300})
        file = test_gguf.write(root / "packed" / "model.gguf", "smollm")
    wheel(root / "packed" / "model.whl", {"a/__init__.py": b"", "a/model.gguf": file.read_bytes()})
    return root


AT_ANY_POINT = (
    "data export data --to trl --out out",
    "data export data --to minari --out out",
    "report run --out out",
    "plot run --experiments lab/toy.py",
    "theory risk --features features.csv --train-lengths 8 --test-lengths 8 --plot risk.png",
    "solve TIGER --horizon inf --tolerance 50% --save policy.alpha",
    "solve TIGER --horizon inf --tolerance 50% --save policy.json",
    "solve TIGER --horizon inf --tolerance 50% --save policy.svg",
    "solve TIGER --horizon 2 --plot value.png",
    "estimate log.csv --models 2 --out learned.pomdp",
)
AT_A_SAMPLE = (
    "data make TIGER --horizon 2 --tasks 4 --demos 1 --out out",
    "eval TIGER --horizon 2 --tasks 2 --demos 1 --policy qmdp --out out",
    "eval TIGER --horizon 2 --tasks 2 --demos 1 --policy qmdp",
    "run lab/toy.py --out out",
    "verify --experiments lab/toy.py --workers 1 --out out",
)
MODELS = (
    "generate model --data prompts.jsonl --out answers.jsonl --max-tokens 2",
    "export model --out out",
    "export model --dtype bf16 --out out/below",
    "model import model --out out",
    "model import packed/model.gguf --out out",
    "model import packed/model.whl --out out",
)
JOB = "-- --model /lindm/model --data /lindm/data --out /lindm/run"
WRITE_NOTHING = (
    "check data model run",
    "model show model",
    "plan --model model --topology host --batch 1 --seq 16 --labels-per-row 8 --mesh fsdp=1",
    "solve TIGER --horizon 2",
    "act qmdp TIGER --horizon 2 --history=",
    "families",
    f"launch slurm --nodes 4 --gpus-per-node 8 {JOB}",
    f"launch tpu --topology v5e:4x4 --zone us-west4-a --shared 10.0.0.2:/share --package lindm[tpu]@file:///lindm/WHEEL {JOB}",
    f"launch gke --topology v5e:4x4 --image registry/lindm:1 --claim disk {JOB}",
    f"launch ray --workers 4 --image registry/lindm:1 --claim disk {JOB}",
)
ELSEWHERE = {
    "sft": "test_sft.py",
    "bench": "below, with a small model",
    "doctor": "opens one file without a name, to see whether it can",
    "ray_job": "needs Ray; it writes what sft does",
}


def test_every_command_is_killed_or_writes_nothing():
    lines = (*AT_ANY_POINT, *AT_A_SAMPLE, *MODELS, *WRITE_NOTHING)
    killed = {name for name in LIFECYCLES if any(f"{line} ".startswith(f"{name} ") for line in lines)}
    assert killed == LIFECYCLES.keys() - ELSEWHERE


@pytest.mark.parametrize("line", AT_ANY_POINT)
def test_killed_at_any_point_the_same_command_finishes(kill_server, killed, start, tmp_path, line):
    if "features.csv" in line:
        start = shutil.copytree(start, tmp_path / "start")
        (start / "features.csv").write_text("\n".join(f"{i % 3},{i % 5},{i % 7}" for i in range(50)))
    killed(words(line), start=start, same=same).check()


@pytest.mark.parametrize("line", AT_A_SAMPLE)
def test_killed_at_a_sample_of_points_the_same_command_finishes(kill_server, killed, start, line):
    killed(words(line), start=start, same=same).check(both_ends_and(3))


@pytest.mark.parametrize("line", MODELS)
def test_a_model_is_there_as_a_whole_or_not_at_all(kill_server, killed, start, line):
    killed(words(line), start=start, same=same).check()


@pytest.mark.parametrize("line", WRITE_NOTHING)
def test_a_command_that_prints_its_result_changes_no_file(kill_server, start, line):
    before = content(start)
    done = kill_server.run(start, words(line))
    assert (done.code, done.points) == (0, []), done.output
    assert content(start) == before


BENCH = """
import sys
from lindm.bench import mixed_lengths, sft
from lindm.cli.main import main
from lindm.llm.config import read_model_config
from pathlib import Path
sft.MODEL = read_model_config(Path("model"))
sft.in_worker = lambda *arguments, variables=None: {"model": Path(arguments[-1], "model.safetensors").stat().st_size}
sft.rows = lambda ours, peer, names: []
mixed_lengths.benchmark = lambda name: []
sys.exit(main())
"""


def test_a_bench_leaves_nothing_behind(kill_server, killed, start):
    killed(words("bench sft"), start=start, source=BENCH).check(both_ends_and(3))


SOLUTION = """
from lindm.api.problems import read_pomdp
from lindm.api.solutions import solve
import sys
solve(read_pomdp(sys.argv[1], horizon=2)).save("solution.npz")
"""


def test_a_solution_is_there_as_a_whole_or_not_at_all(kill_server, killed, start):
    killed(words("TIGER"), start=start, source=SOLUTION, same=same).check()


def test_a_sweep_that_is_killed_twenty_times_measures_only_the_missing_points(kill_server, start, tmp_path, trials):
    """Each kill is in the middle of the line of a record; the line is cut off and its point is measured again."""
    line = words("run lab/toy.py --seeds 20 --out out")
    root = tmp_path / "root"  # the same for both: the manifest has the path of the experiment
    shutil.copytree(start, root)
    assert kill_server.run(root, line).code == 0
    whole = content(root / "out", same)
    shutil.rmtree(root / "out")
    for number in range(20):
        done = kill_server.run(root, line, ("write", "out/records.jsonl"), half=True)
        assert done.code == -9, done.output
        lines = (root / "out" / "records.jsonl").read_bytes()
        assert lines.count(b"\n") == 0 and lines
        trials.add()
        if number == 0:
            first = lines
        assert lines == first
    measured = 0
    for number in range(1, 20):  # a kill after the line of a record keeps it
        done = kill_server.run(root, line, ("open", "out/metrics.jsonl"))
        measured += done.code == -9
        trials.add()
        assert (root / "out" / "records.jsonl").read_bytes().count(b"\n") == number
    done = kill_server.run(root, line)
    assert done.code == 0 and measured == 19, done.output
    assert content(root / "out", same) == whole
    assert len((root / "out" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.fault("F33")
@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_everything_that_commands_write_has_the_permissions_of_the_umask(kill_server, start, tmp_path, umask):
    root = tmp_path / "root"
    shutil.copytree(start, root)
    lines = (
        "data export data --to trl --out trl",
        "export model --out exported",
        "report run --out report",
        "run lab/toy.py --out new",
    )
    make = "data make TIGER --horizon 2 --tasks 2 --demos 1 --out made"
    for line in (*lines, make):
        source = f"import os; os.umask({umask}); import sys; from lindm.cli.main import main; sys.exit(main())"
        done = kill_server.run(root, words(line), code=source)
        assert done.code == 0, done.output
    for name in ("trl", "exported", "report", "new", "made"):
        for path in (root / name, *(root / name).rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert not list(root.rglob(f"*{TEMPORARY_SUFFIX}"))
