"""What changes if one prompt of K trajectories serves all stages, instead of independent pairs for each stage?

A prompt has K trajectories of H pairs from an epsilon-greedy behavior policy.
Labels: `oracle`, Q* of the pair; `rollout`, the return of a rollout of pi* after each pair; `return`, the return-to-go of the
trajectory itself.
Readers: `stage`, one layer for each stage on the K pairs of its stage; `augmented`, features phi (x) e_h and all K H pairs;
`blind`, one layer for all stages on all pairs, which does not see the stage of a pair; `relabeled`, all pairs, labeled for the
stage that reads them.
Dependence, with the same layers: `pairs`, every pair from its own trajectory, fresh for every stage; `markov`, whole
trajectories, fresh for every stage; `shared`, one prompt for all stages. Theory: lindm_theory.pooled, notes/pooled.md.

    lindm run pooled --preset quick      about 12 s on 1 core
    lindm verify --only pooled

Expected: exact risks for every reader, law and dependence, in which a trajectory counts as one pair; a floor for the blind
reader; the mean over prompts is the loss of the policy weighted by occupancy, not that of the mean policy.
"""

from dataclasses import dataclass

import jax
import numpy as np
from matplotlib.figure import Figure

from lindm.problems.linear_mdp import second_moment
from lindm_experiments.harness.config import check_counts, check_rising
from lindm_experiments.harness.figures import (
    BLUE,
    BOUND,
    EXACT,
    GRAY,
    GREEN,
    MARKERS,
    MEASURED,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    legend_below,
    panel_grid,
    plot_seeds,
    set_log_ticks,
)
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_experiments.lib import attained, pooled_policies, pooled_prompts
from lindm_experiments.lib.pooled_prompts import DEPENDENCE, LAWS, POOL, READERS, D, H
from lindm_theory import pooled

PROGRAMS = 4  # tasks for which the linear program is solved
RUNG_PROMPTS = 32  # prompts of a task for which rungs 0 to 3 are computed


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 10
    base_seed: int = 2041000
    tasks: int = 64
    played: int = 16  # number of tasks whose policies are evaluated
    contexts: int = 64  # number of prompts for every task
    K: tuple[int, ...] = (2, 8, 32)  # trajectories in a test prompt
    N: int = 8  # trajectories in a training prompt
    epsilon: float = 0.5  # probability of a uniformly random action of the behavior policy

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "tasks", "played", "N")
        if self.played > self.tasks:
            raise ValueError(f"played must be at most tasks = {self.tasks}; got {self.played}")
        check_counts(self, "contexts", least=RUNG_PROMPTS)
        check_rising(self, "K", length=2)
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon must be above 0 and at most 1; got {self.epsilon}")


QUICK = Config()
FULL = Config(tasks=128, played=64, contexts=128, K=(2, 4, 8, 16, 32, 64))
SMOKE = Config(seeds=2, tasks=4, played=2, contexts=64, K=(2, 8))

_query_law = jax.jit(second_moment)


def measure(cfg: Config, point: dict) -> dict:
    seed = cfg.base_seed + point["seed"]
    rng = np.random.default_rng(seed)
    k_family, k_tasks, k_prompts = jax.random.split(jax.random.key(seed), 3)
    family = pooled_prompts.draw_family(k_family)
    Lambda_q = np.asarray(_query_law(family))
    both = pooled_prompts.draw_tasks(k_tasks, family, cfg.epsilon, POOL + cfg.tasks)
    both = jax.tree.map(np.asarray, both)
    pool, tasks = jax.tree.map(lambda x: x[:POOL], both), jax.tree.map(lambda x: x[POOL:], both)
    B = pooled_prompts.layers(pool, cfg.N)
    sums = pooled_prompts.draw_sums(k_prompts, family, tasks, cfg.contexts, cfg.K)
    phi, few = np.asarray(family.phi), jax.tree.map(lambda x: x[: cfg.played], tasks)
    scale = np.abs(few.Q).max()
    apart = np.asarray(pooled_prompts.without_cross_blocks(tasks.covariance, H))
    root = np.linalg.cholesky(Lambda_q)
    normal = rng.normal(size=(cfg.played, cfg.contexts, H * D))
    cells, program, ladder = [], [], []
    for n, (reader, law) in enumerate(READERS):
        i = LAWS.index(law)
        mean, whole = tasks.mean[:, i], tasks.covariance[:, i]
        center = np.einsum("hdm,thm->thd", B[n], mean)
        drawn = np.einsum("tmk,tck->tcm", pooled_prompts.covariance_roots(whole[: cfg.played, 0]), normal)
        for dependence in DEPENDENCE:
            moved = pooled_prompts.stacked(pooled_prompts.with_dependence(sums[:, i], dependence))
            what = np.einsum("hdm,tkchm->tkchd", B[n], moved, optimize=True)
            risk = np.square((what - tasks.w[:, None, None]) @ root).sum((-1, -2)).mean((0, 2))
            spread = np.square((what - center[:, None, None]) @ root).sum((-1, -2)).mean((0, 2))
            covariance = apart[:, i] if dependence == "pairs" else whole
            estimation, bias = pooled_prompts.exact_risk(B[n], mean, covariance, tasks.w, Lambda_q)
            for k, K in enumerate(cfg.K):
                cell = {
                    "reader": reader,
                    "law": law,
                    "dependence": dependence,
                    "K": K,
                    "risk": [float(risk[k]), float(estimation / K + bias)],
                    "estimation": [float(spread[k]), float(estimation / K)],
                }
                cells.append(cell)
                if dependence != "shared" and (cfg.K[-1] > K or law == "rollout"):
                    continue
                out = pooled_policies.play_readings(few, phi, what[: cfg.played, k])
                cell |= {x: float(out[x].mean()) for x in ("loss", "mean", "price", "price bound")}
                cell["off"] = int((np.abs(out["loss"] - out["occupancy"]) > 1e-12 * scale).sum())
                cell["above"] = int((np.abs(out["price"]) > out["price bound"] + 1e-12 * scale).sum())
                if dependence != "pairs" and cfg.K[-1] == K and reader in ("stage", "augmented"):
                    normal_sums = mean[: cfg.played, None, 0] + drawn / K**0.5
                    cell["normal"] = pooled_policies.loss_of_sums(few, phi, B[n], normal_sums, dependence)
                if dependence != "shared" or reader != "stage":
                    continue
                if K in (cfg.K[0], cfg.K[-1]) and law != "rollout":
                    some = moved[: cfg.played, k, :RUNG_PROMPTS]
                    counts = pooled_policies.count_rungs(few, phi, B[n], mean[: cfg.played], some)
                    ladder.append({"K": K, "law": law} | counts)
                if law == "oracle":
                    caps = np.asarray(pooled_policies.caps_of(phi, B[n], mean[: cfg.played], whole[: cfg.played] / K))
                    bounds = pooled_policies.shared_rungs(few, caps, out["rule"], PROGRAMS)
                    program.append({"K": K, "loss": out["loss"][:PROGRAMS].tolist(), "rung": bounds})
    i = LAWS.index("return")
    blind = B[READERS.index(("blind", "return"))]
    free = np.broadcast_to(tasks.free[:, None], tasks.covariance[:, i].shape)
    p, gap = rng.uniform(0.4, 0.8), rng.uniform(0.2, 1.0)
    copies = pooled_policies.copied(rng, (p,) * H, gap, H - 1)
    # the state is kept just when the next action there is wrong: the price of sharing is its bound
    turned = pooled_policies.copied(rng, (p, 1.0, 1.0), gap, 1)
    return {
        "N": cfg.N,
        "K": list(cfg.K),
        "played": cfg.played,
        "cells": cells,
        "program": program,
        "ladder": ladder,
        "independent_noise": float(pooled_prompts.exact_risk(blind, tasks.mean[:, i], free, tasks.w, Lambda_q)[0]),
        "floor": pooled_prompts.blind_floor(pool, Lambda_q),
        "copied": {"p": p, "gap": gap, "predicted": float(pooled.copied_trajectory_loss(p, gap, H)[0])} | copies,
        "attained": {"shared rung": [copies["truth"], copies["rung"]], "price": [turned["price"], turned["price bound"]]},
        "tabular": pooled_policies.tabular(rng, N=cfg.N, K=cfg.K, epsilon=cfg.epsilon, tasks=cfg.played, contexts=cfg.contexts),
    }


# --- verdicts ----------------------------------------------------------------------------------------------------------------


def _cells(records: list[dict], **chosen) -> list[list[dict]]:
    """The cells with these fields, each as a list over seeds."""
    groups = zip(*(r["cells"] for r in records), strict=True)
    return [list(g) for g in groups if all(g[0][k] in v if isinstance(v, tuple) else g[0][k] == v for k, v in chosen.items())]


def _ratios(groups: list[list[dict]], field: str) -> list[list[float]]:
    return [[c[field][0] / c[field][1] for c in g] for g in groups]


def _program_ratio(records: list[dict], which: int) -> list[float]:
    """Largest mean loss / mean rung over the lengths, one for each seed; which: 0 Cantelli's caps, 1 the exact chances."""
    return [max(np.mean(p["loss"]) / np.mean([b[which] for b in p["rung"]]) for p in r["program"]) for r in records]


def check(records: list[dict]) -> list[Verdict]:
    return [*_risk_verdicts(records), *_policy_verdicts(records), *_bound_verdicts(records)]


def _risk_verdicts(records: list[dict]) -> list[Verdict]:
    """The risks of all readers, and what a layer gains that knows the stages."""
    first = records[0]
    every = _cells(records)
    noise_cell = _cells(records, reader="blind", law="return", dependence="shared", K=first["K"][0])[0]
    noise = [r["independent_noise"] / c["K"] / c["estimation"][0] for r, c in zip(records, noise_cell, strict=True)]
    blind = _cells(records, reader="blind", law="oracle", dependence="shared", K=first["K"][-1])[0]
    stage = _cells(records, reader="stage", law="oracle", dependence="shared", K=first["K"][-1])[0]
    floor = [c["risk"][0] / r["floor"][0] for c, r in zip(blind, records, strict=True)]
    above = np.mean([c["risk"][0] for c in blind]) / np.mean([c["risk"][0] for c in stage])
    gains = {}
    for law in ("oracle", "return"):
        pair = [_cells(records, reader=x, law=law, dependence="shared", K=_trained(first))[0] for x in ("augmented", "stage")]
        gains[law] = [a["risk"][0] / b["risk"][0] for a, b in zip(*pair, strict=True)]
    return [
        mean_verdict(
            "pooled",
            *_ratios(every, "risk"),
            *_ratios(every, "estimation"),
            figure="pooled",
            note=f"{len(every)} risks and as many estimation parts, worst shown",
        ),
        mean_verdict("pooled/independent-noise", noise, figure="pooled"),
        mean_verdict("pooled/blind-floor", floor, figure="pooled", note=f"{above:.2g} times the risk of one layer a stage"),
        mean_verdict(
            "pooled/augmented",
            gains["oracle"],
            figure="pooled",
            note=f"at K = N = {_trained(first)}; return labels {np.mean(gains['return']):.3f}",
        ),
    ]


def _rung_verdict(records: list[dict]) -> Verdict:
    """Rungs 0 to 3 for each shared prompt."""
    ladder, seeds = [x for r in records for x in r["ladder"]], len(records)
    policies = sum(x["n"] for x in ladder)
    broken = sum(x[k] for x in ladder for k in ("identity", "rung 1", "rung 2", "rung 3"))
    least = {k: min(x.get(f"least {k}", np.inf) for x in ladder) for k in "123"}
    median = {k: np.median([x[f"median {k}"] for x in ladder if f"median {k}" in x]) for k in "123"}
    return count_verdict(
        "pooled/rungs",
        min(policies, broken),
        policies,
        seeds=seeds,
        figure="policy",
        note="bound/truth, median and least: "
        + ", ".join(f"rung {k} {median[k]:.3g} and {least[k]:.3g}" for k in "123")
        + f"; rung 2 without its factor 2 fails {sum(x['mutant, rung 2 without its factor 2'] for x in ladder)} times",
        slack=[x[f"{which} {k}"] for x in ladder for k in "123" for which in ("least", "median") if f"least {k}" in x],
    )


def _policy_verdicts(records: list[dict]) -> list[Verdict]:
    """What the policies of shared prompts lose, beside the mean policy and fresh prompts."""
    first, seeds = records[0], len(records)
    longest = first["K"][-1]
    every = _cells(records)
    played = [g for g in every if "off" in g[0]]
    shared = _cells(records, dependence="shared", reader=("stage", "augmented", "relabeled"))
    blind_price = [np.mean([c["mean"] / c["loss"] for c in g]) for g in _cells(records, dependence="shared", reader="blind")]
    copies = [r["copied"] for r in records]
    normal = [[c["normal"] / c["loss"] for c in g] for g in every if "normal" in g[0]]
    tabular_ratios = {g[0]["K"]: [c["mean"] / c["loss"] for c in g] for g in zip(*(r["tabular"] for r in records), strict=True)}
    return [
        mean_verdict("pooled/normal", *normal, figure="policy", note=f"K = {longest}"),
        _rung_verdict(records),
        count_verdict(
            "pooled/occupancy-policy",
            sum(c["off"] for g in played for c in g),
            len(played) * seeds * first["played"],
            seeds=seeds,
            figure="policy",
        ),
        mean_verdict(
            "pooled/mean-policy",
            [c["mean"] / c["truth"] for c in copies],
            figure="policy",
            note=f"weighted by occupancy: {np.mean([c['occupancy'] / c['truth'] for c in copies]):.6f}",
        ),
        mean_verdict(
            "pooled/price",
            *[[c["mean"] / c["loss"] for c in g] for g in shared],
            figure="policy",
            note=f"blind reader {min(blind_price):.3f} to {max(blind_price):.3f}",
        ),
        mean_verdict(
            "pooled/tabular",
            tabular_ratios[_trained(first)],
            figure="policy",
            note=", ".join(f"K = {K}: {np.mean(g):.3f}" for K, g in tabular_ratios.items()),
        ),
    ]


def _bound_verdicts(records: list[dict]) -> list[Verdict]:
    """The price of sharing and the rung of shared prompts, each within its bound."""
    first, seeds = records[0], len(records)
    played = [g for g in _cells(records) if "off" in g[0]]
    copies = [r["copied"] for r in records]
    bounds, exact = _program_ratio(records, 0), _program_ratio(records, 1)
    return [
        count_verdict(
            "pooled/price-bound",
            sum(c["above"] for g in played for c in g),
            len(played) * seeds * first["played"],
            seeds=seeds,
            also=[attained.none_below(records, "price")],
            figure="policy",
            slack=[*attained.ratios(records, "price")[0], *(c["price bound"] / abs(c["price"]) for g in played for c in g)],
        ),
        mean_verdict(
            "pooled/shared-rung",
            bounds,
            exact,
            also=[attained.none_below(records, "shared rung")],
            figure="policy",
            note=f"bound/truth: {1 / np.mean(bounds):.3g} with Cantelli's caps, {1 / np.mean(exact):.3g} with the exact chances",
            slack=[1 / x for x in (*bounds, *exact)],
        ),
        mean_verdict(
            "pooled/attained",
            *attained.ratios(records, "shared rung", "price"),
            figure="policy",
            note=f"truth / rung 6 with the same chances: {np.mean([c['truth'] / c['mean'] for c in copies]):.3g}",
        ),
    ]


def _trained(record: dict) -> int:
    """The length at which the layers are compared: that of training if it was measured."""
    return record["N"] if record["N"] in record["K"] else record["K"][-1]


def plot(records: list[dict]) -> dict[str, Figure]:
    return {"pooled": _risks(records), "policy": _policies(records)}


def _risks(records: list[dict]) -> Figure:
    """Risk over K of every reader; estimation error against that of independent pairs."""
    K = records[0]["K"]
    figure, axes = panel_grid(3, 3.8, ylabel="risk of Qhat, sum over stages")
    shown = (("stage", BLUE, "o"), ("augmented", GREEN, "^"), ("blind", RED, "s"), ("relabeled", ORANGE, "D"))
    for axis, law in zip(axes, ("oracle", "return"), strict=False):
        for reader, color, marker in shown:
            cells = _cells(records, reader=reader, law="relabeled" if reader == "relabeled" else law, dependence="shared")
            if reader == "relabeled" and law == "return":
                continue
            values = np.array([[c["risk"] for c in g] for g in cells])  # [K, seeds, 2]
            axis.plot(K, values[..., 1].mean(1), color=color, label=reader, **EXACT)
            for seed in values[..., 0].T:
                axis.plot(K, seed, color=color, **MEASURED | {"marker": marker, "alpha": 0.35, "markersize": 3.5})
        axis.set(xlabel="trajectories in the prompt K", title=f"Labels: {law}", ylim=(0, None))
        set_log_ticks(axis, K)
    axes[0].axhline(np.mean([r["floor"][0] for r in records]), color=RED, linestyle=":", label="floor of the blind reader")
    legend_below(axes[0], ncols=2, title="readers, left and right", title_fontsize=8)
    groups = [(reader, law) for reader, law in READERS if reader != "stage"]
    for place, (reader, law) in enumerate(groups):
        for dependence, color, marker in (("pairs", GRAY, "s"), ("shared", PURPLE, "o")):
            cells = _cells(records, reader=reader, law=law, dependence=dependence, K=K[0])[0]
            base = _cells(records, reader=reader, law=law, dependence="pairs", K=K[0])[0]
            ratio = [c["estimation"][0] / b["estimation"][1] for c, b in zip(cells, base, strict=True)]
            exact = np.mean([c["estimation"][1] / b["estimation"][1] for c, b in zip(cells, base, strict=True)])
            label = {"pairs": "independent pairs", "shared": "trajectories"}[dependence] if place == 0 else ""
            axes[2].plot([place] * len(ratio), ratio, color=color, **MEASURED | {"marker": marker, "alpha": 0.5}, label=label)
            axes[2].plot([place - 0.3, place + 0.3], [exact] * 2, color=color, linewidth=1.6, marker="")
    names = [reader if reader == law else f"{reader}\n{law}" for reader, law in groups]
    axes[2].set_xticks(range(len(groups)), names, fontsize=8)
    axes[2].set(ylabel="estimation error / that of independent pairs", title=f"Dependence in the trajectory, K = {K[0]}")
    axes[2].legend(fontsize=8)
    figure.set_label("The risk falls with the trajectories for readers that know the stage; the blind reader keeps a floor.")
    return figure


def _policies(records: list[dict]) -> Figure:
    """Loss of one shared prompt, of the mean policy and the bounds; and the instance that separates them."""
    K = records[0]["K"]
    figure, (left, middle, right) = panel_grid(3, 4.2)
    for place, (reader, law) in enumerate(READERS):
        cells = _cells(records, reader=reader, law=law, dependence="shared")
        curve = np.mean([[c["mean"] / c["loss"] for c in g] for g in cells], axis=1)
        label = "" if place else f"simplex features, {len(READERS)} readers and laws"
        left.plot(K, curve, color=PURPLE, marker=(*MARKERS, "*")[place], label=label, linewidth=1)
    ratio = np.array([[c["mean"] / c["loss"] for c in r["tabular"]] for r in records])
    plot_seeds(left, K, ratio, SKY)
    left.plot(K, ratio.mean(0), color=SKY, linestyle="--", label="tabular, one layer a stage", marker="")
    left.axhline(1.0, color=GRAY, linestyle=":", linewidth=1.0)
    left.set(xlabel="trajectories in the prompt K", ylabel="loss of the mean policy / mean loss", title="What sharing changes")
    set_log_ticks(left, K)
    legend_below(left)
    curves = {
        "mean loss, one shared prompt": (BLUE, EXACT | {"marker": "o"}, lambda p: np.mean(p["loss"])),
        "shared rung, exact chances": (GREEN, BOUND, lambda p: np.mean([b[1] for b in p["rung"]])),
        "shared rung, Cantelli's caps": (ORANGE, BOUND, lambda p: np.mean([b[0] for b in p["rung"]])),
    }
    for name, (color, style, value) in curves.items():
        middle.plot(K, np.mean([[value(p) for p in r["program"]] for r in records], 0), color=color, label=name, **style)
    middle.set(
        yscale="log", xlabel="trajectories in the prompt K", ylabel="suboptimality", title="One layer a stage, oracle labels"
    )
    set_log_ticks(middle, K)
    legend_below(middle)
    truth = np.array([r["copied"]["truth"] for r in records])
    for name, color, marker in (("rung", GREEN, "o"), ("mean", RED, "s")):
        label = {"rung": "shared rung", "mean": "mean policy = rung 6"}[name]
        right.plot(truth, [r["copied"][name] for r in records], color=color, **MEASURED | {"marker": marker}, label=label)
    ends = [truth.min(), truth.max()]
    right.plot(ends, ends, color=GRAY, linestyle=":", marker="")
    right.set(xlabel="mean loss, exact", ylabel="suboptimality", title="A policy that copies one trajectory")
    legend_below(right)
    figure.set_label("The mean policy loses at most 12 percent more than the mean loss; two bounds follow the loss.")
    return figure
