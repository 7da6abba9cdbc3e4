"""One decision: histories in the names of the problem, what a policy answers there, and what is refused."""
# what may be None, and what only one kind of solution has, is there in these tests
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import itertools
from dataclasses import replace

import numpy as np
import pytest

import lindm as ld
from lindm.evaluation.history import check_history, problem_info, read_history
from lindm.evaluation.policies.alpha_vectors import AlphaVectors
from lindm.evaluation.policy import DecisionMaker
from lindm.families.registry import NamedProblem
from lindm.text import Step

ACTIONS, OBSERVATIONS, MODELS = ("wait", "look"), ("dark", "light"), ("calm", "wild")
TIGER = "tests/lindm/problems/files/tiger.pomdp"


def named(reference):
    return NamedProblem(problem=reference.problem(), actions=ACTIONS, observations=OBSERVATIONS, models=MODELS)


def text_of(history):
    return " ".join(f"{ACTIONS[a]} {MODELS[m]} {OBSERVATIONS[o]}" for a, m, o in history)


@pytest.mark.parametrize("name", ["oracle", "solution"])
def test_beliefs_and_action_values_are_those_of_the_recursion_at_every_history(brute, name):
    reference = brute.random(7, S=3, A=2, O=2, M=2, H=3, alpha=0.6)
    problem = named(reference)
    policy = ld.policies.oracle() if name == "oracle" else ld.solve(problem).policy
    maker = DecisionMaker(policy, (), problem if name == "oracle" else None)
    for t in range(3):
        for history, beliefs in itertools.islice(reference.histories(t), 0, None, 5):
            decision = maker.decide(text_of(history))
            Q = reference.Q(beliefs, t, history)
            np.testing.assert_allclose(decision.Q, Q, rtol=1e-12, atol=1e-12)
            assert decision.action == ACTIONS[int(Q.argmax())] and decision.stage == t
            assert decision.probabilities.tolist() == np.eye(2)[Q.argmax()].tolist()
            wanted = np.array(beliefs) if t == 0 else beliefs[0]
            np.testing.assert_allclose(decision.belief, wanted, rtol=1e-12)


def test_bounds_of_a_solution_contain_the_action_values(brute):
    reference = brute.random(3, S=3, A=2, O=2, M=1, H=4)
    maker = DecisionMaker(ld.solve(reference.problem(), "hsvi", effort=4).policy)
    apart, without_values = 0.0, 0
    for t in range(3):
        for history, beliefs in itertools.islice(reference.histories(t), 0, None, 3):
            decision = maker.decide([Step(a, model=m, observation=o) for a, m, o in history])
            Q = reference.Q(beliefs, t, history)
            assert (decision.lower <= Q + 1e-9).all() and (decision.upper + 1e-9 >= Q).all()
            apart = max(apart, float((decision.upper - decision.lower).max()))
            without_values += decision.Q is None
    assert apart > 1e-3 and without_values


def random_mdp(seed=0, S=3, A=2, H=3):
    rng = np.random.default_rng(seed)
    P, r, rho = rng.dirichlet(np.ones(S), (H, S, A)), rng.uniform(size=(H, S, A)), rng.dirichlet(np.ones(S))
    return ld.mdp(P, r, rho), (P, r, rho)


def test_the_values_of_an_mdp_are_those_of_the_current_state_and_rewards_are_those_of_the_problem():
    problem, (P, r, _) = random_mdp()
    Q = r[2]
    for t in (1, 0):
        Q = r[t] + P[t] @ Q.max(-1)
    for s in range(3):
        decision = ld.policies.oracle().act((), str(s), problem)
        np.testing.assert_allclose(decision.Q, Q[s], rtol=1e-12)
        assert decision.action == int(Q[s].argmax()) and decision.belief is None
    seen = []

    def function(demonstrations, history):
        seen.append(history)
        return 0

    maker = DecisionMaker(function, (), problem)
    maker.decide("2 1 0")
    maker.decide([{"state": 2, "action": 1, "reward": 0.5}, {"state": 0}])
    assert seen[1] == (Step(1, state=2, reward=float(r[0, 2, 1])), Step(None, state=0))
    assert seen[3] == (Step(1, state=2, reward=0.5), Step(None, state=0))


def test_a_policy_of_demonstrations_shows_its_own_values():
    problem, _ = random_mdp()
    demonstrations = [(Step(0, state=0, reward=0.0), Step(1, state=0, reward=1.0), Step(1, state=0, reward=1.0))]
    decision = ld.policies.lsvi().act(demonstrations, "0", problem)
    assert decision.action == 1 and decision.Q[1] > decision.Q[0]
    assert ld.policies.bc().act(demonstrations, "0", problem).Q is None


def test_alpha_vectors_are_followed_by_their_largest_product(tmp_path):
    problem = ld.read_stationary_pomdp(TIGER)
    solution = ld.solve_stationary(problem, tolerance=1e-6)
    solution.save(tmp_path / "tiger.alpha")
    policy = AlphaVectors.read(tmp_path / "tiger.alpha", problem)
    belief, steps = np.array([0.5, 0.5]), []
    for heard in (0, 0, 1, 1, 1):
        decision = policy.act((), steps)
        np.testing.assert_allclose(decision.belief, belief, rtol=1e-12)
        best = int((solution.vectors @ belief).argmax())
        assert problem.actions.index(decision.action) == solution.actions[best] == solution.act(belief)
        for a in range(3):
            wanted = belief @ problem.r[:, a]
            for o in range(2):  # of the tiger: only listening keeps the state, and tells of it
                heard_o = np.array([0.85, 0.15]) if o == 0 else np.array([0.15, 0.85])
                after = belief * heard_o if a == 0 else np.array([0.25, 0.25])
                wanted += 0.95 * max(v @ after for v in solution.vectors)
            # the vectors promise less than they earn together by at most the tolerance, and the optimum is as near
            np.testing.assert_allclose(decision.lower[a], wanted, atol=2e-6)
        assert decision.lower.max() >= (solution.vectors @ belief).max() - 2e-6
        steps = [*steps, {"action": "listen", "observation": heard}]
        likelihood = np.array([0.85, 0.15]) if heard == 0 else np.array([0.15, 0.85])
        belief = belief * likelihood / (belief @ likelihood)
    assert decision.upper is None and decision.Q is None and decision.stage == 4


def test_vectors_are_doubted_where_they_cannot_earn_what_they_say_in_the_problem():
    problem = ld.read_stationary_pomdp(TIGER)
    solution = ld.solve_stationary(problem, tolerance=1e-6)
    actions, vectors = solution.actions, solution.vectors
    assert AlphaVectors(problem, actions, vectors).doubt is None
    assert AlphaVectors(problem, actions, vectors - 5).doubt is None  # they earn more than they say
    assert "earn at most 19.3714: they are of another problem" in AlphaVectors(problem, actions, vectors + 1).doubt
    assert AlphaVectors(problem, actions, vectors + 0.1).doubt is None  # a solver that stopped early
    legal = np.array([[True, False, True], [True, True, True]])
    only = AlphaVectors(replace(problem, legal=legal), np.array([1]), np.array([[1.0, 1.0]]))
    assert "none of them has a legal action" in only.doubt
    assert (only.q_bounds(problem.rho[None], None)[0] == -np.inf).all()
    endless = AlphaVectors(replace(problem, discount=1.0), actions, vectors)
    assert "nothing is discounted; so there are no bounds" in endless.doubt and endless.q_bounds(problem.rho[None], None) is None


# --- histories ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiger():
    return problem_info(ld.read_pomdp(TIGER, horizon=3))


def test_text_numbers_mappings_and_steps_are_the_same_history(tiger):
    wanted = (Step(0, observation=1), Step(None))
    ways = [
        "listen hear-right",
        "0 1",
        [{"action": "listen", "observation": 1}],
        [{"action": 0, "observation": "hear-right"}, {}],
    ]
    ways += [[Step(0, observation=1)], wanted]
    assert [read_history(way, tiger) for way in ways] == [wanted] * len(ways)
    assert read_history("", tiger) == read_history((), tiger) == (Step(None),)


def test_names_with_spaces_are_quoted():
    problem = NamedProblem(problem=random_mdp()[0], states=("at home", "away", "lost"), actions=("go out", "stay"))
    steps = read_history("'at home' 'go out' away", problem_info(problem))
    assert steps == (Step(0, state=0), Step(None, state=1))


def test_a_name_that_is_a_number_is_the_name_and_a_step_has_numbers():
    problem = NamedProblem(problem=random_mdp()[0], states=("2", "1", "0"), actions=("a", "b"))
    info = problem_info(problem)
    assert read_history("2", info) == (Step(None, state=0),) and read_history([{"state": 0}], info) == (Step(None, state=2),)
    assert read_history([Step(None, state=2)], info) == (Step(None, state=2),)


@pytest.mark.parametrize(
    "history, message",
    [
        ("listen", "history must repeat 'action observation'; got 1 word, the last is 'listen'"),
        (
            "listn hear-left",
            "history: step 1: action must be one of listen, open-left, open-right; got 'listn'; did you mean listen?",
        ),
        ("listen hear-left listen 7", "history: step 2: observation must be one of hear-left, hear-right; got '7'"),
        ("listen 'hear-left", "a quotation mark must be closed"),
        ("listen hear-left " * 3, "at most 2 steps before the next action, since the horizon is 3; got 3"),
        ([{"action": "listen"}], "history: step 1: observation must be given; got action"),
        (
            [{"action": "listen", "obs": 1}],
            "a field of a step must be one of state, action, model, observation, reward; got 'obs'",
        ),
        ([{"action": 0, "observation": 0, "state": 1}], "state must be left out in a history of this POMDP; got 1"),
        ([{"action": 0, "observation": 0, "reward": 1}], "reward must be left out in a history of this POMDP; got 1"),
        ([{"action": 0, "observation": 0}, {"observation": 1}], "observation must be left out in the last step"),
        ([{"action": True, "observation": 0}], "action must be a name or a whole number; got 'True'"),
        ([{"action": 0, "observation": 0.0}], "observation must be a name or a whole number; got '0.0'"),
        ([{"action": -1, "observation": 0}], "action must be one of listen, open-left, open-right; got '-1'"),
        ([Step(0, observation=2)], "observation must be a number from 0 to 1; got 2"),
        ([3], "history: step 1: a step must have the fields action, observation; got '3'"),
        (["listen"], "history: step 1: a step must have the fields action, observation; got 'listen'"),
    ],
)
def test_a_history_that_is_none_of_the_problem_is_refused(tiger, history, message):
    with pytest.raises(ValueError) as error:
        read_history(history, tiger)
    assert message in str(error.value)


def test_a_history_of_an_mdp_ends_in_its_current_state():
    info = problem_info(random_mdp()[0])
    for history, message in (
        ("", "history must repeat 'state action' and end with the current state; got 0 words"),
        ("0 1", "got 2 words, the last is '1'"),
        ([], "history must have the current state of an MDP; got no step"),
        ([{"state": 0, "action": 1}], "history: step 1: action must be left out in the last step"),
        ([{"state": 0, "action": 1, "reward": float("nan")}, {"state": 1}], "reward must be a finite number; got 'nan'"),
    ):
        with pytest.raises(ValueError) as error:
            read_history(history, info)
        assert message in str(error.value)


def test_what_is_impossible_is_refused_with_what_is_possible():
    prostate = problem_info(ld.make("prostate", horizon=3))
    steps = read_history("defer JH psa-1-positive", prostate)
    with pytest.raises(
        ValueError,
        match="step 1: the observation 'psa-1-positive' has the probability 0 there; possible: psa-1-null, psa-2-null, psa-3",
    ):
        check_history(steps, prostate)
    P = np.eye(2)[:, None].repeat(2, 1)
    still = NamedProblem(problem=ld.mdp(P[None], np.zeros((2, 2, 2)), [1.0, 0.0]), states=("here", "there"))
    for history, step, possible in (("there", 1, "here"), ("here 0 there", 2, "here")):
        info = problem_info(still)
        with pytest.raises(
            ValueError, match=f"history: step {step}: the state 'there' has the probability 0 there; possible: {possible}"
        ):
            check_history(read_history(history, info), info)


def test_what_a_policy_needs_must_be_given(tiger):
    problem, _ = random_mdp()
    for policy in (ld.policies.bc(), ld.policies.lsvi(), ld.policies.certainty_equivalence()):
        with pytest.raises(ValueError, match="demonstrations must be given: this policy learns from them; got none"):
            policy.act((), "0", problem)
    with pytest.raises(ValueError, match="demonstrations must have rewards"):
        ld.policies.pevi().act([[Step(0, state=0)]], "0", problem)


def test_the_oracle_of_a_large_problem_shows_lower_bounds():
    large = ld.read_pomdp(TIGER, horizon=16)
    decision = ld.policies.oracle().act((), "listen hear-left listen hear-left", large)
    assert decision.action == "open-right" and decision.upper is None and decision.Q is None
    assert decision.lower.argmax() == 2
