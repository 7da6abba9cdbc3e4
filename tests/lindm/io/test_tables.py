"""Padded tables."""

from lindm.io.tables import format_row, format_table


def test_columns_are_as_wide_as_their_widest_cell_and_lines_have_no_trailing_spaces():
    assert format_table([("name", "n"), ("a", "100"), ("long name", "")]) == "name       n\na          100\nlong name"
    assert format_row(("a", "b"), (3, 5)) == "a    b"
