"""Errors have a class each, and a number by which another process learns the class."""

import os
import signal

import pytest

from lindm import errors
from lindm.cli.exit_codes import EXIT_CODES, INTERNAL, exit_code


def classes():
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LindmError)]


def test_an_unexpected_error_has_an_exit_code_that_no_other_outcome_has():
    outcomes = {0, 1, *EXIT_CODES.values(), *(128 + number for number in signal.Signals)}
    assert INTERNAL == os.EX_SOFTWARE and INTERNAL not in outcomes


def test_every_class_has_a_number_and_an_exit_code_of_its_own():
    assert {*errors.KINDS, errors.OccupiedError} == set(classes())  # it is a UsageError for another process and as an exit code
    assert errors.KINDS[errors.kind_number(errors.OccupiedError())] is errors.UsageError
    codes = [exit_code(kind("message")) for kind in errors.KINDS]
    assert len(set(codes)) == len(codes) and codes[0] == INTERNAL
    assert set(EXIT_CODES) - {ValueError, errors.Preempted} == set(errors.KINDS[1:])


@pytest.mark.parametrize("kind", errors.KINDS)
def test_a_number_gives_the_class_back(kind):
    assert errors.KINDS[errors.kind_number(kind("message"))] is kind


def test_other_exceptions_are_usage_errors_or_unknown():
    assert errors.KINDS[errors.kind_number(ValueError())] is errors.UsageError
    assert errors.KINDS[errors.kind_number(OSError())] is errors.LindmError
    assert exit_code(ValueError()) == 2 and exit_code(OSError()) == INTERNAL


@pytest.mark.parametrize(
    "word, suggestion", [("verfy", "; did you mean verify?"), ("runn", "; did you mean run?"), ("xyzzy", ""), ("", "")]
)
def test_a_misspelled_word_has_the_nearest_known_one_as_a_suggestion(word, suggestion):
    assert errors.did_you_mean(word, ("verify", "run", "plot")) == suggestion


def test_the_message_for_an_unknown_word_names_the_argument_the_choices_and_the_word():
    assert errors.unknown("suite", "mpd", ("mdp", "pomdp")) == "suite must be one of mdp, pomdp; got 'mpd'; did you mean mdp?"
    many = [chr(97 + i) * 5 for i in range(20)]
    assert errors.unknown("chip", "bbbb", many) == "chip 'bbbb' is not known; did you mean bbbbb?"
    assert errors.unknown("chip", "123", many) == f"chip must be one of {', '.join(many[:12])}, ... (20 in all); got '123'"
