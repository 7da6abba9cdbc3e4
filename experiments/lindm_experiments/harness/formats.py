"""Numbers, intervals and verdicts as short texts, for the screen and the pages."""

from collections.abc import Mapping, Sequence
from typing import Any

from lindm_experiments.harness.claims import OPEN
from lindm_experiments.harness.verdicts import as_expected

SMOKE_ONLY = "it only checks that the experiments run, on too few seeds and too small problems. Its verdicts mean nothing."


def format_number(value: float | str | None) -> str:
    """Four significant digits; a dash for what was not measured."""
    if isinstance(value, str):
        return value
    return "-" if value is None else f"{value:.4g}"


def format_interval(ci: list[float | None]) -> str:
    low, high = (("-inf", "inf")[i] if end is None else format_number(end) for i, end in enumerate(ci))
    return f"[{low}, {high}]"


def format_measured(row: dict[str, Any]) -> str:
    """Estimate and interval."""
    return "-" if row["measured"] is None else f"{format_number(row['measured'])} {format_interval(row['ci'])}"


def format_limits(row: Mapping[str, Any]) -> str:
    """The lower and the upper one-sided limit; nothing for what was not measured, or where an earlier version wrote the row."""
    limits = row.get("limits")
    if row["measured"] is None or limits in (None, [None, None]):
        return ""
    return " and ".join(("-inf", "inf")[i] if end is None else format_number(end) for i, end in enumerate(limits))


def format_test(row: Mapping[str, Any]) -> str:
    """The tests that decide a claim (`statistics`), by the ends of its band; nothing where an earlier version wrote the row."""
    if (band := row.get("band")) is None:
        return ""
    parts = row.get("parts", 1)
    level, all_parts = "5 %", ""
    if parts > 1:
        level, all_parts = f"5 % / {parts}", f"; PASS needs all of the {parts} parts, FAIL one of them"
    to_pass = "two one-sided tests for equivalence (TOST), each at 5 %" if None not in band else "a one-sided test at 5 %"
    to_fail = f"a two-sided test at {level}" if None not in band else f"a one-sided test at {level}"
    if row.get("exact"):
        to_fail = "one violation refutes the statement"
    return f"PASS: {to_pass}; FAIL: {to_fail}{all_parts}"


def format_slack(row: dict[str, Any]) -> str:
    """Smallest and median slack of an inequality (`verdicts.to_verdict`); nothing for other claims."""
    if row.get("slack") is None:
        return ""
    low, median = row["slack"]
    return f"slack {low:.3g}, median {median:.3g}"


def format_p(p: float) -> str:
    """A p-value with its sign; one that is zero in floating-point numbers is shown as a bound."""
    return "p < 1e-300" if p < 1e-300 else f"p = {p:.2g}"


def verdict_label(row: dict[str, Any]) -> str:
    """The verdict, and the expectation unless it is an expected PASS."""
    if row["expected"] == OPEN:
        return f"{row['verdict']}, open"
    if as_expected(row):
        return "FAIL, as expected" if row["expected"] == "FAIL" else row["verdict"]
    return f"{row['verdict']} (expected {row['expected']})"


def count_expected(rows: Sequence[dict[str, Any]]) -> str:
    """The numbers of claims with the expected verdict and of open questions, as text."""
    decided = [row for row in rows if row["expected"] != OPEN]
    parts = [f"{sum(map(as_expected, decided))} of {len(decided)} claims as expected"] if decided else []
    if n_open := len(rows) - len(decided):
        parts.append("1 open question" if n_open == 1 else f"{n_open} open questions")
    return ", ".join(parts)
