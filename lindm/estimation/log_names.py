"""The names in a log, how often each occurs, and names that may be misspelled ones of others."""

import difflib
import re
from collections import Counter
from collections.abc import Mapping

from lindm.datasets.episodes import LoggedEpisodes
from lindm.text.grammar import SYMBOL_ARGUMENTS

RARE = 2  # a name that occurs at most so often may be a typing error
MORE = 3  # times as often occurs the name that was meant
SIMILAR = 0.75  # ratio of `difflib` from which two names are similar

Counts = dict[str, dict[str, int]]
"""states, actions, observations -> name -> how often it occurs."""


def name_counts(log: LoggedEpisodes) -> Counts:
    """How often each state, action and observation occurs, in the order of their numbers."""
    counts: Counts = {}
    for field in ("state", "action", "observation"):
        part = SYMBOL_ARGUMENTS[field]
        if names := log.names.get(part):
            found = Counter(getattr(step, field) for episode in log.episodes for step in episode)
            counts[part] = {name: found[number] for number, name in enumerate(names)}
    return counts


def similar_names(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A warning for each name that is rare and similar to a frequent one. Names that differ in digits alone are no such pair."""
    warnings = []
    for part, found in counts.items():
        for name, n in found.items():
            if not 0 < n <= RARE:
                continue
            meant = [other for other, m in found.items() if m >= MORE * n and _similar(name, other)]
            if meant:
                best = max(meant, key=lambda other: found[other])
                times = "once" if n == 1 else f"{n} times"
                what = part.removesuffix("s")
                warnings.append(
                    f"the {what} {name!r} occurs {times}, and {best!r} {found[best]} times: if it is misspelled, correct it; "
                    f"--{part} with all names makes other names an error"
                )
    return warnings


def _similar(one: str, other: str) -> bool:
    one, other = one.casefold(), other.casefold()
    if re.sub("[0-9]+", "", one) == re.sub("[0-9]+", "", other):
        return one == other
    return difflib.SequenceMatcher(None, one, other).ratio() >= SIMILAR
