"""Tables as text: columns padded to their widest cell."""

from collections.abc import Sequence


def format_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One row: cells padded to the widths, two spaces between columns, nothing at the end."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells, the first of them the header, as lines of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(format_row(row, widths) for row in rows)
