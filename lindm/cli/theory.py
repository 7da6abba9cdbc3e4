"""`lindm theory`: what theory predicts for a law of your own."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lindm.cli.option_parser import Command
from lindm.cli.solve import check_plot
from lindm.errors import DataError
from lindm.io import inputs, limits
from lindm.io.files import strict_json

if TYPE_CHECKING:
    import numpy as np


SUMMARY = "Compute what theory predicts for features of your own"


@dataclass(frozen=True, kw_only=True)
class RiskOptions:
    """Compute the exact risk of the trained layer: its two parts, its bounds, the balance line and the best training length."""

    train_lengths: tuple[int, ...]
    """Numbers N of pairs in a training prompt."""
    test_lengths: tuple[int, ...]
    """Numbers M of pairs in a test prompt."""
    covariance: Path | None = None
    """Matrix E[x x'] of the features: a .npy file, or a text file with one row per line and commas or blanks between the
    numbers."""
    features: Path | None = None
    """File with samples of the features [n, d], instead of --covariance. The moments are then estimates with a standard error."""
    law: Literal["gaussian", "onehot"] = "gaussian"
    """Distribution of the features. For onehot, the covariance is the diagonal matrix of the probabilities."""
    task_covariance: Path | None = None
    """Matrix E[w w'] of the tasks, in the format of --covariance. [default: the identity]"""
    noise: float = 0.0
    """Standard deviation of the label noise."""
    plot: Path | None = None
    """File of a figure (.png, .pdf, .svg)."""
    json: bool = False
    """Print one JSON object."""


def read_matrix(path: Path | None) -> "np.ndarray | None":
    """A matrix of numbers from a .npy file or from text.  Raises: DataError, which names the file."""
    import numpy as np

    if path is None:
        return None
    if path.suffix == ".npy":
        return inputs.parse_npy(inputs.read_bytes(path, limits.MATRIX_FILE), str(path))
    text = inputs.read_text(path, limits.MATRIX_FILE)
    try:
        return np.loadtxt(text.splitlines(), delimiter="," if "," in text else None, ndmin=2)
    except ValueError as e:
        raise DataError(f"{path} must be a .npy file or a matrix as text: {e}") from None


def run_risk(options: RiskOptions) -> int:
    check_plot(options.plot)
    from lindm_experiments.toolkit.risks import risk

    table = risk(
        read_matrix(options.covariance),
        train_lengths=options.train_lengths,
        test_lengths=options.test_lengths,
        task_covariance=read_matrix(options.task_covariance),
        noise=options.noise,
        law=options.law,
        features=read_matrix(options.features),
    )
    if options.json:
        print(strict_json(table.as_json()))
    else:
        print(table)
    if options.plot:
        table.plot(options.plot)
    return 0


COMMANDS = {
    "risk": Command(
        name="theory risk",
        options=RiskOptions,
        run=run_risk,
        examples=(
            "lindm theory risk --covariance L.npy --train-lengths 8 16 32 --test-lengths 8 32 128",
            "lindm theory risk --features x.csv --noise 0.3 --train-lengths 32 --test-lengths 8 64 --plot risk.png",
        ),
    ),
}
