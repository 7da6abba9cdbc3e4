r"""Clouds of POMDPs with an attitude (`APOMDP`): checked, made of one model, drawn at random, and one from medicine.

Two kinds of cloud are POMDPs in disguise. With G_m the action value under model m,

    alpha = 0:               max_a max_m G_m(b, a)                                               actions (a, m)
    M = 2, alpha <= 1/2:     max_a max_k [ (1 - alpha) G_k(b, a) + alpha G_{1-k}(b, a) ]         actions (a, k)

because alpha min + (1 - alpha) max puts the larger weight on the larger value. In the second, nature moves by model k with
probability 1 - alpha and by the other one otherwise, and it is seen which: observations are pairs (m, o), and the state has to
carry m, since what is observed depends on it. Both need the models to agree on the first state's law: a POMDP has one belief.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lindm import validate
from lindm.problems.mdp import over_stages
from lindm.problems.pomdp import draw_pomdp, pomdp
from lindm.types import APOMDP, POMDP

PROSTATE_STATES = ("low-risk", "high-risk", "treated")
PROSTATE_ACTIONS = ("defer", "biopsy")
PROSTATE_OBSERVATIONS = tuple(f"psa-{bin}-{result}" for bin in (1, 2, 3) for result in ("negative", "positive", "null"))
CENTRES = ("JH", "UCSF", "UofT", "PRIAS")
# per centre: high risk at the start (misclassified), progression in a year, sensitivity of a biopsy
_RATES = ((0.0583, 0.0691, 0.7184), (0.0809, 0.1217, 0.7431), (0.0774, 0.1016, 0.7949), (0.0653, 0.0841, 0.7614))
# per centre: law of the three bins of PSA at low and at high risk
_PSA = (
    ((0.3552, 0.4311, 0.2137), (0.2868, 0.4706, 0.2426)),
    ((0.0768, 0.5680, 0.3552), (0.0678, 0.5736, 0.3586)),
    ((0.4573, 0.3422, 0.2005), (0.3312, 0.2368, 0.4320)),
    ((0.1361, 0.5357, 0.3282), (0.1094, 0.5501, 0.3405)),
)


def apomdp(models: Sequence[POMDP], alpha: float) -> APOMDP:
    """A checked APOMDP.

    Args:
      models: at least one, of the same S, A, O and H, each as `pomdp` accepts it. An axis of stages of length one is repeated
        where another model has all stages.
      alpha: in [0, 1]; 1 is the worst case, 0 the best.

    Raises:
      ValueError: names the model by its index, the argument, the rule and what was got.
    """
    validate.fraction(alpha, "alpha")
    models, checked = list(models), []
    if not models:
        raise ValueError("models must hold at least one POMDP; got none")
    for i, model in enumerate(models):
        try:
            checked.append(pomdp(model.P, model.O, model.r, model.rho))
        except ValueError as error:
            raise ValueError(f"model {i}: {error}") from error
        for x, y, name in ((checked[i].r, checked[0].r, "r"), (checked[i].O[0], checked[0].O[0], "O at a stage")):
            if x.shape != y.shape:
                raise ValueError(f"models must have the same shapes: {name} of model {i} has {x.shape}, of model 0 {y.shape}")

    def stack(*leaves: Array) -> Array:
        shape = max((x.shape for x in leaves), key=lambda shape: shape[0])
        return jnp.stack([jnp.broadcast_to(x, shape) for x in leaves])

    cloud = jax.tree.map(stack, *checked)
    dtype = jnp.result_type(*jax.tree.leaves(cloud))
    return APOMDP(models=jax.tree.map(lambda x: x.astype(dtype), cloud), alpha=jnp.asarray(alpha, dtype))


def single(model: POMDP, alpha: ArrayLike = 1.0) -> APOMDP:
    """The POMDP as a cloud of one model: the attitude (in [0, 1], may be traced) has nothing to choose from."""
    validate.fraction(alpha, "alpha")
    return APOMDP(models=jax.tree.map(lambda x: x[None], model), alpha=jnp.asarray(alpha, model.r.dtype))


def as_apomdp(problem: POMDP | APOMDP) -> APOMDP:
    """A POMDP as an APOMDP with one model; an APOMDP is returned unchanged."""
    return single(problem) if isinstance(problem, POMDP) else problem


def draw_apomdp(
    key: Array,
    S: int,
    A: int,
    O: int,
    H: int,
    M: int,
    *,
    alpha: ArrayLike = 0.5,
    distance: ArrayLike = 0.3,
    concentration: ArrayLike = 1.0,
    quality: ArrayLike = 0.5,
    low: float = 0.0,
    high: float = 1.0,
    step: float = 0.0,
    discount: ArrayLike = 1.0,
    dtype=None,
) -> APOMDP:
    """A random cloud around a centre of `draw_pomdp`, with the rewards and the first state's law of the centre.

        P_m = (1 - distance) P_centre + distance P'_m,    O_m the same,    P'_m, O'_m drawn like the centre's

    so that rows of any two models are at most `distance` apart in total variation.

    Args:
      distance: in [0, 1]. May be traced, as `alpha`, `concentration`, `quality` and `discount` may.

    Raises:
      ValueError: a size or a number is out of its range.
    """
    validate.count(M, "M")
    validate.fraction(alpha, "alpha")
    validate.fraction(distance, "distance")

    numbers = {"concentration": concentration, "quality": quality, "low": low, "high": high, "step": step, "discount": discount}
    draw = partial(draw_pomdp, S=S, A=A, O=O, H=H, dtype=dtype, **numbers)
    drawn = jax.vmap(draw)(jax.random.split(key, 1 + M))  # the centre and the others
    share = jnp.asarray(distance, drawn.P.dtype)
    cloud = POMDP(
        P=(1 - share) * drawn.P[:1] + share * drawn.P[1:],
        O=(1 - share) * drawn.O[:1] + share * drawn.O[1:],
        r=jnp.broadcast_to(drawn.r[:1], drawn.r[1:].shape),
        rho=drawn.rho[1:],
    )
    return APOMDP(models=cloud, alpha=jnp.asarray(alpha, share.dtype))


def prostate(
    horizon: int = 10,
    alpha: ArrayLike = 0.5,
    *,
    discount: ArrayLike = 0.97,
    biopsy_loss: float = 0.05,
    untreated_loss: float = 0.2,
    treated_loss: float = 0.07,
) -> APOMDP:
    """Active surveillance of prostate cancer as seen by four centres (`CENTRES`); a stage is a year.

    Rates and laws of PSA are those of Li and Denton (Multi-model POMDPs, 2023, Tables 5-6). The state `treated` is ours: a
    positive biopsy ends the surveillance, and nothing leads back. The rewards are ours too, stand-ins in quality-adjusted life
    years; values are not to be compared with the paper's.

    Within a year the disease moves first (low to high risk), then a biopsy, if it was chosen, finds high risk with its
    sensitivity and leads to `treated`; it never errs on low risk. What is observed is the bin of PSA and the result (null exactly
    after `defer`). Treated patients keep the PSA of high risk, which makes the year of the finding right; afterwards the state is
    known and what is observed, `positive` after every further biopsy, tells nothing.

    Args:
      horizon: years, at least one.
      alpha: in [0, 1]. May be traced, as `discount` may.
      biopsy_loss: of a biopsy, in whatever state.
      untreated_loss, treated_loss: of a year at high risk, and of a year after the treatment.

    Raises:
      ValueError: a number is out of its range.
    """
    H = validate.count(horizon, "horizon")
    validate.fraction(alpha, "alpha")
    names = ("biopsy_loss", "untreated_loss", "treated_loss")
    for loss, name in zip((biopsy_loss, untreated_loss, treated_loss), names, strict=True):
        validate.nonnegative(loss, name)
    P, O = np.zeros((len(CENTRES), 1, 3, 2, 3)), np.zeros((len(CENTRES), 1, 2, 3, 3, 3))
    for m, ((_, onset, found), (low, high)) in enumerate(zip(_RATES, _PSA, strict=True)):
        progress = np.array([[1 - onset, onset, 0], [0, 1, 0], [0, 0, 1]])
        biopsy = np.array([[1, 0, 0], [0, 1 - found, found], [0, 0, 1]])
        P[m, 0, :, 0], P[m, 0, :, 1] = progress, progress @ biopsy
        negative, positive, null = np.eye(3)
        for s, (psa, result) in enumerate(((low, negative), (high, negative), (high, positive))):
            O[m, 0, 0, s], O[m, 0, 1, s] = np.outer(psa, null), np.outer(psa, result)
    r = np.array([1.0, 1 - untreated_loss, 1 - treated_loss])[:, None] - np.array([0.0, biopsy_loss])
    rho = np.array([(1 - missed, missed, 0) for missed, _, _ in _RATES])
    dtype = jnp.result_type(float)
    cloud = POMDP(
        P=jnp.asarray(P, dtype),
        O=jnp.asarray(O.reshape(*O.shape[:4], 9), dtype),
        r=jnp.broadcast_to(over_stages(jnp.asarray(r, dtype), H, discount), (len(CENTRES), H, 3, 2)),
        rho=jnp.asarray(rho, dtype),
    )
    return APOMDP(models=cloud, alpha=jnp.asarray(alpha, dtype))


def optimistic(problem: APOMDP) -> POMDP:
    """The POMDP of a cloud with alpha = 0: whoever acts chooses the model too.

    Action a*M + m is action a under model m; histories keep their numbers, (a*M + m)*O + o for a step.

    Raises:
      ValueError: alpha is not 0, or the models differ in rho. (Values are looked at: not under `jit`.)
    """
    if float(problem.alpha) != 0:
        raise ValueError(f"alpha must be 0; got {float(problem.alpha)}")
    rho, cloud = _common_start(problem), problem.models
    M, H, S, A = cloud.r.shape
    return POMDP(
        P=jnp.moveaxis(cloud.P, 0, 3).reshape(-1, S, A * M, S),
        O=jnp.moveaxis(cloud.O, 0, 2).reshape(-1, A * M, *cloud.O.shape[-2:]),
        r=jnp.moveaxis(cloud.r, 0, 3).reshape(H, S, A * M),
        rho=rho,
    )


def mixture(problem: APOMDP) -> POMDP:
    """The POMDP of a cloud of two models with alpha <= 1/2.

    Action a*2 + k is action a, with weight 1 - alpha on model k; observation m*O + o is o under model m; state s*2 + m is s,
    reached under model m (the first state, under neither, counts as m = 0).

    Raises:
      ValueError: M is not 2, alpha is above 1/2, or the models differ in rho. (Values are looked at: not under `jit`.)
    """
    cloud, alpha = problem.models, problem.alpha
    M, H, S, A = cloud.r.shape
    if M != 2:
        raise ValueError(f"the cloud must have two models; got {M}")
    if float(alpha) > 0.5:
        raise ValueError(f"alpha must be at most 1/2; got {float(alpha)}")
    rho, O, one = _common_start(problem), cloud.O.shape[-1], jnp.eye(2, dtype=cloud.P.dtype)
    weight = alpha + (1 - 2 * alpha) * one  # [k, m]
    P = jnp.einsum("km,mhsat,n->hsnaktm", weight, cloud.P, jnp.ones(2, one.dtype))
    return POMDP(
        P=P.reshape(-1, S * 2, A * 2, S * 2),
        O=jnp.einsum("mhato,mn,k->haktmno", cloud.O, one, jnp.ones(2, one.dtype)).reshape(-1, A * 2, S * 2, 2 * O),
        r=jnp.einsum("km,mhsa,n->hsnak", weight, cloud.r, jnp.ones(2, one.dtype)).reshape(H, S * 2, A * 2),
        rho=jnp.einsum("s,n->sn", rho, one[0]).reshape(S * 2),
    )


def _common_start(problem: APOMDP) -> Array:
    rho = np.asarray(problem.models.rho)
    if (rho != rho[0]).any():
        m = int((rho != rho[0]).any(-1).argmax())
        raise ValueError(f"the models must agree in rho; got {rho[0].tolist()} of model 0 and {rho[m].tolist()} of model {m}")
    return problem.models.rho[0]
