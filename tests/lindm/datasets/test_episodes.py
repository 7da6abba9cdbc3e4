"""Episodes of a user's own come in as they were written; a row that breaks a rule is named by file and line."""

import dataclasses
import json
import os

import pytest

from lindm.datasets import read_episodes
from lindm.errors import DataError
from lindm.text import Step

CSV = """\
episode,step,state,action,observation,reward,nurse
monday,0,good,run,fine,1.0,Kim
monday,1,worn,run,alarm,0.7,Kim
monday,2,broken,,,,
tuesday,0,good,inspect,fine,-0.1,Lee
"""
NAMES = {"states": ("good", "worn", "broken"), "actions": ("run", "inspect", "replace"), "observations": ("fine", "alarm")}


def written(tmp_path, text, name="log.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_csv_file_is_read_with_the_names_of_the_problem(tmp_path):
    read = read_episodes(written(tmp_path, CSV), NAMES)
    assert read.episodes == (
        (
            Step(0, state=0, observation=0, reward=1.0),
            Step(0, state=1, observation=1, reward=0.7),
            Step(None, state=2),
        ),
        (Step(1, state=0, observation=0, reward=-0.1),),
    )
    assert read.ids == ("monday", "tuesday") and read.lines == ((2, 3, 4), (5,))
    assert read.fields == {"state", "observation", "reward"}
    assert read.names == {part: tuple(names) for part, names in NAMES.items()}


def test_names_that_are_not_known_are_collected_in_alphabetical_order_and_numbers_are_counted(tmp_path):
    read = read_episodes(written(tmp_path, CSV))
    assert read.names == {"states": ("broken", "good", "worn"), "actions": ("inspect", "run"), "observations": ("alarm", "fine")}
    assert read.episodes[0][1] == Step(1, state=2, observation=0, reward=0.7)
    read = read_episodes(written(tmp_path, "episode,step,action,observation\n7,1,2,0\n7,2,0,5\n"))
    assert read.names == {"actions": ("0", "1", "2"), "observations": tuple("012345")}
    assert read.episodes == ((Step(2, observation=0), Step(0, observation=5)),)


def test_numbers_stand_for_names(tmp_path):
    read = read_episodes(written(tmp_path, "episode,step,action\n1,0,2\n1,1,run\n"), NAMES)
    assert read.episodes == ((Step(2), Step(0)),)
    assert read.names == {"actions": NAMES["actions"]}


def test_json_lines_are_read_as_the_same_table(tmp_path):
    header, *rows = [line.split(",") for line in CSV.splitlines()]
    objects = [dict(zip(header, row, strict=True)) for row in rows]
    for row in objects:
        row["step"] = int(row["step"])
        row["reward"] = float(row["reward"]) if row["reward"] else None
    text = "\n\n".join(map(json.dumps, objects))
    read, same = read_episodes(written(tmp_path, text, "log.jsonl"), NAMES), read_episodes(written(tmp_path, CSV), NAMES)
    assert read.lines == ((1, 3, 5), (7,))
    assert dataclasses.replace(read, lines=same.lines) == same


def test_spaces_a_mark_of_utf8_windows_lines_and_quoted_cells_change_nothing(tmp_path):
    plain = read_episodes(written(tmp_path, CSV))
    other = CSV.replace(",run,fine,", ', run ,"fine",')
    assert other != CSV
    assert read_episodes(written(tmp_path, b"\xef\xbb\xbf" + other.replace("\n", "\r\n").encode())) == plain


@pytest.mark.parametrize(
    "old, new, line, message",
    [
        ("good,run,fine", "goood,run,fine", 2, "state must be one of good, worn, broken; got 'goood'; did you mean good?"),
        ("worn,run,alarm", "worn,9,alarm", 3, "action must be one of run, inspect, replace; got '9'"),
        ("worn,run,alarm", "worn,run,", 3, "observation must be given in every row or in none; this row has"),
        ("monday,1,", "monday,3,", 3, "step must be 1, since steps follow each other; got '3'"),
        ("monday,0,", "monday,2,", 2, "step must count from 0, or from 1; the first row has '2'"),
        ("tuesday,0,good,inspect", "tuesday,0,good,", 5, "action must be given, except in the last row of an episode"),
        ("tuesday,0", "monday,3", 5, "action must be given in every row but the last one of an episode"),
        (",,,,\n", ",,fine,,\n", 4, "observation must be given in a row with an action; this row has"),
        ("tuesday", "", 5, "episode must be given in every row"),
        ("0.7", "much", 3, "reward must be a finite number; got 'much'"),
        ("0.7", "nan", 3, "reward must be a finite number; got 'nan'"),
        ("0.7", "1_0", 3, "reward must be a finite number; got '1_0'"),
        ("fine,1.0,Kim", "fine,1.0", 2, "expected 7 cells, as the header has; got 6"),
        ("fine,1.0,Kim", 'fine,"1.0,Kim', 5, "not CSV: unexpected end of data"),
        ("reward", "rewards", 1, "the column 'rewards' is not known; did you mean reward?"),
        ("nurse", "reward", 1, "the column 'reward' is given twice"),
        ("action", "deed", 1, "the column 'action' is missing; got episode, step, state, deed"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path, old, new, line, message):
    assert old in CSV
    path = written(tmp_path, CSV.replace(old, new, 1))
    with pytest.raises(DataError) as error:
        read_episodes(path, NAMES)
    assert str(error.value).startswith(f"{path}:{line}: ") and message in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1, 2]\n", "expected an object with episode, step, action; got '[1, 2]'"),
        ("{", "not JSON"),
        ('{"episode": 1, "step": 0, "action": true}', "action must be a name or a whole number; got 'True'"),
        ('{"episode": 1, "step": 0.5, "action": 0}', "step must be a name or a whole number; got '0.5'"),
        ('{"episode": 1, "step": 0, "action": 0, "reward": NaN}', "reward must be a finite number; got 'nan'"),
        ('{"episode": 1, "step": 0, "action": 0, "reward": [1]}', "reward must be a number; got '[1]'"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_wrong_line_of_json_is_named(tmp_path, text, message):
    path = written(tmp_path, text, "log.jsonl")
    with pytest.raises(DataError) as error:
        read_episodes(path)
    assert str(error.value).startswith(f"{path}:1: ") and message in str(error.value)


def test_episodes_that_are_torn_apart_are_refused(tmp_path):
    text = "episode,step,action\na,0,0\nb,0,0\na,1,0\n"
    with pytest.raises(DataError, match=r"log.csv:4: the rows of an episode must follow each other; episode 'a' began on line 2"):
        read_episodes(written(tmp_path, text))


def test_what_a_caller_needs_must_be_there(tmp_path):
    with pytest.raises(DataError, match=r"log.csv:2: reward must be given; got the columns episode, step, action"):
        read_episodes(written(tmp_path, "episode,step,action\na,0,0\n"), required={"reward"})


@pytest.mark.parametrize("text", ["", "\n\n", "episode,step,action\n"])
def test_a_file_without_rows_is_refused(tmp_path, text):
    with pytest.raises(DataError, match=r"log.csv:1: expected"):
        read_episodes(written(tmp_path, text))


def test_hostile_files_end_with_an_error(tmp_path):
    with pytest.raises(DataError, match=r"must be a .csv or .jsonl file"):
        read_episodes(written(tmp_path, CSV, "log.xlsx"))
    with pytest.raises(DataError, match=r"log.csv:2: expected text in UTF-8; got the byte 0xff"):
        read_episodes(written(tmp_path, b"episode,step,action\na,0,\xff\n"))
    with pytest.raises(DataError, match=r"log.csv:2: not CSV: field larger than field limit"):
        read_episodes(written(tmp_path, "episode,step,action\na,0," + "x" * 200_000))
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match="must be a regular file; it is a FIFO"):
        read_episodes(tmp_path / "pipe.csv")
