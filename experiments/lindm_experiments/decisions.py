"""Does fine-tuning on the oracle's decisions close the optimality gap of a language model, and where does it stop helping?

    lindm run decisions --preset quick      (a tiny model)
    lindm run decisions --preset full       SmolLM2-135M, hours
    lindm verify --only sft-beats-icl sft-beats-cloning horizon partial-observation ambiguity ood format behavior-context

A cell is a suite at a horizon. In each cell a model is fine-tuned (`lindm sft`) on tasks of the suite. Then the fine-tuned model,
the base model (ICL: it only has the demonstrations in its context) and the classical policies of `lindm eval` act in the same new
tasks, in and out of distribution. Values are normalized optimality gaps, (V* - V^pi) / (V* - V^random), of each task. They
are exact, except for MDPs, where a language model is a policy over histories: there the histories are those of sampled
episodes, the same for all language models.

    oracle demonstrations      the demonstrations in the context are the oracle's, as in [ZAS]
    worse demonstrations       every second action of the demonstrations is random, and their rewards are shown; the training
                               labels are the oracle's and are not part of the text
    another format             tested in text formats that were not trained: other symbols in the same places, and sentences

Number of demonstrations: five where the state is hidden, two where it is seen, because five of the oracle's show nearly every
state and leave nothing to gain. An ambiguous task has 6^(H-1) histories at its last stage and the value of a policy needs all of
them, so the horizons end at 4 there.

The unit is the task: one model is trained in each cell (seeds = 1), so an interval says how well the gap of *this* model is
known. How gaps vary from one training run to the next takes more seeds.

The quick preset trains a tiny, randomly initialized model in one cell: a bandit (`pomdp` at horizon 1), whose best arm the
demonstrations show. Expected there: a gap near zero for SFT and near one for ICL. Claims that need other cells are undecided.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.datasets import DatasetConfig
from lindm.evaluation.compare import PolicyResult, evaluate
from lindm.io.temporaries import scratch_directory
from lindm.llm.named_policies import PoliciesByName
from lindm_experiments.harness.config import check_counts, check_rising
from lindm_experiments.harness.figures import COLORS, GRAY, MARKERS
from lindm_experiments.harness.statistics import mean_ci
from lindm_experiments.harness.verdicts import Verdict, mean_verdict, undecided
from lindm_experiments.lib import language_models

SUITES = ("mdp", "pomdp", "apomdp")
MAX_HISTORIES = 256  # largest number of histories at the last stage of a task that is evaluated exactly
EPISODES = 4  # sampled of a task with more
EPSILON = 0.5  # random actions in worse demonstrations
DEMOS = {"mdp": 2, "pomdp": 5, "apomdp": 5}
SEEN = ("oracle", "random", "bc", "certainty-equivalence", "lsvi", "pevi", "layer")
HIDDEN = ("oracle", "random", "bc", "certainty-equivalence", "qmdp")
RENAMED = {
    "name": "renamed",
    "episode": "#",
    "step": ["\n", "{state}", "{action}", "{model}", "{observation}", ":{reward}"],
    "closing": "\n",
    "actions": [" X", " Y", " Z"],
    "states": ["k", "m", "n", "p", "q"],
    "models": "{}",
    "observations": ["+", "-"],
}
FORMATS = {"renamed": "renamed symbols", "readable": "sentences"}  # name in the records -> label


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 1
    """training runs of a cell, each on its own tasks"""
    base_seed: int = 900_000
    model: str = "models/SmolLM2-135M-Instruct"
    """directory of a model, or tiny"""
    mdp: tuple[int, ...] = (4, 8, 16)
    """horizons of the suite"""
    pomdp: tuple[int, ...] = (4, 6, 8)
    apomdp: tuple[int, ...] = (2, 3, 4)
    tasks: int = 50
    """new tasks of each cell and split"""
    train: int = 256
    """tasks to train on"""
    steps: int = 60
    batch: int = 2
    rate: float = 5e-4
    """peak learning rate"""
    more: bool = True
    """also measure worse demonstrations (at the middle horizons) and other formats (at the shortest)"""

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
QUICK = Config(model=language_models.TINY, mdp=(), pomdp=(1,), apomdp=(), train=768, steps=96, batch=8, rate=1e-3, more=False)
SMOKE = Config(
    model=language_models.TINY,
    mdp=(),
    pomdp=(2,),
    apomdp=(),
    tasks=4,
    train=32,
    steps=3,
    batch=8,
    rate=1e-3,
    more=False,
    base_seed=7,
)


def points(cfg: Config) -> list[dict]:
    """The cells of every seed, the middle horizons first: most claims need one cell of every suite."""
    cells_of_seeds = []
    for seed in range(cfg.seeds):
        cells = [(name, getattr(cfg, name)) for name in SUITES if getattr(cfg, name)]
        horizons_and_demos = [(n, h, h == middle(hs), "oracle") for n, hs in cells for h in hs]
        if cfg.more:
            horizons_and_demos += [(n, middle(hs), False, "worse") for n, hs in cells]
        horizons_and_demos.sort(key=lambda cell: not cell[2])
        cells_of_seeds += [{"suite": n, "horizon": h, "demos": demos, "seed": seed} for n, h, _, demos in horizons_and_demos]
    return cells_of_seeds


def middle(horizons: Sequence[int]) -> int:
    return horizons[len(horizons) // 2]


def measure(cfg: Config, point: dict) -> dict:
    language_models.check_model(cfg.model)
    name, horizon, worse = point["suite"], point["horizon"], point["demos"] == "worse"
    demonstrations = {"demos": DEMOS[name], "behavior": "epsilon" if worse else "oracle", "epsilon": EPSILON}
    seed = cfg.base_seed + 2 * point["seed"]
    with scratch_directory() as work, language_models.quiet_single_precision():
        data = language_models.make_data(
            work / "train",
            language_models.suite_at_horizon(name, horizon),
            DatasetConfig(tasks=cfg.train, seed=seed, **demonstrations),
        )
        training = {"steps": cfg.steps, "batch": cfg.batch, "learning_rate": cfg.rate, "seed": point["seed"]}
        rewards = "shown" if worse else "auto"
        config = language_models.sft_config(cfg.model, data, work / "run", rewards=rewards, **training)
        models = {"icl": language_models.base_model(config, work / "before"), "sft": language_models.fine_tune(config)}

        def evaluate_on(split: str, policies: Sequence[str], template: str | None = None) -> dict[str, dict]:
            data = work / split
            data_config = DatasetConfig(tasks=cfg.tasks, seed=seed + 1, **demonstrations)
            source = language_models.suite_at_horizon(name, horizon, split)
            known = {policy: policy for policy in policies}
            known |= {f"{'base' if kind == 'icl' else kind}:{path}": kind for kind, path in models.items()}
            named = PoliciesByName(tuple(known), source, data_config, template=template, rewards=rewards)
            limits = {"episodes": EPISODES, "max_histories": MAX_HISTORIES}
            results = evaluate(source, named, dataset=data_config, data=data, **limits)
            return {known[result.policy]: _kept(result) for result in results}

        policies = (*(SEEN if name == "mdp" else HIDDEN), *(["behavior"] if worse else []))
        rows = {"id": evaluate_on("id", policies)} | ({} if worse else {"ood": evaluate_on("ood", policies)})
        if cfg.more and not worse and horizon == getattr(cfg, name)[0]:
            (work / "renamed.json").write_text(json.dumps(RENAMED))
            paths = {"renamed": str(work / "renamed.json"), "readable": "readable"}
            rows |= {form: evaluate_on("id", (), paths[form]) for form in FORMATS}
    return {"rows": rows}


def _kept(result: PolicyResult) -> dict:
    kept = {key: getattr(result, key) for key in ("gap_of_value", "action_agreement", "invalid", "method")}
    return {"gaps": [round(gap, 6) for gap in result.gaps if gap is not None]} | {
        key: round(value, 6) if isinstance(value, float) else value for key, value in kept.items()
    }


# --- verdicts and figures ----------------------------------------------------------------------------------------------------


def gaps(
    records: list[dict], policy: str, suite: str, *, horizon: int | None = None, part: str = "id", demos: str = "oracle"
) -> np.ndarray:
    """Gaps of all tasks of a suite (at a horizon), in one order for every policy; `part`: a split or a format."""
    parts = [
        r["rows"][part][policy]["gaps"]
        for r in sorted(records, key=lambda r: (r["point"]["horizon"], r["point"]["seed"]))
        if (r["point"]["suite"], r["point"]["demos"]) == (suite, demos)
        and horizon in (None, r["point"]["horizon"])
        and policy in r["rows"].get(part, {})
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def horizons(records: list[dict], suite: str) -> list[int]:
    return sorted({r["point"]["horizon"] for r in records if r["point"]["suite"] == suite})


def suites_of(records: list[dict]) -> list[str]:
    return [name for name in SUITES if horizons(records, name)]


def _gaps_note(policies: str, parts: dict[str, Sequence[float]]) -> str:
    """The note of a verdict: mean normalized optimality gaps of policies, or differences of gaps."""
    means = ", ".join(f"{name} {' / '.join(f'{v:.3f}' for v in values)}".strip() for name, values in parts.items())
    return f"normalized optimality gap, {policies}: {means}"


def check(records: list[dict]) -> list[Verdict]:
    known = suites_of(records)

    def against(id: str, other: str, share: float, part: str = "id") -> Verdict:
        """Is the gap of SFT below a share of the gap of the other policy, on every suite?"""
        mine, theirs = ({n: gaps(records, policy, n, part=part) for n in known} for policy in ("sft", other))
        means = {n: (mine[n].mean(), theirs[n].mean()) for n in known}
        return mean_verdict(
            id, *(mine[n] - share * theirs[n] for n in known), figure="gaps", note=_gaps_note(f"SFT / {other}", means)
        )

    def advantage(suite: str, horizon: int | None = None) -> np.ndarray:
        return gaps(records, "icl", suite, horizon=horizon) - gaps(records, "sft", suite, horizon=horizon)

    several = [n for n in known if len(horizons(records, n)) > 1]
    ends = {n: [advantage(n, h) for h in (horizons(records, n)[0], horizons(records, n)[-1])] for n in several}
    verdicts = [against("sft-beats-icl", "icl", 0.25), against("sft-beats-cloning", "bc", 1.0)]
    if several:
        note = _gaps_note("ICL - SFT at the shortest / longest horizon", {n: [v.mean() for v in e] for n, e in ends.items()})
        verdicts.append(mean_verdict("horizon", *(long - short for short, long in ends.values()), figure="gaps", note=note))
    else:
        verdicts.append(undecided("horizon", "one horizon was measured"))
    for id, easier, harder in (("partial-observation", "mdp", "pomdp"), ("ambiguity", "pomdp", "apomdp")):
        if easier in known and harder in known:
            pair = [advantage(n) for n in (easier, harder)]
            n = min(map(len, pair))
            note = _gaps_note(f"ICL - SFT, {easier} / {harder}", {"": [v.mean() for v in pair]})
            verdicts.append(mean_verdict(id, pair[1][:n] - pair[0][:n], figure="gaps", note=note))
        else:
            verdicts.append(undecided(id, f"{easier} and {harder} were not both measured"))
    verdicts.append(against("ood", "icl", 0.5, "ood"))
    formats = [(n, form) for n in known for form in FORMATS if len(gaps(records, "sft", n, part=form))]
    if formats:
        both = {key: [gaps(records, policy, key[0], part=key[1]) for policy in ("sft", "icl")] for key in formats}
        note = _gaps_note("SFT / ICL", {" ".join(key): [v.mean() for v in values] for key, values in both.items()})
        verdicts.append(
            mean_verdict("format", *(mine - 0.5 * theirs for mine, theirs in both.values()), figure="formats", note=note)
        )
    else:
        verdicts.append(undecided("format", "one format was measured"))
    worse = [n for n in known if len(gaps(records, "sft", n, demos="worse"))]
    if worse:
        mine = {n: gaps(records, "sft", n, demos="worse") for n in worse}
        others = {n: [gaps(records, policy, n, demos="worse") for policy in ("behavior", "bc", "icl")] for n in worse}
        parts = [mine[n] - theirs for n in worse for theirs in others[n][:2]]
        note = _gaps_note("SFT / behavior / bc / ICL", {n: [v.mean() for v in (mine[n], *others[n])] for n in worse})
        verdicts.append(mean_verdict("behavior-context", *parts, figure="formats", note=note))
    else:
        verdicts.append(undecided("behavior-context", "worse demonstrations were not measured"))
    return verdicts


def table(records: list[dict]) -> list[dict]:
    """The table: a row for every cell, part and policy; gaps with their 95 % intervals over tasks."""
    rows = []
    for record in records:
        point = record["point"]
        for part, policies in record["rows"].items():
            for policy, result in policies.items():
                mean, (low, high) = mean_ci(result["gaps"])
                row = {key: point[key] for key in ("suite", "horizon", "demos")} | {"part": part, "policy": policy}
                row |= {"gap": mean, "low": low, "high": high, "n": len(result["gaps"])}
                rows.append(row | {key: result[key] for key in ("gap_of_value", "action_agreement", "invalid", "method")})
    return rows


LINES = {  # policy -> label, color, marker
    "icl": ("base model (ICL)", COLORS[1], "s"),
    "sft": ("fine-tuned (SFT)", COLORS[0], "o"),
    "bc": ("behavior cloning (bc)", COLORS[2], "^"),
    "certainty-equivalence": ("certainty equivalence", COLORS[3], "D"),
    "lsvi": ("LSVI", COLORS[4], "v"),
    "qmdp": ("QMDP (model known)", COLORS[5], "P"),
}


def plot(records: list[dict]) -> dict[str, Figure]:
    figures = {"gaps": _over_horizons(records)}
    if any("renamed" in r["rows"] or r["point"]["demos"] == "worse" for r in records):
        figures["formats"] = _bars(records)
    return figures


def _over_horizons(records: list[dict]) -> Figure:
    """Gap over the horizon: a column for each suite, a row for each split."""
    known = suites_of(records)
    figure, axes = pyplot.subplots(
        2, len(known), figsize=(3.9 * len(known) + 0.6, 6.4), sharey="row", sharex="col", squeeze=False
    )
    for row, (split, about) in enumerate((("id", "in distribution"), ("ood", "out of distribution"))):
        for axis, suite in zip(axes[row], known, strict=True):
            at = horizons(records, suite)
            for shift, (policy, (label, color, marker)) in enumerate(LINES.items()):
                values = [gaps(records, policy, suite, horizon=h, part=split) for h in at]
                if not all(map(len, values)):
                    continue
                means, ends = zip(*(mean_ci(v) for v in values), strict=True)
                error = [[m - e[0] for m, e in zip(means, ends, strict=True)]] * 2
                x = np.arange(len(at)) + 0.05 * (shift - 2.5)
                axis.errorbar(x, means, error, color=color, marker=marker, capsize=2, label=label, linewidth=1.2)
            axis.axhline(1, color=GRAY, linestyle=":", marker="", label="uniformly random policy")
            axis.axhline(0, color="#444444", linewidth=0.8, marker="")
            axis.set_xticks(range(len(at)), [str(h) for h in at])
            axis.set_title(f"{suite}, {about}")
        axes[row][0].set_ylabel("normalized optimality gap")
        axes[row][0].set_yscale("symlog", linthresh=0.02)
        axes[row][0].set_ylim(-0.01, 1.3)
        ticks = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
        axes[row][0].set_yticks(ticks, map(str, ticks))
    for axis in axes[-1]:
        axis.set_xlabel("horizon")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return figure


def _bars(records: list[dict]) -> Figure:
    """Gaps in formats that were not trained, and from worse demonstrations."""
    known = suites_of(records)
    figure, axes = pyplot.subplots(1, len(known), figsize=(3.9 * len(known) + 0.6, 3.8), sharey=True, squeeze=False)
    for axis, suite in zip(axes[0], known, strict=True):
        shortest = horizons(records, suite)[0]
        groups = [("training format", {"part": "id", "horizon": shortest}, ("sft", "icl"))]
        groups += [(name, {"part": form}, ("sft", "icl")) for form, name in FORMATS.items()]
        groups.append(("worse demos", {"part": "id", "demos": "worse"}, ("sft", "icl", "bc", "behavior")))
        for x, (_, where, policies) in enumerate(groups):
            for i, policy in enumerate(policies):
                values = gaps(records, policy, suite, **where)
                if not len(values):
                    continue
                mean, (low, high) = mean_ci(values)
                label, color, marker = LINES.get(policy, ("demonstrator", COLORS[6], MARKERS[6]))
                ends = [[mean - low], [high - mean]]
                axis.errorbar(
                    [x + 0.16 * (i - 1)], [mean], ends, color=color, marker=marker, capsize=2, linestyle="none", label=label
                )
        axis.set_xticks(range(len(groups)), [name.replace(" ", "\n") for name, _, _ in groups])
        axis.set_title(suite)
        axis.axhline(0, color="#444444", linewidth=0.8, marker="")
    axes[0][0].set_ylabel("normalized optimality gap")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return figure
