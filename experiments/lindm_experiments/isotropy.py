"""When does the training length N change the greedy policy, and does the condition number kappa of eq. (6) matter to it?

The greedy policy is invariant to a positive factor of Qhat and to a term that is the same for all actions. If A_N = alpha_N I
+ beta_N 11' (one-hot features, uniform design, exchangeable tasks, centered or not; contextual bandits with Gaussian or
hyperoctahedral features), the same contexts therefore give *the same policy* at every N, although eq. (6) has a bias term that
falls as 1/N^2. Sign symmetry alone looks sufficient, but is not. On simplex features N does change the policy.

The layer is also equivariant: phi -> T phi turns A_N into T^-T A_N T^-1 and leaves Qhat unchanged. The same MDPs transformed
to kappa = 1, 10, 100 have the same policy, although the kappa term of eq. (6), which presumes Psi = I, grows by that factor.
The risk depends on the spectrum of R^-1 Lambda Psi Lambda (`lindm_theory.in_context.modes`).

    lindm run isotropy --preset quick
    lindm verify --only isotropy

Expected: no action differs over N or kappa in the isotropic families; about one in seven does on simplex features.
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from lindm.icl.attention import ReducedAttention, pad
from lindm.icl.label_laws import oracle_labels
from lindm.icl.prompts import draw_pairs, training_prompt
from lindm.icl.trainer import train_many
from lindm.problems.linear_mdp import MDPFamily, second_moment, simplex_family, tabulate, with_second_moment
from lindm.problems.regression import covariance
from lindm.solvers.dp import policy_value
from lindm.solvers.rollout import cumulative
from lindm.solvers.ties import greedy
from lindm_experiments.harness.config import check_counts, check_rising
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_experiments.lib import isotropy_figures, linear_mdps
from lindm_experiments.lib.isotropy_figures import ISOTROPIC, LAWS, SIMPLEX
from lindm_theory.in_context import balance_length, general_bound, modes, optimal_weights, paper_bound, risk
from lindm_theory.moments import design_fourth, gaussian_fourth

S, A, d, H = 12, 3, 6, 4  # sizes of the MDPs
D, CANDIDATES = 4, 4  # features and actions of a bandit


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 2021000
    tasks: int = 256  # number of MDPs of every family, each with one context per stage
    tasks_kappa: int = 2560  # number of MDPs that are transformed to every kappa, with layers of the shortest and the longest N
    rounds: int = 1024  # number of bandits of every law, each with one context and one decision
    N: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256, 512)
    M: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    N_trained: tuple[int, ...] = (4, 16)
    kappa: tuple[int, ...] = (1, 10, 100)
    pool: int = 4096  # number of tasks that determine Psi and on which layers are trained
    steps: int = 400

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "tasks", "tasks_kappa", "rounds", "steps", "pool")
        check_rising(self, "N", "M", "N_trained", "kappa", length=2)


QUICK = Config()
FULL = Config(
    seeds=10,
    tasks=1024,
    tasks_kappa=8192,
    rounds=4096,
    N=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    M=(2, 4, 8, 16, 32, 64, 128, 256, 512),
    N_trained=(4, 32),
    kappa=(1, 10, 100, 1000),
    pool=16384,
    steps=2000,
)
SMOKE = Config(
    seeds=2, tasks=16, tasks_kappa=24, rounds=64, N=(2, 512), M=(4, 16), N_trained=(4, 16), kappa=(1, 10), pool=512, steps=20
)


def families(seed: int) -> dict[str, MDPFamily]:
    """Hard and soft aggregation of the same size, under the same law of (theta, mu): only the features differ.

    Hard aggregation is the one-hot case: the pairs share d cells in equal parts, the actions of a
    state lie in different cells (with d = S*A it is the tabular MDP).
    """
    soft = simplex_family(linear_mdps.family_key(seed), S, A, d, H, feature_power=2.0, low=-1.0, high=1.0)
    cell = (np.arange(S)[:, None] + (d // A) * np.arange(A)[None]) % d
    hard = replace(soft, phi=jnp.asarray(np.eye(d)[cell]))
    positive = replace(hard, theta_low=jnp.zeros((H, d)), theta_high=jnp.ones((H, d)))
    return {ISOTROPIC[0]: positive, ISOTROPIC[1]: hard, SIMPLEX: soft}


# --- MDPs --------------------------------------------------------------------------------------------------------------


def exchangeable(Psi: Array) -> Array:
    """The mean of P' Psi P over all permutations P: a I + b 11', exactly of that form.  [..., d, d] -> the same."""
    d = Psi.shape[-1]
    on = jnp.trace(Psi, axis1=-2, axis2=-1) / d
    off = (Psi.sum((-2, -1)) - d * on) / (d * (d - 1))
    return jnp.where(jnp.eye(d, dtype=bool), on[..., None, None], off[..., None, None])


@partial(jax.jit, static_argnames=("tests", "pool", "longest"))
def draw_test_tasks(key: Array, family: MDPFamily, tests: int, pool: int, longest: int):
    """Test tasks (MDP, Plan, w [tests, H, d]), the pairs idx [tests, H, longest] of their contexts, and a pool [H, pool, d]."""
    k_tasks, k_pairs = jax.random.split(key)
    task, plan, w = jax.vmap(lambda k: linear_mdps.draw_oracle(k, family))(jax.random.split(k_tasks, tests + pool))
    mdp, plan = jax.tree.map(lambda leaf: leaf[:tests], (jax.vmap(tabulate)(task), plan))
    pairs = draw_pairs(k_pairs, cumulative(family.design), (tests, w.shape[1], longest))
    return (mdp, plan, w[:tests], pairs), jnp.moveaxis(w[tests:], 1, 0)


@jax.jit
def policies(family: MDPFamily, tests, layers: Array, M: Array) -> tuple[Array, Array]:
    """Exact loss [tasks, n, m + 1] and actions [tasks, n, m + 1, H, S] of n layers [n, H, d, d] on contexts of lengths M [m].

    All layers read the same contexts, a shorter context is the beginning of a longer one, and the last column is the limit of
    infinite contexts, S = Lambda w.
    """
    Lambda = second_moment(family)

    def one(test) -> tuple[Array, Array]:
        mdp, plan, w, pairs = test
        x = linear_mdps.pairs_table(family)[pairs]
        used = (jnp.arange(x.shape[1])[None] < M[:, None]) / M[:, None]
        S = jnp.einsum("mi,hi,hid->mhd", used, oracle_labels(x, w), x)
        S = jnp.concatenate([S, (w @ Lambda)[None]])
        pihat = greedy(jnp.einsum("sai,nhij,mhj->nmhsa", family.phi, layers, S))
        value = jax.vmap(lambda pi: mdp.rho @ policy_value(mdp, pi)[0])(pihat.reshape(-1, *plan.pi.shape))
        return (mdp.rho @ plan.V[0] - value).reshape(pihat.shape[:2]), pihat

    return jax.lax.map(one, tests, batch_size=32)


@jax.jit
def predict(family: MDPFamily, pool: Array, symmetric: Array, N: Array, M: Array) -> dict[str, Array]:
    """A_N [n, H, d, d], its squared bias [n], where bias = estimation [m], and Theorem 2's constant of the bias [], over all
    stages together; from Psi of a pool [H, tasks, d], made exchangeable if `symmetric`."""
    Lambda = second_moment(family)
    Psi = linear_mdps.pool_moment(pool)
    Psi = jnp.where(symmetric, exchangeable(Psi), Psi)
    K = linear_mdps.fourth_moments(family, Psi)
    A = jax.vmap(lambda n: jax.vmap(lambda P, K: optimal_weights(Lambda, P, K, n))(Psi, K))(N)
    bias = jax.vmap(jax.vmap(lambda A, P, K: risk(A, Lambda, P, K, 1.0, Lambda).bias), (0, None, None))(A, Psi, K)
    x, q = jax.vmap(lambda P, K: modes(Lambda, P, K, Lambda))(Psi, K)
    constant = jax.vmap(lambda P, K: general_bound(Lambda, P, K, 1.0, 1.0, Lambda).bias)(Psi, K)
    balance = jax.vmap(lambda m: balance_length(x.ravel(), q.ravel(), m))(M)
    return {"A": A, "bias": bias.sum(1), "balance": balance, "constant": constant.sum()}


@lru_cache
def _draw(longest: int, batch: int, queries: int):
    """The draw of a training batch of n <= longest pairs, n traced: one program for all N."""

    def draw(key: Array, family: MDPFamily, pool: Array, n: Array):
        which, prompts = jax.random.split(key)
        w = pool[jax.random.randint(which, (batch,), 0, pool.shape[0])]
        one = partial(training_prompt, phi=family.phi, cdf=cumulative(family.design), n=longest, queries=queries)
        prompt, target = jax.vmap(lambda k, w: one(k, w=w))(jax.random.split(prompts, batch), w)
        return pad(prompt, n), target

    return draw


def trained(key: Array, family: MDPFamily, pool: Array, N: tuple[int, ...], steps: int) -> Array:
    """Layers [len(N), H, d, d] trained in float32 on the tasks of `pool` [H, tasks, d], all lengths and stages at once."""
    H, _, d = pool.shape
    runs = len(N) * H
    family, pool = linear_mdps.single_precision((family, pool))
    data = (
        jax.tree.map(lambda x: np.broadcast_to(x, (runs, *x.shape)), family),
        np.tile(pool, (len(N), 1, 1)),
        np.repeat(np.asarray(N), H),
    )
    layers, _ = train_many(
        ReducedAttention(d), _draw(max(N), 64, 8), jax.random.split(key, runs), steps=steps, data=data, learning_rate=0.3
    )
    return layers.A[...][:, 0].reshape(len(N), H, d, d).astype(float)


def differing(actions: np.ndarray) -> int:
    """Tasks in which a decision is not the same for every layer; actions [tasks, n, ...] with the layers on axis 1.

    The decisions of a task, on prefixes of one context, are one instance: they are not independent.
    """
    return int((actions != actions[:, -1:]).reshape(len(actions), -1).any(1).sum())


def of_family(cfg: Config, name: str, family: MDPFamily, key: Array) -> dict:
    """The plane of one family, by closed form and by training."""
    k_tests, k_train = jax.random.split(key)
    tests, pool = draw_test_tasks(k_tests, family, cfg.tasks, cfg.pool, cfg.M[-1])
    # the rows of mu and the entries of theta are i.i.d.: on one-hot features the true Psi is exchangeable
    N, M = jnp.asarray(cfg.N + cfg.N_trained, float), jnp.asarray(cfg.M, float)
    predicted = predict(family, pool, jnp.asarray(name != SIMPLEX), N, M)
    layers, n = np.asarray(predicted["A"]), len(cfg.N)
    Ahat = trained(k_train, family, pool, cfg.N_trained, cfg.steps)
    loss, actions = policies(family, tests, jnp.concatenate([layers[:n], Ahat]), M)
    loss, actions = np.asarray(loss.mean(0)), np.asarray(actions)
    exact, hat = actions[:, :n], actions[:, n:]
    share = (exact != exact[:, -1:]).mean((0, 3, 4))
    off = np.linalg.norm(Ahat - layers[n:], axis=(2, 3)) / np.linalg.norm(layers[n:], axis=(2, 3))
    return {
        "loss": loss[:n, :-1].tolist(),
        "share": share[:, :-1].tolist(),
        "share_limit": share[:, -1].tolist(),
        "differing": differing(exact),
        "tasks": len(exact),
        "trained_loss": loss[n:, :-1].tolist(),
        "trained_share": (hat[:, 0] != hat[:, -1]).mean((0, 2, 3))[:-1].tolist(),
        "weights_error": off.max(1).tolist(),
        "bias": predicted["bias"][:n].tolist(),
        "paper_bias": [len(pool) * float(paper_bound(second_moment(family), 1.0, float(n)).bias) for n in cfg.N],
        "balance": predicted["balance"].tolist(),
    }


def of_coordinates(cfg: Config, family: MDPFamily, key: Array) -> dict:
    """The same tasks, pairs and labels in coordinates of several condition numbers: Psi, A_N and Qhat computed in each."""
    actions, paper, ours, loss = [], [], [], []
    N, M = jnp.asarray((cfg.N[0], cfg.N[-1]), float), jnp.asarray((cfg.M[0], cfg.M[-1]), float)
    for kappa in cfg.kappa:
        C = covariance(d, float(kappa))
        there = with_second_moment(family, C)
        tests, pool = draw_test_tasks(jax.random.split(key)[0], there, cfg.tasks_kappa, cfg.pool, cfg.M[-1])
        predicted = predict(there, pool, jnp.asarray(False), N, M)
        lost, chosen = policies(there, tests, predicted["A"], M)
        actions.append(np.asarray(chosen))
        loss.append(float(lost.mean()))
        paper.append(float(paper_bound(C, 1.0, 1.0).bias))
        ours.append(float(predicted["constant"]))
    stacked = np.stack(actions, axis=1)
    return {"differing": differing(stacked), "tasks": len(stacked), "paper": paper, "theorem": ours, "loss": loss}


# --- contextual bandits ------------------------------------------------------------------------------------------------


def bandit_law(name: str) -> np.ndarray:
    """Support [n, D] of a law with Lambda = I, every point equally likely."""
    if name == "signed axes":  # invariant under permutations and sign changes
        axes = np.sqrt(D) * np.eye(D)
        return np.concatenate([axes, -axes])
    # independent entries +-1 (two of them) and 0, 0, +-sqrt 2: sign-symmetric, Lambda = I, but K(I) = diag(4, 4, 5, 5)
    sides = [np.array([-1.0, 1.0])] * 2 + [np.array([-np.sqrt(2.0), 0.0, 0.0, np.sqrt(2.0)])] * 2
    return np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, D)


def of_bandit(cfg: Config, name: str, seed: int) -> dict:
    """Actions over N of a contextual bandit whose features follow one law; tasks w ~ N(0, I), labels without noise."""
    rng = np.random.default_rng([cfg.base_seed, seed, LAWS.index(name)])
    I, longest = jnp.eye(D), cfg.M[-1]
    shape = (cfg.rounds, longest + CANDIDATES)
    if name == "Gaussian":
        features, K = rng.standard_normal((*shape, D)), gaussian_fourth(I, I)
    else:
        support = bandit_law(name)
        features = support[rng.integers(len(support), size=shape)]
        K = design_fourth(jnp.asarray(support), jnp.full(len(support), 1.0 / len(support)), I)
    layers = np.stack([optimal_weights(I, I, K, float(n)) for n in cfg.N])
    w = rng.standard_normal((cfg.rounds, D))
    x, candidates = features[:, :longest], features[:, longest:]
    used = (np.arange(longest)[None] < np.array(cfg.M)[:, None]) / np.array(cfg.M)[:, None]
    S = np.einsum("mi,ri,rid->rmd", used, np.einsum("rid,rd->ri", x, w), x, optimize=True)
    actions = np.asarray(greedy(jnp.asarray(np.einsum("rki,nij,rmj->rnmk", candidates, layers, S, optimize=True))))
    return {
        "share": (actions != actions[:, -1:]).mean((0, 2)).tolist(),
        "differing": differing(actions),
        "tasks": len(actions),
    }


# --- the experiment ----------------------------------------------------------------------------------------------------


def measure(cfg: Config, point: dict) -> dict:
    seed = point["seed"]
    key, all_families = jax.random.key(cfg.base_seed + seed), families(cfg.base_seed + seed)
    return {
        "N": list(cfg.N),
        "M": list(cfg.M),
        "N_trained": list(cfg.N_trained),
        "kappa": list(cfg.kappa),
        "families": {n: of_family(cfg, n, f, jax.random.fold_in(key, i)) for i, (n, f) in enumerate(all_families.items())},
        "coordinates": of_coordinates(cfg, all_families[SIMPLEX], jax.random.fold_in(key, 2)),
        "bandits": {n: of_bandit(cfg, n, seed) for n in LAWS},
    }


def check(records: list[dict]) -> list[Verdict]:
    seeds = len(records)
    same = [r["families"][n] for r in records for n in ISOTROPIC] + [r["bandits"][n] for r in records for n in LAWS[:2]]
    signs = [r["bandits"][LAWS[2]] for r in records]
    carried = [r["coordinates"] for r in records]

    def counted(id: str, cells: list[dict], figure: str, note: str = "") -> Verdict:
        changed, n = sum(c["differing"] for c in cells), sum(c["tasks"] for c in cells)
        return count_verdict(id, changed, n, seeds=seeds, figure=figure, note=note)

    free = max(r["families"][n]["trained_share"][-1] for r in records for n in ISOTROPIC)
    growth = carried[0]["paper"]
    ours = [max(c["theorem"]) / min(c["theorem"]) - 1 for c in carried]
    return [
        counted("isotropy", same, "actions", f"trained layers differ in at most {free:.2%} of actions"),
        mean_verdict("isotropy/anisotropic", [r["families"][SIMPLEX]["share"][0][-1] for r in records], figure="actions"),
        counted("isotropy/sign-symmetry", signs, "actions"),
        counted(
            "isotropy/coordinates",
            carried,
            "actions",
            f"eq. (6) grows by {growth[-1] / growth[0]:.3g}, its generalization by {max(ours):.1e}",
        ),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    return isotropy_figures.plot(records)
