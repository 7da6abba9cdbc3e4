"""`lindm sft` by Ray: python -m lindm.cli.ray_job --workers 4 --cpus 8 -- --model DIR --data DIR --out DIR

Ray Train places the workers, on as many hosts, and tells each its number; everything else is the training that any other
launcher starts. Ray's own preparation of JAX is left out: it does nothing for CPUs, where each worker would silently train a
model of its own, so the workers always find each other by `lindm.llm.parallel.processes.start`, at the address of the first of
them.

A worker that is lost ends the others. Training then begins again in new workers, from its last checkpoint, so often as it may.
"""

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

from lindm.errors import LindmError, LostPeerError, Preempted, UsageError
from lindm.llm.cluster.jobs import RAY_TYPES, Workers, slice_of
from lindm.llm.sft.options import SFTConfig

Loop = Callable[[dict[str, Any]], None]


def train(config: dict[str, Any]) -> None:
    """What a worker does: the whole of `lindm sft`, as one of several processes. `config`: the options."""
    import jax

    from lindm.llm.sft import trainer as sft

    coordinator, processes, rank = meet()
    sft.run(dataclasses.replace(config["options"], coordinator=coordinator, processes=processes, rank=rank))
    if processes > 1:
        jax.distributed.shutdown()  # together: Ray ends workers one after another


def meet() -> tuple[str, int, int]:
    """In a worker: the address of the first, how many there are, and which this is."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray.train import collective, get_context  # pyright: ignore[reportMissingImports]

    rank, address = get_context().get_world_rank(), None
    if rank == 0:
        host = ray.util.get_node_ip_address()
        with Listener((host, 0), family="AF_INET") as free:  # a port that nobody has
            address = f"{host}:{free.address[1]}"
    return str(collective.broadcast_from_rank_zero(address)), get_context().get_world_size(), rank


def run(job: Workers, options: SFTConfig, loop: Loop = train) -> int:
    """Train on Ray; 0.

    Raises:
      LindmError: Ray is not installed (2); otherwise what ended the training, with its own exit code.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.train import RunConfig, ScalingConfig, TrainingFailedError  # pyright: ignore[reportMissingImports]
        from ray.train.v2.jax import JaxConfig, JaxTrainer  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UsageError(f"Ray is not installed: pip install 'lindm[ray]' ({e})") from e
    options = absolute(options)
    ray.init(ignore_reinit_error=True)
    storage = options.out / ".ray"
    lost = LostPeerError("")
    for attempt in range(job.restarts + 1):
        trainer = JaxTrainer(
            loop,
            train_loop_config={"options": options},
            jax_config=JaxConfig(use_tpu=False, use_gpu=False),
            scaling_config=ScalingConfig(**scaling(job)),
            run_config=RunConfig(
                name=f"attempt-{attempt}", storage_path=str(storage), worker_runtime_env={"env_vars": environment(job)}
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as e:
            lost = cause(e)
            if not isinstance(lost, LostPeerError | Preempted):
                raise lost from e
            print(f"lindm: attempt {attempt + 1} of {job.restarts + 1}: {lost}", file=sys.stderr)
        else:
            return 0
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    raise lost


def absolute(options: SFTConfig) -> SFTConfig:
    """Workers stand in other directories."""
    changed: dict[str, Any] = {
        field.name: path.absolute()
        for field in dataclasses.fields(options)
        if isinstance(path := getattr(options, field.name), Path)
    }
    if options.template is not None and options.template.endswith((".json", ".toml")):
        changed["template"] = str(Path(options.template).absolute())
    return dataclasses.replace(options, **changed)


def scaling(job: Workers) -> dict[str, Any]:
    """The arguments of Ray's `ScalingConfig`."""
    if job.topology is None:
        resources = {"CPU": job.cpus} | ({"GPU": job.gpus} if job.gpus else {})
        return {"num_workers": job.size, "use_gpu": job.gpus > 0, "resources_per_worker": resources}
    tpu = slice_of(job.topology)
    return {
        "num_workers": tpu.hosts,
        "use_tpu": True,
        "topology": tpu.shape,
        "accelerator_type": RAY_TYPES[tpu.generation],
        "resources_per_worker": {"CPU": job.cpus, "TPU": tpu.per_host},
    }


def environment(job: Workers) -> dict[str, str]:
    """Of the workers: they have that of their cluster, not that of this process."""
    platforms = "tpu,cpu" if job.topology else "cuda,cpu" if job.gpus else "cpu"
    given = {name: os.environ[name] for name in ("JAX_PLATFORMS", "XLA_FLAGS", "LINDM_DEBUG") if name in os.environ}
    return {"HF_HUB_OFFLINE": "1", "RAY_TRAIN_V2_ENABLED": "1", "JAX_PLATFORMS": platforms} | given


def cause(error: BaseException) -> LindmError:
    """What ended the training: what a worker said itself; otherwise workers were lost, or it is a fault."""
    found = [e for failure in getattr(error, "worker_failures", {}).values() for e in _chain(failure)]
    said = [e for e in found if isinstance(e, LindmError)]
    if said:  # a worker that failed ends the others, which then have lost one
        return min(said, key=lambda stop: isinstance(stop, LostPeerError))
    wrong = next((e for e in found if isinstance(e, ValueError)), None)
    if wrong is not None:
        return UsageError(str(wrong))
    if found and type(found[0]).__module__.startswith("ray."):  # not of the training: Ray saw the worker die, or nothing of it
        return LostPeerError(f"a worker was lost: {_line(found[0])}")
    return LindmError(f"{type(error).__name__}: {_line(found[0] if found else error)}")


def _chain(e: BaseException | None) -> Iterator[BaseException]:
    while e is not None:
        yield e
        e = getattr(e, "cause", None) or e.__cause__


def _line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[-1][:300]
