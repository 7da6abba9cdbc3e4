"""Would a claim fail if the experiment behind it were wrong?

Four mutants, each compared with the correct version on the same data by the statistic and band of its claim: N and M
exchanged in the predicted risk (`q-risk`), a horizon that is off by one (`identity`), test tasks that leaked into training
(`q-risk`), and a layer that was not trained (`weights`).

    lindm run controls --preset quick
    lindm verify --only controls

Expected: every mutant FAILs where the correct version passes; otherwise a PASS elsewhere would mean nothing.
"""

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
from lindm_experiments.harness.claims import get_claim
from lindm_experiments.harness.config import check_counts
from lindm_experiments.harness.figures import BLUE, GRAY, RED
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_experiments.lib import linear_mdps
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
    batch: int = 256

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "d", "N", "M", "leaked", "prompts", "policies", "steps", "batch")
        if self.N == self.M:
            raise ValueError(f"M must differ from N, or exchanging them changes nothing; got {self.M}")
        if self.prompts & (self.prompts - 1):
            raise ValueError(f"prompts must be a power of two: they are taken in equal blocks; got {self.prompts}")


QUICK = Config()
FULL = Config(seeds=10, prompts=1 << 17, policies=8192, steps=2000)
SMOKE = Config(seeds=2, prompts=256, policies=16, steps=20, batch=16)


def _contexts(key: Array, tasks: Array, n: int) -> tuple[Prompt, Array]:
    """Prompts of n standard Gaussian pairs, one for each task [B, d]; d query columns stand for random queries exactly."""
    d = tasks.shape[-1]
    x = flat(jax.random.normal, key, (len(tasks), n, d), tasks.dtype)
    query = query_columns(jnp.eye(d, dtype=tasks.dtype))
    prompt = Prompt(x=x, y=jnp.einsum("bnd,bd->bn", x, tasks), query=jnp.broadcast_to(query, (len(tasks), d, d)))
    return prompt, tasks @ query.T


@lru_cache
def _draw(n: int, batch: int):
    """The draw function of one set of sizes: fresh tasks where `share` is zero, the leaked ones [T, d] where it is one."""

    def draw(key: Array, leaked: Array, share: Array):
        k_fresh, k_leaked, k_pairs = jax.random.split(key, 3)
        fresh = flat(jax.random.normal, k_fresh, (batch, leaked.shape[1]), leaked.dtype)
        known = leaked[jax.random.randint(k_leaked, (batch,), 0, len(leaked))]
        return _contexts(k_pairs, jnp.where(share > 0, known, fresh), n)

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
def identity_errors(key: Array, family: MDPFamily, policies: int) -> tuple[Array, Array]:
    """Relative deviation [policies] from the identity of random policies: with all stages, and with the first one left out."""

    def one(k: Array) -> tuple[Array, Array]:
        k_task, k_policy = jax.random.split(k)
        task, plan, _ = linear_mdps.draw_oracle(k_task, family)
        mdp = tabulate(task)
        pi = jax.random.randint(k_policy, plan.pi.shape, 0, mdp.num_actions, jnp.int32)
        d = occupancy(mdp, pi)
        loss = mdp.rho @ (plan.V[0] - policy_value(mdp, pi)[0])
        scale = jnp.maximum(1.0, jnp.abs(plan.V).max())
        whole, short = loss_identity(d, plan.Q, pi), loss_identity(d[1:], plan.Q[1:], pi[1:])
        return jnp.abs(loss - whole) / scale, jnp.abs(loss - short) / scale

    return jax.vmap(one)(jax.random.split(key, policies))


def measure(cfg: Config, point: dict) -> dict:
    key = jax.random.key(cfg.base_seed + point["seed"])
    k_leaked, k_train, k_test, k_same, k_tasks, k_policies = jax.random.split(key, 6)
    Lambda = jnp.eye(cfg.d)
    leaked = jax.random.normal(k_leaked, (cfg.leaked, cfg.d))
    both = jnp.broadcast_to(leaked.astype(jnp.float32), (2, *leaked.shape))
    untrained = ReducedAttention(cfg.d)
    trained, _ = train_many(
        untrained,
        _draw(cfg.N, cfg.batch),
        jax.random.split(k_train, 2),
        steps=cfg.steps,
        learning_rate=0.1,
        data=(both, jnp.array([0.0, 1.0], jnp.float32)),
    )
    honest, leaking = trained.A[...][:, 0].astype(float)
    closed = jnp.linalg.inv(gaussian_gamma(Lambda, cfg.N))

    def predicted(A: Array, Psi: Array, M: int) -> float:
        return float(risk(A, Lambda, Psi, gaussian_fourth(Lambda, Psi), M, Lambda).total)

    fresh = flat(jax.random.normal, k_tasks, (cfg.prompts, cfg.d))
    Psi, Psi_leaked = (w.T @ w / len(w) for w in (fresh, leaked))
    error = float(measured_risk(k_test, honest, fresh, n=cfg.M, prompts=cfg.prompts))
    swapped = jnp.linalg.inv(gaussian_gamma(Lambda, cfg.M))  # the layer trained at M, tested with N pairs
    same = partial(measured_risk, k_same, tasks=leaked, n=cfg.N, prompts=cfg.prompts)
    on_leaked = predicted(closed, Psi_leaked, cfg.N)
    whole, short = identity_errors(k_policies, simplex_family(jax.random.key(0), 6, 2, 3, 3), policies=cfg.policies)
    return {
        "swap": {"honest": error / predicted(honest, Psi, cfg.M), "mutant": error / predicted(swapped, Psi, cfg.N)},
        "leak": {"honest": float(same(honest)) / on_leaked, "mutant": float(same(leaking)) / on_leaked},
        "untrained": {
            name: float(jnp.linalg.norm(A - closed) / jnp.linalg.norm(closed))
            for name, A in (("honest", honest), ("mutant", untrained.A[...][0].astype(float)))
        },
        "horizon": {"honest": int((whole > 1e-12).sum()), "mutant": int((short > 1e-12).sum())},
        "policies": cfg.policies,
    }


def _inside(claim: str, value: float) -> bool:
    c = get_claim(claim)
    return c.lo <= value <= c.hi


def _turned(record: dict) -> bool:
    """Whether in this seed every correct version meets its claim and no mutant does."""
    claims = {"swap": "q-risk", "leak": "q-risk", "untrained": "weights"}
    pairs = [[_inside(claim, record[name][version]) for version in ("honest", "mutant")] for name, claim in claims.items()]
    pairs.append([record["horizon"][version] == 0 for version in ("honest", "mutant")])
    return all(honest and not mutant for honest, mutant in pairs)


def check(records: list[dict]) -> list[Verdict]:
    def values(name: str, version: str) -> list[float]:
        return [r[name][version] for r in records]

    def beside(name: str) -> str:
        return f"correct version {np.mean(values(name, 'honest')):.3g}"

    n = sum(r["policies"] for r in records)
    return [
        mean_verdict("controls/swap", values("swap", "mutant"), figure="controls", note=beside("swap")),
        count_verdict(
            "controls/horizon", sum(values("horizon", "mutant")), n, seeds=len(records), figure="controls", note=beside("horizon")
        ),
        mean_verdict("controls/leak", values("leak", "mutant"), figure="controls", note=beside("leak")),
        mean_verdict("controls/untrained", values("untrained", "mutant"), figure="controls", note=beside("untrained")),
        mean_verdict("controls", [float(_turned(r)) for r in records], figure="controls"),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    panels = (
        ("swap", "q-risk", "measured / predicted", "N and M exchanged"),
        ("leak", "q-risk", "measured / predicted", "test tasks leaked"),
        ("untrained", "weights", "relative distance to A_N", "layer untrained"),
        ("horizon", "identity", "share of policies off the identity", "horizon off by one"),
    )
    figure, axes = pyplot.subplots(1, 4, figsize=(12, 3.2))
    for axis, (name, claim, label, title) in zip(axes, panels, strict=True):
        scale = records[0]["policies"] if name == "horizon" else 1
        for i, (version, color) in enumerate((("honest", BLUE), ("mutant", RED))):
            y = [r[name][version] / scale for r in records]
            axis.plot(np.full(len(y), i) + np.linspace(-0.12, 0.12, len(y)), y, "o", color=color)
        c = get_claim(claim)
        axis.axhspan(max(c.lo, 0), c.hi, color=GRAY, alpha=0.25, lw=0)
        axis.set_xticks([0, 1], ["correct", "mutant"])
        axis.set(xlim=(-0.5, 1.5), ylabel=label, title=f"{title} ({claim})")
        axis.title.set_fontsize(9)
    return {"controls": figure}
