"""Templates and documents of the tests of texts."""

from hypothesis import strategies as st

from lindm.text import COMPACT, READABLE, Document, Step, Template

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


def build(*step: str, **changes) -> Template:
    """A small template with numbers for symbols, and tables for the fields that it shows."""
    tables = {f"{field}s": "{}" for field in ("state", "model", "observation") if f"{{{field}}}" in "".join(step)}
    return Template(
        **({"name": "small", "episode": "#", "closing": "\n", "actions": ["A", "B"], "step": step} | tables | changes)
    )
