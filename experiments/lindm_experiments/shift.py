"""How robust is the layer to a shift between training and test: queries, label noise, scale of the features, their spectrum?

The layers of all stages are trained on one simplex family and one design, without label noise, and then read contexts of M
pairs from five tests:

    none       the law of training
    query      contexts as trained, queries from another design (Lambda_q): only the weight of the errors changes
    noise      labels <x, w> + sigma N(0, 1): one more term over M, nothing else
    scale      x -> c x in the contexts, labels follow: S, hence Qhat, is multiplied by c^2
    spectrum   contexts from another design, so another Lambda with another condition number; same queries as in training

The exact risk of section 4 and theory/lindm_theory/robustness.py predicts all five. The first three fall as 1/M to the bias of
training; the last two have a floor ||(A L_test - I) Psi^{1/2}||^2 that no context length removes. Yet c^2 Qhat has the same
greedy policy: the risk grows and no action changes.

    lindm run shift --preset quick
    lindm verify --only shift

Expected: the points are on their exact lines for every kind; there are two floors; the scale changes no action.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.icl.label_laws import oracle_labels
from lindm.icl.prompts import draw_pairs
from lindm.problems.linear_mdp import MDPFamily, second_moment, simplex_family, with_second_moment
from lindm.problems.regression import covariance
from lindm.solvers.rollout import cumulative
from lindm.solvers.ties import greedy
from lindm_experiments.harness.config import check_at_least, check_counts, check_positive, check_rising
from lindm_experiments.harness.figures import BLUE, BOUND, EXACT, GREEN, MEASURED, ORANGE, PURPLE, RED, legend_below, panel_grid
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_experiments.lib import linear_mdps
from lindm_theory.in_context import Prediction, risk
from lindm_theory.moments import design_fourth
from lindm_theory.robustness import scale_shift, shift_floor

KINDS = ("none", "query", "noise", "scale", "spectrum")
FLOORS = ("scale", "spectrum")  # what M does not remove
BLOCK = 64  # contexts in flight
SERVES = 4  # tasks for the pairs of every context
TASKS = 32 * linear_mdps.BLOCK  # fresh tasks drawn for the test


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 2021000
    contexts: int = 20480  # number of tasks for every stage; 4 of them share the pairs of one context
    M: tuple[int, ...] = (8, 32, 128)
    contexts_long: int = 256  # the same for the floor
    M_long: int = 4096
    N: int = 32
    kappa: float = 4.0  # condition number of the features in training
    sigma: float = 0.5  # standard deviation of the label noise in the test
    c: float = 1.7  # scale c of the features in the test
    scales: tuple[float, ...] = (0.5, 1.0, 1.7, 3.0)  # scales c at which the policies are compared
    policies: int = 2048  # number of tasks whose policies are compared
    tilt_query: float = 0.25  # designs of the tests, as exponential tilts of the uniform design
    tilt_context: float = -1.0
    steps: int = 800

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "contexts", "contexts_long", "M_long", "policies", "N", "steps")
        for name in ("contexts", "contexts_long"):
            if getattr(self, name) % (BLOCK * SERVES) or getattr(self, name) > TASKS:
                raise ValueError(f"{name} must be a multiple of {BLOCK * SERVES}, at most {TASKS}; got {getattr(self, name)}")
        if self.policies > TASKS:
            raise ValueError(f"policies must be at most {TASKS}; got {self.policies}")
        check_rising(self, "M")
        if self.M[-1] >= self.M_long:
            raise ValueError(f"M must be below M_long = {self.M_long}; got {self.M}")
        check_positive(self, "sigma", "c")
        if len(self.scales) < 2 or 1.0 not in self.scales or not all(0 < c < math.inf for c in self.scales):
            raise ValueError(f"scales must contain 1 and at least one other positive, finite number; got {self.scales}")
        for name in ("tilt_query", "tilt_context"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) != 0):
                raise ValueError(f"{name} must be finite and not zero; got {getattr(self, name)}")
        check_at_least(self, 1, "kappa")


QUICK = Config()
FULL = Config(seeds=10, contexts=32768, M=(4, 8, 16, 32, 64, 128, 256), contexts_long=512, M_long=8192, policies=8192, steps=4000)
SMOKE = Config(seeds=2, contexts=1024, M=(4, 8), contexts_long=256, M_long=64, policies=32, steps=20)


def families(cfg: Config, seed: int) -> tuple[MDPFamily, MDPFamily, MDPFamily]:
    """The family of training, the same one with the queries' design, and with the other contexts' design.

    Designs are tilted exponentially in the square of the last feature, the one of smallest variance in training: queries towards
    it, contexts away from it.
    """
    base = simplex_family(linear_mdps.family_key(seed), 12, 3, 5, 4, feature_power=0.7, low=-1.0, high=1.0)
    family = with_second_moment(base, covariance(5, cfg.kappa))
    last = np.square(np.asarray(linear_mdps.pairs_table(family))[:, -1])

    def tilted(strength: float) -> MDPFamily:
        weights = np.exp(strength * last / last.mean())
        return replace(family, design=jnp.asarray(weights / weights.sum()))

    # the first as the others, not as a weakly typed constant: the same compiled programs then serve all three
    return tilted(0.0), tilted(cfg.tilt_query), tilted(cfg.tilt_context)


@partial(jax.jit, static_argnames="longest")
def error_moments(key: Array, family: MDPFamily, A: Array, w: Array, lengths: Array, sigma: float | Array, longest: int) -> Array:
    """E[(A S_M - w)(A S_M - w)'] over the tasks w [H, n, d]: [H, L, d, d] for all lengths M (prefixes of one context).

    The pairs of a context serve SERVES tasks, each with labels of its own: averages keep their mean and lose variance.
    """
    x_all, cdf = linear_mdps.pairs_table(family), cumulative(family.design)
    used = (jnp.arange(longest)[None, :] < lengths[:, None]) / lengths[:, None]

    def noise(k: Array, shape: tuple[int, ...]) -> Array:
        """Label noise; nothing is drawn where sigma is zero."""
        return jax.lax.cond(sigma > 0, lambda: sigma * jax.random.normal(k, shape, w.dtype), lambda: jnp.zeros(shape, w.dtype))

    def context(k: Array, w: Array, A: Array) -> Array:
        which, label = jax.random.split(k)
        x = x_all[draw_pairs(which, cdf, longest)]
        y = oracle_labels(x[None], w) + noise(label, (1, longest))
        return jnp.einsum("lm,rm,mj->rlj", used, y, x, optimize=[(1, 2), (0, 1)]) @ A.T - w[:, None, :]

    def stage(at) -> Array:
        k, A, w = at

        def block(at) -> Array:
            e = jax.vmap(context, (0, 0, None))(at[0], at[1], A)
            return jnp.einsum("nrli,nrlj->lij", e, e)

        keys = jax.random.split(k, w.shape[0] // SERVES).reshape(-1, BLOCK)
        blocks = keys, w.reshape(-1, BLOCK, SERVES, w.shape[-1])
        return jax.lax.map(block, blocks).sum(0) / w.shape[0]

    return jax.lax.map(stage, (jax.random.split(key, len(w)), A, w))


@jax.jit
def weighted(Lambda_q: Array, moments: Array) -> Array:
    """sum over the stages of tr(Lambda_q E): [H, L, d, d] -> [L]."""
    return jnp.einsum("ij,hlji->l", Lambda_q, moments)


@jax.jit
def exact(
    A: Array,
    Psi: Array,
    lengths: Array,
    train: MDPFamily,
    query: MDPFamily,
    other: MDPFamily,
    sigma: Array,
    c: Array,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Risk [L] and floor [] of every kind, summed over the stages: A, Psi [H, d, d]."""
    Lambda, Lambda_q, Lambda_test = second_moment(train), second_moment(query), second_moment(other)

    def fourth(family: MDPFamily, P: Array) -> Array:
        return design_fourth(linear_mdps.pairs_table(family), family.design, P)

    def stage(A: Array, P: Array, M: Array) -> dict[str, Prediction]:
        K = fourth(train, P)
        return {
            "none": risk(A, Lambda, P, K, M, Lambda),
            "query": risk(A, Lambda, P, K, M, Lambda_q),
            "noise": risk(A, Lambda, P, K, M, Lambda, sigma**2 * Lambda),
            "scale": scale_shift(A, Lambda, P, K, M, Lambda, c),
            "spectrum": risk(A, Lambda_test, P, fourth(other, P), M, Lambda),
        }

    parts = jax.vmap(lambda M: jax.vmap(lambda A, P: stage(A, P, M))(A, Psi))(lengths)
    floor = jax.vmap(shift_floor, (0, None, 0, None))
    floors = {
        "none": floor(A, Lambda, Psi, Lambda).sum(),
        "query": floor(A, Lambda, Psi, Lambda_q).sum(),
        "noise": floor(A, Lambda, Psi, Lambda).sum(),
        "scale": floor(A, c**2 * Lambda, Psi, Lambda).sum(),
        "spectrum": floor(A, Lambda_test, Psi, Lambda).sum(),
    }
    return {kind: parts[kind].total.sum(1) for kind in KINDS}, floors


@partial(jax.jit, static_argnames="M")
def decisions(key: Array, shown: MDPFamily, queries: MDPFamily, A: Array, w: Array, M: int) -> tuple[Array, Array]:
    """Greedy actions [n, H, S] of the tasks w [H, n, d] on contexts with the features and design of `shown`, and the mean
    squared error of Qhat over all pairs and stages, [n]; the queries are the features of `queries`."""

    def one(at) -> tuple[Array, Array]:
        k, w = at
        Qhat = linear_mdps.action_values(queries, A, linear_mdps.context_sums(k, shown, w, M))
        truth = jnp.einsum("sad,hd->hsa", queries.phi, w)
        return greedy(Qhat), jnp.square(Qhat - truth).mean()

    return jax.lax.map(one, (jax.random.split(key, w.shape[1]), jnp.moveaxis(w, 1, 0)), batch_size=64)


def policies_under(cfg: Config, key: Array, train: MDPFamily, other: MDPFamily, A: Array, w: Array) -> dict:
    """What each test does to the greedy policy: share of the actions that are not optimal, and policies that changed."""
    optimal = np.asarray(greedy(jnp.einsum("sad,hnd->nhsa", train.phi, w)))
    tests = {f"{c:g}": replace(train, phi=c * train.phi) for c in cfg.scales} | {"spectrum": other}
    # the same key for every scale: the same contexts, only longer
    seen = {name: decisions(key, shown, train, A, w, M=cfg.N) for name, shown in tests.items()}
    plain = np.asarray(seen["1"][0])
    actions = {name: np.asarray(a) for name, (a, _) in seen.items()}
    return {
        "wrong": {name: float((a != optimal).mean()) for name, a in actions.items()},
        "changed": {name: int((a != plain).any((1, 2)).sum()) for name, a in actions.items()},
        "error": {name: float(e.mean()) for name, (_, e) in seen.items()},
        "n": cfg.policies,
    }


def measure(cfg: Config, point: dict) -> dict:
    key = jax.random.key(cfg.base_seed + point["seed"])
    k_pool, k_train, k_tasks, k_context, k_long, k_policy = jax.random.split(key, 6)
    train, query, other = families(cfg, cfg.base_seed + point["seed"])
    Lambda, Lambda_q = second_moment(train), second_moment(query)
    pool = linear_mdps.task_pool(k_pool, train)
    A = linear_mdps.closed_form_layers(train, linear_mdps.pool_moment(pool), float(cfg.N))
    Ahat = linear_mdps.trained_layers(k_train, train, pool, cfg.N, 0.0, steps=cfg.steps, learning_rate=0.3, batch=128)
    fresh = linear_mdps.task_pool(k_tasks, train)
    w, some = fresh[:, : cfg.contexts], fresh[:, : cfg.contexts_long]

    def measured(w: Array, key: Array, M: tuple[int, ...]) -> dict[str, Array]:
        lengths, keys = jnp.asarray(M, float), dict(zip(KINDS, jax.random.split(key, len(KINDS)), strict=True))
        moments = partial(error_moments, A=Ahat, w=w, lengths=lengths, longest=M[-1])
        matched = moments(keys["none"], train, sigma=0.0)
        return {
            "none": weighted(Lambda, matched),
            "query": weighted(Lambda_q, matched),
            "noise": weighted(Lambda, moments(keys["noise"], train, sigma=cfg.sigma)),
            "scale": weighted(Lambda, moments(keys["scale"], replace(train, phi=cfg.c * train.phi), sigma=0.0)),
            "spectrum": weighted(Lambda, moments(keys["spectrum"], other, sigma=0.0)),
        }

    def predicted(A: Array, w: Array, M: tuple[int, ...]) -> tuple[dict[str, Array], dict[str, Array]]:
        # Psi of the very tasks drawn: exact given the tasks, so that their sampling error does not blur the ratio
        padded = M + M[-1:] * (len(cfg.M) - len(M))  # one compiled program for both numbers of lengths
        risks, floors = exact(A, linear_mdps.pool_moment(w), jnp.asarray(padded, float), train, query, other, cfg.sigma, cfg.c)
        return {kind: risk[: len(M)] for kind, risk in risks.items()}, floors

    short, long = measured(w, k_context, cfg.M), measured(some, k_long, (cfg.M_long,))
    exact_short, _ = predicted(Ahat, w, cfg.M)
    exact_long, floors = predicted(Ahat, some, (cfg.M_long,))
    closed, _ = predicted(A, w, cfg.M)

    def numbers(values: dict[str, Array]) -> dict[str, list[float]]:
        return {kind: np.ravel(values[kind]).tolist() for kind in KINDS}

    return {
        "M": list(cfg.M),
        "M_long": cfg.M_long,
        "N": cfg.N,
        "c": cfg.c,
        "sigma": cfg.sigma,
        "kappa": {
            name: float(jnp.linalg.cond(second_moment(f))) for name, f in (("train", train), ("query", query), ("test", other))
        },
        "measured": numbers(short),
        "exact": numbers(exact_short),
        "closed": numbers(closed),
        "long": {
            "measured": {k: v[0] for k, v in numbers(long).items()},
            "exact": {k: v[0] for k, v in numbers(exact_long).items()},
            "floor": {kind: float(floors[kind]) for kind in KINDS},
        },
        "policies": policies_under(cfg, k_policy, train, other, Ahat, fresh[:, : cfg.policies]),
        "weights_error": float(jnp.linalg.norm(Ahat - A) / jnp.linalg.norm(A)),
    }


def check(records: list[dict]) -> list[Verdict]:
    lengths = range(len(records[0]["M"]))
    ratios = [[r["measured"][kind][i] / r["exact"][kind][i] for r in records] for kind in KINDS for i in lengths]
    floors = [[r["long"]["measured"][kind] / r["long"]["floor"][kind] for r in records] for kind in FLOORS]
    share = max(r["long"]["exact"][kind] / r["long"]["floor"][kind] - 1 for r in records for kind in FLOORS)
    costs = {k: np.mean([r["long"]["floor"][k] / r["long"]["floor"]["none"] for r in records]) for k in FLOORS}
    policies = [r["policies"] for r in records]
    scales = [name for name in policies[0]["changed"] if name not in ("1", "spectrum")]
    changed = sum(max(p["changed"][name] for name in scales) for p in policies)
    explodes = np.mean([max(p["error"][name] for name in scales) / p["error"]["1"] for p in policies])
    wrong = {k: np.mean([p["wrong"][k] for p in policies]) for k in ("1", "spectrum")}
    return [
        mean_verdict(
            "shift",
            *ratios,
            figure="shift",
            note=f"{len(KINDS)} kinds, worst shown; ||Ahat - A_N|| <= {max(r['weights_error'] for r in records):.1%}",
        ),
        mean_verdict(
            "shift/floor",
            *floors,
            figure="shift",
            note="floor/bias: "
            + ", ".join(f"{k} {v:.3g}" for k, v in costs.items())
            + f"; estimation left at M = {records[0]['M_long']}: {share:.1%}",
        ),
        count_verdict(
            "shift/scale-policy",
            changed,
            sum(p["n"] for p in policies),
            seeds=len(records),
            figure="scale",
            note=f"squared error up to x {explodes:.3g}; wrong actions {wrong['1']:.1%}, other spectrum {wrong['spectrum']:.1%}",
        ),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    return {"shift": _over_length(records), "scale": _scale(records)}


def _over_length(records: list[dict]) -> Figure:
    """The risk over M, one color a kind: points for every seed, the exact curve, the floor."""
    first = records[0]
    kappa = {k: np.mean([r["kappa"][k] for r in records]) for k in first["kappa"]}  # each seed has its own features
    names = {
        "none": "none",
        "query": f"query: $\\kappa(\\Lambda_q)$ = {kappa['query']:.2g}",
        "noise": f"noise: σ = {first['sigma']:g}",
        "scale": f"scale: x → {first['c']:g} x",
        "spectrum": f"spectrum: κ {kappa['train']:.2g} → {kappa['test']:.2g}",
    }
    M = np.array([*first["M"], first["M_long"]])
    figure, axis = pyplot.subplots(figsize=(6.4, 5.4))
    for kind, color, marker in zip(KINDS, (BLUE, GREEN, ORANGE, RED, PURPLE), "os^Dv", strict=True):
        floor = np.mean([r["long"]["floor"][kind] for r in records])
        curve = np.mean([[*r["exact"][kind], r["long"]["exact"][kind]] for r in records], 0)
        grid = np.geomspace(M[0], M[-1], 100)
        estimation = (curve[0] - floor) * M[0]  # exact risk = floor + estimation / M
        axis.plot(grid, floor + estimation / grid, color=color, label=names[kind], **EXACT)
        if kind in (*FLOORS, "none"):
            axis.axhline(floor, color=color, alpha=0.8, **BOUND)
        for r in records:
            axis.plot(M, [*r["measured"][kind], r["long"]["measured"][kind]], color=color, **MEASURED | {"marker": marker})
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="pairs in the test prompt M",
        ylabel="risk of Qhat, summed over the stages",
        title=f"Shift at test, layers trained at N = {first['N']}: points measured, lines exact, dashes floors",
    )
    legend_below(axis, title="kind of shift", ncols=3)
    figure.set_label(
        "Risk over the test length under five shifts: without one it falls to the lowest floor; noise and another query law "
        "end near it; another spectrum ends at a higher floor, and scaled features stay a hundred times above."
    )
    return figure


def _scale(records: list[dict]) -> Figure:
    """What a shift does to the squared error of Qhat and to the actions chosen: lines the mean, dots the seeds."""
    figure, axes = panel_grid(2, 3.8)
    names = list(records[0]["policies"]["wrong"])
    labels = ["κ\nother" if n == "spectrum" else f"{n} x" if n != "1" else "x\n(trained)" for n in names]
    colors = [PURPLE if n == "spectrum" else BLUE if n == "1" else RED for n in names]
    sides = (
        (axes[0], "error", "squared error of Qhat", "The error of Qhat explodes ..."),
        (axes[1], "wrong", "share of wrong actions", "... the policy does not notice the scale"),
    )
    for axis, what, label, title in sides:
        values = np.array([[r["policies"][what][n] for n in names] for r in records])
        at = np.arange(len(names))
        for x, of_seeds, color in zip(at, values.T, colors, strict=True):
            axis.plot([x - 0.25, x + 0.25], [of_seeds.mean()] * 2, color=color, linewidth=2.4, marker="")
            axis.plot(np.full(len(of_seeds), x), of_seeds, color=color, **MEASURED, alpha=0.5)
        axis.set_xticks(at, labels)
        axis.set(xlabel="features in the context", ylabel=label, title=title)
        axis.grid(axis="x", visible=False)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    figure.set_label(
        "Left: scaling the features multiplies the squared error by up to a thousand. Right: the share of wrong actions is "
        "the same at every scale, and higher only under another spectrum."
    )
    return figure
