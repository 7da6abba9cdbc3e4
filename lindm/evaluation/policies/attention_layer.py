"""One linear attention layer per stage, trained on other tasks of the same source: in-context learning of Q*."""

from collections.abc import Sequence
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from lindm.datasets import DatasetConfig
from lindm.datasets.generate import TaskGenerator
from lindm.evaluation.environments import PolicyTask
from lindm.evaluation.policies.tables import TablePolicy, mdp_of
from lindm.families.suites import Suite
from lindm.solvers import dp
from lindm.types import MDP

TASKS, SEED = 2048, 2**31  # of the training tasks


class AttentionLayer(TablePolicy):
    """Qhat_h = A_h S_h [S A], S_h = (1/K) sum y x over the demonstrations' pairs of stage h, y the return from there on.

    A_h minimizes the squared error of Qhat_h over `TASKS` other tasks of the same suite with the same number of demonstrations,
    the limit of training the layer (`lindm.icl.prompts`, `theory/notes`): A = E[Q* S'] E[S S']^-1, with the pseudo-inverse if a
    pair never occurs.
    """

    def __init__(self, suite: Suite, dataset: DatasetConfig):
        if not isinstance(suite, Suite):
            raise ValueError("policy layer needs tasks that differ; got a source whose every task is the same problem")
        if dataset.seed == SEED:
            raise ValueError(f"seed must not be {SEED}: the layer is trained on the tasks of this seed")
        self.suite, self.dataset = suite, dataset

    @classmethod
    def for_tasks(cls, source: Suite, dataset: DatasetConfig) -> "AttentionLayer":
        return cls(source, dataset)

    @cached_property
    def weights(self) -> np.ndarray:
        """A [H, S A, S A]."""
        wanted = {"demos": self.dataset.demos, "behavior": self.dataset.behavior}
        generator = TaskGenerator(self.suite, DatasetConfig(tasks=TASKS, seed=SEED, **wanted))
        problems, _, episodes, _ = generator.generate(0, TASKS)
        assert isinstance(problems, MDP)
        _, H, S, A = problems.r.shape
        P, r, rho = (jnp.asarray(x) for x in (problems.P, problems.r, problems.rho))
        many = dp.solve_many(dp.backward_induction, MDP(P=P, r=r, rho=rho))
        s, a, r = (np.asarray(x)[:, : self.dataset.demos] for x in (episodes.s, episodes.a, episodes.r))
        features = _features(s, a, r, S, A)
        targets = np.asarray(many.Q).reshape(TASKS, H, S * A)
        cross, second = np.einsum("nhi,nhj->hij", targets, features), np.einsum("nhi,nhj->hij", features, features)
        return cross @ np.linalg.pinv(second, hermitian=True)

    def action_values(self, tasks: Sequence[PolicyTask]) -> list[np.ndarray]:
        values = []
        for task in tasks:
            H, S, A = mdp_of(task).problem.r.shape
            demonstrations = task.required_demonstrations(rewards=True)
            if {len(steps) for steps in demonstrations} != {H}:
                raise ValueError(f"demonstrations must have {H} steps each: the layer reads whole episodes")
            s, a, r = (
                np.array([[getattr(step, name) for step in steps] for steps in demonstrations])
                for name in ("state", "action", "reward")
            )
            features = _features(s[None], a[None], r[None], S, A)[0]
            values.append(np.einsum("hij,hj->hi", self.weights, features).reshape(H, S, A))
        return values


def _features(s: np.ndarray, a: np.ndarray, r: np.ndarray, S: int, A: int) -> np.ndarray:
    """S_h [n, H, S A]: (1/K) sum over episodes of y x, x one for each (s, a), of states, actions and rewards [n, K, H]."""
    returns = np.cumsum(r[..., ::-1], axis=-1)[..., ::-1]
    return np.einsum("nkh,nkhi->nhi", returns, np.eye(S * A)[s * A + a]) / s.shape[1]
