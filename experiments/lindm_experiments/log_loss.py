"""Is it better to train the layer on actions, by cross-entropy, than on Q, by squared error? What does its log-loss say about its
policy?

Supervised fine-tuning of a language model minimizes the log-loss of actions. Here the attention layer does the same: logits
phi(s, .)'A S with a softmax over the actions. It is compared with the same layer trained on Q* by squared error. Tasks,
contexts, queries (all states) and the number of training tasks are the same; only the labels differ: the oracle's action
(hard), softmax(Q*/temperature) (soft), or Q* itself. Both losses are convex in A, so each layer is the minimum itself, by
Newton's method or in closed form, and no learning rate favors one of them. Losses of value are exact, by dynamic programming,
on new tasks.

The log-loss bounds the loss of value without a factor of the horizon: V* - V^q <= R (1 - exp(-E ell)), where E ell is the
log-loss of a whole trajectory of the expert and R the range of the total return (or R', the cost of one deviation). The bound
is attained on a cliff, where any deviation costs everything: a flag that falls with the first deviation turns every test task
into a cliff. On the thin cliff the layer acts in one of H stages only, so that the probability of a fall does not tend to one
with the horizon.

    lindm run log_loss --preset quick
    lindm verify --only log-loss

Expected: squared error on Q loses less if training tasks are few; neither does if they are many. Soft labels lie between, and
at a high temperature they equal squared error. No policy breaks the bound, and the cliff attains it at every horizon; the mean
log-loss of a stage is not a bound there.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from lindm.problems.linear_mdp import MDPFamily, second_moment, simplex_family, tabulate
from lindm.solvers.dp import policy_value
from lindm.solvers.ties import greedy
from lindm.types import MDP, Plan
from lindm_experiments.harness.config import check_at_least, check_counts, check_positive, check_rising
from lindm_experiments.harness.figures import (
    BLUE,
    BOUND,
    EXACT,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    legend_below,
    panel_grid,
    plot_seeds,
    set_log_ticks,
)
from lindm_experiments.harness.verdicts import Verdict, count_verdict, mean_verdict
from lindm_experiments.lib import attained, linear_mdps
from lindm_theory import imitation

LABELS = ("squares", "hard", "soft", "hot")
RIDGE = 1e-6  # of A in whitened coordinates: keeps the minimum finite where few tasks can be separated
STEPS = 11  # of Newton's method, each with a line search; the gradient that is left is in the record
HOT = 100.0  # temperature of `hot`, in units of the mean gap


@dataclass(frozen=True, kw_only=True)
class Config:
    seeds: int = 10
    base_seed: int = 4102000
    T: tuple[int, ...] = (16, 1024)  # numbers of training tasks
    M: int = 32  # pairs in every context, in training and test
    tasks: int = 1024  # number of test tasks
    horizon: int = 4
    temperature: float = 1.0  # temperature of soft labels, in units of the mean gap

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "M", "tasks")
        check_counts(self, "horizon", least=2)
        check_rising(self, "T", length=2, least=8)
        check_positive(self, "temperature")
        check_at_least(self, 1, "M")


QUICK = Config()
FULL = Config(seeds=20, T=(16, 32, 64, 128, 512, 2048), tasks=1024, horizon=8)
SMOKE = Config(seeds=2, T=(16, 64), tasks=16, horizon=3)


@partial(jax.jit, static_argnames=("tasks", "M"))
def draw_data(key: Array, family: MDPFamily, tasks: int, M: int) -> tuple[MDP, Plan, Array, Array]:
    """Tasks with their plans, w [tasks, H, d], and the sums S [tasks, H, d] of one noiseless context for each stage."""
    k_tasks, k_contexts = jax.random.split(key)
    problems, plans, w = jax.vmap(lambda k: linear_mdps.draw_oracle(k, family))(jax.random.split(k_tasks, tasks))
    S = jax.vmap(lambda k, w: linear_mdps.context_sums(k, family, w, M))(jax.random.split(k_contexts, tasks), w)
    return jax.vmap(tabulate)(problems), plans, w, S


def cross_entropy_weights(phi: Array, S: Array, target: Array, weights: Array) -> tuple[Array, Array]:
    """A [d, d] of least cross-entropy, sum_n weights_n mean_s -target_n(.|s)'log softmax(phi(s, .)'A S_n); norm of its gradient.

    phi [S, A, d], S [n, d], target [n, S, A], weights [n] of sum one.
    """
    d, states = phi.shape[-1], phi.shape[0]
    white = jnp.linalg.inv(jnp.linalg.cholesky((S * weights[:, None]).T @ S))
    Z = S @ white.T
    penalty = RIDGE * jnp.einsum("sai,saj->ij", phi, phi)

    def objective(A: Array) -> Array:
        log_q = jax.nn.log_softmax(jnp.einsum("sai,ij,nj->nsa", phi, A, Z))
        return -jnp.einsum("n,nsa,nsa->", weights, target, log_q) / states + jnp.trace(A.T @ penalty @ A)

    def newton(at: tuple[Array, Array], _) -> tuple[tuple[Array, Array], Array]:
        A, value = at
        q = jax.nn.softmax(jnp.einsum("sai,ij,nj->nsa", phi, A, Z))
        gradient = jnp.einsum("n,nsi,nj->ij", weights, jnp.einsum("nsa,sai->nsi", q - target, phi), Z) / states + 2 * penalty @ A
        mean = jnp.einsum("nsa,sai->nsi", q, phi)
        second = jnp.einsum("nsa,saij->nij", q, phi[..., :, None] * phi[..., None, :])
        curvature = second - jnp.einsum("nsi,nsj->nij", mean, mean)
        hessian = jnp.einsum("nij,nkl->ikjl", curvature, weights[:, None, None] * Z[:, :, None] * Z[:, None, :]) / states
        hessian = hessian.reshape(d * d, d * d) + 2 * jnp.kron(penalty, jnp.eye(d))
        step = jnp.linalg.solve(hessian + 1e-13 * jnp.eye(d * d), gradient.ravel()).reshape(d, d)
        lengths = jnp.array([0.0, 1.0, 0.3])
        values = jnp.stack([value, *(objective(A - t * step) for t in lengths[1:])])
        best = jnp.argmin(values)
        return (A - lengths[best] * step, values[best]), jnp.linalg.norm(gradient)

    zero = jnp.zeros((d, d))
    (A, _), norms = jax.lax.scan(newton, (zero, objective(zero)), None, length=STEPS)
    return A @ white, norms[-1]


@jax.jit
def train_layers(family: MDPFamily, plans: Plan, w: Array, S: Array, T: Array, temperature: Array) -> tuple[Array, Array]:
    """Layers [len(T), LABELS, H, d, d] of the first T tasks, and the largest gradient that is left."""
    Q = plans.Q
    gap = jnp.mean(Q.max(-1, keepdims=True) - Q)
    targets = jnp.stack([jax.nn.one_hot(Q.argmax(-1), Q.shape[-1]), *(jax.nn.softmax(Q / (t * gap)) for t in (temperature, HOT))])

    def of_size(size: Array) -> tuple[Array, Array]:
        used = jnp.where(jnp.arange(len(Q)) < size, 1 / size, 0.0)
        squares = jax.vmap(imitation.least_squares_weights, (1, 1, None))(w, S, used)

        def stage(at: tuple[Array, Array]) -> tuple[Array, Array]:
            sums, target = at
            return jax.vmap(cross_entropy_weights, (None, None, 0, None))(family.phi, sums, target, used)

        entropy, gradient = jax.lax.map(stage, (jnp.moveaxis(S, 1, 0), jnp.moveaxis(targets, 2, 0)))
        return jnp.concatenate([squares[None], jnp.moveaxis(entropy, 1, 0)]), gradient.max()

    layers, gradients = jax.lax.map(of_size, T)
    return layers, gradients.max()


@jax.jit
def greedy_losses(family: MDPFamily, mdps: MDP, plans: Plan, S: Array, layers: Array) -> Array:
    """Exact mean loss [...] of the greedy policies of layers [..., H, d, d] on test tasks with context sums S [n, H, d]."""

    def one(layer: Array) -> Array:
        def task(mdp: MDP, plan: Plan, S: Array) -> Array:
            return mdp.rho @ (plan.V[0] - policy_value(mdp, greedy(linear_mdps.action_values(family, layer, S)))[0])

        return jax.vmap(task)(mdps, plans, S).mean()

    flat = jax.lax.map(one, layers.reshape(-1, *layers.shape[-3:]))
    return flat.reshape(layers.shape[:-3])


def cliff(mdp: MDP, expert: Array) -> MDP:
    """The task with a flag, as 2 S states: up at first, down for good after the first action that is not the expert's [H, S].

    The return is one if the flag is up at the end, else zero: one deviation costs all that there is.
    """
    H, S, A = mdp.r.shape
    right = jax.nn.one_hot(expert, A, dtype=mdp.r.dtype)  # [H, S, A]
    up = jnp.concatenate([mdp.P * right[..., None], mdp.P * (1 - right)[..., None]], axis=-1)
    down = jnp.concatenate([jnp.zeros_like(mdp.P), mdp.P], axis=-1)
    last = (jnp.arange(H) == H - 1)[:, None, None]
    r = jnp.concatenate([right * last, jnp.zeros_like(right)], axis=1)
    return MDP(P=jnp.concatenate([up, down], axis=1), r=r, rho=jnp.concatenate([mdp.rho, jnp.zeros(S)]))


@jax.jit
def losses_and_bounds(family: MDPFamily, mdps: MDP, plans: Plan, S: Array, layer: Array) -> dict[str, Array]:
    """Losses and bounds [n] of the stochastic policy softmax(phi'A S) on every task, and on its cliff."""

    def one(mdp: MDP, plan: Plan, S: Array) -> dict[str, Array]:
        H, _, A = mdp.r.shape
        logits = linear_mdps.action_values(family, layer, S)
        q, expert = jax.nn.softmax(logits), plan.pi
        args = (mdp.P, mdp.rho, expert, q)
        log_loss, hellinger = imitation.trajectory_log_loss(*args), imitation.squared_hellinger(*args)
        deviation, stages = imitation.deviation_probability(*args), imitation.stage_deviations(*args)
        value_range = imitation.return_range(mdp.P, mdp.r, mdp.rho)
        regret_range = imitation.regret_range(mdp.P, mdp.r, mdp.rho, expert)
        edge = cliff(mdp, expert)
        thin = (1 - 1 / H) * jax.nn.one_hot(expert, A, dtype=q.dtype) + q / H

        def fallen(q: Array) -> Array:
            return 1.0 - edge.rho @ policy_value(edge, jnp.concatenate([q, q], axis=1))[0]

        def lost(pi: Array) -> Array:
            return mdp.rho @ (plan.V[0] - policy_value(mdp, pi)[0])

        return {
            "loss": lost(q),
            "greedy": lost(greedy(logits)),
            "deviation": regret_range * deviation,
            "regret": imitation.log_loss_bound(regret_range, log_loss),
            "hellinger": regret_range * jnp.minimum(1.0, hellinger),
            "return": imitation.log_loss_bound(value_range, log_loss),
            "classical": imitation.classical_bound(stages, mdp.r.max() - mdp.r.min()),
            "greedy bound": imitation.greedy_log_loss_bound(regret_range, log_loss),
            "cliff": fallen(q),
            "thin cliff": fallen(thin),
            "thin bound": imitation.log_loss_bound(1.0, imitation.trajectory_log_loss(mdp.P, mdp.rho, expert, thin)),
            "thin classical": imitation.classical_bound(stages / H, 1.0),
            "cliff bound": imitation.log_loss_bound(1.0, log_loss),
            "cliff classical": imitation.classical_bound(stages, 1.0),
            "cliff hellinger": jnp.minimum(1.0, hellinger),
            "stage mean": imitation.log_loss_bound(1.0, log_loss / H),
            "thin mean": imitation.log_loss_bound(1.0, imitation.trajectory_log_loss(mdp.P, mdp.rho, expert, thin) / H),
            "stages": stages,
            "scale": jnp.maximum(1.0, value_range),
            "log-loss": log_loss,
            "identity": imitation.first_deviation_loss(mdp.P, mdp.r, mdp.rho, expert, q),
        }

    return jax.vmap(one)(mdps, plans, S)


def doubtful(share: float) -> tuple[float, float]:
    """Loss of the greedy policy and its bound in a bandit with two contexts, one of probability `share`.

    There both actions have probability 1/2, and the greedy policy breaks the tie for the wrong one; the right one is worth one.
    """
    P, rho, expert = np.full((1, 2, 2, 2), 0.5), np.array([1 - share, share]), np.zeros((1, 2), int)
    log_loss = imitation.trajectory_log_loss(P, rho, expert, np.array([[[1.0, 0.0], [0.5, 0.5]]]))
    return share, float(imitation.greedy_log_loss_bound(1.0, log_loss))


def last_stages(mdps: MDP, plans: Plan, S: Array, layer: Array, H: int) -> tuple[MDP, Plan, Array, Array]:
    """The last H stages, a problem of horizon H with the same tasks, contexts and layers."""
    late = MDP(P=mdps.P[:, -H:], r=mdps.r[:, -H:], rho=mdps.rho)
    return late, Plan(V=plans.V[:, -H:], Q=plans.Q[:, -H:], pi=plans.pi[:, -H:]), S[:, -H:], layer[-H:]


def horizons(cfg: Config) -> list[int]:
    """1, 2, 4, ... and the horizon itself."""
    return sorted({cfg.horizon, *(2**k for k in range(1, cfg.horizon.bit_length()) if 2**k <= cfg.horizon)})


def measure(cfg: Config, point: dict) -> dict:
    k_family, k_train, k_test = jax.random.split(jax.random.key(cfg.base_seed + point["seed"]), 3)
    family = simplex_family(k_family, 8, 3, 4, cfg.horizon, feature_power=3.0, low=-1.0, high=1.0)
    _, plans, w, S = draw_data(k_train, family, tasks=cfg.T[-1], M=cfg.M)
    layers, gradient = train_layers(family, plans, w, S, jnp.asarray(cfg.T), jnp.asarray(cfg.temperature))
    mdps, plans, _, S = draw_data(k_test, family, tasks=cfg.tasks, M=cfg.M)
    greedy_loss = greedy_losses(family, mdps, plans, S, layers)
    by_horizon = {}
    for H in horizons(cfg):
        out = losses_and_bounds(family, *last_stages(mdps, plans, S, layers[-1, LABELS.index("hard")], H))
        tolerance = 1e-9 * out["scale"]
        pairs = (("loss", "deviation"), ("loss", "regret"), ("loss", "return"), ("loss", "hellinger"), ("greedy", "greedy bound"))
        pairs += (("loss", "classical"), ("cliff", "cliff bound"), ("thin cliff", "thin bound"), ("thin cliff", "thin classical"))
        unequal = int((jnp.abs(out["loss"] - out["identity"]) > tolerance).sum())
        by_horizon[H] = {
            "mean": {name: float(out[name].mean()) for name in out if name != "stages"},
            "cliff ratio": float((out["cliff bound"] / out["cliff"]).mean()),
            "thin ratio": float((out["thin bound"] / out["thin cliff"]).mean()),
            "violations": {bound: int((out[loss] > out[bound] + tolerance).sum()) for loss, bound in pairs}
            | {"identity": unequal},
            "stage mean": int((out["cliff"] > out["stage mean"] + tolerance).sum()),
        }
    one = {name: np.asarray(out[name][0]).tolist() for name in ("cliff", "cliff bound", "cliff hellinger", "log-loss", "stages")}
    share = float(jax.random.uniform(jax.random.fold_in(k_test, 1), minval=0.1, maxval=0.9))
    return {
        "T": list(cfg.T),
        "n": cfg.tasks,
        "instance": {"log-loss": one["log-loss"], "stages": one["stages"], "share": share},
        "attained": {
            "log-loss": [one["cliff"], one["cliff bound"]],
            "hellinger": [one["cliff"], one["cliff hellinger"]],
            "greedy": list(doubtful(share)),
        },
        "loss": {name: greedy_loss[:, i].tolist() for i, name in enumerate(LABELS)},
        "horizons": horizons(cfg),
        "bounds": list(by_horizon.values()),
        "gradient": float(gradient),
        "condition": float(jnp.linalg.cond(second_moment(family))),
    }


def ratio(records: list[dict], labels: str, other: str, T: int) -> list[float]:
    """Loss of one kind of labels over that of another, on the same tasks, at the T-th number of training tasks, per seed."""
    return [r["loss"][labels][T] / r["loss"][other][T] for r in records]


def check(records: list[dict]) -> list[Verdict]:
    n, seeds = sum(r["n"] for r in records), len(records)
    few, many = records[0]["T"][0], records[0]["T"][-1]
    longest = [r["bounds"][-1] for r in records]
    mean = {name: np.mean([b["mean"][name] for b in longest]) for name in longest[0]["mean"]}
    names = ("deviation", "regret", "hellinger", "return", "classical")
    violated = min(n, sum(sum(b["violations"].values()) for r in records for b in r["bounds"]))
    slack = [b["mean"][name] / b["mean"]["loss"] for r in records for b in r["bounds"] for name in names]
    exact = attained.ratios(records, "log-loss", "hellinger", "greedy")
    at = f"on the thin cliff at H = {records[0]['horizons'][-1]}"
    classical = (
        f"{at} {mean['thin bound'] / mean['thin cliff']:.3g}, classical bound {mean['thin classical'] / mean['thin cliff']:.3g}"
    )
    show = partial(mean_verdict, figure="log-loss")
    return [
        show("log-loss", ratio(records, "hard", "squares", 0), note=f"{few} training tasks"),
        show("log-loss/many-tasks", ratio(records, "hard", "squares", -1), note=f"{many} training tasks"),
        show("log-loss/soft", ratio(records, "soft", "hard", 0), note=f"{few} training tasks"),
        show("log-loss/hot", *(ratio(records, "hot", "squares", i) for i in (0, -1))),
        count_verdict(
            "log-loss/bound",
            violated,
            n,
            seeds=seeds,
            also=[attained.none_below(records, "log-loss", "hellinger", "greedy")],
            figure="log-loss",
            note="bound/truth: " + ", ".join(f"{k} {mean[k] / mean['loss']:.3g}" for k in names),
            slack=np.concatenate([*exact, slack]),
        ),
        show(
            "log-loss/attained",
            *(
                [r["bounds"][i][k] for r in records]
                for i in range(len(records[0]["horizons"]))
                for k in ("cliff ratio", "thin ratio")
            ),
            *(exact[0], exact[2]),
            note=classical,
        ),
        count_verdict("log-loss/stage-mean", sum(b["stage mean"] for b in longest), n, seeds=seeds, figure="log-loss"),
    ]


def plot(records: list[dict]) -> dict[str, Figure]:
    T, H = np.array(records[0]["T"]), np.array(records[0]["horizons"])
    figure, (left, middle, right) = panel_grid(3, 4.4)
    named = {"hard": "actions", "soft": "soft labels", "hot": "soft labels, hot"}
    styles = {"hard": (PURPLE, "s", "-"), "soft": (SKY, "^", "-"), "hot": (SKY, "D", "--")}
    for name, (color, marker, line) in styles.items():
        ratios = np.array([np.array(r["loss"][name]) / np.array(r["loss"]["squares"]) for r in records])
        plot_seeds(left, T, ratios, color)
        left.plot(T, ratios.mean(0), color=color, marker=marker, linestyle=line, label=f"cross-entropy on {named[name]}")
    left.axhline(1.0, color=INK, linewidth=1.6, marker="", label="squares on Q")
    set_log_ticks(left, T)
    left.set(xlabel="training tasks T", ylabel="loss of value / loss with squares on Q", title="Equal data: actions or Q?")
    legend_below(left)

    def curves(name: str) -> np.ndarray:
        return np.array([[b["mean"][name] for b in r["bounds"]] for r in records])

    for axis, truth, title in ((middle, "loss", "Simplex MDPs"), (right, "thin cliff", "Thin cliff: one deviation costs all")):
        plot_seeds(axis, H, curves(truth), BLUE)
        axis.plot(H, curves(truth).mean(0), color=BLUE, label="exact loss of the sampled policy", **EXACT | {"marker": "o"})
        axis.set(xscale="log", yscale="log", xlabel="horizon H", title=title)
        set_log_ticks(axis, H)
    bounds = (
        ("deviation", GREEN, "R' P(deviation)"),
        ("regret", ORANGE, r"R' $(1-e^{-\mathrm{log\ loss}})$"),
        ("return", RED, r"R $(1-e^{-\mathrm{log\ loss}})$"),
        ("classical", GRAY, r"$\sum_h (H-h+1)\,c\,e_h$"),
    )
    for name, color, label in bounds:
        middle.plot(H, curves(name).mean(0), color=color, label=label, **BOUND)
    middle.set(ylabel="loss of value")
    legend_below(middle)
    right.plot(H, curves("thin bound").mean(0), color=RED, label=r"$1-e^{-\mathrm{log\ loss}}$", **BOUND)
    right.plot(H, curves("thin classical").mean(0), color=GRAY, label=r"$\sum_h (H-h+1)\,e_h$", **BOUND)
    right.plot(H, curves("thin mean").mean(0), color="#8B6B00", label="mutant: mean over stages", linestyle=":", marker="")
    right.set(ylabel="loss of value")
    legend_below(right)
    figure.set_label(
        "Above left: with few tasks, training with cross-entropy on actions loses more value than with squares on Q; with "
        "many tasks all are equal. Above right: on simplex MDPs four bounds lie 7 to 20 times above the exact loss. Below: on "
        "a thin cliff the bound by the log loss is tight, and a bound with a mistake lies below the loss."
    )
    return {"log-loss": figure}
