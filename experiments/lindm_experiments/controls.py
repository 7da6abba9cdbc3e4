"""Would a claim fail if the experiment behind it were wrong?

Each mutant is compared with the correct version on the same data, by the statistic and band of its claim. Each mutant could
have passed: N and M exchanged in the predicted risk (`q-risk`); a horizon that is off by one, for policies that are optimal
except for rare slips (`identity`); a layer whose training was stopped early, a few percent from A_N (`weights`); test tasks
among the training tasks, 1, 10 and more percent of them (`q-risk`); and bounds with one mistake, on instances on which they
are attained (a few of those of `lindm verify --mutants`).

A leak of test tasks lowers the risk on these tasks by about a twelfth of the share that leaks. The band of `q-risk`, 3 %,
detects only a leak of nearly all tasks. A comparison with a layer trained without the leak, with the same random numbers and
on the same contexts, detects a small one. The tasks that leak are orthogonal and of equal length, so that the effect is the
same in every seed.

    lindm run controls --preset quick
    lindm verify --only controls

Expected: every mutant FAILs where the correct version passes; otherwise a PASS elsewhere would mean nothing. Leaks are
detected from 1 % on by comparison with the layer without a leak, and by the band of `q-risk` alone only if all training tasks
are test tasks.
"""

import copy
import textwrap
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib import pyplot
from matplotlib.figure import Figure

from lindm.icl.attention import ReducedAttention, query_columns
from lindm.icl.trainer import train_many
from lindm.problems.linear_mdp import MDPFamily, simplex_family, tabulate
from lindm.random import flat
from lindm.solvers.dp import occupancy, policy_value
from lindm.types import Prompt
from lindm.validate import fraction
from lindm_experiments.harness.claims import FAIL, get_claim
from lindm_experiments.harness.config import check_counts
from lindm_experiments.harness.figures import BLUE, EXACT, GRAY, GREEN, PURPLE, RED, WIDTH, plot_seeds
from lindm_experiments.harness.statistics import equivalence
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_experiments.lib import attained, attained_offline, linear_mdps
from lindm_experiments.lib.rung_mutants import AVERAGES, PER_POLICY, WITHOUT_ORACLE
from lindm_theory.in_context import gaussian_gamma, risk
from lindm_theory.moments import gaussian_fourth
from lindm_theory.policy_bounds import loss_identity


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 5
    base_seed: int = 2017000
    d: int = 4
    N: int = 16
    M: int = 64
    leaked: int = 3  # test tasks that leak into training; fewer than d, so that a layer can fit them
    prompts: int = 1 << 15
    policies: int = 1024
    steps: int = 600
    early: int = 55  # steps of the layer whose training is stopped early
    batch: int = 256
    slips: float = 0.02  # probability of a random action instead of the optimal one, for every stage and state

    def __post_init__(self) -> None:
        fraction(self.slips, "slips")
        check_counts(self, "seeds", "d", "N", "M", "leaked", "prompts", "policies", "steps", "early", "batch")
        if self.N == self.M:
            raise ValueError(f"M must differ from N, or exchanging them changes nothing; got {self.M}")
        if self.prompts & (self.prompts - 1):
            raise ValueError(f"prompts must be a power of two: they are taken in equal blocks; got {self.prompts}")


QUICK = Config()
FULL = Config(seeds=10, prompts=1 << 17, policies=8192, steps=2000)
SMOKE = Config(seeds=2, prompts=256, policies=16, steps=20, early=5, batch=16, slips=0.5)
SHARES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # of the training tasks that are test tasks
BOUNDS = (  # some of the mutants of the bounds
    "rung 2: without the factor 2",
    "rung 4: without L, the factor 2 halved",
    "rung 5: sqrt(0.2 v log / M)",
    "rung 6: caps over the wrong axis",
    "linear bound: residual with the value of the same stage",
)


def _contexts(key: Array, tasks: Array, n: int) -> tuple[Prompt, Array]:
    """Prompts of n standard Gaussian pairs, one for each task [B, d]; d query columns stand for random queries exactly."""
    d = tasks.shape[-1]
    x = flat(jax.random.normal, key, (len(tasks), n, d), tasks.dtype)
    query = query_columns(jnp.eye(d, dtype=tasks.dtype))
    prompt = Prompt(x=x, y=jnp.einsum("bnd,bd->bn", x, tasks), query=jnp.broadcast_to(query, (len(tasks), d, d)))
    return prompt, tasks @ query.T


@lru_cache
def _draw(n: int, batch: int):
    """The draw function of one set of sizes: fresh tasks, but a share of them are the leaked ones [T, d]."""

    def draw(key: Array, leaked: Array, share: Array):
        k_fresh, k_leaked, k_which, k_pairs = jax.random.split(key, 4)
        fresh = flat(jax.random.normal, k_fresh, (batch, leaked.shape[1]), leaked.dtype)
        known = leaked[jax.random.randint(k_leaked, (batch,), 0, len(leaked))]
        which = jax.random.uniform(k_which, (batch, 1), leaked.dtype) < share
        return _contexts(k_pairs, jnp.where(which, known, fresh), n)

    return draw


@partial(jax.jit, static_argnames=("n", "prompts"))
def measured_risk(key: Array, A: Array, tasks: Array, n: int, prompts: int) -> Array:
    """Mean squared error [] of the layer A on contexts of n pairs; the tasks [T, d] take turns."""
    layer = ReducedAttention(A.shape[-1], A=A)

    def block(k_w: tuple[Array, Array]) -> Array:
        prompt, target = _contexts(k_w[0], k_w[1], n)
        return jnp.mean((jax.vmap(layer)(prompt) - target) ** 2)

    size = min(prompts, 1024)
    blocks = prompts // size
    turns = tasks[jnp.arange(blocks * size) % len(tasks)].reshape(blocks, size, -1)
    return jax.lax.map(block, (jax.random.split(key, blocks), turns)).mean()


@partial(jax.jit, static_argnames="policies")
def identity_errors(key: Array, family: MDPFamily, slips: Array, policies: int) -> tuple[Array, Array]:
    """Relative deviation [policies] from the identity: with all stages, and with the first one left out.

    The policies are optimal but for random actions with probability `slips`, for every stage and state.
    """

    def one(k: Array) -> tuple[Array, Array]:
        k_task, k_policy, k_slip = jax.random.split(k, 3)
        task, plan, _ = linear_mdps.draw_oracle(k_task, family)
        mdp = tabulate(task)
        slipped = jax.random.randint(k_policy, plan.pi.shape, 0, mdp.num_actions, jnp.int32)
        pi = jnp.where(jax.random.uniform(k_slip, plan.pi.shape) < slips, slipped, plan.pi)
        d = occupancy(mdp, pi)
        loss = mdp.rho @ (plan.V[0] - policy_value(mdp, pi)[0])
        scale = jnp.maximum(1.0, jnp.abs(plan.V).max())
        whole, short = loss_identity(d, plan.Q, pi), loss_identity(d[1:], plan.Q[1:], pi[1:])
        return jnp.abs(loss - whole) / scale, jnp.abs(loss - short) / scale

    return jax.vmap(one)(jax.random.split(key, policies))


def distance(A: Array, closed: Array) -> float:
    """Relative distance of weights to the closed form."""
    return float(jnp.linalg.norm(A - closed) / jnp.linalg.norm(closed))


def mistaken_bounds(seed: int) -> dict[str, dict[str, list[float]]]:
    """bound / truth on the instances of a mutant, of the correct and of the mistaken bound, by mistake."""
    right = {"instances": seed, "attained": attained.ladder_pairs(seed) | attained_offline.pairs(seed)}
    out = {}
    for mutant in (m for m in (*PER_POLICY, *AVERAGES, *WITHOUT_ORACLE) if m.mistake in BOUNDS):
        wrong = copy.deepcopy(right)
        mutant.change([wrong])
        names = [k for k, pair in wrong["attained"].items() if pair != right["attained"][k]]
        versions = {"honest": right, "mutant": wrong}
        out[mutant.mistake] = {v: np.concatenate(attained.ratios([r], *names)).tolist() for v, r in versions.items()}
    return out


def measure(cfg: Config, point: dict) -> dict:
    seed = cfg.base_seed + point["seed"]
    k_leaked, k_train, k_test, k_same, k_tasks, k_policies = jax.random.split(jax.random.key(seed), 6)
    Lambda = jnp.eye(cfg.d)
    leaked = jnp.linalg.qr(jax.random.normal(k_leaked, (cfg.d, cfg.leaked)))[0].T * cfg.d**0.5
    runs = len(SHARES)
    data = (jnp.broadcast_to(leaked.astype(jnp.float32), (runs, *leaked.shape)), jnp.array(SHARES, jnp.float32))

    def trained(runs: int, steps: int) -> Array:
        keys = jnp.broadcast_to(k_train, (runs,))  # one key for all shares: what differs is the leak
        layers, _ = train_many(
            ReducedAttention(cfg.d),
            _draw(cfg.N, cfg.batch),
            keys,
            steps=steps,
            learning_rate=0.1,
            data=jax.tree.map(lambda x: x[:runs], data),
        )
        return layers.A[...][:, 0].astype(float)

    by_share = trained(runs, cfg.steps)
    honest, early = by_share[0], trained(1, cfg.early)[0]
    closed = jnp.linalg.inv(gaussian_gamma(Lambda, cfg.N))

    def predicted(A: Array, Psi: Array, M: int) -> float:
        return float(risk(A, Lambda, Psi, gaussian_fourth(Lambda, Psi), M, Lambda).total)

    fresh = flat(jax.random.normal, k_tasks, (cfg.prompts, cfg.d))
    Psi, Psi_leaked = (w.T @ w / len(w) for w in (fresh, leaked))
    error = float(measured_risk(k_test, honest, fresh, n=cfg.M, prompts=cfg.prompts))
    swapped = jnp.linalg.inv(gaussian_gamma(Lambda, cfg.M))  # the layer trained at M, tested with N pairs
    on_leaked = [float(measured_risk(k_same, A, leaked, n=cfg.N, prompts=cfg.prompts)) for A in by_share]
    family = simplex_family(linear_mdps.family_key(seed), 6, 2, 3, 3)
    whole, short = identity_errors(k_policies, family, jnp.asarray(cfg.slips), policies=cfg.policies)
    return {
        "swap": {"honest": error / predicted(honest, Psi, cfg.M), "mutant": error / predicted(swapped, Psi, cfg.N)},
        "leak": {
            "predicted": [x / predicted(closed, Psi_leaked, cfg.N) for x in on_leaked],  # measured / predicted, by share
            "beside": [x / on_leaked[0] for x in on_leaked],  # over the risk of the layer without a leak
        },
        "undertrained": {"honest": distance(honest, closed), "mutant": distance(early, closed)},
        "horizon": {"honest": int((whole > 1e-12).sum()), "mutant": int((short > 1e-12).sum())},
        "policies": cfg.policies,
        "bounds": mistaken_bounds(seed),
    }


def _inside(claim: str, value: float) -> bool:
    c = get_claim(claim)
    return c.lo <= value <= c.hi


def _turned(record: dict) -> bool:
    """Whether in this seed every correct version meets its claim and no mutant does."""
    leak = record["leak"]["predicted"]
    pairs = [
        [_inside("q-risk", record["swap"][version]) for version in ("honest", "mutant")],
        [_inside("q-risk", value) for value in (leak[0], leak[-1])],
        [_inside("weights", record["undertrained"][version]) for version in ("honest", "mutant")],
        [record["horizon"][version] == 0 for version in ("honest", "mutant")],
        *(
            [all(1 - 1e-9 <= x <= get_claim("ladder/attained").hi for x in ratios[version]) for version in ("honest", "mutant")]
            for ratios in record["bounds"].values()
        ),
    ]
    return all(honest and not mutant for honest, mutant in pairs)


def _smallest_leak(records: list[dict], kind: str, lo: float, hi: float) -> str:
    """The smallest share from which on the mean over seeds is outside the band."""
    by_share = np.transpose([r["leak"][kind] for r in records])[1:]
    seen = [equivalence(x, lo, hi).verdict == FAIL for x in by_share]
    detected = [share for i, share in enumerate(SHARES[1:]) if all(seen[i:])]
    return f"from {detected[0]:.0%} on" if detected else "not at all"


def check(records: list[dict]) -> list[Verdict]:
    def values(name: str, version: str) -> list[float]:
        return [r[name][version] for r in records]

    def beside(name: str) -> str:
        return f"correct version {np.mean(values(name, 'honest')):.3g}"

    def leak(claim: str, share: float) -> Verdict:
        i = SHARES.index(share)
        by_band = np.mean([r["leak"]["predicted"][i] for r in records])
        return mean_verdict(
            claim,
            [r["leak"]["beside"][i] for r in records],
            figure="controls",
            note=f"seen {seen['beside']} beside the layer without a leak, {seen['predicted']} by the band of q-risk, "
            f"which at {share:.0%} has {by_band:.3f}",
        )

    n, band = sum(r["policies"] for r in records), get_claim("q-risk")
    seen = {
        "beside": _smallest_leak(records, "beside", get_claim("controls/leak").lo, np.inf),
        "predicted": _smallest_leak(records, "predicted", band.lo, band.hi),
    }
    return [
        mean_verdict("controls/swap", values("swap", "mutant"), figure="controls", note=beside("swap")),
        count_verdict(
            "controls/horizon", sum(values("horizon", "mutant")), n, seeds=len(records), figure="controls", note=beside("horizon")
        ),
        leak("controls/leak", 0.1),
        leak("controls/leak-one-percent", 0.01),
        mean_verdict("controls/undertrained", values("undertrained", "mutant"), figure="controls", note=beside("undertrained")),
        mean_verdict("controls", [float(_turned(r)) for r in records], figure="controls"),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    panels = (
        ("swap", "q-risk", "measured / predicted", "N and M exchanged"),
        ("undertrained", "weights", "relative distance to A_N", "training stopped early"),
        ("horizon", "identity", "share of policies off the identity", "horizon off by one"),
    )
    figure = pyplot.figure(figsize=(WIDTH, 8.6))
    rows = figure.add_gridspec(3, 1)
    axes = [figure.add_subplot(spec) for row, columns in ((0, 3), (1, 1), (2, 1)) for spec in rows[row].subgridspec(1, columns)]
    for axis, (name, claim, label, title) in zip(axes, panels, strict=False):
        scale = records[0]["policies"] if name == "horizon" else 1
        for i, (version, color) in enumerate((("honest", BLUE), ("mutant", RED))):
            y = [r[name][version] / scale for r in records]
            axis.plot(np.full(len(y), i) + np.linspace(-0.12, 0.12, len(y)), y, "o", color=color)
        c = get_claim(claim)
        axis.axhspan(max(c.lo, 0), c.hi, color=GRAY, alpha=0.25, lw=0)
        axis.set(xlim=(-0.5, 1.5), ylabel=label, title=f"{title} ({claim})", xticks=[0, 1], xticklabels=["correct", "mutant"])
    x = np.arange(len(SHARES))
    for kind, color, label in (("predicted", GREEN, "measured / predicted"), ("beside", PURPLE, "risk / risk without a leak")):
        curves = np.array([r["leak"][kind] for r in records])
        plot_seeds(axes[3], x, curves, color)
        axes[3].plot(x, curves.mean(0), color=color, label=label, **EXACT | {"marker": "o"})
    c = get_claim("q-risk")
    axes[3].axhspan(c.lo, c.hi, color=GRAY, alpha=0.25, lw=0)
    axes[3].set_xticks(x, [f"{share:.0%}" for share in SHARES])
    axes[3].set(xlabel="training tasks that are test tasks", ylabel="ratio", title="Leak (q-risk)")
    axes[3].legend(fontsize=8)
    c = get_claim("ladder/attained")
    for i, ratios in enumerate(zip(*(r["bounds"].values() for r in records), strict=True)):
        for version, color in (("honest", BLUE), ("mutant", RED)):
            y = np.concatenate([one[version] for one in ratios])
            axes[4].plot(y, np.full(len(y), i), "o", color=color, alpha=0.6)
    axes[4].axvspan(1, c.hi, color=GRAY, alpha=0.25, lw=0)
    axes[4].set_yticks(range(len(BOUNDS)), [textwrap.fill(name, 40) for name in records[0]["bounds"]], fontsize=8)
    axes[4].invert_yaxis()
    axes[4].set(xscale="log", xlabel="bound / truth", title="Bounds with a mistake")
    figure.set_label(
        "Negative controls beside the correct computation; gray bands are criteria. Correct results lie in the band and "
        "mutants outside: lengths exchanged, training stopped early, a horizon off by one, and five bounds with a mistake. A "
        "leak of test tasks leaves the band from about 30 percent on."
    )
    return {"controls": figure}
