"""What does it change that one prompt of K trajectories serves all stages, instead of fresh independent pairs for each stage?

A prompt is K trajectories of H pairs from an epsilon-greedy behavior policy.
Labels: `oracle`, Q* of the pair; `rollout`, the return of a rollout of pi* after each pair; `return`, the return-to-go of the
trajectory itself.
Readers: `stage`, one layer a stage on the K pairs of its stage; `augmented`, features phi (x) e_h and all K H pairs; `blind`, one
layer for all stages on all pairs, blind to the stage of a pair; `relabeled`, all pairs, labeled for the stage that reads them.
Dependence, with the same layers: `pairs`, every pair from a trajectory of its own, fresh for every stage; `markov`, whole
trajectories, fresh for every stage; `shared`, one prompt for all stages. Theory: lindm_theory.pooled, notes/pooled.md.

    lindm run pooled --preset quick      about 12 s on 1 core
    lindm verify --only pooled

Expected: exact risks for every reader, law and dependence, in which a trajectory counts as one pair; a floor for the blind
reader; the mean over prompts is the loss of the policy weighted by occupancy, and not that of the mean policy.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.icl.label_laws import oracle_labels, return_labels, return_moments
from lindm.problems.linear_mdp import MDPFamily, second_moment, simplex_family, tabulate
from lindm.solvers.dp import occupancy, policy_value
from lindm.solvers.rollout import rollout
from lindm.solvers.ties import greedy
from lindm.types import MDP
from lindm_experiments.harness.config import check_counts, check_rising
from lindm_experiments.harness.figures import (
    BLUE,
    BOUND,
    EXACT,
    GRAY,
    GREEN,
    MARKERS,
    MEASURED,
    ORANGE,
    RED,
    plot_seeds,
    set_log_ticks,
)
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_experiments.lib import attained, linear_mdps
from lindm_theory import policy_bounds, pooled

S, A, D, H = 5, 3, 4, 3  # states, actions, features, stages
LAWS = ("oracle", "rollout", "return", "relabeled")
READERS = (
    ("stage", "oracle"),
    ("stage", "rollout"),
    ("stage", "return"),
    ("augmented", "oracle"),
    ("augmented", "return"),
    ("blind", "oracle"),
    ("blind", "return"),
    ("relabeled", "relabeled"),
)
DEPENDENCE = ("pairs", "markov", "shared")
POOL = 2048  # tasks of training; of 512 tasks the (H d)^2 numbers of the augmented reader learn the sample
PROGRAMS = 4  # tasks for which the linear program is solved
RUNG_PROMPTS = 32  # prompts of a task for which rungs 0 to 3 are computed


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 10
    base_seed: int = 2041000
    tasks: int = 64
    played: int = 16  # tasks whose policies are evaluated
    contexts: int = 64  # prompts for every task
    K: tuple[int, ...] = (2, 8, 32)  # trajectories in a prompt
    N: int = 8  # trajectories in a prompt of training
    epsilon: float = 0.5  # chance of a uniformly random action of the behavior policy

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "tasks", "played", "N")
        if self.played > self.tasks:
            raise ValueError(f"played must be at most tasks = {self.tasks}; got {self.played}")
        check_counts(self, "contexts", least=RUNG_PROMPTS)
        check_rising(self, "K", length=2)
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon must be above 0 and at most 1; got {self.epsilon}")


QUICK = Config()
FULL = Config(tasks=128, played=64, contexts=128, K=(2, 4, 8, 16, 32, 64))
SMOKE = Config(seeds=2, tasks=4, played=2, contexts=64, K=(2, 8))


_query_law = jax.jit(second_moment)
_without_cross_blocks = jax.jit(pooled.without_cross_blocks, static_argnums=1)


@jax.jit
def draw_family(key: Array) -> MDPFamily:
    return simplex_family(key, S, A, D, H, feature_power=2.0, low=-1.0, high=1.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Solved tasks with the exact moments of one trajectory, for every law of labels; leading axis: tasks."""

    mdp: MDP
    Q: Array  # [H, S, A]
    w: Array  # [H, d]
    best: Array  # [H, S] pi*
    behavior: Array  # [H, S, A]
    mean: Array  # [L, H, Hd] E[Z] of what each stage reads, laws in the order of LAWS
    covariance: Array  # [L, H, Hd, Hd]
    free: Array  # [Hd, Hd] Cov(Z) of return labels, were their noise independent


@partial(jax.jit, static_argnames="tasks")
def draw_tasks(key: Array, family: MDPFamily, epsilon: Array, tasks: int) -> Tasks:
    flat = linear_mdps.pairs_table(family)

    def one(k: Array) -> Tasks:
        task, plan, w = linear_mdps.draw_oracle(k, family)
        mdp = tabulate(task)
        best = greedy(plan.Q)
        behavior = (1 - epsilon) * jax.nn.one_hot(best, A) + epsilon / A
        start, kernels = pooled.pair_chain(mdp.P, mdp.rho, behavior)
        Q, r = plan.Q.reshape(H, -1), mdp.r.reshape(H, -1)
        value, square = pooled.return_values(kernels, r)
        # a prompt relabeled for stage h has the label <phi(z_i), w_h> at every i
        relabeled = jnp.broadcast_to((w @ flat.T)[:, None, :], (H, *Q.shape))
        labels = jnp.stack([Q, Q, value, *relabeled])
        none = jnp.zeros_like(Q)
        noise = jnp.stack([none, return_moments(mdp, best)[1].reshape(H, -1), square - value**2, *[none] * H])
        m, C = jax.vmap(lambda y, v: pooled.stack(*pooled.trajectory_moments(kernels, start, flat, y, v)))(labels, noise)
        m_return, C_return = pooled.stack(*pooled.return_trajectory_moments(kernels, start, flat, r))

        def laws(oracle: Array, rollouts: Array, returns: Array, relabeled: Array) -> Array:
            return jnp.stack([*(jnp.stack([x] * H) for x in (oracle, rollouts, returns)), relabeled])

        return Tasks(
            mdp=mdp,
            Q=plan.Q,
            w=w,
            best=best,
            behavior=behavior,
            mean=laws(m[0], m[1], m_return, m[3:]),
            covariance=laws(C[0], C[1], C_return, C[3:]),
            free=C[2],
        )

    return jax.vmap(one)(jax.random.split(key, tasks))


@partial(jax.jit, static_argnames=("contexts", "K"))
def _draw_sums(key: Array, family: MDPFamily, tasks: Tasks, contexts: int, K: tuple[int, ...]) -> tuple[Array, Array]:
    flat = linear_mdps.pairs_table(family)
    used = jnp.stack([(jnp.arange(K[-1]) < k) / k for k in K])

    def one(at: tuple[Tasks, Array]) -> tuple[Array, Array]:
        task, k = at
        k_pairs, k_labels = jax.random.split(k)
        episodes = rollout(k_pairs, task.mdp, task.behavior, contexts * K[-1])
        idx = episodes.s * A + episodes.a  # [n, H]
        stage = jnp.broadcast_to(jnp.arange(H, dtype=jnp.int32), idx.shape)
        x = flat[idx]
        labels = [
            oracle_labels(x.swapaxes(0, 1), task.w).T,
            return_labels(k_labels, task.mdp, task.best, stage, idx),
            jnp.cumsum(episodes.r[:, ::-1], axis=1)[:, ::-1],
        ]
        y = jnp.stack([*labels, *jnp.einsum("nid,hd->hni", x, task.w)])
        sums = (y[..., None] * x[None]).reshape(len(y), contexts, K[-1], H * D)
        sums = jnp.einsum("qk,yckm->yqcm", used, sums).reshape(len(y), len(K), contexts, H, D)
        return sums[:3], jnp.moveaxis(sums[3:], 0, 2)

    return jax.lax.map(one, (tasks, jax.random.split(key, len(tasks.w))))


def draw_sums(key: Array, family: MDPFamily, tasks: Tasks, contexts: int, K: tuple[int, ...]) -> np.ndarray:
    """Sums [T, L, len(K), C, H, H, d] of y x over the first K trajectories of each prompt: (reading stage, stage of the pair)."""
    own, relabeled = (np.asarray(x) for x in _draw_sums(key, family, tasks, contexts, K))
    own = np.broadcast_to(own[..., None, :, :], (*own.shape[:4], H, H, D))
    return np.concatenate([own, relabeled[:, None]], axis=1)


def with_dependence(sums: np.ndarray, dependence: str) -> np.ndarray:
    """sums [..., C, H, H, d] with the contexts (axis -4) of different stages, or of all pairs, taken from different prompts.

    Prompts are independent, so that a cyclic shift makes what is read together independent and keeps every marginal law.
    """
    if dependence == "shared":
        return sums
    out = np.empty_like(sums)
    for h in range(H):
        for i in range(H):
            shift = H * h + (i if dependence == "pairs" else 0)
            out[..., h, i, :] = np.roll(sums[..., h, i, :], shift, axis=-2)
    return out


def layers(pool: Tasks, N: int) -> np.ndarray:
    """B [len(READERS), H, d, Hd], the best of their kind on prompts of N trajectories of the tasks in `pool`."""
    mean, covariance, w = (np.asarray(x) for x in (pool.mean, pool.covariance, pool.w))
    ESS = (np.einsum("tlhm,tlhk->lhmk", mean, mean) + covariance.sum(0) / N) / len(w)
    ESw = np.einsum("tlhm,tgd->lhgmd", mean, w) / len(w)
    everything, mixed = jnp.eye(H * D), pooled.average(H, D)
    out = []
    for reader, law in READERS:
        i = LAWS.index(law)
        if reader == "blind":  # one matrix for every stage
            out.append([_best_reader(mixed, ESS[i, 0], ESw[i, 0].mean(0))] * H)
            continue
        T = {"stage": pooled.block, "augmented": lambda *_: everything, "relabeled": lambda *_: mixed}[reader]
        out.append([_best_reader(T(h, H, D), ESS[i, h], ESw[i, h, h]) for h in range(H)])
    return np.array(out)


_best_reader = jax.jit(pooled.best_reader)


@jax.jit
def exact_risk(B: Array, mean: Array, covariance: Array, w: Array, Lambda_q: Array) -> tuple[Array, Array]:
    """(estimation of one trajectory, bias) [T, H]; mean and covariance [T, H, ...] of one trajectory."""
    parts = jax.vmap(lambda m, C, w: pooled.reader_risk(B, m, C, w, Lambda_q))(mean, covariance, w)
    return parts.estimation, parts.bias


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


@jax.jit
def rungs(tasks: Tasks, phi: Array, B: Array, mean: Array, sums: Array) -> dict[str, Array]:
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
            "error": jnp.sum(jnp.abs(Qhat - task.Q).max((-1, -2))),
        }

    return jax.vmap(lambda t, m, S: jax.vmap(lambda s: one(t, m, s))(S))(tasks, mean, sums)


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


def tabular(rng: np.random.Generator, cfg: Config) -> list[dict[str, float]]:
    """Losses on tabular MDPs with rewards in [0, 1], one layer a stage and oracle labels: a cell for each K.

    Kernels are concentrated on few states, so that policies differ in where they go. For one-hot features and a pair (s, a) of
    probability p the sums of N pairs have E[S S'] = (1 - 1/N) E[m m'] + diag E[p Q^2] / N, m = p Q.
    """

    def draw(tasks: int) -> tuple[MDP, np.ndarray, np.ndarray, np.ndarray]:
        P = rng.exponential(size=(tasks, H, S, A, S)) ** 4
        P /= P.sum(-1, keepdims=True)
        r = rng.uniform(size=(tasks, H, S, A))
        Q, V = np.zeros_like(r), np.zeros((tasks, S))
        for h in reversed(range(H)):
            Q[:, h] = r[:, h] + np.einsum("tsaz,tz->tsa", P[:, h], V)
            V = Q[:, h].max(-1)
        behavior = (1 - cfg.epsilon) * np.eye(A)[Q.argmax(-1)] + cfg.epsilon / A
        p = np.zeros_like(r)
        state = np.full((tasks, S), 1 / S)
        for h in range(H):
            p[:, h] = state[..., None] * behavior[:, h]
            state = np.einsum("tsa,tsaz->tz", p[:, h], P[:, h])
        return MDP(P=P, r=r, rho=np.full((tasks, S), 1 / S)), Q, behavior, p

    mdps, Q, behavior, p = draw(POOL)
    Q, p = Q.reshape(POOL, H, -1), p.reshape(POOL, H, -1)
    m = p * Q
    ESS = (1 - 1 / cfg.N) * np.einsum("thi,thj->hij", m, m) + np.einsum("thi,ij->hij", p * Q**2, np.eye(S * A)) / cfg.N
    layers = np.linalg.solve(ESS, np.einsum("thi,thj->hij", m, Q)).swapaxes(1, 2)
    mdps, Q, behavior, _ = draw(cfg.played)
    task = np.arange(cfg.played)[:, None]
    s = rng.integers(S, size=(cfg.played, cfg.contexts * cfg.K[-1]))
    sums = np.zeros((len(cfg.K), cfg.played, cfg.contexts, H, S * A))

    def sample(chance: np.ndarray) -> np.ndarray:
        last = chance.shape[-1] - 1
        return np.minimum((chance.cumsum(-1) < rng.uniform(size=(*chance.shape[:-1], 1))).sum(-1), last)

    for h in range(H):
        a = sample(behavior[task, h, s])
        pairs = np.eye(S * A)[(s * A + a).reshape(cfg.played, cfg.contexts, -1)]
        for k, K in enumerate(cfg.K):
            sums[k, :, :, h] = pairs[:, :, :K].mean(2) * Q[:, h].reshape(cfg.played, 1, -1)
        s = sample(mdps.P[task, h, s, a])
    values = np.einsum("hij,ktchj->ktchi", layers, sums, optimize=True).reshape(*sums.shape[:-1], S, A)
    out = [play(mdps, Q, x) for x in values]
    return [{"K": K} | {x: float(o[x].mean()) for x in ("loss", "mean", "price")} for K, o in zip(cfg.K, out, strict=True)]


def measure(cfg: Config, point: dict) -> dict:
    seed = cfg.base_seed + point["seed"]
    rng = np.random.default_rng(seed)
    k_family, k_tasks, k_prompts = jax.random.split(jax.random.key(seed), 3)
    family = draw_family(k_family)
    Lambda_q = np.asarray(_query_law(family))
    both = draw_tasks(k_tasks, family, cfg.epsilon, POOL + cfg.tasks)
    both = jax.tree.map(np.asarray, both)
    pool, tasks = jax.tree.map(lambda x: x[:POOL], both), jax.tree.map(lambda x: x[POOL:], both)
    B = layers(pool, cfg.N)
    sums = draw_sums(k_prompts, family, tasks, cfg.contexts, cfg.K)
    phi, few = np.asarray(family.phi), jax.tree.map(lambda x: x[: cfg.played], tasks)
    gaps, scale = few.Q.max(-1, keepdims=True) - few.Q, np.abs(few.Q).max()
    apart = np.asarray(_without_cross_blocks(tasks.covariance, H))
    root = np.linalg.cholesky(Lambda_q)
    normal = rng.normal(size=(cfg.played, cfg.contexts, H * D))
    cells, program, ladder = [], [], []
    for n, (reader, law) in enumerate(READERS):
        i = LAWS.index(law)
        mean, whole = tasks.mean[:, i], tasks.covariance[:, i]
        center = np.einsum("hdm,thm->thd", B[n], mean)
        drawn = np.einsum("tmk,tck->tcm", _roots(whole[: cfg.played, 0]), normal)
        for dependence in DEPENDENCE:
            moved = _stacked(with_dependence(sums[:, i], dependence))
            what = np.einsum("hdm,tkchm->tkchd", B[n], moved, optimize=True)
            risk = np.square((what - tasks.w[:, None, None]) @ root).sum((-1, -2)).mean((0, 2))
            spread = np.square((what - center[:, None, None]) @ root).sum((-1, -2)).mean((0, 2))
            covariance = apart[:, i] if dependence == "pairs" else whole
            estimation, bias = (np.asarray(x).sum(1).mean() for x in exact_risk(B[n], mean, covariance, tasks.w, Lambda_q))
            for k, K in enumerate(cfg.K):
                cell = {
                    "reader": reader,
                    "law": law,
                    "dependence": dependence,
                    "K": K,
                    "risk": [float(risk[k]), float(estimation / K + bias)],
                    "estimation": [float(spread[k]), float(estimation / K)],
                }
                cells.append(cell)
                if dependence != "shared" and (cfg.K[-1] > K or law == "rollout"):
                    continue
                out = _play(few, phi, what[: cfg.played, k])
                cell |= {x: float(out[x].mean()) for x in ("loss", "mean", "price", "price bound")}
                cell["off"] = int((np.abs(out["loss"] - out["occupancy"]) > 1e-12 * scale).sum())
                cell["above"] = int((np.abs(out["price"]) > out["price bound"] + 1e-12 * scale).sum())
                if dependence != "pairs" and cfg.K[-1] == K and reader in ("stage", "augmented"):
                    limit = (mean[: cfg.played, None, 0] + drawn / K**0.5).reshape(cfg.played, cfg.contexts, 1, H, D)
                    limit = with_dependence(np.broadcast_to(limit, (cfg.played, cfg.contexts, H, H, D)), dependence)
                    out_normal = _play(few, phi, np.einsum("hdm,tchm->tchd", B[n], _stacked(limit), optimize=True))
                    cell["normal"] = float(out_normal["loss"].mean())
                if dependence != "shared" or reader != "stage":
                    continue
                if K in (cfg.K[0], cfg.K[-1]) and law != "rollout":
                    ladder.append(
                        {"K": K, "law": law}
                        | _count_rungs(rungs(few, phi, B[n], mean[: cfg.played], moved[: cfg.played, k, :RUNG_PROMPTS]))
                    )
                if law == "oracle":
                    caps = np.asarray(caps_of(phi, B[n], mean[: cfg.played], whole[: cfg.played] / K))
                    each = zip(*(x[:PROGRAMS] for x in (few.mdp.P, gaps, few.mdp.rho, caps, out["rule"])), strict=True)
                    bounds = [[shared_rung(P, gap, rho, c) for c in (cap, rule)] for P, gap, rho, cap, rule in each]
                    program.append({"K": K, "loss": out["loss"][:PROGRAMS].tolist(), "rung": bounds})
    i = LAWS.index("return")
    blind = B[READERS.index(("blind", "return"))]
    free = np.broadcast_to(tasks.free[:, None], tasks.covariance[:, i].shape)
    signal = pool.mean[:, LAWS.index("oracle"), 0].reshape(POOL, H, D).mean(1)
    floor, spread = pooled.blind_floor(
        signal.T @ signal / POOL,
        np.einsum("td,the->hde", signal, pool.w) / POOL,
        np.einsum("thd,tie->hide", pool.w, pool.w) / POOL,
        Lambda_q,
    )
    p, gap = rng.uniform(0.4, 0.8), rng.uniform(0.2, 1.0)
    copies = copied(rng, (p,) * H, gap, H - 1)
    # the state is kept just when the next action there is wrong: the price of sharing is its bound
    turned = copied(rng, (p, 1.0, 1.0), gap, 1)
    return {
        "N": cfg.N,
        "K": list(cfg.K),
        "played": cfg.played,
        "cells": cells,
        "program": program,
        "ladder": ladder,
        "independent_noise": float(np.asarray(exact_risk(blind, tasks.mean[:, i], free, tasks.w, Lambda_q)[0]).sum(1).mean()),
        "floor": [H * float(floor), H * float(spread)],
        "copied": {"p": p, "gap": gap, "predicted": float(pooled.copied_trajectory_loss(p, gap, H)[0])} | copies,
        "attained": {"shared rung": [copies["truth"], copies["rung"]], "price": [turned["price"], turned["price bound"]]},
        "tabular": tabular(rng, cfg),
    }


def _stacked(sums: np.ndarray) -> np.ndarray:
    """[..., H, H, d] -> [..., H, Hd]."""
    return sums.reshape(*sums.shape[:-2], H * D)


def _roots(C: np.ndarray) -> np.ndarray:
    """Square roots of the covariances C [T, m, m], which may be singular."""
    spectrum, basis = np.linalg.eigh(C)
    return basis * np.sqrt(np.maximum(spectrum, 0))[:, None, :]


def _play(tasks: Tasks, phi: np.ndarray, what: np.ndarray) -> dict[str, np.ndarray]:
    """`play` of the vectors what [T, C, H, d]."""
    Qhat = np.einsum("sad,tchd->tchsa", phi, what, optimize=True)
    return {k: np.asarray(v) for k, v in play(tasks.mdp, tasks.Q, Qhat).items()}


def _count_rungs(out: dict[str, Array]) -> dict[str, float | int]:
    """Violations of every rung and of its mutants, the least and the median ratio to the truth."""
    values = {k: np.asarray(v).ravel() for k, v in out.items()}
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


# --- verdicts ----------------------------------------------------------------------------------------------------------------


def _cells(records: list[dict], **chosen) -> list[list[dict]]:
    """The cells with these fields, each as a list over seeds."""
    groups = zip(*(r["cells"] for r in records), strict=True)
    return [list(g) for g in groups if all(g[0][k] in v if isinstance(v, tuple) else g[0][k] == v for k, v in chosen.items())]


def _ratios(groups: list[list[dict]], field: str) -> list[list[float]]:
    return [[c[field][0] / c[field][1] for c in g] for g in groups]


def _program_ratio(records: list[dict], which: int) -> list[float]:
    """Largest mean loss / mean rung over the lengths, one for each seed; which: 0 Cantelli's caps, 1 the exact chances."""
    return [max(np.mean(p["loss"]) / np.mean([b[which] for b in p["rung"]]) for p in r["program"]) for r in records]


def check(records: list[dict]) -> list[Verdict]:
    first, seeds = records[0], len(records)
    longest = first["K"][-1]
    every = _cells(records)
    played = [g for g in every if "off" in g[0]]
    noise_cell = _cells(records, reader="blind", law="return", dependence="shared", K=first["K"][0])[0]
    noise = [r["independent_noise"] / c["K"] / c["estimation"][0] for r, c in zip(records, noise_cell, strict=True)]
    blind = _cells(records, reader="blind", law="oracle", dependence="shared", K=longest)[0]
    stage = _cells(records, reader="stage", law="oracle", dependence="shared", K=longest)[0]
    floor = [c["risk"][0] / r["floor"][0] for c, r in zip(blind, records, strict=True)]
    above = np.mean([c["risk"][0] for c in blind]) / np.mean([c["risk"][0] for c in stage])
    gains = {}
    for law in ("oracle", "return"):
        pair = [_cells(records, reader=x, law=law, dependence="shared", K=_trained(first))[0] for x in ("augmented", "stage")]
        gains[law] = [a["risk"][0] / b["risk"][0] for a, b in zip(*pair, strict=True)]
    shared = _cells(records, dependence="shared", reader=("stage", "augmented", "relabeled"))
    blind_price = [np.mean([c["mean"] / c["loss"] for c in g]) for g in _cells(records, dependence="shared", reader="blind")]
    ladder = [x for r in records for x in r["ladder"]]
    policies = sum(x["n"] for x in ladder)
    broken = sum(x[k] for x in ladder for k in ("identity", "rung 1", "rung 2", "rung 3"))
    least = {k: min(x.get(f"least {k}", np.inf) for x in ladder) for k in "123"}
    median = {k: np.median([x[f"median {k}"] for x in ladder if f"median {k}" in x]) for k in "123"}
    copies = [r["copied"] for r in records]
    normal = [[c["normal"] / c["loss"] for c in g] for g in every if "normal" in g[0]]
    tabular_ratios = {g[0]["K"]: [c["mean"] / c["loss"] for c in g] for g in zip(*(r["tabular"] for r in records), strict=True)}
    bounds, exact = _program_ratio(records, 0), _program_ratio(records, 1)
    return [
        mean_verdict(
            "pooled",
            *_ratios(every, "risk"),
            *_ratios(every, "estimation"),
            figure="pooled",
            note=f"{len(every)} risks and as many estimation parts, worst shown",
        ),
        mean_verdict("pooled/independent-noise", noise, figure="pooled"),
        mean_verdict("pooled/blind-floor", floor, figure="pooled", note=f"{above:.2g} times the risk of one layer a stage"),
        mean_verdict(
            "pooled/augmented",
            gains["oracle"],
            figure="pooled",
            note=f"at K = N = {_trained(first)}; return labels {np.mean(gains['return']):.3f}",
        ),
        mean_verdict("pooled/normal", *normal, figure="policy", note=f"K = {longest}"),
        count_verdict(
            "pooled/rungs",
            min(policies, broken),
            policies,
            seeds=seeds,
            figure="policy",
            note="bound/truth, median and least: "
            + ", ".join(f"rung {k} {median[k]:.3g} and {least[k]:.3g}" for k in "123")
            + f"; rung 2 without its factor 2 fails {sum(x['mutant, rung 2 without its factor 2'] for x in ladder)} times",
            slack=[x[f"{which} {k}"] for x in ladder for k in "123" for which in ("least", "median") if f"least {k}" in x],
        ),
        count_verdict(
            "pooled/occupancy-policy",
            sum(c["off"] for g in played for c in g),
            len(played) * seeds * first["played"],
            seeds=seeds,
            figure="policy",
        ),
        mean_verdict(
            "pooled/mean-policy",
            [c["mean"] / c["truth"] for c in copies],
            figure="policy",
            note=f"weighted by occupancy: {np.mean([c['occupancy'] / c['truth'] for c in copies]):.6f}",
        ),
        mean_verdict(
            "pooled/price",
            *[[c["mean"] / c["loss"] for c in g] for g in shared],
            figure="policy",
            note=f"blind reader {min(blind_price):.3f} to {max(blind_price):.3f}",
        ),
        mean_verdict(
            "pooled/tabular",
            tabular_ratios[_trained(first)],
            figure="policy",
            note=", ".join(f"K = {K}: {np.mean(g):.3f}" for K, g in tabular_ratios.items()),
        ),
        count_verdict(
            "pooled/price-bound",
            sum(c["above"] for g in played for c in g),
            len(played) * seeds * first["played"],
            seeds=seeds,
            also=[attained.none_below(records, "price")],
            figure="policy",
            slack=[*attained.ratios(records, "price")[0], *(c["price bound"] / abs(c["price"]) for g in played for c in g)],
        ),
        mean_verdict(
            "pooled/shared-rung",
            bounds,
            exact,
            also=[attained.none_below(records, "shared rung")],
            figure="policy",
            note=f"bound/truth: {1 / np.mean(bounds):.3g} with Cantelli's caps, {1 / np.mean(exact):.3g} with the exact chances",
            slack=[1 / x for x in (*bounds, *exact)],
        ),
        mean_verdict(
            "pooled/attained",
            *attained.ratios(records, "shared rung", "price"),
            figure="policy",
            note=f"truth / rung 6 with the same chances: {np.mean([c['truth'] / c['mean'] for c in copies]):.3g}",
        ),
    ]


def _trained(record: dict) -> int:
    """The length at which the layers are compared: that of training if it was measured."""
    return record["N"] if record["N"] in record["K"] else record["K"][-1]


def plot(records: list[dict]) -> dict[str, Figure]:
    return {"pooled": _risks(records), "policy": _policies(records)}


def _risks(records: list[dict]) -> Figure:
    """Risk over K of every reader; estimation error against that of independent pairs."""
    K = records[0]["K"]
    figure, axes = pyplot.subplots(1, 3, figsize=(12.6, 4.0))
    shown = (("stage", BLUE, "o"), ("augmented", GREEN, "^"), ("blind", RED, "s"), ("relabeled", ORANGE, "D"))
    for axis, law in zip(axes, ("oracle", "return"), strict=False):
        for reader, color, marker in shown:
            cells = _cells(records, reader=reader, law="relabeled" if reader == "relabeled" else law, dependence="shared")
            if reader == "relabeled" and law == "return":
                continue
            values = np.array([[c["risk"] for c in g] for g in cells])  # [K, seeds, 2]
            axis.plot(K, values[..., 1].mean(1), color=color, label=reader, **EXACT)
            for seed in values[..., 0].T:
                axis.plot(K, seed, color=color, **MEASURED | {"marker": marker, "alpha": 0.35, "markersize": 3.5})
        axis.set(xlabel="trajectories in the prompt K", title=f"Labels: {law}", ylim=(0, None))
        set_log_ticks(axis, K)
    axes[0].axhline(np.mean([r["floor"][0] for r in records]), color=RED, linestyle=":", label="floor of the blind reader")
    axes[0].set_ylabel("risk of Qhat, sum over stages")
    axes[0].legend(fontsize=8)
    groups = [(reader, law) for reader, law in READERS if reader != "stage"]
    for place, (reader, law) in enumerate(groups):
        for dependence, color, marker in (("pairs", GRAY, "s"), ("shared", BLUE, "o")):
            cells = _cells(records, reader=reader, law=law, dependence=dependence, K=K[0])[0]
            base = _cells(records, reader=reader, law=law, dependence="pairs", K=K[0])[0]
            ratio = [c["estimation"][0] / b["estimation"][1] for c, b in zip(cells, base, strict=True)]
            exact = np.mean([c["estimation"][1] / b["estimation"][1] for c, b in zip(cells, base, strict=True)])
            label = {"pairs": "independent pairs", "shared": "trajectories"}[dependence] if place == 0 else ""
            axes[2].plot([place] * len(ratio), ratio, color=color, **MEASURED | {"marker": marker, "alpha": 0.5}, label=label)
            axes[2].plot([place - 0.3, place + 0.3], [exact] * 2, color=color, linewidth=1.6, marker="")
    names = [reader if reader == law else f"{reader}\n{law}" for reader, law in groups]
    axes[2].set_xticks(range(len(groups)), names, fontsize=8)
    axes[2].set(ylabel="estimation error / that of independent pairs", title=f"Dependence in the trajectory, K = {K[0]}")
    axes[2].legend(fontsize=8)
    return figure


def _policies(records: list[dict]) -> Figure:
    """Loss of one shared prompt, of the mean policy and the bounds; and the instance that separates them."""
    K = records[0]["K"]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12.6, 4.0))
    for place, (reader, law) in enumerate(READERS):
        cells = _cells(records, reader=reader, law=law, dependence="shared")
        curve = np.mean([[c["mean"] / c["loss"] for c in g] for g in cells], axis=1)
        label = "" if place else f"simplex features, {len(READERS)} readers and laws"
        left.plot(K, curve, color=ORANGE, marker=(*MARKERS, "*")[place], label=label, linewidth=1)
    ratio = np.array([[c["mean"] / c["loss"] for c in r["tabular"]] for r in records])
    plot_seeds(left, K, ratio, BLUE)
    left.plot(K, ratio.mean(0), color=BLUE, linestyle="--", label="tabular, one layer a stage", marker="")
    left.axhline(1.0, color=GRAY, linestyle=":", linewidth=1.0)
    left.set(xlabel="trajectories in the prompt K", ylabel="loss of the mean policy / mean loss", title="What sharing changes")
    set_log_ticks(left, K)
    left.legend(fontsize=8)
    left.set_ylim(0.98, 1 + 1.4 * (ratio.max() - 1))
    curves = {
        "mean loss, one shared prompt": (BLUE, EXACT | {"marker": "o"}, lambda p: np.mean(p["loss"])),
        "shared rung, exact chances": (GREEN, BOUND, lambda p: np.mean([b[1] for b in p["rung"]])),
        "shared rung, Cantelli's caps": (ORANGE, BOUND, lambda p: np.mean([b[0] for b in p["rung"]])),
    }
    for name, (color, style, value) in curves.items():
        middle.plot(K, np.mean([[value(p) for p in r["program"]] for r in records], 0), color=color, label=name, **style)
    middle.set(
        yscale="log", xlabel="trajectories in the prompt K", ylabel="suboptimality", title="One layer a stage, oracle labels"
    )
    set_log_ticks(middle, K)
    middle.legend(fontsize=8)
    truth = np.array([r["copied"]["truth"] for r in records])
    for name, color, marker in (("rung", GREEN, "o"), ("mean", RED, "s")):
        label = {"rung": "shared rung", "mean": "mean policy = rung 6"}[name]
        right.plot(truth, [r["copied"][name] for r in records], color=color, **MEASURED | {"marker": marker}, label=label)
    ends = [truth.min(), truth.max()]
    right.plot(ends, ends, color=GRAY, linestyle=":", marker="")
    right.set(xlabel="mean loss, exact", ylabel="suboptimality", title="A policy that copies one trajectory")
    right.legend(fontsize=8)
    return figure
