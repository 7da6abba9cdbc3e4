"""Job files that run `lindm sft` on many hosts: an sbatch script, a script for Cloud TPU machines, manifests for GKE and for Ray.

A job file is complete and holds nothing but what was given here: no addresses, which every launcher tells the processes itself,
and nothing of this environment. The options of `lindm sft` are carried word for word, quoted for a shell or for YAML; a word
with a character that some reader between here and there would change is refused. Exit code 75, stopped and saved, starts the
same command again, which resumes; a lost process (8) does so at most `RESTARTS` times; everything else ends the job.
"""

import json
import re
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import lindm
from lindm.llm.sft.options import SFTConfig

MOUNT = "/lindm"  # where a job that brings its own disk finds it
GRACE = 120  # seconds between being told to stop and being killed
RESTARTS = 5
TEMPLATES = Path(lindm.__file__).parent / "templates" / "launch"

# --- TPU slices ------------------------------------------------------------------------------------------------------------

# shapes of one slice, in chips. v5e and v6e: machines of four chips, up to eight chips are one machine; v5p: machines of four
SHAPES = {
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": (
        *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
        *("8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24"),
    ),
}
LABELS = {"v5e": "tpu-v5-lite-podslice", "v6e": "tpu-v6e-slice", "v5p": "tpu-v5p-slice"}  # of GKE's nodes
RUNTIMES = {"v5e": "v2-alpha-tpuv5-lite", "v6e": "v2-alpha-tpuv6e", "v5p": "v2-alpha-tpuv5"}  # of Cloud TPU machines
RAY_TYPES = {"v5e": "TPU-V5LITEPOD", "v6e": "TPU-V6E", "v5p": "TPU-V5P"}


class Slice(NamedTuple):
    """Chips that are connected to each other, and the hosts that hold them."""

    generation: str
    shape: str
    chips: int
    hosts: int

    @property
    def per_host(self) -> int:
        return self.chips // self.hosts

    @property
    def label(self) -> str:
        return LABELS[self.generation]

    @property
    def accelerator(self) -> str:
        """The type of Cloud TPU, which counts chips, and of v5p their cores."""
        return (
            f"v5p-{2 * self.chips}" if self.generation == "v5p" else f"{self.generation.replace('v5e', 'v5litepod')}-{self.chips}"
        )


def slice_of(topology: str) -> Slice:
    """The slice of v5e:4x4 and the like; ValueError, listing those known, for what is none."""
    generation, _, shape = topology.partition(":")
    if shape not in SHAPES.get(generation, ()):
        known = "; ".join(f"{name}:{', '.join(shapes)}" for name, shapes in SHAPES.items())
        raise ValueError(f"topology must be one of {known}; got {topology!r}")
    chips = 1
    for size in shape.split("x"):
        chips *= int(size)
    single = chips <= (4 if generation == "v5p" else 8)
    return Slice(generation, shape, chips, 1 if single else chips // 4)


# --- what is asked for -----------------------------------------------------------------------------------------------------

NAME = (r"[a-z]([-a-z0-9]{0,49}[a-z0-9])?", "lower-case letters, digits and hyphens, from a letter on, at most 51")
WORD = (r"[\w.@+-]+", "letters, digits, _ . @ + or -")
RULES = {
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
    "ray_version": (r"\d+\.\d+\.\d+", "a version such as 2.60.0"),
}


def _check(job: object) -> None:
    """ValueError where a text could not stand in a job file, or a number is below its least."""
    least = {"gpus": 0, "gpus_per_node": 0, "restarts": 0}
    for field, value in vars(job).items():
        if isinstance(value, str) and field in RULES and not re.fullmatch(RULES[field][0], value, re.ASCII):
            raise ValueError(f"{field} must be {RULES[field][1]}; got {value!r}")
        if type(value) is int and value < least.get(field, 1):
            raise ValueError(f"{field} must be at least {least.get(field, 1)}; got {value}")


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """An sbatch script: one process a node, queued again when it was stopped."""

    nodes: int
    gpus_per_node: int = 0
    """0: train on CPUs"""
    cpus_per_node: int | None = None
    """[default: what the cluster gives]"""
    time: str = "24:00:00"
    """most of a run; the job is queued again when it is up"""
    partition: str | None = None
    account: str | None = None
    name: str = "lindm-sft"

    def __post_init__(self):
        _check(self)


@dataclass(frozen=True, kw_only=True)
class Tpu:
    """A bash script that creates Cloud TPU machines with gcloud, trains there, and goes on when they are taken away."""

    topology: str
    """v5e:4x4 and the like"""
    zone: str
    project: str | None = None
    """[default: gcloud's own]"""
    spot: bool = False
    """machines that cost less and can be taken away"""
    queued: bool = False
    """wait in Google's queue until there are machines"""
    shared: str | None = None
    """an NFS export, mounted on /lindm; needed where a slice has several hosts"""
    package: str = "lindm[tpu]"
    """what pip installs on the machines"""
    name: str = "lindm-sft"

    def __post_init__(self):
        _check(self)
        _printable("package", self.package)
        if (hosts := slice_of(self.topology).hosts) > 1 and self.shared is None:
            together = f"the {hosts} hosts of {self.topology} write one checkpoint together"
            raise ValueError(f"shared must be {RULES['shared'][1]}, since {together}; got nothing")


@dataclass(frozen=True, kw_only=True)
class Gke:
    """A manifest for Google Kubernetes Engine: an indexed Job on the nodes of a TPU slice."""

    topology: str
    """v5e:4x4 and the like"""
    image: str
    """a container image with lindm[tpu]"""
    claim: str | None = None
    """a PersistentVolumeClaim that all hosts may write to, mounted on /lindm"""
    bucket: str | None = None
    """in its place, a bucket of Cloud Storage with a hierarchical namespace"""
    service_account: str | None = None
    """that may write to the bucket"""
    spot: bool = False
    """nodes that cost less and can be taken away"""
    name: str = "lindm-sft"
    namespace: str = "default"

    def __post_init__(self):
        _check(self)
        slice_of(self.topology)
        if (self.claim is None) == (self.bucket is None):
            raise ValueError(f"one of claim and bucket must be given, to keep the run on; got {self.claim!r} and {self.bucket!r}")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What Ray gives the training."""

    workers: int | None = None
    """processes, each with a host's CPUs and GPUs or a part of them"""
    topology: str | None = None
    """in their place, a TPU slice, v5e:4x4 and the like: a worker on each of its hosts"""
    cpus: int = 1
    """of a worker"""
    gpus: int = 0
    """of a worker"""
    restarts: int = RESTARTS
    """how often training starts again, from its last checkpoint, after workers were lost"""

    def __post_init__(self):
        _check(self)
        if (self.workers is None) == (self.topology is None):
            raise ValueError(f"one of workers and topology must be given; got {self.workers} and {self.topology}")
        if self.topology is not None and self.gpus:
            raise ValueError(f"gpus must be left out with a topology; got {self.gpus}")
        if self.topology is not None:
            slice_of(self.topology)

    @property
    def size(self) -> int:
        return self.workers or slice_of(self.topology or "").hosts


@dataclass(frozen=True, kw_only=True)
class Ray(Workers):
    """A RayJob for KubeRay, and in its head the command that does the same on a Ray cluster that runs already."""

    image: str
    """a container image with Ray and lindm[ray]"""
    claim: str
    """a PersistentVolumeClaim that all workers may write to, mounted on /lindm"""
    ray_version: str = "2.60.0"
    """of the image"""
    name: str = "lindm-sft"
    namespace: str = "default"


Job = Slurm | Tpu | Gke | Ray
LAUNCHERS: dict[str, type[Job]] = {"slurm": Slurm, "tpu": Tpu, "gke": Gke, "ray": Ray}

# --- the options of lindm sft --------------------------------------------------------------------------------------------


def _printable(what: str, word: str) -> None:
    """ValueError for a character that a shell, YAML or a terminal would not carry as it is."""
    for character in word:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in "\ufeff\ufffe\uffff":
            raise ValueError(f"{what} must have no U+{ord(character):04X}, which a job file cannot carry; got {word!r}")


def check_options(job: Job | Workers, options: SFTConfig, words: Sequence[str]) -> None:
    """Whether `lindm sft`, so asked, can be started by a job, and started again.

    Args:
      options: what the words mean.

    Raises:
      ValueError: addresses are given, or what is begun anew each time, or a path that not every host sees.
    """
    for word in words:
        _printable("an option", word)
    for field in ("coordinator", "processes", "rank"):
        if getattr(options, field) is not None:
            raise ValueError(f"{field} must be left out: the launcher tells it to the processes")
    if options.fresh:
        raise ValueError("fresh must be left out: a job that starts again would throw away what it has done")
    if not isinstance(job, Gke | Ray) and not (isinstance(job, Tpu) and job.shared):
        return
    paths = {field: getattr(options, field) for field in ("data", "out", "model", "eval_data")}
    if options.template is not None and options.template.endswith((".json", ".toml")):
        paths["template"] = Path(options.template)
    for field, path in paths.items():
        if path is not None and (".." in path.parts or not PurePosixPath(path).is_relative_to(MOUNT)):
            raise ValueError(
                f"{field} must be a path below {MOUNT}, where the hosts find the disk that they share; got {str(path)!r}"
            )


# --- the files ---------------------------------------------------------------------------------------------------------------


def job_file(job: Job, words: Sequence[str]) -> str:
    """The text of the file; `words` are the options of `lindm sft`, already checked."""
    values: dict[str, object] = {"job": job, "grace": GRACE, "restarts": RESTARTS, "mount": MOUNT, "words": shlex.join(words)}
    if isinstance(job, Slurm):
        return _rendered("slurm.sh", values)
    topology = job.topology
    values["slice"] = slice_of(topology) if topology is not None else None
    if isinstance(job, Tpu):
        runtime = RUNTIMES[slice_of(job.topology).generation]
        return _rendered("tpu.sh", values | {"runtime": runtime, "package": shlex.quote(job.package)})
    if isinstance(job, Gke):
        words = [word.replace("$", "$$") for word in words]  # kubernetes puts variables in where it reads $(NAME)
        return _rendered("gke.yaml", values | {"words": json.dumps(words, ensure_ascii=False)})
    return _rendered("ray.yaml", values | {"entrypoint": shlex.join(entrypoint(job, words))})


def entrypoint(job: Workers, words: Sequence[str]) -> list[str]:
    """The command that trains on Ray."""
    given = ["--workers", str(job.workers)] if job.topology is None else ["--topology", job.topology]
    given += ["--cpus", str(job.cpus), "--gpus", str(job.gpus), "--restarts", str(job.restarts)]
    return ["python", "-m", "lindm.cli.ray_job", *given, "--", *words]


def _rendered(name: str, values: dict[str, object]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # what is not HTML is not escaped as HTML: every value was checked, or is quoted for where it stands
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["q"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment.get_template(f"{name}.jinja").render(values)
