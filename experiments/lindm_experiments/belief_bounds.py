"""Do the certified bounds contain the exact answer, how wide are they, and how good are labels made from them?

The problems are random ambiguous POMDPs of three models with any attitude, and the first model of each as a POMDP. Their size
is one that the belief tree solves exactly. At the histories of demonstrations, where labels are needed, HSVI (POMDPs) and the
net (both kinds) bound every action value, at several levels of effort. A label is an action with a certificate or with a bound
on its loss; both are compared with the exact action values. Widths are relative to sum_h (max r_h - min r_h), the largest
possible difference between two policies.

The tiger (Kaelbling, Littman, Cassandra, Artif. Intell. 101, 1998: a growl is heard right with 0.85, discount 0.95) shows the
same over all beliefs. One growl moves the logarithm of the odds by a constant, so on a grid of fractions of this constant
dynamic programming is exact for every horizon (`tiger_answers`), without a tree. The tiger is padded to the size of the random
problems, with states that do not occur and an observation of probability zero, and shares their compiled programs.

    lindm run belief_bounds --preset quick
    lindm verify --only belief-bounds

Expected: no bound and no label is violated. Widths fall by orders of magnitude with the effort, and nearly all labels of the
largest effort are certified. (The bands of the last two claims were fixed on other seeds.)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lindm.figures.beliefs import draw_action_strips, draw_bounds
from lindm.problems.apomdp import draw_apomdp, single
from lindm.solvers import belief_net, hsvi, tree
from lindm.solvers.belief import advance, branching, first_history
from lindm.solvers.rollout import demonstrate
from lindm.solvers.solve import Tables, label, q_bounds, solve
from lindm.types import APOMDP, CERTIFIED
from lindm.validate import count, nonnegative
from lindm_experiments.harness.config import check_counts
from lindm_experiments.harness.figures import (
    BLUE,
    EXACT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SEED,
    SKY,
    WIDTH,
    legend_below,
    panel_grid,
)
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict, of_seeds
from lindm_experiments.lib.apomdps import value_span
from lindm_experiments.lib.tiger import DISCOUNT, tiger, tiger_answers, tiger_beliefs

S, A, O, H, M = 4, 3, 3, 5, 3
ROUNDING = 1e-9  # relative to the most that two policies can differ by
WIDE = 1e-6  # intervals below this share of the span are as good as exact
EPSILON = 0.3  # share of random actions in the demonstrations
ACTION_COLORS = ("#DDDDDD", ORANGE, PURPLE)
METHODS = ("HSVI, POMDPs", "net, POMDPs", "net, APOMDPs")
HORIZONS = (1, 2, 3, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 2042000
    problems: int = 6
    episodes: int = 24  # number of episodes on every APOMDP
    trials: int = 64  # maximum number of trials of HSVI
    tolerances: tuple[float, ...] = (0.1, 0.01, 1e-3, 1e-4, 0.0)  # tolerances at which HSVI stops; 0: all trials
    points: tuple[int, ...] = (16, 128, 1024)  # numbers of points of the net

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "problems", "episodes", "trials")
        for name, rising in (("tolerances", False), ("points", True)):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values), reverse=not rising):
                raise ValueError(f"{name} must {'rise' if rising else 'fall'}, at least one; got {values}")
        nonnegative(self.tolerances[-1], "tolerances")
        count(self.points[0], "points")


QUICK = Config()
FULL = Config(
    seeds=10,
    problems=8,
    trials=128,
    tolerances=(0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5, 0.0),
    points=(16, 64, 256, 1024, 2048),
)
SMOKE = Config(seeds=2, problems=1, episodes=4, trials=4, tolerances=(0.1, 0.0), points=(8, 16))


def points(cfg: Config) -> list[dict]:
    return [*({"seed": s} for s in range(cfg.seeds)), {"problem": "tiger"}]


# --- problems and exact answers --------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Visited:
    """A problem, and the exact answer wherever its demonstrations went."""

    problem: APOMDP
    history: Array  # [..., H, n] number within the stage
    beliefs: Array  # [..., H, n, M, S]
    Q: Array  # [..., H, n, A] exact


@partial(jax.jit, static_argnames=("problems", "episodes"))
def draw_visited(key: Array, problems: int, episodes: int) -> tuple[Visited, Visited]:
    """APOMDPs and their first models as POMDPs, stacked, along the same demonstrations around the APOMDP's optimal policy."""

    def one(key: Array) -> tuple[Visited, Visited]:
        k_draw, k_alpha, k_walk = jax.random.split(key, 3)
        apomdp = draw_apomdp(k_draw, S, A, O, H, M, alpha=jax.random.uniform(k_alpha))
        solution = solve(apomdp, "tree")
        taken, _ = demonstrate(k_walk, solution, episodes, EPSILON)
        assert isinstance(solution.tables, tree.Tree) and taken.m is not None and taken.o is not None
        alone = single(jax.tree.map(lambda x: x[0], apomdp.models))
        return (
            visited(apomdp, solution.tables, taken.a, taken.m, taken.o),
            visited(alone, tree.tree(alone), taken.a, jnp.zeros_like(taken.m), taken.o),
        )

    return jax.lax.map(one, jax.random.split(key, problems))


def visited(problem: APOMDP, table: tree.Tree, a: Array, m: Array, o: Array) -> Visited:
    """The histories, beliefs and exact action values along episodes [n, H]."""
    B = branching(problem)
    first = jnp.array([first_history(B, t) for t in range(H)])

    def one(a: Array, m: Array, o: Array):
        def step(carry, at):
            t, *taken = at
            return advance(problem, t, *carry, *taken), (*carry, table.Q[first[t] + carry[0]])

        return jax.lax.scan(step, (jnp.int32(0), problem.models.rho), (jnp.arange(H), a, m, o))[1]

    return Visited(problem=problem, **dict(zip(("history", "beliefs", "Q"), jax.vmap(one, out_axes=1)(a, m, o), strict=True)))


def tiger_visited() -> Visited:
    """The tiger at all its beliefs: stage t of H is the first one of H - t stages, discounted t times."""
    left = tiger_beliefs()
    beliefs = np.stack([left, 1 - left, 0 * left, 0 * left], -1)[None, :, None]
    Q = tiger_answers(H)[::-1] * DISCOUNT ** np.arange(H)[:, None, None]
    return Visited(
        problem=single(tiger(S, O, H)),
        history=jnp.broadcast_to(jnp.arange(len(left)), (H, len(left))),
        beliefs=jnp.broadcast_to(jnp.asarray(beliefs), (H, len(left), 1, S)),
        Q=jnp.asarray(Q),
    )


# --- bounds ------------------------------------------------------------------------------------------------------------------


@jax.jit
def bounds_at(problem: APOMDP, tables: Tables, beliefs: Array) -> dict[str, Array]:
    """Bounds of the action values at beliefs [H, n, M, S], and the label made of them: `lower`, `upper` [H, n, A], the rest
    [H, n]."""

    def one(t: Array, belief: Array) -> dict[str, Array]:
        lower, upper, _ = q_bounds(problem, tables, t, jnp.int32(0), belief)
        labels = label(lower, upper, exact=False)
        certified = labels.certificate == CERTIFIED
        return {"lower": lower, "upper": upper, "action": labels.action, "certified": certified, "regret": labels.regret}

    return jax.lax.map(lambda at: jax.vmap(one, (None, 0))(*at), (jnp.arange(H), beliefs))


def solved_by_hsvi(problem: APOMDP, trials: int, tolerance: float) -> tuple[hsvi.Bounds, int]:
    """Bounds of HSVI for an APOMDP with one model, and the number of trials."""
    bounds = hsvi.hsvi(jax.tree.map(lambda x: x[0], problem.models), trials=trials, tolerance=tolerance)
    return bounds, int(bounds.trials)


def solved_by_net(problem: APOMDP, points: int) -> tuple[belief_net.Net, int]:
    """A net padded to `points` slots, so that nets of one size share a compiled program; and its largest layer."""
    solution = belief_net.net(problem, points=points)

    def filled(array: Array) -> np.ndarray:
        x = np.asarray(array)
        return np.concatenate([x, np.repeat(x[:, :1], points - x.shape[1], 1)], 1)

    layers = {
        name: filled(getattr(solution, name)) for name in ("beliefs", "lower", "upper", "radius", "slope_low", "slope_high")
    }
    return replace(solution, **layers), int(solution.points.max())


def alike(problem: APOMDP) -> APOMDP:
    """An APOMDP with one model as one with M equal models: the same values, with the compiled programs of the APOMDPs."""
    return replace(problem, models=jax.tree.map(lambda x: jnp.repeat(x, M, 0), problem.models))


def compare_bounds(seen: Visited, bounds: dict[str, Array]) -> dict[str, float]:
    """Counts over different histories, and means over all steps, of one method at the histories of one problem."""
    scale, Q = float(value_span(seen.problem)), np.asarray(seen.Q)
    lower, upper, action, certified, regret = (np.asarray(bounds[k]) for k in ("lower", "upper", "action", "certified", "regret"))
    outside = ((lower - Q > ROUNDING * scale) | (Q - upper > ROUNDING * scale)).any(-1)
    lost = Q.max(-1) - np.take_along_axis(Q, action[..., None], -1)[..., 0]
    misled = lost - regret > ROUNDING * scale
    new = np.zeros(outside.shape, bool)
    for t, numbers in enumerate(np.asarray(seen.history)):
        new[t, np.unique(numbers, return_index=True)[1]] = True
    width = (upper.max(-1) - lower.max(-1)) / scale
    wide, uncertain = upper - lower > WIDE * scale, regret > WIDE * scale
    size = np.where(wide, upper - lower, 1.0)
    return {
        # how near an exact value comes to its bounds, in widths of its interval; and a loss to its stated bound
        "above": float(np.where(wide, (upper - Q) / size, 1.0).min()),
        "below": float(np.where(wide, (Q - lower) / size, 1.0).min()),
        "share": float(np.where(uncertain, lost / np.where(uncertain, regret, 1.0), 0.0).max()),
        "intervals": int(new.sum()),
        "violated": int((new & outside).sum()),
        "certificates": int((new & certified).sum()),
        "misled": int((new & misled).sum()),
        "certified": float(certified.mean()),
        "width": float(width[0].mean()),
    }


def answers(cfg: Config, ambiguous: Visited, alone: Visited) -> dict[str, list[dict[str, float]]]:
    """Each method with each effort, on one APOMDP and on its first model."""
    out: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for tolerance in cfg.tolerances:
        tables, trials = solved_by_hsvi(alone.problem, cfg.trials, tolerance)
        out[METHODS[0]].append({"effort": trials} | compare_bounds(alone, bounds_at(alone.problem, tables, alone.beliefs)))
    for n in cfg.points:
        tables, layer = solved_by_net(alone.problem, n)
        bounds = bounds_at(alike(alone.problem), tables, jnp.repeat(alone.beliefs, M, 2))
        out[METHODS[1]].append({"effort": layer} | compare_bounds(alone, bounds))
        tables, layer = solved_by_net(ambiguous.problem, n)
        out[METHODS[2]].append(
            {"effort": layer} | compare_bounds(ambiguous, bounds_at(ambiguous.problem, tables, ambiguous.beliefs))
        )
    return out


def measure(cfg: Config, point: dict) -> dict:
    if "seed" not in point:
        return measure_tiger(cfg)
    key = jax.random.key(cfg.base_seed + point["seed"])
    problems, alone = draw_visited(key, problems=cfg.problems, episodes=cfg.episodes)
    each = [answers(cfg, *(jax.tree.map(lambda x, i=i: x[i], seen) for seen in (problems, alone))) for i in range(cfg.problems)]
    # [problems, efforts] of everything, by method
    return {
        "methods": {name: {k: [[e[k] for e in a[name]] for a in each] for k in each[0][name][0]} for name in METHODS},
    }


def measure_tiger(cfg: Config) -> dict:
    """HSVI with every effort and the net with the smallest, at all beliefs and horizons; exact values and actions to be shown."""
    seen = tiger_visited()
    efforts: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS[:2]}
    bounds: dict[str, list[dict[str, list[float]]]] = {name: [] for name in efforts}

    def keep(name: str, effort: int, values: dict[str, Array]) -> None:
        efforts[name].append({"effort": effort} | compare_bounds(seen, values))
        bounds[name].append({k: np.asarray(values[k][0].max(-1)).tolist() for k in ("lower", "upper")})

    for tolerance in cfg.tolerances:
        tables, trials = solved_by_hsvi(seen.problem, cfg.trials, tolerance)
        keep(METHODS[0], trials, bounds_at(seen.problem, tables, seen.beliefs))
    tables, layer = solved_by_net(seen.problem, cfg.points[0])
    keep(METHODS[1], layer, bounds_at(alike(seen.problem), tables, jnp.repeat(seen.beliefs, M, 2)))
    Q = tiger_answers(HORIZONS[-1])[np.array(HORIZONS) - 1]
    return {
        "methods": {name: {k: [[e[k] for e in values]] for k in values[0]} for name, values in efforts.items()},
        "left": tiger_beliefs().tolist(),
        "values": Q.max(-1).tolist(),
        "actions": Q.argmax(-1).tolist(),
        "bounds": bounds,
        "span": float(value_span(seen.problem)),
    }


# --- verdicts and figures ------------------------------------------------------------------------------------------------


def check(records: list[dict]) -> list[Verdict]:
    seeded = of_seeds(records)

    def total(name: str) -> int:
        return int(sum(np.sum(method[name]) for r in records for method in r["methods"].values()))

    def last(name: str) -> list[list[float]]:
        """Of each method its mean over problems at the largest effort, [methods][seeds]."""
        return [[float(np.mean(r["methods"][m][name], 0)[-1]) for r in seeded] for m in METHODS]

    widths, certified, certificates = last("width"), last("certified"), total("certificates")
    listed = [", ".join(f"{m} {np.mean(v):.3g}" for m, v in zip(METHODS, part, strict=True)) for part in (widths, certified)]
    intervals = total("intervals")

    def nearest(name: str, of: Callable = np.min) -> list[float]:
        """The extreme of each seed over methods, problems and efforts."""
        return [float(of([of(m[name]) for m in r["methods"].values()])) for r in seeded]

    above, below, share = nearest("above"), nearest("below"), nearest("share", np.max)
    return [
        count_verdict("belief-bounds", total("violated"), intervals, seeds=len(seeded), figure="widths"),
        count_verdict(
            "belief-bounds/labels",
            total("misled"),
            intervals,
            seeds=len(seeded),
            figure="widths",
            note=f"{certificates} of the labels are certificates; slack: stated bound / largest loss of a seed",
            slack=[1 / x for x in share if x > 0] or None,
        ),
        mean_verdict(
            "belief-bounds/attained",
            above,
            below,
            figure="widths",
            note=f"to the upper bound {np.mean(above):.2g} widths, to the lower {np.mean(below):.2g}",
        ),
        mean_verdict("belief-bounds/narrow", *widths, figure="widths", note=listed[0]),
        mean_verdict("belief-bounds/certified", *certified, figure="widths", note=listed[1]),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    (shown,) = [r for r in records if "left" in r]
    return {"tiger": _tiger(shown), "widths": _widths(of_seeds(records))}


def _tiger(shown: dict) -> Figure:
    left, values, actions = (np.array(shown[k]) for k in ("left", "values", "actions"))
    figure, axes = pyplot.subplots(2, 2, figsize=(WIDTH, 5.8), sharex=True, height_ratios=(2.2, 1))
    (curves, band), (strips, widths) = axes
    middle = values[:, len(left) // 2]
    for V, horizon in zip(values, HORIZONS, strict=False):
        at = V[len(left) // 2]
        crowded = ((middle > at) & (middle < at + 1)).any()
        curves.plot(left, V, color=INK, **EXACT)
        curves.annotate(f"{horizon}", (0.5, at), xytext=(0, -10 if crowded else 3), textcoords="offset points", ha="center",
                        fontsize=8, color=INK)  # fmt: skip
    draw_action_strips(strips, left, actions, ACTION_COLORS)
    strips.set_yticks(range(len(HORIZONS)), [str(h) for h in HORIZONS])
    strips.set(xlabel="belief that the tiger is left", ylabel="decisions left")
    handles = [Rectangle((0, 0), 1, 1, color=c) for c in ACTION_COLORS]
    title = "Exact value, and optimal action below, by decisions left"
    curves.set(ylabel="value, units of reward", ylim=(values.min() - 1.5, None), title=title)
    curves.legend(handles, ("listen", "open the left door", "open the right door"), fontsize=8, loc="upper center")
    trials = shown["methods"][METHODS[0]]["effort"][0]
    several = next((i for i, n in enumerate(trials) if n >= 5), len(trials) - 1)
    for name, effort, color in ((METHODS[0], 0, SKY), (METHODS[0], several, BLUE), (METHODS[1], 0, GREEN)):
        lower, upper = (np.array(shown["bounds"][name][effort][k]) for k in ("lower", "upper"))
        n = shown["methods"][name]["effort"][0][effort]
        description = f"HSVI, {n} trial{'s' * (n > 1)}" if name == METHODS[0] else f"belief net, {n} points"
        if name == METHODS[0]:
            draw_bounds(band, left, lower, upper, color=color, alpha=0.45, label=description)
        widths.plot(left, (upper - lower) / shown["span"], color=color, label=description, **EXACT)
    band.plot(left, values[HORIZONS.index(H)], color="black", label="exact", **(EXACT | {"linewidth": 1.1}))
    band.set(title=f"Certified bounds, {H} decisions left, solved from belief 1/2")
    band.legend(fontsize=8, loc="upper center")
    widths.set(xlabel="belief that the tiger is left", ylabel="width / span", xlim=(0, 1), yscale="log", ylim=(1e-5, 1))
    legend_below(widths)
    figure.set_label(
        "The tiger problem over the belief. Upper left: the exact value is flat in the middle and rises to both ends. Lower "
        "left: the best action is to listen except near belief 0 and 1. Right: bounds by HSVI enclose the exact value and are "
        "narrowest at the belief from which they were solved."
    )
    return figure


def _widths(seeded: list[dict]) -> Figure:
    figure, (left, right) = panel_grid(2, 3.8)
    for name, color, marker in zip(METHODS, (BLUE, GREEN, RED), "os^", strict=True):
        means_of_seeds = {
            k: np.array([np.mean(r["methods"][name][k], 0) for r in seeded]) for k in ("effort", "width", "certified")
        }
        effort = means_of_seeds["effort"].mean(0)
        for axis, values in ((left, np.maximum(means_of_seeds["width"], 1e-16)), (right, 100 * means_of_seeds["certified"])):
            for one, x in zip(values, means_of_seeds["effort"], strict=True):
                axis.plot(x, one, color=color, **SEED)
            axis.plot(effort, values.mean(0), color=color, label=name, **(EXACT | {"marker": marker}))
    left.set(xscale="log", yscale="log", ylim=(1e-6, 1), title="How wide the bounds are")
    left.set(xlabel="trials of HSVI, points of the net", ylabel="width at the start / span")
    left.legend(fontsize=8)
    right.set(
        xscale="log", xlabel="trials of HSVI, points of the net", ylabel="% of the steps", title="Steps with a certified action"
    )
    figure.set_label(
        "Left: the width of the bounds falls with trials of HSVI, within some ten trials below 1e-4, and more slowly with "
        "points of the net. Right: the share of steps with a certified action rises to 100 percent."
    )
    return figure
