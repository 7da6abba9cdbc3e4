"""`lindm bench attention [--json]`: the cost of training an attention layer, and its growth.

Both sides train the same layer (full linear attention from the paper's start) on the same law (x ~ N(0, I), w ~ N(0, I), fresh
tasks every step, one query per context) with the same Adam, schedule and batch. The peer is PyTorch written plainly: a
`torch.nn.Module` that builds E and multiplies E @ (E.T @ W_KQ @ E) / N, the N x N way, in an eager loop. A second, stronger peer
is the same loop with the layer in moment form: the remaining ratio is due to the loop and not to the algebra.

Drawing of tasks and training on one batch that is drawn before are also timed apart. The cost of training is that of one more
step. What a call costs whatever its length (Python, the layer, its optimizer) is a row of its own, and a part of the cost of a
whole run to within 1 % of the optimal loss. The rows of the machine's limits compare our side with what its core reaches,
measured in the same process: training with a large float32 matmul (by the operations that the algebra needs) and with a large
copy (by the bytes of a batch, read once forward and once backward), which a batch that stays in the cache can exceed; drawing
with the generator's bits alone, which every normal needs.

Costs, processes and rows are those of `lindm.bench.timing`; compilation is a row of its own. Memory is the growth of the peak
resident set during training, after the libraries are loaded; ours includes the compiler's. Where torch is not installed the peer
is null.
"""

import functools
import importlib.util
import math
import operator
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.random import threefry_2x32

from lindm.bench.timing import LESS, MORE, NEITHER, Row, answer, cpu_seconds, exponent, in_worker, peak_growth, row, timed
from lindm.icl.attention import FullAttention
from lindm.icl.trainer import train
from lindm.llm.parallel.devices import measured_peak_flops
from lindm.random import normal
from lindm.types import Prompt

Shape = tuple[int, int, int]  # batch, d, N

HEADLINE: Shape = (64, 5, 20)
BATCHES = (16, 64, 256, 1024)
DIMENSIONS = (5, 10, 20, 40)
LENGTHS = (20, 80, 320, 1280)
LENGTH_BATCH = 8  # the plain peer holds several batch x N x N arrays
MEMORY: Shape = (32, 5, 1280)
BUDGETS = (200, 400, 800, 1600, 3200)  # steps; each is a whole run with its own schedule
SEEDS = 5
SCALE, RATE, WARMUP = 0.3, 0.03, 0.05

MODULE = "lindm.bench.attention"
PLAIN = "plain PyTorch"
MOMENTS = "PyTorch in moment form"
MISSING = "torch (not installed)"
MATMUL, COPY, BITS = "a float32 matmul", "a copy", "the generator's bits"


# ---------------------------------------------------------------------------------------------------------------- exact risk


def exact_risk(W_KQ: np.ndarray, W_PV: np.ndarray, n: int) -> float:
    """E (yhat_q - <w, x_q>)^2 of a full layer of depth 1, [d+1, d+1] each, when x, x_q, w ~ N(0, I_d) and labels are noiseless.

    yhat_q = (B' S + e)' x_q with B = u U + v z' (odd in w, like the target) and e = U' G v + u c z (even in w), so the risk is
    E ||B' S - w||^2 + E ||e||^2, by the fourth moments of a Gaussian

        E[S S'] = (1 + (d+1)/n) I,    E[G v v' G] = (1 + 1/n) v v' + |v|^2/n I,    E[c G] = (d + 2/n) I,
        E[c^2] = (1 + 2/n) d (d + 2).
    """
    d = len(W_KQ) - 1
    W_KQ, W_PV = W_KQ.astype(np.float64), W_PV.astype(np.float64)
    U, z, v, u = W_KQ[:d, :d], W_KQ[d, :d], W_PV[d, :d], W_PV[d, d]
    B = u * U + np.outer(v, z)
    odd = (1 + (d + 1) / n) * np.sum(B**2) - 2 * np.trace(B) + d
    even = (1 + 1 / n) * np.sum((U.T @ v) ** 2) + np.sum(v**2) / n * np.sum(U**2)
    even += 2 * u * (d + 2 / n) * (z @ U.T @ v) + u**2 * (1 + 2 / n) * d * (d + 2) * np.sum(z**2)
    return float(odd + even)


def optimal_risk(d: int, n: int) -> float:
    """The least risk, at A_N = Gamma^{-1} = I / (1 + (d+1)/n) and v = z = 0."""
    return d - d / (1 + (d + 1) / n)


# ----------------------------------------------------------------------------------------------------------------------- ours


@functools.cache
def gaussian_draw(batch: int, d: int, n: int) -> Callable[[Array], tuple[Prompt, Array]]:
    """`draw(key)` of the bench: every array is drawn separately, so that none is a slice of a larger one.

    The pairs are the last axis of what is drawn, which a compiler can vectorize over where d is small.
    """

    def draw(key: Array) -> tuple[Prompt, Array]:
        context, rest = jax.random.split(key)
        x, (w, query) = normal(context, (n, d, batch)), normal(rest, (2, d, batch))
        y = functools.reduce(operator.add, (x[:, i] * w[None, i] for i in range(d)))
        target = functools.reduce(operator.add, (query[i] * w[i] for i in range(d)))
        return Prompt(x=jnp.moveaxis(x, -1, 0), y=y.T, query=query.T[:, None]), target[:, None]

    return draw


def run_ours(shape: Shape, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Train once; the weights W_KQ, W_PV [d+1, d+1]."""
    layer = FullAttention(shape[1], scale=SCALE)
    key = jax.random.key(seed)
    layer, _ = train(layer, gaussian_draw(*shape), key, steps=steps, learning_rate=RATE, warmup=WARMUP, average=0.0)
    return np.asarray(layer.W_KQ[0]), np.asarray(layer.W_PV[0])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw_many(key: Array, shape: Shape, steps: int) -> Array:
    """Sums of `steps` draws, so that no array is left out."""

    def step(total: Array, t: Array) -> tuple[Array, None]:
        prompt, target = gaussian_draw(*shape)(jax.random.fold_in(key, t))
        return total + sum(map(jnp.sum, (prompt.x, prompt.y, prompt.query, target))), None

    return jax.lax.scan(step, jnp.float32(0), jnp.arange(steps))[0]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _bits_many(key: Array, words: int, steps: int) -> Array:
    def step(total: Array, t: Array) -> tuple[Array, None]:
        words_of = threefry_2x32(jax.random.key_data(jax.random.fold_in(key, t)), jax.lax.iota(jnp.uint32, words))
        return total + jnp.sum(words_of), None

    return jax.lax.scan(step, jnp.uint32(0), jnp.arange(steps))[0]


def given_batch(_: Array, prompt: Prompt, target: Array) -> tuple[Prompt, Array]:
    """`draw` that draws nothing; the prompt has its batch last, as `gaussian_draw` makes it."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), prompt), target


def train_on_one_batch(shape: Shape, steps: int, seed: int) -> Array:
    """Our training without drawing; the losses."""
    layer, key = FullAttention(shape[1], scale=SCALE), jax.random.key(seed)
    prompt, target = gaussian_draw(*shape)(key)
    data = (jax.tree.map(lambda a: jnp.moveaxis(a, 0, -1), prompt), target)
    return train(layer, given_batch, key, steps=steps, data=data, learning_rate=RATE, warmup=WARMUP, average=0.0)[1]


def step_operations(shape: Shape) -> int:
    """Additions and multiplications of one training step of depth 1: values, moments and their gradients, then the d x d part."""
    batch, d, n = shape
    return batch * (n * (8 * d + 8) + 8 * d * d)


def step_bytes(shape: Shape) -> int:
    """Bytes of a batch, read once forward and once backward."""
    batch, d, n = shape
    return 2 * 4 * batch * (n * (d + 1) + d + 1)


def copy_rate(mebibytes: int = 256) -> float:
    """Bytes that a large copy reads and writes in a CPU-second."""
    source = np.ones(mebibytes * 2**18, np.float32)
    target = np.empty_like(source)
    np.copyto(target, source)
    return 2 * source.nbytes / cpu_seconds(lambda: np.copyto(target, source), repeats=5)


# ------------------------------------------------------------------------------------------------------------------- the peer


def _torch_batch(shape: Shape):
    import torch  # pyright: ignore[reportMissingImports]

    batch, d, n = shape
    x, w, query = torch.randn(batch, n, d), torch.randn(batch, d), torch.randn(batch, d)
    return x, (x @ w[:, :, None])[:, :, 0], query, (query * w).sum(dim=1)


def torch_draw_many(shape: Shape, steps: int, seed: int) -> None:
    """The peer's drawing alone."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    for _ in range(steps):
        _torch_batch(shape)


def torch_run(shape: Shape, steps: int, seed: int, plain: bool = True, fresh: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The same training in plain PyTorch; `plain=False` has the layer in moment form, `fresh=False` draws one batch alone."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    _, d, n = shape

    class LinearAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            W_KQ, W_PV = torch.zeros(d + 1, d + 1), torch.zeros(d + 1, d + 1)
            W_KQ[:d, :d], W_PV[d, d] = SCALE * torch.eye(d) / math.sqrt(d), SCALE
            self.W_KQ, self.W_PV = torch.nn.Parameter(W_KQ), torch.nn.Parameter(W_PV)
            self.register_buffer("mask", torch.cat([torch.ones(n), torch.zeros(1)])[:, None])

        def forward(self, x, y, query):
            if not plain:
                context = torch.cat([x, y[:, :, None]], dim=2)
                Z = context.transpose(1, 2) @ context / n
                row = self.W_PV[-1] @ Z @ self.W_KQ
                return (row[:, :d] * query).sum(dim=1)
            columns = torch.cat([x, query[:, None]], dim=1)
            labels = torch.cat([y, torch.zeros(len(y), 1)], dim=1)
            E = torch.cat([columns, labels[:, :, None]], dim=2).transpose(1, 2)
            attention = self.mask * (E.transpose(1, 2) @ self.W_KQ @ E) / n
            return (E + self.W_PV @ E @ attention)[:, -1, -1]

    model = LinearAttention()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.99))

    def schedule(t: int) -> float:
        done = (t + 1) / (steps + 1)
        return min(done / WARMUP, 1) * 0.5 * (1 + math.cos(math.pi * max(done - WARMUP, 0) / (1 - WARMUP)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    drawn = None if fresh else _torch_batch(shape)
    for _ in range(steps):
        x, y, query, target = drawn or _torch_batch(shape)
        loss = torch.nn.functional.mse_loss(model(x, y, query), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model.W_KQ.detach().numpy(), model.W_PV.detach().numpy()


# --------------------------------------------------------------------------------------------------------------- measurements

Run = Callable[[Shape, int, int], Any]
SIDES: dict[str, Run] = {"ours": run_ours, "torch": torch_run, "moments": functools.partial(torch_run, plain=False)}
# training on one batch and drawing alone
PARTS: dict[str, tuple[Run, Run]] = {
    "ours": (train_on_one_batch, lambda shape, steps, seed: _draw_many(jax.random.key(seed), shape, steps)),
    "torch": (functools.partial(torch_run, fresh=False), torch_draw_many),
}


def step_seconds(run: Run, shape: Shape, target: float = 0.25, repeats: int = 3) -> float:
    """CPU-seconds of one more training step: the difference between a run of about `target` seconds and one of a quarter of its
    steps, each the best of several. The fixed cost of a call, milliseconds of Python, is in both and drops out.

    The number of steps of ours is part of the compiled program, so it is estimated from the size of the work and not measured.
    """
    if run in (run_ours, *PARTS["ours"]):
        steps = int(np.clip(target * 4e8 / (shape[0] * shape[1] * (shape[2] + 20)), 20, 20000))
    else:
        steps = max(4, min(200, int(target / max(cpu_seconds(lambda: run(shape, 3, 0)) / 3, 1e-6))))
    costs = []
    for length in (steps // 4, steps):
        run(shape, length, 0)  # compilation, where there is one
        costs.append(cpu_seconds(lambda n=length: run(shape, n, 0), repeats))
    return (costs[1] - costs[0]) / (steps - steps // 4)


def time_to_optimum(run: Run, shape: Shape, excess: float = 0.01) -> dict[str, float | None]:
    """The smallest budget after which the exact risk is within `excess` of the optimum for every seed, and its median cost.

    None where no budget suffices.
    """
    _, d, n = shape
    for steps in BUDGETS:
        run(shape, steps, 0)  # compilation, where there is one
        costs, risks = [], []
        for seed in range(1, SEEDS + 1):
            cost, (W_KQ, W_PV) = timed(functools.partial(run, shape, steps, seed))
            costs.append(cost)
            risks.append(exact_risk(W_KQ, W_PV, n))
        if max(risks) <= (1 + excess) * optimal_risk(d, n):
            return {"steps": steps, "seconds": float(np.median(costs)), "worst": max(risks) / optimal_risk(d, n) - 1}
    return {"steps": None, "seconds": None, "worst": None}


def measure(side: str) -> dict[str, Any]:
    """All timings of one side (`ours`, `torch`, `moments`), in this process."""
    run = SIDES[side]
    batch, d, n = HEADLINE
    first = cpu_seconds(lambda: run(HEADLINE, 50, 0))
    again = cpu_seconds(lambda: run(HEADLINE, 50, 0), repeats=3)
    steps = [step_seconds(run, (b, d, n)) for b in BATCHES]
    out: dict[str, Any] = {
        "start": max(first - again, 0.0),
        "call": max(again - 50 * steps[BATCHES.index(batch)], 0.0),
        "batch": steps,
        "length": [step_seconds(run, (LENGTH_BATCH, d, m)) for m in LENGTHS],
        "optimum": time_to_optimum(run, HEADLINE),
    }
    if side != "moments":
        out["dimension"] = [step_seconds(run, (batch, k, n)) for k in DIMENSIONS]
        # a part is short, so its difference needs more steps to stand out from the calls
        out["given"], out["draw"] = ([step_seconds(part, (b, d, n), target=1.0) for b in BATCHES] for part in PARTS[side])
    if side == "ours":
        out["matmul"], out["copy"] = measured_peak_flops(seconds=1.0, clock=time.process_time), copy_rate()
        words = [b * (n * d + 2 * d) for b in BATCHES]
        out["bits"] = [cpu_seconds(lambda w=w: _bits_many(jax.random.key(0), w, 100), repeats=4) / 100 for w in words]
    return out


def memory(side: str) -> dict[str, Any]:
    """MiB by which the peak resident set grows while one side trains at `MEMORY`."""
    run = SIDES[side]
    run((2, 2, 2), 2, 0)  # loads libraries, allocators and the compiler, which do not count
    return {"memory": peak_growth(lambda: run(MEMORY, 3, 0))}


def rows(ours: dict[str, Any], peer: dict[str, Any] | None, strong: dict[str, Any] | None) -> list[Row]:
    """The table, from the measurements of both sides."""
    batch, d, n = HEADLINE
    name = PLAIN if peer else MISSING
    table: list[Row] = []

    def add(work: str, value: Callable[[dict], float | None], unit: str, better: int, other=peer, other_name=name) -> None:
        table.append(row(work, value(ours), value(other) if other else None, other_name, unit, better))

    for i, b in enumerate(BATCHES):
        add(f"train, d={d}, N={n}, batch {b}", lambda r, i=i, b=b: b / r["batch"][i], "contexts/CPU-s", MORE)
    for part, text in (("given", "train on one batch"), ("draw", "draw tasks alone")):
        for i, b in enumerate(BATCHES):
            add(f"{text}, d={d}, N={n}, batch {b}", lambda r, i=i, b=b, p=part: b / r[p][i], "contexts/CPU-s", MORE)
    for i, b in enumerate(BATCHES):
        shares = (
            ("train on one batch", step_operations((b, d, n)) / ours["given"][i] / ours["matmul"], MATMUL),
            ("train on one batch", step_bytes((b, d, n)) / ours["given"][i] / ours["copy"], COPY),
            ("draw tasks alone", ours["bits"][i] / ours["draw"][i], BITS),
        )
        for text, share, limit in shares:
            table.append(row(f"{text}, batch {b}: of the rate of {limit}", share, None, limit, "share", NEITHER))
    i = BATCHES.index(batch)
    strong_name = MOMENTS if strong else MISSING
    add(f"train, d={d}, N={n}, batch {batch}", lambda r: batch / r["batch"][i], "contexts/CPU-s", MORE, strong, strong_name)
    add(f"train, d={d}, N={LENGTHS[-1]}, batch {LENGTH_BATCH}", lambda r: LENGTH_BATCH / r["length"][-1], "contexts/CPU-s", MORE)
    add("compile and first call", lambda r: r["start"], "CPU-s", NEITHER)
    add("fixed cost of a later call", lambda r: r["call"], "CPU-s", NEITHER)
    goal = f"to within 1 % of the optimal loss, d={d}, N={n}, batch {batch}"
    add(goal, lambda r: r["optimum"]["seconds"], "CPU-s", LESS)
    add(goal, lambda r: r["optimum"]["seconds"], "CPU-s", LESS, strong, strong_name)
    add(goal, lambda r: r["optimum"]["steps"], "steps", NEITHER)
    span = f"{LENGTHS[0]}..{LENGTHS[-1]}"
    add(f"growth with N in {span}: exponent", lambda r: exponent(LENGTHS, r["length"]), "d log CPU-s / d log N", NEITHER)
    add(
        f"growth with N in {LENGTHS[-2]}..{LENGTHS[-1]}: exponent",
        lambda r: exponent(LENGTHS[-2:], r["length"][-2:]),
        "d log CPU-s / d log N",
        NEITHER,
    )
    span = f"{DIMENSIONS[0]}..{DIMENSIONS[-1]}"
    add(f"growth with d in {span}: exponent", lambda r: exponent(DIMENSIONS, r["dimension"]), "d log CPU-s / d log d", NEITHER)
    span = f"{BATCHES[0]}..{BATCHES[-1]}"
    add(
        f"growth with tasks per step in {span}: exponent",
        lambda r: exponent(BATCHES, r["batch"]),
        "d log CPU-s / d log B",
        NEITHER,
    )
    add(f"peak memory, d={MEMORY[1]}, N={MEMORY[2]}, batch {MEMORY[0]}", lambda r: r["memory"], "MiB", LESS)
    return table


# ---------------------------------------------------------------------------------------------------------- processes, output


def _side(side: str) -> dict[str, Any]:
    return {**in_worker(MODULE, side, "time"), **in_worker(MODULE, side, "memory")}


def benchmark() -> list[Row]:
    """The rows of the table. Takes about four minutes."""
    installed = importlib.util.find_spec("torch") is not None
    peer, strong = (_side("torch"), _side("moments")) if installed else (None, None)
    return rows(_side("ours"), peer, strong)


if __name__ == "__main__":
    answer(lambda side, task: measure(side) if task == "time" else memory(side))
