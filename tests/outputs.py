"""What a page shows as output, compared with what was printed, and rewritten where it differs.

In a page, a line `[...]` stands for any number of lines, and `...` within a line for any text. Words must be the same; the number
of spaces between them may differ, since a column is as wide as its widest entry. A number may differ by one unit of its last
digit, as processors round differently; an integer may not. The numbers of `VARIES` may differ by more.
"""

import math
import re

CUT = "[...]"
NUMBER = r"(?<![\w.])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)"
# (number that depends on the machine or the moment, largest relative difference)
VARIES = (
    (rf"({NUMBER}) s\b", math.inf),  # seconds
    (rf"loss ({NUMBER})", 0.05),  # of training in float32, where rounding adds up over the steps
    (rf"(?:exact|bounds|rollout) +({NUMBER})$", math.inf),  # decisions/s, the last column of `lindm eval`
)
# where the output is no terminal, a line for the bar of a terminal after each ten seconds; how many is a matter of speed
PROGRESS = re.compile(r"[\w ]+: \d+ of [\d?]+, .*\d:\d\d elapsed(?:, \d[\d:]* left)?")
PARTS = re.compile(rf"(?P<start>{NUMBER})?\.\.\.|(?P<number>{NUMBER})| +")
TINY = 1e-12  # what rounding leaves of zero


def printed_lines(text: str) -> list[str]:
    """The lines of an output, without those of progress and without empty lines at its ends."""
    lines = [line.rstrip() for line in text.splitlines() if not PROGRESS.fullmatch(line)]
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        lines.pop(0)
    return lines


def rewritten(shown: list[str], printed: list[str]) -> list[str]:
    """The lines that a page should show of `printed`: `shown` itself where it matches.

    Lines that match stay as they are, the others become what was printed. A cut stays where both its neighbors are still there,
    apart from their numbers. The lines are aligned so that the smallest number of lines and numbers differ.
    """
    lines = [_Line(line) for line in shown]
    difference = [[line.difference(other) for other in printed] for line in lines]
    rows = _aligned([line == CUT for line in shown], difference, len(printed))
    matched = {i for i, j in rows if i is not None and (j is not None or shown[i] == CUT)} | {-1, len(shown)}
    kept = {i for i, line in enumerate(shown) if line == CUT and {i - 1, i + 1} <= matched}
    result = []
    for i, j in rows:
        if i in kept:
            result += [CUT] if j is None else []
        elif i is not None and j is not None and shown[i] != CUT and difference[i][j] == 0:
            result.append(shown[i])
        elif j is not None:
            result.append(printed[j])
    return result


def _aligned(cut: list[bool], difference: list[list[float]], m: int) -> list[tuple[int | None, int | None]]:
    """Pairs (index of a shown line, index of one of m printed lines), in order, by dynamic programming from the end.

    None stands for a line that has no partner. A cut is in a pair with every line that it hides, and then in one with None.
    """
    n = len(cut)
    cost = [[math.inf] * (m + 2) for _ in range(n + 2)]  # of shown[i:] beside printed[j:]; the last row and column are beyond
    step = [[(0, 0)] * (m + 1) for _ in range(n + 1)]  # to the next pair of positions
    for i in range(n, -1, -1):
        for j in range(m, -1, -1):
            if (i, j) == (n, m):
                cost[i][j] = 0
                continue
            in_cut = i < n and cut[i]
            # without a line beside it a cut goes, too, and shows all that it hides
            beside_cut = i < n and any(cut[max(i - 1, 0) : i + 2])
            choices = [
                (cost[i][j + 1] + (0 if in_cut else 1), (0, 1)),
                (cost[i + 1][j] + (0 if in_cut else n + m if beside_cut else 1), (1, 0)),
            ]
            if i < n and j < m and not in_cut:
                choices.append((cost[i + 1][j + 1] + difference[i][j], (1, 1)))
            cost[i][j], step[i][j] = min(choices)
    rows: list[tuple[int | None, int | None]] = []
    i = j = 0
    while (i, j) != (n, m):
        down, right = step[i][j]
        rows.append((i if down or (i < n and cut[i]) else None, j if right else None))
        i, j = i + down, j + right
    return rows


class _Line:
    """A line of a page: a pattern of its words and the numbers in it."""

    def __init__(self, text: str):
        free = {match.start(1): tolerance for pattern, tolerance in VARIES for match in re.finditer(pattern, text)}
        pattern, end = "", 0
        self.numbers: list[tuple[str, float]] = []  # with the relative tolerance
        for part in PARTS.finditer(text):
            pattern += re.escape(text[end : part.start()])
            end = part.end()
            if part["number"]:
                self.numbers.append((part["number"], free.get(part.start(), 0.0)))
                pattern += f"({NUMBER})"
            elif part[0].isspace():
                pattern += " +"
            else:
                pattern += re.escape(part["start"] or "") + ".*?"
        self.pattern = re.compile(pattern + re.escape(text[end:]))

    def difference(self, printed: str) -> float:
        """Share of the numbers that differ; infinite where the words do."""
        match = self.pattern.fullmatch(printed)
        if match is None:
            return math.inf
        different = [not _close(a, b, tolerance) for (a, tolerance), b in zip(self.numbers, match.groups(), strict=True)]
        return sum(different) / max(len(different), 1)


def _close(shown: str, printed: str, tolerance: float) -> bool:
    a, b = (float(number.replace(",", "")) for number in (shown, printed))
    if tolerance == math.inf:
        return True
    unit = min(_unit(shown), _unit(printed), key=lambda unit: unit or math.inf)
    return abs(a - b) <= max(unit * 1.01, TINY, tolerance * abs(a))


def _unit(number: str) -> float:
    """One unit of the last digit; 0 for an integer."""
    digits, _, exponent = number.partition("e")
    decimals = len(digits.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals or exponent else 0.0
