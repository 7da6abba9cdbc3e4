"""The Bayes policies: what the demonstrations and the episode so far tell of a task, and a plan that is made with it.

The prior is the law of the suite. The data are the transitions and rewards of the demonstrations and of the episode so far: steps
(s, a, r, s') of an MDP, or steps (a, m, o) where the state is hidden, without rewards, as the texts show them. `bayes` uses these
alone. `bayes-demo` uses the demonstrators' actions, too: a demonstrator takes the oracle's action of the stage and state with
probability 1 - epsilon, otherwise a random one. `thompson` takes each action with the posterior probability that it is the best.

An MDP is planned with the posterior mean of kernel and rewards, again before every decision. In a suite of random MDPs whose
demonstrations come from uniformly random actions, the posterior without the condition on the action gap is known in closed form,
and `bayes` is exact. Otherwise the posterior is a sample of models: by importance sampling, or, in a random suite whose state is
hidden, by sequential Monte Carlo for each task. Its effective sample size is the number of independent models that it is worth.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any, Self

from lindm import validate
from lindm.datasets import DatasetConfig
from lindm.evaluation.environments import MDPEnvironment, PolicyTask
from lindm.evaluation.policies.bayes_hidden import HiddenPosterior
from lindm.evaluation.policies.bayes_mdp import MeanPlanning, SampledPosterior
from lindm.evaluation.policy import ChosenPolicy, Policy
from lindm.families.random_suites import RandomSuite
from lindm.families.suites import Suite

SAMPLES = 2000  # models of a posterior sample


class Bayes(ChosenPolicy):
    """Plans with the posterior given transitions and rewards.

    Args:
      suite: whose law is the prior.
      epsilon: the probability with which a demonstrator takes a random action.
      rewards: whether rewards are data.
      samples: models of the posterior sample, where there is no closed form.
      seed: of the sample.
    """

    actions = False  # whether the demonstrators' actions are data
    thompson = False

    def __init__(self, suite: Suite, epsilon: float = 0.0, *, rewards: bool = True, samples: int = SAMPLES, seed: int = 0):
        if not isinstance(suite, Suite):
            raise ValueError("source must be a family, whose law of tasks is the prior of this policy; got a single problem")
        validate.fraction(epsilon, "epsilon")
        self.suite, self.epsilon, self.rewards = suite, epsilon, rewards
        self.samples, self.seed = validate.count(samples, "samples"), validate.count(seed, "seed", 0)
        self.batch_size = max(1, (1 << 24) // self.samples)

    @classmethod
    def for_tasks(cls, source: Any, dataset: DatasetConfig) -> Self:
        return cls(source, dataset.exploration[0])

    def with_seed(self, seed: int) -> Self:
        """The same policy with another sample."""
        other = copy(self)
        other.seed = validate.count(seed, "seed", 0)
        return other

    @property
    def has_sample(self) -> bool:
        """Whether the posterior is a sample, and has no closed form."""
        closed = isinstance(self.suite, RandomSuite) and not self.suite.observations
        return not closed or self.actions or self.thompson

    def choose(self, tasks: Sequence[PolicyTask]) -> Policy:
        settings = {"epsilon": self.epsilon if self.actions else None, "samples": self.samples, "seed": self.seed}
        if not isinstance(tasks[0].known, MDPEnvironment):
            return HiddenPosterior(self.suite, thompson=self.thompson, **settings)
        if isinstance(self.suite, RandomSuite) and not (self.actions or self.thompson):
            return MeanPlanning(self.suite, rewards=self.rewards)
        return SampledPosterior(self.suite, thompson=self.thompson, rewards=self.rewards, **settings)


class BayesDemo(Bayes):
    """Plans with the posterior given transitions, rewards, and the demonstrators' actions."""

    actions = True


class Thompson(Bayes):
    """Every action with the posterior probability, given transitions and rewards, that it is the best one."""

    thompson = True
