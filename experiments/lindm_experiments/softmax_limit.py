"""What does softmax attention become on a long prompt, and how many more pairs than linear attention does it need?

On Gaussian features one softmax head tends to linear attention with the same weights, at every temperature: the softmax is a
mean under the tilted law of the features, and tilting moves a Gaussian. Each seed draws features, tasks and the weights of the
heads. The mean square of prediction - limit is measured at several lengths M and score variances s, and compared on the same
prompts with linear attention and with two heads of opposite scores. The predictions are exact for every M. On simplex features
the limit is a different one, and it is not linear.

    lindm run softmax_limit --preset quick
    lindm verify --only softmax-limit

Expected: the slope is -1 in M with the constant e^s (v + m2). The best temperature needs 2.4 to 2.7 times the pairs of linear
attention. Two heads with small scores act like linear attention. On simplex features, several percent are not linear.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.icl.attention import ReducedAttention, SoftmaxAttention
from lindm.types import Prompt
from lindm_experiments.harness.config import check_counts, check_rising
from lindm_experiments.harness.figures import (
    BLUE,
    BOUND,
    EXACT,
    GRAY,
    GREEN,
    INK,
    MARKERS,
    MEASURED,
    RED,
    SEQUENTIAL,
    legend_below,
    panel_grid,
    set_log_ticks,
)
from lindm_experiments.harness.statistics import slopes
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_theory import softmax_limit as theory

SCORES = (0.25, 0.5, 1.0, 2.0)  # variances of the scores of the first queries
BEST = 4  # queries more, each with the score variance of the least price
SMALL = 2  # the first of them, at which M is well above e^{3 s}: the asymptotic law is claimed there
HEADS = ("one softmax head", "linear attention", "two softmax heads")
ROWS = 16  # state-action pairs of the simplex features
HOT = 8.0  # scale of the scores on simplex features
MAPS = 3  # simplex feature maps in one seed


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 10
    base_seed: int = 2026000
    d: int = 4
    M: tuple[int, ...] = (8, 32, 128, 512)
    slope_from: int = 32
    sigma: float = 0.3
    prompts: int = 2048

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "d", "slope_from", "prompts")
        check_rising(self, "M", length=2)
        if sum(self.slope_from <= M for M in self.M) < 2:
            raise ValueError(f"slope_from must leave at least two values of M; got {self.slope_from} with M = {self.M}")
        if not self.sigma >= 0:
            raise ValueError(f"sigma must be at least 0; got {self.sigma}")


QUICK = Config()
FULL = Config(seeds=20, M=(2, 8, 32, 128, 512), prompts=4096)
SMOKE = Config(seeds=2, M=(4, 16), slope_from=4, prompts=64)


def softmax_head(U: np.ndarray) -> SoftmaxAttention:
    """One head with the block U of W_KQ, value weight 1 and no other weights."""
    d = len(U)
    head = SoftmaxAttention(d)
    head.W_KQ[...] = jnp.asarray(np.pad(U, (0, 1))[None], jnp.float32)
    head.W_PV[...] = jnp.asarray(np.diag(np.eye(d + 1)[d])[None], jnp.float32)
    return head


def layers(U: np.ndarray) -> tuple[nnx.Module, nnx.Module, nnx.Module]:
    """Softmax with scores U, softmax with scores -U, and linear attention with A = U'."""
    return softmax_head(U), softmax_head(-U), ReducedAttention(len(U), A=jnp.asarray(U.T, jnp.float32))


@jax.jit
def predictions(heads: tuple[nnx.Module, ...], prompts: Prompt) -> Array:
    """yhat [heads of HEADS, prompts, queries]."""
    plus, minus, linear = (jax.vmap(head)(prompts) for head in heads)
    return jnp.stack([plus, linear, (plus - minus) / 2])


@jax.jit
def attended_means(head: nnx.Module, x: Array, query: Array) -> Array:
    """The predictions for the d basis tasks, hence for every task: x [prompts, M, d], query [Q, d] -> [prompts, Q, d]."""

    def one(pairs: Array, y: Array) -> Array:
        return head(Prompt(x=pairs, y=y, query=query))

    return jax.vmap(jax.vmap(one, in_axes=(None, 1), out_axes=1))(x, x)


def gaussian_point(cfg: Config, rng: np.random.Generator) -> dict:
    """Mean square distances [M, heads, queries] on Gaussian features, and the exact ones."""
    d = cfg.d
    root = rng.normal(size=(d, d)) / np.sqrt(d) + 0.3 * np.eye(d)
    tasks = rng.normal(size=(d, d)) / np.sqrt(d) + 0.3 * np.eye(d)
    U = rng.normal(size=(d, d)) / np.sqrt(d)
    Lambda, Psi = root @ root.T, tasks @ tasks.T
    direction = rng.normal(size=(len(SCORES) + BEST, d))
    free = theory.query_numbers(direction @ U.T, Lambda, Psi, cfg.sigma)
    best = np.asarray(theory.best_score_variance(theory.alignment(free)))
    query = direction * np.sqrt(np.append(SCORES, best[-BEST:]) / np.asarray(free.s))[:, None]
    q = theory.query_numbers(query @ U.T, Lambda, Psi, cfg.sigma)
    heads, measured = layers(U), []
    for M in cfg.M:
        z = rng.standard_normal((cfg.prompts, M, d + 1), dtype=np.float32)
        w = (rng.normal(size=(cfg.prompts, d)) @ tasks.T).astype(np.float32)
        x = z[..., :d] @ root.T.astype(np.float32)
        y = np.einsum("pmd,pd->pm", x, w) + np.float32(cfg.sigma) * z[..., d]
        queries = np.broadcast_to(query.astype(np.float32), (cfg.prompts, *query.shape))
        yhat = np.asarray(predictions(heads, Prompt(x=x, y=y, query=queries)), float)
        off = yhat - (w @ (Lambda @ U @ query.T))[None]
        measured.append(np.mean(off**2, axis=1).tolist())
    return {
        "measured": measured,
        "exact": np.asarray(_exact(q, np.array(cfg.M, float))).tolist(),
        "s": np.asarray(q.s).tolist(),
        "constants": [
            np.asarray(f(q)).tolist() for f in (theory.softmax_constant, theory.linear_constant, theory.two_head_constant)
        ],
        "alignment": np.asarray(theory.alignment(q)).tolist(),
    }


_exact = jax.jit(theory.batch_distance)


def simplex_point(cfg: Config, rng: np.random.Generator) -> dict:
    """On simplex features with the longest prompt: M * (mean square distance) / V, and the share that is not linear."""
    d, M = cfg.d, cfg.M[-1]
    phi = rng.exponential(size=(ROWS, d)) ** 2
    phi /= phi.sum(1, keepdims=True)
    design = np.full(ROWS, 1 / ROWS)
    U = HOT * rng.normal(size=(d, d)) / np.sqrt(d)
    x = phi[rng.integers(0, ROWS, size=(-(-cfg.prompts // 8), M))].astype(np.float32)
    attended = np.asarray(attended_means(softmax_head(U), x, phi.astype(np.float32)), float)
    w = rng.normal(size=d)
    limit = np.asarray(theory.tilted_mean(phi, design, phi @ U.T))
    V = np.asarray(theory.tilted_constant(phi, design, phi @ U.T, w))
    return {
        "scaled": float(np.mean(M * np.mean(((attended - limit) @ w) ** 2, axis=0) / V)),
        "nonlinear": float(theory.unexplained(phi, design, attended.mean(0))),
        "predicted": float(theory.nonlinearity(phi, design, U)),
    }


def measure(cfg: Config, point: dict) -> dict:
    rng = np.random.default_rng(cfg.base_seed + point["seed"])
    return {
        "M": list(cfg.M),
        "slope_from": cfg.slope_from,
        "floor": float(theory.least_price(1.0)),  # of every price
        "gaussian": gaussian_point(cfg, rng),
        "simplex": [simplex_point(cfg, rng) for _ in range(MAPS)],
    }


def _measured(records: list[dict], name: str = "measured") -> np.ndarray:
    """[seeds, M, (heads,) queries]."""
    return np.array([r["gaussian"][name] for r in records])


def check(records: list[dict]) -> list[Verdict]:
    M, first = np.array(records[0]["M"], float), records[0]["slope_from"]
    measured, exact = _measured(records), _measured(records, "exact")
    constants = _measured(records, "constants")
    long = first <= M
    softmax = measured[:, :, 0]
    slope = [[slopes(M[long], row[long, i])[0] for row in softmax] for i in range(SMALL)]
    ratio = softmax / exact
    marginal = np.concatenate([ratio.mean(1), ratio.mean(2)], axis=1)  # over lengths, and over queries
    scaled = (M[-1] * softmax[:, -1, :SMALL] / constants[:, 0, :SMALL]).mean(1)
    price = (measured[:, -1, 0, -BEST:] / measured[:, -1, 1, -BEST:]).mean(1)
    least = (constants[:, 0, -BEST:] / constants[:, 1, -BEST:]).mean(1)
    floor = np.array([r["floor"] for r in records])
    pair = measured[:, -1, 2, 0] / measured[:, -1, 1, 0]
    simplex = {key: [np.mean([part[key] for part in r["simplex"]]) for r in records] for key in records[0]["simplex"][0]}
    below = M[0] * softmax[:, 0, 3].mean() / constants[:, 0, 3].mean()
    return [
        mean_verdict("softmax-limit", *slope, figure="softmax_limit", note=f"s = {SCORES[:SMALL]}, M from {first} on"),
        mean_verdict("softmax-limit/exact", *marginal.T, figure="softmax_limit", note=f"M from {M[0]:g} to {M[-1]:g}, s up to 2"),
        mean_verdict(
            "softmax-limit/constant",
            scaled,
            figure="softmax_limit",
            note=f"at M = {M[-1]:g}; at M = {M[0]:g}, s = 2 the distance is {below:.2f} of it",
        ),
        mean_verdict(
            "softmax-limit/price",
            price / least,
            figure="softmax_limit",
            note=f"price {price.mean():.3f}, predicted {least.mean():.3f}",
        ),
        mean_verdict(
            "softmax-limit/price-floor",
            price / floor,
            figure="softmax_limit",
            note=f"floor {floor[0]:.4f}, attained by one noiseless task along the query",
            slack=price / floor,
        ),
        mean_verdict("softmax-limit/two-heads", pair, figure="softmax_limit", note="s = 0.25"),
        mean_verdict("softmax-limit/tilted", simplex["scaled"], figure="softmax_limit"),
        mean_verdict(
            "softmax-limit/simplex",
            simplex["nonlinear"],
            figure="softmax_limit",
            note=f"predicted {np.mean(simplex['predicted']):.3f}",
        ),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    M = np.array(records[0]["M"], float)
    measured, exact, constants = _measured(records), _measured(records, "exact"), _measured(records, "constants")
    figure, (left, middle, right) = panel_grid(3, 4.6)
    shades = pyplot.get_cmap(SEQUENTIAL)(np.linspace(0, 0.85, len(SCORES)))
    for i, s in enumerate(SCORES):
        scale = constants[:, None, 1, i]  # of linear attention: all seeds on one scale
        for k, row in enumerate(measured[:, :, 0, i] / scale):
            left.plot(
                M,
                row,
                color=shades[i],
                **(MEASURED | {"marker": MARKERS[i], "alpha": 0.4, "label": f"s = {s:g}" if k == 0 else None}),
            )
        left.plot(M, (exact[:, :, i] / scale).mean(0), color=shades[i], **EXACT)
        left.plot(M, (constants[:, 0, i] / scale[:, 0]).mean() / M, color=shades[i], **BOUND)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="pairs in the prompt M",
        ylabel="mean square distance to the limit / (v s + m2)",
        title="One softmax head (dashed: $e^s(v+m_2)/M$)",
    )
    set_log_ticks(left, M)
    legend_below(left, ncols=2)
    s = np.geomspace(0.15, 3, 60)
    for r, color in ((0.0, BLUE), (1.0, RED)):
        middle.plot(s, theory.price(s, r), color=color, label=f"one head, r = {r:g}", **EXACT)
    middle.axhline(float(theory.least_price(1.0)), color=GRAY, linestyle=":", marker="")
    variances = _measured(records, "s")
    for head, color, marker, label in ((0, GRAY, "o", "one head, measured"), (2, GREEN, "s", "two heads, measured")):
        ratio = measured[:, -1, head] / measured[:, -1, 1]
        middle.plot(variances.ravel(), ratio.ravel(), color=color, label=label, **(MEASURED | {"marker": marker, "alpha": 0.5}))
    middle.plot(s, np.sinh(s) / s, color=GREEN, label="two heads, r = 0", **EXACT)
    middle.plot(s, (np.sinh(s) + s * np.cosh(s)) / (2 * s), color=GREEN, label="two heads, r = 1", **BOUND)
    middle.set(xscale="log", yscale="log", xlabel="variance of the scores s", ylabel="distance / distance of linear attention")
    middle.set_title(f"Price in pairs (M = {M[-1]:g})")
    middle.set_yticks([1, 2, 2.43, 3, 5, 10], ["1", "2", "2.43", "3", "5", "10"])
    middle.yaxis.minorticks_off()
    set_log_ticks(middle, SCORES)
    legend_below(middle)
    parts = [part for r in records for part in r["simplex"]]
    predicted = [part["predicted"] for part in parts]
    right.plot(predicted, [part["nonlinear"] for part in parts], color=INK, label="feature maps of all seeds", **MEASURED)
    right.plot([0, max(predicted)], [0, max(predicted)], color=GRAY, label="predicted", **EXACT)
    right.set(
        xlabel="predicted share that is not linear", ylabel=f"measured at M = {M[-1]:g}", title="Simplex features: another limit"
    )
    legend_below(right)
    figure.set_label(
        "Above left: the distance of one softmax head to its limit falls as 1/M for four variances of the scores. Above "
        "right: the price of softmax against linear attention is least, 2.43, near variance 1 for one head, and 1 at small "
        "scores for two heads. Below: on simplex features the measured share that is not linear is equal to the predicted "
        "one."
    )
    return {"softmax_limit": figure}
