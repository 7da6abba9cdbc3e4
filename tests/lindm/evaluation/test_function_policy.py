"""A function of a user as a policy."""

import numpy as np
import pytest

from lindm.evaluation.environments import make_tasks
from lindm.evaluation.optimality_gap import evaluate_policy
from lindm.evaluation.policy import FunctionPolicy
from lindm.problems.mdp import mdp


def test_an_error_of_a_function_names_the_function_and_the_length_of_the_history():
    def second_last(demonstrations, history):
        return history[-2].action

    problem = mdp(np.full((1, 2, 1, 2), 0.5), np.zeros((3, 2, 1)), np.array([1.0, 0]))
    with pytest.raises(IndexError) as error:
        evaluate_policy(make_tasks([problem], [()]), FunctionPolicy(second_last))
    assert error.value.__notes__ == ["raised by the policy second_last(demonstrations, history) for 1 step(s) of history"]
