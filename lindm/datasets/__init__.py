"""Labelled episodes on disk: made, read again, and handed to other tools."""

from lindm.datasets.exports import FORMATS, Telling, document, export, named, symbol, telling
from lindm.datasets.generate import BEHAVIORS, DatasetConfig
from lindm.datasets.reader import episodes_of, load, problem_of, read_manifest
from lindm.datasets.writer import Made, make

__all__ = [
    "BEHAVIORS",
    "FORMATS",
    "DatasetConfig",
    "Made",
    "Telling",
    "document",
    "episodes_of",
    "export",
    "load",
    "make",
    "named",
    "problem_of",
    "read_manifest",
    "symbol",
    "telling",
]
