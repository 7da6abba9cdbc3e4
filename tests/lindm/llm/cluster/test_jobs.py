"""Job files: they are read by what will read them, run with stand-ins for what runs them, and bring every option through."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lindm.cli import launch, sft
from lindm.cli.main import main
from lindm.cli.option_parser import parse, run_command
from lindm.llm.cluster.jobs import GKEJob, RayJob, RayWorkers, SlurmJob, TPUJob, check_options, entrypoint, job_file
from lindm.llm.sft.options import SFTConfig
from tests.clock import HANGS

WORDS = ["--model", "/lindm/model", "--data", "/lindm/data", "--out", "/lindm/run"]
SLURM = SlurmJob(nodes=4)
TPU = TPUJob(topology="v5e:4x4", zone="us-west4-a", shared="10.0.0.2:/share")
GKE = GKEJob(topology="v5p:2x2x4", image="registry.io/me/lindm:1", claim="runs")
RAY = RayJob(workers=2, cpus=4, image="registry.io/me/lindm:1", claim="runs")
JOBS = [
    SLURM,
    SlurmJob(nodes=1, gpus_per_node=8, cpus_per_node=32, time="1-12:00:00", partition="a,b", account="me", name="x"),
    TPU,
    TPUJob(topology="v6e:2x2", zone="z", project="p", spot=True),
    TPUJob(topology="v5p:4x4x4", zone="z", queued=True, shared="nfs:/", package="lindm[tpu] @ https://x.io/a b.whl"),
    TPUJob(topology="v5p:4x4x4", zone="z", queued=True, spot=True, shared="nfs:/"),
    GKE,
    GKEJob(topology="v5e:1x1", image="i", bucket="my-bucket", service_account="writer", spot=True, namespace="n"),
    RAY,
    RayJob(workers=3, gpus=2, cpus=8, image="i", claim="c", restarts=0),
    RayJob(topology="v6e:4x4", cpus=100, image="i", claim="c"),
]


def script(job) -> bool:
    return isinstance(job, SlurmJob | TPUJob)


# --- what readers make of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", JOBS, ids=repr)
def test_a_script_is_one_for_bash_and_a_manifest_one_for_yaml(job):
    text = job_file(job, WORDS)
    assert text.endswith("\n") and not any(line.endswith(" ") for line in text.splitlines())
    if script(job):
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
        assert text.startswith("#!/bin/bash\n") and (done.returncode, done.stderr) == (0, "")
    else:
        for document in yaml.safe_load_all(text):
            assert {"apiVersion", "kind", "metadata", "spec"} == document.keys()


def test_the_head_of_an_sbatch_script():
    lines = job_file(JOBS[1], WORDS).splitlines()
    head = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert head == {
        **{"job-name": "x", "nodes": "1", "ntasks-per-node": "1", "gpus-per-node": "8", "cpus-per-task": "32"},
        **{"time": "1-12:00:00", "partition": "a,b", "account": "me", "output": "x-%j.log", "open-mode": "append"},
        **{
            "signal": "TERM@120",
            "requeue": "",
        },  # not B: neither the batch script nor srun, which would kill its tasks, gets the signal
    }
    assert lines.index(next(x for x in lines if not x.startswith("#"))) > max(i for i, x in enumerate(lines) if "#SBATCH" in x)
    few = job_file(SLURM, WORDS)
    assert not any(word in few for word in ("gpus", "partition", "account", "cpus-per-task", "LOCAL_DEVICE"))


def test_a_job_of_gke_has_a_pod_for_each_host_of_the_slice():
    service, job = yaml.safe_load_all(job_file(GKE, WORDS))
    assert (service["kind"], service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == (
        "Service",
        "None",
        True,
    )
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert job["kind"] == "Job" and spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 4
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["selector"] == {
        "job-name": job["metadata"]["name"]
    }
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    (container,) = pod["containers"]
    assert container["command"] + container["args"] == ["lindm", "sft", *WORDS] and container["image"] == GKE.image
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container["env"]
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/lindm"}]
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "runs"}}]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 120  # both as a failure policy needs it


def test_a_job_of_gke_begins_again_when_it_was_stopped_and_not_when_it_would_fail_again():
    _, job = yaml.safe_load_all(job_file(GKE, WORDS))
    rules = job["spec"]["podFailurePolicy"]["rules"]

    def action(code: int) -> str:
        """Of the first rule that fits, as Kubernetes does it; Count is what it does without one."""
        for rule in rules:
            if code in rule.get("onExitCodes", {}).get("values", ()):
                return rule["action"]
        return "Count"

    assert {code: action(code) for code in (2, 3, 4, 5, 6, 7, 8, 75, 137)} == {
        **dict.fromkeys(range(2, 8), "FailJob"),
        **{8: "Count", 75: "Ignore", 137: "Count"},
    }
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]} in rules
    assert job["spec"]["backoffLimit"] == 5 * 4  # all four pods end when one is lost


def test_a_bucket_is_mounted_by_its_driver():
    service, job = yaml.safe_load_all(job_file(JOBS[7], WORDS))
    pod = job["spec"]["template"]
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    (volume,) = pod["spec"]["volumes"]
    assert (
        volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io" and volume["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    )
    assert pod["spec"]["serviceAccountName"] == "writer"
    assert pod["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert service["metadata"]["namespace"] == job["metadata"]["namespace"] == "n"


def test_a_job_of_ray_starts_a_cluster_of_its_workers():
    for job, resources, hosts in [
        (RAY, {"requests": {"cpu": "4"}}, None),
        (JOBS[9], {"requests": {"cpu": "8", "nvidia.com/gpu": 2}, "limits": {"nvidia.com/gpu": 2}}, None),
        (JOBS[10], {"requests": {"cpu": "100", "google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}, 4),
    ]:
        (document,) = yaml.safe_load_all(job_file(job, WORDS))
        spec, cluster = document["spec"], document["spec"]["rayClusterSpec"]
        assert document["kind"] == "RayJob" and spec["submissionMode"] == "HTTPMode" and spec["shutdownAfterJobFinishes"]
        assert shlex.split(spec["entrypoint"]) == entrypoint(job, WORDS)
        assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["HF_HUB_OFFLINE"] == "1"
        (group,) = cluster["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"] == resources and group.get("numOfHosts") == hosts
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == (1 if hosts else job.num_workers)
        for one in (group, cluster["headGroupSpec"]):
            pod = one["template"]["spec"]
            assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == job.claim
            assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/lindm"
        assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}  # no worker may be placed there


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
        f"python3 -m uv pip install --quiet --python {home}/lindm-env/bin/python lindm[tpu]",
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


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["v5e:3x3", "v5p:4x4", "v7:2x2", "v5e", "4x4", "v5e:", "v5e:4x4 "])
def test_a_topology_that_does_not_exist_is_refused_with_the_list_of_those_that_do(topology):
    with pytest.raises(ValueError, match=r"topology must be one of v5e:1x1, 2x2, .*; v6e:.*; v5p:2x2x1.*; got"):
        GKEJob(topology=topology, image="i", claim="c")


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (SlurmJob, {"nodes": 0}, "nodes must be at least 1; got 0"),
        (SlurmJob, {"nodes": 1, "gpus_per_node": -1}, "gpus_per_node must be at least 0"),
        (SlurmJob, {"nodes": 1, "time": "soon"}, "time must be minutes, hours"),
        (SlurmJob, {"nodes": 1, "partition": "a b"}, "partition must be names"),
        (SlurmJob, {"nodes": 1, "name": "x\n#SBATCH --uid=0"}, "name must be at most 51 lower-case letters"),
        (TPUJob, {"topology": "v5e:4x4", "zone": "z"}, "shared must be an NFS export such as .* the 4 hosts of v5e:4x4 write"),
        (TPUJob, {"topology": "v5e:2x2", "zone": "z; id"}, "zone must be"),
        (TPUJob, {"topology": "v5e:2x2", "zone": "z", "shared": "x:/a b"}, "shared must be an NFS export"),
        (TPUJob, {"topology": "v5e:2x2", "zone": "z", "package": "a\nb"}, r"package must have no U\+000A"),
        (GKEJob, {"topology": "v5e:2x2", "image": "i"}, "one of claim and bucket must be given"),
        (GKEJob, {"topology": "v5e:2x2", "image": "i", "claim": "a", "bucket": "bbb"}, "one of claim and bucket must be given"),
        (GKEJob, {"topology": "v5e:2x2", "image": 'i"', "claim": "a"}, "image must be"),
        (RayJob, {"image": "i", "claim": "c"}, "one of workers and topology must be given; got None and None"),
        (RayJob, {"workers": 0, "image": "i", "claim": "c"}, "workers must be at least 1; got 0"),
        (RayJob, {"topology": "v5e:4x4", "gpus": 1, "image": "i", "claim": "c"}, "gpus must be left out with a topology"),
        (RayJob, {"workers": 1, "image": "i", "claim": "c", "ray_version": "new"}, "ray_version must be a version"),
        (RayWorkers, {"workers": 1, "restarts": -1}, "restarts must be at least 0"),
    ],
)
def test_invalid_jobs_raise_errors(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def refused(job, *words: str) -> str:
    with pytest.raises(ValueError) as caught:
        check_options(job, parse(sft.COMMAND, words), words)
    return str(caught.value)


def test_options_that_a_job_may_not_have_are_refused():
    here = ["--model", "m", "--data", "d", "--out", "o"]
    check_options(SLURM, SFTConfig(model=Path("m"), data=Path("d"), out=Path("o")), here)
    assert "coordinator must be left out" in refused(SLURM, *here, "--coordinator", "a:1")
    assert "rank must be left out" in refused(SLURM, *here, "--rank", "0")
    assert "fresh must be left out" in refused(SLURM, *here, "--fresh")
    assert "an option must have no U+000A" in refused(SLURM, *here[:-1], "a\nb")
    assert "an option must have no U+0085" in refused(SLURM, *here[:-1], "a\x85b")


@pytest.mark.parametrize("job", [TPU, GKE, RAY], ids=lambda job: type(job).__name__)
def test_paths_that_not_every_host_sees_are_refused(job):
    check_options(job, parse(sft.COMMAND, [*WORDS, "--eval-data", "/lindm/more"]), WORDS)
    for i, name in ((1, "model"), (3, "data"), (5, "out")):
        for path in ("relative", "/home/me", "/lindm/../etc", "/lindmx"):
            assert f"{name} must be a path below /lindm" in refused(job, *WORDS[:i], path, *WORDS[i + 1 :])
    assert "template must be a path below /lindm" in refused(job, *WORDS, "--template", "mine.json")


def test_the_command_prints_the_file_and_nothing_else(capsys):
    assert run_command(launch.COMMANDS["slurm"], ["--nodes", "4", "--", *WORDS]) == 0
    assert capsys.readouterr().out == job_file(SLURM, WORDS)
    given = ["--workers", "2", "--cpus", "4", "--image", RAY.image, "--claim", "runs"]
    assert run_command(launch.COMMANDS["ray"], [*given, "--", *WORDS]) == 0
    assert capsys.readouterr().out == job_file(RAY, WORDS)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the options of lindm sft must follow a --"),
        (["--"], "the options of lindm sft must follow a --"),
        (["--", "--data", "d", "--out", "o"], "one of model and preset must be given"),
        (["--", *WORDS, "--method", "magic"], "method must be one of full, lora, qlora; got 'magic'"),
        (["--", *WORDS, "--stepz", "3"], "--stepz"),
        (["--", "--model", "m"], "--data"),
        (["--node", "3", "--", *WORDS], "--node"),
    ],
)
def test_wrong_options_are_refused_as_by_lindm_sft_itself(words, message, capsys):
    with pytest.raises(ValueError, match=message):
        run_command(launch.COMMANDS["slurm"], ["--nodes", "4", *words])
    assert capsys.readouterr().out == ""


def test_the_command_line_knows_the_launchers(capsys):
    assert main(["launch", "slurm", "--nodes", "4", "--", *WORDS]) == 0
    assert capsys.readouterr().out == job_file(SLURM, WORDS)
    assert main(["launch", "slurm", "--nodes", "0", "--", *WORDS]) == 2
    assert capsys.readouterr().err == "lindm: error: nodes must be at least 1; got 0\n"


def test_an_unknown_launcher_is_refused(capsys):
    assert main(["launch", "pbs", "--nodes", "4", "--", *WORDS]) == 2
    assert "lindm launch has the commands slurm, tpu, gke, ray; got 'pbs'" in capsys.readouterr().err


def test_nothing_heavy_is_imported():
    code = "import sys, lindm.cli.launch as x\nassert not {'jax', 'numpy', 'jinja2', 'yaml', 'ray'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_templates_are_part_of_the_package():
    names = {path.name for path in (Path(launch.__file__).parents[1] / "templates" / "launch").iterdir()}
    assert names == {"slurm.sh.jinja", "tpu.sh.jinja", "gke.yaml.jinja", "ray.yaml.jinja"}
