"""Does repeating the layer remove its bias, and at what cost?

A layer trained at length N is applied repeatedly, w <- w + A (S - G w) from w = 0 (equal blocks of a deep reduced layer). On a
very long context G = Lambda, and the bias after k layers is |(I - A Lambda)^k Psi^(1/2)|^2, which is geometric in k. On a
context of M pairs the error is -(I - A G_M)^k w plus a term from label noise. Without noise, depth also removes the
*estimation* error if the spectral radius of I - A G_M is below one, and multiplies it if the radius is above one: on short
contexts, which show the same few pairs again and again, A is too large a step. On one-hot features the mean is known exactly,

    risk = sum_i q_i psi_i E[(1 - a_i n_i/M)^(2k)],  n_i ~ Bin(M, rho_i),

and tends to infinity in k for *every* M once some a_i > 2, as in A_N for d >= 3 and N > 4. The useful depth is therefore
bounded, and the bound grows with M. (A smaller step would be safe: `lindm_theory.robustness.largest_step`.) With noise, the
limit on long contexts is least squares. A deep layer whose blocks are trained together, on contexts of the training length,
avoids this problem.

    lindm run depth --preset quick
    lindm verify --only depth

Expected: the points are on the exact lines; risks fall with depth on long contexts and rise on short ones; the limit is least
squares.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.icl.attention import ReducedAttention, pad, query_columns
from lindm.icl.label_laws import oracle_labels
from lindm.icl.prompts import draw_pairs
from lindm.icl.trainer import train, train_many
from lindm.problems.linear_mdp import MDPFamily, draw_task, onehot_family, second_moment, simplex_family, with_second_moment
from lindm.problems.regression import covariance
from lindm.solvers.rollout import cumulative
from lindm.types import Prompt
from lindm_experiments.harness.config import check_at_least, check_counts, check_multiples, check_positive, check_rising
from lindm_experiments.harness.figures import BOUND, COLORS, EXACT, INK, MARKERS, MEASURED, legend_below, panel_grid, plot_seeds
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_experiments.lib import linear_mdps
from lindm_experiments.lib.repeated_layers import BLOCK, finite_contexts, long_bias, onehot_risk
from lindm_theory.in_context import onehot_gamma
from lindm_theory.robustness import depth_bias, onehot_depth_risk

D = 5
LIMIT = 64  # layers that stand for infinitely many
SETTLED = 0.8  # spectral radius from which on LIMIT layers are as good as infinitely many: 0.8^64 < 1e-6
SHOWN = 12  # layers to which the exact curves of the one-hot panel are drawn


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 3023000
    N: tuple[int, ...] = (4, 16, 64)
    layers: int = 6
    M_long: int = 65536
    long_contexts: int = 16
    M: tuple[int, ...] = (8, 32, 128, 512)  # lengths of the finite contexts, for the layer of the largest N
    contexts: int = 2048
    sigma: float = 0.5  # standard deviation of the label noise
    N_onehot: int = 16
    M_onehot: tuple[int, ...] = (8, 32)
    layers_onehot: int = 3
    contexts_onehot: int = 262144
    deep: tuple[int, ...] = (3,)  # depths of the layers whose blocks are trained together
    kappa: float = 3.0
    steps: int = 800

    def __post_init__(self) -> None:
        check_counts(
            self,
            "seeds",
            "layers",
            "M_long",
            "long_contexts",
            "contexts",
            "layers_onehot",
            "contexts_onehot",
            "N_onehot",
            "steps",
        )
        check_multiples(self, BLOCK, "contexts", "contexts_onehot")
        check_rising(self, "N", "M", "M_onehot", "deep")
        if self.layers < 2 or self.deep[0] < 2 or self.deep[-1] > self.layers:
            raise ValueError(f"deep must lie between 2 and layers = {self.layers}; got {self.deep}")
        check_positive(self, "sigma")
        check_at_least(self, 1, "kappa")


QUICK = Config()
FULL = Config(
    seeds=10,
    N=(4, 16, 64),
    long_contexts=64,
    M=(8, 16, 32, 64, 128, 512),
    contexts=8192,
    M_onehot=(8, 16, 32, 64),
    contexts_onehot=1 << 19,
    deep=(2, 3, 4),
    steps=2000,
)
SMOKE = Config(
    seeds=2, N=(4, 8), M_long=1024, long_contexts=2, M=(8, 64), contexts=1024, M_onehot=(8, 32), contexts_onehot=4096, steps=200
)


def feature_family(cfg: Config, seed: int) -> MDPFamily:
    """The first of the four stages is the one studied."""
    base = simplex_family(linear_mdps.family_key(seed), 12, 3, D, 4, feature_power=0.7, low=-1.0, high=1.0)
    return with_second_moment(base, covariance(D, cfg.kappa))


def draw_training(key: Array, family: MDPFamily, pool: Array, n: Array, longest: Array) -> tuple[Prompt, Array]:
    """128 sets of n noiseless pairs, cut from the shape of `longest`, each labeled for two tasks; the queries' law enters
    exactly, by d columns."""
    which, k = jax.random.split(key)
    w = pool[jax.random.randint(which, (256,), 0, len(pool))]
    pairs = draw_pairs(k, cumulative(family.design), (128, longest.shape[0]))
    x = linear_mdps.pairs_table(family)[jnp.repeat(pairs, 2, axis=0)]
    query = jnp.broadcast_to(query_columns(second_moment(family)), (256, D, D))
    return pad(Prompt(x=x, y=oracle_labels(x, w), query=query), n), oracle_labels(query, w)


def single_layers(key: Array, family: MDPFamily, pool: Array, cfg: Config) -> Array:
    """Layers of depth 1 [R, d, d], one for every N, trained in float32."""
    runs = len(cfg.N)
    data = (family, pool, jnp.asarray(cfg.N, float), jnp.zeros(cfg.N[-1]))
    data = jax.tree.map(lambda x: jnp.broadcast_to(x, (runs, *x.shape)) if x.shape != (runs,) else x, data)
    layers, _ = train_many(
        ReducedAttention(D),
        draw_training,
        jax.random.split(key, runs),
        steps=cfg.steps,
        data=linear_mdps.single_precision(data),
        learning_rate=0.1,
    )
    return layers.A[...][:, 0].astype(pool.dtype)


def deep_layer(key: Array, family: MDPFamily, pool: Array, cfg: Config, depth: int) -> Array:
    """Blocks [depth, d, d] trained together at the largest N, in float32, from small random ones."""
    start, k = jax.random.split(key)
    data = linear_mdps.single_precision((family, pool, jnp.asarray(float(cfg.N[-1])), jnp.zeros(cfg.N[-1])))
    layer = ReducedAttention(D, depth, rngs=nnx.Rngs(start), scale=0.3)
    layer, _ = train(layer, draw_training, k, steps=cfg.steps, data=data, learning_rate=0.03, clip=1.0)
    return layer.A[...].astype(pool.dtype)


@partial(jax.jit, static_argnames="layers")
def exact_bias(A: Array, Lambda: Array, Psi: Array, layers: int) -> Array:
    """Bias [R, layers] of A [R, d, d] repeated 1, 2, ... times."""
    return jnp.stack([jax.vmap(lambda A, k=k: depth_bias(A, Lambda, Psi, Lambda, k))(A) for k in range(1, layers + 1)], axis=1)


@partial(jax.jit, static_argnames="M")
def exact_onehot(a: Array, rho: Array, psi: Array, M: int) -> Array:
    """Risk [SHOWN] of diag(a) repeated 1, 2, ... times on tabular contexts of M pairs."""
    return jax.vmap(lambda k: onehot_depth_risk(a, rho, psi, rho, M, k))(jnp.arange(1, SHOWN + 1))


@partial(jax.jit, static_argnames="tasks")
def last_stage_tasks(key: Array, family: MDPFamily, tasks: int) -> Array:
    """w [tasks, d] of the last stage: the reward weights themselves."""
    return jax.vmap(lambda k: draw_task(k, family).theta[-1])(jax.random.split(key, tasks))


def by_length(
    cfg: Config, clean: np.ndarray, noisy: np.ndarray, squares: np.ndarray, radius: np.ndarray, radius_noisy: np.ndarray
) -> list[dict]:
    """The errors of the repeated layer for each M: in the mean, and where the iteration converges.

    clean, noisy [n, L, LIMIT]: squared errors after each layer, without and with label noise; squares [n, L]: of least squares,
    with noise; radius, radius_noisy [n, L]: spectral radius of I - A G of the same contexts.
    """
    inside, stable = radius < 1, radius_noisy < SETTLED
    return [
        {
            "M": M,
            "share": float(1 - inside[:, i].mean()),
            "clean": clean[:, i, : cfg.layers].mean(0).tolist(),
            "median": np.median(clean[:, i, : cfg.layers], 0).tolist(),
            "inside": clean[inside[:, i], i, : cfg.layers].mean(0).tolist() if inside[:, i].any() else None,
            "noisy": noisy[:, i, : cfg.layers].mean(0).tolist(),
            "stable": float(stable[:, i].mean()),
            "limit": [float(noisy[stable[:, i], i, -1].mean()), float(squares[stable[:, i], i].mean())]
            if stable[:, i].any()
            else None,
        }
        for i, M in enumerate(cfg.M)
    ]


def tabular(cfg: Config, key: Array) -> dict:
    """The risk of the repeated layer on one-hot features, measured and exact, for each M."""
    family = onehot_family(3, 2, 1, low=-1.0, high=1.0)  # the last stage of any horizon: w = theta, centered
    theta = last_stage_tasks(key, family, tasks=BLOCK)
    a = 1.0 / jnp.diagonal(onehot_gamma(family.design, float(cfg.N_onehot)))
    lengths, longest = jnp.asarray(cfg.M_onehot, float), cfg.M_onehot[-1]
    measured = onehot_risk(key, family, a, theta, lengths, cfg.contexts_onehot, longest, cfg.layers_onehot)
    psi = jnp.square(theta).mean(0)
    exact = [exact_onehot(a, family.design, psi, M=M).tolist() for M in cfg.M_onehot]
    return {"M": list(cfg.M_onehot), "a": float(a[0]), "measured": measured.tolist(), "exact": exact}


def measure(cfg: Config, point: dict) -> dict:
    key = jax.random.key(cfg.base_seed + point["seed"])
    k_pool, k_train, k_deep, k_long, k_clean, k_noisy, k_onehot = jax.random.split(key, 7)
    family = feature_family(cfg, cfg.base_seed + point["seed"])
    drawn = linear_mdps.task_pool(k_pool, family)
    fresh, training = jnp.split(drawn, [cfg.contexts], axis=1)  # no task is both trained on and tested
    tested, pool, Lambda = fresh[0], training[0], second_moment(family)
    Psi = linear_mdps.pool_moment(training)
    A = jnp.stack([linear_mdps.closed_form_layers(family, Psi, float(N))[0] for N in cfg.N])
    Ahat = single_layers(k_train, family, pool, cfg)

    w = tested[:BLOCK]
    bias = long_bias(k_long, family, Ahat, w, contexts=cfg.long_contexts, length=cfg.M_long, layers=cfg.layers)
    predicted = exact_bias(A, Lambda, w.T @ w / len(w), layers=cfg.layers)

    repeated = jnp.broadcast_to(Ahat[-1], (LIMIT, D, D))
    blocks = {k: deep_layer(jax.random.fold_in(k_deep, k), family, pool, cfg, k) for k in cfg.deep}
    stacks = (repeated, *blocks.values())
    lengths = jnp.asarray((*cfg.M, cfg.N[-1]), float)
    errors = partial(finite_contexts, family=family, stacks=stacks, w=tested, lengths=lengths, longest=cfg.M[-1])
    (clean, *deep), _, G = jax.tree.map(np.asarray, errors(k_clean, sigma=0.0))
    (noisy, *_), squares, G_noisy = jax.tree.map(np.asarray, errors(k_noisy, sigma=cfg.sigma))

    def radius(G: np.ndarray) -> np.ndarray:
        return np.abs(np.linalg.eigvals(np.eye(D) - np.asarray(Ahat[-1]) @ G)).max(-1)

    return {
        "N": list(cfg.N),
        "M_long": cfg.M_long,
        "sigma": cfg.sigma,
        "bias": {"measured": bias.tolist(), "exact": predicted.tolist()},
        "finite": by_length(cfg, clean, noisy, squares, radius(G), radius(G_noisy)),
        "deep": {
            str(k): {
                "repeated": float(clean[:, -1, k - 1].mean()),
                "single": float(clean[:, -1, 0].mean()),
                "trained": d[:, -1].mean(0).tolist(),
            }
            for k, d in zip(cfg.deep, deep, strict=True)
        },
        "onehot": tabular(cfg, k_onehot),
        "weights_error": (jnp.linalg.norm(Ahat - A, axis=(1, 2)) / jnp.linalg.norm(A, axis=(1, 2))).tolist(),
    }


def _per_layer(record: dict, which: str) -> np.ndarray:
    """Contraction of the squared bias per layer, [R, layers - 1]: the geometric mean over the layers from the second on."""
    b = np.array(record["bias"][which])
    return (b[:, 1:] / b[:, :1]) ** (1.0 / np.arange(1, b.shape[1]))


def check(records: list[dict]) -> list[Verdict]:
    first = records[0]
    ratio = np.array([_per_layer(r, "measured") / _per_layer(r, "exact") for r in records])
    measured = np.array([r["onehot"]["measured"] for r in records])
    exact = np.array([np.array(r["onehot"]["exact"])[:, : measured.shape[2]] for r in records])
    finite = range(len(first["finite"]))
    # contexts in which the iteration converges: the whole risk, estimation error included, falls from the first layer to the last
    converge = [i for i in finite if all(r["finite"][i]["inside"] for r in records)]
    falls = [[r["finite"][i]["inside"][-1] / r["finite"][i]["inside"][0] for r in records] for i in converge]
    settled = [i for i in finite if all(r["finite"][i]["stable"] >= 0.25 for r in records)]
    limits = [[r["finite"][i]["limit"][0] / r["finite"][i]["limit"][1] for r in records] for i in settled]
    depths = list(first["deep"])
    together = [[r["deep"][k]["trained"][-1] / r["deep"][k]["repeated"] for r in records] for k in depths]
    nothing = [[2.0] * len(records)]  # no context on which the iteration converges: the claim is not shown
    short = [r["finite"][converge[0] if converge else 0] for r in records]
    blown = np.mean([f["clean"][-1] / f["inside"][-1] for f in short]) if converge else np.inf
    rates = np.mean([_per_layer(r, "exact")[:, -1] for r in records], 0)
    return [
        mean_verdict(
            "depth",
            *np.moveaxis(ratio, 0, -1).reshape(-1, len(records)),
            figure="bias",
            note="squared bias x "
            + ", ".join(f"{v:.2g} (N = {N})" for N, v in zip(first["N"], rates, strict=True))
            + " per layer",
        ),
        mean_verdict(
            "depth/small-context",
            *np.moveaxis(measured / exact, 0, -1).reshape(-1, len(records)),
            figure="finite",
            note=f"a = {first['onehot']['a']:.2g}: exact risk at M = {first['onehot']['M'][0]} x "
            f"{exact[0, 0, -1] / exact[0, 0, 0]:.3g} from 1 to {measured.shape[2]} layers",
        ),
        mean_verdict(
            "depth/estimation",
            *(falls or nothing),
            figure="finite",
            note=f"M = {short[0]['M']}: radius > 1 in {np.mean([f['share'] for f in short]):.1%} of the contexts, "
            f"which multiply the mean risk by {blown:.3g} at {len(short[0]['clean'])} layers",
        ),
        mean_verdict("depth/least-squares", *(limits or nothing), figure="finite", note=f"at {LIMIT} layers, radius < {SETTLED}"),
        mean_verdict("depth/trained", *together, figure="finite", note=f"depth {', '.join(depths)}, M = N = {first['N'][-1]}"),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    return {"bias": _bias(records), "finite": _finite(records)}


def _bias(records: list[dict]) -> Figure:
    """Squared bias over the depth k, one color for each N."""
    first = records[0]
    figure, axis = pyplot.subplots(figsize=(6.4, 4.2))
    for i, (N, color, marker) in enumerate(zip(first["N"], COLORS, MARKERS, strict=False)):
        layers = np.arange(1, len(first["bias"]["exact"][i]) + 1)
        exact = np.mean([r["bias"]["exact"][i] for r in records], 0)
        axis.plot(layers, exact, color=color, label=f"N = {N}", **EXACT)
        for r in records:
            axis.plot(layers, r["bias"]["measured"][i], color=color, alpha=0.6, **MEASURED | {"marker": marker})
    axis.set(yscale="log", xlabel="layers k", ylabel="squared bias  $|(I - A_N\\Lambda)^k\\,\\Psi^{1/2}|^2$")
    axis.set_xticks(range(1, len(first["bias"]["exact"][0]) + 1))
    axis.set_title(f"Depth contracts the bias: points at M = {first['M_long']}, lines exact")
    axis.legend(title="trained at")
    figure.set_label(
        "The squared bias falls geometrically with the number of layers, the faster the longer the training prompts; measured "
        "points lie on the exact lines."
    )
    return figure


def _finite(records: list[dict]) -> Figure:
    """Risk over the depth for several M: without noise, with noise, and tabular with the exact curve."""
    first = records[0]
    figure, axes = panel_grid(3, 4.4)
    layers = np.arange(1, len(first["finite"][0]["clean"]) + 1)
    for i, (f, color, marker) in enumerate(zip(first["finite"], COLORS, MARKERS, strict=False)):
        share = np.mean([r["finite"][i]["share"] for r in records])
        for axis, what in ((axes[0], "clean"), (axes[1], "noisy")):
            curves = np.array([r["finite"][i][what] for r in records])
            plot_seeds(axis, layers, curves, color)
            label = f"M = {f['M']}" + (f", {share:.1%} diverge" if what == "clean" and share > 0 else "")
            axis.plot(layers, curves.mean(0), color=color, **MEASURED | {"marker": marker, "linestyle": "-"}, label=label)
        if f["limit"] is not None and min(r["finite"][i]["stable"] for r in records) >= 0.25:
            limit = np.mean([r["finite"][i]["limit"][1] for r in records])
            axes[1].axhline(limit, color=color, **BOUND)
        if share > 0 and all(r["finite"][i]["inside"] for r in records):
            inside = np.mean([r["finite"][i]["inside"] for r in records], 0)
            axes[0].plot(layers, inside, color=color, **BOUND, label=f"M = {f['M']}, the others")
    deep = [(int(k), np.mean([r["deep"][k]["trained"][-1] for r in records])) for k in first["deep"]]
    axes[0].plot(*zip(*deep, strict=True), marker="*", markersize=13, color=INK, linestyle="none")
    axes[0].plot([], [], marker="*", markersize=10, color=INK, linestyle="none", label=f"trained deep, M = {first['N'][-1]}")
    N = first["N"][-1]
    axes[0].set_title(f"No label noise (N = {N})")
    axes[1].set_title(f"Label noise σ = {first['sigma']:g}; dashes: least squares")
    axes[2].set_title(f"Tabular, a = {first['onehot']['a']:.2g}: exact lines")
    for i, (M, color, marker) in enumerate(zip(first["onehot"]["M"], COLORS, MARKERS, strict=False)):
        exact = np.mean([r["onehot"]["exact"][i] for r in records], 0)
        axes[2].plot(np.arange(1, len(exact) + 1), exact, color=color, label=f"M = {M}", **EXACT)
        for r in records:
            seen = r["onehot"]["measured"][i]
            axes[2].plot(np.arange(1, len(seen) + 1), seen, color=color, alpha=0.6, **MEASURED | {"marker": marker})
    for axis in axes[:3]:
        axis.set(yscale="log", xlabel="layers k")
        axis.set_ylabel("risk of Qhat")
        legend_below(axis, ncols=2)
    figure.set_label(
        "Risk over the number of layers. Above left: without noise depth helps for long contexts and hurts for M = 8. Above "
        "right: with label noise the curves flatten near least squares. Below: on tabular features the exact risk of M = 8 "
        "explodes with depth."
    )
    return figure
