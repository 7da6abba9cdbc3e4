"""Text read back against a parser that searches, which shares no code with the automaton."""

import ast
import dataclasses
import itertools
import json
import math
import re
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.errors import DataError, LindmError
from lindm.text import COMPACT, READABLE, Document, Step, Template, action_spans, load_template, parse, render, text

CLINIC = Template(
    name="clinic",
    opening="Notes of a clinic {{all of them}}\n",
    step=("* ", "stage {state}; ", "decision:{action}", " under {model},", " lab {observation}", " cost [{reward}]", "\n"),
    closing="--\n",
    actions=(" defer", " biopsy", " biopsy twice", " defér"),
    states=("early", "early spread", "late"),
    models="expert {}",
    observations="r{}%",
)
TEMPLATES = [COMPACT, READABLE, CLINIC]
MDP = Document(((Step(0, 2, reward=0.5), Step(1, 0, reward=-1.0)),), (Step(1, 1, reward=0.25), Step(None, 2)))
POMDP = Document(((Step(0, observation=2, reward=0.5),),), (Step(1, observation=0, reward=1.0), Step(None)))
APOMDP = Document(((Step(0, model=1, observation=2),),), (Step(1, model=0, observation=10), Step(None)))

rewards = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([1e-300, -0.0, 0.1, 12345678.9, 1e16, 5e-324])
)


@st.composite
def documents(draw, shown=("state", "model", "observation", "reward"), sizes=(3, 3, 20, 30), one_kind=True):
    """Documents whose steps have some of the fields; sizes are those of actions, states, models and observations."""
    size = dict(zip(("action", "state", "model", "observation"), sizes, strict=True))
    kinds = st.sets(st.sampled_from(shown)) if shown else st.just(set())
    kind = draw(kinds)

    def step(is_open=False):
        has = kind if one_kind else draw(kinds)
        values = {f: draw(rewards if f == "reward" else st.integers(0, size[f] - 1)) for f in sorted(has)}
        return Step(None, values.get("state")) if is_open else Step(draw(st.integers(0, size["action"] - 1)), **values)

    lengths = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    *demonstrations, query = (tuple(step() for _ in range(n)) for n in lengths)
    return Document(tuple(demonstrations), query + (step(is_open=True),) * draw(st.booleans()))


def same(a: Document, b: Document) -> bool:
    """Equal to the last bit: -0.0 is not 0.0."""
    return repr(a) == repr(b)


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


# --- one reading: the automaton against search

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)\.(0|[0-9]*[1-9])(e[+-][0-9]{2,3})?|-?[1-9]e[+-][0-9]{2,3}")


def readings(whole: str, template: Template) -> list:
    """Up to two documents with this text, rewards as they stand: tries all alternatives everywhere."""
    tables = {
        "state": template.states,
        "action": template.actions,
        "model": template.models,
        "observation": template.observations,
    }
    parts = [[*re.split(r"\{(\w+)\}", part), "", ""][:3] for part in template.step]
    k = next(i for i, (_, field, _) in enumerate(parts) if field == "action")
    before, after = [*parts[:k], (parts[k][0], "", "")], [(parts[k][2], "", ""), *parts[k + 1 :]]

    def symbol(field, i):
        if field == "reward":
            yield from ((whole[i:j], j) for j in range(i + 1, len(whole) + 1) if NUMBER.fullmatch(whole, i, j))
        elif isinstance(tables[field], str):
            front, back = map(re.escape, tables[field].split("{}"))
            for j in range(i + 1, len(whole) + 1):
                if match := re.compile(f"{front}(0|[1-9][0-9]*){back}").fullmatch(whole, i, j):
                    yield int(match[1]), j
        else:
            yield from ((n, i + len(name)) for n, name in enumerate(tables[field]) if whole.startswith(name, i))

    def sequence(parts, i):
        if not parts:
            yield {}, i
            return
        (front, field, back), *rest = parts
        if field:
            yield from sequence(rest, i)
        if whole.startswith(front, i):
            for value, j in symbol(field, i + len(front)) if field else [(None, i + len(front))]:
                if whole.startswith(back, j):
                    for has, end in sequence(rest, j + len(back)):
                        yield ({field: value} if field else {}) | has, end

    def episodes(demonstrations, query, i):
        if i == len(whole):
            yield Document(demonstrations, query)
        turn = template.closing + template.episode
        if whole.startswith(turn, i):
            yield from episodes((*demonstrations, query), (), i + len(turn))
        for has, j in sequence(before, i):
            if j == len(whole):
                yield Document(demonstrations, (*query, Step(None, **has)))
            for action, middle in symbol("action", j):
                for more, end in sequence(after, middle):
                    yield from episodes(demonstrations, (*query, Step(action, **has, **more)), end)

    start = template.opening + template.episode
    # two are enough to refute; an ambiguous text can have exponentially many
    return list(itertools.islice(episodes((), (), len(start)), 2)) if whole.startswith(start) else []


def spelled(document: Document) -> Document:
    """Rewards as they stand in the text."""

    def write(steps):
        return tuple(dataclasses.replace(s, reward=s.reward if s.reward is None else repr(s.reward)) for s in steps)

    return Document(tuple(map(write, document.demonstrations)), write(document.query))


def short(characters: str, low: int = 0, high: int = 2):
    return st.text(st.sampled_from(characters), min_size=low, max_size=high)


@st.composite
def template_arguments(draw):
    """Templates over few characters, so that many are ambiguous."""
    characters, high = draw(st.sampled_from(["a", "ab", "a1;", "ab01.e-+;\n"])), draw(st.integers(1, 2))
    some, literal = short(characters, 0, high), short(characters, 1, high)
    fields = [f for f in ("model", "observation", "reward") if draw(st.booleans())]
    names = st.lists(short("ab1 ", 1, 3), min_size=1, max_size=3, unique=True)
    symbols = st.one_of(names, st.tuples(some, some).map("{}".join))
    state = draw(st.booleans())
    texts = st.lists(some, max_size=2)
    step = [
        draw(literal),
        *draw(texts),
        *([f"{draw(some)}{{state}}{draw(some)}"] if state else []),
        draw(some) + "{action}" + draw(some),
    ]
    for field in draw(st.permutations(fields)):
        step += [f"{draw(some)}{{{field}}}{draw(some)}", *draw(texts)]
    given = {"actions": draw(symbols)} | {f"{f}s": draw(symbols) for f in fields if f != "reward"}
    given |= {"states": draw(symbols)} if state else {}
    return {"name": "random", "opening": draw(some), "episode": draw(some), "closing": draw(literal), "step": step} | given


def test_a_random_template_is_refused_or_every_document_has_exactly_one_reading():
    seen = Counter()

    @settings(max_examples=300)
    @given(template_arguments(), st.data())
    def check(arguments, data):
        try:
            template = Template(**arguments)
        except ValueError as e:
            match = re.search(r"ambiguous: ('.*'|\".*\") can be read as \[", str(e))
            seen["ambiguous" if match else "malformed"] += 1
            if match:  # the text that the error shows has two readings
                witness = ast.literal_eval(match[1])
                assert len(set(readings(witness, as_it_stands(arguments)))) == 2
            return
        seen["accepted"] += 1
        size = [2**40 if isinstance(t, str) else len(t or "?") for t in (template.actions, template.states, template.models)]
        size.append(2**40 if isinstance(template.observations, str) else len(template.observations or "?"))
        shown = sorted(template.grammar.fields - {"action"})
        document = data.draw(documents(shown, size, one_kind=False))
        whole = text(render(document, template))
        assert same(parse(whole, template), document)
        assert readings(whole, template) == [spelled(document)]

    check()
    assert min(seen["accepted"], seen["ambiguous"]) > 30  # the property says something about both


def as_it_stands(arguments) -> Template:
    """The arguments as attributes, unchecked."""
    template = object.__new__(Template)
    for name, value in {"states": None, "models": None, "observations": None, **arguments}.items():
        object.__setattr__(template, name, value)
    return template


def build(*step: str, **changes) -> Template:
    """A small template with numbers for symbols, and tables for the fields that it shows."""
    tables = {f"{field}s": "{}" for field in ("state", "model", "observation") if f"{{{field}}}" in "".join(step)}
    return Template(
        **({"name": "small", "episode": "#", "closing": "\n", "actions": ["A", "B"], "step": step} | tables | changes)
    )


@pytest.mark.parametrize(
    "step, changes, witness",
    [
        (["\n", "{action}", "{observation}", "{reward}"], {}, "#\nA10.0"),  # 1 and 0.0, or 10.0
        (["\n", "{action}", " {model}", " {observation}"], {}, "#\nA 0"),  # one number, but of what?
        (["\n", "{action}", " {observation}", "{model}"], {"models": [" 1", "x"]}, "#\nA 1"),
        (["\n", "{action}"], {"closing": "\n", "episode": ""}, "\n"),  # a question, or the next episode
        (["\n", "{action}"], {"actions": ["A", "A\nA"]}, "#\nA\nA"),  # a separator in a symbol
        (["1", "{action}"], {"actions": " {}"}, "#1 11"),  # action 11, or action 1 and a question
        (["\n", "{action}", "{observation}"], {"actions": ["A", "A1"]}, "#\nA1"),  # a prefix, and nothing in between
        (["x", "{action}x"], {"actions": ["x", "xxxx"]}, "#xxxxxx"),  # two steps, or one
    ],
)
def test_a_template_with_two_readings_is_refused_with_a_shortest_text_that_has_them(step, changes, witness):
    with pytest.raises(ValueError, match=f"^template 'small' is ambiguous: {re.escape(repr(witness))} can be read as .* and as "):
        build(*step, **changes)


@pytest.mark.parametrize(
    "step, changes",
    [
        (["\n", "{action}", " {observation}", " {reward}"], {}),  # an index has no point
        (["\n", "{action}", "{reward}", "1"], {}),
        (["\n", "{action}", "{observation}:", "{reward}"], {}),
        (["\n", "{action};"], {"actions": ["A", "AB", "ABC"]}),
        (["\n", "{action}"], {"actions": ["A", "AB", "ABC"]}),
        (["A{action}A"], {}),
    ],
)
def test_close_calls_with_one_reading_are_taken(step, changes):
    template = build(*step, **changes)
    few = [None, 0, 1, 10, 11]
    has_observation, has_reward = ("observation" in template.grammar.fields), ("reward" in template.grammar.fields)
    seen = set()
    for action, o, r in itertools.product(
        range(len(template.actions)), few if has_observation else [None], [None, 0.0, 0.01, 0.1, 1e-300] if has_reward else [None]
    ):
        step = Step(action, observation=o, reward=r)
        for document in (Document((), (step, step)), Document(((step,),), (Step(None),))):
            seen.add(whole := text(render(document, template)))
            assert parse(whole, template) == document and readings(whole, template) == [spelled(document)]
    assert len(seen) > 2


@pytest.mark.parametrize(
    "step",
    [
        ["\n", "{action}", "{state}"],
        ["\n", "{reward}", "{action}"],
        ["\n", "{state}"],
        ["\n", "{action}", "{action}"],
        ["\n", "{state}", "{action}", "{state}"],
        [],
    ],
)
def test_a_step_has_its_fields_once_and_in_the_order_of_time(step):
    with pytest.raises(ValueError, match=r"step must hold \{action\} once"):
        build(*step)


@pytest.mark.parametrize(
    "hostile",
    ["{action.__class__}", "{0}", "{}", "{action!r}", "{action:>9}", "{action", "action}", "{{action}", "{nature}", "{a{b}}"],
)
@pytest.mark.parametrize("argument", ["step", "opening", "episode", "closing", "actions"])
def test_a_brace_is_a_known_field_or_doubled(hostile, argument):
    hostile = hostile.replace("{}", "{ }") if argument == "actions" else hostile
    changes = {} if argument == "step" else {argument: hostile}
    with pytest.raises(ValueError, match=f"^{argument} may hold .* got "):
        build("\n", hostile if argument == "step" else "{action}", "{action}" if argument == "step" else "", **changes)


def test_doubled_braces_are_braces_and_names_are_taken_as_they_are():
    template = build("{{", "{action}}}", "{{{reward}}}", "}}", opening="{{}}", actions=["{0}", "{{"])
    document = Document((), (Step(0, reward=2.0), Step(1)))
    assert text(render(document, template)) == "{}#{{0}}{2.0}}{{{}}"
    assert parse("{}#{{0}}{2.0}}{{{}}", template) == document


@pytest.mark.parametrize(
    "step, changes, complaint",
    [
        (["{state}", "{action}"], {}, "step must have text that stands before {action} without {state}"),
        (["\n", "decide: {action}"], {}, "step must not have a space just before {action}"),
        (["\n", "{state} ", "{action}"], {}, "step must not have a space just before {action}"),
        (["x ", "{state}", "{action}"], {}, "step must not have a space just before {action}"),
        (["\n", "{action}"], {"closing": "", "episode": ""}, "closing and episode must not both be empty"),
        (["\n", "{action}"], {"actions": ["A", "A"]}, "actions must be names that are not empty and differ"),
        (["\n", "{action}"], {"actions": ["A", ""]}, "actions must be names that are not empty and differ"),
        (["\n", "{action}"], {"actions": []}, "actions must be names that are not empty and differ"),
        (["\n", "{action}"], {"actions": "A"}, "actions must be a list of names or a pattern"),
        (["\n", "{action}"], {"actions": None}, "actions must hold text"),
        (["\n", "{action}"], {"actions": [1]}, "actions must hold text"),
        (["\n", "{action}"], {"opening": None}, "opening must hold text"),
        (["\n", "{action}"], {"opening": "\ud800"}, "opening must hold text, and only what UTF-8 can encode"),
        (["\n", "{action}"], {"step": "\n{action}"}, "step must be a list of texts"),
        (["\n", "{action}"], {"states": "{}"}, "states must not be given: step has no {state}"),
        (["\n", "{action}", "{model}"], {"models": None}, "models must be given"),
    ],
)
def test_a_malformed_template_is_refused_by_argument_and_rule(step, changes, complaint):
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}"):
        build(*step, **changes)


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

FIELDS = ("name", "opening", "episode", "step", "closing", "actions", "states", "models", "observations")


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
        ("a.json", '{\n "name": "x",\n "actions": ["A"],\n "step": ["\\n", "{reward}"], "closing": ";"\n}', ":4: step must hold"),
        ("a.json", '{\n "name": "x",\n "steps": ["\\n", "{reward}"]\n}', ":3: steps is no argument of a template"),
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
        ("a.toml", 'name = "x"\nclosing = 3\nstep = ["\\n{action}"]\nactions = ["A", "B"]\n', ":2: closing must hold text, "),
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
