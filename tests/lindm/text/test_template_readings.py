"""Every text has one reading: the automaton against a parser that searches, which shares no code with it."""

import ast
import dataclasses
import itertools
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.text import Document, Step, Template, parse, render, text
from tests.lindm.text.text_cases import build, documents, same

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
    with pytest.raises(ValueError, match=r"step must contain \{action\} once"):
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
        (["\n", "{action}"], {"actions": None}, "actions must contain text"),
        (["\n", "{action}"], {"actions": [1]}, "actions must contain text"),
        (["\n", "{action}"], {"opening": None}, "opening must contain text"),
        (["\n", "{action}"], {"opening": "\ud800"}, "opening must contain text, and only what UTF-8 can encode"),
        (["\n", "{action}"], {"step": "\n{action}"}, "step must be a list of texts"),
        (["\n", "{action}"], {"states": "{}"}, "states must not be given: step has no {state}"),
        (["\n", "{action}", "{model}"], {"models": None}, "models must be given"),
    ],
)
def test_a_malformed_template_is_refused_by_argument_and_rule(step, changes, complaint):
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}"):
        build(*step, **changes)
