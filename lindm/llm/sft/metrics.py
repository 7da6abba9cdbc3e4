"""The metrics of a run: metrics.jsonl, throughput, and curves drawn from the records. Callbacks: `lindm.llm.sft.callbacks`.

A line of metrics.jsonl is one record with its checksum:

    {"step", "kind": "train", "loss", "accuracy", "grad_norm", "num_labels", "batch_sha256"}        after each step
    {"step", "kind": "eval", "loss", "accuracy", "gap", "gap_ci", ..., "bc_gap"}                     after each evaluation
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lindm.errors import DataError
from lindm.figures.style import BLUE, FORMATS, GRAY, GREEN, PURPLE, RED, STYLE, WIDTH, figure_bytes
from lindm.io import files, manifest
from lindm.io.verification import MANIFEST
from lindm.llm.sft.callbacks import BackgroundCallback, Callback

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = "metrics.jsonl"
CURVES = tuple(f"curves{ending}" for ending in FORMATS)
Record = dict[str, Any]


class MetricsLogger:
    """Appends records to metrics.jsonl, and hands them to callbacks. Only the main process of a run writes (`enabled`).

    A run that resumes after `step`, and whose last evaluation was after `last_eval_step`, drops later records, so an interrupted
    run ends with the records of an uninterrupted one.

    Raises:
      DataError: metrics.jsonl is damaged, or lacks records of steps before the checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        last_eval_step: int,
        enabled: bool,
        callbacks: Sequence[Callback] = (),
        config: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = print,
    ):
        self.path, self.enabled, self.callbacks = directory / METRICS, enabled, []
        if not enabled:
            return
        last = {"train": step, "eval": last_eval_step}
        kept, later = _split(directory, last)
        if later:
            with files.storage_errors(directory):
                (directory / MANIFEST).unlink(missing_ok=True)  # the run is not finished any more
        files.write_atomic(self.path, "".join(f"{files.record_line(record)}\n" for record in kept))
        self.callbacks = [BackgroundCallback(callback, {**(config or {}), "step": step}, warn) for callback in callbacks]

    def log(self, kind: Literal["train", "eval"], step: int, **values: Any) -> None:
        """Append one record, and hand it to the callbacks, which may lose it."""
        if not self.enabled:
            return
        files.append_record(self.path, {"step": step, "kind": kind} | values)
        for callback in self.callbacks:
            callback.log(kind, step, values)

    def close(self) -> None:
        for callback in self.callbacks:
            callback.close()


def read_metrics(directory: Path) -> list[Record]:
    """The records of a run, each verified; a torn last line is left out. DataError with file and line for another damaged line,
    and where the file is not the one that a finished run has written."""
    manifest.verify_output(directory, METRICS)
    return files.read_json_lines(directory / METRICS)


def _split(directory: Path, last: dict[str, int]) -> tuple[list[Record], list[Record]]:
    """The records up to the `last` step of each kind, and the later ones."""
    path = directory / METRICS
    advice = f"without {path} and {MANIFEST} the run goes on from its last checkpoint, and has no records of the steps before it"
    try:
        records = read_metrics(directory)
    except DataError as e:
        raise DataError(f"{e}; {advice}") from e
    kept: list[Record] = []
    later: list[Record] = []
    for record in records:
        (kept if record["step"] <= last[record["kind"]] else later).append(record)
    if path.exists() and last["train"] > 0 and (missing := _missing(kept, last)):
        raise DataError(f"{path}: lines are missing: {missing}; {advice}")
    return kept, later


def _missing(records: list[Record], last: dict[str, int]) -> str:
    """What is missing among the records up to the `last` steps; empty where nothing is.

    The records begin with step 1, or after the step at which a run went on without the records of the steps before.
    """
    steps = [record["step"] for record in records if record["kind"] == "train"]
    evaluated = [record["step"] for record in records if record["kind"] == "eval"]
    if not steps or steps[-1] != last["train"]:
        return f"the records end before step {last['train']}"
    if steps != list(range(steps[0], steps[-1] + 1)) or any(step < steps[0] - 1 for step in evaluated):
        return "the records have gaps"
    return f"the evaluation after step {last['eval']}" if evaluated and evaluated[-1] != last["eval"] else ""


class Throughput:
    """Tokens and labels per second and model FLOP utilization, over all steps but the first, which waits for other work."""

    def __init__(self, peak_flops: float):
        self.peak_flops = peak_flops
        self.warm = False
        self.tokens = self.labels = 0
        self.seconds = self.flops = 0.0

    def update(self, seconds: float, num_tokens: int, num_labels: int, flops: float) -> None:
        """Count one step: tokens, labels and operations of its documents, without padding."""
        if self.warm:
            self.seconds, self.flops = self.seconds + seconds, self.flops + flops
            self.tokens, self.labels = self.tokens + num_tokens, self.labels + num_labels
        self.warm = True

    @property
    def rates(self) -> dict[str, float]:
        """tokens_per_s, labels_per_s, and mfu: FLOPs of the documents over the peak. Empty until the second step."""
        if not self.seconds:
            return {}
        mfu = self.flops / self.seconds / self.peak_flops
        return {"tokens_per_s": self.tokens / self.seconds, "labels_per_s": self.labels / self.seconds, "mfu": mfu}

    def __str__(self) -> str:
        rates = self.rates
        if not rates:
            return ""
        return f"{rates['tokens_per_s']:,.0f} tokens/s, {rates['labels_per_s']:,.1f} labels/s, mfu {rates['mfu']:.0%}"


def plot_curves(directory: Path, records: list[Record]) -> list[Path]:
    """Draw `CURVES`: losses, and the normalized optimality gap where it was evaluated, against steps."""
    from matplotlib import rc_context

    with rc_context(STYLE):  # pyright: ignore
        contents = figure_bytes(draw_curves(records))
    for name, content in zip(CURVES, contents.values(), strict=True):
        files.write_atomic(directory / name, content)
    return [directory / name for name in CURVES]


def draw_curves(records: list[Record]) -> "Figure":
    """The figure of `plot_curves`."""
    from matplotlib.figure import Figure  # pyplot would change the backend of a notebook

    train, evals = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval"))
    losses, gaps = ([r for r in evals if r.get(name) is not None] for name in ("loss", "gap"))
    figure = Figure(figsize=(WIDTH, 3.8) if gaps else (5, 3.4))
    axes = figure.subplots(1, 2 if gaps else 1, squeeze=False)
    left = axes[0][0]
    left.plot([r["step"] for r in train], [r["loss"] for r in train], linewidth=0.8, color=GRAY, marker="", label="training")
    if losses:
        held_out = [r["loss"] for r in losses]
        left.plot([r["step"] for r in losses], held_out, color=GREEN, marker="s", markersize=3, label="held out")
    left.set(xlabel="step", ylabel="cross-entropy per label token", yscale="log")
    left.legend()
    seen = "Loss on training batches" + (" and on held-out documents" if losses else "") + " over the steps"
    if gaps:
        right = axes[0][1]
        steps, gap = [r["step"] for r in gaps], [r["gap"] for r in gaps]
        low, high = ([(r["gap_ci"] or [r["gap"]] * 2)[i] for r in gaps] for i in (0, 1))
        right.fill_between(steps, low, high, alpha=0.2, color=BLUE, linewidth=0)
        right.plot(steps, gap, color=BLUE, markersize=3, label="model, 95 % interval")
        right.axhline(1, color=RED, linewidth=1.0, linestyle=":", marker="", label="uniformly random policy")
        if gaps[0].get("bc_gap") is not None:
            right.axhline(gaps[0]["bc_gap"], color=PURPLE, linewidth=1.0, linestyle="--", marker="", label="bc: behavior cloning")
        right.set(xlabel="step", ylabel="normalized optimality gap", ylim=(0, None))
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        seen += f"; the normalized optimality gap of the model begins at {gap[0]:.3g} and ends at {gap[-1]:.3g}"
    figure.set_label(f"{seen}.")
    return figure
