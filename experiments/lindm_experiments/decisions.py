"""Does fine-tuning on the oracle's decisions close the optimality gap of a language model, and where does it stop helping?

    lindm run decisions --preset quick      (a tiny model)
    lindm run decisions --preset full       SmolLM2-135M, hours
    lindm verify --only sft-beats-icl sft-beats-cloning sft-near-bayes horizon partial-observation ambiguity ood format

A cell is a suite at a horizon. In each cell a model is fine-tuned (`lindm sft`) on tasks of the suite. Then the fine-tuned
model, the base model (ICL: it only has the demonstrations in its context) and the classical policies of `lindm eval` act in the
same new tasks, in and out of distribution. The demonstrations are the oracle's, as in [ZAS]. Values are normalized optimality
gaps of each task, (V* - V^pi) / (V* - V^random). They are exact, except for policies that depend on the history of an MDP
(language models, `bayes`, `bayes-demo`): for these, the histories come from sampled episodes, the same for all policies. Models
are also tested in text formats that were not trained: other symbols in the same places, and sentences.

The yardstick is the best use of a context: `bayes` plans with the posterior over the suite's tasks given the transitions and
rewards that the text shows, and `bayes-demo` also uses the oracle's actions as evidence. If the state is hidden, the text has
no rewards, and `bayes` knows little. The gap of `bayes-demo` is the part of a loss that is due to what the context does not
contain; the rest of a policy's gap is the reader's part. `bayes-demo` is an estimate from a sample of the posterior, whose
effective sample sizes are in the table; if they are small, a reader can be better. It takes minutes
per task in POMDPs of horizon 8, where it is left out.

There are five demonstrations if the state is hidden, and two if it is seen, since five of the oracle show nearly every state.
An ambiguous task has 6^(H-1) histories at its last stage, and a policy's value needs all of them, so its horizons end at 4.

Every training of every cell has its own tasks, for training and for each split. The tasks of one training are a cluster:
intervals cover the variation between trainings if a cell has several, and are about its one model if it has one. All cells are
trained once before any is trained again.

The quick preset trains a tiny, randomly initialized model in one cell: a bandit (`pomdp` at horizon 1), whose best arm the
demonstrations show. Expected: a gap near zero for SFT and near one for ICL. Claims that need other cells are undecided.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lindm.choices import Split
from lindm.datasets import DatasetConfig
from lindm.evaluation.compare import PolicyResult, evaluate
from lindm.llm.named_policies import PoliciesByName
from lindm_experiments.harness.claims import get_claim
from lindm_experiments.harness.config import check_counts, check_rising
from lindm_experiments.harness.figures import COLORS, GRAY, WIDTH, panel_grid
from lindm_experiments.harness.statistics import Decision, clustered, clustered_ci
from lindm_experiments.harness.unfinished import point_directory
from lindm_experiments.harness.verdicts import EFFECTIVE, Verdict, to_verdict, undecided
from lindm_experiments.lib import language_models

SUITES = ("mdp", "pomdp", "apomdp")
MAX_HISTORIES = 256  # largest number of histories at the last stage of a task that is evaluated exactly
EPISODES = 4  # sampled of a task with more
DEMOS = {"mdp": 2, "pomdp": 5, "apomdp": 5}
YARDSTICK = "bayes-demo"
PLANNED = {"pomdp": 6}  # the longest horizon with the Bayes policies
SEEN = ("oracle", "random", "bc", "bayes", YARDSTICK, "certainty-equivalence", "lsvi", "pevi", "layer")
HIDDEN = ("oracle", "random", "bc", "bayes", YARDSTICK, "certainty-equivalence", "qmdp")
RENAMED = {"name": "renamed", "episode": "#", "closing": "\n", "models": "{}", "states": ["k", "m", "n", "p", "q"]} | {
    "step": ["\n", "{state}", "{action}", "{model}", "{observation}", ":{reward}"],
    "actions": [" X", " Y", " Z"],
    "observations": ["+", "-"],
}
FORMATS = {"renamed": "renamed symbols", "readable": "sentences"}  # name in the records -> label


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 3
    """number of trainings of a cell, each on its own tasks"""
    base_seed: int = 910_000
    model: str = "models/SmolLM2-135M-Instruct"
    """directory of a model, or tiny"""
    mdp: tuple[int, ...] = (4, 8, 16)
    """horizons of the suite mdp"""
    pomdp: tuple[int, ...] = (4, 6, 8)
    apomdp: tuple[int, ...] = (2, 3, 4)
    tasks: int = 50
    """number of new tasks of each cell and split"""
    train: int = 256
    """number of tasks to train on"""
    steps: int = 60
    batch: int = 2
    rate: float = 5e-4
    """peak learning rate"""
    more: bool = True
    """also measure other formats, at the shortest horizons"""

    def __post_init__(self):
        check_counts(self, "seeds", "tasks", "train", "steps", "batch")
        check_rising(self, *SUITES, length=0)
        if not any(getattr(self, name) for name in SUITES):
            raise ValueError("mdp, pomdp, apomdp must not all be empty")
        branches = (suite_of_models := language_models.suite_at_horizon("apomdp", 1)).models * suite_of_models.observations
        if any(branches ** (h - 1) > MAX_HISTORIES for h in self.apomdp):
            raise ValueError(
                f"apomdp must be horizons with at most {MAX_HISTORIES} histories at the last stage; got {self.apomdp}"
            )
        if self.more and self.model == language_models.TINY:
            raise ValueError("more must be False for a tiny model, whose vocabulary is that of one format; got True")


FULL = Config()
# Horizon 1 is a bandit whose best arm the demonstrations name: a tiny model learns to look it up in 100 steps, where an
# observation before the decision takes ten times as many.
_TINY = Config(seeds=1, model=language_models.TINY, mdp=(), pomdp=(1,), apomdp=(), batch=8, rate=1e-3, more=False)
QUICK = replace(_TINY, train=768, steps=96)
SMOKE = replace(_TINY, pomdp=(2,), tasks=4, train=32, steps=3, base_seed=7)


def points(cfg: Config) -> list[dict]:
    """The cells of every training, the middle horizons first: most claims need one cell of every suite."""
    cells = [(h != hs[len(hs) // 2], name, h) for name in SUITES if (hs := getattr(cfg, name)) for h in hs]
    cells.sort(key=lambda cell: cell[0])
    return [{"suite": name, "horizon": h, "seed": seed} for seed in range(cfg.seeds) for _, name, h in cells]


def seeds_of(cfg: Config, point: dict) -> dict[str, int]:
    """The seeds of the tasks, which no other point has: tasks of one seed have the same kernels at every horizon."""
    parts = ("train", "id", "ood")
    first = cfg.base_seed + len(parts) * points(cfg).index(point)
    return {part: first + i for i, part in enumerate(parts)}


def measure(cfg: Config, point: dict) -> dict:
    language_models.check_model(cfg.model)
    name, horizon, demos = point["suite"], point["horizon"], DEMOS[point["suite"]]
    seeds = seeds_of(cfg, point)
    with point_directory() as work, language_models.quiet_single_precision():
        data = language_models.make_data(
            work / "train",
            language_models.suite_at_horizon(name, horizon),
            DatasetConfig(tasks=cfg.train, demos=demos, seed=seeds["train"]),
        )
        training = {"steps": cfg.steps, "batch": cfg.batch, "learning_rate": cfg.rate, "seed": seeds["train"]}
        config = language_models.sft_config(cfg.model, data, work / "run", **training)
        models = {"icl": language_models.base_model(config, work / "before"), "sft": language_models.fine_tune(config)}

        def evaluate_on(split: Split, policies: Sequence[str], template: str | None = None) -> dict[str, dict]:
            tasks = DatasetConfig(tasks=cfg.tasks, demos=demos, seed=seeds[split])
            source = language_models.suite_at_horizon(name, horizon, split)
            known = {policy: policy for policy in policies}
            known |= {f"{'base' if kind == 'icl' else kind}:{path}": kind for kind, path in models.items()}
            named = PoliciesByName(tuple(known), source, tasks, template=template)
            limits = {"episodes": EPISODES, "max_histories": MAX_HISTORIES}
            results = evaluate(source, named, dataset=tasks, data=work / split, **limits)
            return {known[result.policy]: _kept(result) for result in results}

        policies = SEEN if name == "mdp" else HIDDEN
        if horizon > PLANNED.get(name, horizon):
            policies = [policy for policy in policies if not policy.startswith("bayes")]
        rows = {"id": evaluate_on("id", policies), "ood": evaluate_on("ood", policies)}
        if cfg.more and horizon == getattr(cfg, name)[0]:
            (work / "renamed.json").write_text(json.dumps(RENAMED))
            paths = {"renamed": str(work / "renamed.json"), "readable": "readable"}
            rows |= {form: evaluate_on("id", (), paths[form]) for form in FORMATS}
    return {"rows": rows}


def _kept(result: PolicyResult) -> dict:
    kept: dict = {key: getattr(result, key) for key in ("gap_of_value", "action_agreement", "invalid")}
    kept = {key: value if value is None else round(value, 6) for key, value in kept.items()}
    effective = result.effective_samples and [round(n, 2) for n in result.effective_samples]
    gaps = [round(gap, 6) for gap in result.gaps if gap is not None]
    return {"gaps": gaps, "effective_samples": effective, "method": result.method} | kept


# --- verdicts and figures ----------------------------------------------------------------------------------------------------


def gaps(
    records: list[dict], suite: str, factors: Mapping[str, float], *, horizon: int | None = None, part: str = "id"
) -> list[list[np.ndarray]]:
    """Sums of policies' gaps times their factors: for each horizon, for each training, one value of each task.

    Args:
      factors: of each policy. Without a trained one, all tasks of a horizon are one cluster.
      part: a split or a format.
    """
    strata = []
    for h in horizons(records, suite) if horizon is None else [horizon]:
        found = sorted((r for r in records if _cell(r) == (suite, h)), key=lambda r: r["point"]["seed"])
        rows = [r["rows"][part] for r in found if factors.keys() <= r["rows"].get(part, {}).keys()]
        clusters = [sum(f * np.array(row[policy]["gaps"]) for policy, f in factors.items()) for row in rows]
        if clusters:
            strata.append(clusters if "sft" in factors else [np.concatenate(clusters)])
    return strata


def _cell(record: dict) -> tuple[str, int]:
    return record["point"]["suite"], record["point"]["horizon"]


def horizons(records: list[dict], suite: str) -> list[int]:
    return sorted({h for name, h in map(_cell, records) if name == suite})


def suites_of(records: list[dict]) -> list[str]:
    return [name for name in SUITES if horizons(records, name)]


def _decide(id: str, strata: list[list[np.ndarray]], weights: Sequence[float] | None = None) -> Decision:
    claim = get_claim(id)
    return clustered(strata, claim.lo, claim.hi, weights=weights, min_seeds=claim.min_seeds)


def check(records: list[dict]) -> list[Verdict]:
    known = suites_of(records)
    advantage = {"icl": 1.0, "sft": -1.0}
    single = any(len(clusters) == 1 for name in known for clusters in gaps(records, name, advantage))

    def verdict(id: str, decisions: Sequence[Decision], figure: str, about: str, means: Mapping[str, Sequence[float]]) -> Verdict:
        """The means of the note: gaps of policies, or differences of gaps."""
        said = ", ".join(f"{name} {' / '.join(f'{v:.3f}' for v in values)}".strip() for name, values in means.items())
        note = f"normalized optimality gap, {about}: {said}{'; cells of one training' if single else ''}"
        return to_verdict(id, *decisions, predicted=get_claim(id).predicted, figure=figure, note=note)

    def against(id: str, others: Sequence[str], share: float = 1.0, part: str = "id", figure: str = "gaps") -> Verdict:
        """Is the gap of SFT, less a share of the gap of each of the others, in the band of the claim on every suite?"""
        decisions, means = [], {}
        for n, other in [(n, other) for n in known for other in others]:
            if not (strata := gaps(records, n, {"sft": 1, other: -share}, part=part)):
                return undecided(id, f"{other} was not measured at horizon {', '.join(map(str, horizons(records, n)))} of {n}")
            decisions.append(_decide(id, strata))
            both = [gaps(records, n, {"sft": own, other: 1 - own}, part=part) for own in (1, 0)]  # at the decision's horizons
            means[n if len(others) == 1 else f"{n} {other}"] = [clustered_ci(strata)[0] for strata in both]
        return verdict(id, decisions, figure, f"SFT / {' or '.join(others)}", means)

    def near_bayes() -> Verdict:
        sizes = [r["rows"]["id"][YARDSTICK]["effective_samples"][1] for r in records if YARDSTICK in r["rows"]["id"]]
        if sizes and min(sizes) < EFFECTIVE:
            few = f"{min(sizes):.1f} effective samples, median of a cell"
            return undecided("sft-near-bayes", f"{YARDSTICK} was not measured well: {few}")
        return against("sft-near-bayes", [YARDSTICK], figure="reader")

    def horizon() -> Verdict:
        several = {n: hs for n in known if len(hs := horizons(records, n)) > 1}
        ends = {n: [gaps(records, n, advantage, horizon=hs[i]) for i in (0, -1)] for n, hs in several.items()}
        if not ends:
            return undecided("horizon", "one horizon was measured")
        means = {n: [clustered_ci(strata)[0] for strata in both] for n, both in ends.items()}
        decisions = [_decide("horizon", [*long, *short], (1, -1)) for short, long in ends.values()]
        return verdict("horizon", decisions, "gaps", "ICL - SFT at the shortest / longest horizon", means)

    def harder_than(id: str, easier: str, harder: str) -> Verdict:
        if easier not in known or harder not in known:
            return undecided(id, f"{easier} and {harder} were not both measured")
        less, more = (gaps(records, n, advantage) for n in (easier, harder))
        decision = _decide(id, [*more, *less], [1 / len(more)] * len(more) + [-1 / len(less)] * len(less))
        means = {"": [clustered_ci(strata)[0] for strata in (less, more)]}
        return verdict(id, [decision], "gaps", f"ICL - SFT, {easier} / {harder}", means)

    def formats() -> Verdict:
        cells = [(n, form) for n in known for form in FORMATS if gaps(records, n, {"sft": 1}, part=form)]
        if not cells:
            return undecided("format", "one format was measured")
        decisions = [_decide("format", gaps(records, n, {"sft": 1, "icl": -0.5}, part=form)) for n, form in cells]
        pairs = {f"{n} {form}": [gaps(records, n, {p: 1}, part=form) for p in ("sft", "icl")] for n, form in cells}
        means = {name: [clustered_ci(strata)[0] for strata in pair] for name, pair in pairs.items()}
        return verdict("format", decisions, "formats", "SFT / ICL", means)

    return [
        against("sft-beats-icl", ["icl"], 0.25),
        against("sft-beats-cloning", ["bc", "bayes"]),
        near_bayes(),
        horizon(),
        harder_than("partial-observation", "mdp", "pomdp"),
        harder_than("ambiguity", "pomdp", "apomdp"),
        against("ood", ["icl"], 0.5, "ood"),
        formats(),
    ]


def table(records: list[dict]) -> list[dict]:
    """A row for every cell, part and policy; 95 % intervals are over trainings and tasks.

    A gap is the sum of `context`, the gap of the yardstick, and `reader`, the mean of the differences on the same tasks.
    `effective_least` and `effective`: effective sample sizes of a sampled posterior, the lowest and the median of the tasks.
    """
    rows = []
    for suite in suites_of(records):
        for horizon in horizons(records, suite):
            found = [r["rows"] for r in records if _cell(r) == (suite, horizon)]
            parts = list(dict.fromkeys((part, policy) for row in found for part in row for policy in row[part]))
            for part, policy in parts:
                results = [row[part][policy] for row in found if policy in row.get(part, {})]
                row = {"suite": suite, "horizon": horizon, "part": part, "policy": policy}
                row |= _gap_columns(records, suite, horizon, part, policy)
                row |= {"n": sum(len(r["gaps"]) for r in results), "trainings": len(results)}
                row |= {key: _mean_known(r[key] for r in results) for key in ("gap_of_value", "action_agreement", "invalid")}
                least, typical = zip(*(r.get("effective_samples") or (np.inf, None) for r in results), strict=True)
                row |= {"effective_least": min(least) if any(typical) else None, "effective": _mean_known(typical)}
                rows.append(row | {"method": " and ".join(dict.fromkeys(r["method"] for r in results))})
    return rows


def _gap_columns(records: list[dict], suite: str, horizon: int, part: str, policy: str) -> dict[str, float | None]:
    sums: dict[str, dict[str, float]] = {"gap": {policy: 1}, "context": {YARDSTICK: 1}}
    sums |= {} if policy == YARDSTICK else {"reader": {policy: 1, YARDSTICK: -1}}
    columns: dict[str, float | None] = dict.fromkeys(("gap", "low", "high", "context", "reader", "reader_low", "reader_high"))
    for name, factors in sums.items():
        if strata := gaps(records, suite, factors, horizon=horizon, part=part):
            columns[name], ends = clustered_ci(strata)
            if name != "context":
                columns |= dict(zip(("low", "high") if name == "gap" else ("reader_low", "reader_high"), ends, strict=True))
    return columns


def _mean_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


LINES = {  # policy -> label, color, marker
    "icl": ("base model (ICL)", COLORS[1], "s"),
    "sft": ("fine-tuned (SFT)", COLORS[0], "o"),
    "bc": ("behavior cloning (bc)", COLORS[2], "^"),
    "bayes": ("from transitions (bayes)", "#8B4513", "<"),
    YARDSTICK: ("with actions (bayes-demo)", "#444444", "X"),
    "certainty-equivalence": ("certainty equivalence", COLORS[3], "D"),
    "lsvi": ("LSVI", COLORS[4], "v"),
    "qmdp": ("QMDP (model known)", COLORS[5], "P"),
    "random": ("uniformly random policy", GRAY, ""),
}


def plot(records: list[dict]) -> dict[str, Figure]:
    ticks = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
    alone = {policy: {policy: 1.0} for policy in LINES if policy != "bayes"}  # in the other figure
    figures = {"gaps": _over_horizons(records, alone, "normalized optimality gap", ticks, linthresh=0.02)}
    if any(YARDSTICK in r["rows"]["id"] for r in records):
        beyond = {policy: {policy: 1.0, YARDSTICK: -1.0} for policy in ("icl", "sft", "bc", "bayes")}
        ticks = (-0.5, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1)
        figures["reader"] = _over_horizons(records, beyond, f"normalized optimality gap - {YARDSTICK}'s", ticks, linthresh=0.1)
    if any("renamed" in r["rows"] for r in records):
        figures["formats"] = _in_formats(records)
    return figures


def _over_horizons(
    records: list[dict], curves: Mapping[str, Mapping[str, float]], ylabel: str, ticks: Sequence[float], *, linthresh: float
) -> Figure:
    """Curves over the horizon (policy -> factors of `gaps`): a row for each suite, a column for each split."""
    known, splits = suites_of(records), {"id": "in distribution", "ood": "out of distribution"}
    figure, axes = panel_grid(2 * len(known), max(2.6, 4.4 / len(known)), ylabel=ylabel, sharey=True, sharex="row")
    for axis, (suite, split) in zip(axes, itertools.product(known, splits), strict=True):
        at = horizons(records, suite)
        for shift, (policy, factors) in enumerate(curves.items()):
            if policy == "random":  # by definition
                axis.axhline(1, color=GRAY, linestyle="--", linewidth=1.0, marker="", label=LINES[policy][0])
                continue
            strata = [gaps(records, suite, factors, horizon=h, part=split) for h in at]
            if all(strata):
                _errorbars(axis, np.arange(len(at)) + 0.05 * (shift - len(curves) / 2), strata, policy, linewidth=1.2)
        axis.axhline(0, color="#444444", linewidth=0.8, marker="")
        axis.set_xticks(range(len(at)), [str(h) for h in at])
        axis.set(title=f"{suite}, {splits[split]}", xlabel="horizon" if suite == known[-1] else "")
    axes[0].set_yscale("symlog", linthresh=linthresh)
    axes[0].set_yticks(ticks, map(str, ticks))
    axes[0].set_ylim(min(ticks[0] - 0.01, *(a.dataLim.y0 for a in axes)), max(1.6, *(1.2 * a.dataLim.y1 for a in axes)))
    _legend(figure, axes)
    figure.set_label("Gaps with 95 % intervals of each policy, for each suite.")
    return figure


def _errorbars(
    axis: Axes, x: Sequence[float] | np.ndarray, strata: list[list[list[np.ndarray]]], policy: str, **style: Any
) -> None:
    label, color, marker = LINES[policy]
    means, ends = zip(*(clustered_ci(s) for s in strata), strict=True)
    error = [m - low for m, (low, _) in zip(means, ends, strict=True)]
    axis.errorbar(x, means, [error, error], color=color, marker=marker, capsize=2, label=label, **style)


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8)


def _in_formats(records: list[dict]) -> Figure:
    """Gaps in formats that were not trained."""
    known = suites_of(records)
    groups = {"id": "training format"} | FORMATS
    figure, axes = pyplot.subplots(1, len(known), figsize=(WIDTH, 3.4), sharey=True, squeeze=False)
    for axis, suite in zip(axes[0], known, strict=True):
        for x, part in enumerate(groups):
            for i, policy in enumerate(("sft", "icl")):
                if strata := gaps(records, suite, {policy: 1.0}, horizon=horizons(records, suite)[0], part=part):
                    _errorbars(axis, [x + 0.16 * (i - 0.5)], [strata], policy, linestyle="none")
        axis.set_xticks(range(len(groups)), [name.replace(" ", "\n") for name in groups.values()], fontsize=8)
        axis.set_title(suite)
        axis.axhline(0, color="#444444", linewidth=0.8, marker="")
    axes[0][0].set_ylabel("normalized optimality gap")
    _legend(figure, axes[0])
    figure.set_label("Gaps with 95 % intervals of each policy, for each suite.")
    return figure
