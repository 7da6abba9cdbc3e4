"""Tests run with 64-bit floats, strict rank promotion, eight virtual CPU devices, and warnings as errors (pyproject.toml)."""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# flags of the user come last and win
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
os.environ["MPLBACKEND"] = "Agg"

from lindm_experiments.harness.runner import settle_xla

settle_xla()  # the tests run what a run runs

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

# examples are derived from the test itself, so that a run can be repeated; compile times would trip the deadline
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def no_figure_is_left():
    """One worker runs hundreds of tests, and matplotlib keeps every figure that is not closed (and warns of more than 20)."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
