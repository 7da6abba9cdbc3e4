"""The comparison of what pages show with what is printed: a changed word is found, a time is not, and rewriting settles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.outputs import CUT, printed_lines, rewritten
from tests.test_pages import Output

SOLVE = ["value         4.255317001  (exact)", "first action  run", "method        tree, 1.1 s"]
TRAINING = [
    f"step {step} of 500: loss {loss}" for step, loss in ((0, 6.1), (125, 0.25), (250, 0.125), (375, 0.0625), (500, 0.03125))
]


def same(shown: str, printed: str) -> bool:
    return rewritten([shown], [printed]) == [shown]


@pytest.mark.parametrize(
    "shown, printed",
    [
        ("first action  run", "first action run"),  # a column of another width
        ("method  tree, 1.1 s", "method  tree, 24.2 s"),
        ("bc   0.0725  [0.0032, 0.1417]  20   exact   14,371.2", "bc  0.0725  [0.0032, 0.1417]  20  exact  981.3"),
        ("held-out loss 0.0001208, accuracy 100.0%", "held-out loss 0.0001211, accuracy 100.0%"),
        ("value 4.255317001", "value 4.255317002"),  # the last digit, which is rounded
        ("probability 0.9999", "probability 1.0000"),
        ("V* - V^pi  0  0.00%", "V* - V^pi  4.441e-16  0.00%"),
        ("1.5  is 1.500 with four digits", "1.501  is 1.500 with four digits"),
        ('{"run": 11.14..., "stage": 1, ...}', '{"run": 11.143710, "stage": 1, "belief": {"good": 0.5}}'),
    ],
)
def test_a_line_that_differs_in_speed_width_or_rounding_is_the_same(shown, printed):
    assert same(shown, printed)


@pytest.mark.parametrize(
    "shown, printed",
    [
        ("first action  run", "first action  inspect"),
        ("method  tree, 1.1 s", "method  hsvi, 1.1 s"),
        ("method  tree, 1.1 s", "method  tree, 1.1 ms"),
        ("held-out loss 0.0001208, accuracy 100.0%", "held-out loss 0.0001308, accuracy 100.0%"),
        ("held-out loss 0.0001208, accuracy 100.0%", "held-out loss 0.0001208, accuracy 99.8%"),
        ("value 4.255317001", "value 4.255317003"),
        ("value 4.255317001", "value -4.255317001"),
        ("gap 0.0021", "gap 0.0023"),
        ("20 tasks", "21 tasks"),
        ("1,374,400 parameters", "1,374,401 parameters"),
        ("1.5  of the same width", "1.58  of the same width"),
        ("bc   0.0725   20   exact   14,371.2", "bc   0.0725   20   bounds   14,371.2"),
        ("bc   0.0725   20   exact   14,371.2", "bc   0.0725   21   exact   14,371.2"),
        ('{"run": 11.14..., ...}', '{"run": 11.15, "belief": {}}'),
        ("two words", "twowords"),
    ],
)
def test_a_line_with_another_word_or_number_is_found_and_replaced(shown, printed):
    assert rewritten([shown], [printed]) == [printed]


def test_a_cut_stands_for_any_number_of_lines():
    for shown in ([CUT], [CUT, TRAINING[-1]], [TRAINING[0], CUT], [TRAINING[0], CUT, *TRAINING[2:4], CUT], [CUT, *TRAINING, CUT]):
        assert rewritten(shown, TRAINING) == shown
    repeated = ["a", "x", "a", "b"]
    assert rewritten([CUT, "a", "b"], repeated) == [CUT, "a", "b"]


def test_lines_that_are_not_shown_need_a_cut():
    assert rewritten(TRAINING[:1] + TRAINING[2:], TRAINING) == TRAINING
    assert rewritten(TRAINING[:-1], TRAINING) == TRAINING
    assert rewritten([*TRAINING, "saved"], TRAINING) == TRAINING


def test_a_cut_stays_between_lines_whose_numbers_changed():
    shown = [TRAINING[0], CUT, TRAINING[2], CUT, TRAINING[4]]
    printed = [line.replace("0.125", "0.225") for line in TRAINING]
    assert rewritten(shown, printed) == [TRAINING[0], CUT, printed[2], CUT, TRAINING[4]]


def test_a_cut_does_not_hide_new_lines_in_place_of_its_neighbor():
    shown = ["method full, 500 steps", "data 900", "held out 100", CUT, TRAINING[4]]
    printed = ["method full", "steps 500", "optimizer adamw", "rate 1", "data 900", "held out 100", *TRAINING]
    assert rewritten(shown, printed) == [*printed[:6], CUT, TRAINING[4]]


def test_a_cut_goes_with_a_line_beside_it():
    shown = [TRAINING[0], CUT, "accuracy 100 %", CUT, TRAINING[4]]
    assert rewritten(shown, TRAINING) == TRAINING


def test_the_diff_names_the_page_and_the_line():
    printed = [SOLVE[0], "first action  inspect", "method        tree, 7 s"]
    head, *diff = Output(40, SOLVE, printed).difference("docs/families.md")
    assert head.startswith("docs/families.md:41: ")
    assert diff[1:] == [f" {SOLVE[0]}", "-first action  run", "+first action  inspect", f" {SOLVE[2]}"]
    assert not Output(40, SOLVE, [*SOLVE[:2], "method        tree, 7 s"]).difference("docs/families.md")


def test_lines_of_progress_are_no_output():
    progress = "tasks: 16 of 60, 0:18 elapsed\ntrain: 61 of 120, loss 0.05, 4.3/s, 1:35 elapsed, 0:14 left"
    text = f"\n{progress}\nstep 2 of 5: loss 1  \n\nend\n\n"
    assert printed_lines(text) == ["step 2 of 5: loss 1", "", "end"]


LINES = st.lists(st.sampled_from(["a", "b", "a 1", "a 2", "a 2.5 s", "", "..."]), max_size=7)


@given(shown=LINES.flatmap(lambda lines: st.lists(st.sampled_from([*lines, CUT]), max_size=7)), printed=LINES)
def test_what_was_rewritten_matches(shown, printed):
    result = rewritten(shown, printed)
    assert rewritten(result, printed) == result
    if CUT not in result and "..." not in result:
        assert len(result) == len(printed)
