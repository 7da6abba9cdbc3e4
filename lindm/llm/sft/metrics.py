"""What a run writes while it runs: metrics.jsonl, a line of progress or a bar, TensorBoard if asked for, and the curves at the
end.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from lindm.errors import UsageError
from lindm.io import files

METRICS = "metrics.jsonl"


class Journal:
    """The records of one run; only the first process of a run has one that writes.

    A record is {"step", "kind": "train" | "eval", ...}. A run that resumes after `step`, evaluated last after `looked`, cuts off
    what was written later, so the records of an interrupted run are those of one that was not.
    """

    def __init__(self, directory: Path, step: int, looked: int, tensorboard: bool, writes: bool):
        self.path, self.writes, self.board = directory / METRICS, writes, None
        if not writes:
            return
        until = {"train": step, "eval": looked}
        kept = [record for record in read(directory) if record["step"] <= until[record["kind"]]]
        files.write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as e:
                raise UsageError(f"TensorBoard events need tensorboardX: pip install 'lindm[track]' ({e})") from e
            self.board = SummaryWriter(str(directory / "events"), purge_step=step + 1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        if not self.writes:
            return
        record = {"step": step, "kind": kind} | values
        files.append_line(self.path, json.dumps(record))
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self.board.add_scalar(f"{kind}/{name}", value, step)
            self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read(directory: Path) -> list[dict[str, Any]]:
    """The records of a run; a torn last line is left out."""
    path = directory / METRICS
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


class Progress:
    """Steps done, tokens and labelled decisions a second, share of the machine's peak, time left."""

    def __init__(self, total: int, start: int, flops: float, peak: float, quiet: bool):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self.total, self.done, self.flops, self.peak = total, start, flops, peak
        self.tokens = self.labels = self.steps = 0
        self.seconds = 0.0
        self.said = time.monotonic()
        console = Console(stderr=True)
        self.console: Any = None if quiet else console
        self.bar: Any = None
        if not quiet and console.is_terminal:
            said = TextColumn("{task.fields[said]}")
            columns = (TextColumn("sft"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), said)
            self.bar = Bar(*columns, console=console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("sft", total=total, completed=start, said="compiling")

    @property
    def rates(self) -> dict[str, float]:
        """A second: tokens and labels; mfu: share of the peak that the model's own arithmetic takes."""
        if not self.seconds:
            return {"tokens_per_s": 0.0, "labels_per_s": 0.0, "mfu": 0.0}
        mfu = self.flops * self.steps / self.seconds / self.peak
        return {"tokens_per_s": self.tokens / self.seconds, "labels_per_s": self.labels / self.seconds, "mfu": mfu}

    def step(self, seconds: float, tokens: int, labels: int, loss: float) -> None:
        """One more step was done; the time of the first one, which waits for much, does not count."""
        self.done += 1
        if self.done > 1 and (self.steps or seconds):
            self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens
            self.labels, self.steps = self.labels + labels, self.steps + 1
        if self.console is None:
            return
        rates = self.rates
        left = (self.total - self.done) * self.seconds / max(self.steps, 1)
        said = f"loss {loss:.4g}  {rates['tokens_per_s']:,.0f} tokens/s  {rates['labels_per_s']:,.1f} decisions/s"
        said += f"  mfu {rates['mfu']:.0%}  {_clock(left)} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, said=said)
        elif time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            self.say(f"step {self.done} of {self.total}  {said}")

    def say(self, line: str) -> None:
        """A line that stays."""
        if self.console is not None:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def draw(directory: Path, records: list[dict[str, Any]]) -> list[Path]:
    """curves.png and curves.pdf: losses, and the gap where it was measured, against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [r for r in records if r["kind"] == "train"]
    looked = [r for r in records if r["kind"] == "eval"]
    gaps = [r for r in looked if r.get("gap") is not None]
    figure, axes = plt.subplots(1, 2 if gaps else 1, figsize=(9 if gaps else 5, 3.4), layout="constrained", squeeze=False)
    left = axes[0][0]
    left.plot([r["step"] for r in train], [r["loss"] for r in train], lw=0.8, color="#888888", label="training")
    held = [r for r in looked if r.get("loss") is not None]
    if held:
        left.plot([r["step"] for r in held], [r["loss"] for r in held], "o-", ms=3, color="#1f5fa8", label="held out")
    left.set(xlabel="step", ylabel="cross-entropy of a label's tokens", yscale="log")
    left.legend(frameon=False)
    if gaps:
        right = axes[0][1]
        at, gap = [r["step"] for r in gaps], [100 * r["gap"] for r in gaps]
        low, high = ([100 * r["gap_ci"][i] for r in gaps] for i in (0, 1))
        right.fill_between(at, low, high, alpha=0.2, color="#1f5fa8", lw=0)
        right.plot(at, gap, "o-", ms=3, color="#1f5fa8", label="model")
        right.axhline(100, color="#b03030", lw=0.8, ls=":", label="uniformly random")
        if gaps[0].get("vote_gap") is not None:
            right.axhline(100 * gaps[0]["vote_gap"], color="#2a7d3f", lw=0.8, ls="--", label="majority of the demonstrations")
        right.set(xlabel="step", ylabel="optimality gap, % of random play's", ylim=(0, None))
        right.legend(frameon=False)
    paths = [directory / f"curves.{kind}" for kind in ("png", "pdf")]
    with files.storage_errors(directory):
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    plt.close(figure)
    return paths
