"""`lindm act`: ask a policy what to do next."""

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lindm.choices import Rewards
from lindm.cli.option_parser import Command, Positional
from lindm.cli.problems import FAMILY_OPTIONS, FamilyOptions, one_problem, problem_or_suite, warnings_as_lines
from lindm.errors import DataError, UsageError, unknown
from lindm.evaluation.policies.registry import POLICIES, help_table, needs_suite
from lindm.io import inputs, limits
from lindm.io.files import strict_json
from lindm.io.tables import format_table

if TYPE_CHECKING:
    from lindm.evaluation.policy import Decision, DecisionMaker


@dataclass(frozen=True, kw_only=True)
class Act(FamilyOptions):
    """Ask a policy for the next action. The answer has the action, the probability of every action, the action values or bounds
    that the policy computes, and the belief over a hidden state. Without --history, each line of standard input is a question
    as JSON, {"history": ...}, and each line of the output is its answer; on a terminal, the command asks for actions and
    observations."""

    policy: Annotated[str, Positional("POLICY")]
    """A policy from the list below, or the file of a saved solution."""
    problem: Annotated[tuple[str, ...], Positional("PROBLEM")] = ()
    """A .pomdp file (several are the models of an ambiguous POMDP), a family, such as prostate, or a directory of `lindm data
    make`. Optional for a solution in a .npz or .json file, and for a language model that `lindm sft` trained."""
    history: str | None = None
    """The episode so far, in the problem's names or numbers. POMDP: "action observation action observation". Ambiguous POMDP:
    "action model observation ...". MDP: "state action state", ending in the current state. Before the first action: ""."""
    demonstrations: Path | None = None
    """Demonstrations: a .csv or .jsonl file with a row for each step and the columns episode, step, action and what is
    observed. [default: those of the task, if PROBLEM is a directory]"""
    task: int = 0
    """Number of the task, if PROBLEM is a directory."""
    horizon: int | None = None
    """Number of stages; required for a .pomdp file, except with a saved policy. [default: that of the family]"""
    discount: float | None = None
    """Discount factor. [default: that of the file or family]"""
    alpha: float | None = None
    """Attitude to ambiguity: 1 is the worst case over the models, 0 the best case."""
    seed: int | None = None
    """Seed of the parameters of a family. [default: 0]"""
    temperature: float | None = None
    """Report probabilities proportional to p(action)^(1/temperature), where p is the model's own probability. [default: 1]"""
    template: str | None = None
    """Text template for a language model, as in `lindm sft`. [default: that of the training]"""
    rewards: Rewards | None = None
    """Rewards in the texts for a language model. [default: as in the training]"""
    json: bool = False
    """Print one JSON object."""


def run(options: Act) -> int:
    interactive = options.history is None and sys.stdin is not None and sys.stdin.isatty()
    if interactive and options.json:
        raise UsageError("--json needs --history, or questions as lines of JSON on the standard input")
    maker = decision_maker(options)
    if options.history is not None:
        decision = maker.decide(options.history)
        print(strict_json(answer(maker, decision)) if options.json else page(maker, decision))
        return 0
    if interactive:
        from lindm.cli.act_dialog import dialog

        return dialog(maker)
    return answer_lines(maker)


# --- the policy --------------------------------------------------------------------------------------------------------------


def decision_maker(options: Act) -> "DecisionMaker":
    """The policy, its task and its demonstrations."""
    from lindm.api.decisions import read_demonstrations
    from lindm.evaluation.policy import DecisionMaker

    check_is_policy(options)
    saved = ":" not in options.policy and Path(options.policy).suffix in (".npz", ".alpha", ".policy", ".json")
    policy, problem, demonstrations, notes = solution(options) if saved else named(options)
    if options.demonstrations is not None:
        about = problem if problem is not None else getattr(policy, "problem", None)
        if about is None:
            raise UsageError("PROBLEM must be given: the names in --demonstrations are those of the problem")
        demonstrations = read_demonstrations(options.demonstrations, about)
    trained = getattr(policy, "training", None)
    if trained is not None and not demonstrations:
        known = f"with {trained.config.demos} demonstrations of each task, and is asked without any"
        notes.append(f"the model was trained {known}: see --demonstrations and PROBLEM")
    for note in notes:
        print(f"lindm: warning: {note}", file=sys.stderr)
    return DecisionMaker(policy, demonstrations, problem, notes)


def check_is_policy(options: Act) -> None:
    """UsageError where the first word is a problem, a directory or a picture."""
    from lindm.families.registry import FAMILIES

    word, path = options.policy, Path(options.policy)
    if path.suffix == ".pomdp" or word in FAMILIES:
        raise UsageError(f"POLICY must be given before PROBLEM, such as oracle or sft:RUN; got {word!r}, which is a problem")
    if path.suffix in (".svg", ".png", ".pdf"):
        raise UsageError(f"POLICY must be a name or a saved policy (.json, .alpha, .policy, .npz); {word} is a picture of one")
    if path.is_dir() and word not in POLICIES:
        known = "a run of `lindm sft` is sft:DIR, a model base:DIR, and a dataset takes the place of PROBLEM, after POLICY"
        raise UsageError(f"POLICY must be a name or a saved policy; {word} is a directory: {known}")


TEXT = ("temperature", "template", "rewards")
OF_PROBLEMS = ("horizon", "discount", "alpha", "seed", *FAMILY_OPTIONS)


def solution(options: Act) -> tuple[Any, Any, Any, list[str]]:
    """The policy, the problem (None: the policy's own), the demonstrations and the notes of a file of a saved solution."""
    from lindm.api.decisions import load_alpha_vectors, load_saved_policy
    from lindm.api.problems import read_stationary_pomdp
    from lindm.api.solutions import load_solution

    path = Path(options.policy)
    without = [name for name in OF_PROBLEMS if name != "discount" or path.suffix == ".npz"]
    refuse(options, ("demonstrations", *without, *TEXT), f"does not apply to the solution {path}")
    if path.suffix == ".npz":
        if options.problem:
            raise UsageError(f"PROBLEM must be left out: {path} has its own; got {options.problem[0]!r}")
        return load_solution(path).policy, None, (), []
    if len(options.problem) > 1 or (path.suffix != ".json" and not options.problem):
        raise UsageError(f"PROBLEM must be one .pomdp file, the problem of {path}; got {len(options.problem)} files")
    problem = None
    if options.problem:
        with warnings_as_lines():
            problem = read_stationary_pomdp(options.problem[0], discount=options.discount)
    if path.suffix == ".json":
        return load_saved_policy(path, problem), None, (), []
    assert problem is not None
    policy = load_alpha_vectors(path, problem)
    return policy, problem, (), [f"{path}: {policy.doubt}"] if policy.doubt else []


def named(options: Act) -> tuple[Any, Any, Any, list[str]]:
    """The policy of a name, the problem (None: the policy's own), the demonstrations of its task, and notes."""
    from lindm.datasets import Dataset, DatasetConfig, is_dataset
    from lindm.llm.named_policies import policy_by_name, text_notes, training_notes

    if ":" not in options.policy:
        refuse(options, TEXT, "is an option of language models")
    source, problem, demonstrations, config = None, None, (), DatasetConfig(tasks=1)
    is_model, about = options.policy.startswith("sft:"), None  # what a model is asked about
    if len(options.problem) == 1 and is_dataset(Path(options.problem[0])):
        source, problem, demonstrations, config = of_dataset(options)
        about = Dataset(Path(options.problem[0]))
    elif options.task:
        raise UsageError(f"--task needs a directory of `lindm data make` as PROBLEM; got {options.task}")
    elif options.problem:
        source = problem = one_problem(options)
        if needs_suite(options.policy) or is_model:
            about = problem_or_suite(options)
        if needs_suite(options.policy):
            source = about
    else:
        refuse(options, OF_PROBLEMS, "needs a PROBLEM")
    text = {name: getattr(options, name) for name in ("template", "rewards")}
    temperature = 1.0 if options.temperature is None else options.temperature
    policy = policy_by_name(options.policy, source, config, temperature=temperature, **text)
    notes = training_notes(options.policy, getattr(policy, "training", None), about) if is_model else []
    notes += text_notes(options.policy, **text) if is_model else []
    return policy, problem, demonstrations, notes


def of_dataset(options: Act) -> tuple[Any, Any, Any, Any]:
    """Source, problem, demonstrations and config of a task of a dataset."""
    from lindm.datasets import Dataset
    from lindm.evaluation.compare import visible_demonstrations
    from lindm.evaluation.environments import double_precision
    from lindm.families.registry import FAMILIES, NamedProblem, build

    refuse(options, OF_PROBLEMS, "does not apply to a dataset, whose problems are made")
    dataset = Dataset(Path(options.problem[0]))
    if not 0 <= options.task < len(dataset):
        rule = f"a number from 0 to {len(dataset) - 1}, a task of {dataset.directory}"
        raise UsageError(f"--task must be {rule}; got {options.task}")
    task = next(itertools.islice(dataset, options.task, None))
    with double_precision():
        problem = NamedProblem(problem=task.problem(), **{part: tuple(words) for part, words in dataset.names.items()})
    source = problem
    if needs_suite(options.policy) and dataset.suite is not None and dataset.suite["name"] in FAMILIES:
        options_of_suite = FAMILIES[name := dataset.suite["name"]].options
        source = build(name, **{option: dataset.suite[option] for option in options_of_suite if option in dataset.suite})
    return source, problem, visible_demonstrations(task), dataset.config


def refuse(options: Act, names: Sequence[str], reason: str) -> None:
    """UsageError for an option that is given and does not apply."""
    for name in names:
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} {reason}; got {getattr(options, name)}")


# --- the answer --------------------------------------------------------------------------------------------------------------

SHOWN_STATES = 8  # of a belief, in a text


def answer(maker: "DecisionMaker", decision: "Decision") -> dict[str, Any]:
    """A decision as a JSON object, with names."""
    assert maker.info is not None
    actions, states = maker.info.words("actions"), maker.info.words("states")
    rows: dict[str, Any] = {"action": decision.action, "stage": decision.stage}
    rows["probabilities"] = by_name(actions, decision.probabilities)
    if decision.Q is not None:
        rows["Q"] = by_name(actions, decision.Q)
    else:
        bounds = {"lower": decision.lower, "upper": decision.upper}
        rows |= {name: by_name(actions, bound) for name, bound in bounds.items() if bound is not None}
    if decision.belief is not None and decision.belief.ndim == 1:
        rows["belief"] = by_name(states, decision.belief)
    elif decision.belief is not None:
        models = maker.info.words("models")
        rows["belief"] = {model: by_name(states, belief) for model, belief in zip(models, decision.belief, strict=True)}
    rows |= {"masked": decision.masked} if decision.masked else {}
    notes = [*maker.notes, *filter(None, [decision.note])]
    rows |= {"notes": notes} if notes else {}
    return rows if decision.invalid is None else rows | {"invalid": decision.invalid}


def by_name(names: Sequence[str], numbers: Any) -> dict[str, float | None]:
    """Numbers by name; None for the value of an action that is not legal."""
    return {name: None if x == -math.inf else float(x) for name, x in zip(names, numbers, strict=True)}


def number(value: float | None) -> str:
    """An action value as text."""
    return "not legal" if value is None else f"{value:.6g}"


def page(maker: "DecisionMaker", decision: "Decision") -> str:
    """A decision as text."""
    found = answer(maker, decision)
    columns = {"Q": "Q", "lower": "at least", "upper": "at most"}
    shown = [name for name in columns if name in found]
    rows = [["action", "probability", *(columns[name] for name in shown)]]
    for action, p in found["probabilities"].items():
        rows.append([action, f"{p:.4f}", *(number(found[name][action]) for name in shown)])
    lines = [f"next action  {decision.action}"]
    belief = found.get("belief", {})
    if decision.belief is not None and decision.belief.ndim == 1:
        lines.append(f"belief       {belief_text(belief)}")
    else:
        lines += [f"belief       {belief_text(one)}, under {model}" for model, one in belief.items()]
    if decision.masked:
        lines.append(f"note         {decision.masked:.2%} of the probability was on actions that are not legal; it was removed")
    if decision.note:
        lines.append(f"note         {decision.note}")
    if decision.invalid:
        lines.append("note         the likeliest text of the model is no action")
    return "\n".join([*lines, format_table(rows)])


def belief_text(belief: dict[str, float]) -> str:
    """The likeliest states with their probabilities."""
    likeliest = sorted(belief, key=lambda state: -belief[state])
    shown = [state for state in likeliest if belief[state] > 0][:SHOWN_STATES]
    rest = sum(belief[state] > 0 for state in likeliest) - len(shown)
    return ", ".join(f"{state} {belief[state]:.4f}" for state in shown) + (f", and {rest} more" if rest else "")


# --- questions on the standard input -----------------------------------------------------------------------------------------


def answer_lines(maker: "DecisionMaker") -> int:
    """Answer each line of the standard input by a line, at once. A line with an error is answered by the error.

    Raises:
      UsageError: there is no line. DataError: at the end, where lines had errors.
    """
    asked = wrong = 0
    for line in lines_of_input():
        asked += 1
        identity: dict[str, Any] = {}
        try:
            if len(line) > limits.QUESTION:
                raise DataError(f"line {asked}: a question must have at most {limits.QUESTION:,} bytes; it has more")
            question = inputs.parse_json(line, f"line {asked}")
            identity = identity_of(question)
            reply = answer(maker, maker.decide(question["history"]))
        except (DataError, ValueError) as e:
            wrong += 1
            reply = {"error": str(e)}
        print(strict_json(identity | reply), flush=True)
    if not asked:
        raise UsageError('--history must be given, or lines such as {"history": ""} on the standard input, which is empty')
    if wrong:
        raise DataError(f"{wrong} of {asked} questions had an error, which is printed in place of the answer")
    return 0


def identity_of(question: Any) -> dict[str, Any]:
    """The id of a question, to stand in its answer. ValueError where the question is none."""
    if not isinstance(question, dict) or "history" not in question:
        raise ValueError(f'a question must be an object such as {{"history": ""}}; got {str(question)[:60]!r}')
    if wrong := [name for name in question if name not in ("history", "id")]:
        raise ValueError(unknown("a field of a question", wrong[0][:60], ("history", "id")))
    identity = question.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int)):
        raise ValueError(f"id must be text or a whole number; got {str(identity)[:60]!r}")
    history = question["history"]
    if not isinstance(history, str | list):
        raise ValueError(f"history must be text or a list of steps; got {str(history)[:60]!r}")
    return {} if identity is None else {"id": identity}


def lines_of_input() -> Iterator[bytes]:
    """The lines of the standard input that are not blank; of one that is too long, its first bytes."""
    stream = sys.stdin.buffer if sys.stdin is not None else None
    while stream is not None and (line := stream.readline(limits.QUESTION + 1)):
        end = line
        while len(end) > limits.QUESTION and not end.endswith(b"\n"):  # the rest of a line that is too long
            end = stream.readline(limits.QUESTION + 1)
        if line.strip():
            yield line


COMMAND = Command(
    name="act",
    options=Act,
    run=run,
    examples=(
        'lindm act qmdp tiger.pomdp --horizon 10 --history "listen hear-left listen hear-left"',
        "lindm act policy.alpha tiger.pomdp",
        "lindm act sft:runs/tiny data/tiger --task 3 < questions.jsonl",
        'lindm act lsvi data/mdp --demonstrations mine.csv --history "2 0 1"',
    ),
    sections={"split": "Options of a family", "horizon": "Problem", "temperature": "Language models", "json": "Output"},
    table=(
        "Policies",
        help_table()
        | {
            "FILE.npz": "A solution that `solution.save` wrote.",
            "FILE.alpha": "Alpha vectors of the POMDP in PROBLEM, as `lindm solve --save` writes them.",
            "FILE.policy": "Alpha vectors of the POMDP in PROBLEM, as SARSOP writes them.",
            "FILE.json": "A policy graph, or an action for each state of an MDP, as `lindm solve --save` writes them.",
        },
    ),
)
