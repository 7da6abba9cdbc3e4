"""In-context learning for sequential decisions: worlds, oracles, learners and policies that are measured.

Nothing is imported here, so that `lindm --help` does not wait for jax; the nouns are in `lindm.types`.
"""

__version__ = "0.1.0"
