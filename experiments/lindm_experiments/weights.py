"""Does training converge to the closed form A_N for every law of features, and where does the full layer converge to?

There are three laws. `gaussian`: regression with x ~ N(0, Lambda), w ~ N(0, I). `one-hot`: tabular MDPs, one layer for each
stage, trained on a large pool of tasks whose second moment Psi is known exactly. `simplex`: linear MDPs with simplex features,
one layer for each stage, every step on tasks never seen before; there Psi, and with it A_N, is a Monte Carlo estimate from
another pool, and `psi_error` is the distance by which this alone moves A_N. The layers are also compared with the paper's
Gaussian Gamma^-1 (without Psi) and with the Gaussian formula for the right Psi, which shows how much of the distance is due to
the tasks and how much to the features.

The full layer is trained twice, from the paper's initialization. On `gaussian` it is trained by plain gradient descent, whose
limit the theory knows for U and u separately (Adam finds u U but does not conserve u^2 - ||U||^2, which fixes the two
factors). On the first stage of `simplex`, tasks have a mean, and the blocks v and z therefore leak; prompts are short there,
because the value of a mean is of lower order in 1/N.

    lindm run weights --preset quick
    lindm verify --only weights

Expected: A_N within 2 % on every law and stage; (U, u) within 5 %; on other features the Gaussian formula with the right Psi
is 4 to 6 % from the trained layer; the risk of the full layer is below that of the reduced one if tasks have a mean.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure
from scipy.optimize import minimize

from lindm.icl.attention import ReducedAttention, query_columns
from lindm.problems.linear_mdp import MDPFamily, onehot_family, second_moment, simplex_family
from lindm.problems.regression import covariance
from lindm.types import Prompt
from lindm_experiments.harness.claims import get_claim
from lindm_experiments.harness.config import check_counts
from lindm_experiments.harness.figures import (
    BLUE,
    BOUND,
    COLORS,
    DIVERGING,
    EXACT,
    GRAY,
    GREEN,
    INK,
    MARKERS,
    WIDTH,
    legend_below,
    panel_grid,
    plot_seeds,
)
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_experiments.lib import linear_mdps
from lindm_experiments.lib.stage_layers import (
    StageLayers,
    draw_contexts,
    gaussian_prompts,
    make_prompts,
    new_task_prompts,
    pool_prompts,
    train_in_pieces,
)
from lindm_theory import gradient_flow
from lindm_theory.in_context import gaussian_gamma, optimal_weights
from lindm_theory.moments import design_fourth, gaussian_fourth

LAWS = ("gaussian", "one-hot", "simplex")
SCALE = 0.5  # s of the paper's initialization
DESCENT = optax.sgd(0.02)  # made once: optax objects are compared by identity


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 201000
    N: int = 32
    N_leak: int = 4  # pairs that the full layer sees on `simplex`; the value of a mean falls quickly with N
    batch: int = 256
    chunk: int = 100  # steps between two measurements of the weights
    chunks: int = 6
    chunks_descent: int = 10  # number of chunks of gradient descent, which needs more steps because nothing scales it
    pool: int = 64 * linear_mdps.BLOCK  # number of tasks that determine Psi
    prompts: int = 1 << 14  # number of prompts for the gain of the full layer

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "N", "N_leak", "batch", "chunk", "prompts")
        check_counts(self, "chunks", "chunks_descent", least=2)
        if self.N_leak > self.N:
            raise ValueError(f"N_leak must not exceed N = {self.N}; got {self.N_leak}")
        if self.pool % (2 * linear_mdps.BLOCK) or self.pool < self.prompts:
            raise ValueError(f"pool must be a multiple of {2 * linear_mdps.BLOCK}, at least prompts; got {self.pool}")


QUICK = Config()
FULL = Config(seeds=10, batch=512, chunk=250, chunks=8, chunks_descent=6, pool=128 * linear_mdps.BLOCK, prompts=1 << 17)
SMOKE = Config(seeds=2, batch=32, chunk=10, chunks=2, chunks_descent=2, pool=2 * linear_mdps.BLOCK, prompts=512)


@jax.jit
def families(key: Array) -> dict[str, MDPFamily]:
    return {"one-hot": onehot_family(3, 2, 3), "simplex": simplex_family(key, 10, 3, 4, 3, feature_power=3.0)}


@jax.jit
def closed_forms(family: MDPFamily, pool: Array, N: Array) -> tuple[Array, Array, Array]:
    """A [4, H, d, d], from Psi of the pool, of its first half, of its second half, and from the pool by the Gaussian formula for
    K; the paper's Gamma [d, d], which knows no Psi; the features' Lambda [d, d]."""
    Lambda, table = second_moment(family), linear_mdps.pairs_table(family)
    H, n, d = pool.shape
    first, second = (jnp.einsum("hni,hnj->hij", half, half) / (n // 2) for half in (pool[:, : n // 2], pool[:, n // 2 :]))
    Psi = jnp.stack([(first + second) / 2, first, second]).reshape(3 * H, d, d)
    K = jax.vmap(lambda P: design_fourth(table, family.design, P))(Psi)
    gaussian = jax.vmap(lambda P: gaussian_fourth(Lambda, P))(Psi[:H])
    A = jax.vmap(lambda P, K: optimal_weights(Lambda, P, K, N))(jnp.concatenate([Psi, Psi[:H]]), jnp.concatenate([K, gaussian]))
    return A.reshape(4, H, d, d), gaussian_gamma(Lambda, N), Lambda


def relative(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """||A - B||_F / ||B||_F over the last two axes."""
    return np.linalg.norm(A - B, axis=(-2, -1)) / np.linalg.norm(B, axis=(-2, -1))


def measure_gaussian(cfg: Config, key: Array, seed: int) -> dict:
    Lambda = np.asarray(covariance(4, 2.0))
    root = np.sqrt(Lambda)  # diagonal
    layer = StageLayers(4, 1, seed, cfg.N, SCALE)
    gamma = gaussian_gamma(Lambda, cfg.N)
    gradient_flow.initial(np.eye(4), SCALE, gamma)  # raises if the scale of the layer breaks [ZFB] Assumption 3.3
    data = linear_mdps.single_precision((root, query_columns(Lambda)))
    layer, path = train_in_pieces(key, layer, gaussian_prompts(cfg.N, cfg.batch), data, cfg.chunk, cfg.chunks_descent, DESCENT)
    A = np.linalg.inv(np.asarray(gamma))
    U, u = (np.asarray(x, dtype=float) for x in gradient_flow.limit(A))
    full = {name: np.asarray(getattr(layer.full, name)[0], dtype=float) for name in ("U", "u", "v", "z")}
    return {
        "law": "gaussian",
        "learned": path[-1].tolist(),
        "A_N": A[None].tolist(),
        "gamma_inverse": A.tolist(),
        "path": [relative(p, A[None]).tolist() for p in path],
        "full": {
            "U": full["U"].tolist(),
            "u": float(full["u"]),
            "U_limit": U.tolist(),
            "u_limit": float(u),
            "v": float(np.linalg.norm(full["v"])),
            "z": float(np.linalg.norm(full["z"])),
            "conserved": float(gradient_flow.conserved(full["U"], full["u"])),
        },
    }


def measure_family(cfg: Config, name: str, family: MDPFamily, key: Array, seed: int) -> tuple[dict, StageLayers, Array]:
    k_pool, k_train = jax.random.split(key)
    H, d = family.theta_low.shape
    pool = linear_mdps.task_pool(k_pool, family, cfg.pool)
    (A, half, other, gaussian), gamma, Lambda = (np.asarray(x) for x in closed_forms(family, pool, np.float64(cfg.N)))
    columns = np.sqrt(d) * np.linalg.cholesky(Lambda).T
    draw, data = (new_task_prompts, (family, columns)) if name == "simplex" else (pool_prompts, (family, columns, pool))
    layer, path = train_in_pieces(
        k_train,
        StageLayers(d, H, seed, cfg.N_leak, SCALE),
        draw(cfg.N, cfg.batch),
        linear_mdps.single_precision(data),
        cfg.chunk,
        cfg.chunks,
        None,
    )
    record = {
        "law": name,
        "learned": path[-1].tolist(),
        "A_N": A.tolist(),
        "gamma_inverse": np.linalg.inv(gamma).tolist(),
        "gaussian_form": gaussian.tolist(),
        # half the distance of two halves has the standard deviation of the whole; a pool that is trained on is its own population
        "psi_error": (relative(half, other) / 2).tolist() if name == "simplex" else [0.0] * H,
        "path": [relative(p, A).tolist() for p in path],
    }
    return record, layer, pool


@partial(jax.jit, static_argnames="graph")
def _losses(graph, state, reduced: Array, key: Array, family: MDPFamily, w: Array, length: Array) -> Array:
    """Mean squared errors [2] of a full layer and of a reduced one on the same prompts of tasks w [P, d], len(length) pairs."""
    x = draw_contexts(key, family, 1, len(length), len(w))
    prompts, target = make_prompts(x, w[:, None], query_columns(second_moment(family)))
    d = w.shape[-1]
    prompts, target = Prompt(x=prompts.x, y=prompts.y, query=prompts.query[:, :d]), target[:, :d]
    layers = (nnx.merge(graph, state), ReducedAttention(d, A=reduced))
    return jnp.stack([jnp.mean(jnp.square(jax.vmap(layer)(prompts) - target)) for layer in layers])


@jax.jit
def _leak_risk(b: Array, family: MDPFamily, Psi: Array, mean: Array, N: Array) -> tuple[Array, Array]:
    """Least risk [] of the layer what = A (S + G b) on tasks of moments Psi and mean, and its A; b = 0: the reduced layer."""
    Lambda, table = second_moment(family), linear_mdps.pairs_table(family)
    A, cross = gradient_flow.leak_weights(b, Lambda, Psi, mean, lambda P: design_fourth(table, family.design, P), N)
    return jnp.trace(Lambda @ (Psi - A @ cross)), A


def measure_leak(cfg: Config, family: MDPFamily, layer: StageLayers, pool: Array, key: Array) -> dict:
    """What the blocks v and z of the full layer are worth at the first stage of a family whose tasks have a mean."""
    w = np.asarray(pool[0])
    zero = np.zeros(w.shape[1])
    moments = family, w.T @ w / len(w), w.mean(0), np.float64(cfg.N_leak)
    reduced_risk, A = _leak_risk(zero, *moments)
    least = minimize(lambda b: float(_leak_risk(b, *moments)[0]), zero, method="BFGS", options={"gtol": 1e-7})
    graph, state = nnx.split(layer.full)
    full, reduced = _losses(graph, state, A, key, family, w[: cfg.prompts], np.zeros(cfg.N_leak))
    return {
        "v": float(np.linalg.norm(layer.full.v)),
        "z": float(np.linalg.norm(layer.full.z)),
        "u": float(layer.full.u[0]),
        "risk_full": float(full),
        "risk_reduced": float(reduced),
        "predicted_reduced": float(reduced_risk),
        "predicted_v_only": float(least.fun),
    }


def measure(cfg: Config, point: dict) -> dict:
    seed = cfg.base_seed + point["seed"]
    k_features, k_gauss, k_leak, *keys = jax.random.split(jax.random.key(seed), 5)
    laws = [measure_gaussian(cfg, k_gauss, seed)]
    for key, (name, family) in zip(keys, families(k_features).items(), strict=True):
        record, layer, pool = measure_family(cfg, name, family, key, seed)
        laws.append(record)
    leak = measure_leak(cfg, family, layer, pool, k_leak)
    return {"laws": laws, "leak": leak, "N": cfg.N, "N_leak": cfg.N_leak, "chunk": cfg.chunk}


def _of(record: dict, law: str) -> dict:
    return next(x for x in record["laws"] if x["law"] == law)


def _distances(records: list[dict], law: str, to: str) -> np.ndarray:
    """Relative distances [seeds, H] of the learned weights to the matrix named `to`."""
    rows = [_of(r, law) for r in records]
    return np.array([relative(np.array(x["learned"]), np.broadcast_to(x[to], np.shape(x["learned"]))) for x in rows])


def _percent(values) -> str:
    return f"{100 * float(np.mean(values)):.3g} %"


def check(records: list[dict]) -> list[Verdict]:
    worst = {law: _distances(records, law, "A_N").max(1) for law in LAWS}
    psi = np.mean([max(_of(r, "simplex")["psi_error"]) for r in records])
    full = [_of(r, "gaussian")["full"] for r in records]
    off_U = [float(np.linalg.norm(np.subtract(f["U"], f["U_limit"])) / np.linalg.norm(f["U_limit"])) for f in full]
    off_u = [abs(f["u"] - f["u_limit"]) / f["u_limit"] for f in full]
    # the stage nearest to the formula: the reading that is kindest to the claim
    paper = {law: _distances(records, law, "gamma_inverse").min(1) for law in LAWS[1:]}
    form = {law: _distances(records, law, "gaussian_form").min(1) for law in LAWS[1:]}
    leak = [r["leak"] for r in records]
    allowed = np.mean([x["predicted_v_only"] / x["predicted_reduced"] for x in leak])
    return [
        mean_verdict(
            "weights",
            *worst.values(),
            figure="learned",
            note="worst stage: "
            + ", ".join(f"{k} {_percent(v)}" for k, v in worst.items())
            + f"; of which Psi unknown {_percent(psi)}",
        ),
        mean_verdict(
            "weights/full-limit",
            off_U,
            off_u,
            figure="full",
            note=f"U {_percent(off_U)}, u {_percent(off_u)}; |v| {np.mean([f['v'] for f in full]):.2g}, |z| "
            f"{np.mean([f['z'] for f in full]):.2g}",
        ),
        mean_verdict(
            "weights/paper-gamma",
            *form.values(),
            figure="learned",
            note="nearest stage: "
            + ", ".join(f"{k} {_percent(v)} (without Psi, as in eq. (4): {_percent(paper[k])})" for k, v in form.items()),
        ),
        mean_verdict(
            "weights/leak",
            [x["risk_full"] / x["risk_reduced"] for x in leak],
            figure="full",
            note=f"N = {records[0]['N_leak']}; with v alone, exact: {allowed:.3f}; |v| {np.mean([x['v'] for x in leak]):.2g}, "
            f"|z| {np.mean([x['z'] for x in leak]):.2g}",
        ),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    return {"learned": _learned(records), "error": _error(records), "full": _full(records)}


def _learned(records: list[dict]) -> Figure:
    """Heat maps of the first seed and first stage, one row a law."""
    figure, axes = pyplot.subplots(len(LAWS), 4, figsize=(WIDTH, 6.6))
    for row, law in enumerate(LAWS):
        x = _of(records[0], law)
        learned, A, gamma = np.array(x["learned"][0]), np.array(x["A_N"][0]), np.array(x["gamma_inverse"])
        top = float(np.abs(A).max())
        maps = (
            ("learned", learned),
            ("$A_N$", A),
            ("20 × (learned − $A_N$)", 20 * (learned - A)),
            ("Gaussian $\\Gamma^{-1}$, own scale", gamma),
        )
        for column, (title, matrix) in enumerate(maps):
            axis = axes[row, column]
            limit = float(np.abs(matrix).max()) if column == 3 else top
            image = axis.imshow(matrix, cmap=DIVERGING, vmin=-limit, vmax=limit)
            axis.set(xticks=[], yticks=[], title=title if row == 0 else "")
            axis.grid(False)
            far = float(relative(matrix, A)) if column in (0, 3) else None
            axis.set_xlabel("" if far is None else f"{far:.2%} from $A_N$" if far < 0.1 else f"{far:.0%} from $A_N$", fontsize=9)
            if column == 0:
                axis.set_ylabel(law if law == "gaussian" else f"{law}, stage 1")
            if column >= 2:
                figure.colorbar(image, ax=axis, shrink=0.75)
    figure.suptitle(f"What is learned on prompts of N = {records[0]['N']} pairs, and the closed form", x=0.01, ha="left")
    figure.set_label(
        "Heat maps of the learned matrix and the closed form look alike on three laws, and twenty times their difference is "
        "nearly empty; the Gaussian formula differs on one-hot and simplex features."
    )
    return figure


def _error(records: list[dict]) -> Figure:
    """The error on the way, every seed, one panel a law."""
    figure, axes = panel_grid(len(LAWS), 3.4, sharey=True)
    for axis, law in zip(axes, LAWS, strict=True):
        _way(axis, records, law)
        axis.set(title=law, xlabel="training steps")
    figure.set_label("The relative error of the learned matrix falls below the criterion during training, on three laws.")
    return figure


def _way(axis, records: list[dict], law: str) -> None:
    """Relative error at the end of every piece: thin, a seed; thick, the mean of a stage; dashed, distances that stay."""
    paths = np.array([_of(r, law)["path"] for r in records])  # [seeds, pieces, H]
    steps = records[0]["chunk"] * np.arange(1, paths.shape[1] + 1)
    for h in range(paths.shape[2]):
        plot_seeds(axis, steps, paths[:, :, h], COLORS[h])
        axis.plot(steps, paths[:, :, h].mean(0), color=COLORS[h], marker=MARKERS[h], label=f"stage {h + 1}", linestyle="none")
    axis.axhline(get_claim("weights").hi, color=GRAY, label="criterion", **BOUND)
    far = _distances(records, law, "gamma_inverse")
    if law != "gaussian":
        axis.axhline(far.mean(), color="black", linestyle=":", marker="", label="distance to $\\Gamma^{-1}$")
    axis.set(yscale="log", ylim=(2e-3, 20), ylabel="$\\|\\hat A - A_N\\|_F/\\|A_N\\|_F$")
    legend_below(axis, ncols=2)


def _full(records: list[dict]) -> Figure:
    """Left: every entry of U and u against the limit of gradient flow. Right: what the blocks v and z are worth."""
    figure, (left, right) = panel_grid(2, 4.0)
    full = [_of(r, "gaussian")["full"] for r in records]
    ends = np.array([f["u_limit"] for f in full] + [0.0])
    left.plot([ends.min(), ends.max()], [ends.min(), ends.max()], color=GRAY, label="equal", **EXACT)
    for i, f in enumerate(full):
        left.plot(np.ravel(f["U_limit"]), np.ravel(f["U"]), "o", color=BLUE, label="entries of U" if i == 0 else None, alpha=0.6)
        left.plot(f["u_limit"], f["u"], "s", color=COLORS[1], label="u" if i == 0 else None, alpha=0.6)
    left.set(xlabel="limit of gradient flow", ylabel="trained", title="Full layer, gaussian features")
    left.legend()
    rows = (
        ("best reduced\nlayer, exact = 1;\nmeasured", "risk_reduced", "predicted_reduced"),
        ("best layer\nwith v, exact", None, "predicted_v_only"),
        ("full layer (v\nand z), measured", "risk_full", None),
    )
    for i, (_, measured, exact) in enumerate(rows):
        for x in (r["leak"] for r in records):
            if exact:
                right.plot([i - 0.25, i + 0.25], [x[exact] / x["predicted_reduced"]] * 2, color=INK, **EXACT)
            if measured:  # the full layer against the reduced one on the same prompts: most of the noise is common
                base = x["risk_reduced"] if measured == "risk_full" else x["predicted_reduced"]
                right.plot(i, x[measured] / base, "o", color=GREEN, alpha=0.7)
    right.set_xticks(range(len(rows)), [r[0] for r in rows], fontsize=8)
    title = f"Simplex, stage 1, N = {records[0]['N_leak']}: tasks have a mean"
    right.set(ylabel="risk / risk of the best reduced layer", title=title, xlim=(-0.6, len(rows) - 0.4))
    figure.set_label(
        "Left: every trained entry lies on the diagonal against the limit of gradient flow. Right: the full layer, which may "
        "use the blocks v and z, has one to two percent less risk than the best reduced layer."
    )
    return figure
