"""The calibration figure of `lindm eval`: how often the likeliest action is optimal, against its probability."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lindm.evaluation.calibration import Calibration
from lindm.figures.style import BLUE, GRAY, RED, WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_reliability(calibrations: Mapping[str, Calibration]) -> "Figure":
    """A panel for each policy, before and after temperature scaling.

    A point is a bin of histories; its area grows with the share of all histories. On the diagonal the probabilities are right.
    """
    from matplotlib.figure import Figure

    columns = min(len(calibrations), 2)
    rows = -(-len(calibrations) // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 4.2, 3.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(calibrations) :]:
        axis.set_visible(False)
    for axis, (name, one) in zip(axes, calibrations.items(), strict=False):
        axis.plot([0, 1], [0, 1], color=GRAY, lw=0.8, ls=":", marker="")
        series = [("as they are", "o", "-", BLUE, one.scores)]
        if one.scaled is not None:
            series.append((f"temperature {one.temperature:.3g}", "s", "--", RED, one.scaled))
        for label, marker, dash, color, scores in series:
            x, y = [b.confidence for b in scores.bins], [b.optimal for b in scores.bins]
            axis.plot(x, y, dash, marker="", lw=1.0, color=color)
            label = f"{label}: error {scores.calibration_error:.3f}"
            axis.scatter(x, y, [8 + 120 * b.weight for b in scores.bins], color=color, marker=marker, alpha=0.8, label=label)
        axis.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="probability of the likeliest action", ylabel="share that is optimal")
        axis.set_title(name if len(name) <= 36 else f"...{name[-33:]}", fontsize=9, parse_math=False)
        axis.legend(fontsize=8, loc="lower right")
    figure.set_label("Points on the diagonal are probabilities that are right; their area is their share of all histories.")
    return figure
