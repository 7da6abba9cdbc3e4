r"""Does a fine-tuned language model work as the theory says: does it represent Q*, whose errors does it share, do names matter?

    lindm run mechanism --preset quick      (a tiny model)
    lindm run mechanism --preset full       SmolLM2-135M
    lindm verify --only probe implied-q invariance

The residual stream is read at the token before each action of the query episodes of new tasks.

    probe       Ridge regressions of Q*(h, .), of the advantage Q* - max Q* and of the belief on the residual stream, one for each
                layer: before and after fine-tuning, for the same architecture with random weights (untrained), and with the
                targets permuted over the tasks (shuffled). Values are squared errors on new tasks divided by those of the mean
                of the stage: 1 means that nothing is explained, and differences between stages do not count.
    implied-q   The logits of the actions are compared with Q*, and their errors with the errors of two estimates from the same
                demonstrations: ridge (LSVI) and the theory's linear attention layer, trained on other tasks. All are centered
                over the actions of a state and scaled to Q* by one factor each.
    invariance  The same episodes with states and actions renamed at random: is the decision the same action?

There are two environments: `mdp`, with a new task in each text (only the demonstrations say something about Q*), and the tiger
problem of Kaelbling, Littman and Cassandra (1998), one problem with a hidden state, where the belief is a known function of
the history.

The unit is the task, or the episode of the tiger problem; one model is trained in each environment.

Expected in the quick preset: after fine-tuning the belief can be read from the stream (R² about 0.8, 0.6 before), and more
decisions survive renaming than before. The value probes and implied-q show little after so few steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.datasets import Dataset, DatasetConfig
from lindm.datasets.columns import Episode
from lindm.evaluation import policies
from lindm.evaluation.compare import read_tasks
from lindm.evaluation.environments import double_precision
from lindm.families.registry import NamedProblem
from lindm.families.suites import Suite
from lindm.text import Document, Step
from lindm.types import POMDP
from lindm_experiments.harness.config import check_counts
from lindm_experiments.harness.figures import COLORS, GRAY, MARKERS, WIDTH, panel_grid
from lindm_experiments.harness.statistics import mean_ci
from lindm_experiments.harness.unfinished import point_directory
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_experiments.lib import language_models
from lindm_experiments.lib.probes import ProbedModel, Queries, centered, probe, read_queries

PROBLEMS = ("mdp", "tiger")
DEMOS = {"mdp": 2, "tiger": 3}
NOISE = 0.2  # random actions in the tiger's demonstrations


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 1
    """number of trainings in each environment"""
    base_seed: int = 930_000
    model: str = "models/SmolLM2-135M-Instruct"
    """directory of a model, or tiny"""
    mdp: int = 8
    """horizon of the MDPs"""
    tiger: int = 5
    """horizon of the tiger problem"""
    tasks: int = 60
    """number of new tasks to test on"""
    probe: int = 200
    """number of tasks to which probes are fitted"""
    renamings: int = 2
    """number of random renamings of each task"""
    train: int = 256
    """number of tasks to fine-tune on"""
    steps: int = 60
    batch: int = 2
    rate: float = 5e-4

    def __post_init__(self):
        check_counts(self, "seeds", "mdp", "tiger", "tasks", "renamings", "train", "steps", "batch")
        check_counts(self, "probe", least=8)


FULL = Config()
QUICK = Config(
    model=language_models.TINY, mdp=3, tiger=3, train=512, steps=60, batch=8, rate=2e-3, tasks=50, probe=100, renamings=1
)
SMOKE = Config(model=language_models.TINY, mdp=2, tiger=2, train=16, steps=2, batch=8, tasks=4, probe=8, renamings=1)


def points(cfg: Config) -> list[dict]:
    return [{"problem": problem, "seed": seed} for seed in range(cfg.seeds) for problem in PROBLEMS]


def tiger(horizon: int) -> POMDP:
    """Listen (-1, right with probability 0.85) or open a door: 10, or -100 where the tiger is, and it starts anew."""
    P = np.full((1, 2, 3, 2), 0.5)
    P[0, :, 0] = np.eye(2)
    O = np.full((1, 3, 2, 2), 0.5)
    O[0, 0] = [[0.85, 0.15], [0.15, 0.85]]
    r = np.array([[-1.0, -100.0, 10.0], [-1.0, 10.0, -100.0]])
    return POMDP(P=P, O=O, r=np.tile(r, (horizon, 1, 1)), rho=np.full(2, 0.5))  # pyright: ignore


def measure(cfg: Config, point: dict) -> dict:
    language_models.check_model(cfg.model)
    name, seed = point["problem"], cfg.base_seed + 3 * point["seed"]
    H, K = getattr(cfg, name), DEMOS[name]
    with point_directory() as work, language_models.quiet_single_precision():
        source = language_models.suite_at_horizon("mdp", H) if name == "mdp" else NamedProblem(problem=tiger(H))
        demonstrations = {"demos": K} | ({} if name == "mdp" else {"behavior": "epsilon", "epsilon": NOISE})
        parts = (("train", cfg.train, 0), ("probe", cfg.probe, 1), ("new", cfg.tasks, 2))
        data = {
            part: language_models.make_data(work / part, source, DatasetConfig(tasks=n, seed=seed + i, **demonstrations))
            for part, n, i in parts
        }
        training = {"steps": cfg.steps, "batch": cfg.batch, "learning_rate": cfg.rate, "seed": point["seed"]}
        config = language_models.sft_config(cfg.model, data["train"], work / "run", **training)
        before, after = language_models.base_model(config, work / "before"), language_models.fine_tune(config) / "model"
        shown = frozenset({"state", "reward"} if name == "mdp" else {"observation"})
        known, new = read_queries(data["probe"], shown), read_queries(data["new"], shown)
        models = {"before": ProbedModel.load(before), "after": ProbedModel.load(after)}
        if cfg.model != language_models.TINY:
            models["untrained"] = ProbedModel.load(before, untrained=seed)
        streams = {name: (model.stream(known), model.stream(new)) for name, model in models.items()}
        record: dict[str, Any] = {"probes": probes(streams, known, new, seed, tiger(H) if name == "tiger" else None)}
        if name == "mdp":
            logits = {which: models[which].logits(streams[which][1]) for which in ("before", "after")}
            record["implied"] = implied(
                logits, new, data["new"], source, DatasetConfig(tasks=cfg.tasks, seed=seed + 2, **demonstrations)
            )
            record["same"] = {which: same_decisions(models[which], logits[which], new, cfg.renamings, seed) for which in logits}
    return record


# --- probes -------------------------------------------------------------------------------------------------------------------


def beliefs(problem: POMDP, rows: Sequence[Episode]) -> np.ndarray:
    """Beliefs P(state | earlier actions and observations) [n, H, S]."""
    P, O, rho = (np.asarray(x) for x in (problem.P, problem.O, problem.rho))
    episodes = []
    for row in rows:
        assert row.observation is not None, "a POMDP's episodes have observations"
        b, stages = rho, [rho]
        for a, o in zip(row.action[:-1], row.observation[:-1], strict=True):
            b = (b @ P[0, :, a]) * O[0, a, :, o]
            b = b / b.sum()
            stages.append(b)
        episodes.append(stages)
    return np.array(episodes)


def probes(
    streams: dict[str, tuple[np.ndarray, np.ndarray]], known: Queries, new: Queries, seed: int, problem: POMDP | None
) -> dict[str, Any]:
    """`probe` of each target and model; as a control, also with the targets permuted over the tasks (shuffled)."""
    targets = {
        "q": (known.Q, new.Q),
        "advantage": tuple(Q - Q.max(-1, keepdims=True) for Q in (known.Q, new.Q)),
    }
    if problem is not None:
        targets["belief"] = tuple(beliefs(problem, queries.rows)[..., :-1] for queries in (known, new))
    rng = np.random.default_rng(seed)
    order = [rng.permutation(len(queries.Q)) for queries in (known, new)]
    permuted = {f"{name} permuted": (Y[order[0]], Y_new[order[1]]) for name, (Y, Y_new) in targets.items()}
    results = {model: probe(*stream, targets | (permuted if model == "after" else {})) for model, stream in streams.items()}
    return {
        name: {model: results[model][name] for model in streams} | {"shuffled": results["after"][f"{name} permuted"]}
        for name in targets
    }


# --- implied Q, and names ---------------------------------------------------------------------------------------------------


def implied(logits: dict[str, np.ndarray], new: Queries, data: Path, source: Suite, config: DatasetConfig) -> dict[str, Any]:
    """For each task: correlation of the logits with Q*, and of their errors with the errors of the two estimates."""
    with double_precision():
        tasks = read_tasks(Dataset(data))
        estimators = {"ridge": policies.lsvi(), "layer": policies.layer(source, config)}
        tables = {name: estimator.action_values(tasks) for name, estimator in estimators.items()}
    states = np.array([row.state for row in new.rows])  # [n, H]
    n, H = states.shape
    at = (np.arange(n)[:, None], np.arange(H)[None], states)
    values = {model_name: centered(np.asarray(Q)[at]) for model_name, Q in tables.items()} | {
        k: centered(v) for k, v in logits.items()
    }
    Q = centered(new.Q)
    errors = {model_name: v * ((v * Q).sum() / (v * v).sum()) - Q for model_name, v in values.items()}

    def correlation(x: np.ndarray, y: np.ndarray) -> list[float]:
        """Correlation within each task; 0 where one of the two is constant."""
        top, bottom = (x * y).sum((1, 2)), np.sqrt((x**2).sum((1, 2)) * (y**2).sum((1, 2)))
        return np.round(np.divide(top, bottom, out=np.zeros(n), where=bottom > 0), 5).tolist()

    least = Q.max(-1, keepdims=True) - 1e-9
    best = least <= Q
    chosen = {model_name: v.argmax(-1) for model_name, v in values.items()}
    mistaken = {model_name: ~np.take_along_axis(best, a[..., None], -1)[..., 0] for model_name, a in chosen.items()}
    shared = {
        model_name: {
            other: [
                int((mistaken[model_name] & mistaken[other]).sum()),
                int((mistaken[model_name] & (chosen[model_name] == chosen[other])).sum()),
            ]
            for other in tables
        }
        for model_name in logits
    }
    return {
        "with_q": {model_name: correlation(v, Q) for model_name, v in values.items()},
        "mistakes_with": {
            model_name: {other: correlation(errors[model_name], errors[other]) for other in tables} for model_name in logits
        },
        "decisions": n * H,
        "mistakes": {model_name: int(m.sum()) for model_name, m in mistaken.items()},
        "shared": shared,  # of a model's mistakes: number where the estimate errs too, and where both take the same action
    }


def same_decisions(model: ProbedModel, logits: np.ndarray, new: Queries, times: int, seed: int) -> list[float]:
    """For each task, the share of decisions that stay the same action when states and actions are renamed at random."""
    rng = np.random.default_rng(seed)
    n, _, A = new.Q.shape
    S = 1 + max(step.state for one in new.documents for steps in (*one.demonstrations, one.query) for step in steps)
    same = np.zeros(n)
    for _ in range(times):
        names = [(rng.permutation(S), rng.permutation(A)) for _ in range(n)]
        documents = [_rename(one, *name) for one, name in zip(new.documents, names, strict=True)]
        labels = [[[int(a[x]) for x in row] for row in rows] for rows, (_, a) in zip(new.labels, names, strict=True)]
        other = model.logits(model.stream(Queries(documents, labels, new.Q, new.rows)))
        back = np.stack([x[:, a] for x, (_, a) in zip(other, names, strict=True)])
        same += (back.argmax(-1) == logits.argmax(-1)).mean(-1) / times
    return np.round(same, 5).tolist()


def _rename(document: Document, states: np.ndarray, actions: np.ndarray) -> Document:
    def steps(row: Sequence[Step]) -> tuple[Step, ...]:
        return tuple(replace(s, state=int(states[s.state]), action=int(actions[s.action])) for s in row)

    return Document(tuple(map(steps, document.demonstrations)), steps(document.query))


# --- verdicts and figures ----------------------------------------------------------------------------------------------------


def _joined(records: list[dict], problem: str, *path: str) -> np.ndarray:
    """Values of all tasks of an environment, over all training runs; empty where there are none."""
    values = []
    for record in records:
        if record["point"]["problem"] == problem:
            value = record
            for key in path:
                value = value[key]
            values.append(value)
    return np.concatenate(values) if values else np.zeros(0)


def check(records: list[dict]) -> list[Verdict]:
    def errors(problem: str, target: str, model: str, of: str = "errors") -> np.ndarray:
        return _joined(records, problem, "probes", target, model, of)

    def r_squared(problem: str, target: str) -> str:
        models = next(r for r in records if r["point"]["problem"] == problem)["probes"][target]
        return "R²: " + ", ".join(f"{model} {1 - np.mean(x['errors']):.2f} (layer {x['layer']})" for model, x in models.items())

    verdicts = [
        mean_verdict(id, errors("mdp", t, "before") - errors("mdp", t, "after"), figure="probe", note=r_squared("mdp", t))
        for id, t in (("probe", "advantage"), ("probe/q", "q"))
    ]
    verdicts.append(
        mean_verdict("probe/belief", errors("tiger", "belief", "after"), figure="probe", note=r_squared("tiger", "belief"))
    )
    # tasks differ in the size of Q*: the error on a task is compared with the error of the mean on it
    targets = (("mdp", "advantage"), ("mdp", "q"), ("tiger", "belief"))
    shuffled = [errors(w, t, "shuffled", "of_mean") - errors(w, t, "shuffled") for w, t in targets]
    verdicts.append(mean_verdict("probe/control", *shuffled, figure="probe"))
    of = next(r for r in records if r["point"]["problem"] == "mdp")["implied"]
    with_q = {model: np.mean(v) for model, v in of["with_q"].items()}
    note = ", ".join(f"{model} {v:.2f}" for model, v in with_q.items())
    verdicts.append(
        mean_verdict("implied-q", _joined(records, "mdp", "implied", "with_q", "after"), figure="implied-q", note=note)
    )
    layer, ridge = (_joined(records, "mdp", "implied", "mistakes_with", "after", other) for other in ("layer", "ridge"))
    n, shared = of["mistakes"]["after"], of["shared"]["after"]
    note = f"layer {layer.mean():.2f}, ridge {ridge.mean():.2f}; of {n} mistakes in {of['decisions']}, the same action: "
    note += ", ".join(f"{other} {same}" for other, (_, same) in shared.items())
    verdicts.append(mean_verdict("implied-q/mistakes", layer - ridge, figure="implied-q", note=note))
    after, before = (_joined(records, "mdp", "same", model) for model in ("after", "before"))
    note = f"before {before.mean():.1%}, after {after.mean():.1%}"
    verdicts.append(mean_verdict("invariance", after, figure="implied-q", note=note))
    verdicts.append(mean_verdict("invariance/gain", after - before, figure="implied-q", note=note))
    return verdicts


LABELS = {
    "after": "fine-tuned",
    "before": "base model",
    "untrained": "random weights",
    "shuffled": "permuted targets",
    "ridge": "ridge regression",
    "layer": "attention layer",
    "q": "Q*",
}


def plot(records: list[dict]) -> dict[str, Figure]:
    return {"probe": _profiles(records), "implied-q": _implied(records)}


def _profiles(records: list[dict]) -> Figure:
    """R² of each layer."""
    panels = (("mdp", "advantage"), ("mdp", "q"), ("tiger", "belief"), ("tiger", "advantage"))
    figure, axes = panel_grid(len(panels), 2.8, ylabel="R² on new tasks, beyond the stage's mean", sharey=True)
    for axis, (problem, target) in zip(axes, panels, strict=True):
        for record in (r for r in records if r["point"]["problem"] == problem):
            for (model_name, result), color, marker in zip(record["probes"][target].items(), COLORS, MARKERS, strict=False):
                shown = 1 - np.array(result["profile"])
                axis.plot(
                    np.maximum(shown, -0.2), color=color, marker=marker, markersize=3, linewidth=1.2, label=LABELS[model_name]
                )
        axis.axhline(0, color=GRAY, linestyle=":", marker="")
        axis.set(xlabel="layer", title=f"{problem}: {LABELS.get(target, target)}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.set_label(
        "Variance explained by linear probes over the layers, of the fine-tuned and of the base model: more in the tiger "
        "problem than in MDPs. Permuted targets give nothing."
    )
    return figure


def _implied(records: list[dict]) -> Figure:
    figure, axes = pyplot.subplots(1, 3, figsize=(WIDTH, 3.6), width_ratios=(4, 2, 2))
    with_q = {
        model_name: _joined(records, "mdp", "implied", "with_q", model_name)
        for model_name in ("before", "after", "ridge", "layer")
    }
    errors = {other: _joined(records, "mdp", "implied", "mistakes_with", "after", other) for other in ("ridge", "layer")}
    same = {model_name: _joined(records, "mdp", "same", model_name) for model_name in ("before", "after")}
    titles = ("correlation with Q*", "correlation of errors with those of", "same decision after renaming")
    for axis, values, title in zip(axes, (with_q, errors, same), titles, strict=True):
        for i, (_, v) in enumerate(values.items()):
            mean, (low, high) = mean_ci(v)
            x = i + np.linspace(-0.15, 0.15, len(v))
            axis.plot(x, v, color=GRAY, markersize=2, marker=".", linestyle="")
            axis.errorbar([i], [mean], [[mean - low], [high - mean]], color=COLORS[0], marker="o", capsize=3)
        axis.set_xticks(range(len(values)), [LABELS[model_name].replace(" ", "\n") for model_name in values], fontsize=8)
        axis.set(title=title, xlim=(-0.5, len(values) - 0.5))
        axis.axhline(0, color="#444444", linewidth=0.8, marker="")
    axes[0].set_ylabel("correlation, or share of decisions")
    figure.set_label(
        "Every dot is a task, with means and 95 % intervals: correlations of implied Q values with Q*, of their errors with "
        "those of ridge regression and of the attention layer, and shares of equal decisions after renaming."
    )
    return figure
