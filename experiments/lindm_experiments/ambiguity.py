"""How does the attitude to ambiguity change decisions and values?

At every stage nature chooses the worst model of an ambiguous POMDP with probability alpha and the best one otherwise. There
are two kinds of problem: random sets of three models (their first two models are the sets of two), and `prostate`, active
surveillance of prostate cancer with the models of four centers over five years. The rewards of `prostate` are placeholders, so
they are drawn around their defaults, and every draw is used together with its mirror image. All answers are exact, by the
belief tree. A tree of five years is feasible because four observations per year carry as much information as the nine of
`prostate` (`merge_observations`).

In the criterion over the whole horizon, nature moves once: alpha min_m V_m + (1 - alpha) max_m V_m. Histories contain the
model, so the actions after the first step are chosen for each model separately. The best pure policy is worth max_a [alpha
min_m Q_m(a) + (1 - alpha) max_m Q_m(a)], where Q_m belongs to model m alone.

    lindm run ambiguity --preset quick
    lindm verify --only ambiguity

Expected: values fall with alpha. The value is convex up to alpha = 1/2 for two models, and at alpha = 0 for three; beyond
that, it is not convex for most problems. The policy that is optimal stage by stage is often not optimal over the whole
horizon, but loses little. The worst-case attitude takes more biopsies. (The last two claims were made, and their bands fixed,
on other seeds.)
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.families.prostate import CENTERS, prostate
from lindm.problems.apomdp import draw_apomdp
from lindm.types import APOMDP
from lindm.validate import fraction
from lindm_experiments.harness.config import check_counts
from lindm_experiments.harness.figures import (
    BLUE,
    EXACT,
    GRAY,
    GREEN,
    INK,
    MARKERS,
    MEASURED,
    ORANGE,
    PURPLE,
    RED,
    SEED,
    label_line_ends,
    panel_grid,
    plot_seeds,
)
from lindm_experiments.harness.statistics import clopper_pearson
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict, of_seeds
from lindm_experiments.lib.apomdps import first_stages, merge_observations, value_span
from lindm_experiments.lib.attitudes import (
    ROUNDING,
    YEARS_LEFT,
    along_segments,
    biopsy_advantage,
    stagewise_differences,
    sweep,
    sweep_many,
)

SHORT = 3  # stages of a random problem where many of its values are needed
ATTITUDE = r"attitude $\alpha$ (0: the best case, 1: the worst)"


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 2041000
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    problems: int = 8
    distance: float = 0.6  # distance between the models of a random problem
    segments: int = 8  # number of segments of beliefs per problem, on which convexity is tested
    beliefs: int = 17  # number of beliefs on a segment
    policies: int = 256  # number of random policies per problem
    years: int = 5
    pairs: int = 1  # number of draws of the placeholder rewards, each with its mirror image
    variation: float = 0.2  # variation of the placeholder rewards around their defaults

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "problems", "segments", "policies", "pairs")
        check_counts(self, "beliefs", least=3)
        check_counts(self, "years", least=2)
        fraction(self.distance, "distance")
        fraction(self.variation, "variation")
        if (
            list(self.alphas) != sorted(set(self.alphas))
            or (*self.alphas[:1], *self.alphas[-1:]) != (0, 1)
            or 0.5 not in self.alphas
        ):
            raise ValueError(f"alphas must rise from 0 to 1 and contain 1/2; got {self.alphas}")


QUICK = Config()
FULL = Config(seeds=10, alphas=tuple(k / 10 for k in range(11)), problems=16, policies=512, pairs=2)
SMOKE = Config(seeds=2, alphas=(0.0, 0.5, 1.0), problems=2, segments=2, beliefs=5, policies=8, years=3)


def points(cfg: Config) -> list[dict]:
    return [*({"seed": s} for s in range(cfg.seeds)), {"thresholds": "prostate"}]


# --- problems ------------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="problems")
def draw_problems(key: Array, distance: Array, problems: int) -> APOMDP:
    """A stack of random APOMDPs with three models."""
    return jax.vmap(lambda k: draw_apomdp(k, S=3, A=2, O=2, H=4, M=3, distance=distance))(jax.random.split(key, problems))


def draw_rewards(rng: np.random.Generator, pairs: int, variation: float) -> list[dict[str, float]]:
    """The losses of `prostate` times factors in [1 - variation, 1 + variation]; draw and mirror image follow each other."""
    factors = rng.uniform(-variation, variation, (pairs, 1, 3)) * np.array([1.0, -1.0])[:, None] + 1
    defaults = {"biopsy_loss": 0.05, "untreated_loss": 0.2, "treated_loss": 0.07}
    return [dict(zip(defaults, row.tolist(), strict=True)) for row in factors.reshape(-1, 3) * list(defaults.values())]


# --- what is measured ----------------------------------------------------------------------------------------------------


def equal_models(problem: APOMDP) -> APOMDP:
    """A stack of APOMDPs with the first model in the place of all."""
    models = jax.tree.map(lambda x: jnp.broadcast_to(x[:, :1], x.shape), problem.models)
    return replace(problem, models=models)


def segments_of_beliefs(rng: np.random.Generator, shape: tuple[int, int], points: int, S: int) -> np.ndarray:
    """Evenly spaced beliefs [*shape, points, S] between random ends."""
    ends = rng.dirichlet(np.ones(S), (*shape, 2))
    t = np.linspace(0, 1, points)[:, None]
    return (1 - t) * ends[..., :1, :] + t * ends[..., 1:, :]


def bends(values: np.ndarray) -> np.ndarray:
    """Second differences along the last axis: one below zero, and the value is not convex."""
    return values[..., 2:] - 2 * values[..., 1:-1] + values[..., :-2]


def measure(cfg: Config, point: dict) -> dict:
    alphas = np.array(cfg.alphas)
    if "seed" not in point:
        return thresholds(cfg, alphas)
    k_problems, k_policies = jax.random.split(jax.random.key(cfg.base_seed + point["seed"]))
    rng = np.random.default_rng(cfg.base_seed + point["seed"])
    problems = draw_problems(k_problems, np.float64(cfg.distance), problems=cfg.problems)
    swept = {k: np.asarray(v) for k, v in sweep_many(problems, alphas).items()}
    spans = np.asarray(jax.vmap(value_span)(problems))
    lines = segments_of_beliefs(rng, (cfg.problems, cfg.segments), cfg.beliefs, 3)
    gaps, values = [], []
    for i, key in enumerate(jax.random.split(k_policies, cfg.problems)):
        three = first_stages(jax.tree.map(lambda x, i=i: x[i], problems), SHORT)
        two = replace(three, models=jax.tree.map(lambda x: x[:2], three.models))
        gaps.append(np.asarray(stagewise_differences(key, three, policies=cfg.policies)) / spans[i])
        values.append([np.asarray(along_segments(problem, alphas, lines[i])) for problem in (two, three)])
    equal = equal_models(problems)
    same = np.asarray(sweep_many(equal, alphas)["value"])  # [problems, alphas]
    short = first_stages(jax.tree.map(lambda x: x[0], problems), 1)
    still = np.asarray(stagewise_differences(k_policies, short, policies=cfg.policies)) / spans[0]
    bent = [bends(np.array([v[k] for v in values])) for k in (0, 1)]  # [problems, alphas, segments, points - 2]
    gap, convex = np.array(gaps), alphas <= 0.5
    above = np.array([v[1] - np.linspace(v[1][..., 0], v[1][..., -1], cfg.beliefs, axis=-1) for v in values])  # their chords
    problem_index, segment = np.unravel_index((above[:, -1] - above[:, 0]).max(-1).argmax(), above.shape[:3:2])
    watched = [surveillance(cfg, alphas, rewards) for rewards in draw_rewards(rng, cfg.pairs, cfg.variation)]
    loss = (swept["best"] - swept["whole"]) / spans[:, None]
    return {
        "alphas": list(cfg.alphas),
        "rises": int(swept["rises"].sum() + sum(w["rises"] for w in watched)),
        "falls": int(swept["falls"].sum()),
        "histories": int(swept["histories"][:, 0].sum() + sum(w["histories"] for w in watched)),
        "policies": gap[..., 0].size,
        "wrong_way": int(((gap[..., 0] > ROUNDING) | (gap[..., 1] < -ROUNDING)).sum()),
        "right_way": int(((gap[..., 0] < -ROUNDING) | (gap[..., 1] > ROUNDING)).sum()),
        "price": [float(gap[..., k].mean()) for k in (0, 1)],
        "triples": bent[0][:, convex].size,
        "concave_triples": int((bent[0][:, convex] < -ROUNDING).sum()),
        "straight_triples": int((np.abs(bent[0][:, convex]) <= ROUNDING).sum()),
        "concave_anywhere": [int((bent[0] < -ROUNDING).sum()), int((bent[1][:, convex] < -ROUNDING).sum())],
        "equalities": [float((np.ptp(same, axis=1) / spans).max()), float(np.abs(still).max())],
        "problems": cfg.problems,
        "not_convex": [(x < -ROUNDING).any((2, 3)).sum(0).tolist() for x in bent],
        "example": above[problem_index, :, segment].tolist(),  # where the attitude bends the value most
        "loss": loss.tolist(),  # [problems, alphas]
        "ahead": ((swept["whole"] - swept["value"]) / spans[:, None]).mean(0).tolist(),
        "prostate": {k: np.mean([w[k] for w in watched], 0).tolist() for k in watched[0]},
    }


def surveillance(cfg: Config, alphas: np.ndarray, rewards: dict[str, float]) -> dict[str, np.ndarray]:
    """`sweep` of `prostate`, with its figures for the record; biopsies are counted until the cancer is detected."""
    problem = merge_observations(prostate(cfg.years, **rewards))
    biopsies = np.zeros(problem.models.r.shape)
    biopsies[..., :2, 1] = 1
    swept = {k: np.asarray(v) for k, v in sweep(problem, alphas, biopsies).items()}
    return {k: swept[k] for k in ("value", "whole", "models")} | {
        "biopsies": swept["counts"],
        "loss": (swept["best"] - swept["whole"]) / float(value_span(problem)),
        "regret": swept["alone"] - swept["models"],
        "rises": swept["rises"].sum(),
        "histories": swept["histories"][0],
    }


def thresholds(cfg: Config, alphas: np.ndarray) -> dict:
    """With the stand-ins at their defaults: what a biopsy brings in the first year, by belief."""
    high_risk = np.linspace(0, 0.6, 25)
    beliefs = np.stack([1 - high_risk, high_risk, np.zeros_like(high_risk)], 1)
    problem = merge_observations(prostate(YEARS_LEFT[-1]))
    advantage = biopsy_advantage(problem, alphas, beliefs)
    return {"alphas": list(cfg.alphas), "high_risk": high_risk.tolist(), "advantage": np.asarray(advantage).tolist()}


# --- verdicts and figures ------------------------------------------------------------------------------------------------


def check(records: list[dict]) -> list[Verdict]:
    seeded = of_seeds(records)
    total = {k: sum(r[k] for r in seeded) for k, v in seeded[0].items() if isinstance(v, int)}
    losses = np.concatenate([r["loss"] for r in seeded])  # [problems, alphas]
    two, three = np.sum([r["not_convex"] for r in seeded], 0)
    worst, best = np.mean([r["price"] for r in seeded], 0)
    by_attitude = np.array([np.mean(r["prostate"]["biopsies"], 1) for r in seeded])
    regret = np.max([r["prostate"]["regret"] for r in seeded])

    def none_of(claim: str, violations: int, n: int, figure: str, note: str) -> Verdict:
        return count_verdict(claim, int(violations), n, seeds=len(seeded), figure=figure, note=note)

    return [
        none_of("ambiguity/monotone", total["rises"], total["histories"], "attitude", f"{len(two)} attitudes from 0 to 1"),
        none_of(
            "ambiguity/stagewise",
            total["wrong_way"],
            total["policies"],
            "criteria",
            f"a move at every stage is worth {worst:+.1%} of the span at alpha = 1, {best:+.1%} at alpha = 0",
        ),
        none_of(
            "ambiguity/convex",
            total["concave_triples"],
            total["triples"],
            "convexity",
            f"equality, as along a segment without a kink, in {total['straight_triples'] / total['triples']:.0%} of the triples; "
            f"at alpha = 1 the value of {two[-1]} of {total['problems']} APOMDPs with two models is not convex",
        ),
        mean_verdict("ambiguity/attained", *np.transpose([r["equalities"] for r in seeded]), figure="criteria"),
        none_of(
            "ambiguity/not-convex",
            three[-1],
            total["problems"],
            "convexity",
            f"by alpha, not convex of {total['problems']}: {', '.join(map(str, three))}",
        ),
        none_of(
            "ambiguity/whole-horizon",
            (losses > ROUNDING).any(1).sum(),
            total["problems"],
            "criteria",
            f"largest loss {losses.max():.1%} of the span",
        ),
        mean_verdict(
            "ambiguity/whole-horizon-loss",
            [np.mean(r["loss"]) for r in seeded],
            [np.mean(r["prostate"]["loss"]) for r in seeded],
            figure="criteria",
        ),
        mean_verdict(
            "ambiguity/biopsies",
            by_attitude[:, -1] - by_attitude[:, 0],
            figure="attitude",
            note=f"{by_attitude[:, 0].mean():.2f} at alpha = 0, {by_attitude[:, -1].mean():.2f} at alpha = 1; where one center "
            f"is the truth, a policy loses at most {365.25 * regret:.1f} quality-adjusted days",
        ),
    ]


def _crossing(x: np.ndarray, y: np.ndarray) -> float:
    """Where y first rises above zero, on a straight line; nan if it does not."""
    for i in range(1, len(x)):
        if y[i - 1] <= 0 < y[i]:
            return float(x[i - 1] - y[i - 1] * (x[i] - x[i - 1]) / (y[i] - y[i - 1]))
    return float("nan")


def plot(records: list[dict]) -> dict[str, Figure]:
    return {"attitude": _attitude(records), "convexity": _convexity(records), "criteria": _criteria(records)}


def _attitude(records: list[dict]) -> Figure:
    seeded, (first_year,) = of_seeds(records), [r for r in records if "advantage" in r]
    alphas = np.array(seeded[0]["alphas"])
    mean = {k: np.mean([r["prostate"][k] for r in seeded], 0) for k in ("value", "whole", "models", "biopsies")}
    figure, (left, middle, right, free) = panel_grid(3, 3.4, free=True)
    centers = [RED, GREEN, PURPLE, ORANGE]
    with_room = {"xlabel": ATTITUDE, "xlim": (-0.03, 1.2), "xticks": np.linspace(0, 1, 6)}
    for m, color in enumerate(centers):
        left.plot(alphas, mean["models"][:, m], color=color, linewidth=1.0, marker="")
        for r in seeded:
            middle.plot(alphas, np.array(r["prostate"]["biopsies"])[:, m], color=color, **SEED)
        middle.plot(alphas, mean["biopsies"][:, m], color=color, **(EXACT | {"marker": MARKERS[m]}))
    for r in seeded:
        left.plot(alphas, r["prostate"]["value"], color=BLUE, **SEED)
    left.plot(alphas, mean["value"], color=BLUE, label="nature chooses every year", **(EXACT | {"marker": "o", "linewidth": 2.2}))
    left.plot(alphas, mean["whole"], color=GRAY, label="nature chooses once", linestyle="--", marker="")
    left.plot([], [], color=GRAY, linewidth=1.0, marker="", label="one center's model is true")
    left.set(ylabel="quality-adjusted years", title="Value of the optimal policy", **with_room)
    left.plot([], [], color=BLUE, label="draws of the rewards (thin)", **SEED)
    free.legend(*left.get_legend_handles_labels(), loc="center", title="value (above left)")
    label_line_ends(left, 1.0, list(mean["models"][-1]), list(CENTERS), centers)
    middle.set(ylabel="expected biopsies until detection", title="Biopsies by the true model", **with_room)
    label_line_ends(middle, 1.0, list(mean["biopsies"][-1]), list(CENTERS), centers)
    x = np.array(first_year["high_risk"])
    for i, years in enumerate(YEARS_LEFT):
        border = [_crossing(x, np.array(row)) for row in first_year["advantage"][i]]
        right.plot(alphas, border, color=INK, **(EXACT | {"marker": MARKERS[i]}))
        place = (0.5, float(np.interp(0.5, alphas, border)))
        right.annotate(f"{years} years left", place, (0, 7), textcoords="offset points", ha="center", fontsize=8, color=INK)
    right.set(
        xlabel=ATTITUDE, ylabel="probability of high risk", title="Threshold: a biopsy is taken above the line", ylim=(0, 0.55)
    )
    figure.set_label(
        "Above left: the value of the optimal policy falls from the best case to the worst case. Above right: the expected "
        "number of biopsies rises with the attitude under each of the four centers' models. Below: the threshold above which "
        "a biopsy is taken falls slowly, and is lower the more years are left."
    )
    return figure


def _convexity(records: list[dict]) -> Figure:
    seeded = of_seeds(records)
    alphas, n = np.array(seeded[0]["alphas"]), sum(r["problems"] for r in seeded)
    figure, (left, right) = panel_grid(2, 4.0)
    counts = np.sum([r["not_convex"] for r in seeded], 0)
    for M, row, color, shift in zip((2, 3), counts, (BLUE, RED), (-0.006, 0.006), strict=True):
        ends = np.array([clopper_pearson(int(k), n) for k in row])
        style = MEASURED | {"marker": "os"[M - 2], "capsize": 2}
        left.errorbar(alphas + shift, row / n, np.abs(ends.T - row / n), color=color, label=f"{M} models", **style)
    left.axvline(0.5, color=GRAY, linestyle=":", marker="")
    theorem = "two models are convex\nup to here: theorem"
    left.annotate(theorem, (0.5, 0.3), (-6, 0), textcoords="offset points", ha="right", fontsize=8, color=GRAY)
    left.set(
        xlabel=ATTITUDE, ylabel="share of APOMDPs", title=f"Value seen not to be convex, {n} random APOMDPs", ylim=(-0.03, 1)
    )
    left.legend(loc="center left", bbox_to_anchor=(0.0, 0.6))
    example = max((np.array(r["example"]) for r in seeded), key=lambda e: (e[-1] - e[0]).max())
    t, shades = np.linspace(0, 1, example.shape[1]), pyplot.get_cmap("viridis")
    for i in np.unique(np.linspace(0, len(alphas) - 1, 5).round().astype(int)):
        label = rf"$\alpha$ = {alphas[i]:g}"
        right.plot(t, example[i], color=shades(0.9 * alphas[i]), label=label, linewidth=1.6, marker="")
    right.axhline(0.0, color=GRAY, linewidth=0.8, marker="")
    right.set(
        xlabel="along a segment of beliefs",
        ylabel="value above its chord / span",
        title="Three models: from convex to concave",
    )
    right.legend(fontsize=8)
    figure.set_label(
        "Left: shares of random APOMDPs whose value is not convex: 0 up to attitude 1/2 with two models, above 0.8 from "
        "attitude 1/4 on with three. Right: the value along a segment of beliefs, below its chord where it is convex."
    )
    return figure


def _criteria(records: list[dict]) -> Figure:
    seeded = of_seeds(records)
    alphas = np.array(seeded[0]["alphas"])
    figure, (left, right) = panel_grid(2, 4.0)
    losses = 100 * np.array([r["loss"] for r in seeded])  # [seeds, problems, alphas]
    plot_seeds(left, alphas, losses.reshape(-1, len(alphas)), BLUE)
    left.plot(alphas, losses.mean((0, 1)), color=BLUE, label="random APOMDPs, mean", **(EXACT | {"marker": "o"}))
    surveyed = 100 * np.mean([r["prostate"]["loss"] for r in seeded], 0)
    left.plot(alphas, surveyed, color=RED, label="prostate, mean", **(EXACT | {"marker": "s"}))
    left.set(xlabel=ATTITUDE, ylabel="loss, % of the span", title="Stage-wise optimal policy where nature moves once")
    left.set_yscale("symlog", linthresh=0.1)
    left.set_ylim(0, 4 * losses.max())  # room for the legend
    left.legend(fontsize=8)
    ahead = 100 * np.array([r["ahead"] for r in seeded])
    plot_seeds(right, alphas, ahead, BLUE)
    right.plot(alphas, ahead.mean(0), color=BLUE, label="optimal policy, random APOMDPs", **(EXACT | {"marker": "o"}))
    worst, best = -100 * np.mean([r["price"] for r in seeded], 0)
    right.plot([1.0, 0.0], [worst, best], color=ORANGE, label="random policies", **(MEASURED | {"marker": "D"}))
    right.axhline(0.0, color=GRAY, linewidth=0.8, marker="")
    right.set(xlabel=ATTITUDE, ylabel="% of the span", title="Value where nature moves once - at every stage")
    right.legend(fontsize=8)
    figure.set_label(
        "Left: losses of the stage-wise optimal policy where nature moves once, in the mean below one percent of the span. "
        "Right: the value where nature moves once minus that where it moves at every stage rises from below 0 at attitude 0 "
        "through 0 at 1/2."
    )
    return figure
