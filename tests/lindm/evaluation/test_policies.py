"""The policies of `lindm eval`: against tables of the solvers, estimates by hand, and cases in which each is optimal."""
# what may be None is there in these tests
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportOperatorIssue=false

import itertools
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import pytest

from lindm.datasets import Dataset, DatasetConfig, make_dataset
from lindm.datasets.generate import TaskGenerator
from lindm.evaluation import compare, policies
from lindm.evaluation.compare import read_tasks
from lindm.evaluation.environments import PolicyTask, make_tasks
from lindm.evaluation.optimality_gap import evaluate_policy
from lindm.evaluation.policies import attention_layer, planning, registry
from lindm.evaluation.policy import FunctionPolicy, Observation, Policy
from lindm.families.random_suites import RandomSuite
from lindm.icl import predictors
from lindm.problems.apomdp import as_apomdp
from lindm.problems.mdp import mdp
from lindm.solvers import dp, tree
from lindm.solvers.belief import branching
from lindm.text import Step
from lindm.types import APOMDP, MDP, RewardFunction

SEEN = RandomSuite(name="seen", horizon=3, states=3, actions=2, concentration=0.5, gap=0.02)
HIDDEN = replace(SEEN, name="hidden", observations=2, quality=0.8)
AMBIGUOUS = replace(HIDDEN, name="ambiguous", models=2, distance=0.3, alpha=0.7)


@dataclass(frozen=True)
class Tasks:
    tasks: list[PolicyTask]
    source: RandomSuite
    dataset: DatasetConfig

    @property
    def problems(self):
        return [task.known.problem for task in self.tasks]


def tasks_of(tmp_path_factory, suite, **changes) -> Tasks:
    dataset = DatasetConfig(**({"tasks": 6, "demos": 3, "behavior": "epsilon", "seed": 3} | changes))
    path = tmp_path_factory.mktemp(suite.name)
    make_dataset(path, suite, dataset)
    return Tasks(read_tasks(Dataset(path)), suite, dataset)


@pytest.fixture(scope="module", params=[SEEN, HIDDEN, AMBIGUOUS], ids=lambda s: s.name)
def tasks(request, tmp_path_factory):
    return tasks_of(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return tasks_of(tmp_path_factory, SEEN)


def losses(tasks, name):
    policy = registry.make_policy(name, tasks.source, tasks.dataset)
    results = evaluate_policy(tasks.tasks, policy, episodes=4)
    assert all(loss is not None for loss in results)
    return [loss for loss in results if loss is not None]


def actions_of(policy, tasks):
    """Actions [tasks, H, S] in an MDP."""
    state, env, n = policy.init(tasks), tasks[0].known, len(tasks)
    states = np.tile(np.arange(env.num_states), n)
    actions = []
    for t in range(env.horizon):
        task = np.repeat(np.arange(n), env.num_states)
        observation = Observation(stage=t, task=task, parent=np.zeros_like(task), state=states)
        state, probabilities = policy.step(state, observation)
        actions.append(probabilities.argmax(-1).reshape(n, -1))
    return np.stack(actions, axis=1)


def tables(tasks, name):
    return actions_of(registry.make_policy(name, tasks.source, tasks.dataset), tasks.tasks)


def number(problem, steps):
    """Of a history within its stage."""
    apomdp = as_apomdp(problem)
    M, O = apomdp.num_models, apomdp.num_observations
    return sum(((s.action * M + (s.model or 0)) * O + s.observation) * branching(apomdp) ** t for t, s in enumerate(steps[:-1]))


def following(problem, table):
    """The policy of a table, as a function of the history."""

    def act(demonstrations, history):
        stage = table[len(history) - 1]
        return stage[history[-1].state] if isinstance(problem, MDP) else stage[number(problem, history)]

    return FunctionPolicy(act)


def random_table(problem, rng, mixed=False):
    A = problem.num_actions
    sizes = [problem.num_states] * problem.horizon
    if not isinstance(problem, MDP):
        sizes = [branching(as_apomdp(problem)) ** t for t in range(problem.horizon)]
    return tuple(rng.dirichlet(np.ones(A), n) if mixed else rng.integers(0, A, n) for n in sizes)


def value(problem, table):
    """V of a table by the solvers' own recursion."""
    if isinstance(problem, MDP):
        return float(problem.rho @ dp.policy_value(problem, jnp.array(table))[0])
    return float(tree.policy_value(as_apomdp(problem), tuple(map(jnp.asarray, table))))


# --- tables ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_of_a_table_equals_the_recursion_of_the_solvers(tasks, mixed):
    rng = np.random.default_rng(1)  # none of its tables is optimal
    for task in tasks.tasks[:3]:
        problem = task.known.problem
        table = random_table(problem, rng, mixed)
        (loss,) = evaluate_policy([task], following(problem, table), max_histories=10_000)
        assert loss is not None and loss.exact and 0 < loss.agreement < 1
        assert loss.suboptimality == pytest.approx(loss.optimal_value - value(problem, table), abs=1e-12)


@pytest.mark.parametrize("mixed", [False, True])
def test_merged_histories_of_an_mdp_give_the_same_losses(seen, mixed):
    rng = np.random.default_rng(1)
    for task in seen.tasks[:3]:
        policy = following(task.known.problem, random_table(task.known.problem, rng, mixed))
        (apart,) = evaluate_policy([task], policy, max_histories=10_000)
        policy.markov = True
        (merged,) = evaluate_policy([task], policy, max_histories=0)
        assert apart is not None and merged is not None and merged.exact and merged.decisions < apart.decisions
        assert merged.suboptimality == pytest.approx(apart.suboptimality, abs=1e-12)
        assert merged.agreement == pytest.approx(apart.agreement, abs=1e-12)


def test_a_mixture_is_the_mean_of_the_tables_that_are_drawn_from_it(tasks):
    task, rng = tasks.tasks[0], np.random.default_rng(1)
    problem = task.known.problem
    if isinstance(problem, APOMDP):
        pytest.skip("nature answers a mixture, not its draws")
    mixture = random_table(problem, rng, mixed=True)

    def evaluate(table):
        (loss,) = evaluate_policy([task], following(problem, table), max_histories=10_000)
        assert loss is not None
        return loss

    def drawn(probabilities):
        return (rng.random(probabilities.shape[:-1])[..., None] > probabilities.cumsum(-1)[..., :-1]).sum(-1)

    results = [evaluate(tuple(map(drawn, mixture))) for _ in range(400)]
    exact = evaluate(mixture)
    gaps = np.array([loss.suboptimality for loss in results])
    assert abs(gaps.mean() - exact.suboptimality) < 5 * gaps.std(ddof=1) / 20 and exact.suboptimality > 0
    if isinstance(problem, MDP):  # over histories of one table the mean over draws weighs them as the mixture reaches them
        shares = np.array([loss.agreement for loss in results])
        assert abs(shares.mean() - exact.agreement) < 5 * shares.std(ddof=1) / 20


def test_the_oracle_loses_nothing_the_random_policy_everything_and_the_behavior_policy_its_share(tasks):
    oracle, behavior, random = (losses(tasks, name) for name in ("oracle", "behavior", "random"))
    for best, some, worst in zip(oracle, behavior, random, strict=True):
        assert abs(best.suboptimality) < 1e-12 and best.agreement == pytest.approx(1)
        assert worst.normalized_gap == pytest.approx(1) and 0 < some.normalized_gap < 0.6
        assert some.agreement >= 1 - 0.2 / 2 - 1e-9  # of two actions, epsilon / 2 is the other one
    assert all(0.5 - 1e-9 <= one.agreement < 0.7 for one in random), "of two actions one is the best, or both are"


def test_the_value_of_the_random_policy_in_an_apomdp_equals_the_recursion(brute):
    small = brute.random(2, S=2, A=2, O=2, M=2, H=3, alpha=0.6)
    problem = small.problem()
    V = small.V(list(small.rho), 0, (), lambda t, h: np.full(small.A, 1 / small.A))
    (loss,) = evaluate_policy(make_tasks([problem], [()]), policies.random())
    assert loss is not None and loss.normalized_gap == pytest.approx(1)
    assert loss.optimal_value - loss.suboptimality == pytest.approx(V, rel=1e-12) == pytest.approx(loss.uniform_value, rel=1e-12)


# --- the state is seen -----------------------------------------------------------------------------------------------------


def test_bc_repeats_what_was_done_most_often_in_a_state(seen):
    for table, task in zip(tables(seen, "bc"), seen.tasks, strict=True):
        steps = [step for episode in task.demonstrations for step in episode]
        for s in range(3):
            counts = np.bincount([x.action for x in steps if x.state == s] or [x.action for x in steps], minlength=2)
            assert table.shape == (3, 3) and (table[:, s] == counts.argmax()).all()


def test_bc_takes_the_most_frequent_action_of_all_steps_in_a_state_that_no_demonstration_visits():
    problem = mdp(np.full((1, 3, 2, 3), 1 / 3), np.zeros((2, 3, 2)), np.full(3, 1 / 3))
    demonstrations = [[Step(0, state=0, reward=0.0), Step(1, state=1, reward=0.0)], [Step(1, state=1, reward=0.0)] * 2]
    acts = [policies.bc().act(demonstrations, [Step(None, state=s)], problem).probabilities.argmax() for s in range(3)]
    assert acts == [0, 1, 1]


def test_the_estimated_model_is_that_of_the_counts():
    demos = (
        (Step(0, state=0, reward=1.0), Step(1, state=1, reward=0.0)),
        (Step(0, state=0, reward=0.5), Step(1, state=0, reward=0.3)),
        (Step(0, state=0, reward=0.6), Step(0, state=1, reward=0.0)),
    )
    problem = mdp(np.full((1, 2, 2, 2), 0.5), np.zeros((2, 2, 2)), np.array([0.5, 0.5]))
    (task,) = make_tasks([problem], [demos])
    estimate = planning.estimate(task)
    (table,) = actions_of(policies.certainty_equivalence(), [task])
    # the average reward, 0.4, counts once everywhere: (0,0) was 1, .5 and .6, (0,1) was .3, (1,0) and (1,1) were 0
    r = np.array([[2.5 / 4, 0.7 / 2], [0.4 / 2, 0.4 / 2]])
    # (0,0) led to 1, 0 and 1; the others end an episode: everywhere alike
    P = np.full((2, 2, 2), 0.5)
    P[0, 0] = [1.5 / 4, 2.5 / 4]
    np.testing.assert_allclose(estimate.r, np.stack([r, r]), rtol=1e-12)
    np.testing.assert_allclose(estimate.P, P[None], rtol=1e-12)
    assert table.tolist() == [(r + P @ r.max(-1)).argmax(-1).tolist(), r.argmax(-1).tolist()]


def test_lsvi_uses_the_last_step_of_an_episode_at_the_last_stage_alone():
    problem = mdp(np.ones((1, 1, 2, 1)), np.zeros((2, 1, 2)), np.ones(1))
    demos = ((Step(0, state=0, reward=0.0), Step(1, state=0, reward=1.0)),)
    (table,) = actions_of(policies.lsvi(), make_tasks([problem], [demos]))
    # Q of the last stage is (0, 1/2); at the first stage nothing is known of action 1, and action 0 leads to a value of 1/2
    assert table.tolist() == [[0], [1]]


def test_lsvi_and_pevi_of_many_tasks_are_the_regressions_of_each_task_alone():
    """With features that an orthogonal matrix turns: the values are the same, the matrices of the regressions not diagonal."""
    rng, (H, S, A) = np.random.default_rng(0), (3, 4, 2)
    turn = np.linalg.qr(rng.normal(size=(S * A, S * A)))[0]
    phi = turn.reshape(S, A, S * A)
    problems, demonstrations = [], []
    for i, discount in enumerate((1.0, 0.7, 0.7)):
        R = rng.uniform(-2, 3, (1, S, A, 1, 1))
        r = discount ** np.arange(H)[:, None, None] * R[..., 0, 0]
        paid = RewardFunction(R=jnp.asarray(R), discount=jnp.asarray(discount))
        problems.append(replace(mdp(np.full((1, S, A, S), 1 / S), r, np.full(S, 1 / S)), paid=paid))
        drawn = rng.integers(0, [S, A], (4 + 6 * i, H, 2)).tolist()
        demonstrations.append([[Step(a, state=s, reward=R[0, s, a, 0, 0].item()) for s, a in steps] for steps in drawn])
    tasks = make_tasks(problems, demonstrations)
    states = {name: getattr(policies, name)().init(tasks) for name in ("lsvi", "pevi")}
    for i, (discount, episodes) in enumerate(zip((1.0, 0.7, 0.7), demonstrations, strict=True)):
        rows = [(step, after) for steps in episodes for step, after in itertools.zip_longest(steps, steps[1:])]
        x = np.array([[phi[step.state, step.action] for step, _ in rows]] * H)
        x[:-1, [after is None for _, after in rows]] = 0
        rewards = np.array([step.reward for step, _ in rows])
        scaled = (rewards - rewards.min()) / (rewards.max() - rewards.min()) * discount ** np.arange(H)[:, None]
        after = np.array([[phi[0 if after is None else after.state] for _, after in rows]] * H)
        given = [jnp.asarray(array) for array in (phi, x, scaled, after)]
        for name, Q in (("lsvi", predictors.lsvi(*given, lam=1.0)[0]), ("pevi", predictors.pevi(*given, lam=1.0, beta=1.0))):
            np.testing.assert_allclose(states[name][0][i], Q, rtol=1e-12, atol=1e-12)
    assert 0 < (states["pevi"][0] == 0).mean() < 1  # some values are clipped


@pytest.mark.parametrize("name", ["certainty-equivalence", "lsvi", "pevi"])
def test_with_enough_demonstrations_of_everything_planning_finds_the_optimum(tmp_path_factory, name):
    many = tasks_of(tmp_path_factory, replace(SEEN, gap=0.05), tasks=4, demos=300, behavior="uniform")
    assert np.mean([loss.normalized_gap for loss in losses(many, name)]) < 0.02


def test_a_history_shows_the_rewards_that_were_paid():
    """0 on staying and 7 on moving, by the next state; half of either, discounted, is the mean."""
    R = jnp.asarray([[[0.0, 7.0]], [[7.0, 0.0]]])[None, ..., None]
    paid = RewardFunction(R=R, discount=jnp.asarray(0.5))
    r = 3.5 * 0.5 ** np.arange(3)[:, None, None] * np.ones((3, 2, 1))
    problem = replace(mdp(np.full((1, 2, 1, 2), 0.5), r, np.array([1.0, 0])), paid=paid)
    histories = []
    evaluate_policy(make_tasks([problem], [()]), FunctionPolicy(lambda demos, history: histories.append(history) or 0))
    whole = [history for history in histories if len(history) == 3]
    assert len(whole) == 4 and {step.reward for history in whole for step in history[:-1]} == {0.0, 7.0}
    for history in whole:
        assert all(x.reward == (7.0 if x.state != y.state else 0.0) for x, y in itertools.pairwise(history))


@pytest.mark.parametrize("policy", [policies.certainty_equivalence(), policies.lsvi()])
def test_policies_that_see_undiscounted_rewards_discount_them(policy):
    """Action 0 pays 1 at once; action 1 leads to 3 two steps later, worth 3/4 at a discount of 1/2. Nothing else pays."""
    P, R = np.zeros((1, 4, 2, 4)), np.zeros((1, 4, 2, 1, 1))
    P[0, 0, 0, 3] = P[0, 0, 1, 1] = P[0, 1, :, 2] = P[0, 2, :, 3] = P[0, 3, :, 3] = 1
    R[0, 0, 0], R[0, 2] = 1, 3
    states = ((0, 3, 3), (0, 1, 2))
    for discount, best in ((0.5, 0), (1.0, 1)):
        r = discount ** np.arange(3)[:, None, None] * R[..., 0, 0]
        paid = RewardFunction(R=jnp.asarray(R), discount=jnp.asarray(discount))
        problem = replace(mdp(P, r, np.eye(4)[0]), paid=paid)
        demos = []  # every action in every state, often: penalties and priors hardly matter
        for first, later in np.ndindex(2, 2):
            steps = zip(states[first], (first, later, later), strict=True)
            demos += [[Step(a, state=s, reward=R[0, s, a, 0, 0]) for s, a in steps]] * 50
        (table,) = actions_of(policy, make_tasks([problem], [demos]))
        assert table[0, 0] == best


def test_the_layer_has_the_weights_of_least_squares_over_other_tasks(seen, monkeypatch):
    monkeypatch.setattr(attention_layer, "TASKS", 64)
    actions = tables(seen, "layer")
    generator = TaskGenerator(SEEN, DatasetConfig(tasks=64, demos=3, behavior="epsilon", seed=attention_layer.SEED))
    problems, _, episodes, _ = generator.generate(0, 64)
    assert isinstance(problems, MDP)

    def statistic(s, a, r, h):
        S = np.zeros(6)
        for k in range(3):
            S[s[k][h] * 2 + a[k][h]] += sum(r[k][h:]) / 3
        return S

    for h in range(3):
        X, W = [], []
        for i in range(64):
            X.append(statistic(episodes.s[i], episodes.a[i], episodes.r[i], h))
            V = np.zeros(3)
            for t in reversed(range(h, 3)):
                P = problems.P[i][t if problems.P.shape[1] > 1 else 0]
                Q = problems.r[i][t] + P @ V
                V = Q.max(-1)
            W.append(Q.reshape(-1))
        A = np.linalg.lstsq(np.array(X), np.array(W), rcond=1e-10)[0].T
        for table, task in zip(actions, seen.tasks, strict=True):
            shown = (
                [[getattr(step, k) for step in steps] for steps in task.demonstrations] for k in ("state", "action", "reward")
            )
            Q = (A @ statistic(*shown, h)).reshape(3, 2)
            clear = np.abs(Q[:, 0] - Q[:, 1]) > 1e-9
            assert (table[h] == Q.argmax(-1))[clear].all() and clear.any()


def test_the_layer_is_not_evaluated_on_the_tasks_of_its_training():
    policies.layer(SEEN, compare.TASKS)
    with pytest.raises(ValueError, match="seed must not be"):
        policies.layer(SEEN, DatasetConfig(tasks=4, seed=attention_layer.SEED))


# --- names ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite, name", [(SEEN, "qmdp"), (HIDDEN, "lsvi"), (AMBIGUOUS, "layer")])
def test_a_policy_that_does_not_apply_to_the_tasks_raises_an_error(suite, name):
    with pytest.raises(ValueError, match=f"policy must be one of oracle, random, behavior, bc, .* for an? .*MDP; got '{name}'"):
        registry.make_policy(name, suite, DatasetConfig(tasks=1))


@pytest.mark.parametrize("suite", [SEEN, HIDDEN, AMBIGUOUS], ids=lambda s: s.name)
def test_every_policy_of_the_table_is_made_and_the_default_ones_are_cheap(suite):
    kind = registry.kind_of(suite)
    names = [name for name, info in registry.POLICIES.items() if kind in info.kinds]
    for name in names:
        assert isinstance(registry.make_policy(name, suite, DatasetConfig(tasks=1)), Policy)
        assert registry.POLICIES[name].summary.endswith(".")
    default = policies.default_policies(suite)
    assert set(default) <= set(names) and {"oracle", "random", "bc"} <= set(default) and "layer" not in default


def test_a_policy_that_needs_the_problem_raises_an_error_without_it():
    for policy in (policies.oracle(), policies.bc(), policies.qmdp(), policies.lsvi()):
        with pytest.raises(ValueError, match="problem must be given"):
            policy.act((), [Step(None, state=0)])
    with pytest.raises(ValueError, match="problem must be given"):
        policies.oracle().act((), [Step(1, state=0)])
    with pytest.raises(ValueError, match="history must be steps with actions and, at the end, an open one"):
        FunctionPolicy(lambda demonstrations, history: [1.0]).act((), [Step(1, state=0)])
