"""Tests run with 64-bit floats, strict rank promotion, eight virtual CPU devices, and warnings as errors (pyproject.toml)."""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# most of a test is compiling, which takes 30 % less time at optimization level 0. Flags of the user come last and win
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
)
os.environ["MPLBACKEND"] = "Agg"

from lindm_experiments.harness.xla import configure_xla

configure_xla()  # the other settings are those of a run

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

# examples are derived from the test itself, so that a run can be repeated; compile times would trip the deadline
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25, database=None)
settings.load_profile("repeatable")

pytest_plugins = ["tests.promises"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-outputs", action="store_true", help="write what the code of a page prints into the page (`make outputs`)"
    )


def pytest_configure(config: pytest.Config) -> None:
    # matplotlib 3.10.0, the lowest that is supported, with today's pyparsing, which its import calls by old names
    config.addinivalue_line("filterwarnings", "ignore:'.*' deprecated - use:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_figure_is_left():
    """One worker runs hundreds of tests, and matplotlib keeps every figure that is not closed (and warns of more than 20)."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


# --- CPU-seconds of each test: the clock of a shared machine says little -------------------------------------------------

CPU_SECONDS = "cpu_seconds"
SLOWEST = 15


def _cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    started = _cpu_seconds()
    item.user_properties.append((CPU_SECONDS, started))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "teardown":
        started = dict(item.user_properties)[CPU_SECONDS]
        others = [named for named in report.user_properties if named[0] != CPU_SECONDS]
        report.user_properties = [*others, (CPU_SECONDS, round(_cpu_seconds() - started, 2))]
    return report


def pytest_terminal_summary(terminalreporter):
    """The tests that cost most, with what their fixtures cost; a test of more than five CPU-seconds is marked or has a reason."""
    reports = [r for group in terminalreporter.stats.values() for r in group if getattr(r, "when", None) == "teardown"]
    reports += [r for r in terminalreporter.stats.get("", []) if getattr(r, "when", None) == "teardown"]
    costs = sorted({(dict(r.user_properties).get(CPU_SECONDS, 0.0), r.nodeid) for r in reports}, reverse=True)
    if costs:
        terminalreporter.section(
            f"CPU-seconds: {sum(c for c, _ in costs):.0f} in all, the slowest {SLOWEST} of {len(costs)} tests"
        )
        for seconds, name in costs[:SLOWEST]:
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")
        if path := os.environ.get("LINDM_TEST_COSTS"):
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(f"{seconds}\t{name}\n" for seconds, name in costs)
