"""How much offline data does a model need until it plans with the data in its context, and how near does it come to Bayes?

    lindm run offline_data --preset quick     a bandit with linear rewards, under a minute of CPU time
    lindm run offline_data --preset full      hours; --cells base oracle uniform measures some of the cells
    lindm verify --only offline

A randomly initialized model, or SmolLM2, is trained on offline tasks that the oracle labeled, and then acts in new tasks. In the
base cell these are tasks of the suite mdp at horizon 4 with five demonstrations; half of the actions of these are random, and
their rewards are shown. Other cells differ from it in one factor (`lindm_experiments.lib.offline_cells`). Those with a tiny
model have three quarters of its steps, and are compared with the cell `short`, which differs from the base cell in this alone.

Two numbers are held apart. In the base cell, the number n of *distinct* training tasks varies at a fixed number of optimizer
steps. At the largest n each task is seen once, and evaluations during training give the curve over steps.

All policies act in the same new tasks. Their normalized optimality gaps, (V* - V^pi) / (V* - V^random), are compared with those
of the demonstrator, of behavior cloning on the demonstrations (`bc`), of LSVI, PEVI and certainty equivalence, and of the
yardstick `bayes-demo`, which knows the law of the tasks and plans with the posterior given the context. So a gap is split into
what the context does not tell (the yardstick's own gap) and what the reader lost (the rest). The yardstick is an estimate, whose
error by its sample of models is recorded.

Where a model reaches many histories, its gap is the mean over sampled episodes of exact one-step losses; other gaps are exact.
The units are trainings and tasks: all trainings of a cell are tested on the same tasks, and intervals allow for both.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lindm.evaluation.compare import PolicyResult, evaluate
from lindm.evaluation.policies.bayes_policies import Bayes, BayesDemo
from lindm.evaluation.policies.registry import kind_of, make_policy
from lindm.llm.named_policies import PoliciesByName
from lindm.llm.sft.metrics import METRICS
from lindm.llm.sft.options import SFTConfig
from lindm_experiments.harness.config import check_counts, check_positive, check_rising
from lindm_experiments.harness.unfinished import point_directory
from lindm_experiments.harness.verdicts import Verdict
from lindm_experiments.lib import language_models, offline_claims, offline_figures
from lindm_experiments.lib.jumps import MIN_SIDE
from lindm_experiments.lib.offline_cells import CELLS, LAW, MAIN, MODELS, PRETRAINED, SMALL, TINY, Cell, model_options

MAX_HISTORIES = 64  # largest number of histories at the last stage of a task that is evaluated exactly
SEEN = ("behavior", "bc", "certainty-equivalence", "lsvi", "pevi")
YARDSTICKS = {"bayes": Bayes, "bayes-demo": BayesDemo}
CURVE = {"loss": "loss", "gap": "gap", "bc": "bc_gap"}  # key of the records -> of an evaluation
HIDDEN = ("behavior", "bc", "certainty-equivalence", "qmdp")


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 3
    """trainings of a cell with a tiny model, each on its own tasks; a larger model has one"""
    base_seed: int = 3_100_000
    cells: tuple[str, ...] = tuple(name for name in CELLS if name != "bandit")
    """names of cells to measure"""
    n: tuple[int, ...] = (128, 512, 1024, 2048, 8192, 32_768)
    """distinct training tasks of the base cell; the other cells have as many as their training reads"""
    steps: int = 1024
    """optimizer steps of a tiny model in the base cell"""
    batch: int = 32
    """training tasks of a step"""
    rate: float = 1e-3
    """peak learning rate of a tiny model"""
    small_steps: int = 512
    small_rate: float = 5e-4
    model: str = "models/SmolLM2-135M-Instruct"
    """directory of the pretrained model"""
    pretrained_steps: int = 128
    pretrained_rate: float = 1e-3
    """of adapters; a tenth of it where all weights are trained"""
    evaluations: int = 24
    """during a training, whose decisions are evaluated on `curve_tasks` tasks"""
    curve_tasks: int = 64
    """a quarter of it for the pretrained model"""
    tasks: int = 200
    """test tasks"""
    episodes: int = 16
    """sampled of a task; a quarter of it for the pretrained model"""
    repeats: int = 3
    """independent samples of the yardstick's models, which tell its error"""

    def __post_init__(self):
        names = ("seeds", "steps", "batch", "small_steps", "pretrained_steps", "evaluations", "curve_tasks", "tasks", "episodes")
        check_counts(self, *names)
        check_counts(self, "repeats", least=2)
        check_counts(self, "evaluations", least=2 * MIN_SIDE)
        check_counts(self, "steps", "small_steps", "pretrained_steps", least=self.evaluations)
        check_positive(self, "rate", "small_rate", "pretrained_rate")
        check_rising(self, "n")
        if unknown := [name for name in self.cells if name not in CELLS]:
            raise ValueError(f"cells must be among {', '.join(CELLS)}; got {unknown[0]!r}")


FULL = Config()
QUICK = Config(
    seeds=1,
    cells=("bandit",),
    n=(32, 2048),
    steps=120,
    batch=16,
    evaluations=12,
    curve_tasks=100,
    tasks=100,
    episodes=1,
    repeats=2,
)
SMOKE = Config(
    seeds=1,
    cells=("bandit", "no-rewards", "names"),
    n=(16, 64),
    steps=8,
    batch=8,
    evaluations=8,
    curve_tasks=4,
    tasks=4,
    episodes=1,
    repeats=2,
)


def points(cfg: Config) -> list[dict]:
    """The base cell, then the others: the yardsticks of every kind of test, a training of every cell, the second ones and so on;
    larger models last."""
    cells = {name: CELLS[name] for name in cfg.cells}
    tests: dict[str, dict] = {}  # one of each kind
    for name, cell in cells.items():
        for demos in cell.test_demos:
            tests.setdefault(json.dumps(cell.test(demos)), {"test": name, "demos": demos})
    trainings = []
    for name, cell in cells.items():
        for seed in range(cfg.seeds if cell.model == TINY else 1):
            sizes = cfg.n[::-1] if name in LAW else [sequences(cfg, cell)]
            trainings += [{"cell": name, "n": n, "seed": seed} for n in sizes]
    trainings.sort(key=lambda p: (p["cell"] not in (*LAW, *MAIN), MODELS.index(CELLS[p["cell"]].model), p["seed"]))
    return sorted([*tests.values(), *trainings], key=lambda p: p.get("test", p.get("cell")) not in (*LAW, *MAIN))


def steps_of(cfg: Config, cell: Cell) -> int:
    return round(cell.steps * {SMALL: cfg.small_steps, PRETRAINED: cfg.pretrained_steps}.get(cell.model, cfg.steps))


def sequences(cfg: Config, cell: Cell) -> int:
    """Training tasks of a cell, each of which is seen once."""
    return steps_of(cfg, cell) * cfg.batch


def measure(cfg: Config, point: dict) -> dict:
    if any(CELLS[name].model == PRETRAINED for name in cfg.cells):
        language_models.check_model(cfg.model)  # before hours of other trainings
    if "test" in point:
        return {"rows": measure_policies(cfg, CELLS[point["test"]], point["demos"])}
    return measure_training(cfg, CELLS[point["cell"]], point["n"], seed_of(cfg, point), point["seed"])


def test_seed(cfg: Config) -> int:
    """Of the test tasks, which all cells of a suite share, whatever the demonstrations."""
    return cfg.base_seed


def seed_of(cfg: Config, point: dict) -> int:
    """Of the training tasks, which no two trainings share."""
    sizes = [*cfg.n, *(sequences(cfg, cell) for cell in CELLS.values())]
    place = (tuple(CELLS).index(point["cell"]) * len(sizes) + sizes.index(point["n"])) * cfg.seeds + point["seed"]
    return cfg.base_seed + 2 + place


def measure_policies(cfg: Config, cell: Cell, demos: int) -> dict[str, dict]:
    """What the policies without a language model lose in the test tasks; the error of a yardstick is that by its sample."""
    source, dataset = cell.source, cell.dataset(cfg.tasks, test_seed(cfg), demos)
    shown = cell.rewards != "hidden"
    names = SEEN if kind_of(source) == "mdp" else HIDDEN
    if not shown:
        names = ("behavior", "bc")
    elif len(cell.test_demos) > 1:
        names += ("layer",)  # trained with as many demonstrations
    policies: dict[str, Any] = {name: make_policy(name, source, dataset) for name in names}
    policies |= {name: kind(source, dataset.exploration[0], rewards=shown) for name, kind in YARDSTICKS.items()}
    with point_directory() as work:
        limits = {"episodes": cfg.episodes, "posterior_seeds": cfg.repeats}
        results = evaluate(source, policies, dataset=dataset, data=work / "tasks", **limits)
    rows = {result.policy: kept(result) for result in results}
    sampled = {r.policy: {"error": r.posterior_error, "effective_samples": r.effective_samples} for r in results}
    return {name: row | (sampled[name] if name in YARDSTICKS else {}) for name, row in rows.items()}


def measure_training(cfg: Config, cell: Cell, n: int, seed: int, number: int) -> dict:
    """Train a model; the evaluations during training, and what it loses in the test tasks."""
    source, steps = cell.source, steps_of(cfg, cell)
    rate = {SMALL: cfg.small_rate, PRETRAINED: cfg.pretrained_rate}.get(cell.model, cfg.rate) * cell.rate
    rate *= 0.1 if cell.model == PRETRAINED and cell.method == "full" else 1
    part = 4 if cell.model == PRETRAINED else 1  # its decisions cost much more
    curve_tasks, episodes = -(-cfg.curve_tasks // part), -(-cfg.episodes // part)
    with point_directory() as work, language_models.quiet_single_precision():
        config = SFTConfig(
            data=language_models.make_data(work / "train", source, cell.dataset(n, seed)),
            eval_data=language_models.make_data(work / "curve", source, cell.dataset(curve_tasks, cfg.base_seed + 1)),
            eval_tasks=curve_tasks,
            out=work / "run",
            **model_options(cell, cfg.model),
            **{"steps": steps, "batch": cfg.batch, "learning_rate": rate, "seed": number},
            **{"loss": cell.loss, "supervise": cell.supervise, "rewards": cell.rewards, "names": cell.names},
            eval_every=max(1, steps // cfg.evaluations),
        )
        run = language_models.fine_tune(config)
        policy, rows = f"sft:{run}", {}
        for demos in cell.test_demos:
            dataset = cell.dataset(cfg.tasks, test_seed(cfg), demos)
            named = PoliciesByName((policy,), source, dataset, rewards=cell.rewards)
            limits = {"episodes": episodes, "max_histories": MAX_HISTORIES}
            (result,) = evaluate(source, named, dataset=dataset, data=work / f"test-{demos}", **limits)
            rows[str(demos)] = kept(result)
        return {"curve": curve_of(run, cfg.batch), "rows": rows}


def curve_of(run: Path, batch: int) -> list[dict]:
    """The evaluations of a run: training sequences so far, held-out loss, gaps of the model and of bc on the same tasks."""
    records = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [
        {"sequences": r["step"] * batch, **{key: round(r[name], 6) for key, name in CURVE.items()}}
        for r in records
        if r["kind"] == "eval"
    ]


def kept(result: PolicyResult) -> dict:
    """Of the result of a policy, what the records hold."""
    gaps = np.array([np.nan if gap is None else gap for gap in result.gaps])
    return {"gaps": rounded(gaps), "agreement": result.action_agreement, "method": result.method}


def rounded(gaps: np.ndarray) -> list[float]:
    return [round(float(gap), 5) for gap in gaps]


def check(records: list[dict]) -> list[Verdict]:
    return offline_claims.check(records)


def table(records: list[dict]) -> list[dict]:
    return offline_claims.table(records)


def plot(records: list[dict]) -> dict[str, Figure]:
    return offline_figures.plot(records)
