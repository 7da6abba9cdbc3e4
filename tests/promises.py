"""The promises about faults (promises.toml), the tests that carry their numbers, and the table of `make faults`.

A test names the promises that it checks: `@pytest.mark.fault("F4", "F8")`. It counts as one trial, or as many as it adds:

    def test_...(trials):
        for point in points:
            trials.add()

A failed or skipped test counts as one loss for each of its promises, or as many as it recorded by `trials.lost()`.
`pytest --faults-page PAGE` prints the table at the end and writes it to PAGE; a run of some of the tests, or one that was
interrupted or lost a worker, writes nothing.
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PROPERTY = "fault"
PROMISES: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_name("promises.toml").read_text(encoding="utf-8"))

PAGE = """# Reliability

This page lists what lindm promises when a process is killed, a disk is full, a file is damaged or an input is hostile. Each
promise has tests. `make faults` runs the tests and writes this page; `python -m pytest -m fault --collect-only -q` lists them.

A trial is one attempt to break a promise: a kill point, a flipped bit, a stopped process, a file. A test that does not count its
trials is one trial. A loss is a trial that broke the promise, or a test that could not run.

| number | promise | tests | trials | losses |
|---|---|---|---|---|
"""


class Row(NamedTuple):
    tests: int = 0
    trials: int = 0
    losses: int = 0


@dataclass
class Trials:
    """What a test tried, and how much of it broke the promise."""

    count: int = 0
    losses: int = 0

    def add(self, number: int = 1) -> None:
        self.count += number

    def lost(self, number: int = 1) -> None:
        self.losses += number


@dataclass
class Outcome:
    """A test: its promises, its trials, and whether each of its phases passed."""

    promises: list[str]
    trials: int = 0
    losses: int = 0
    passed: bool = True


@dataclass
class Table:
    """Rows of the table, from the reports of all tests of a session."""

    page: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    crashed: bool = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.crashed |= report.when not in ("setup", "call", "teardown")  # a worker of pytest-xdist died in the test
        values: list[Any] = [value for name, value in report.user_properties if name == PROPERTY]
        for promises, trials, losses in values:
            outcome = self.outcomes.setdefault(report.nodeid, Outcome(promises))
            outcome.trials, outcome.losses = max(outcome.trials, trials), max(outcome.losses, losses)
            outcome.passed &= report.passed

    def rows(self) -> dict[str, Row]:
        rows = dict.fromkeys(PROMISES, Row())
        for outcome in self.outcomes.values():
            losses = outcome.losses if outcome.passed else max(outcome.losses, 1)
            for promise in outcome.promises:
                row = rows[promise]
                rows[promise] = Row(row.tests + 1, row.trials + max(outcome.trials, losses, 1), row.losses + losses)
        return rows

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
    ) -> None:
        rows = self.rows()
        terminalreporter.section("promises about faults (number, tests, trials, losses)")
        for number, row in rows.items():
            counts = "".join(f"{count:7d}" for count in row)
            terminalreporter.write_line(f"{number:4}{counts}  {PROMISES[number]['promise']}")
        ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not self.crashed
        if not (ended and runs_every_test(config)):
            terminalreporter.write_line(f"{self.page} is unchanged: these were not all tests")
            return
        self.page.write_text(page(rows), encoding="utf-8")
        terminalreporter.write_line(f"wrote {self.page}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A promise that was not checked, or was broken, is a failure: also where a test was skipped."""
        rows = self.rows().values()
        unchecked = runs_every_test(session.config) and any(row.tests == 0 for row in rows)
        if session.exitstatus == pytest.ExitCode.OK and (unchecked or any(row.losses for row in rows)):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def page(rows: dict[str, Row]) -> str:
    text = PAGE
    for number, row in rows.items():
        promise = PROMISES[number]
        sentence = promise["promise"] + (f" Also {promise['elsewhere']}." if "elsewhere" in promise else "")
        text += f"| {number} | {sentence} | {row.tests} | {row.trials} | {row.losses} |\n"
    return text


def runs_every_test(config: pytest.Config) -> bool:
    """Whether no file, keyword or earlier failure selects some of the tests, and none ends the session early."""
    chosen = config.args_source != pytest.Config.ArgsSource.TESTPATHS or config.getoption("keyword")
    return not (chosen or config.getoption("lf", False) or config.getoption("maxfail"))


def promises_of(item: pytest.Item) -> list[str]:
    """The promises that a test names, in the order of the file.

    Raises:
      pytest.UsageError: a marker without a number, or with one that is not in promises.toml.
    """
    named = set()
    for marker in item.iter_markers("fault"):
        unknown = [number for number in marker.args if number not in PROMISES]
        if not marker.args or marker.kwargs or unknown:
            got = f"got {unknown}" if unknown else "got none"
            raise pytest.UsageError(f"{item.nodeid}: fault(...) takes numbers of promises.toml, such as 'F1'; {got}")
        named.update(marker.args)
    return [number for number in PROMISES if number in named]


TRIALS = pytest.StashKey[Trials]()


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Trials:
    """Where a test counts what it tried, if that is more than one thing."""
    return request.node.stash.setdefault(TRIALS, Trials())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-page", type=Path, help="write the table of the promises about faults to this page")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--faults-page")
    if path is not None and not hasattr(config, "workerinput"):  # a worker of pytest-xdist reports to the one that has no such
        config.pluginmanager.register(Table(path), "faults-table")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        promises_of(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if promises := promises_of(item):
        counted = item.stash.get(TRIALS, Trials())
        report.user_properties = [*report.user_properties, (PROPERTY, (promises, counted.count, counted.losses))]
    return report
