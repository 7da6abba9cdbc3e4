"""How loose is each bound on the suboptimality, from the exact loss of one policy to the theorem that needs no data?

A trained layer gives Qhat, Qhat gives a greedy policy, and dynamic programming gives the exact suboptimality of this policy.
It is compared with the rungs of `toolkit/rungs.py`: the identity, the scale-free span, its margin form, the sup norm, bias +
estimation + optimization, and the rungs on averages (4, and the mean policy, as every stage has its own context) and on
probability (5). A rung is a theorem: one violation refutes it. The waterfall figure shows how loose it is. A loose rung would
also hold with wrong constants, so each rung is also tested on instances on which it is attained (`lib/attained.py`), and the
radius of rung 5 is compared with the norm of the error that it bounds.

    lindm run ladder --preset quick
    lindm verify --only identity ladder expected-bound high-probability-bound

Expected: no violation at all. The mean policy is two to ten times tighter than rung 4, and rung 5 is the loosest by far. On
their instances, all rungs are within 1.5 of the truth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.problems.linear_mdp import MDPFamily, onehot_family, second_moment, simplex_family, tabulate
from lindm.validate import count
from lindm_experiments.harness.claims import get_claim
from lindm_experiments.harness.config import check_counts
from lindm_experiments.harness.figures import BLUE, GRAY, GREEN, RED, WIDTH, panel_grid, set_log_ticks
from lindm_experiments.harness.statistics import at_most
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_experiments.lib import attained, linear_mdps
from lindm_experiments.toolkit.rungs import RUNGS, Case
from lindm_theory import concentration

PER_POLICY = attained.PER_POLICY  # rungs that must hold for every single policy
COUNTED = (*PER_POLICY, "high_probability")
# all that is attained within 1.5; rung 4 with noise is twice the truth, but equal to the norm that it bounds
ATTAINED = (*PER_POLICY, *attained.EXPECTED_BIAS, "high_probability, bias", "high_probability, noise", "mean_policy")
NAMES = {
    "suboptimality": "exact suboptimality",
    "span_per_state": "1 span, scale per state",
    "margin": "1b margin",
    "span_per_stage": "1 span, scale per stage",
    "sup_norm": "2 sup norm",
    "error_parts": "3 parts of the error",
    "mean_policy": "6 mean policy",
    "expected_tight": "4 expected, tightened",
    "expected": "4 expected",
    "high_probability": "5 high probability",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 207000
    tasks: int = 352  # number of policies for every family and context length
    N: int = 64
    M: tuple[int, ...] = (16, 128)
    half_width: float = 0.5  # label noise is uniform on +- half_width
    delta: float = 0.1
    steps: int = 300

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "tasks", "N", "steps")
        for M in self.M or (0,):
            count(M, "M")
        if not 0 <= self.half_width < float("inf"):
            raise ValueError(f"half_width must be finite and not negative; got {self.half_width}")
        if self.delta != get_claim("high-probability-bound").hi:
            raise ValueError(f"delta must be the level of the claim, {get_claim('high-probability-bound').hi}; got {self.delta}")


QUICK = Config()
FULL = Config(seeds=10, tasks=512, M=(8, 32, 128, 512), steps=2000)
SMOKE = Config(seeds=2, tasks=16, M=(8,), steps=20)


def families(key: Array) -> dict[str, MDPFamily]:
    return {
        "simplex": simplex_family(key, 12, 3, 5, 4, feature_power=2.0),
        "simplex, centered rewards": simplex_family(key, 12, 3, 5, 4, feature_power=2.0, low=-1.0, high=1.0),
        "one-hot": onehot_family(4, 3, 4, low=-1.0, high=1.0),
    }


@partial(jax.jit, static_argnames=("tasks", "longest"))
def rungs_of_tasks(
    key: Array,
    family: MDPFamily,
    A: Array,
    Ahat: Array,
    Psi: Array,
    M: Array,
    half_width: Array,
    delta: Array,
    tasks: int,
    longest: int,
) -> dict[str, Array]:
    """Exact loss and every rung, [tasks] each, of the policies that Ahat gives on fresh tasks and contexts.

    "norm" [tasks, H]: the error of w_h in the norm of rung 5, in radii. "scale" [tasks]: the largest value, at least 1.
    """
    Lambda, H = second_moment(family), A.shape[0]
    noise = {"noise_bound": half_width, "noise_variance": half_width**2 / 3}
    root = jnp.linalg.cholesky(Lambda).T

    def one(k: Array) -> dict[str, Array]:
        k_task, k_context = jax.random.split(k)
        task, plan, w = linear_mdps.draw_oracle(k_task, family)
        S = linear_mdps.context_sums(k_context, family, w, M, half_width, longest)
        case = Case(
            mdp=tabulate(task),
            Qstar=plan.Q,
            Qhat=linear_mdps.action_values(family, Ahat, S),
            phi=family.phi,
            design=family.design,
            w=w,
            weights=Ahat,
            best_weights=A,
            context=S,
            M=M,
            Psi=Psi,
            delta=delta,
            **noise,
        )
        b, v = jax.vmap(
            lambda B, w: concentration.error_size(linear_mdps.pairs_table(family), family.design, B, w, Lambda, **noise)
        )(Ahat, w)
        norm = jnp.linalg.norm(jnp.einsum("ij,hjk,hk->hi", root, Ahat, S - w @ Lambda), axis=-1)
        return {name: RUNGS[name].compute(case) for name in ("identity", *NAMES)} | {
            "norm": norm / concentration.smale_zhou(b, v, M, delta / H),
            "scale": jnp.maximum(1.0, jnp.abs(plan.V).max()),
        }

    return jax.lax.map(one, jax.random.split(key, tasks), batch_size=32)


def measure(cfg: Config, point: dict) -> dict:
    key = jax.random.key(cfg.base_seed + point["seed"])
    k_features, k_families = jax.random.split(key)
    half_width, delta = jnp.asarray(cfg.half_width), jnp.asarray(cfg.delta)
    sigma = cfg.half_width / 3**0.5
    cells = []
    for i, (name, family) in enumerate(families(k_features).items()):
        k_pool, k_train, k_test = jax.random.split(jax.random.fold_in(k_families, i), 3)  # no family shares tasks with another
        pool = linear_mdps.task_pool(k_pool, family)
        Psi = linear_mdps.pool_moment(pool)
        A = linear_mdps.closed_form_layers(family, Psi, float(cfg.N), sigma)
        Ahat = linear_mdps.trained_layers(k_train, family, pool, cfg.N, sigma, steps=cfg.steps, learning_rate=0.3, batch=128)
        for M in cfg.M:
            k = jax.random.fold_in(k_test, M)
            out = rungs_of_tasks(
                k, family, A, Ahat, Psi, jnp.asarray(float(M)), half_width, delta, tasks=cfg.tasks, longest=max(cfg.M)
            )
            tolerance = 1e-9 * out["scale"]
            # a mean over tasks has one value for all of them
            means = {r: out[r][0] if r in ("expected", "expected_tight") else out[r].mean() for r in NAMES}
            cells.append(
                {
                    "family": name,
                    "M": M,
                    "n": cfg.tasks,
                    "mean": {r: float(v) for r, v in means.items()},
                    "identity_error": float((jnp.abs(out["suboptimality"] - out["identity"]) / out["scale"]).max()),
                    "identity_off": int((jnp.abs(out["suboptimality"] - out["identity"]) > 1e-12 * out["scale"]).sum()),
                    "violations": {r: int((out["suboptimality"] > out[r] + tolerance).sum()) for r in COUNTED},
                    "beyond": int((out["norm"] > 1).any(1).sum()),  # contexts with a norm above its radius
                    # the norm that is exceeded with the probability that its radius allows, in radii
                    "norm": float(jnp.quantile(out["norm"], 1 - cfg.delta / family.theta_low.shape[0])),
                    "weights_error": float(jnp.linalg.norm(Ahat - A) / jnp.linalg.norm(A)),
                }
            )
    seed = cfg.base_seed + point["seed"]
    return {"cells": cells, "N": cfg.N, "instances": seed, "attained": attained.ladder_pairs(seed)}


def _total(records: list[dict], value) -> int:
    return sum(value(c) for r in records for c in r["cells"])


def _violated(record: dict) -> int:
    """Contexts of a seed on which rung 5 is violated, by the loss or by a norm, whichever is more frequent."""
    cells = record["cells"]
    return max(sum(c["violations"]["high_probability"] for c in cells), sum(c["beyond"] for c in cells))


def _largest_ratio(records: list[dict], top: str, bottom: str) -> list[float]:
    return [max(c["mean"][top] / c["mean"][bottom] for c in r["cells"]) for r in records]


def _slack(records: list[dict], *rungs: str) -> list[float]:
    """bound / truth of the rungs, on the instances and in all cells."""
    names = [name for name, (_, rung) in attained.LADDER.items() if rung in rungs]
    cells = [c["mean"][r] / c["mean"]["suboptimality"] for x in records for c in x["cells"] for r in rungs]
    return [*np.concatenate(attained.ratios(records, *names)), *cells]


def _tightness(records: list[dict], rungs: tuple[str, ...]) -> str:
    """Bound / suboptimality, the median over all cells and seeds, for each rung."""
    ratio = {r: np.median([c["mean"][r] / c["mean"]["suboptimality"] for x in records for c in x["cells"]]) for r in rungs}
    return "bound / suboptimality: " + ", ".join(f"{NAMES[r]} {v:.3g}" for r, v in ratio.items())


def _high_probability_verdicts(records: list[dict]) -> list[Verdict]:
    """Rung 5, and its radius beside the norm that it bounds."""
    broken, beyond = _total(records, lambda c: c["violations"]["high_probability"]), _total(records, lambda c: c["beyond"])
    lengths = [c["M"] for c in records[0]["cells"]]
    shortest, longest = min(lengths), max(lengths)
    radii = {M: [[1 / c["norm"] for c in r["cells"] if c["M"] == M] for r in records] for M in (shortest, longest)}
    return [
        count_verdict(
            "high-probability-bound",
            max(broken, beyond),
            _total(records, lambda c: c["n"]),
            seeds=len(records),
            exact=False,
            also=[
                attained.none_below(records, "high_probability, bias", "high_probability, noise", "radius", "radius, rare"),
                at_most([_violated(r) / _total([r], lambda c: c["n"]) for r in records], get_claim("high-probability-bound").hi),
            ],
            figure="waterfall",
            note=f"{_tightness(records, ('high_probability',))}; a norm above its radius in {beyond} contexts",
            slack=_slack(records, "high_probability"),
        ),
        mean_verdict(
            "high-probability-bound/radius",
            *np.transpose(radii[longest]),
            *attained.ratios(records, "radius"),
            note=f"M = {longest}; at M = {shortest} {np.mean(radii[shortest]):.3g} times",
            slack=np.concatenate([*radii[longest], *attained.ratios(records, "radius")]),
        ),
    ]


def check(records: list[dict]) -> list[Verdict]:
    n, seeds = _total(records, lambda c: c["n"]), len(records)
    broken = sum(_total(records, lambda c, r=r: c["violations"][r]) for r in PER_POLICY)
    worst = max(c["identity_error"] for r in records for c in r["cells"])
    shown = ", ".join(f"{k} {v.mean():.3g}" for k, v in zip(ATTAINED, attained.ratios(records, *ATTAINED), strict=True))
    return [
        count_verdict(
            "identity",
            _total(records, lambda c: c["identity_off"]),
            n,
            seeds=seeds,
            figure="waterfall",
            note=f"largest {worst:.1e}",
        ),
        # a policy that breaks two rungs counts twice: only zero passes, so the count need not be exact
        count_verdict(
            "ladder",
            min(n, broken),
            n,
            seeds=seeds,
            figure="waterfall",
            note=_tightness(records, PER_POLICY),
            also=[attained.none_below(records, *PER_POLICY)],
            slack=_slack(records, *PER_POLICY),
        ),
        mean_verdict(
            "ladder/attained",
            *attained.ratios(records, *ATTAINED),
            also=[attained.none_below(records, *ATTAINED)],
            figure="attained",
            note="bound/truth: " + shown,
        ),
        mean_verdict(
            "expected-bound",
            _largest_ratio(records, "suboptimality", "expected"),
            also=[attained.none_below(records, *attained.EXPECTED_BIAS, *attained.EXPECTED_NOISE)],
            figure="waterfall",
            note=_tightness(records, ("expected", "expected_tight")),
            slack=_slack(records, "expected", "expected_tight"),
        ),
        mean_verdict(
            "expected-bound/mean-policy",
            _largest_ratio(records, "suboptimality", "mean_policy"),
            _largest_ratio(records, "mean_policy", "expected"),
            also=[attained.none_below(records, "mean_policy")],
            figure="waterfall",
            note=_tightness(records, ("mean_policy",)),
            slack=_slack(records, "mean_policy"),
        ),
        *_high_probability_verdicts(records),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    return {"waterfall": _waterfall(records), "growth": _growth(records), "attained": _attained(records)}


def _attained(records: list[dict]) -> Figure:
    """bound / truth of every rung: on the instances on which it is attained, and on random MDPs."""
    rungs = _sorted_rungs([c["mean"] for r in records for c in r["cells"]])[1:]
    figure, axis = pyplot.subplots(figsize=(WIDTH, 4.0))
    band = get_claim("ladder/attained")
    axis.axvspan(1, band.hi, color=GRAY, alpha=0.25, lw=0)
    for i, rung in enumerate(rungs):
        names = [name for name, (_, of) in attained.LADDER.items() if of == rung]
        own = np.concatenate(attained.ratios(records, *names))
        cells = [c["mean"][rung] / c["mean"]["suboptimality"] for r in records for c in r["cells"]]
        for values, color, label, shift in ((cells, GRAY, "random MDPs", 0.15), (own, BLUE, "instances", -0.15)):
            axis.plot(values, np.full(len(values), i + shift), "o", color=color, alpha=0.6, label=label if i == 0 else None)
    axis.set_yticks(range(len(rungs)), [NAMES[r] for r in rungs])
    axis.set(xscale="log", xlabel="bound / suboptimality", title="How near each rung comes to the truth")
    axis.invert_yaxis()
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    figure.set_label(
        "Every bound divided by the truth: on constructed instances (blue) each rung comes within the gray band near 1; on "
        "random MDPs (gray) the ratio lies between 2 and 300 and grows from rung to rung."
    )
    return figure


GROUPS = (
    ("suboptimality",),
    ("span_per_state", "margin", "span_per_stage", "sup_norm", "error_parts"),
    ("mean_policy", "expected_tight", "expected"),
    ("high_probability",),
)
"""The truth, and the rungs by kind: of one context, in expectation over contexts, with high probability."""


def _sorted_rungs(means: Sequence[dict[str, float]]) -> list[str]:
    """The names of the truth and of the rungs, by kind, and in a kind by their mean over cells."""
    return [r for group in GROUPS for r in sorted(group, key=lambda r: np.mean([m[r] for m in means]))]


def _waterfall(records: list[dict]) -> Figure:
    """One panel a family at the middle context length: the truth and every bound as points, seeds as ticks."""
    names = list(dict.fromkeys(c["family"] for c in records[0]["cells"]))
    lengths = sorted({c["M"] for c in records[0]["cells"]})
    M = lengths[len(lengths) // 2]
    figure, axes = panel_grid(len(names), 3.2, free=True, sharey=True, sharex=True)
    cells = {name: [c["mean"] for x in records for c in x["cells"] if c["family"] == name and c["M"] == M] for name in names}
    rows = _sorted_rungs([c for of_family in cells.values() for c in of_family])
    color = {r: color for group, color in zip(GROUPS, (BLUE, GRAY, GREEN, RED), strict=True) for r in group}
    for axis, name in zip(axes, names, strict=False):
        truth = np.mean([c["suboptimality"] for c in cells[name]])
        for i, r in enumerate(rows):
            values = np.array([c[r] for c in cells[name]])
            axis.plot(values, np.full(len(values), i), "|", color=color[r], markersize=9, alpha=0.7)
            axis.plot(values.mean(), i, "o", color=color[r], markersize=6)
            times = "" if r == "suboptimality" else f"  ×{values.mean() / truth:.3g}"
            axis.text(values.max() * 1.3, i, f"{values.mean():.3g}{times}", va="center", fontsize=8)
        axis.set(xscale="log", title=name, xlabel="suboptimality")
        axis.set_yticks(range(len(rows)), [NAMES[r] for r in rows], fontsize=8)
        axis.xaxis.set_tick_params(labelbottom=True)
    low, high = axes[0].get_xlim()
    axes[0].set(xlim=(low / 1.5, high * 30), ylim=(len(rows) - 0.4, -0.6))  # room for the numbers; the truth above
    kinds = (
        "exact suboptimality",
        "bound, given the context",
        "bound in expectation over contexts",
        "bound with high probability",
    )
    for group, kind in zip(GROUPS, kinds, strict=True):
        axes[-1].plot([], [], "o", color=color[group[0]], label=kind)
    axes[-1].legend(loc="center", title="mean (point) and seeds (ticks);\n×: multiple of the exact one")
    title = f"Exact suboptimality and the ladder of bounds above it (N = {records[0]['N']}, M = {M})"
    figure.suptitle(title, x=0.01, ha="left")
    figure.set_label(
        "The exact suboptimality (above) and every bound as points on a logarithmic axis, by kind and size: bounds of one "
        "context are 2 to 26 times the truth, the bounds in expectation 3 to 75 times, that with high probability 30 to 230 "
        "times."
    )
    return figure


def _growth(records: list[dict]) -> Figure:
    """The rungs over the context length M, one panel a family."""
    names = list(dict.fromkeys(c["family"] for c in records[0]["cells"]))
    lengths = sorted({c["M"] for c in records[0]["cells"]})
    figure, axes = panel_grid(len(names), 2.9, ylabel="suboptimality", free=True, sharey=True)
    for axis, name in zip(axes, names, strict=False):
        for r in ("suboptimality", "span_per_state", "mean_policy", "sup_norm", "expected", "high_probability"):
            values = [
                [next(c["mean"][r] for c in x["cells"] if c["family"] == name and c["M"] == M) for M in lengths] for x in records
            ]
            axis.plot(lengths, np.mean(values, 0), label=NAMES[r], linestyle="-" if r == "suboptimality" else "--")
        axis.set(yscale="log", xlabel="pairs in the test prompt M", title=name)
        set_log_ticks(axis, lengths)
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center")
    figure.set_label(
        "The exact suboptimality falls with the context length, and so do the bounds above it, in the same order in each of "
        "the three families."
    )
    return figure
