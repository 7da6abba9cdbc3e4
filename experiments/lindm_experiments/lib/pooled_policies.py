"""Policies that read one prompt in all stages: their losses, the rungs above them, and two instances with known losses."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import Array

from lindm.solvers.dp import occupancy, policy_value
from lindm.solvers.ties import greedy
from lindm.types import MDP
from lindm_experiments.lib import attained
from lindm_experiments.lib.pooled_prompts import POOL, A, D, H, S, Tasks, stacked, with_dependence
from lindm_theory import policy_bounds, pooled


@jax.jit
def play(mdps: MDP, Q: Array, Qhat: Array) -> dict[str, Array]:
    """Mean losses [T] of the greedy policies of Qhat [T, C, H, S, A], and the losses of the rules that could replace them."""

    def one(mdp: MDP, Q: Array, Qhat: Array) -> dict[str, Array]:
        chance = jnp.full(len(Qhat), 1 / len(Qhat))
        best = Q.max(-1)
        gap = best[..., None] - Q
        pi = jax.vmap(greedy)(Qhat)
        d = jax.vmap(lambda p: occupancy(mdp, p))(pi)

        def loss(pi: Array) -> Array:
            return mdp.rho @ (best[0] - policy_value(mdp, pi)[0])

        mean = pooled.mean_rule(chance, pi, A)
        return {
            "loss": jax.vmap(loss)(pi).mean(),
            "occupancy": loss(pooled.occupancy_rule(chance, d, pi, A)),
            "mean": loss(mean),
            "price": pooled.sharing_price(mdp.P, gap, chance, d, pi),
            "price bound": pooled.sharing_bound(mdp.P, gap, mdp.rho, mean),
            "rule": mean,
        }

    return jax.lax.map(lambda at: one(*at), (mdps, Q, Qhat))


def play_readings(tasks: Tasks, phi: np.ndarray, what: np.ndarray) -> dict[str, np.ndarray]:
    """`play` of the readings what [T, C, H, d], estimates of w."""
    Qhat = np.einsum("sad,tchd->tchsa", phi, what, optimize=True)
    return {k: np.asarray(v) for k, v in play(tasks.mdp, tasks.Q, Qhat).items()}


def loss_of_sums(tasks: Tasks, phi: np.ndarray, B: np.ndarray, sums: np.ndarray, dependence: str) -> float:
    """Mean loss of the policies that B [H, d, Hd] gives on sums [T, C, Hd], the same for all stages but for the dependence."""
    each = np.broadcast_to(sums.reshape(*sums.shape[:2], 1, H, D), (*sums.shape[:2], H, H, D))
    what = np.einsum("hdm,tchm->tchd", B, stacked(with_dependence(each, dependence)), optimize=True)
    return float(play_readings(tasks, phi, what)["loss"].mean())


@jax.jit
def _rungs(tasks: Tasks, phi: Array, B: Array, mean: Array, sums: Array) -> dict[str, Array]:
    """Loss and rungs 0 to 3 [T, C] of the policies of sums [T, C, H, Hd]; mean [T, H, Hd] of the sums."""

    def one(task: Tasks, mean: Array, S: Array) -> dict[str, Array]:
        Qhat = jnp.einsum("sad,hdm,hm->hsa", phi, B, S)
        center = jnp.einsum("sad,hdm,hm->hsa", phi, B, mean)
        pi = greedy(Qhat)
        d = occupancy(task.mdp, pi)
        return {
            "truth": task.mdp.rho @ (task.Q[0].max(-1) - policy_value(task.mdp, pi)[0]),
            "0": policy_bounds.loss_identity(d, task.Q, pi),
            "1": policy_bounds.span_rung(d, task.Q, Qhat)[0],
            "2": policy_bounds.sup_rung(d, task.Q, Qhat),
            "3": policy_bounds.decomposed_rung(d, center - task.Q, Qhat - center),
        }

    return jax.vmap(lambda t, m, S: jax.vmap(lambda s: one(t, m, s))(S))(tasks, mean, sums)


def count_rungs(tasks: Tasks, phi: np.ndarray, B: np.ndarray, mean: np.ndarray, sums: np.ndarray) -> dict[str, float | int]:
    """Violations of rungs 0 to 3 and of mutants, the least and the median ratio to the truth; sums [T, C, H, Hd]."""
    values = {k: np.asarray(v).ravel() for k, v in _rungs(tasks, phi, B, mean, sums).items()}
    truth, tolerance = values["truth"], 1e-9
    lossy = truth > 1e-6
    counts = {
        "n": truth.size,
        "identity": int((np.abs(truth - values["0"]) > tolerance).sum()),
        **{f"rung {r}": int((truth > values[r] + tolerance).sum()) for r in "123"},
        "mutant, rung 2 without its factor 2": int((truth > values["2"] / 2 + tolerance).sum()),
        "mutant, rung 1 halved": int((truth > values["1"] / 2 + tolerance).sum()),
    }
    ratios = {r: values[r][lossy] / truth[lossy] for r in "123"} if lossy.any() else {}
    return (
        counts
        | {f"least {r}": float(v.min()) for r, v in ratios.items()}
        | {f"median {r}": float(np.median(v)) for r, v in ratios.items()}
    )


@jax.jit
def caps_of(phi: Array, B: Array, mean: Array, covariance: Array) -> Array:
    """Cantelli's caps [T, H, S, A] from mean and covariance of the sums."""
    return jax.vmap(lambda m, C: pooled.reader_caps(phi, B, m, C))(mean, covariance)


_shared_rung = jax.jit(pooled.shared_context_rung)
_reach = jax.jit(pooled.reach)
_sharing_bound = jax.jit(pooled.sharing_bound)
_occupancy_rule = jax.jit(pooled.occupancy_rule, static_argnums=3)


def multipliers(P: np.ndarray, gap: np.ndarray, rho: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """The dual of max <gap, mu> over the occupancies mu <= limit, [H, S, A]: the best multipliers of the shared-context rung."""
    stages, states = gap.shape[:2]
    index = np.arange(gap.size).reshape(gap.shape)
    flow, right = np.zeros((stages * states, gap.size)), np.zeros(stages * states)
    right[:states] = rho
    for h in range(stages):
        for s in range(states):
            flow[h * states + s, index[h, s]] = 1
        if h:
            flow[h * states : (h + 1) * states, index[h - 1].ravel()] -= P[h - 1].reshape(-1, states).T
    out = scipy.optimize.linprog(
        -gap.ravel(), A_eq=flow, b_eq=right, bounds=np.stack([np.zeros(gap.size), limit.ravel()], 1), method="highs-ds"
    )
    # without a solution, the multipliers of the union bound are valid as well
    return np.maximum(-out.upper.marginals, 0).reshape(gap.shape) if out.status == 0 else gap


def shared_rung(P: np.ndarray, gap: np.ndarray, rho: np.ndarray, caps: np.ndarray) -> float:
    """`pooled.shared_context_rung` at its best multipliers."""
    limit = np.asarray(_reach(P, rho))[..., None] * np.minimum(caps, 1)
    return float(_shared_rung(P, gap, rho, caps, multipliers(P, gap, rho, limit)))


def shared_rungs(tasks: Tasks, caps: np.ndarray, rule: np.ndarray, number: int) -> list[list[float]]:
    """`shared_rung` of the first tasks with the caps [T, H, S, A] and with the exact chances `rule` of the actions."""
    gaps = tasks.Q.max(-1, keepdims=True) - tasks.Q
    each = zip(*(x[:number] for x in (tasks.mdp.P, gaps, tasks.mdp.rho, caps, rule)), strict=True)
    return [[shared_rung(P, gap, rho, c) for c in (cap, rule)] for P, gap, rho, cap, rule in each]


def copied(rng: np.random.Generator, p: tuple[float, ...], gap: float, last: int) -> dict[str, float]:
    """A policy that copies the one trajectory of its prompt: all prompts, exactly, in random coordinates.

    Action 1 stays in state 0, where it loses `gap` at stage `last`; all else leads to state 1. At stage h the behavior takes
    action 1 with chance p[h], otherwise action 0. The layers are the identity in one-hot coordinates.
    Returns: mean loss, losses of the mean policy and of the policy weighted by occupancy, shared-context rung with the exact
    chances, price of sharing and its bound.
    """
    P = np.zeros((H, S, A, S))
    P[..., 1] = 1
    P[:, 0, 1] = np.eye(S)[0]
    r = np.full((H, S, A), 1.5)
    r[last, 0, 1] -= gap
    rho = np.eye(S)[0]
    mdp = MDP(P=P, r=r, rho=rho)
    Q = attained.optimal_values(P, r)
    gaps = Q.max(-1, keepdims=True) - Q
    T = rng.normal(size=(S * A, S * A)) + 5 * np.eye(S * A)
    phi = T.T  # row s * A + a: the one-hot vector in other coordinates
    layer = np.linalg.inv(T @ T.T)
    chance, values = [], []
    visits = np.zeros((2**H, H, S))
    for prompt, actions in enumerate(np.ndindex(*(2,) * H)):
        s, weight, Qhat = 0, 1.0, []
        for h, a in enumerate(actions):
            visits[prompt, h, s] = 1
            weight *= p[h] if a else 1 - p[h]
            pair = phi[s * A + a]
            Qhat.append(phi @ layer @ (pair * Q[h, s, a]))  # the prompt of stage h is this one pair
            s = 0 if (s, a) == (0, 1) else 1
        chance.append(weight)
        values.append(np.round(Qhat, 9))  # unseen pairs have the value zero, up to the change of coordinates
    pi, chance = np.array(greedy(np.reshape(values, (-1, H, S, A)))), np.array(chance)
    rule = np.einsum("n,nhsa->hsa", chance, np.eye(A)[pi])

    def loss(pi: np.ndarray) -> float:
        return float(rho @ (Q[0].max(-1) - np.asarray(policy_value(mdp, pi))[0]))

    truth, mean = float(chance @ [loss(np.eye(A)[x]) for x in pi]), loss(rule)
    return {
        "truth": truth,
        "mean": mean,
        "occupancy": loss(np.asarray(_occupancy_rule(chance, visits, pi, A))),
        "rung": shared_rung(P, gaps, rho, rule),
        "price": truth - mean,
        "price bound": float(_sharing_bound(P, gaps, rho, rule)),
    }


def tabular(
    rng: np.random.Generator, *, N: int, K: tuple[int, ...], epsilon: float, tasks: int, contexts: int
) -> list[dict[str, float]]:
    """Losses on tabular MDPs with rewards in [0, 1], one layer a stage and oracle labels: a cell for each K.

    Kernels are concentrated on few states, so that policies differ in where they go. For one-hot features and a pair (s, a) of
    probability p the sums of N pairs have E[S S'] = (1 - 1/N) E[m m'] + diag E[p Q^2] / N, m = p Q.
    """

    def draw(number: int) -> tuple[MDP, np.ndarray, np.ndarray, np.ndarray]:
        P = rng.exponential(size=(number, H, S, A, S)) ** 4
        P /= P.sum(-1, keepdims=True)
        r = rng.uniform(size=(number, H, S, A))
        Q, V = np.zeros_like(r), np.zeros((number, S))
        for h in reversed(range(H)):
            Q[:, h] = r[:, h] + np.einsum("tsaz,tz->tsa", P[:, h], V)
            V = Q[:, h].max(-1)
        behavior = (1 - epsilon) * np.eye(A)[Q.argmax(-1)] + epsilon / A
        p = np.zeros_like(r)
        state = np.full((number, S), 1 / S)
        for h in range(H):
            p[:, h] = state[..., None] * behavior[:, h]
            state = np.einsum("tsa,tsaz->tz", p[:, h], P[:, h])
        return MDP(P=P, r=r, rho=np.full((number, S), 1 / S)), Q, behavior, p

    mdps, Q, behavior, p = draw(POOL)
    Q, p = Q.reshape(POOL, H, -1), p.reshape(POOL, H, -1)
    m = p * Q
    ESS = (1 - 1 / N) * np.einsum("thi,thj->hij", m, m) + np.einsum("thi,ij->hij", p * Q**2, np.eye(S * A)) / N
    layers = np.linalg.solve(ESS, np.einsum("thi,thj->hij", m, Q)).swapaxes(1, 2)
    mdps, Q, behavior, _ = draw(tasks)
    which = np.arange(tasks)[:, None]
    s = rng.integers(S, size=(tasks, contexts * K[-1]))
    sums = np.zeros((len(K), tasks, contexts, H, S * A))

    def sample(chance: np.ndarray) -> np.ndarray:
        last = chance.shape[-1] - 1
        return np.minimum((chance.cumsum(-1) < rng.uniform(size=(*chance.shape[:-1], 1))).sum(-1), last)

    for h in range(H):
        a = sample(behavior[which, h, s])
        pairs = np.eye(S * A)[(s * A + a).reshape(tasks, contexts, -1)]
        for k, length in enumerate(K):
            sums[k, :, :, h] = pairs[:, :, :length].mean(2) * Q[:, h].reshape(tasks, 1, -1)
        s = sample(mdps.P[which, h, s, a])
    values = np.einsum("hij,ktchj->ktchi", layers, sums, optimize=True).reshape(*sums.shape[:-1], S, A)
    out = [play(mdps, Q, x) for x in values]
    shown = "loss", "mean", "price"
    return [{"K": length} | {x: float(o[x].mean()) for x in shown} for length, o in zip(K, out, strict=True)]
