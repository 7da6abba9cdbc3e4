"""The micro model and its datasets, shared with the tests of language models."""

from tests.lindm.llm.conftest import micro

__all__ = ["micro"]
