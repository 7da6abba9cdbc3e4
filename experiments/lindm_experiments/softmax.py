"""What changes when the linear layer becomes a softmax layer, gets a second block, or gets positions of its pairs?

Six layers are trained on the same Gaussian regression tasks at length N and tested at other lengths M: linear and softmax, one
and two blocks, softmax with a learned and with a fixed sinusoidal position table. One softmax head cannot be the linear layer:
with weights U/u and values u*y it writes

    u mean(y) + (1/N) sum_i (y_i - mean(y)) (x_i - mean(x))' U x_q + O(1/u),

so the limit u -> infinity that would make it linear also makes the label mean explode, which carries no information about w.

    lindm run softmax --preset quick
    lindm verify --only softmax

Expected: softmax regresses in context with the exact risk of the best isotropic head, also beyond N, but stays behind the
linear layer. A fixed sinusoidal table fails beyond N (the risk rises). A learned table, whose rows past N were never trained,
does not fail but gains less.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from matplotlib.figure import Figure

from lindm.icl.attention import ReducedAttention, SoftmaxAttention, sinusoidal
from lindm.icl.trainer import train
from lindm.problems.regression import draw_regression
from lindm_experiments.harness.config import check_counts
from lindm_experiments.harness.figures import BLUE, COLORS, GRAY, legend_below, panel_grid, plot_seeds, set_log_ticks
from lindm_experiments.harness.verdicts import Verdict, mean_verdict
from lindm_theory.in_context import gaussian_risk
from lindm_theory.softmax_limit import best_isotropic_head, isotropic_risk


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 2013000
    d: int = 4
    N: int = 16
    times: tuple[int, ...] = (1, 4)  # test lengths, in units of N
    steps: int = 500
    batch: int = 128
    queries: int = 8
    tests: int = 8192

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "d", "N", "steps", "batch", "queries", "tests")
        if len(self.times) < 2 or self.times[0] != 1 or list(self.times) != sorted(set(self.times)):
            raise ValueError(f"times must rise from 1 to a longer length; got {self.times}")


QUICK = Config()
FULL = Config(seeds=10, times=(1, 2, 4, 8), steps=2000)
SMOKE = Config(seeds=2, times=(1, 2), steps=10, batch=8, tests=16)


@lru_cache
def _draw(n: int, batch: int, queries: int):
    """The draw function of one set of sizes: one object, so that nothing compiles twice."""

    def draw(key: Array, root: Array):
        one = partial(draw_regression, Lambda_sqrt=root, Psi_sqrt=root, n=n, queries=queries)
        prompt, target, _ = jax.vmap(lambda k: one(k))(jax.random.split(key, batch))
        return prompt, target

    return draw


def layers(key: Array, cfg: Config) -> dict[str, nnx.Module]:
    """The six layers before training."""
    rngs = nnx.Rngs(key)
    rows = cfg.N * cfg.times[-1] + 1
    learned = 0.3 * jax.random.normal(jax.random.fold_in(key, 1), (rows, cfg.d + 1), jnp.float32)
    fixed = sinusoidal(rows, cfg.d + 1)
    soft = partial(SoftmaxAttention, cfg.d, rngs=rngs, scale=0.5)
    return {
        "linear": ReducedAttention(cfg.d),
        "linear, 2 blocks": ReducedAttention(cfg.d, 2, rngs=rngs, scale=0.3),
        "softmax": soft(),
        "softmax, 2 blocks": soft(depth=2),
        "softmax, learned positions": soft(positions=learned),
        "softmax, fixed positions": soft(positions=fixed, train_positions=False),
    }


@partial(jax.jit, static_argnames=("graphs", "draw"))
def _risks(graphs, states, key: Array, root: Array, draw) -> Array:
    """Mean squared error of every layer on the same fresh prompts."""
    prompt, target = draw(key, root)
    return jnp.stack(
        [jnp.mean((jax.vmap(nnx.merge(graph, state))(prompt) - target) ** 2) for graph, state in zip(graphs, states, strict=True)]
    )


@lru_cache
def predicted_softmax(d: int, N: int, lengths: tuple[int, ...]) -> list[float]:
    """Risk of the best isotropic softmax head of length N, on test prompts of other lengths: the same for all seeds."""
    best = jax.jit(best_isotropic_head, static_argnums=0)(d, float(N))
    risk = jax.jit(isotropic_risk, static_argnums=2)
    return [float(risk(best.scale, best.u, d, float(M))) for M in lengths]


def measure(cfg: Config, point: dict) -> dict:
    key = jax.random.key(cfg.base_seed + point["seed"])
    k_init, k_train, k_test = jax.random.split(key, 3)
    root = jnp.eye(cfg.d, dtype=jnp.float32)
    draw = _draw(cfg.N, cfg.batch, cfg.queries)
    trained = {
        name: train(layer, draw, k_train, steps=cfg.steps, learning_rate=0.05, data=(root,))[0]
        for name, layer in layers(k_init, cfg).items()
    }
    graphs, states = zip(*(nnx.split(layer) for layer in trained.values()), strict=True)
    lengths = [cfg.N * t for t in cfg.times]
    risks = [_risks(graphs, states, k_test, root, draw=_draw(M, cfg.tests, cfg.queries)) for M in lengths]
    exact = [gaussian_risk(jnp.eye(cfg.d), M, cfg.N) for M in lengths]
    return {
        "M": lengths,
        "N": cfg.N,
        "d": cfg.d,
        "risk": {name: [float(r[i]) for r in risks] for i, name in enumerate(trained)},
        "exact": [float(e.estimation + e.bias) for e in exact],
        "exact softmax": predicted_softmax(cfg.d, cfg.N, tuple(lengths)),
    }


def _at(record: dict, name: str, times: int) -> float:
    return record["risk"][name][record["M"].index(record["N"] * times)]


def check(records: list[dict]) -> list[Verdict]:
    longer = min(4, records[0]["M"][-1] // records[0]["N"])

    def gain(name: str) -> list[float]:
        return [_at(r, name, longer) / _at(r, name, 1) for r in records]

    behind = [_at(r, "softmax", 1) / _at(r, "linear", 1) for r in records]
    lost = [_at(r, "softmax, learned positions", longer) / _at(r, "softmax", longer) for r in records]
    trivial = [_at(r, "softmax", 1) / r["d"] for r in records]  # predicting zero has risk tr(Lambda Psi) = d
    exact = np.array([np.array(r["risk"]["softmax"]) / np.array(r["exact softmax"]) for r in records])
    exact = exact[:, [0, records[0]["M"].index(records[0]["N"] * longer)]]
    deeper = np.mean([_at(r, "softmax, 2 blocks", 1) / _at(r, "softmax", 1) for r in records])
    return [
        mean_verdict(
            "softmax", trivial, gain("softmax"), figure="softmax", note=f"two blocks: {deeper:.2f} times the risk of one"
        ),
        mean_verdict(
            "softmax/exact", exact.mean(1), figure="softmax", note=f"{exact[:, 0].mean():.3f} and {exact[:, 1].mean():.3f}"
        ),
        mean_verdict("softmax/linear-ahead", behind, figure="softmax"),
        mean_verdict("softmax/positions", gain("softmax, fixed positions"), figure="softmax"),
        mean_verdict("softmax/learned-positions", lost, figure="softmax"),
        mean_verdict("softmax/learned-positions-break", gain("softmax, learned positions"), figure="softmax"),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    M, N = records[0]["M"], records[0]["N"]
    figure, (left, right) = panel_grid(2, 4.6, ylabel="mean squared error", sharey=True)
    for i, name in enumerate(records[0]["risk"]):
        panels = (left, right) if name == "softmax" else (right if "positions" in name else left,)
        curves = np.array([r["risk"][name] for r in records])
        for axis in panels:
            plot_seeds(axis, M, curves, COLORS[i])
            axis.plot(M, curves.mean(0), color=COLORS[i], label=name)
    left.plot(M, records[0]["exact"], color=BLUE, linestyle=":", marker="", label="linear, exact")
    left.plot(M, records[0]["exact softmax"], color=COLORS[2], linestyle=":", marker="", label="softmax, exact")
    for axis, title in ((left, "Linear and softmax, one and two blocks"), (right, "Softmax with and without positions")):
        axis.axvline(
            N, color=GRAY, linewidth=0.8, linestyle="--", marker="", label="training length N" if axis is right else None
        )
        axis.set(xscale="log", yscale="log", xlabel="pairs in the test prompt M", title=title)
        set_log_ticks(axis, M)
        legend_below(axis, ncols=2)
    figure.set_label(
        "Left: the error falls with the test length for linear and softmax attention of one and two blocks; linear layers and "
        "two blocks are lower. Right: with fixed positions the error of softmax rises beyond the training length."
    )
    return {"softmax": figure}
