"""What a dataset consists of: how many tasks and episodes, by which behavior policies, labeled by which oracle."""

from dataclasses import dataclass
from typing import Literal

from lindm import validate
from lindm.choices import Behavior, check_choices


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Numbers of tasks and episodes, behavior policies, seed and oracle.

    A behavior policy is the oracle, epsilon (a uniformly random action with probability epsilon, otherwise the oracle's) or
    uniform.
    """

    tasks: int
    """number of tasks"""
    demos: int = 5
    """demonstration episodes of a task"""
    queries: int = 1
    """query episodes of a task"""
    behavior: Behavior = "oracle"
    """behavior policy of the demonstrations"""
    epsilon: float = 0.2
    query_behavior: Behavior = "epsilon"
    """behavior policy of the queries; a learner's own mistakes lead off the oracle's path, so labels are wanted there too"""
    query_epsilon: float = 0.2
    seed: int = 0
    method: Literal["auto", "tree", "hsvi", "net"] = "auto"
    """of the oracle: auto, tree, hsvi or net"""
    shard_size: int | None = None
    """tasks of a file [default: 256, fewer where they are large]"""

    def __post_init__(self):
        for name in ("tasks", "demos", "queries"):
            validate.count(getattr(self, name), name)
        if validate.count(self.seed, "seed", 0) >= 2**32 or validate.count(self.tasks, "tasks") >= 2**31:
            raise ValueError(f"seed must be below 2^32 and tasks below 2^31; got {self.seed} and {self.tasks}")
        if self.shard_size is not None:
            validate.count(self.shard_size, "shard_size")
        check_choices(self)
        validate.fraction(self.epsilon, "epsilon")
        validate.fraction(self.query_epsilon, "query_epsilon")

    @property
    def exploration(self) -> tuple[float, float]:
        """The probability of a uniformly random action, in demonstrations and in queries."""
        demos, queries = (
            {"oracle": 0.0, "epsilon": epsilon, "uniform": 1.0}[behavior]
            for behavior, epsilon in ((self.behavior, self.epsilon), (self.query_behavior, self.query_epsilon))
        )
        return demos, queries
