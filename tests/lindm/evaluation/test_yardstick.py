"""The parts of a policy's loss by a yardstick, and the limit of all readers of a context."""
# what may be None is there in these tests
# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportArgumentType=false

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from lindm.cli.eval import _yardstick_notes
from lindm.cli.main import main
from lindm.datasets import Dataset, DatasetConfig
from lindm.evaluation.compare import evaluate, read_tasks
from lindm.evaluation.policies.bayes_adaptive import bayes_adaptive_values
from lindm.evaluation.policies.bayes_policies import Bayes
from lindm.evaluation.yardstick import context_limit
from lindm.families.random_suites import RandomSuite

SEEN = RandomSuite(name="mdp", horizon=2, states=2, actions=2, concentration=0.5, step=0.25)
UNIFORM = DatasetConfig(tasks=120, demos=1, behavior="uniform", seed=1_000_000)
POLICIES = ("bc", "oracle", "bayes", "random", "thompson")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    data = tmp_path_factory.mktemp("tasks") / "data"
    return {result.policy: result for result in evaluate(SEEN, POLICIES, dataset=UNIFORM, data=data)}, read_tasks(Dataset(data))


def test_the_gap_is_the_sum_of_the_yardsticks_own_and_of_what_the_reader_lost(found):
    results, _ = found
    own = np.array([gap for gap in results["bayes"].gaps if gap is not None])
    for name in ("bc", "random", "thompson"):
        split, gaps = results[name].loss_split, np.array([gap for gap in results[name].gaps if gap is not None])
        lost = gaps - own
        half = 1.96 * lost.std(ddof=1) / np.sqrt(len(lost))
        assert (split.yardstick, split.n) == ("bayes", len(lost))
        assert [split.gap, split.not_in_context, split.lost_by_reader] == pytest.approx([gaps.mean(), own.mean(), lost.mean()])
        assert split.lost_by_reader_ci == pytest.approx([lost.mean() - half, lost.mean() + half], abs=0.03 * half)
    # the oracle knows more than a context tells, and the yardstick is not split by itself
    assert results["oracle"].loss_split is None and results["bayes"].loss_split is None


def test_without_a_yardstick_nothing_is_split():
    bc, thompson = evaluate(SEEN, ["bc", "thompson"], dataset=replace(UNIFORM, tasks=2))
    assert bc.loss_split is None and thompson.loss_split is None and thompson.context_limit is None


def test_policies_that_know_the_model_of_a_hidden_state_are_not_split():
    hidden = replace(SEEN, name="pomdp", observations=2, quality=0.8)
    names = ["qmdp", "certainty-equivalence", "bc", "bayes"]
    results = evaluate(hidden, names, dataset=replace(UNIFORM, tasks=3))
    assert [result.policy for result in results if result.loss_split is not None] == ["bc"]
    assert results[-1].context_limit.note == "it has a closed form for random MDPs alone"


@pytest.mark.parametrize("ci, said", [([-0.2, -0.1], ""), ([-0.3, 0.1], " (the interval contains 0)"), (None, "")])
def test_a_line_says_that_a_policy_lost_less_than_the_yardstick(found, ci, said):
    bc = found[0]["bc"]
    better = replace(bc, loss_split=replace(bc.loss_split, lost_by_reader=-0.1, lost_by_reader_ci=ci))
    assert _yardstick_notes([bc, better]) == [f"bc: lost less than bayes{said}; a yardstick is an estimate, not a bound"]


def counted(task):
    """Dirichlet parameters and rewards of a task, step by step."""
    parameters, rewards = np.full((2, 2, 2), 0.5), np.full((2, 2), np.nan)
    for steps in task.demonstrations:
        for t, step in enumerate(steps):
            rewards[step.state, step.action] = step.reward
            if t + 1 < len(steps):
                parameters[step.state, step.action, steps[t + 1].state] += 1
    return parameters, rewards


def test_the_limit_is_the_mean_of_the_bayes_adaptive_values_of_the_contexts(found):
    results, tasks = found
    limit, bayes = results["bayes"].context_limit, results["bayes"]
    values, start = np.arange(5) / 4, np.full(2, 0.5)
    most, planned = np.array([bayes_adaptive_values(*counted(task), values, start, 2) for task in tasks]).T
    assert limit.note is None and limit.suboptimality == pytest.approx(bayes.suboptimality - (most - planned).mean())
    assert limit.value == pytest.approx(bayes.value + (most - planned).mean()) and (most > planned + 1e-3).any()
    assert limit.value_ci[0] < limit.value < limit.value_ci[1]
    assert limit.gap == pytest.approx(limit.suboptimality / (bayes.optimal_lower - bayes.uniform_value))
    # what planning earns in a task has the mean over tasks that the posterior promises
    optimal, random = np.array([(task.known.optimal_value, task.known.uniform_value) for task in tasks]).T
    earned = optimal - (optimal - random) * [gap or 0.0 for gap in bayes.gaps]
    assert limit.value - most.mean() == pytest.approx((earned - planned).mean(), abs=1e-9)
    assert abs((earned - planned).mean()) < 5 * (earned - planned).std() / np.sqrt(len(tasks))
    for name in POLICIES[2:]:
        assert results[name].suboptimality > limit.suboptimality


@pytest.mark.parametrize(
    "suite, changes, why",
    [
        (SEEN, {"behavior": "epsilon"}, "the demonstrators' actions tell of the task"),
        (replace(SEEN, gap=0.05), {}, "an action gap of at least 0.05 alone; with --gap 0"),
        (replace(SEEN, step=0.0), {}, "rewards are on no grid"),
        (replace(SEEN, horizon=5), {}, "all tasks may have 38,400,000 histories, and it enumerates 33,554,432 at most"),
        (replace(SEEN, horizon=6), {}, "a task may have 6,400,000 histories, and it enumerates 2,097,152 at most"),
        (replace(SEEN, observations=2), {}, "for random MDPs alone"),
    ],
)
def test_where_there_is_no_limit_the_reason_is_told(suite, changes, why):
    limit = context_limit(suite, suite, replace(UNIFORM, **changes), [None] * 120)
    assert limit.value is None and limit.gap is None
    assert re.search(why, limit.note)


def test_a_yardstick_of_another_suite_than_that_of_the_tasks_has_no_limit():
    """Such a limit would be that of tasks that nobody evaluates."""
    other = replace(SEEN, concentration=5.0)
    tasks = replace(UNIFORM, tasks=2)
    (result,) = evaluate(SEEN, {"b": Bayes(other)}, dataset=tasks)
    assert result.context_limit.value is None and "not drawn from the suite of the policy" in (result.context_limit.note or "")
    (result,) = evaluate(SEEN, {"b": Bayes(replace(SEEN))}, dataset=tasks)
    assert result.context_limit.note is None


def test_the_command_prints_the_parts_and_the_limit(tmp_path, capsys):
    arguments = ["eval", "mdp", "--horizon", "2", "--states", "2", "--actions", "2", "--gap", "0", "--demos", "1"]
    arguments += ["--tasks", "8", "--policy", "lsvi", "--policy", "bayes", "--policy", "thompson"]
    assert main([*arguments, "--behavior", "uniform", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(out) if line.startswith("parts of the gap, by bayes"))
    rows = {row["policy"]: row for row in json.loads((tmp_path / "out" / "eval.json").read_text())["rows"]}
    for line, name in zip(out[at + 1 :], ("lsvi", "thompson"), strict=False):
        split = rows[name]["loss_split"]
        numbers = [f"{split[key]:.4f}" for key in ("gap", "not_in_context", "lost_by_reader")]
        assert line.split()[:4] == [name, *numbers]
    limit = rows["bayes"]["context_limit"]
    assert f"(the Bayes-adaptive value): {limit['value']:.6g} [" in "\n".join(out)
    assert out[-1].startswith(f"the mean of V* - V^pi is at least {limit['suboptimality']:.4g} [")
    assert main(arguments) == 0
    assert "not computed; the demonstrators' actions tell of the task, too; with --behavior uniform" in capsys.readouterr().out
