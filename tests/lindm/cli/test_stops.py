"""SIGTERM and Ctrl-C in every phase of every command but `lindm sft`: code, message, what is left, the same command again."""

import shutil
import signal

import numpy as np
import pytest

from lindm.cli.lifecycle import LIFECYCLES
from tests.lindm.cli.stops.phases import FINISHED, TIGER, run, stop_in_every_phase

pytestmark = [pytest.mark.slow, pytest.mark.fault("F2", "F27")]

SMOKE = ["--preset", "smoke", "--out", "v"]
FIGURE = "matplotlib.figure:Figure.savefig"
POMDP = "lindm.problems.cassandra:read"
CONFIG = "lindm.llm.config:read_model_config"
# command -> its words, and where each of its phases is
COMMANDS = {
    "verify": (
        ["verify", *SMOKE, "--only", "controls/swap", "--workers", "1"],
        {
            "import": "lindm_experiments.harness.runner:",
            "evaluating": "lindm_experiments.harness.runner:_State.measured",
            "saving": "lindm.io.files:append_line",
            "drawing": "lindm_experiments.harness.report:render_report",
        },
    ),
    "run": (
        ["run", "controls", *SMOKE, "--seeds", "1"],
        {
            "import": "jax:",
            "compiling": "!compiling",
            "evaluating": "lindm_experiments.harness.tasks:measure",
            "saving": "lindm.io.files:append_line",
            "drawing": FIGURE,
        },
    ),
    "theory risk": (
        ["theory", "risk", "--features", "x.csv", "--train-lengths", "8", "--test-lengths", "4", "--plot", "risk.png"],
        {
            "import": "jax:",
            "reading": "lindm.cli.theory:read_matrix",
            "evaluating": "lindm_experiments.toolkit.risks:risk_grid",
            "drawing": FIGURE,
        },
    ),
    "plot": (
        ["plot", "finished"],
        {"import": "lindm_experiments.harness.report:", "reading": "lindm.io.files:read_json", "drawing": FIGURE},
    ),
    "report": (
        ["report", "finished", "--out", "page"],
        {
            "import": "lindm_experiments.harness.summary:",
            "reading": "lindm.io.files:read_json",
            "drawing": "lindm_experiments.harness.summary:as_latex",
        },
    ),
    "families": (["families"], {"import": "jax:"}),
    "estimate": (
        ["estimate", "log.csv", "--states", "2", "--restarts", "2", "--out", "estimated.pomdp"],
        {
            "import": "jax:",
            "reading": "lindm.io.inputs:read_text",
            "compiling": "!compiling",
            "saving": "lindm.estimation.model_file:_sha256",
        },
    ),
    "solve": (["solve", str(TIGER), "--horizon", "4"], {"import": "jax:", "reading": POMDP, "compiling": "!compiling"}),
    "data make": (
        ["data", "make", str(TIGER), *["--horizon", "3", "--tasks", "4", "--demos", "1", "--out", "made"]],
        {"import": "jax:", "reading": POMDP, "compiling": "!compiling", "saving": "lindm.io.files:append_line"},
    ),
    "data export": (
        ["data", "export", "dataset", "--to", "trl", "--out", "exported"],
        {
            "import": "jax:",
            "reading": "lindm.datasets.reader:read_manifest",
            "exporting": "lindm.datasets.exports:_message:3",
        },
    ),
    "model import": (
        ["model", "import", "model", "--out", "copy"],
        {"import": "jax:", "reading": CONFIG, "exporting": "lindm.llm.io.weights:check_tensors"},
    ),
    "model show": (["model", "show", "model"], {"import": "jax:", "reading": CONFIG}),
    "generate": (
        ["generate", "model", "--data", "prompts.jsonl", "--out", "answers.jsonl", "--max-tokens", "4"],
        {"import": "jax:", "reading": CONFIG, "compiling": "!compiling", "saving": "lindm.io.files:write_atomic"},
    ),
    "eval": (
        ["eval", str(TIGER), *["--horizon", "3", "--tasks", "2", "--demos", "1", "--policy", "qmdp", "--out", "evaluated"]],
        {
            "import": "jax:",
            "reading": POMDP,
            "compiling": "!compiling",
            "evaluating": "lindm.evaluation.optimality_gap:evaluate_policy",
            "saving": "lindm.io.files:write_json",
        },
    ),
    "act": (
        ["act", "oracle", str(TIGER), "--horizon", "3", "--history", ""],
        {"import": "jax:", "reading": POMDP, "compiling": "!compiling"},
    ),
    "export": (
        ["export", "model", "--out", "again"],
        {"import": "jax:", "reading": CONFIG, "exporting": "lindm.llm.io.safetensors_files:write_shards"},
    ),
    "check": (["check", "dataset"], {"import": "lindm_experiments.harness.check:", "reading": "lindm.io.files:sha256_of"}),
    "doctor": (["doctor"], {"import": "jax:", "reading": "lindm.cli.doctor:check_fonts"}),
    "plan": (
        [
            "plan",
            "--model",
            "model",
            "--topology",
            "host",
            "--batch",
            "1",
            "--seq",
            "16",
            "--labels-per-row",
            "8",
            "--mesh",
            "fsdp=1",
        ],
        {"import": "jax:", "reading": CONFIG, "compiling": "!lindm.llm.cluster.plan:compile_plan"},
    ),
    **{
        f"launch {name}": (["launch", name, "--help"], {"import": "lindm.llm.cluster.jobs:"})
        for name in ("slurm", "tpu", "gke", "ray")
    },
}
ELSEWHERE = {
    "sft": "test_stops_sft.py",
    "bench": "tests/lindm/bench/test_timing.py: its work is in a process of its own",
    "ray_job": "needs Ray; it ends as every command does",
}


def test_every_command_is_stopped_in_every_phase():
    assert LIFECYCLES.keys() == COMMANDS.keys() | ELSEWHERE.keys()


@pytest.fixture(scope="module")
def inputs(micro, tmp_path_factory):
    """A model, a dataset, samples and a finished verification, as the commands above name them."""
    directory = tmp_path_factory.mktemp("inputs")
    shutil.copytree(micro.model, directory / "model")
    shutil.copytree(micro.mdp, directory / "dataset")
    rows = [f"{e},{t},{e % 2},{(e + t) % 3}\n" for e in range(8) for t in range(4)]
    (directory / "log.csv").write_text("episode,step,action,observation\n" + "".join(rows))
    (directory / "prompts.jsonl").write_text('{"prompt": "0 A"}\n')
    np.savetxt(directory / "x.csv", np.random.default_rng(0).normal(size=(50, 3)), delimiter=",")
    done = run(["verify", "--preset", "smoke", "--only", "controls/swap", "--workers", "1", "--out", "finished"], directory)
    assert done.returncode in FINISHED, done.stderr
    return directory


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "sigint"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_stop_ends_the_command_in_any_phase(name, first, inputs, tmp_path):
    directory = tmp_path / "work"
    shutil.copytree(inputs, directory)
    words, phases = COMMANDS[name]
    stop_in_every_phase(name, words, phases, directory, first)
