r"""When a model learns to decide from offline data, do its hidden states come to hold what a Bayesian would compute?

    lindm run offline_circuit --preset quick     a bandit, under a minute of CPU time
    lindm run offline_circuit --preset full      the base cell of offline_data: tasks of the suite mdp at horizon 4
    lindm verify --only offline/circuit

A tiny, randomly initialized model is trained as in `offline_data`: it stays near random play for hundreds of steps, then its gap
falls within few. All weights of one training are probed, from the random ones on, at every checkpoint; so the schedule is
the same for all. The residual stream is read at the token before each action of the query episodes of new tasks, and ridge
regressions (`lindm_experiments.lib.probes`), one for each layer, predict what follows from demonstrations and episode so far:

    rewards       the posterior mean of the reward of each action in the current state
    transitions   the posterior mean of the law of the next state, for each action in the current state
    q             the action values of the yardstick of `offline_data`, which knows how demonstrators act (`bayes-demo`)
    future        what planning with the posterior mean adds to the rewards: action values (`bayes`) less posterior mean rewards

The first two are what there is to remember, and the last is what there is to plan; q is both. Of q and future, the mean over the
actions is subtracted, which decides nothing. Transitions and future are read at all stages but the last, where nothing follows.

R² is that on new tasks, beyond the mean of each stage, in the layer that validation tasks choose. Two controls: the same
quantity of another task (targets permuted over the tasks), in the same layer, as of Hewitt and Liang (Designing and interpreting
probes with control tasks, 2019), and the random weights that the training starts from. The selectivity is R² less that of the
permuted targets.

The jump of a training is from the last evaluation at which the gap is at least that of the majority of the demonstrations to the
end of the training. The unit is the training, each with tasks of its own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.datasets import Dataset
from lindm.evaluation.compare import read_tasks
from lindm.evaluation.environments import PolicyTask
from lindm.evaluation.policies.bayes_mdp import MeanPlanning
from lindm.evaluation.policies.bayes_policies import BayesDemo
from lindm.evaluation.policy import Observation, Policy
from lindm.families.random_suites import RandomSuite
from lindm.llm.sft import trainer
from lindm.llm.sft.metrics import METRICS
from lindm.llm.sft.options import SFTConfig
from lindm.llm.tokens import load_tokenizer
from lindm_experiments.harness.config import check_counts, check_positive
from lindm_experiments.harness.figures import BLUE, EXACT, GRAY, GREEN, ORANGE, PURPLE, SEED, legend_below, panel_grid
from lindm_experiments.harness.statistics import equivalence, mean_ci
from lindm_experiments.harness.unfinished import point_directory
from lindm_experiments.harness.verdicts import Verdict, mean_verdict, undecided
from lindm_experiments.lib import language_models
from lindm_experiments.lib.jumps import last_not_below
from lindm_experiments.lib.offline_cells import CELLS, LAW, Cell
from lindm_experiments.lib.probes import ProbedModel, Queries, centered, probe, read_queries

QUANTITIES = {
    "rewards": "posterior mean of rewards",
    "transitions": "posterior mean of transitions",
    "q": "the yardstick's Q",
    "future": "future value",
}
BEFORE_LAST = ("transitions", "future")  # quantities of all stages but the last
TASKS_AT_ONCE = 50  # whose posterior samples are in memory
DECODED = 0.1  # least selectivity of a quantity that counts as read from the hidden states


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 3
    """trainings"""
    base_seed: int = 3_500_000
    cell: str = "base"
    """of offline_data: base or bandit"""
    steps: int = 1024
    batch: int = 32
    """training tasks of a step; each task is seen once"""
    rate: float = 1e-3
    """peak learning rate"""
    checkpoints: int = 16
    """that are probed, besides the random weights"""
    probe: int = 400
    """tasks that probes are fitted to"""
    tasks: int = 200
    """new tasks to test on"""
    gap_tasks: int = 64
    """those of them on which decisions are evaluated"""

    def __post_init__(self):
        check_counts(self, "seeds", "steps", "batch", "checkpoints", "tasks", "gap_tasks")
        check_counts(self, "probe", least=8)
        check_positive(self, "rate")
        if self.cell not in LAW:
            raise ValueError(f"cell must be {' or '.join(LAW)}; got {self.cell!r}")
        if self.checkpoints > self.steps:
            raise ValueError(f"checkpoints must be at most the {self.steps} steps; got {self.checkpoints}")


FULL = Config()
QUICK = Config(seeds=1, cell="bandit", steps=120, batch=16, checkpoints=6, probe=300, tasks=100, gap_tasks=100)
SMOKE = Config(seeds=1, steps=2, batch=8, checkpoints=2, probe=8, tasks=4, gap_tasks=2)


def measure(cfg: Config, point: dict) -> dict:
    cell, seed = CELLS[cfg.cell], cfg.base_seed + 3 * point["seed"]
    parts = (("train", cfg.steps * cfg.batch), ("probe", cfg.probe), ("new", cfg.tasks))
    with point_directory() as work, language_models.quiet_single_precision():
        data = {
            part: language_models.make_data(work / part, cell.source, cell.dataset(n, seed + i))
            for i, (part, n) in enumerate(parts)
        }
        config = training_config(cfg, cell, data, work / "run", point["seed"])
        trainer.train(config, save_on_stop=False)
        evaluations = read_evaluations(config.out)
        known, new = (read_queries(data[part], frozenset({"state", "reward"})) for part in ("probe", "new"))
        targets = {part: posterior_targets(cell, data[part], q, seed) for part, q in (("probe", known), ("new", new))}
        tokenizer, steps = load_tokenizer(config.out / trainer.MODEL), []
        for step, model in language_models.models_of_run(config):
            probed = ProbedModel(model, tokenizer)
            found = probes(probed.stream(known), probed.stream(new), targets["probe"], targets["new"], seed)
            values = {name: round(evaluations[step][name], 5) for name in ("loss", "gap")}
            steps.append({"sequences": step * cfg.batch} | values | {"probes": found})
        return {"majority": round(evaluations[0]["bc_gap"], 5), "steps": steps}


def training_config(cfg: Config, cell: Cell, data: dict[str, Path], out: Path, seed: int) -> SFTConfig:
    """A training that evaluates and keeps its weights at every step that is probed."""
    every = -(-cfg.steps // cfg.checkpoints)
    return SFTConfig(
        data=data["train"],
        eval_data=data["new"],
        eval_tasks=cfg.gap_tasks,
        out=out,
        preset=cell.model,  # pyright: ignore[reportArgumentType]
        steps=cfg.steps,
        batch=cfg.batch,
        learning_rate=cfg.rate * cell.rate,
        seed=seed,
        loss=cell.loss,
        supervise=cell.supervise,
        rewards=cell.rewards,
        eval_every=every,
        save_every=every,
        keep=cfg.checkpoints,
    )


def read_evaluations(run: Path) -> dict[int, dict[str, Any]]:
    """The evaluations of a run by step."""
    records = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return {r["step"]: r for r in records if r["kind"] == "eval"}


# --- what a Bayesian would compute -----------------------------------------------------------------------------------------


def posterior_targets(cell: Cell, data: Path, queries: Queries, seed: int) -> dict[str, np.ndarray]:
    """The quantities [n, stages, k] at the decisions of the queries of a dataset; those that a horizon of 1 has no use for are
    left out."""
    source = cell.source
    assert isinstance(source, RandomSuite)
    tasks, rows = read_tasks(Dataset(data)), queries.rows
    mean, demo = MeanPlanning(source), BayesDemo(source, cell.dataset(1, 0).exploration[0], seed=seed)
    parts: list[dict[str, np.ndarray]] = []
    for first in range(0, len(tasks), TASKS_AT_ONCE):
        some = slice(first, first + TASKS_AT_ONCE)
        states, values = zip(*along_queries(mean, tasks[some], rows[some]), strict=True)
        at = np.arange(len(rows[some]))
        rewards = np.stack([s.rewards[at, s.state] for s in states], 1)
        kernels = [s.parameters[at, s.state] for s in states]
        transitions = np.stack([(c / c.sum(-1, keepdims=True)).reshape(len(at), -1) for c in kernels], 1)
        q = centered(np.stack([value for _, value in along_queries(demo, tasks[some], rows[some])], 1))
        future = centered(np.stack(values, 1) - rewards)
        parts.append({"rewards": rewards, "transitions": transitions[:, :-1], "q": q, "future": future[:, :-1]})
    joined = {name: np.concatenate([part[name] for part in parts]) for name in QUANTITIES}
    return {name: values for name, values in joined.items() if values.shape[1]}


def along_queries(policy: Policy, tasks: Sequence[PolicyTask], rows: Sequence[Any]) -> list[tuple[Any, np.ndarray]]:
    """The policy's state and its action values [n, A] at each stage of the queries, whatever actions these take."""
    state, which, stages = policy.init(tasks), np.arange(len(tasks)), []
    for stage in range(tasks[0].known.horizon):
        seen = {"state": [row.state[stage] for row in rows]}
        if stage:
            seen |= {name: [getattr(row, name)[stage - 1] for row in rows] for name in ("action", "reward")}
        observation = Observation(stage=stage, task=which, parent=which, **{name: np.array(x) for name, x in seen.items()})
        state, _ = policy.step(state, observation)
        bounds = policy.q_bounds(state, observation)
        assert bounds is not None, "a Bayes policy chooses by action values"
        stages.append((state, bounds[0]))
    return stages


def probes(X: np.ndarray, X_new: np.ndarray, known: dict[str, Any], new: dict[str, Any], seed: int) -> dict[str, dict]:
    """For each quantity: the layer that validation tasks choose, and R² on new tasks in every layer, also with the targets
    permuted over the tasks."""
    rng = np.random.default_rng(seed)
    order, order_new = rng.permutation(len(X)), rng.permutation(len(X_new))
    found: dict[str, dict] = {}
    for stages in {Y.shape[1] for Y in known.values()}:
        names = [name for name, Y in known.items() if Y.shape[1] == stages]
        targets = {name: (known[name], new[name]) for name in names}
        targets |= {f"{name} permuted": (known[name][order], new[name][order_new]) for name in names}
        results = probe(X[:, :stages], X_new[:, :stages], targets)
        for name in names:
            r2, shuffled = ([round(1 - e, 5) for e in results[key]["profile"]] for key in (name, f"{name} permuted"))
            found[name] = {"layer": results[name]["layer"], "r2": r2, "shuffled": shuffled}
    return found


# --- verdicts ---------------------------------------------------------------------------------------------------------------


def measured(records: list[dict]) -> list[str]:
    """The quantities that the records have, in the order of `QUANTITIES`."""
    return [name for name in QUANTITIES if name in records[0]["steps"][0]["probes"]]


def curves(record: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
    """R² [steps] of a quantity in the chosen layer, and that with permuted targets."""
    chosen = [step["probes"][name] for step in record["steps"]]
    return tuple(np.array([p[key][p["layer"]] for p in chosen]) for key in ("r2", "shuffled"))  # pyright: ignore


def selectivity(record: dict, name: str) -> np.ndarray:
    """[steps]"""
    r2, shuffled = curves(record, name)
    return r2 - shuffled


def before_jump(record: dict) -> int | None:
    """The number of the last evaluation at which the gap is not below the majority's; None if it is not below at the end."""
    gaps = [step["gap"] for step in record["steps"]]
    last = last_not_below(gaps, record["majority"]) or 0
    return None if last == len(gaps) - 1 else last


def check(records: list[dict]) -> list[Verdict]:
    jumped = [(r, k) for r in records if (k := before_jump(r)) is not None]
    verdicts = [_rises("offline/circuit", "q", records, jumped), _rises("offline/circuit-future", "future", records, jumped)]
    verdicts += [_remembered(f"offline/circuit-{name}", name, records, jumped) for name in ("rewards", "transitions")]
    untrained = np.array([selectivity(r, "q")[0] for r in records])
    note = f"R² less that of permuted targets, random weights {untrained.mean():.2f}"
    return [*verdicts, mean_verdict("offline/circuit-untrained", untrained, figure="circuit", note=note)]


Jumped = list[tuple[dict, int]]
"""Trainings that get below the majority, with the number of the evaluation before."""


def _rises(id: str, name: str, records: list[dict], jumped: Jumped) -> Verdict:
    """From before the jump to the end, the selectivity rises."""
    if (reason := _unmeasured(name, records, jumped)) is not None:
        return undecided(id, reason)
    values = np.array([selectivity(r, name)[[0, k, -1]] for r, k in jumped])
    return mean_verdict(id, values[:, 2] - values[:, 1], figure="circuit", note=_described(values, records, jumped))


def _remembered(id: str, name: str, records: list[dict], jumped: Jumped) -> Verdict:
    """The selectivity before the jump is at least half of that at the end, where there is something to read."""
    if (reason := _unmeasured(name, records, jumped)) is not None:
        return undecided(id, reason)
    values = np.array([selectivity(r, name)[[0, k, -1]] for r, k in jumped])
    decoded = equivalence(values[:, 2], DECODED, np.inf, min_seeds=1)
    note = _described(values, records, jumped)
    return mean_verdict(id, values[:, 1] - values[:, 2] / 2, also=[decoded], figure="circuit", note=note)


def _unmeasured(name: str, records: list[dict], jumped: Jumped) -> str | None:
    if name not in measured(records):
        return "a horizon of 1 has nothing to plan"
    return None if jumped else "no training got below the majority"


def _described(values: np.ndarray, records: list[dict], jumped: Jumped) -> str:
    at = " / ".join(f"{r['steps'][k]['sequences']:,}" for r, k in jumped)
    means = "{:.2f} with random weights, {:.2f} before the jump, {:.2f} at the end".format(*values.mean(0))
    note = f"R² less that of permuted targets: {means}; jump after {at} sequences"
    return note if len(jumped) == len(records) else f"{note}; {len(jumped)} of {len(records)} trainings jumped"


def table(records: list[dict]) -> list[dict]:
    """A row for each evaluation, quantity and layer: R² and that of permuted targets; means over trainings, 95 % intervals."""
    rows = []
    for i, step in enumerate(records[0]["steps"]):
        gap = float(np.mean([r["steps"][i]["gap"] for r in records]))
        for name in measured(records):
            found = [r["steps"][i]["probes"][name] for r in records]
            for layer in range(len(found[0]["r2"])):
                row = {"sequences": step["sequences"], "gap": gap, "quantity": name, "layer": layer, "trainings": len(records)}
                row["chosen"] = sum(p["layer"] == layer for p in found)
                for key in ("r2", "shuffled"):
                    mean, ends = mean_ci([p[key][layer] for p in found])
                    low, high = ends if np.isfinite(ends).all() else (None, None)
                    row |= {key: mean, f"{key}_low": low, f"{key}_high": high}
                rows.append(row)
    return rows


# --- figures ----------------------------------------------------------------------------------------------------------------

COLORS_OF = dict(zip(QUANTITIES, (BLUE, GREEN, ORANGE, PURPLE), strict=True))


def plot(records: list[dict]) -> dict[str, Figure]:
    return {"circuit": _circuit(records), "layers": _layers(records)}


def _sequences(records: list[dict]) -> np.ndarray:
    return np.array([step["sequences"] for step in records[0]["steps"]], float)


def _circuit(records: list[dict]) -> Figure:
    """R² of each quantity over training sequences, and the gap below."""
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(6.4, 7.4), sharex=True, height_ratios=(3, 2))
    n = _sequences(records)
    for name in measured(records):
        lines = np.array([curves(r, name) for r in records])  # [trainings, 2, steps]
        for line in lines[:, 0]:
            top.plot(n, line, color=COLORS_OF[name], **SEED)
        mean, shuffled = lines.mean(0)
        top.plot(n, mean, color=COLORS_OF[name], label=QUANTITIES[name], **EXACT)
        top.plot(n, shuffled, color=COLORS_OF[name], linestyle="--", linewidth=1.2, marker="")
        top.plot(n[:1], mean[:1], color=COLORS_OF[name], marker="o", markerfacecolor="white", linestyle="none")
    top.plot([], [], color=GRAY, linestyle="--", marker="", label="control: of another task")
    top.plot([], [], color=GRAY, marker="o", markerfacecolor="white", linestyle="none", label="control: random weights")
    top.set(ylabel="R² on new tasks")
    top.axhline(0, color=GRAY, linestyle=":", linewidth=0.8, marker="")
    gaps = np.array([[step["gap"] for step in r["steps"]] for r in records])
    for line in gaps:
        bottom.plot(n, line, color=BLUE, **SEED)
    bottom.plot(n, gaps.mean(0), color=BLUE, label="model", **EXACT)
    majority = float(np.mean([r["majority"] for r in records]))
    bottom.axhline(majority, color=GRAY, linestyle="--", linewidth=1.2, marker="", label="majority of the demonstrations")
    for r in records:
        if (k := before_jump(r)) is not None:
            for axis in (top, bottom):
                axis.axvline(n[k], color=GRAY, linestyle="-.", linewidth=0.8, marker="")
    bottom.plot([], [], color=GRAY, linestyle="-.", linewidth=0.8, marker="", label="last evaluation before the jump")
    bottom.set(xlabel="training sequences", ylabel="normalized optimality gap", ylim=(0, None))
    bottom.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    for axis in (top, bottom):
        legend_below(axis, ncols=2)
    figure.set_label(
        "How well probes read each quantity, over training sequences, with permuted targets dashed; below, the gap of the model."
    )
    return figure


def _layers(records: list[dict]) -> Figure:
    """Mean R² by layer and evaluation, one panel for each quantity."""
    names = measured(records)
    figure, axes = panel_grid(len(names), 2.8, ylabel="layer (0: embeddings)", sharey=True)
    n, image = _sequences(records), None
    for axis, name in zip(axes, names, strict=False):
        r2 = np.mean([[step["probes"][name]["r2"] for step in r["steps"]] for r in records], axis=0)  # [steps, layers]
        image = axis.pcolormesh(n, np.arange(r2.shape[1]), np.clip(r2.T, 0, 1), vmin=0, vmax=1, shading="nearest")
        axis.set(title=QUANTITIES[name], xlabel="training sequences", yticks=range(r2.shape[1]))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.grid(False)
    figure.colorbar(image, ax=axes, label="R² on new tasks")
    figure.set_label("How well probes read each quantity, over layers: a line for each evaluation, a panel for each quantity.")
    return figure
