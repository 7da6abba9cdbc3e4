"""Active surveillance of prostate cancer, as four medical centers see it: an APOMDP with one model for each center.

Source: rates and laws of PSA are those of Li and Denton (Multi-model POMDPs, 2023, Tables 5-6).

The state `treated` is added here: a positive biopsy ends the surveillance, and no transition leads back. The rewards are added
as well, as stand-ins in quality-adjusted life years, so values are not comparable with the paper's.

Within a year the disease moves first (low to high risk). Then a biopsy, if it was chosen, finds high risk with its sensitivity
and leads to `treated`; at low risk it is never wrong. The observation is the bin of PSA and the result of the biopsy (null
exactly after `defer`). Treated patients keep the PSA of high risk, which makes the year of the finding right; afterwards the
state is known and the observation, `positive` after every further biopsy, carries no information.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lindm import validate
from lindm.problems.mdp import over_stages, paid_rewards
from lindm.types import APOMDP, POMDP

STATES = ("low-risk", "high-risk", "treated")
ACTIONS = ("defer", "biopsy")
OPTIONS = {
    "horizon": "Number of years. [default: 10]",
    "alpha": "Attitude to ambiguity: 1 is the worst case over the centers, 0 the best. [default: 0.5]",
    "discount": "Discount factor. [default: 0.97]",
    "biopsy_loss": "Loss of a biopsy. [default: 0.05]",
    "untreated_loss": "Loss of a year at high risk. [default: 0.2]",
    "treated_loss": "Loss of a year after the treatment. [default: 0.07]",
}
OBSERVATIONS = tuple(f"psa-{bin}-{result}" for bin in (1, 2, 3) for result in ("negative", "positive", "null"))
CENTERS = ("JH", "UCSF", "UofT", "PRIAS")
# per center: high risk at the start (misclassified), progression in a year, sensitivity of a biopsy
_RATES = ((0.0583, 0.0691, 0.7184), (0.0809, 0.1217, 0.7431), (0.0774, 0.1016, 0.7949), (0.0653, 0.0841, 0.7614))
# per center: law of the three bins of PSA at low and at high risk
_PSA = (
    ((0.3552, 0.4311, 0.2137), (0.2868, 0.4706, 0.2426)),
    ((0.0768, 0.5680, 0.3552), (0.0678, 0.5736, 0.3586)),
    ((0.4573, 0.3422, 0.2005), (0.3312, 0.2368, 0.4320)),
    ((0.1361, 0.5357, 0.3282), (0.1094, 0.5501, 0.3405)),
)


def prostate(
    horizon: int = 10,
    alpha: ArrayLike = 0.5,
    *,
    discount: ArrayLike = 0.97,
    biopsy_loss: float = 0.05,
    untreated_loss: float = 0.2,
    treated_loss: float = 0.07,
) -> APOMDP:
    """The APOMDP of the module's docstring; a stage is a year, a model is one of `CENTERS`.

    Args:
      horizon: years, at least one.
      alpha: in [0, 1]. May be traced, as `discount` may.
      biopsy_loss: loss of a biopsy, in any state.
      untreated_loss, treated_loss: losses of a year at high risk, and of a year after the treatment.

    Raises:
      ValueError: a number is out of its range.
    """
    H = validate.count(horizon, "horizon")
    validate.fraction(alpha, "alpha")
    names = ("biopsy_loss", "untreated_loss", "treated_loss")
    for loss, name in zip((biopsy_loss, untreated_loss, treated_loss), names, strict=True):
        validate.nonnegative(loss, name)
    P, O = np.zeros((len(CENTERS), 1, 3, 2, 3)), np.zeros((len(CENTERS), 1, 2, 3, 3, 3))
    for m, ((_, onset, sensitivity), (low, high)) in enumerate(zip(_RATES, _PSA, strict=True)):
        progress = np.array([[1 - onset, onset, 0], [0, 1, 0], [0, 0, 1]])
        biopsy = np.array([[1, 0, 0], [0, 1 - sensitivity, sensitivity], [0, 0, 1]])
        P[m, 0, :, 0], P[m, 0, :, 1] = progress, progress @ biopsy
        negative, positive, null = np.eye(3)
        for s, (psa, result) in enumerate(((low, negative), (high, negative), (high, positive))):
            O[m, 0, 0, s], O[m, 0, 1, s] = np.outer(psa, null), np.outer(psa, result)
    r = np.array([1.0, 1 - untreated_loss, 1 - treated_loss])[:, None] - np.array([0.0, biopsy_loss])
    rho = np.array([(1 - missed, missed, 0) for missed, _, _ in _RATES])
    dtype = jnp.result_type(float)
    paid = paid_rewards(jnp.asarray(r, dtype), discount)
    models = POMDP(
        P=jnp.asarray(P, dtype),
        O=jnp.asarray(O.reshape(*O.shape[:4], 9), dtype),
        r=jnp.broadcast_to(over_stages(jnp.asarray(r, dtype), H, discount), (len(CENTERS), H, 3, 2)),
        rho=jnp.asarray(rho, dtype),
        paid=jax.tree.map(lambda x: jnp.broadcast_to(x, (len(CENTERS), *x.shape)), paid),
    )
    return APOMDP(models=models, alpha=jnp.asarray(alpha, dtype))
