r"""Does the error of a trained transformer split as the theory says, into a part that depends on the length M of the test context
and a part that depends on the training length N?

    lindm run llm_law --preset quick
    lindm verify --only llm-law

A task is a decision problem of one stage: Q* of d state-action pairs, each uniform on [0, 1]. Its context has M pairs with
their returns, y ~ Bernoulli(Q*); the aim is to predict Q*. Three predictors read the same contexts:

    transformer   the decoder of `lindm.llm`, two layers of width 64, randomly initialized: a token for each (pair, return), as in
                  the prompt of [ZAS], then a query token for each pair. Trained at N by cross-entropy against Q*, tested at
                  every M
    layer         linear attention trained at N, in closed form: its risk is lindm_theory.in_context.risk, to the last digit
    Bayes         (1 + sum y) / (2 + n) for a pair seen n times: no predictor can do better

For the layer, risk(M, N) = estimation(N) / M + bias(N), exactly. For the transformer, a regression on 1/M for each N tests
this: what share of the variance over M does it leave? Then each part is tested separately: at M = N, how near is it to Bayes,
and beyond N, how much worse than Bayes is it because it was trained at N?

The full preset tests the same for a language model: SmolLM2, fine-tuned at N demonstrations of the suite pomdp and tested at
M.

Expected: the transformer is within 2 % of Bayes at M = N, and beyond N it loses less the longer it was trained. The regression
on 1/M leaves about a tenth of the variance, so the transformer does not have the split of the layer.
"""

from collections.abc import Sequence
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

from lindm.datasets import DatasetConfig
from lindm.evaluation.compare import evaluate
from lindm.llm.config import ModelConfig
from lindm.llm.model import Decoder
from lindm.llm.policy import load_policy
from lindm.llm.sft.optimizer import OptimizerConfig, make_optimizer
from lindm_experiments.harness.config import check_counts, check_multiples, check_rising
from lindm_experiments.harness.figures import COLORS, EXACT, GRAY, MARKERS, WIDTH, set_log_ticks
from lindm_experiments.harness.statistics import mean_ci
from lindm_experiments.harness.unfinished import point_directory
from lindm_experiments.harness.verdicts import Verdict, mean_verdict, undecided
from lindm_experiments.lib import language_models
from lindm_theory.in_context import optimal_weights, risk

D = 6  # pairs
BATCH = 64
BLOCK = 256  # test contexts at once
SMALL = ModelConfig(
    model_type="llama",
    vocab_size=3 * D,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    intermediate_size=128,
    tie_word_embeddings=False,
    max_position_embeddings=2048,
    init_std=0.125,
)
RATE = 3e-3
SUITE, HORIZON = "pomdp", 4


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int
    base_seed: int = 920_000
    N: tuple[int, ...] = (4, 16, 64)
    """training lengths"""
    M: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    """test lengths"""
    steps: int = 800
    contexts: int = 4096
    """number of test contexts"""
    model: str = ""
    """directory of a language model; without it, only the transformers are measured"""
    demos: tuple[int, ...] = (2, 8)
    """numbers of demonstrations in the training of the language model"""
    test_demos: tuple[int, ...] = (1, 2, 4, 8, 16)
    """numbers of demonstrations in its tests"""
    tasks: int = 50
    tuning: int = 60
    """number of steps of two documents"""

    def __post_init__(self):
        check_counts(self, "seeds", "steps", "contexts", "tasks", "tuning")
        check_rising(self, "N", "M", "demos", "test_demos", length=2)
        if not set(self.N) <= set(self.M):
            raise ValueError(f"M must contain every N, {self.N}; got {self.M}")
        check_multiples(self, BLOCK, "contexts")


FULL = Config(seeds=10, model="models/SmolLM2-135M-Instruct")
QUICK = Config(seeds=5, N=(2, 8), M=(2, 4, 8, 16), steps=160, contexts=1024)
SMOKE = Config(seeds=1, N=(2, 4), M=(2, 4), steps=5, contexts=256)


def points(cfg: Config) -> list[dict]:
    seeds = [cfg.base_seed + s for s in range(cfg.seeds)]
    layers = [{"seed": s, "predictor": "transformer", "N": N} for s in seeds for N in cfg.N]
    return layers + ([{"seed": cfg.base_seed, "predictor": "language model", "N": N} for N in cfg.demos] if cfg.model else [])


def measure(cfg: Config, point: dict) -> dict:
    if point["predictor"] == "language model":
        return {"gaps": _language(cfg, point)}
    with jax.enable_x64(False):
        k_train, k_test = jax.random.split(jax.random.key(point["seed"]))
        weights = train(jax.random.fold_in(k_train, point["N"]), point["N"], cfg.steps)
        measured = {M: tested(weights, jax.random.fold_in(k_test, M), M, cfg.contexts) for M in cfg.M}
    layer = exact_layer(point["N"], cfg.M)
    return {
        "rows": [
            {"M": M, "transformer": float(measured[M][0]), "bayes": float(measured[M][1]), "layer": float(layer[i])}
            for i, M in enumerate(cfg.M)
        ]
    }


# --- one stage ---------------------------------------------------------------------------------------------------------------


def draw(key: Array, contexts: int, length: int) -> tuple[Array, Array, Array]:
    """Q* [contexts, d], the pairs [contexts, length] and their returns, 0 or 1, of the same shape."""
    k_task, k_pair, k_return = jax.random.split(key, 3)
    Q = jax.random.uniform(k_task, (contexts, D))
    pairs = jax.random.randint(k_pair, (contexts, length), 0, D)
    y = jax.random.uniform(k_return, (contexts, length)) < jnp.take_along_axis(Q, pairs, axis=1)
    return Q, pairs, y.astype(jnp.int32)


def tokens(pairs: Array, y: Array) -> Array:
    """Contexts [n, M] as token numbers [n, M + d]: the context, then a query for every pair."""
    queries = jnp.broadcast_to(2 * D + jnp.arange(D), (len(pairs), D))
    return jnp.concatenate([2 * pairs + y, queries], axis=1)


def logits(model: Decoder, ids: Array) -> Array:
    """log odds of a return of 1 [n, d] for every pair."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    action_logits = model.logits(model.last_hidden_state(ids, positions)[:, -D:])
    return action_logits[..., 1] - action_logits[..., 0]


@partial(jax.jit, static_argnames=("N", "steps"))
def train(key: Array, N: int, steps: int) -> nnx.State:
    """Weights after so many steps on fresh contexts of N pairs."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(SMALL, nnx.Rngs(0))))
    k_weights, k_data = jax.random.split(key)
    weights = nnx.state(Decoder(SMALL, nnx.Rngs(k_weights)))
    optimizer = make_optimizer(OptimizerConfig(steps=steps, learning_rate=RATE, floor=0.0))

    def loss(weights: nnx.State, k: Array) -> Array:
        Q, pairs, y = draw(k, BATCH, N)
        odds = logits(nnx.merge(graphdef, weights), tokens(pairs, y))
        return optax.sigmoid_binary_cross_entropy(odds, Q).mean()

    def step(carry: tuple, k: Array) -> tuple[tuple, None]:
        weights, state = carry
        updates, state = optimizer.update(jax.grad(loss)(weights, k), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    return jax.lax.scan(step, (weights, optimizer.init(weights)), jax.random.split(k_data, steps))[0][0]


@partial(jax.jit, static_argnames=("M", "contexts"))
def tested(weights: nnx.State, key: Array, M: int, contexts: int) -> tuple[Array, Array]:
    """Mean squared errors of the transformer's estimate of Q* and of Bayes', on the same contexts of M pairs."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(SMALL, nnx.Rngs(0))))

    def block(k: Array) -> tuple[Array, Array]:
        Q, pairs, y = draw(k, BLOCK, M)
        seen = jax.nn.one_hot(pairs, D)
        bayes = (1 + jnp.einsum("nmd,nm->nd", seen, y.astype(Q.dtype))) / (2 + seen.sum(1))
        mine = jax.nn.sigmoid(logits(nnx.merge(graphdef, weights), tokens(pairs, y)))
        return ((mine - Q) ** 2).mean(), ((bayes - Q) ** 2).mean()

    mine, bayes = jax.lax.map(block, jax.random.split(key, contexts // BLOCK))
    return mine.mean(), bayes.mean()


def exact_layer(N: int, M: tuple[int, ...]) -> np.ndarray:
    """Risk at each M of the layer trained at N. Labels are centered, w = Q* - 1/2, so Psi = I / 12 and the noise of a return has
    variance E Q*(1 - Q*) = 1/6 whatever the pair."""
    eye = jnp.eye(D)
    Lambda, Psi, K, noise = eye / D, eye / 12, eye / (12 * D), eye / (6 * D)
    A = optimal_weights(Lambda, Psi, K, N, noise)
    return np.array([risk(A, Lambda, Psi, K, m, Lambda, noise).total for m in M])


# --- a language model ---------------------------------------------------------------------------------------------------------


def _language(cfg: Config, point: dict) -> dict:
    """Gaps of every task at every test number of demonstrations, of the model fine-tuned at N."""
    language_models.check_model(cfg.model)
    seed = point["seed"]
    with point_directory() as work, language_models.quiet_single_precision():
        suite = language_models.suite_at_horizon(SUITE, HORIZON)
        data = language_models.make_data(work / "train", suite, DatasetConfig(tasks=256, demos=point["N"], seed=seed))
        how = {"steps": cfg.tuning, "batch": 2, "learning_rate": 5e-4}
        run = language_models.fine_tune(language_models.sft_config(cfg.model, data, work / "run", **how))
        gaps = {}
        for M in cfg.test_demos:
            data_config = DatasetConfig(tasks=cfg.tasks, demos=M, seed=seed + 1)
            (result,) = evaluate(suite, {"sft": load_policy(run)}, dataset=data_config)
            gaps[str(M)] = [round(gap, 6) for gap in result.gaps if gap is not None]
    return gaps


# --- verdicts and figures ----------------------------------------------------------------------------------------------------


def risks(records: list[dict], predictor: str) -> np.ndarray:
    """Risks [seeds, N, M]."""
    mine = [r for r in records if r["point"]["predictor"] == "transformer"]
    seeds = sorted({r["point"]["seed"] for r in mine})
    lengths = sorted({r["point"]["N"] for r in mine})
    at = {(r["point"]["seed"], r["point"]["N"]): [row[predictor] for row in r["rows"]] for r in mine}
    return np.array([[at[s, N] for N in lengths] for s in seeds])


def lengths(records: list[dict]) -> tuple[list[int], list[int]]:
    mine = [r for r in records if r["point"]["predictor"] == "transformer"]
    return sorted({r["point"]["N"] for r in mine}), [row["M"] for row in mine[0]["rows"]]


def language_gaps(records: list[dict]) -> dict[int, dict[int, list[float]]]:
    """Gaps of the language model: N -> M -> a gap of every task, in increasing order."""
    mine = sorted((r for r in records if r["point"]["predictor"] == "language model"), key=lambda r: r["point"]["N"])
    return {r["point"]["N"]: {int(m): r["gaps"][m] for m in sorted(r["gaps"], key=int)} for r in mine}


def unexplained(table: np.ndarray, M: Sequence[int]) -> np.ndarray:
    """Share of the variance over M that the best a / M + b leaves, mean over N: [..., N, M] -> [...]."""
    design = np.stack([1 / np.asarray(M, float), np.ones(len(M))], axis=-1)
    fitted = table @ (design @ np.linalg.pinv(design)).T
    total = ((table - table.mean(-1, keepdims=True)) ** 2).sum(-1)
    return (((table - fitted) ** 2).sum(-1) / total).mean(-1)


def check(records: list[dict]) -> list[Verdict]:
    mine, layer, bayes = (risks(records, predictor) for predictor in ("transformer", "layer", "bayes"))
    N, M = lengths(records)
    own = [M.index(n) for n in N]  # test length = training length
    near = [np.mean([x[:, i, m] / bayes[:, i, m] for i, m in enumerate(own)], axis=0) for x in (mine, layer)]
    lost = [(x - bayes)[:, :, -1] for x in (mine, layer)]
    ends = [" to ".join(f"{v:.2g}" for v in x.mean(0)[[0, -1]]) for x in lost]
    verdicts = [
        mean_verdict(
            "llm-law",
            unexplained(mine, M),
            figure="risk",
            note=f"layer {unexplained(layer, M).mean():.1g}, Bayes {unexplained(bayes, M).mean():.2g}",
        ),
        mean_verdict("llm-law/estimation", near[0], figure="risk", note=f"layer {near[1].mean():.3f}"),
        mean_verdict(
            "llm-law/bias",
            lost[0][:, -1] - lost[0][:, 0],
            figure="risk",
            note=f"risk beyond Bayes at M = {M[-1]}, N = {N[0]} to {N[-1]}: transformer {ends[0]}, layer {ends[1]}",
        ),
    ]
    by_length = language_gaps(records)
    if not by_length:
        return [*verdicts, undecided("llm-law/language", "no language model was measured")]
    few, many = by_length[min(by_length)], by_length[max(by_length)]
    means = "; ".join(f"N = {n}: " + ", ".join(f"{np.mean(v):.3f}" for v in gaps.values()) for n, gaps in by_length.items())
    difference = np.array(many[max(many)]) - np.array(few[max(few)])
    note = f"normalized optimality gap at M = {', '.join(map(str, few))}: {means}"
    return [*verdicts, mean_verdict("llm-law/language", difference, figure="language", note=note)]


def plot(records: list[dict]) -> dict[str, Figure]:
    N, M = lengths(records)
    figure, axes = pyplot.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True)
    for axis, predictor in zip(axes, ("transformer", "layer"), strict=True):
        for n, values, color, marker in zip(N, np.moveaxis(risks(records, predictor), 1, 0), COLORS, MARKERS, strict=False):
            axis.plot(M, values.mean(0), color=color, label=f"trained at N = {n}", **EXACT | {"marker": marker})
            axis.fill_between(M, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
        axis.plot(M, risks(records, "bayes").mean((0, 1)), color=GRAY, linestyle=":", marker="", label="Bayes")
        axis.set(xscale="log", yscale="log", xlabel="pairs in the context M")
        set_log_ticks(axis, M)
        axis.set_title("trained transformer" if predictor == "transformer" else "attention layer (exact)")
    axes[0].set_ylabel("mean squared error of Qhat")
    axes[0].legend()
    figure.set_label(
        "Mean squared error over the context length for a trained transformer (left) and the exact attention layer (right): "
        "the curve trained at the longer length is lower for long contexts, and both transformers stay nearer to the Bayes "
        "predictor."
    )
    figures = {"risk": figure}
    if by_length := language_gaps(records):
        figure, axis = pyplot.subplots()
        for i, ((n, gaps), color, marker) in enumerate(zip(by_length.items(), COLORS, MARKERS, strict=False)):
            at = list(gaps)
            means, ends = zip(*(mean_ci(v) for v in gaps.values()), strict=True)
            error = [[m - e[0] for m, e in zip(means, ends, strict=True)]] * 2
            label = f"fine-tuned with {n} demonstrations"
            axis.errorbar(np.array(at) * 1.03**i, means, error, color=color, marker=marker, capsize=2, label=label)
        axis.set(xscale="log", xlabel="demonstrations in the context M", ylabel="normalized optimality gap")
        set_log_ticks(axis, at)
        axis.set_title(f"Language model on {SUITE}, horizon {HORIZON}")
        axis.legend()
        figure.set_label("Gap of fine-tuned language models over the demonstrations in the context, with 95 % intervals.")
        figures["language"] = figure
    return figures
