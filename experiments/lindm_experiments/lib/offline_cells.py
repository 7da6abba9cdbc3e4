"""What the experiment `offline_data` trains and where it tests: a base cell, and cells that differ from it in one factor.

Cells with the model of the base cell have three quarters of its steps, which saves hours, and are compared with the cell
`short`, which differs from the base cell in this number alone. A larger model has a number of steps of its own. The two cells
of a pair with and without names are compared with each other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lindm.choices import Loss, Rewards, Supervise
from lindm.datasets import DatasetConfig
from lindm.families.registry import build
from lindm.families.suites import Suite
from lindm_experiments.lib.language_models import TINY

SMALL, PRETRAINED = "small", "pretrained"
MODELS = (TINY, SMALL, PRETRAINED)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A model, its training data and its tests."""

    factor: str  # in which it differs from the base cell
    label: str  # its value, as figures and tables show it
    suite: str = "mdp"
    options: tuple[tuple[str, Any], ...] = ()  # of the suite, beside the horizon
    horizon: int = 4
    demos: int = 5  # demonstrations of a training task
    epsilon: float = 0.5  # share of their actions that are random
    rewards: Rewards = "shown"
    names: bool = False  # the family's own words in the texts
    model: str = TINY  # or SMALL, PRETRAINED
    method: str = "full"  # or lora
    rate: float = 1.0  # the learning rate, in units of the model's own
    steps: float = 1  # the number of steps, in units of the model's own
    loss: Loss = "action"
    supervise: Supervise = "all"
    tested: tuple[int, ...] = ()  # demonstrations of the test tasks [default: as in training]

    @property
    def test_demos(self) -> tuple[int, ...]:
        return self.tested or (self.demos,)

    @property
    def source(self) -> Suite:
        made = build(self.suite, horizon=self.horizon, **dict(self.options))
        assert isinstance(made, Suite)
        return made

    def dataset(self, tasks: int, seed: int, demos: int | None = None) -> DatasetConfig:
        """The options of `lindm data make` for tasks of this cell."""
        behavior = {0.0: "oracle", 1.0: "uniform"}.get(self.epsilon, "epsilon")
        options: dict[str, Any] = {} if behavior != "epsilon" else {"epsilon": self.epsilon}
        if self.loss == "behavior":  # the query is trained on the demonstrator's actions, too
            options |= {"query_behavior": behavior, "query_epsilon": self.epsilon}
        return DatasetConfig(tasks=tasks, demos=demos or self.demos, behavior=behavior, seed=seed, **options)

    def test(self, demos: int) -> dict[str, Any]:
        """What tells its test tasks with this number of demonstrations, and what of them is shown, from those of other cells."""
        fields = ("suite", "options", "horizon", "epsilon", "rewards")
        return {name: getattr(self, name) for name in fields} | {"demos": demos}


MAIN = ("long", "base", "bandit")  # the cell of most claims: the first that a run has
LAW = ("base", "bandit")  # in which the number of training tasks varies
REFERENCE = "short"  # the cell with which those of the factors are compared
SHORTER = {"steps": 0.75}
PAIR = {"suite": "maintenance", "factor": "names"} | SHORTER
# A task of one state and one stage is a bandit: its rewards are linear in indicators of the arms, and each is to be read.
BANDIT = Cell(
    factor="base",
    label="bandit",
    options=(("states", 1), ("actions", 3), ("step", 0.1)),
    horizon=1,
    epsilon=1.0,
)
CELLS = {
    "bandit": BANDIT,
    "base": Cell(factor="base", label="base", tested=(2, 5, 10)),
    "long": Cell(factor="steps", label="twice as many", steps=2),
    "short": Cell(factor="steps", label="three quarters as many", tested=(2, 5, 10), **SHORTER),
    "oracle": Cell(factor="quality", label="0", epsilon=0.0, **SHORTER),
    "quarter": Cell(factor="quality", label="0.25", epsilon=0.25, **SHORTER),
    "uniform": Cell(factor="quality", label="1", epsilon=1.0, **SHORTER),
    "two": Cell(factor="demonstrations", label="2", demos=2, tested=(2, 5, 10), **SHORTER),
    "ten": Cell(factor="demonstrations", label="10", demos=10, tested=(2, 5, 10), **SHORTER),
    "soft": Cell(factor="loss", label="soft labels", loss="soft", **SHORTER),
    "regret": Cell(factor="loss", label="expected regret", loss="regret", **SHORTER),
    "cloning": Cell(factor="loss", label="demonstrator's actions", loss="behavior", **SHORTER),
    "query": Cell(factor="supervision", label="query's actions", supervise="query", **SHORTER),
    "no-rewards": Cell(factor="rewards", label="hidden", rewards="hidden", **SHORTER),
    "pomdp": Cell(factor="suite", label="pomdp", suite="pomdp", rewards="auto", **SHORTER),
    "apomdp": Cell(factor="suite", label="apomdp", suite="apomdp", horizon=3, rewards="auto", **SHORTER),
    "symbols": Cell(label="maintenance, symbols", **PAIR),
    "names": Cell(label="maintenance, names", names=True, **PAIR),
    "small": Cell(factor="model", label="10 M weights", model=SMALL),
    "pretrained": Cell(factor="model", label="SmolLM2, adapters", model=PRETRAINED, method="lora"),
    "pretrained-full": Cell(factor="model", label="SmolLM2, all weights", model=PRETRAINED),
    "pretrained-rate": Cell(factor="model", label="SmolLM2, three times the rate", model=PRETRAINED, method="lora", rate=3.0),
    "pretrained-symbols": Cell(label="SmolLM2, maintenance, symbols", model=PRETRAINED, method="lora", **PAIR),
    "pretrained-names": Cell(label="SmolLM2, maintenance, names", model=PRETRAINED, method="lora", names=True, **PAIR),
}


def model_options(cell: Cell, pretrained: str) -> dict[str, Any]:
    """The model of `lindm sft` and how it is trained."""
    if cell.model != PRETRAINED:
        return {"preset": cell.model}
    return {"model": Path(pretrained), "method": cell.method}
