"""Labelled episodes on disk: made, read again, and handed to other tools."""

from lindm.datasets.drawing import BEHAVIOURS, Recipe
from lindm.datasets.exports import FORMATS, Telling, document, export, named, symbol, telling
from lindm.datasets.reading import episodes_of, load, problem_of, read_manifest
from lindm.datasets.shards import Made, make

__all__ = [
    "BEHAVIOURS",
    "FORMATS",
    "Made",
    "Recipe",
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
