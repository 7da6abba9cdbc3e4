"""The command line: how fast help answers, and the messages about wrong arguments."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lindm.cli.main import guarded, main
from lindm.errors import LindmError, Preempted
from lindm.evaluation.policies.registry import LANGUAGE_MODELS, POLICIES
from lindm_experiments.harness.claims import CLAIMS
from lindm_experiments.harness.experiments import experiment_names
from tests.clock import HANGS

TIGER = Path(__file__).parents[1] / "problems" / "files" / "tiger.pomdp"
FOREST = TIGER.with_name("forest.pomdp")

MAKE = ["data", "make", "mdp", "--tasks", "1", "--demos", "2", "--out", "x"]


def lindm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lindm", *arguments], capture_output=True, text=True, timeout=HANGS)


COMMANDS = [
    "verify",
    "run",
    "theory",
    "plot",
    "report",
    "solve",
    "data",
    "model",
    "sft",
    "eval",
    "export",
    "doctor",
    "plan",
    "launch",
    "bench",
]


def cpu_seconds(*arguments: str) -> tuple[float, str]:
    """User and system time of a command, the least of three, and what it prints."""
    seconds, printed = [], ""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = lindm(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        printed = done.stdout
    return min(seconds), printed


def test_help_takes_less_than_half_a_cpu_second_and_names_every_command():
    seconds, page = cpu_seconds("--help")
    assert seconds < 0.5 and all(f"\n  {command} " in page for command in COMMANDS)


@pytest.mark.parametrize("experiment", ["risk", "decisions"])
def test_help_of_an_experiment_takes_less_than_one_and_a_half_cpu_seconds(experiment):
    seconds, page = cpu_seconds("run", experiment, "--help")
    assert seconds < 1.5 and "--seeds INT" in page and "--preset {quick,full,smoke}" in page


@pytest.mark.parametrize(
    "words",
    [[c] for c in COMMANDS if c != "run"] + [["data", "make"], ["model", "import"], ["launch", "tpu"], ["theory", "risk"]],
)
@pytest.mark.parametrize("columns", ["44", "80"])
def test_every_help_page_is_plain_and_fits_its_terminal(words, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    try:
        assert main([*words, "--help"]) == 0
    except SystemExit as e:
        assert e.code == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: lindm {' '.join(words)}") and "\x1b" not in page
    wide = [line for line in page.partition("Examples:")[0].splitlines() if len(line) > int(columns)]
    assert [line for line in wide if len(line.split()) > 1 and not line.startswith("usage")] == []


@pytest.mark.parametrize(
    "words, suggestion",
    [
        ("verfy", "verify"),
        ("data mkae", "make"),
        ("launch slrm", "slurm"),
        ("solve tiger.pomdp --horizn 3", "--horizon"),
        ("sft --presett tiny", "--preset"),
        ("run rsk", "risk"),
        ("run risk --preset smoek", "smoke"),
        ("run risk --seds 3", "--seeds"),
        ("run risk --seed-offset 5", "--base-seed?"),
        ("verify --base-seed 5", "--seed-offset?"),
        ("verify --preset qick", "quick"),
        ("sft --lr 1e-4", "--learning-rate?"),
        ("sft --num_train_epochs 3", "--steps, which counts steps and no epochs?"),
        ("data make pomp --tasks 1 --demos 1 --out x", "pomdp"),
        ("data make mdp --tasks 1 --demos 1 --out x --behavior orcale", "oracle"),
        ("bench solver", "solvers"),
        ("verify --only estimation-slop", "estimation-slope"),
        ("eval mdp --horizon 4 --policy orcale", "oracle"),
        ("eval pmdp", "pomdp"),
        ("solve prostat --horizon 3", "prostate"),
    ],
)
def test_a_misspelled_word_gets_a_suggestion(words, suggestion, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert f"did you mean {suggestion}" in error and error.count("\n") == 1


def test_help_imports_nothing_heavy_and_takes_less_than_a_second_of_a_core():
    code = (
        "import sys, time, lindm.cli.main as cli\n"
        "assert cli.main(['--help']) == 0\n"
        "heavy = {'jax', 'flax', 'optax', 'scipy', 'numpy', 'matplotlib', 'transformers', 'orbax', 'ray', 'torch'}\n"
        "heavy &= sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["verify", "--only", "nonsense"], "only must be one of"),
        (["verify", "--only"], "--only expected at least one argument"),
        (["verify", "--preset", "huge"], "--preset must be one of quick, full, smoke; got 'huge'"),
        (["verify", "--seeds", "-1"], "seeds must be >= 1; got -1"),
        (["verify", "--seeds", "many"], "--seeds must be a whole number; got 'many'"),
        (["verify", "--workers", "0"], "workers must be >= 1; got 0"),
        (["verify", "--colour", "red"], "--colour"),
        (["verify", "--mutants", "--preset", "huge"], "--preset must be one of quick, full, smoke; got 'huge'"),
        (["verify", "--mutants", "--only", "softmax"], "did you mean softmax-limit/price-floor? ("),
        (["verify", "--mutants", "--seeds", "0"], "seeds must be >= 1; got 0"),
        (["verify", "--mutants", "--experiments", "risk"], "--experiments does not apply to --mutants"),
        (["run", "nonsense"], "EXPERIMENT must be one of"),
        (["bench", "nonsense"], "BENCH must be one of attention, solvers, sft, decisions, accelerator; got 'nonsense'"),
        (["sft", "--data", "d", "--out", "o"], "lindm: error: exactly one of model and preset must be given"),
        (["sft", "--preset", "huge", "--data", "d", "--out", "o"], "preset must be one of tiny, small; got 'huge'"),
        (["sft", "--preset", "tiny", "--data", "d", "--out", "o", "--steps", "0"], "steps must be at least 1; got 0"),
        (["sft", "--preset", "tiny", "--data", "d", "--out", "o", "--rank", "1"], "must be given together"),
        (["launch", "nonsense", "--", "--preset", "tiny"], "lindm launch has the commands slurm, tpu, gke, ray; got 'nonsense'"),
        (["launch", "slurm", "--nodes", "2"], "the options of lindm sft must follow a --"),
        (["solve", "a.pomdp"], "--horizon"),
        (["solve", "--horizon", "3"], "the following arguments are required: PROBLEM"),
        (["solve", "prostate", "--horizon", "0"], "horizon must be a whole number of at least 1; got 0"),
        (["solve", "prostate", "--horizon", "2", "--alpha", "2"], "alpha must be"),
        (["solve", "prostate", "--horizon", "2", "--method", "magic"], "method must be one of auto, tree, hsvi, net"),
        (["solve", "prostate", "--horizon", "2", "--method", "hsvi"], "method hsvi needs one model"),
        (["solve", "a.pomdp", "b.pomdp", "--horizon", "2"], "alpha must be given for several files"),
        (["solve", "a.pomdp", "--horizon", "forever"], "--horizon must be a whole number or inf; got 'forever'"),
        (
            ["solve", "a.pomdp", "b.pomdp", "--horizon", "inf"],
            "--horizon inf takes one model: an ambiguous problem must have a finite horizon",
        ),
        (["solve", "prostate", "--horizon", "inf"], "horizon must be finite for prostate: the criterion of an ambiguous problem"),
        (["solve", "dosing", "--horizon", "inf"], "horizon must be finite for dosing: the criterion of an ambiguous problem"),
        (["solve", "pomdp", "--horizon", "inf"], "horizon must be finite for pomdp: the random suites are made for a horizon"),
        (
            ["solve", "screening", "--horizon", "inf"],
            "--discount must be given, below 1, where the horizon is inf: scre",
        ),
        (["solve", "screenin", "--horizon", "inf"], "got 'screenin'; did you mean screening?"),
        (
            ["data", "make", "screening", "--horizon", "inf", "--tasks", "1", "--demos", "1", "--out", "d"],
            "--horizon must be a whole number here, since",
        ),
        (["eval", "screening", "--horizon", "inf"], "--horizon must be a whole number here, since datasets and evaluations"),
        (["solve", "a.pomdp", "--horizon", "inf", "--method", "tree"], "--method must be point-based, value-iteration, policy-"),
        (["solve", "a.pomdp", "--horizon", "inf", "--effort", "9"], "--effort does not apply to point-based; got 9"),
        (["solve", "prostate", "--horizon", "4", "--timeout", "9"], "--timeout is an option of point-based; got 9"),
        (
            ["solve", "a.pomdp", "--horizon", "inf", "--save", "p.txt"],
            "--save must end in .alpha, .json, .svg",
        ),
        (["solve", str(TIGER), "--horizon", "4", "--save", "p.alpha"], "an .alpha file holds one set of vectors"),
        (["solve", str(FOREST), "--horizon", "inf", "--rules"], "--rules does not apply to an MDP"),
        (["solve", "prostate", "--horizon", "4", "--rules"], "--rules is an option of point-based"),
        (
            ["solve", str(FOREST), "--horizon", "inf", "--save", "p.alpha"],
            "--save must end in .json for an MDP",
        ),
        (
            ["solve", str(TIGER), "--horizon", "inf", "--method", "value-iteration"],
            "value-iteration needs a state that",
        ),
        (["solve", str(FOREST), "--horizon", "inf", "--method", "point-based"], "method point-based is for POMDPs"),
        (["solve", str(TIGER), "--horizon", "inf", "--tolerance=-1"], "tolerance must be a number >= 0, or a percentage"),
        (["solve", str(TIGER), "--horizon", "inf", "--timeout", "0"], "timeout must be above 0 seconds; got 0"),
        (["solve", str(TIGER), "--horizon", "inf", "--discount", "1"], "discount must be below 1 where the horizon is infinite"),
        (["data", "make", "mdp", "--demos", "2", "--out", "x"], "--tasks"),
        (["data", "make", "mdp", "--tasks", "0", "--demos", "2", "--out", "x"], "tasks must be a whole number of at least 1"),
        (
            [*MAKE, "--horizon", "0"],
            "horizon must be a whole number of at least 1; got 0",
        ),
        (
            [*MAKE, "--split", "test"],
            "split must be one of id, ood",
        ),
        ([*MAKE, "--alpha", "1"], "an option of mdp must be one of horizon, split"),
        (
            ["data", "make", "maze", "--tasks", "1", "--demos", "2", "--out", "x"],
            "PROBLEM must be one of mdp, pomdp",
        ),
        (["data", "make", "--tasks", "1", "--demos", "2", "--out", "x"], "arguments are required: PROBLEM"),
        (["data", "make", "a.pomdp", "--tasks", "1", "--demos", "2", "--out", "x"], "horizon must be given"),
        (["data", "make", "a.pomdp", "--tasks", "1", "--demos", "2", "--out", "x", "--split", "ood"], "split must be left out"),
        (
            [*MAKE, "--behavior", "wild"],
            "behavior must be one of",
        ),
        ([*MAKE, "--epsilon", "2"], "epsilon must be"),
        (["plot"], "lindm plot"),
    ],
)
def test_a_usage_error_is_exit_2_and_one_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("lindm: error: ") and error.count("\n") == 1


def test_a_directory_without_records_is_exit_3(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 3
    assert "DIR must contain records.jsonl" in capsys.readouterr().err


def test_an_unknown_claim_is_answered_with_some_of_the_known_ones_and_how_to_find_the_others(capsys):
    main(["verify", "--only", "nonsense"])
    error = capsys.readouterr().err
    assert "against-statistics/bayes" in error and f"({len(CLAIMS)} in all)" in error and "'nonsense'" in error
    assert "lindm run --list" in error and len(error) < 800


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __import__("lindm").__version__


def test_the_debug_switch_shows_the_traceback_and_keeps_the_exit_code(monkeypatch, capsys):
    for switch in ("0", "1"):
        monkeypatch.setenv("LINDM_DEBUG", switch)
        assert main(["run", "nonsense"]) == 2
        error = capsys.readouterr().err
        assert "lindm: error: EXPERIMENT must be one of" in error and "report" not in error
        assert ("Traceback" in error) == (switch == "1")


def test_an_unexpected_error_ends_with_70_its_traceback_and_a_line_that_asks_for_a_report(monkeypatch, capsys):
    def fail(words):
        raise AttributeError("no such field")

    monkeypatch.setattr("lindm.cli.main._dispatch", fail)
    assert main(["plan"]) == 70
    *above, error, ask = capsys.readouterr().err.splitlines()
    assert above[0].startswith("Traceback") and "in fail" in "".join(above)
    assert error == "lindm: error: AttributeError: no such field" and "report" in ask


def test_a_failure_of_no_other_kind_ends_with_70_in_one_line(monkeypatch, capsys):
    def fail(words):
        raise LindmError("the worker died")

    monkeypatch.setattr("lindm.cli.main._dispatch", fail)
    assert main(["plan"]) == 70
    assert capsys.readouterr().err == "lindm: error: the worker died\n"


def test_bench_prints_the_rows_of_the_benchmark(monkeypatch, capsys):
    row = {"work": "solve", "ours": 2.0, "peer": None, "peer_name": "nobody", "ratio": None, "unit": "s"}
    monkeypatch.setattr("lindm.bench.attention.benchmark", lambda: [row])
    assert main(["bench", "attention", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [row]
    assert main(["bench", "attention"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["solve", "2", "-", "-", "s", "nobody"]


def test_the_help_of_eval_has_a_sentence_for_every_policy(monkeypatch, capsys):
    for columns in (40, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            main(["eval", "--help"])
        page = capsys.readouterr().out
        table = page[page.index("Policies:") : page.index("Examples:")]
        assert all(f"  {name}" in table for name in (*POLICIES, *LANGUAGE_MODELS))
        assert " ".join(table.split()).count(POLICIES["bc"].summary.rstrip(".")) == 1
        assert max(map(len, table.splitlines())) <= columns


@pytest.mark.slow
@pytest.mark.fault("F2")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_prints_a_message_and_keeps_finished_results(tmp_path, number):
    def make(out):
        words = ["data", "make", "mdp", "--horizon", "4", "--tasks", "30000", "--demos", "1", "--out", str(out)]
        return subprocess.Popen([sys.executable, "-m", "lindm", *words], stderr=subprocess.PIPE, text=True)

    process = make(tmp_path / "data")
    while process.poll() is None and not (tmp_path / "data" / "progress.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=HANGS)
    *progress, last = error.splitlines()  # on a busy machine there is a line of progress every ten seconds
    assert process.returncode == 75 and last == f"lindm: stopped by {number.name}; the same command resumes", error
    assert all(line.startswith("tasks: ") for line in progress)
    assert not list((tmp_path / "data").glob(".*"))
    assert (tmp_path / "data" / "progress.jsonl").exists() and not (tmp_path / "data" / "manifest.json").exists()


def test_experiments_are_listed_with_their_minutes_and_questions(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in (["run"], ["run", "--list"]):
        assert main(words) == 0
        page = capsys.readouterr().out
        assert all(f"\n  {name} " in page for name in experiment_names())
        assert "  risk                    0." in page and "How large are the two parts of the error of Qhat" in page
        assert max(map(len, page.splitlines())) <= 80


def test_a_reader_that_closes_the_output_ends_the_command_without_a_word():
    command = f"{sys.executable} -m lindm run | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=HANGS)
    assert done.stderr == "" and done.stdout.splitlines()[-1] in ("0", "141")


@pytest.mark.fault("F27")
def test_the_stop_of_a_run_that_has_saved_is_no_error(capsys):
    def saved():
        raise Preempted("stopped by a signal: saved step 2 of 4; the same command resumes")

    assert guarded(saved) == 75
    assert capsys.readouterr().err == "lindm: stopped by a signal: saved step 2 of 4; the same command resumes\n"


def test_a_reader_that_closed_the_output_is_exit_141():
    code = "import sys\nfrom lindm.cli.main import guarded\ndef run():\n    raise BrokenPipeError\nsys.exit(guarded(run))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.fault("F16")
@pytest.mark.parametrize(
    "allocate",
    ["import numpy; numpy.zeros(2**50)", "import jax.numpy; jax.numpy.zeros(2**46).block_until_ready()", "bytearray(2**50)"],
    ids=["numpy", "XLA", "Python"],
)
def test_memory_that_runs_out_in_any_command_is_exit_6_with_advice(allocate, capsys):
    assert guarded(lambda: exec(allocate)) == 6
    error = capsys.readouterr().err
    assert "does not fit in memory" in error and "; try a smaller problem" in error and error.count("\n") == 1
