"""Training with Ray: the requested resources, errors of workers, and two real workers that train one model."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lindm.cli import ray_job as cli
from lindm.cli.exit_codes import exit_code
from lindm.cli.main import main
from lindm.cli.option_parser import run_command
from lindm.errors import CheckpointError, DataError, LindmError, LostPeerError, NonFiniteError, UsageError
from lindm.llm.cluster import jobs, ray_job
from lindm.llm.cluster.jobs import RayWorkers
from lindm.llm.parallel.chips import TPU_GENERATIONS, parse_topology
from lindm.llm.sft.options import SFTConfig
from tests.clock import HANGS

OPTIONS = SFTConfig(preset="tiny", data=Path("data"), out=Path("out"))


def test_a_worker_gets_the_requested_resources():
    assert ray_job.scaling_config(RayWorkers(workers=3)) == {
        "num_workers": 3,
        "use_gpu": False,
        "resources_per_worker": {"CPU": 1},
    }
    assert ray_job.scaling_config(RayWorkers(workers=2, cpus=8, gpus=4)) == {
        **{"num_workers": 2, "use_gpu": True, "resources_per_worker": {"CPU": 8, "GPU": 4}},
    }
    assert ray_job.scaling_config(RayWorkers(topology="v5e:4x4", cpus=24)) == {
        **{"num_workers": 4, "use_tpu": True, "topology": "4x4", "accelerator_type": "TPU-V5LITEPOD"},
        "resources_per_worker": {"CPU": 24, "TPU": 4},
    }


def test_a_worker_is_offline_and_uses_the_requested_platform(monkeypatch):
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", "LINDM_DEBUG", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "s3cr3t")
    environments = [
        ray_job.worker_environment(RayWorkers(**options))
        for options in ({"workers": 1}, {"workers": 1, "gpus": 1}, {"topology": "v5e:2x2"})
    ]
    assert [env["JAX_PLATFORMS"] for env in environments] == ["cpu", "cuda,cpu", "tpu,cpu"]
    assert all(env["HF_HUB_OFFLINE"] == "1" and "s3cr3t" not in env.values() for env in environments)
    monkeypatch.setenv("JAX_PLATFORMS", "rocm,cpu")
    assert ray_job.worker_environment(RayWorkers(workers=1))["JAX_PLATFORMS"] == "rocm,cpu"


def test_paths_mean_the_same_in_a_worker_that_stands_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absolute = ray_job.with_absolute_paths(SFTConfig(model=Path("m"), data=Path("/d"), out=Path("o"), template="mine.json"))
    assert (absolute.model, absolute.data, absolute.out, absolute.template) == (
        tmp_path / "m",
        Path("/d"),
        tmp_path / "o",
        f"{tmp_path}/mine.json",
    )
    assert ray_job.with_absolute_paths(OPTIONS).template is None and ray_job.with_absolute_paths(OPTIONS).model is None


class Failed(Exception):
    """As Ray's WorkerGroupError: what went wrong in which worker."""

    def __init__(self, *failures: BaseException):
        self.worker_failures = dict(enumerate(failures))


class OfRay(Exception):
    """An exception that Ray's own machinery raises."""


OfRay.__module__ = "ray.train.v2._internal.exceptions"


def wrapped(e: Exception) -> Exception:
    try:
        raise RuntimeError("a task failed") from e
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    "error, code, message",
    [
        (Failed(DataError("rows.jsonl:4: not JSON")), 3, "rows.jsonl:4"),
        (Failed(LostPeerError("lost"), DataError("bad")), 3, "bad"),  # the worker that failed, not those that lost it
        (Failed(OfRay("died"), NonFiniteError("not finite")), 5, "not finite"),
        (Failed(wrapped(CheckpointError("none usable"))), 4, "none usable"),
        (Failed(ValueError("mesh must use all 8 devices")), 2, "mesh must use"),
        (Failed(OfRay("a line\nthe worker died of SIGKILL")), 8, "a worker was lost: the worker died of SIGKILL"),
        (Failed(KeyError("x")), 70, "'x'"),
        (RuntimeError("no resources"), 70, "RuntimeError: no resources"),
    ],
)
def test_an_error_of_ray_becomes_the_exit_code_of_what_caused_it(error, code, message):
    cause = ray_job.find_cause(error)
    assert exit_code(cause) == code and message in str(cause)


def test_without_ray_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LindmError, match=r"pip install -e '.\[ray\]'") as caught:
        ray_job.run(RayWorkers(workers=2), OPTIONS)
    assert isinstance(caught.value, UsageError)


def test_the_command_line_is_that_of_the_job_file(monkeypatch):
    calls = []
    monkeypatch.setattr(ray_job, "run", lambda job, options: calls.append((job, options)) or 0)
    words = ["--preset", "tiny", "--data", "a b", "--out", "$o"]
    for job in (RayWorkers(workers=3, cpus=2, gpus=1, restarts=0), RayWorkers(topology="v6e:4x4", cpus=7)):
        python, flag, module, *arguments = jobs.entrypoint(job, words)
        assert (python, flag, module) == ("python", "-m", "lindm.cli.ray_job")
        assert run_command(cli.COMMAND, arguments) == 0
        assert calls.pop() == (job, SFTConfig(preset="tiny", data=Path("a b"), out=Path("$o")))
    with pytest.raises(ValueError, match="fresh must be left out"):
        run_command(cli.COMMAND, ["--workers", "1", "--", *words, "--fresh"])


# --- Ray itself ------------------------------------------------------------------------------------------------------------

real = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


def mark(test):
    for one in real:
        test = one(test)
    return test


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs, each a worker's; one device a worker."""
    import ray  # pyright: ignore[reportMissingImports]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.filterwarnings("ignore")
def test_ray_counts_the_hosts_of_a_slice_as_we_do():
    from ray.train import ScalingConfig  # pyright: ignore[reportMissingImports]
    from ray.util.tpu import get_tpu_worker_resources  # pyright: ignore[reportMissingImports]

    for name, generation in TPU_GENERATIONS.items():
        for shape in generation.slices:
            tpu = parse_topology(f"{name}:{shape}")
            hosts, resources = get_tpu_worker_resources(topology=shape, accelerator_type=generation.ray_type)
            assert (hosts, resources["TPU"]) == (tpu.num_hosts, tpu.chips_per_host), (name, shape)
            scaling = ScalingConfig(**ray_job.scaling_config(RayWorkers(topology=f"{name}:{shape}")))
            assert scaling.num_workers == tpu.num_hosts and scaling.num_tpus_per_worker == tpu.chips_per_host
    assert ScalingConfig(**ray_job.scaling_config(RayWorkers(workers=2, gpus=3))).num_gpus_per_worker == 3


@mark
def test_two_workers_are_two_processes_of_one_run_and_a_lost_one_is_replaced(cluster, tmp_path):
    """In the first attempt the second worker is killed."""

    def loop(config):  # inside, so that it travels by value
        import json
        import os
        import signal
        from pathlib import Path

        import jax
        import jax.numpy as jnp

        from lindm.llm.cluster.ray_job import find_peers
        from lindm.llm.parallel import processes as distributed

        distributed.HEARTBEAT_TIMEOUT = 5
        out = Path(config["options"].out)
        coordinator, processes, rank = find_peers()
        distributed.initialize(coordinator, processes, rank)
        if rank == 1 and not (out / "killed").exists():
            (out / "killed").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        mesh = jax.make_mesh((jax.device_count(),), ("all",))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
        parts = jax.make_array_from_callback((jax.device_count(),), everywhere, lambda at: jnp.full(1, 10.0**rank, jnp.float32))
        total = float(jax.jit(jnp.sum)(parts))
        message = {
            "processes": jax.process_count(),
            "devices": jax.device_count(),
            "total": total,
            "ray": os.listdir(out / ".ray"),
        }
        (out / f"{rank}.json").write_text(json.dumps(message | {"offline": os.environ["HF_HUB_OFFLINE"]}))
        jax.distributed.shutdown()

    options = SFTConfig(preset="tiny", data=tmp_path, out=tmp_path)
    assert ray_job.run(RayWorkers(workers=2, restarts=1), options, loop) == 0
    assert (tmp_path / "killed").exists() and not (tmp_path / ".ray").exists()
    for rank in range(2):
        message = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (message["processes"], message["devices"], message["total"], message["offline"]) == (2, 2, 11.0, "1")
        assert message["ray"] == ["attempt-1"]


@mark
def test_an_error_of_a_worker_ends_the_run_without_another_attempt(cluster, tmp_path):
    def loop(config):
        import time
        from pathlib import Path

        from lindm.llm.cluster.ray_job import find_peers

        rank = find_peers()[2]
        with Path(config["options"].out, "attempts").open("a") as f:
            f.write(f"{rank}")
        if rank == 1:
            raise DataError("rows.jsonl:4: not JSON")
        time.sleep(60)

    with pytest.raises(LindmError, match="not JSON") as caught:
        ray_job.run(RayWorkers(workers=2, restarts=3), SFTConfig(preset="tiny", data=tmp_path, out=tmp_path), loop)
    assert isinstance(caught.value, DataError) and sorted((tmp_path / "attempts").read_text()) == ["0", "1"]


@mark
def test_fine_tuning_on_two_workers_is_that_of_one_process(cluster, tmp_path):
    data, here, there = tmp_path / "data", tmp_path / "here", tmp_path / "there"
    assert main(["data", "make", "mdp", "--tasks", "12", "--demos", "2", "--horizon", "4", "--out", str(data)]) == 0
    words = ["--preset", "tiny", "--data", str(data), "--steps", "4", "--eval-tasks", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])}
    command = [sys.executable, "-m", "lindm", "sft", *words, "--out", str(here)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert run_command(cli.COMMAND, ["--workers", "2", "--", *words, "--out", str(there)]) == 0

    def losses(out: Path) -> list[float]:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines)]

    assert len(losses(here)) > 4 and losses(there) == pytest.approx(losses(here), rel=1e-4)
    assert {p.name for p in (here / "model").iterdir()} == {p.name for p in (there / "model").iterdir()}
