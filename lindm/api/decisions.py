"""What `Policy.act` takes beside a problem and a history: demonstrations of the user's own, and saved policies."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lindm.datasets import read_episodes
from lindm.errors import DataError
from lindm.evaluation.history import WORDS, IllegalActionError, legal_demonstration, problem_info
from lindm.evaluation.policies.alpha_vectors import AlphaVectors
from lindm.evaluation.policies.saved import GraphPolicy, StateActions, read_policy
from lindm.evaluation.policy import Episodes
from lindm.problems.identity import differences, problem_digests
from lindm.problems.stationary import StationaryPOMDP
from lindm.text import Step
from lindm.text.grammar import SYMBOL_ARGUMENTS


def read_demonstrations(path: str | Path, problem: Any) -> Episodes:
    """Read demonstrations for `act` from a .csv or .jsonl file of episodes.

    A row is a step with the columns `episode`, `step` and `action`, and those that a policy may see: `state` for an MDP,
    otherwise `observation` and `model`, and optionally `reward`. Other columns are not used. Names and numbers are those of
    the problem.

    Args:
      problem: as in `act`, or a dataset, which determines names and sizes.

    Raises:
      DataError: the file cannot be read, or a row is wrong or has an illegal action; names the file and the line.

    >>> from pathlib import Path
    >>> tiger = ld.read_pomdp("tiger.pomdp", horizon=2)
    >>> rows = ["episode,step,action,observation", "a,0,listen,hear-left", "a,1,open-right,hear-left"]
    >>> written = Path("episodes.csv").write_text("\\n".join(rows))
    >>> ld.policies.bc().act(ld.read_demonstrations("episodes.csv", tiger), "listen hear-left", tiger).action
    'open-right'
    """
    info = problem_info(problem)
    observed = [name for name in WORDS[info.kind] if name != "action"]
    names = {SYMBOL_ARGUMENTS[name]: info.words(SYMBOL_ARGUMENTS[name]) for name in WORDS[info.kind]}
    read = read_episodes(path, names, required=observed)
    demonstrations = []
    for steps, lines in zip(read.episodes, read.lines, strict=True):
        taken = [step for step in steps if step.action is not None]  # the last row may have a state alone
        if len(taken) > info.horizon:
            rule = f"an episode must have at most {info.horizon} steps, the horizon"
            raise DataError(f"{path}:{lines[0]}: {rule}; got {len(taken)}")
        seen = ({name: getattr(step, name) for name in ("action", *observed, "reward")} for step in taken)
        try:
            demonstrations.append(legal_demonstration([Step(**fields) for fields in seen], info))
        except IllegalActionError as e:
            raise DataError(f"{path}:{lines[e.step]}: {e.reason}") from e
    return demonstrations


def load_alpha_vectors(path: str | Path, problem: StationaryPOMDP) -> AlphaVectors:
    """Load the policy of alpha vectors from a file of `StationarySolution.save`, pomdp-solve (.alpha) or SARSOP (.policy).

    Such a file does not name its problem. The bounds of its decisions are computed in the given problem, not read from the
    vectors. `.doubt` says if the vectors seem to belong to another problem.

    Args:
      problem: of which the vectors are.

    Raises:
      ValueError: the problem is an MDP.
      DataError: the file cannot be read, or holds no alpha vectors of a problem of these sizes; names the file and the line.

    >>> tiger = ld.read_stationary_pomdp("tiger.pomdp")
    >>> ld.solve_stationary(tiger).save("tiger.alpha")
    >>> ld.load_alpha_vectors("tiger.alpha", tiger).act((), "listen hear-left listen hear-left").action
    'open-right'
    """
    return AlphaVectors.read(Path(path), problem)


def load_saved_policy(path: str | Path, problem: StationaryPOMDP | None = None) -> GraphPolicy | StateActions:
    """Load the policy in a .json file of `solve_stationary(...).save`: the graph of a POMDP, or an action for each state of an
    MDP.

    Args:
      problem: the problem of the policy. With it, decisions have a belief (with a graph, also lower bounds), a graph continues
        after any action, and impossible observations are refused.

    Raises:
      ValueError: the policy was made for another problem: names, or numbers, differ.
      DataError: the file cannot be read, is damaged, or holds no policy.

    >>> tiger = ld.read_stationary_pomdp("tiger.pomdp")
    >>> ld.solve_stationary(tiger).save("tiger.json")
    >>> ld.load_saved_policy("tiger.json").act((), "listen hear-left listen hear-left").action
    'open-right'
    """
    policy = read_policy(Path(path))
    if problem is not None:
        given, own = problem_info(problem), policy.problem
        for part in own.sizes:
            if (given.words(part) if part in given.sizes else None) != (wanted := own.words(part)):
                raise ValueError(f"problem must have the {part} of {path}: {', '.join(wanted[:8])}{', ...' * (len(wanted) > 8)}")
        digests = problem_digests(problem)
        unused = {"start"} if isinstance(policy, StateActions) else set()  # an action for each state serves every start
        if policy.digests and (changed := [part for part in differences(policy.digests, digests) if part not in unused]):
            raise ValueError(f"problem must be the one for which {path} was made; these parts differ: {', '.join(changed)}")
        policy.problem = replace(own, problem=problem)
    return policy
