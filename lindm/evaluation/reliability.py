"""The calibration figure of `lindm eval`: how often the likeliest action is optimal, against its probability."""

import io
from collections.abc import Mapping

from lindm.evaluation.calibration import Calibration


def draw_reliability(calibrations: Mapping[str, Calibration]) -> dict[str, bytes]:
    """calibration.png and calibration.pdf: a panel for each policy, before and after temperature scaling.

    A point is a bin of histories; its area is the share of all histories. On the diagonal the probabilities are right.
    """
    from matplotlib.figure import Figure  # pyplot would change the backend of a notebook

    columns = min(len(calibrations), 3)
    rows = -(-len(calibrations) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.4, 3.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(calibrations) :]:
        ax.set_visible(False)
    for ax, (name, one) in zip(axes, calibrations.items(), strict=False):
        ax.plot([0, 1], [0, 1], color="#888888", lw=0.8, ls=":")
        series = [("as they are", "o-", "#0072B2", one.scores)]
        if one.scaled is not None:
            series.append((f"temperature {one.temperature:.3g}", "s--", "#D55E00", one.scaled))
        for label, style, color, scores in series:
            x, y = [b.confidence for b in scores.bins], [b.optimal for b in scores.bins]
            ax.plot(x, y, style, ms=0, lw=1.0, color=color)
            label = f"{label}: error {scores.calibration_error:.3f}"
            ax.scatter(x, y, [8 + 120 * b.weight for b in scores.bins], color=color, marker=style[0], alpha=0.8, label=label)
        ax.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="probability of the likeliest action", ylabel="share that is optimal")
        ax.set_title(name if len(name) <= 36 else f"...{name[-33:]}", fontsize=9, parse_math=False)
        ax.legend(frameon=False, fontsize=7, loc="lower right")
    contents = {}
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
        contents[f"calibration.{kind}"] = buffer.getvalue()
    return contents
