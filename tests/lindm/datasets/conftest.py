"""Small datasets: of a suite of MDPs, of one MDP with names, of one APOMDP. Each has six episodes a task: programs are shared."""

from functools import cached_property

import jax.numpy as jnp
import numpy as np
import pytest

from lindm import datasets
from lindm.datasets import DatasetConfig
from lindm.families.random_suites import RandomSuite
from lindm.families.registry import NamedProblem
from lindm.types import MDP

SUITE = RandomSuite(name="small", horizon=3, states=3, actions=2, concentration=0.5, step=0.25)


def fixed_mdp() -> NamedProblem:
    rng = np.random.default_rng(7)
    P, r = rng.dirichlet(np.ones(3), (1, 3, 3)), rng.normal(size=(4, 3, 3)).round(2)
    problem = MDP(P=jnp.asarray(P), r=jnp.asarray(r), rho=jnp.asarray([0.5, 0.25, 0.25]))
    return NamedProblem(problem=problem, states=("left", "middle", "right"), actions=("wait", "go", "turn"))


def config(**changes) -> DatasetConfig:
    return DatasetConfig(**{"tasks": 10, "demos": 4, "queries": 2, "shard_size": 4} | changes)


class Datasets:
    """Made when a test first uses them."""

    def __init__(self, brute, root):
        self.root = root
        self.brute = brute.random(5, S=2, A=2, O=2, M=2, H=3, alpha=0.7)
        self.sources = {"suite": SUITE, "mdp": fixed_mdp(), "apomdp": self.brute.problem()}

    def _made(self, name):
        datasets.make_dataset(self.root / name, self.sources[name], config(query_epsilon=0.5))
        return self.root / name

    @cached_property
    def suite(self):
        return self._made("suite")

    @cached_property
    def mdp(self):
        return self._made("mdp")

    @cached_property
    def apomdp(self):
        return self._made("apomdp")


@pytest.fixture(scope="session")
def made(brute, tmp_path_factory):
    return Datasets(brute, tmp_path_factory.mktemp("datasets"))
