"""Fine-tuning of a linear attention layer: features and laws of tasks, what a run trains on, exact risks, policies."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lindm.icl.attention import FullAttention
from lindm.icl.trainer import predict_many
from lindm.types import Prompt
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
    """One seed: features, two laws of tasks (index 0 old, 1 new) and the prompts of N pairs with label noise sigma."""

    phi: np.ndarray  # [S*A, d]
    pools: np.ndarray  # [2, POOL, d], symmetric
    small: np.ndarray  # [sets, POOL, d]: the first 2 `few` are a small set of new tasks, with both signs
    mean: np.ndarray  # [d], added to new tasks where they have a mean
    Lambda: np.ndarray  # [d, d], of contexts and queries
    few: int
    N: int
    sigma: float


def draw_problem(rng: np.random.Generator, *, d: int, few: int, sets: int, N: int, sigma: float) -> Problem:
    n = STATES * ACTIONS
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
    chosen = pools[1][rng.integers(0, POOL, (sets, few))]
    small = np.tile(np.concatenate([chosen, -chosen], axis=1), (1, POOL // (2 * few) + 1, 1))[:, :POOL]
    return Problem(
        phi=phi,
        pools=np.array(pools),
        small=small,
        mean=0.6 * rng.normal(size=d),
        Lambda=root @ root.T,
        few=few,
        N=N,
        sigma=sigma,
    )


def laws(problem: Problem) -> np.ndarray:
    """Psi [2 + mixtures + sets, d, d] of old tasks, new tasks, the mixtures of SHARES and the small sets."""
    old, new = np.einsum("ltd,lte->lde", problem.pools, problem.pools) / POOL
    mixtures = [p * old + (1 - p) * new for p in SHARES]
    sets = [w[: problem.few].T @ w[: problem.few] / problem.few for w in problem.small]  # the sign does not matter
    return np.array([old, new, *mixtures, *sets])


def predictions(problem: Problem) -> dict[str, Any]:
    """All exact numbers of a seed: of every law of `laws` B, A_N, its least risk and the flow of all weights from A_N(Psi_0)."""
    numbers = _predictions(problem.phi, laws(problem), problem.mean, np.float64(problem.N), np.float64(problem.sigma))
    return jax.tree.map(np.asarray, numbers)


@jax.jit
def _predictions(phi: Array, Psi: Array, mean: Array, N: Array, sigma: Array) -> dict[str, Any]:
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


def training(problem: Problem, batch: int, **columns: Any) -> Training:
    """The data of several runs, one leading axis; a column that is not given has its default."""
    number = len(next(iter(columns.values())))
    defaults = {"share": 0.0, "count": float(POOL), "rate": 1.0, "labeled": 1.0, "sigma": problem.sigma}
    shared = {
        "phi": problem.phi,
        "columns": np.sqrt(len(problem.Lambda)) * np.linalg.cholesky(problem.Lambda).T,
        "old": problem.pools[0],
        "new": problem.pools[1],
        "pairs": np.zeros(problem.N),
        "tasks": np.zeros(batch),
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


def risks_of(problem: Problem, prompts: int, key: Array, layers: nnx.Module, **columns: Any) -> list[list[float]]:
    """`measured_risks` of both laws, on so many prompts each."""
    data = training(problem, prompts, **({"labeled": [1.0]} | columns))
    data = replace(data, tasks=data.tasks[0])
    keys = jax.random.split(key)
    return [np.asarray(measured_risks(keys[law], data, layers, np.float32(law)), float).tolist() for law in (0, 1)]


@jax.jit
def predicted(W_KQ: Array, W_PV: Array, phi: Array, x: Array, y: Array) -> Array:
    """The full layer with these weights [1, d+1, d+1] at all features, on prompts x [P, N, d], y [P, N].  -> [P, S*A]."""
    layer = FullAttention(phi.shape[-1], dtype=phi.dtype)
    layer.W_KQ[...], layer.W_PV[...] = W_KQ, W_PV
    return jax.vmap(lambda x, y: layer(Prompt(x=x, y=y, query=phi)))(x, y)


def policies(
    problem: Problem,
    prompts: int,
    rng: np.random.Generator,
    before: np.ndarray,
    after: np.ndarray,
    start: FullAttention,
    value: FullAttention,
) -> dict:
    """Loss of greedy policies over the states of the feature map, and the actions that training changed.

    `value`: the runs of `train_value`. For the value weight alone the trained layer predicts with its block v set back to zero.
    """
    out: dict[str, Any] = {"decisions": STATES * prompts}
    phi = problem.phi.reshape(STATES, ACTIONS, -1)
    U, v, u = (np.asarray(a, float)[3, 0] for a in (value.U, value.v, value.u))
    old_layer = [np.asarray(a[...], float) for a in (start.W_KQ, start.W_PV)]
    trained = [np.array(a[...], float)[3] for a in (value.W_KQ, value.W_PV)]
    trained[1][:, -1, :-1] = 0.0
    for law, name in enumerate(("old", "new")):
        w = problem.pools[law][rng.integers(0, POOL, prompts)]
        x = problem.phi[rng.integers(0, len(problem.phi), (prompts, problem.N))]
        y = np.einsum("pnd,pd->pn", x, w) + problem.sigma * rng.normal(size=x.shape[:2])
        S = np.einsum("pn,pnd->pd", y, x) / problem.N
        row = np.einsum("pn,pnd->pd", x @ v + u * y, x) / problem.N
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
