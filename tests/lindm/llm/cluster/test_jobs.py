"""Job files: what will read them reads them, and what is wrong is refused."""

import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from lindm.api.models import sft_config
from lindm.cli import launch, sft
from lindm.cli.main import main
from lindm.cli.option_parser import parse, run_command
from lindm.llm.cluster.jobs import GKEJob, RayJob, RayWorkers, SlurmJob, TPUJob, check_options, entrypoint, job_file
from lindm.llm.sft.options import SFTConfig
from tests.lindm.llm.cluster.example_jobs import GKE, JOBS, PACKAGE, RAY, SLURM, TPU, WORDS


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
        (
            TPUJob,
            {"topology": "v5e:4x4", "zone": "z", "package": PACKAGE},
            "shared must be an NFS export such as .* the 4 hosts of v5e:4x4 write",
        ),
        (TPUJob, {"topology": "v5e:2x2", "zone": "z; id", "package": PACKAGE}, "zone must be"),
        (TPUJob, {"topology": "v5e:2x2", "zone": "z", "shared": "x:/a b", "package": PACKAGE}, "shared must be an NFS export"),
        (TPUJob, {"topology": "v5e:2x2", "zone": "z", "package": "a\nb"}, r"package must have no U\+000A"),
        *(
            (TPUJob, {"topology": "v5e:2x2", "zone": "z", "package": package}, r"package must be 'lindm\[tpu\] @ URL', .*; got '")
            for package in ("lindm[tpu]", "lindm[tpu]==0.1.0", "lindm @ https://x.io/a.whl", "jax[tpu] @ https://x.io/a.whl")
        ),
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
    drawn = ("--preset", "tiny", "--draw", "mdp --tasks 3 --demos 2", "--out", "/lindm/run")
    assert refused(RayWorkers(workers=2), *drawn).startswith("draw must be left out with Ray")
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
    adapted = [*WORDS, "--method", "lora"]
    for option in ("--adapter", "--chat-template", "--token-cache", "--eval-data"):
        name = option[2:].replace("-", "_")
        assert f"{name} must be a path below /lindm" in refused(job, *adapted, option, "/home/me/x.jinja")
    assert "template must be a path below /lindm" in refused(job, *WORDS, "--template", "mine.json")


def test_every_option_with_a_path_may_be_a_text():
    given = {
        "data": "d",
        "out": "o",
        "model": "m",
        "adapter": "a",
        "chat_template": "x.jinja",
        "token_cache": "t",
        "eval_data": "e",
    }
    config = sft_config(method="lora", **given)
    assert {name: getattr(config, name) for name in given} == {name: Path(text) for name, text in given.items()}
    assert {f.name for f in fields(SFTConfig) if "Path" in str(f.type)} == set(given)


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
        (["--", "--model", "m"], "--out"),
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


def test_machines_of_cloud_tpu_get_no_package_by_its_name_alone(capsys):
    given = ["launch", "tpu", "--topology", "v5e:1x1", "--zone", "z"]
    assert main([*given, "--", *WORDS]) == 2
    assert "--package" in capsys.readouterr().err
    assert main([*given, "--package", PACKAGE, "--", *WORDS]) == 0
    assert f"/bin/python\" '{PACKAGE}'\n" in capsys.readouterr().out


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


def test_an_option_of_the_command_after_the_dashes_is_named_as_such(capsys):
    assert main(["launch", "slurm", "--model", "m"]) == 2
    assert "has no option --model (options of lindm sft come after a --)" in capsys.readouterr().err
