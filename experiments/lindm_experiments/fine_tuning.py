"""What does fine-tuning a pretrained layer on new tasks gain, and what does it forget?

A linear attention layer starts at the optimum of old tasks and is trained on new ones with another second moment of w. This is
supervised fine-tuning in the setting of the theory. It is trained in three ways: all weights on new tasks, on mixtures with a
share of old tasks (replay) and on a single new task; the value row on symmetric tasks; the value row on tasks with a mean,
with and without labels in the prompt. Every seed draws its own simplex features (transformed to one covariance) and its own
two laws of tasks. The stopping times of gradient flow are runs of one compiled program with different step sizes. Risks are
measured on fresh prompts and compared with exact functions of the fine-tuning time; policies are greedy on the states of the
feature map.

    lindm run fine_tuning --preset quick
    lindm verify --only fine-tuning

Expected: the measured risks on old and on new tasks are those of the flow. The value weight changes no action. For every share
of replay, training finds the optimum of the mixture, and no layer is below that frontier. With a single new task, stopping
early is better than training on. What training on prompts without labels gains, old tasks lose.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

from lindm.icl.attention import FullAttention
from lindm.icl.trainer import train_many
from lindm_experiments.harness.config import check_at_least, check_counts, check_rising
from lindm_experiments.harness.figures import (
    BLUE,
    BOUND,
    EXACT,
    GRAY,
    GREEN,
    MEASURED,
    ORANGE,
    PURPLE,
    RED,
    SEED,
    SKY,
    legend_below,
    panel_grid,
)
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_experiments.lib.fine_tuning_problems import (
    END,
    FLOW_STEPS,
    FRONTIER,
    GRID,
    LATE,
    LONG,
    POOL,
    SHARES,
    STOP,
    Problem,
    draw,
    draw_problem,
    full_layer,
    policies,
    predictions,
    risk,
    risks_of,
    training,
)

SGD = optax.sgd(0.5)  # on a loss without the factor 1/2: one step is one of the gradient flow of F / 2


def _value_row() -> optax.GradientTransformation:
    """Gradient descent on the value row (v, u) alone."""

    def mask(path: tuple, update: Array) -> Array:
        return update if "W_PV" in jax.tree_util.keystr(path) else jnp.zeros_like(update)

    return optax.chain(SGD, optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(mask, updates)))


VALUE_ROW = _value_row()


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 10
    base_seed: int = 2027000
    d: int = 3
    N: int = 16
    sigma: float = 0.3
    times: tuple[float, ...] = (0.25, 1.0, END)
    few: int = 1  # number of new tasks of the small sets, each with both signs
    sets: int = 4
    steps: int = 400
    batch: int = 64
    prompts: int = 2048

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "d", "N", "few", "sets", "steps", "batch", "prompts")
        check_rising(self, "times", length=2, least=0)
        check_at_least(self, 0.0, "sigma")
        if self.times[-1] > END:
            raise ValueError(f"times must not exceed {END:g}; got {self.times}")


QUICK = Config()
FULL = Config(seeds=20, times=(0.1, 0.25, 0.5, 1.0, 2.0, 4.0, END), sets=16, steps=800, batch=128, prompts=4096)
SMOKE = Config(seeds=2, steps=400, batch=8, prompts=64, sets=2)  # with fewer steps the long ones diverge


def train_all(cfg: Config, problem: Problem, key: Array, start: FullAttention, exact: dict) -> dict:
    """All weights: stopping times on new tasks, mixtures to the end, few tasks stopped early and late."""
    times, shares, sets = len(cfg.times), len(SHARES), cfg.sets
    stops = np.concatenate([cfg.times, np.full(shares, END), np.tile([STOP, LATE], sets)])
    law = np.concatenate([np.zeros(times), np.arange(shares) + 1, np.repeat(np.arange(sets) + 1 + shares, 2)]).astype(int)
    small = np.repeat(problem.small, 2, axis=0)
    data = training(
        problem,
        cfg.batch,
        rate=stops / cfg.steps,
        share=np.concatenate([np.zeros(times), SHARES, np.zeros(2 * sets)]),
        count=np.where(law > shares, 2 * cfg.few, POOL),
        new=np.concatenate([np.repeat(problem.pools[1][None], times + shares, axis=0), small]),
    )
    k_train, k_test = jax.random.split(key)
    keys = jax.random.split(k_train, len(stops))
    layers, _ = train_many(start, draw, keys, steps=cfg.steps, data=(data,), average=0.0, optimizer=SGD)
    A = exact["flow"][law, np.round(stops / END * FLOW_STEPS).astype(int)]
    measured = np.array(risks_of(problem, cfg.prompts, k_test, layers))
    predicted = np.array([risk(exact, A, i) for i in (0, 1)])
    optima = np.array([risk(exact, exact["A"][2 : 2 + shares], i) for i in (0, 1)])
    parts = {"all": slice(0, times), "replay": slice(times, times + shares), "few": slice(times + shares, None)}
    out = {name: {"measured": measured[:, p].tolist(), "flow": predicted[:, p].tolist()} for name, p in parts.items()}
    out["replay"]["optimum"] = optima.tolist()
    weights = np.asarray(layers.A, float)[:, 0]
    out["few"]["path"] = risk(exact, exact["flow"][1 + shares :, GRID], 1).mean(0).tolist()
    out["all"]["leak"] = float(np.max(np.asarray(layers.leak())[:times]))
    return out | {"weights": weights, "end": weights[times - 1]}


def train_value(cfg: Config, problem: Problem, key: Array, start: FullAttention, exact: dict) -> dict:
    """The value row: new tasks with a mean, prompts without and with labels; new tasks, early and at the end; and no training."""
    moved = problem.pools[1] + problem.mean
    data = training(
        problem,
        cfg.batch,
        rate=np.array([LONG, LONG, STOP, END, 0.0]) / cfg.steps,
        labeled=np.array([0.0, 1.0, 1.0, 1.0, 1.0]),
        new=np.stack([moved, moved, *[problem.pools[1]] * 3]),
    )
    k_train, k_test, k_mean = jax.random.split(key, 3)
    layers, _ = train_many(
        start, draw, jax.random.split(k_train, 5), steps=cfg.steps, data=(data,), average=0.0, optimizer=VALUE_ROW
    )
    measured = np.array(risks_of(problem, cfg.prompts, k_test, layers))
    with_mean = np.array(risks_of(problem, cfg.prompts, k_mean, layers, new=moved[None])[1])
    without_labels = np.array(risks_of(problem, cfg.prompts, k_mean, layers, new=moved[None], labeled=[0.0])[1])
    scale = exact["scale"][-2:]
    A = scale[:, None, None] * exact["A"][0]
    return {
        "scale": {"measured": (np.asarray(layers.u, float)[2:4, 0] / float(start.u[0])).tolist(), "exact": scale.tolist()},
        "risk": {"measured": measured[:, 2:4].tolist(), "exact": [risk(exact, A, i).tolist() for i in (0, 1)]},
        # differences on the same prompts
        "zero_shot": {
            "gain": float(without_labels[4] - without_labels[0]),
            "lost": float(measured[0, 0] - measured[0, 4]),
            "lost_new": float(with_mean[0] - with_mean[4]),
            "gain_exact": float(exact["gain"]),
            "lost_exact": float(exact["cost"]),
        },
        "row": {"measured": float(with_mean[1]), "exact": float(exact["row"]), "scaled": float(exact["scaled"])},
        "layer": layers,
    }


def measure(cfg: Config, point: dict) -> dict:
    seed = cfg.base_seed + point["seed"]
    rng, (k_all, k_value) = np.random.default_rng(seed), jax.random.split(jax.random.key(seed))
    problem = draw_problem(rng, d=cfg.d, few=cfg.few, sets=cfg.sets, N=cfg.N, sigma=cfg.sigma)
    exact = predictions(problem)
    before = exact["A"][0]
    start = full_layer(before)
    every = train_all(cfg, problem, k_all, start, exact)
    value = train_value(cfg, problem, k_value, start, exact)
    weights, end, layer = every.pop("weights"), every.pop("end"), value.pop("layer")
    scale = exact["scale"][: len(GRID), None, None]
    paths = {"all weights": exact["flow"][0, GRID], "reduced": exact["reduced"], "value weight": scale * before}
    both = {"start": before, "limit": exact["A"][1], "frontier": exact["frontier"], "trained": weights}
    return {
        "times": list(cfg.times),
        **{name: [risk(exact, A, law).tolist() for law in (0, 1)] for name, A in both.items()},
        "paths": {name: [risk(exact, A, law).tolist() for law in (0, 1)] for name, A in paths.items()},
        **every,
        "value": value,
        "policy": policies(problem, cfg.prompts, rng, before, end, start, layer),
    }


def _ratio(records: list[dict], *path: str, below: str = "flow") -> np.ndarray:
    """measured / predicted of a part of the records: [seeds, law, runs]."""
    parts = []
    for r in records:
        for name in path:
            r = r[name]
        parts.append(np.array(r["measured"]) / np.array(r[below]))
    return np.array(parts)


def _parts(ratio: np.ndarray) -> np.ndarray:
    """[parts, seeds] of an array [seeds, law, runs]."""
    return ratio.reshape(len(ratio), -1).T


def _few(record: dict, name: str = "measured") -> np.ndarray:
    """Mean risk over the small sets: [law, (early, late)]."""
    values = np.array(record["few"][name])
    return values.reshape(2, -1, 2).mean(1)


def above_frontier(record: dict) -> np.ndarray:
    """min over shares p of (p F_0 + (1 - p) F_1) / (the least value of it), for every trained layer and point of a path: >= 1."""
    layers = np.concatenate([np.array(record["trained"]), *(np.array(p) for p in record["paths"].values())], axis=1)
    p = FRONTIER[:, None]
    mixed = p * layers[0] + (1 - p) * layers[1]
    least = FRONTIER * np.array(record["frontier"][0]) + (1 - FRONTIER) * np.array(record["frontier"][1])
    return np.min(mixed / least[:, None], axis=0)


def attained(record: dict) -> float:
    """The same for the layers that were trained on mixtures, each at its own share, in the mean; exact risks of their weights."""
    times, shares = len(record["times"]), np.array(SHARES)
    old, new = np.array(record["trained"])[:, times : times + len(shares)]
    best_old, best_new = np.array(record["replay"]["optimum"])
    return float(np.mean((shares * old + (1 - shares) * new) / (shares * best_old + (1 - shares) * best_new)))


def check(records: list[dict]) -> list[Verdict]:
    seeds, figure = len(records), "fine_tuning"
    few = np.array([_few(r) / _few(r, "flow") for r in records])
    early = [_few(r)[1, 0] / _few(r)[1, 1] for r in records]
    above = np.array([above_frontier(r) for r in records])
    policy = [r["policy"] for r in records]
    decisions = sum(2 * p["decisions"] for p in policy)
    changes = {
        n: sum(p[law][n] for p in policy for law in ("old", "new")) for n in ("weight_changes", "row_changes", "all_changes")
    }

    def loss(rule: str, law: str) -> list[float]:
        return [p[law]["loss"][rule] / p[law]["loss"]["before"] for p in policy]

    zero = [r["value"]["zero_shot"] for r in records]
    row = [r["value"]["row"] for r in records]
    start, limit = (np.array([r[name] for r in records]).mean(0) for name in ("start", "limit"))
    return [
        mean_verdict(
            "fine-tuning",
            *_parts(_ratio(records, "all")),
            figure=figure,
            note=f"risk, old and new: {start[0]:.3f} and {start[1]:.3f} before, {limit[0]:.3f} and {limit[1]:.3f} at the end; "
            f"v and z up to {max(r['all']['leak'] for r in records):.3f}",
        ),
        mean_verdict("fine-tuning/few", *_parts(few), figure=figure),
        mean_verdict("fine-tuning/early-stopping", early, figure=figure, note=f"time {STOP:g} against {LATE:g}"),
        mean_verdict("fine-tuning/replay", *_parts(_ratio(records, "replay", below="optimum")), figure=figure),
        count_verdict("fine-tuning/frontier", int(np.sum(above < 1 - 1e-9)), above.size, seeds=seeds, figure=figure, slack=above),
        mean_verdict("fine-tuning/frontier-attained", [attained(r) for r in records], figure=figure),
        count_verdict(
            "fine-tuning/value-only",
            changes["weight_changes"],
            decisions,
            seeds=seeds,
            figure=figure,
            note=f"of {decisions} actions the value row changes {changes['row_changes']}, all weights {changes['all_changes']}",
        ),
        mean_verdict("fine-tuning/value-risk", *_parts(_ratio(records, "value", "risk", below="exact")), figure=figure),
        mean_verdict("fine-tuning/value-policy", loss("row", "new"), figure=figure),
        mean_verdict("fine-tuning/policy", loss("all", "new"), figure=figure),
        mean_verdict("fine-tuning/forgotten-policy", loss("all", "old"), figure=figure),
        mean_verdict(
            "fine-tuning/zero-shot",
            [z["lost"] / z["gain"] for z in zero],
            figure=figure,
            note="gain {gain:.3f} (exact {gain_exact:.3f}), lost {lost:.3f} (old), {lost_new:.3f} (new, with labels)".format(
                **{name: np.mean([z[name] for z in zero]) for name in zero[0]}
            ),
        ),
        mean_verdict(
            "fine-tuning/value-row",
            [r["measured"] / r["exact"] for r in row],
            figure=figure,
            note=f"the value weight alone would end at {np.mean([r['scaled'] / r['exact'] for r in row]):.3f} times the risk",
        ),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    figure, (left, middle, right) = panel_grid(3, 4.4)
    times = GRID * END / FLOW_STEPS
    colors = {"all weights": BLUE, "reduced": GREEN, "value weight": ORANGE}
    for k, r in enumerate(records):
        (old, new), (old_end, new_end) = np.array(r["start"]), np.array(r["limit"])

        def place(risks: Any, old=old, new=new, old_end=old_end, new_end=new_end) -> tuple[np.ndarray, np.ndarray]:
            x, y = np.array(risks)
            return (x - old) / (old_end - old), (y - new_end) / (new - new_end)

        for name, color in colors.items():
            left.plot(*place(r["paths"][name]), color=color, **SEED)
        left.plot(*place(r["frontier"]), color=GRAY, **SEED)
        trained, n = np.array(r["trained"]), len(r["times"])
        parts = ((slice(0, n), BLUE, "o", "all weights, trained"), (slice(n, n + len(SHARES)), RED, "s", "replay, trained"))
        for part, color, marker, label in parts:
            style = MEASURED | {"marker": marker, "alpha": 0.5, "markersize": 3.5}
            left.plot(*place(trained[:, part]), color=color, label=None if k else label, **style)
    for name, color in (*colors.items(), ("frontier (replay, exact)", GRAY)):
        left.plot([], [], color=color, label=name, **EXACT)
    left.set(
        xlim=(-0.15, 1.3),
        ylim=(-0.1, 1.2),
        xlabel="forgotten / that of the new optimum",
        ylabel="left to learn / that at the start",
        title="Trade-off, every seed",
    )
    legend_below(left, ncols=2)
    for law, color, label in ((0, PURPLE, "old tasks"), (1, SKY, "new tasks")):
        path = np.array([r["paths"]["all weights"][law] for r in records])
        measured = np.array([r["all"]["measured"][law] for r in records])
        middle.plot(times, path.mean(0), color=color, label=label, **EXACT)
        middle.plot(records[0]["times"], measured.mean(0), color=color, **MEASURED)
    few = np.array([_few(r)[1] for r in records])
    middle.plot(
        times, np.mean([r["few"]["path"] for r in records], axis=0), color=SKY, label="new tasks, trained on few", **BOUND
    )
    middle.plot([STOP, LATE], few.mean(0), color=SKY, **MEASURED | {"marker": "s"})
    middle.set(xscale="log", xlabel="fine-tuning time", ylabel="risk", title="All weights: flow (lines), layer (points)")
    legend_below(middle)
    zero = [r["value"]["zero_shot"] for r in records]
    gain = np.array([z["gain"] for z in zero])
    right.plot(gain, [z["lost"] for z in zero], color=PURPLE, label="old tasks, mean zero", **MEASURED)
    style = MEASURED | {"marker": "s"}
    right.plot(gain, [z["lost_new"] for z in zero], color=SKY, label="new tasks, the same layer with labels", **style)
    right.plot([0, gain.max()], [0, gain.max()], color=GRAY, label="lost = gained", **EXACT)
    right.set(
        xlabel="gain on prompts without labels",
        ylabel="in-context risk lost",
        title="Value row trained on prompts without labels",
    )
    legend_below(right)
    figure.set_label(
        "Above left: the trade-off between what is left to learn and what is forgotten; paths of all weights and of the "
        "reduced layer lie above the frontier, which replay reaches. Above right: the risk of new tasks falls while that of "
        "old ones rises; trained on few tasks it turns up again. Below: what training without labels gains, the in-context "
        "risk loses."
    )
    return {"fine_tuning": figure}
