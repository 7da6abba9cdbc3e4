"""`lindm sft` on Ray: python -m lindm.cli.ray_job --workers 4 --cpus 8 -- --model DIR --data DIR --out DIR

Ray Train places the workers on hosts and numbers them; everything else is the training that any other launcher starts. Ray's own
initialization of JAX is not used: it does nothing on CPUs, where each worker would silently train a model of its own. The workers
join by `lindm.llm.parallel.processes.initialize`, at the address of worker 0.

A lost worker ends the others. Training then restarts in new workers from the last checkpoint, at most `restarts` times.
"""

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

from lindm.errors import LindmError, LostPeerError, UsageError
from lindm.llm.cluster.jobs import RayWorkers
from lindm.llm.parallel.chips import parse_topology
from lindm.llm.sft.options import SFTConfig

WorkerFunction = Callable[[dict[str, Any]], None]


def train(config: dict[str, Any]) -> None:
    """The function of a worker: `lindm sft` as one of several processes. `config` has the options."""
    import jax

    from lindm.llm.sft import trainer

    coordinator, processes, rank = find_peers()
    trainer.train(dataclasses.replace(config["options"], coordinator=coordinator, processes=processes, rank=rank))
    if processes > 1:
        jax.distributed.shutdown()  # together: Ray ends workers one after another


def find_peers() -> tuple[str, int, int]:
    """Called in a worker: address of worker 0, number of workers, number of this worker."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray.train import collective, get_context  # pyright: ignore[reportMissingImports]

    rank, address = get_context().get_world_rank(), None
    if rank == 0:
        host = ray.util.get_node_ip_address()
        with Listener((host, 0), family="AF_INET") as free:  # an unused port
            address = f"{host}:{free.address[1]}"
    return str(collective.broadcast_from_rank_zero(address)), get_context().get_world_size(), rank


def run(job: RayWorkers, options: SFTConfig, worker: WorkerFunction = train) -> int:
    """Train on Ray; 0.

    Raises:
      UsageError: Ray is not installed.
      LindmError: the error that ended the training.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.train import RunConfig, ScalingConfig, TrainingFailedError  # pyright: ignore[reportMissingImports]
        from ray.train.v2.jax import JaxConfig, JaxTrainer  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UsageError(f"Ray is not installed: pip install -e '.[ray]' ({e})") from e
    options = with_absolute_paths(options)
    ray.init(ignore_reinit_error=True)
    storage = options.out / ".ray"
    shutil.rmtree(storage, ignore_errors=True)  # of a job that was killed
    lost = LostPeerError("")
    for attempt in range(job.restarts + 1):
        trainer = JaxTrainer(
            worker,
            train_loop_config={"options": options},
            jax_config=JaxConfig(use_tpu=False, use_gpu=False),
            scaling_config=ScalingConfig(**scaling_config(job)),
            run_config=RunConfig(
                name=f"attempt-{attempt}", storage_path=str(storage), worker_runtime_env={"env_vars": worker_environment(job)}
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as e:
            lost = find_cause(e)
            if not isinstance(lost, LostPeerError):
                raise lost from e
            print(f"lindm: attempt {attempt + 1} of {job.restarts + 1}: {lost}", file=sys.stderr)
        else:
            return 0
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    raise lost


def with_absolute_paths(options: SFTConfig) -> SFTConfig:
    """The options with absolute paths: workers have other working directories."""
    changed: dict[str, Any] = {
        field.name: path.absolute()
        for field in dataclasses.fields(options)
        if isinstance(path := getattr(options, field.name), Path)
    }
    if options.template is not None and options.template.endswith((".json", ".toml")):
        changed["template"] = str(Path(options.template).absolute())
    return dataclasses.replace(options, **changed)


def scaling_config(job: RayWorkers) -> dict[str, Any]:
    """The arguments of Ray's `ScalingConfig`."""
    if job.topology is None:
        resources = {"CPU": job.cpus} | ({"GPU": job.gpus} if job.gpus else {})
        return {"num_workers": job.num_workers, "use_gpu": job.gpus > 0, "resources_per_worker": resources}
    tpu = parse_topology(job.topology)
    return {
        "num_workers": tpu.num_hosts,
        "use_tpu": True,
        "topology": tpu.shape,
        "accelerator_type": tpu.generation.ray_type,
        "resources_per_worker": {"CPU": job.cpus, "TPU": tpu.chips_per_host},
    }


def worker_environment(job: RayWorkers) -> dict[str, str]:
    """Environment variables of the workers; otherwise they have the environment of the cluster."""
    platforms = "tpu,cpu" if job.topology else "cuda,cpu" if job.gpus else "cpu"
    given = {name: os.environ[name] for name in ("JAX_PLATFORMS", "XLA_FLAGS", "LINDM_DEBUG") if name in os.environ}
    return {"HF_HUB_OFFLINE": "1", "RAY_TRAIN_V2_ENABLED": "1", "JAX_PLATFORMS": platforms} | given


def find_cause(error: BaseException) -> LindmError:
    """The error that ended the training: one that a worker raised; otherwise a lost worker, or an unexpected error."""
    causes = [e for failure in getattr(error, "worker_failures", {}).values() for e in _chain(failure)]
    errors = [e for e in causes if isinstance(e, LindmError)]
    if errors:  # a worker that failed ends the others, which then report a lost peer
        return min(errors, key=lambda e: isinstance(e, LostPeerError))
    value_error = next((e for e in causes if isinstance(e, ValueError)), None)
    if value_error is not None:
        return UsageError(str(value_error))
    if causes and type(causes[0]).__module__.startswith("ray."):  # an error of Ray, not of the training: the worker died
        return LostPeerError(f"a worker was lost: {_last_line(causes[0])}")
    return LindmError(f"{type(error).__name__}: {_last_line(causes[0] if causes else error)}")


def _chain(e: BaseException | None) -> Iterator[BaseException]:
    while e is not None:
        yield e
        e = getattr(e, "cause", None) or e.__cause__


def _last_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[-1][:300]
