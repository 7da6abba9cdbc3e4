"""Labeled episodes on disk: written, read, turned into text, and exported for other tools."""

from lindm.datasets.columns import Episode, Task, episodes_of, problem_of
from lindm.datasets.config import DatasetConfig
from lindm.datasets.episodes import LoggedEpisodes, read_episodes
from lindm.datasets.exports import FORMATS, export
from lindm.datasets.reader import Dataset, is_dataset
from lindm.datasets.text import REWARDS, TextFormat, documents, text_format
from lindm.datasets.writer import MakeResult, make_dataset

__all__ = [
    "FORMATS",
    "REWARDS",
    "Dataset",
    "DatasetConfig",
    "Episode",
    "LoggedEpisodes",
    "MakeResult",
    "Task",
    "TextFormat",
    "documents",
    "episodes_of",
    "export",
    "is_dataset",
    "make_dataset",
    "problem_of",
    "read_episodes",
    "text_format",
]
