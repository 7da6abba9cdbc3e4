"""`lindm act` with a standard input: lines of JSON, and a dialog in a terminal."""

import io
import json
import sys

import pytest

from lindm.cli.main import main
from lindm.io import limits
from tests.lindm.cli.test_act import ORACLE, asked


class Stdin(io.TextIOWrapper):
    """A standard input with these bytes; a terminal or not."""

    def __init__(self, content: bytes = b"", terminal: bool = False):
        super().__init__(io.BytesIO(content))
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def lines(monkeypatch, capsys, content, *words):
    """The exit code, the answers to lines on the standard input, and what stands on the standard error."""
    monkeypatch.setattr(sys, "stdin", Stdin(content if isinstance(content, bytes) else content.encode()))
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


# --- lines of JSON -----------------------------------------------------------------------------------------------------------


def test_each_line_is_one_decision_with_its_id(monkeypatch, capsys):
    questions = [
        {"history": "", "id": "first"},
        {"history": [{"action": "listen", "observation": 0}], "id": 2},
        {"history": "0 0"},
    ]
    code, answers, _ = lines(monkeypatch, capsys, "\n".join(map(json.dumps, questions)) + "\n\n", *ORACLE)
    assert code == 0 and [a.get("id") for a in answers] == ["first", 2, None]
    assert answers[0] == {"id": "first"} | asked(capsys, *ORACLE, "--history", "")
    assert (
        {**answers[1], "id": 0} == {**answers[2], "id": 0} == {"id": 0} | asked(capsys, *ORACLE, "--history", "listen hear-left")
    )


@pytest.mark.fault("F32")
@pytest.mark.parametrize(
    "line, message",
    [
        (b"x", "not JSON"),
        (b"\xff\xfe", "expected text in UTF-8; got the byte 0xff"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 10_000, "not JSON"),
        (b"[]", "a question must be an object such as"),
        (b'{"id": 1}', "a question must be an object such as"),
        (b'{"history": 3}', "history must be text or a list of steps; got '3'"),
        (b'{"history": [[]]}', "history: step 1: a step must have the fields action, observation; got '[]'"),
        (b'{"history": [{"action": {}, "observation": 0}]}', "action must be a name or a whole number; got '{}'"),
        (b'{"history": [{"action": 1e999, "observation": 0}]}', "action must be a name or a whole number; got 'inf'"),
        (b'{"history": [{"action": "\\ud800", "observation": 0}]}', "action must be one of listen"),
        (b'{"history": "\\u0000 0"}', "action must be one of listen"),
        (b'{"history": "listen hear-left"' + b" " * limits.QUESTION + b"}", "a question must have at most 1,048,576 bytes"),
        (b'{"history": "' + b"listen hear-left " * 50_000 + b'"}', "history must have at most 2 steps"),
        (
            b'{"history": "", "histroy": ""}',
            "got 'histroy'; did you mean history?",
        ),
        (b'{"history": "", "id": NaN}', "id must be text or a whole number; got 'nan'"),
    ],
)
def test_a_wrong_line_is_answered_by_its_error_and_the_next_one_is_answered(monkeypatch, capsys, line, message):
    code, answers, err = lines(monkeypatch, capsys, line + b'\n{"history": ""}\n', *ORACLE)
    assert code == 3 and "1 of 2 questions had an error" in err
    assert answers[0].keys() <= {"id", "error"} and message in answers[0]["error"]
    assert len(answers[0]["error"]) < 400 and answers[1]["action"] == "listen"


def test_an_empty_input_and_no_history_is_an_error_of_usage(monkeypatch, capsys):
    code, answers, err = lines(monkeypatch, capsys, "\n", *ORACLE)
    assert (code, answers) == (2, []) and "--history must be given, or lines such as" in err


# --- the dialog --------------------------------------------------------------------------------------------------------------


def talk(monkeypatch, capsys, entered, *words):
    """What a dialog shows; `entered` are the answers to its questions, and then the input ends."""
    prompts, answers = [], iter(entered)

    def ask(prompt):
        prompts.append(prompt)
        if (word := next(answers, None)) is None:
            raise EOFError
        return word

    monkeypatch.setattr(sys, "stdin", Stdin(terminal=True))
    monkeypatch.setattr("builtins.input", ask)
    assert main(list(words)) == 0
    return prompts, capsys.readouterr().out


def test_a_dialog_asks_for_what_was_done_and_observed_until_the_horizon(monkeypatch, capsys):
    entered = ["", "hear-lft", "hear-left", "open-left", "1"]
    prompts, out = talk(monkeypatch, capsys, entered, *ORACLE)
    question = "observation (hear-left, hear-right): "
    assert prompts == ["action [listen]: ", question, question, "action [listen]: ", question]
    assert "got 'hear-lft'; did you mean hear-left" in out and out.endswith("This was the last decision.\n")
    assert out.count("next action") == 3 and "belief       left 0.8500, right 0.1500" in out


def test_a_dialog_about_an_mdp_asks_for_states_and_ends_with_the_input(monkeypatch, capsys, micro):
    prompts, out = talk(monkeypatch, capsys, ["9", "0", "1"], "act", "oracle", str(micro.mdp))
    assert [p.split()[0] for p in prompts] == ["state", "state", "action", "state"]
    assert "state must be one of 0, 1" in out and out.count("next action") == 1


def test_a_dialog_asks_again_after_what_is_impossible(monkeypatch, capsys):
    prompts, out = talk(monkeypatch, capsys, ["defer", "JH", "psa-1-positive"], "act", "qmdp", "prostate", "--horizon", "2")
    assert "the observation 'psa-1-positive' has the probability 0 there; possible: psa-1-null" in out
    assert [p.split()[0] for p in prompts] == ["action", "model", "observation", "action"]
