"""Job files run with stand-ins for what runs them, and bring every option through."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lindm.llm.cluster.jobs import job_file
from tests.clock import HANGS
from tests.lindm.llm.cluster.example_jobs import GKE, JOBS, PACKAGE, RAY, SLURM, TPU, WORDS

# --- every option comes through ------------------------------------------------------------------------------------------

plain = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="\ufeff\ufffe\uffff")
AWKWARD = [
    "$HOME",
    "$(id)",
    "$$(HOME)",
    "`id`",
    "it's",
    "\\",
    "\\n",
    "!x",
    "*",
    "~",
    "#",
    "%j",
    "WORK",
    "--",
    "-",
    "é漢🙂",
    "<&>",
]
AWKWARD += ["null", "'", '"', "\\'", "$", "$$", "$$$(A)$", "\u200d"]
awkward = st.sampled_from([*AWKWARD, "", "a b", 'say "x"', "{{ 1 }}", "{% x", "a: b", "- x", "\u00a0", "\u3000"])
words = st.lists(st.text(plain, max_size=8) | awkward, max_size=6)

# puts its own words, each ended by a NUL, into a file, and ends with the next of the exit codes that are left
FAKE = """#!/bin/bash
printf '%s\\0' "$@" > "$RECORDS/words"
printf '%s ' lindm "$HF_HUB_OFFLINE" "$JAX_PLATFORMS" "${JAX_LOCAL_DEVICE_IDS:-}" >> "$RECORDS/calls"; echo >> "$RECORDS/calls"
[ -s "$RECORDS/codes" ] || exit 0
read -r code < "$RECORDS/codes"; sed -i 1d "$RECORDS/codes"
case "$code" in *!*) echo "${code#*!}" > "$RECORDS/state"; code="${code%!*}" ;; esac
exit "$code"
"""
SRUN = """#!/bin/bash
echo "srun $*" | sed 's/ lindm .*//' >> "$RECORDS/calls"
while [ "$1" != lindm ]; do shift; done
exec "$@"
"""
CALL = """#!/bin/bash
echo "$(basename "$0") $*" >> "$RECORDS/calls"
"""
# stand-ins: machines that exist right after they are requested, and those of a queue after a wait
GCLOUD = """#!/bin/bash
set -eu
shift 2
case "$1 $2" in
  "tpu-vm describe") cat "$RECORDS/state" ;;
  "queued-resources describe") cat "$RECORDS/queue" ;;
  "tpu-vm create") echo "$*" >> "$RECORDS/calls"; echo READY > "$RECORDS/state" ;;
  "queued-resources create") echo "$*" >> "$RECORDS/calls"; echo ACTIVE > "$RECORDS/queue" ;;
  "tpu-vm delete") echo "$*" >> "$RECORDS/calls"; : > "$RECORDS/state" ;;
  "queued-resources delete") echo "$*" >> "$RECORDS/calls"; : > "$RECORDS/state"; : > "$RECORDS/queue" ;;
  "tpu-vm ssh")
    for word in "$@"; do
      case "$word" in --command=*) command="${word#--command=}" ;; *) printf '%s ' "$word" >> "$RECORDS/calls" ;; esac
    done
    echo >> "$RECORDS/calls"
    exec bash -c "$command" ;;
esac
"""
SLEEP = """#!/bin/bash
echo "sleep $*" >> "$RECORDS/calls"
[ ! -s "$RECORDS/queue" ] || echo READY > "$RECORDS/state"
"""
# what installs: `python3 -m uv venv DIR` leaves a `lindm` in it
PYTHON = """#!/bin/bash
echo "python3 $*" >> "$RECORDS/calls"
if [ "$3" = venv ]; then mkdir -p "${!#}/bin"; cp "$(dirname "$0")/lindm" "${!#}/bin/lindm"; fi
"""


class Stage:
    """A PATH with stand-ins in front, which write down their arguments."""

    def __init__(self, directory: Path):
        self.records = directory
        self.bin = directory / "bin"
        self.bin.mkdir()
        fakes = {"lindm": FAKE, "srun": SRUN, "gcloud": GCLOUD, "sleep": SLEEP, "python3": PYTHON, "python": FAKE}
        fakes |= dict.fromkeys(("scontrol", "sudo", "mount.nfs"), CALL)
        fakes["mountpoint"] = CALL + "exit 1\n"
        for name, text in fakes.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        self.set()

    def set(self, codes: tuple = (), state: str = "", queue: str = "") -> None:
        for name, text in {"codes": "\n".join(map(str, codes)), "state": state, "queue": queue, "calls": "", "words": ""}.items():
            (self.records / name).write_text(text and text + "\n")

    def run(self, command: list[str], text: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.records), "RECORDS": str(self.records)}
        environment |= {"LC_ALL": "C.UTF-8", "SLURM_JOB_ID": "17"} | more
        return subprocess.run(command, input=text, text=True, capture_output=True, env=environment, timeout=HANGS)

    @property
    def words(self) -> list[str]:
        return (self.records / "words").read_bytes().decode().split("\0")[:-1]

    @property
    def calls(self) -> list[str]:
        return (self.records / "calls").read_text().splitlines()


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.mark.fault("F19")
@given(words=words)
def test_bash_hands_lindm_the_very_words_on_the_nodes_of_slurm(stage, words):
    stage.set()
    done = stage.run(["bash", "-s"], job_file(SLURM, words))
    assert done.returncode == 0, done.stderr
    assert stage.words == ["sft", *words]


@pytest.mark.fault("F19")
@given(words=words)
def test_bash_hands_lindm_the_very_words_on_the_hosts_of_a_tpu(stage, words):
    stage.set(state="READY")
    done = stage.run(["bash", "-s"], job_file(TPU, words))
    assert done.returncode == 0, done.stderr
    assert stage.words == ["sft", *words]


@pytest.mark.fault("F19")
@given(words=words)
def test_the_shell_hands_python_the_very_words_on_ray(stage, words):
    stage.set()
    (document,) = yaml.safe_load_all(job_file(RAY, words))
    assert stage.run(["sh", "-c", document["spec"]["entrypoint"]]).returncode == 0
    assert stage.words[:3] == ["-m", "lindm.cli.ray_job", "--workers"]
    assert stage.words[stage.words.index("--") + 1 :] == words


def expanded(text: str) -> str:
    """What Kubernetes makes of an argument: $(NAME) is the variable, here shown as <NAME>; $$ is $; a lone $ stays."""
    out, i = "", 0
    while i < len(text):
        if text[i] == "$" and i + 1 < len(text):
            if text[i + 1] == "$":
                out, i = out + "$", i + 2
                continue
            if text[i + 1] == "(" and ")" in text[i + 2 :]:
                end = text.index(")", i + 2)
                out, i = out + f"<{text[i + 2 : end]}>", end + 1
                continue
        out, i = out + text[i], i + 1
    return out


@pytest.mark.fault("F19")
@given(words=words)
def test_kubernetes_hands_lindm_the_very_words(words):
    _, job = yaml.safe_load_all(job_file(GKE, words))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert [expanded(word) for word in container["args"]] == words


def test_environment_variables_are_not_written(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "USER", "HOME"):
        monkeypatch.setenv(name, "s3cr3t-0f-mine")
    for job in JOBS:
        assert "s3cr3t" not in job_file(job, WORDS)


# --- what the scripts do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, restarts, again",
    [
        (0, "0", False),
        (75, "0", True),
        (75, "99", True),
        (8, "0", True),
        (8, "4", True),
        (8, "5", False),
        (137, "0", True),
        (137, "5", False),
        (3, "0", False),
    ],
)
def test_a_job_of_slurm_queues_again_when_it_was_stopped_or_lost_a_process(stage, code, restarts, again):
    stage.set(codes=(code,))
    done = stage.run(["bash", "-s"], job_file(JOBS[1], WORDS), SLURM_RESTART_COUNT=restarts)
    assert done.returncode == code
    requeued = ["scontrol requeue 17", "sleep 60"] if again else []
    assert stage.calls == ["srun --wait=120 --cpus-per-task=32", "lindm 1 cuda,cpu 0,1,2,3,4,5,6,7 ", *requeued]


def test_machines_that_are_not_there_are_created_and_prepared(stage):
    stage.set()
    done = stage.run(["bash", "-s"], job_file(TPU, WORDS), HOME=str(stage.records / "new home"))
    assert done.returncode == 0, done.stderr
    home = stage.records / "new home"
    assert stage.calls == [
        "tpu-vm create lindm-sft --zone=us-west4-a --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite",
        "tpu-vm ssh lindm-sft --zone=us-west4-a --worker=all ",
        "mountpoint -q /lindm",
        "sudo mkdir -p /lindm",
        "sudo mount -t nfs -o rw,hard 10.0.0.2:/share /lindm",
        "sudo chmod a+rwx /lindm",
        "python3 -m pip install --quiet --user uv",
        f"python3 -m uv venv --quiet --clear --python 3.12 {home}/lindm-env",
        f"python3 -m uv pip install --quiet --python {home}/lindm-env/bin/python {PACKAGE}",
        "lindm 1 tpu,cpu  ",
    ]
    assert done.stderr.endswith("to delete the machines: gcloud compute tpus tpu-vm delete lindm-sft --zone=us-west4-a\n")


def of_gcloud(stage) -> list[str]:
    return [" ".join(call.split()[:2]) for call in stage.calls if call.startswith(("tpu-vm", "queued"))]


def test_training_that_was_stopped_goes_on_at_once_and_one_that_failed_does_not(stage):
    stage.set(codes=(75, 75, 0), state="READY")
    assert stage.run(["bash", "-s"], job_file(JOBS[3], WORDS)).returncode == 0
    assert of_gcloud(stage) == ["tpu-vm ssh"] and [c for c in stage.calls if c.startswith("lindm")] == ["lindm 1 tpu,cpu  "] * 3
    for codes, end in (((75, 5, 0), 5), ((8, 137, 75, 0), 0), ((8,) * 6 + (0,), 8), ((1, 0), 1)):
        stage.set(codes=codes, state="READY")
        assert stage.run(["bash", "-s"], job_file(JOBS[3], WORDS)).returncode == end
        assert of_gcloud(stage) == ["tpu-vm ssh"]
        assert sum(call.startswith("lindm") for call in stage.calls) == (6 if end == 8 else codes.index(end) + 1)


def test_machines_that_were_taken_away_are_created_again(stage):
    stage.set(codes=("1!PREEMPTED", 0), state="READY")
    done = stage.run(["bash", "-s"], job_file(JOBS[3], WORDS))
    assert done.returncode == 0, done.stderr
    assert of_gcloud(stage) == ["tpu-vm ssh", "tpu-vm delete", "tpu-vm create", "tpu-vm ssh"]
    assert any("--project=p" in call and "--accelerator-type=v6e-4" in call and call.endswith("--spot") for call in stage.calls)


def test_machines_are_waited_for_in_the_queue(stage):
    job = JOBS[5]
    stage.set(codes=("1!PREEMPTED", 0))
    done = stage.run(["bash", "-s"], job_file(job, WORDS))
    assert done.returncode == 0, done.stderr
    once = ["queued-resources create", "tpu-vm ssh"]
    assert of_gcloud(stage) == [*once, "queued-resources delete", *once] and "sleep 30" in stage.calls
    assert "--node-id=lindm-sft --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --spot" in stage.calls[0]
    stage.set(queue="SUSPENDED")
    assert stage.run(["bash", "-s"], job_file(job, WORDS)).returncode == 0
    assert of_gcloud(stage) == ["queued-resources delete", *once]
    stage.set(queue="FAILED")
    done = stage.run(["bash", "-s"], job_file(job, WORDS))
    assert done.returncode == 1 and "the request for v5p:4x4x4 failed" in done.stderr and of_gcloud(stage) == []
