"""Job files that run `lindm sft` on many hosts: an sbatch script, a script for Cloud TPU machines, manifests for GKE and for Ray.

A job file is complete. It holds no addresses, since every launcher gives them to the processes, and nothing of this environment.
The options of `lindm sft` are copied word by word and quoted for a shell or for YAML; words with characters that a shell, YAML or
a terminal would change are refused. Exit code 75 (preempted and saved) starts the same command again, which resumes; a lost
process (8) does so at most `RESTARTS` times; any other failure ends the job.
"""

import json
import re
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import lindm
from lindm.llm.parallel.chips import parse_topology
from lindm.llm.sft.options import PATH_OPTIONS, SFTConfig

MOUNT = "/lindm"  # mount point of the shared disk
GRACE = 120  # seconds between SIGTERM and SIGKILL
RESTARTS = 5
TEMPLATES = Path(lindm.__file__).parent / "templates" / "launch"

# --- options of the launchers ----------------------------------------------------------------------------------------------

# fields that are written to job files: a regular expression and its description
NAME = (r"[a-z]([-a-z0-9]{0,49}[a-z0-9])?", "at most 51 lower-case letters, digits and hyphens, the first a letter")
WORD = (r"[\w.@+-]+", "letters, digits, _ . @ + or -")
FIELD_RULES = {
    "name": NAME,
    "namespace": NAME,
    "service_account": NAME,
    "claim": (r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", "lower-case letters, digits, hyphens and dots"),
    "bucket": (r"[a-z0-9][-_.a-z0-9]+[a-z0-9]", "lower-case letters, digits, - _ and ."),
    "zone": NAME,
    "project": (r"[a-z][-a-z0-9:.]*", "lower-case letters, digits, hyphens"),
    "partition": (r"[\w.+,-]+", "names with commas between them"),
    "account": WORD,
    "time": (r"\d+|(\d+-)?\d+(:\d\d){0,2}", "minutes, hours:minutes:seconds or days-hours:minutes:seconds"),
    "image": (r"[\w.:/@-]+", "an image such as registry/name:tag"),
    "shared": (r"[\w.-]+:/[\w./-]*", "an NFS export such as 10.0.0.2:/share"),
    # without a URL, pip would install whatever has this name on its index
    "package": (
        r"lindm\[(\w+,)*tpu(,\w+)*\] *@ *(git\+)?(https|ssh|file)://.+",
        "'lindm[tpu] @ URL', with the URL of a Git repository (git+https://HOST/lindm@COMMIT) or of a wheel (file:///lindm/WHEEL)",
    ),
    "ray_version": (r"\d+\.\d+\.\d+", "a version such as 2.60.0"),
}


def _check(job: object) -> None:
    """Raise ValueError for a text that does not match its rule and for a number below its minimum."""
    minimum = {"gpus": 0, "gpus_per_node": 0, "restarts": 0}
    for field, value in vars(job).items():
        if isinstance(value, str) and field in FIELD_RULES and not re.fullmatch(FIELD_RULES[field][0], value, re.ASCII):
            raise ValueError(f"{field} must be {FIELD_RULES[field][1]}; got {value!r}")
        if type(value) is int and value < minimum.get(field, 1):
            raise ValueError(f"{field} must be at least {minimum.get(field, 1)}; got {value}")


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """Print an sbatch script with one process per node. The job is requeued when it is stopped."""

    nodes: int
    """Number of nodes."""
    gpus_per_node: int = 0
    """GPUs per node; 0 trains on CPUs."""
    cpus_per_node: int | None = None
    """CPUs per node. [default: chosen by the cluster]"""
    time: str = "24:00:00"
    """Time limit; the job is requeued when it is reached."""
    partition: str | None = None
    """Partition of the cluster."""
    account: str | None = None
    """Account that is charged."""
    name: str = "lindm-sft"
    """Name of the job."""

    def __post_init__(self):
        _check(self)


@dataclass(frozen=True, kw_only=True)
class TPUJob:
    """Print a bash script that creates Cloud TPU machines with gcloud, trains on them, and resumes after a preemption."""

    topology: str
    """A TPU slice such as v5e:4x4."""
    zone: str
    """Zone of the machines."""
    project: str | None = None
    """Project of the cloud account. [default: that of gcloud]"""
    spot: bool = False
    """Use spot machines, which cost less and can be preempted."""
    queued: bool = False
    """Request the machines through a queued resource."""
    shared: str | None = None
    """An NFS export, mounted on /lindm; needed if the slice has several hosts."""
    package: str
    """Where pip finds lindm, in a Git repository or a wheel on the shared disk: 'lindm[tpu] @ git+https://HOST/lindm@COMMIT' or
    'lindm[tpu] @ file:///lindm/WHEEL'."""
    name: str = "lindm-sft"
    """Name of the job."""

    def __post_init__(self):
        _printable("package", self.package)
        _check(self)
        if (hosts := parse_topology(self.topology).num_hosts) > 1 and self.shared is None:
            reason = f"the {hosts} hosts of {self.topology} write one checkpoint together"
            raise ValueError(f"shared must be {FIELD_RULES['shared'][1]}, since {reason}; got nothing")


@dataclass(frozen=True, kw_only=True)
class GKEJob:
    """Print a manifest for Google Kubernetes Engine: an indexed Job on the nodes of a TPU slice."""

    topology: str
    """A TPU slice such as v5e:4x4."""
    image: str
    """Container image with lindm and its extra tpu."""
    claim: str | None = None
    """A PersistentVolumeClaim that all hosts can write to, mounted on /lindm."""
    bucket: str | None = None
    """A Cloud Storage bucket with a hierarchical namespace, instead of a claim."""
    service_account: str | None = None
    """A Kubernetes service account that can write to the bucket."""
    spot: bool = False
    """Use spot nodes, which cost less and can be preempted."""
    name: str = "lindm-sft"
    """Name of the job."""
    namespace: str = "default"
    """Kubernetes namespace."""

    def __post_init__(self):
        _check(self)
        parse_topology(self.topology)
        if (self.claim is None) == (self.bucket is None):
            raise ValueError(
                f"one of claim and bucket must be given, as storage of the run; got {self.claim!r} and {self.bucket!r}"
            )


@dataclass(frozen=True, kw_only=True)
class RayWorkers:
    """The workers of a training run on Ray."""

    workers: int | None = None
    """Number of processes. Each has the CPUs and GPUs of a host, or a part of them."""
    topology: str | None = None
    """Instead of --workers: a TPU slice such as v5e:4x4, with a worker on each of its hosts."""
    cpus: int = 1
    """CPUs per worker."""
    gpus: int = 0
    """GPUs per worker."""
    restarts: int = RESTARTS
    """Maximum number of restarts from the last checkpoint after workers are lost."""

    def __post_init__(self):
        _check(self)
        if (self.workers is None) == (self.topology is None):
            raise ValueError(f"one of workers and topology must be given; got {self.workers} and {self.topology}")
        if self.topology is not None and self.gpus:
            raise ValueError(f"gpus must be left out with a topology; got {self.gpus}")
        if self.topology is not None:
            parse_topology(self.topology)

    @property
    def num_workers(self) -> int:
        return self.workers or parse_topology(self.topology or "").num_hosts


@dataclass(frozen=True, kw_only=True)
class RayJob(RayWorkers):
    """Print a RayJob for KubeRay. A comment at its top has the equivalent command for an existing Ray cluster."""

    image: str
    """Container image with Ray, and lindm with its extra ray."""
    claim: str
    """A PersistentVolumeClaim that all workers can write to, mounted on /lindm."""
    ray_version: str = "2.60.0"
    """Version of Ray in the image."""
    name: str = "lindm-sft"
    """Name of the job."""
    namespace: str = "default"
    """Kubernetes namespace."""


Job = SlurmJob | TPUJob | GKEJob | RayJob
LAUNCHERS: dict[str, type[Job]] = {"slurm": SlurmJob, "tpu": TPUJob, "gke": GKEJob, "ray": RayJob}

# --- the options of lindm sft --------------------------------------------------------------------------------------------


def _printable(what: str, word: str) -> None:
    """Raise ValueError for a character that a shell, YAML or a terminal would change."""
    for character in word:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in "\ufeff\ufffe\uffff":
            raise ValueError(f"{what} must have no U+{ord(character):04X}, which a job file cannot carry; got {word!r}")


def check_options(job: Job | RayWorkers, options: SFTConfig, words: Sequence[str]) -> None:
    """Check that a job can start and restart `lindm sft` with these options.

    Args:
      options: the parsed words.

    Raises:
      ValueError: an option that the launcher sets or does not have, --fresh, or a path that is not on the shared disk.
    """
    for word in words:
        _printable("an option", word)
    for field in ("coordinator", "processes", "rank"):
        if getattr(options, field) is not None:
            raise ValueError(f"{field} must be left out: the launcher sets it")
    if options.draw is not None and isinstance(job, RayWorkers):
        raise ValueError("draw must be left out with Ray, whose workers read a directory: make it with lindm data make")
    if options.fresh:
        raise ValueError("fresh must be left out: a restarted job would remove its own checkpoints")
    if not isinstance(job, GKEJob | RayJob) and not (isinstance(job, TPUJob) and job.shared):
        return
    paths = {field: getattr(options, field) for field in PATH_OPTIONS}
    if options.template is not None and options.template.endswith((".json", ".toml")):
        paths["template"] = Path(options.template)
    for field, path in paths.items():
        if path is not None and (".." in path.parts or not PurePosixPath(path).is_relative_to(MOUNT)):
            raise ValueError(f"{field} must be a path below {MOUNT}, where the shared disk is mounted; got {str(path)!r}")


# --- the files ---------------------------------------------------------------------------------------------------------------


def job_file(job: Job, words: Sequence[str]) -> str:
    """The text of the file; `words` are the options of `lindm sft`, already checked."""
    values: dict[str, object] = {"job": job, "grace": GRACE, "restarts": RESTARTS, "mount": MOUNT, "words": shlex.join(words)}
    if isinstance(job, SlurmJob):
        return _rendered("slurm.sh", values)
    topology = job.topology
    values["slice"] = parse_topology(topology) if topology is not None else None
    if isinstance(job, TPUJob):
        return _rendered("tpu.sh", values | {"package": shlex.quote(job.package)})
    if isinstance(job, GKEJob):
        words = [word.replace("$", "$$") for word in words]  # Kubernetes substitutes variables for $(NAME)
        return _rendered("gke.yaml", values | {"words": json.dumps(words, ensure_ascii=False)})
    return _rendered("ray.yaml", values | {"entrypoint": shlex.join(entrypoint(job, words))})


def entrypoint(job: RayWorkers, words: Sequence[str]) -> list[str]:
    """The command that starts training on Ray."""
    given = ["--workers", str(job.workers)] if job.topology is None else ["--topology", job.topology]
    given += ["--cpus", str(job.cpus), "--gpus", str(job.gpus), "--restarts", str(job.restarts)]
    return ["python", "-m", "lindm.cli.ray_job", *given, "--", *words]


def _rendered(name: str, values: dict[str, object]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # no HTML escaping: every value was checked, or is quoted for its context
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["q"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment.get_template(f"{name}.jinja").render(values)
