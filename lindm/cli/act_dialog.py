"""`lindm act` on a terminal: shows the next action, and asks for what was done and observed."""

from typing import TYPE_CHECKING

from lindm import validate
from lindm.cli.act import page
from lindm.text.grammar import SYMBOL_ARGUMENTS

if TYPE_CHECKING:
    from lindm.evaluation.history import ProblemInfo
    from lindm.evaluation.policy import Decision, DecisionMaker

SHOWN = 12  # names that a question lists

Rows = list[dict[str, str]]
"""The steps so far; of an MDP the last one has the current state alone."""


def dialog(maker: "DecisionMaker") -> int:
    """Show a decision and ask for one step, again and again, until the horizon or the end of the input. The exit code, 0."""
    info = maker.info
    assert info is not None
    print("After each decision, enter what was done and observed: a name of those in parentheses, or its number from 0.")
    print("Enter alone takes the value in brackets. Ctrl-D ends.")
    decision, rows = None, []
    try:
        if info.kind != "mdp":
            decision = maker.decide()
            print(page(maker, decision), flush=True)
        while decision is None or decision.stage + 1 < info.horizon:
            asked = [{"state": ask(info, "state")}] if decision is None else following(info, rows, decision)
            try:
                decision = maker.decide(asked)
            except ValueError as e:  # what was entered has the probability 0: it is asked for again
                print(e)
                continue
            rows = asked
            print(page(maker, decision), flush=True)
        print("This was the last decision.")
    except EOFError:
        print()
    return 0


def following(info: "ProblemInfo", rows: Rows, decision: "Decision") -> Rows:
    """The steps with one more, which is asked for."""
    action = ask(info, "action", default=str(decision.action))
    if info.kind == "mdp":
        return [*rows[:-1], {**rows[-1], "action": action}, {"state": ask(info, "state")}]
    model = {"model": ask(info, "model")} if info.kind == "apomdp" else {}
    return [*rows, {"action": action, **model, "observation": ask(info, "observation")}]


def ask(info: "ProblemInfo", name: str, default: str = "") -> str:
    """A name or number that the problem has. EOFError at the end of the input."""
    words = info.words(SYMBOL_ARGUMENTS[name])
    listed = ", ".join(words[:SHOWN]) + (f", ... ({len(words)} in all)" if len(words) > SHOWN else "")
    while True:
        word = input(f"{name} [{default}]: " if default else f"{name} ({listed}): ").strip() or default
        try:
            validate.index(word, words, name)
            return word
        except ValueError as e:
            print(e)
