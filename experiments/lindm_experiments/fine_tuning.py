"""What does fine-tuning a pretrained layer on new tasks gain, and what does it forget?

A linear attention layer starts at the optimum of old tasks and is trained on new ones with another second moment of w: supervised
fine-tuning in the setting of the theory. It is trained in three ways: all weights on new tasks, on mixtures with a share of old
tasks (replay) and on a single new task; the value row on symmetric tasks; the value row on tasks with a mean, with and without
labels in the prompt. Every seed draws its own simplex features (carried to one covariance) and its own two laws of tasks. The
stopping times of gradient flow are runs of one compiled program with different step sizes. Risks are measured on fresh prompts
and compared with exact functions of the fine-tuning time; policies are greedy on the states of the feature map.

    lindm run fine_tuning --preset quick
    lindm verify --only fine-tuning

Expected: the risks of the flow, on old and on new tasks; no action changed by the value weight; the optimum of the mixture for
every share of replay, and no layer below that frontier; with a single new task, early stopping better than training on; what
training on prompts without labels gains, old tasks lose.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.icl.attention import FullAttention
from lindm.icl.trainer import predict_many, train_many
from lindm.types import Prompt
from lindm_experiments.harness.config import check_at_least, check_counts, check_rising
from lindm_experiments.harness.figures import BLUE, EXACT, GRAY, GREEN, MEASURED, ORANGE, PURPLE, RED, SEED
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_theory import fine_tuning as theory
from lindm_theory import gradient_flow as flow
from lindm_theory.in_context import context_second_moment, optimal_weights
from lindm_theory.moments import design_fourth

STATES, ACTIONS = 8, 3
KAPPA = 3.0  # condition number of the covariance of the features
SHARES = (0.1, 0.3, 0.6)  # of old tasks in the training mixtures
POOL = 1024  # tasks of each law; their second moments are exact
END = 8.0  # longest time of the flow
STOP, LATE = 0.5, 4.0  # where training on few tasks is stopped early, and late
LONG = 4 * END  # time of the value row on tasks with a mean: its flow is linear and needs no small step
FLOW_STEPS = 800  # Runge-Kutta steps up to END
GRID = np.arange(2, FLOW_STEPS + 1, 2)  # points of the exact paths that are tried against the frontier
FRONTIER = np.linspace(0, 1, 41)  # shares of old tasks
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
    few: int = 1  # new tasks of the small sets, each with both signs
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run trains on; arrays of one run, `train_many` adds the leading axis of the runs."""

    phi: Any  # [S*A, d], uniform design
    columns: Any  # [d, d] query columns
    old: Any  # [POOL, d]
    new: Any  # [POOL, d]
    share: Any  # of old tasks
    count: Any  # of new tasks, the first of `new`
    rate: Any  # length of a step
    labeled: Any  # 1, or 0 for prompts without labels
    sigma: Any
    pairs: Any  # [N] and
    tasks: Any  # [batch]: only their sizes matter


def draw(key: Array, t: Training) -> tuple[Prompt, Array]:
    """Fresh prompts of tasks of the mixture, every query weighed."""
    batch, N = len(t.tasks), len(t.pairs)
    u = jax.random.uniform(key, (batch * (2 * N + 2),), jnp.float32).reshape(batch, 2 * N + 2)
    pair, label, which, task = u[:, :N], u[:, N : 2 * N], u[:, -2], u[:, -1]
    new = t.new[(task * t.count).astype(int)]
    w = jnp.where((which < t.share)[:, None], t.old[(task * len(t.old)).astype(int)], new)
    x = t.phi[(pair * len(t.phi)).astype(int)]
    noise = jax.lax.erf_inv((2 * label - 1) * jnp.float32(1 - 2.0**-22)) * jnp.float32(2**0.5)
    y = t.labeled * (jnp.einsum("pnd,pd->pn", x, w) + t.sigma * noise)
    query = jnp.sqrt(t.rate) * t.columns
    return Prompt(x=x, y=y, query=jnp.broadcast_to(query, (batch, *query.shape))), w @ query.T


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One seed: features and two laws of tasks; index 0 old, 1 new."""

    phi: np.ndarray  # [S*A, d]
    pools: np.ndarray  # [2, POOL, d], symmetric
    small: np.ndarray  # [sets, POOL, d]: the first 2 `few` are a small set of new tasks, with both signs
    mean: np.ndarray  # [d], added to new tasks where they have a mean
    Lambda: np.ndarray  # [d, d], of contexts and queries


def draw_problem(cfg: Config, rng: np.random.Generator) -> Problem:
    d, n = cfg.d, STATES * ACTIONS
    spectrum = np.geomspace(KAPPA, 1.0, d)
    root = np.diag(np.sqrt(spectrum * d / spectrum.sum()))
    phi = rng.exponential(size=(n, d)) ** 1.5
    phi /= phi.sum(1, keepdims=True)
    phi = np.linalg.solve(np.linalg.cholesky(phi.T @ phi / n), phi.T).T @ root
    pools = []
    for spectrum in (np.geomspace(2.0, 0.2, d), np.geomspace(0.2, 2.0, d)):  # what is rare in old tasks is common in new ones
        basis = np.linalg.qr(np.eye(d) + 0.3 * rng.normal(size=(d, d)))[0]
        half = rng.normal(size=(POOL // 2, d))
        half /= np.linalg.norm(half, axis=1, keepdims=True)  # bounded tasks: one step size serves all
        w = np.concatenate([half, -half])  # symmetric: no drift of the blocks v and z
        w = np.linalg.solve(np.linalg.cholesky(w.T @ w / POOL), w.T).T @ (basis * np.sqrt(spectrum)).T
        pools.append(w[rng.permutation(POOL)])
    few = pools[1][rng.integers(0, POOL, (cfg.sets, cfg.few))]
    small = np.tile(np.concatenate([few, -few], axis=1), (1, POOL // (2 * cfg.few) + 1, 1))[:, :POOL]
    return Problem(phi=phi, pools=np.array(pools), small=small, mean=0.6 * rng.normal(size=d), Lambda=root @ root.T)


def laws(cfg: Config, problem: Problem) -> np.ndarray:
    """Psi [2 + mixtures + sets, d, d] of old tasks, new tasks, the mixtures of SHARES and the small sets."""
    old, new = np.einsum("ltd,lte->lde", problem.pools, problem.pools) / POOL
    mixtures = [p * old + (1 - p) * new for p in SHARES]
    sets = [w[: cfg.few].T @ w[: cfg.few] / cfg.few for w in problem.small]  # the sign does not matter
    return np.array([old, new, *mixtures, *sets])


@jax.jit
def predictions(phi: Array, Psi: Array, mean: Array, N: Array, sigma: Array) -> dict[str, Any]:
    """All exact numbers of a seed. Psi as in `laws`; of every law B, A_N and the flow of all weights from A_N(Psi_0)."""
    design = jnp.full(len(phi), 1 / len(phi))
    fourth = partial(design_fourth, phi, design)
    Lambda = phi.T @ phi / len(phi)
    noise = sigma**2 * Lambda
    B = jax.vmap(lambda P: context_second_moment(Lambda, P, fourth(P), N, noise))(Psi)
    A = jax.vmap(lambda P: optimal_weights(Lambda, P, fourth(P), N, noise))(Psi)
    U, u = flow.limit(A[0])

    def path(B: Array, P: Array) -> Array:
        path_U, path_u = flow.integrate(U, u, B, Lambda @ P, Lambda, step=END / FLOW_STEPS, steps=FLOW_STEPS)
        return path_u[:, None, None] * jnp.swapaxes(path_U, -1, -2)

    old, new = ((B[i], Lambda @ Psi[i]) for i in (0, 1))
    times = GRID * END / FLOW_STEPS
    moved = Psi[1] + jnp.outer(mean, mean)
    arguments = (U, Lambda, moved, mean, fourth, N, Lambda, noise)
    row = theory.value_row_limit(*arguments)
    v, cost = theory.zero_shot_path(U, Lambda, mean, fourth, N, Lambda, jnp.array([LONG]))
    zero = jnp.zeros(())
    none = theory.ValueRow(jnp.zeros_like(v[0]), zero)
    moved_B = context_second_moment(Lambda, moved, fourth(moved), N, noise)
    scaled = theory.value_limit(A[0], moved_B, Lambda @ moved, Lambda)
    return {
        "Lambda": Lambda,
        "B": B,
        "A": A,
        "least": jax.vmap(lambda A, P: jnp.trace(Lambda @ (P - A @ Lambda @ P)))(A, Psi),
        "flow": jax.vmap(path)(B[1:], Psi[1:]),  # [laws but the old, FLOW_STEPS + 1, d, d]
        "reduced": theory.reduced_path(A[0], *new, Lambda, jnp.asarray(times)),
        "scale": theory.value_path(A[0], *new, Lambda, jnp.asarray(np.append(times, [STOP, END]))),
        "frontier": jax.vmap(lambda p: theory.replay_weights(p, *old, *new))(jnp.asarray(FRONTIER)),
        "row": theory.value_row_risk(row, *arguments),
        "scaled": theory.value_row_risk(replace(none, u=scaled * u), *arguments),
        "gain": theory.value_row_risk(none, *arguments) - theory.value_row_risk(theory.ValueRow(v[0], zero), *arguments),
        "cost": cost[0],
    }


def risk(exact: dict[str, Any], A: np.ndarray, law: int) -> np.ndarray:
    """Exact F of weights A [..., d, d] at the training length: the least one and the optimization error."""
    off = A - exact["A"][law]
    return exact["least"][law] + np.einsum("ij,...jk,kl,...il->...", exact["Lambda"], off, exact["B"][law], off)


def full_layer(A: np.ndarray) -> FullAttention:
    """The balanced full layer with (u U)' = A and v = z = 0, in single precision."""
    u = np.sqrt(np.linalg.norm(A))
    layer = FullAttention(len(A))
    layer.W_KQ[...] = jnp.asarray(np.pad(A.T / u, (0, 1))[None], jnp.float32)
    layer.W_PV[...] = jnp.asarray(u * np.diag(np.eye(len(A) + 1)[-1])[None], jnp.float32)
    return layer


def training(cfg: Config, problem: Problem, **columns: Any) -> Training:
    """The data of several runs, one leading axis; a column that is not given has its default."""
    number = len(next(iter(columns.values())))
    defaults = {"share": 0.0, "count": float(POOL), "rate": 1.0, "labeled": 1.0, "sigma": cfg.sigma}
    shared = {
        "phi": problem.phi,
        "columns": np.sqrt(cfg.d) * np.linalg.cholesky(problem.Lambda).T,
        "old": problem.pools[0],
        "new": problem.pools[1],
        "pairs": np.zeros(cfg.N),
        "tasks": np.zeros(cfg.batch),
    }
    arrays = {name: np.broadcast_to(value, (number, *np.shape(value))) for name, value in (defaults | shared).items()}
    arrays |= {name: np.asarray(value) for name, value in columns.items()}
    return Training(**{name: np.asarray(value, np.float32) for name, value in arrays.items()})


@jax.jit
def measured_risks(key: Array, data: Training, layers: nnx.Module, law: Array) -> Array:
    """Mean squared error of R trained layers on the same fresh prompts of old (0) or new (1) tasks.  -> [R]."""
    one = replace(jax.tree.map(lambda a: a[0], data), share=1.0 - law, tasks=data.tasks)
    prompts, target = draw(key, one)
    number = jax.tree.leaves(nnx.state(layers, nnx.Param))[0].shape[0]
    repeated = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (number, *a.shape)), prompts)
    return jnp.mean((predict_many(layers, repeated) - target[None]) ** 2, axis=(1, 2))


def risks_of(cfg: Config, problem: Problem, key: Array, layers: nnx.Module, **columns: Any) -> list[list[float]]:
    """`measured_risks` of both laws."""
    data = replace(training(cfg, problem, **({"labeled": [1.0]} | columns)), tasks=np.zeros(cfg.prompts, np.float32))
    keys = jax.random.split(key)
    return [np.asarray(measured_risks(keys[law], data, layers, np.float32(law)), float).tolist() for law in (0, 1)]


def train_all(cfg: Config, problem: Problem, key: Array, start: FullAttention, exact: dict) -> dict:
    """All weights: stopping times on new tasks, mixtures to the end, few tasks stopped early and late."""
    times, shares, sets = len(cfg.times), len(SHARES), cfg.sets
    stops = np.concatenate([cfg.times, np.full(shares, END), np.tile([STOP, LATE], sets)])
    law = np.concatenate([np.zeros(times), np.arange(shares) + 1, np.repeat(np.arange(sets) + 1 + shares, 2)]).astype(int)
    small = np.repeat(problem.small, 2, axis=0)
    data = training(
        cfg,
        problem,
        rate=stops / cfg.steps,
        share=np.concatenate([np.zeros(times), SHARES, np.zeros(2 * sets)]),
        count=np.where(law > shares, 2 * cfg.few, POOL),
        new=np.concatenate([np.repeat(problem.pools[1][None], times + shares, axis=0), small]),
    )
    k_train, k_test = jax.random.split(key)
    keys = jax.random.split(k_train, len(stops))
    layers, _ = train_many(start, draw, keys, steps=cfg.steps, data=(data,), average=0.0, optimizer=SGD)
    A = exact["flow"][law, np.round(stops / END * FLOW_STEPS).astype(int)]
    measured = np.array(risks_of(cfg, problem, k_test, layers))
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
        cfg,
        problem,
        rate=np.array([LONG, LONG, STOP, END, 0.0]) / cfg.steps,
        labeled=np.array([0.0, 1.0, 1.0, 1.0, 1.0]),
        new=np.stack([moved, moved, *[problem.pools[1]] * 3]),
    )
    k_train, k_test, k_mean = jax.random.split(key, 3)
    layers, _ = train_many(
        start, draw, jax.random.split(k_train, 5), steps=cfg.steps, data=(data,), average=0.0, optimizer=VALUE_ROW
    )
    measured = np.array(risks_of(cfg, problem, k_test, layers))
    with_mean = np.array(risks_of(cfg, problem, k_mean, layers, new=moved[None])[1])
    without_labels = np.array(risks_of(cfg, problem, k_mean, layers, new=moved[None], labeled=[0.0])[1])
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


@jax.jit
def predicted(W_KQ: Array, W_PV: Array, phi: Array, x: Array, y: Array) -> Array:
    """The full layer with these weights [1, d+1, d+1] at all features, on prompts x [P, N, d], y [P, N].  -> [P, S*A]."""
    layer = FullAttention(phi.shape[-1], dtype=phi.dtype)
    layer.W_KQ[...], layer.W_PV[...] = W_KQ, W_PV
    return jax.vmap(lambda x, y: layer(Prompt(x=x, y=y, query=phi)))(x, y)


def policies(
    cfg: Config,
    problem: Problem,
    rng: np.random.Generator,
    before: np.ndarray,
    after: np.ndarray,
    start: FullAttention,
    value: FullAttention,
) -> dict:
    """Loss of greedy policies over the states of the feature map, and the actions that training changed.

    `value`: the runs of `train_value`. For the value weight alone the trained layer predicts with its block v set back to zero.
    """
    out: dict[str, Any] = {"decisions": STATES * cfg.prompts}
    phi = problem.phi.reshape(STATES, ACTIONS, -1)
    U, v, u = (np.asarray(a, float)[3, 0] for a in (value.U, value.v, value.u))
    old_layer = [np.asarray(a[...], float) for a in (start.W_KQ, start.W_PV)]
    trained = [np.array(a[...], float)[3] for a in (value.W_KQ, value.W_PV)]
    trained[1][:, -1, :-1] = 0.0
    for law, name in enumerate(("old", "new")):
        w = problem.pools[law][rng.integers(0, POOL, cfg.prompts)]
        x = problem.phi[rng.integers(0, len(problem.phi), (cfg.prompts, cfg.N))]
        y = np.einsum("pnd,pd->pn", x, w) + cfg.sigma * rng.normal(size=x.shape[:2])
        S = np.einsum("pn,pnd->pd", y, x) / cfg.N
        row = np.einsum("pn,pnd->pd", x @ v + u * y, x) / cfg.N
        what = {"before": S @ before.T, "all": S @ after.T, "row": row @ U}
        Q = np.einsum("sad,pd->psa", phi, w)
        actions = {rule: np.einsum("sad,pd->psa", phi, each).argmax(-1) for rule, each in what.items()}
        for rule, weights in (("start", old_layer), ("weight", trained)):
            table = np.asarray(predicted(*weights, problem.phi, x, y))
            actions[rule] = table.reshape(-1, STATES, ACTIONS).argmax(-1)
        gap = {rule: Q.max(-1) - np.take_along_axis(Q, a[..., None], -1)[..., 0] for rule, a in actions.items()}
        out[name] = {
            "loss": {rule: float(gap[rule].mean()) for rule in ("before", "all", "row")},
            # the trained layer against the layer before training, both in double precision
            "weight_changes": int(np.sum(actions["weight"] != actions["start"])),
            "row_changes": int(np.sum(actions["row"] != actions["before"])),
            "all_changes": int(np.sum(actions["all"] != actions["before"])),
        }
    return out


def measure(cfg: Config, point: dict) -> dict:
    seed = cfg.base_seed + point["seed"]
    rng, (k_all, k_value) = np.random.default_rng(seed), jax.random.split(jax.random.key(seed))
    problem = draw_problem(cfg, rng)
    arguments = (problem.phi, laws(cfg, problem), problem.mean, np.float64(cfg.N), np.float64(cfg.sigma))
    exact = jax.tree.map(np.asarray, predictions(*arguments))
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
        "policy": policies(cfg, problem, rng, before, end, start, layer),
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
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14.4, 4.4))
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
    left.legend(fontsize=8)
    for law, color, label in ((0, PURPLE, "old tasks"), (1, BLUE, "new tasks")):
        path = np.array([r["paths"]["all weights"][law] for r in records])
        measured = np.array([r["all"]["measured"][law] for r in records])
        middle.plot(times, path.mean(0), color=color, label=label, **EXACT)
        middle.plot(records[0]["times"], measured.mean(0), color=color, **MEASURED)
    few = np.array([_few(r)[1] for r in records])
    middle.plot(
        times, np.mean([r["few"]["path"] for r in records], axis=0), color=RED, label="new tasks, trained on few", **EXACT
    )
    middle.plot([STOP, LATE], few.mean(0), color=RED, **MEASURED)
    middle.set(xscale="log", xlabel="fine-tuning time", ylabel="risk", title="All weights: flow (lines), layer (points)")
    middle.legend(fontsize=8)
    zero = [r["value"]["zero_shot"] for r in records]
    gain = np.array([z["gain"] for z in zero])
    right.plot(gain, [z["lost"] for z in zero], color=PURPLE, label="old tasks, mean zero", **MEASURED)
    style = MEASURED | {"marker": "s"}
    right.plot(gain, [z["lost_new"] for z in zero], color=BLUE, label="new tasks, the same layer with labels", **style)
    right.plot([0, gain.max()], [0, gain.max()], color=GRAY, label="lost = gained", **EXACT)
    right.set(
        xlabel="gain on prompts without labels",
        ylabel="in-context risk lost",
        title="Value row trained on prompts without labels",
    )
    right.legend(fontsize=8)
    return {"fine_tuning": figure}
