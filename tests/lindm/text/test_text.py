"""Texts and documents are exact inverses; their pieces, errors, and template files."""

import itertools
import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.errors import DataError, LindmError
from lindm.text import COMPACT, READABLE, Document, Step, action_spans, load_template, parse, render, text
from tests.lindm.text.text_cases import APOMDP, CLINIC, MDP, POMDP, TEMPLATES, build, documents, same

# --- exact inverse


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
@pytest.mark.parametrize("one_kind", [True, False])
def test_a_document_is_read_back_exactly(template, one_kind):
    @settings(max_examples=100)
    @given(documents(one_kind=one_kind))
    def check(document):
        assert same(parse(text(render(document, template)), template), document)

    check()


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
@pytest.mark.parametrize(
    "reward", [1e-300, -0.0, 0.0, 0.1, 12345678.9, 1e16, 1e22, 1.5e-5, -2.5e-10, 5e-324, 1.7976931348623157e308, 100]
)
def test_a_reward_keeps_every_bit(template, reward):
    document = Document((), (Step(0, 1, reward=reward),))
    (step,) = parse(text(render(document, template)), template).query
    assert step.reward == reward and math.copysign(1, step.reward) == math.copysign(1, reward)


def test_the_built_in_templates_look_as_intended():
    assert text(render(MDP, COMPACT)) == "#\n2 A:0.5\n0 B:-1.0\n#\n1 B:0.25\n2"
    assert text(render(POMDP, COMPACT)) == "#\n A2:0.5\n#\n B0:1.0\n"
    assert text(render(APOMDP, COMPACT)) == "#\n Ab2\n#\n Ba10\n"
    assert text(render(APOMDP, READABLE)) == (
        "Every episode is a sequence of decisions.\nA new episode begins.\n"
        "The decision is A. Nature takes model 1. The observation is 2.\nThe episode ends.\nA new episode begins.\n"
        "The decision is B. Nature takes model 0. The observation is 10.\nThe decision is"
    )
    assert text(render(MDP, READABLE)).endswith(
        "The state is 1. The decision is B. The reward is 0.25.\nThe state is 2. The decision is"
    )
    assert text(render(Document((), (Step(2, 1, 0, 3, 0.5),)), CLINIC)) == (
        "Notes of a clinic {all of them}\n* stage early spread; decision: biopsy twice under expert 0, lab r3% cost [0.5]\n"
    )


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_no_episode_an_empty_episode_and_a_query_have_different_texts(template):
    few = [
        Document(),
        Document((), (Step(None),)),
        Document((), (Step(None, 0),)),
        Document(((),)),
        Document(((), ())),
        Document(((),), (Step(None),)),
        Document(((Step(0),),)),
        Document((), (Step(0),)),
        Document((), (Step(0), Step(None))),
    ]
    texts = [text(render(document, template)) for document in few]
    assert len(set(texts)) == len(few)
    assert [parse(t, template) for t in texts] == few


def test_integers_and_floats_of_arrays_are_written_as_numbers():
    steps = (Step(np.int32(1), np.int64(2), reward=np.float64(0.1)), Step(jnp.int32(0), jnp.int32(0), reward=jnp.float64(0.5)))
    assert text(render(Document((), steps), COMPACT)) == "#\n2 B:0.1\n0 A:0.5"
    assert all(type(piece.action) is int for piece in render(Document((), steps), COMPACT) if piece.action is not None)


# --- pieces


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_the_pieces_of_a_history_begin_those_of_every_continuation(template):
    @given(documents())
    def check(document):
        pieces = render(document, template)
        episodes = (*document.demonstrations, document.query)
        for e, episode in enumerate(episodes):
            for t in range(len(episode) + 1):
                histories = [Document(episodes[:e], episode[:t])]
                if t < len(episode):
                    histories.append(Document(episodes[:e], (*episode[:t], Step(None, episode[t].state))))
                for history in histories:
                    begun = render(history, template)
                    assert begun == pieces[: len(begun)]
                    assert text(pieces).startswith(text(begun))

    check()


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_action_pieces_and_spans_are_the_action_symbols_and_nothing_else(template):
    @given(documents())
    def check(document):
        pieces = render(document, template)
        episodes = (*document.demonstrations, document.query)
        acted = [(e, t, s.action) for e, steps in enumerate(episodes) for t, s in enumerate(steps) if s.action is not None]
        assert [(p.episode, p.step, p.action) for p in pieces if p.action is not None] == acted
        assert [p.text for p in pieces if p.action is not None] == [template.actions[a] for _, _, a in acted]
        whole = text(pieces)
        spans = action_spans(pieces)
        assert [(e, t) for *_, e, t in spans] == [(e, t) for e, t, _ in acted]
        assert [whole[i:j] for i, j, *_ in spans] == [template.actions[a] for _, _, a in acted]
        assert all(p.text and not (q.action is not None and p.text.endswith(" ")) for p, q in itertools.pairwise(pieces))

    check()


def test_a_piece_of_text_belongs_to_one_step_or_opens_an_episode():
    places = [(p.text, p.episode, p.step) for p in render(MDP, COMPACT) if p.action is None]
    assert places == [
        *[("#", 0, None), ("\n2", 0, 0), (":0.5", 0, 0), ("\n0", 0, 1), (":-1.0", 0, 1)],
        *[("\n#", 1, None), ("\n1", 1, 0), (":0.25", 1, 0), ("\n2", 1, 1)],
    ]


# --- errors of documents and of texts


@pytest.mark.parametrize(
    "document, complaint",
    [
        (Document((), (Step(4),)), "query[0].action must be an index of actions, which has 4 symbols, got 4"),
        (Document((), (Step(-1),)), "query[0].action must be an index of actions, which has 4 symbols, got -1"),
        (Document(((Step(0, 3),),)), "demonstrations[0][0].state must be an index of states, which has 3 symbols, got 3"),
        (Document((), (Step(0, model=-1),)), "query[0].model must be an index of models"),
        (Document((), (Step(0), Step(1.0))), "query[1].action must be an integer, got 1.0"),
        (Document((), (Step(0, reward=math.nan),)), "query[0].reward must be a finite number, got nan"),
        (Document((), (Step(0, reward=-math.inf),)), "query[0].reward must be a finite number, got -inf"),
        (Document((), (Step(0, reward="1"),)), "query[0].reward must be a finite number, got '1'"),
        (Document((), (Step(0, reward=10**400),)), "query[0].reward must be a finite number"),
        (Document(((Step(None),),)), "demonstrations[0][0].action may be None in the last step of the query only"),
        (Document((), (Step(None), Step(0))), "query[0].action may be None in the last step of the query only"),
        (Document((), (Step(None, reward=1.0),)), "query[0].action may be None in the last step of the query only"),
    ],
)
def test_a_document_without_a_text_is_refused_by_place_and_rule(document, complaint):
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}"):
        render(document, CLINIC)


def test_a_field_that_the_template_does_not_show_is_refused():
    with pytest.raises(ValueError, match=r"^query\[0\]\.state has no place in the steps of template 'small'"):
        render(Document((), (Step(0, state=1),)), build("\n", "{action}"))


@pytest.mark.parametrize(
    "whole, complaint",
    [
        ("", "1:1: expected '#', got the end of the text"),
        ("x", "1:1: expected '#', got 'x'"),
        ("#\n3 A:0.5\n4 b", "3:3: expected one of the actions ' A', ' B', ' C', ' D', ..., got 'b'"),
        ("#\n3 A:0.5\n#\n2 ", "4:3: expected one of the actions ' A', ' B', ' C', ' D', ..., got the end of the text"),
        ("#\n3 A:0.50\n", "2:9: expected a finite number as `repr` writes it, got '\\n'"),
        ("#\n3 A:1e+999", "2:5: expected a finite number as `repr` writes it, got '1e+999'"),
        ("#\n3 A:0.00000000000000000000000000000001", "2:5: expected a finite number as `repr` writes it"),
        ("#\n3 A:nan", "2:5: expected a finite number as `repr` writes it, got 'nan'"),
        ("#\n03 A", "2:2: expected one of the actions"),
        ("#\n٣ A", "2:1: expected one of the states '0', '1', '2', '3', ... or one of the actions"),
        ("#\n" + "9" * 5000 + " A", "2:1: expected one of the states '0', '1', '2', '3', ..., got '999999999999'"),
        (
            "#\n3 Ab2:0.5;",
            "2:10: expected a finite number as `repr` writes it or '\\n' or '\\n#' or the end of the text, got ';'",
        ),
    ],
)
def test_a_text_without_a_document_is_refused_by_place_and_what_was_expected(whole, complaint):
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}"):
        parse(whole, COMPACT)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_a_damaged_text_is_refused_or_is_the_text_of_what_is_read(template):
    @given(documents(), st.integers(0, 10**6), st.sampled_from(["", "0", " ", "\n", ".", "A", "é"]))
    def check(document, place, other):
        whole = text(render(document, template))
        i = place % len(whole)
        damaged = whole[:i] + other + whole[i + 1 :]
        try:
            read = parse(damaged, template)
        except ValueError as e:
            assert re.match(r"\d+:\d+: expected .+, got ", str(e))
        else:
            assert text(render(read, template)) == damaged

    check()


# --- files

FIELDS = ("name", "opening", "episode", "step", "closing", "actions", "states", "models", "observations", "legal")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_a_template_is_read_from_its_file_unchanged(tmp_path, template, suffix):
    given = {name: value for name in FIELDS if (value := getattr(template, name)) is not None}
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in given.items()]
    path = tmp_path / f"mine.{suffix}"
    path.write_text(json.dumps(given) if suffix == "json" else "".join(lines), encoding="utf-8")
    loaded = load_template(path)
    assert loaded == template and hash(loaded) == hash(template)
    assert parse(text(render(APOMDP, loaded)), template) == APOMDP


@pytest.mark.fault("F13")
@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.json", '{\n "name": "x",\n "step": ["\\n", "{action}",\n}', ":4: "),
        (
            "a.json",
            '{\n "name": "x",\n "actions": ["A"],\n "step": ["\\n", "{reward}"], "closing": ";"\n}',
            ":4: step must contain",
        ),
        ("a.json", '{\n "name": "x",\n "steps": ["\\n", "{reward}"]\n}', ":3: steps is not an argument of a template"),
        ("a.json", '{\n "name": "x",\n "name": "y"\n}', ":2: name is given twice"),
        ("a.json", '{\n "name": "x"\n}', ":1: a template must have actions, step"),
        ("a.json", "[1]", ":1: a template must be an object"),
        ("a.json", "[" * 100_000, ":1: "),
        (
            "a.json",
            '{"name": "x", "step": ["A", "{action}"], "actions": ["A", "AA"], "closing": ";"}',
            ":1: template 'x' is ambiguous",
        ),
        ("a.toml", 'name = "x"\nclosing = ";"\nstep = ["\\n{action}"]\nactions = ["A", "A"]\n', ":4: actions must be names"),
        ("a.toml", 'name = "x"\nstep = [\n', ":"),
        ("a.toml", 'name = "x"\nstep = 2 2\n', ":2: "),
        ("a.toml", 'name = "x"\nclosing = 3\nstep = ["\\n{action}"]\nactions = ["A", "B"]\n', ":2: closing must contain text, "),
    ],
)
def test_a_file_that_is_no_template_stops_with_its_line(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(LindmError, match=f"^{re.escape(str(tmp_path / name) + complaint)}") as stop:
        load_template(tmp_path / name)
    assert isinstance(stop.value, DataError)


def test_a_file_that_cannot_be_read_stops(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{"name": "\xe9"}')
    for name in ("nowhere.json", "latin.json"):
        with pytest.raises(LindmError, match=re.escape(name)) as stop:
            load_template(tmp_path / name)
        assert isinstance(stop.value, DataError)


@pytest.mark.parametrize("actions", [("stay", "go", "go on"), "a{}"])
def test_a_list_of_legal_actions_is_read_back(actions):
    template = build("\n", "{state}:", "may {legal};", "{action}", ">{observation}", actions=actions)
    demonstration = (Step(0, 1, legal=(0, 2)), Step(2, legal=(2,)))
    query = (Step(1, observation=3, legal=(0, 1, 2)), Step(None, 4, legal=(1,)))
    document = Document((demonstration,), query)
    written = text(render(document, template))
    assert "may " + ("stay,go on" if actions[0] == "stay" else "a0,a2") in written and parse(written, template) == document
    with pytest.raises(ValueError, match=r"expected .*some of the actions"):
        parse(written.replace("may go;" if actions[0] == "stay" else "may a1;", "may fly;"), template)
    with pytest.raises(ValueError, match=r"legal must be at least one action"):
        render(Document((), (Step(None, legal=()),)), template)


def test_a_template_says_where_legal_actions_stand():
    for step in (("\n", "{action}", "{legal}"), ("\n", "{legal}", "{legal}", "{action}")):
        with pytest.raises(
            ValueError, match=r"step must contain \{action\} once, \{state\} and \{legal\} at most once and before it"
        ):
            build(*step)
    with pytest.raises(ValueError, match=r"actions must have no ',' where step has \{legal\}"):
        build("\n", "[{legal}]", "{action}", actions=("a", "b,c"))
    for legal, step in (("no field", ("\n", "{action}")), ("[{legal}]", ("\n", "{legal}:", "{action}"))):
        with pytest.raises(ValueError, match=r"^legal must contain \{legal\}, and step must then not contain it"):
            build(*step, legal=legal)
    shown = build("\n", "in {state} ", "do", "{action}", legal="of {legal} ").with_legal_actions()
    assert shown.step == ("\n", "in {state} ", "of {legal} ", "do", "{action}") and shown.legal is None
    assert build("\n", "{action}", legal="[{legal}]").with_legal_actions().step == ("\n", "[{legal}]", "{action}")
