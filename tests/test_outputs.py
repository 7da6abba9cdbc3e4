"""The comparison of what pages show with what is printed: a changed word is found, a time is not, and rewriting settles."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import test_pages
from tests.outputs import CUT, VARIES, printed_lines, rewritten

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
    head, *diff = test_pages.Output(40, SOLVE, printed).difference("docs/families.md")
    assert head.startswith("docs/families.md:41: ")
    assert diff[1:] == [f" {SOLVE[0]}", "-first action  run", "+first action  inspect", f" {SOLVE[2]}"]
    assert not test_pages.Output(40, SOLVE, [*SOLVE[:2], "method        tree, 7 s"]).difference("docs/families.md")


def test_lines_of_progress_are_no_output():
    progress = "tasks: 16 of 60, 0:18 elapsed\ntrain: 61 of 120, loss 0.05, 4.3/s, 1:35 elapsed, 0:14 left"
    text = f"\n{progress}\nstep 2 of 5: loss 1  \n\nend\n\n"
    assert printed_lines(text) == ["step 2 of 5: loss 1", "", "end"]


def test_every_number_that_may_vary_is_in_an_output_of_a_page():
    blocks = [
        block for page in test_pages.PAGES for block in test_pages.blocks(page) if block.executed and block.language == "console"
    ]
    shown = "\n".join(line for block in blocks for _, _, lines in test_pages.commands(block) for line in lines)
    assert [pattern for pattern, _ in VARIES if not re.search(pattern, shown, re.MULTILINE)] == []


PAGE = """# A page

```console
$ printf '%s\\n' one two \\
  three
one
[...]
three
$ echo unseen
$ ls nowhere 2> log; echo "lindm: error: nowhere is missing"; exit 3
lindm: error: nowhere was missing
```

```text title="numbers.txt"
1
```

```python
print(open("numbers.txt").read())
print(2)
```

Prose.

```text
3
```

```python
print("shown nowhere")
```

<!-- not executed: of another day -->
```text
4
```
"""


def test_a_page_is_rewritten_where_its_output_changed_and_only_there(tmp_path, monkeypatch):
    monkeypatch.setattr(test_pages, "ROOT", tmp_path)
    page, directory = tmp_path / "page.md", tmp_path / "run"
    page.write_text(PAGE)
    directory.mkdir()
    found = test_pages.outputs("page.md", directory)
    differences = [output.difference("page.md")[0] for output in found if output.difference("page.md")]
    assert [line.split(": ")[0] for line in differences] == ["page.md:11", "page.md:26"]
    test_pages.write("page.md", found)
    expected = PAGE.replace("nowhere was missing", "nowhere is missing").replace("```text\n3\n", "```text\n1\n\n2\n")
    assert page.read_text() == expected
    with pytest.raises(AssertionError, match="was changed while its code was running"):
        test_pages.write("page.md", found)
    test_pages.write("page.md", test_pages.outputs("page.md", directory))
    assert page.read_text() == expected


def test_a_command_that_shows_no_error_must_not_fail_and_one_that_does_must(tmp_path, monkeypatch):
    monkeypatch.setattr(test_pages, "ROOT", tmp_path)
    for command, shown, message in (("false", "", "ends with 1"), ("echo fine", "lindm: error: none\n", "ends with 0")):
        (tmp_path / "page.md").write_text(f"```console\n$ {command}\n{shown}```\n")
        with pytest.raises(AssertionError, match=message):
            test_pages.outputs("page.md", tmp_path)


LINES = st.lists(st.sampled_from(["a", "b", "a 1", "a 2", "a 2.5 s", "", "..."]), max_size=7)


@given(shown=LINES.flatmap(lambda lines: st.lists(st.sampled_from([*lines, CUT]), max_size=7)), printed=LINES)
def test_what_was_rewritten_matches(shown, printed):
    result = rewritten(shown, printed)
    assert rewritten(result, printed) == result
    if CUT not in result and "..." not in result:
        assert len(result) == len(printed)
