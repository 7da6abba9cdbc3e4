"""The small model and datasets of the tests of language models."""

from tests.lindm.llm.conftest import micro as micro
