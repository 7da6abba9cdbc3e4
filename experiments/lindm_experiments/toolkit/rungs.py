"""The ladder of bounds as functions of one object: every rung takes a `Case` and reads from it what it needs."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lindm import validate
from lindm.errors import UsageError
from lindm.evaluation.environments import double_precision
from lindm.problems.linear_mdp import tabulate
from lindm.solvers.dp import backward_induction, occupancy, plan_linear, policy_value
from lindm.solvers.ties import greedy
from lindm.types import MDP, LinearMDP, Prompt
from lindm_theory import concentration, mean_policy, policy_bounds
from lindm_theory.in_context import context_second_moment, risk
from lindm_theory.moments import design_fourth, design_moment


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Case:
    """One decision problem, the estimate Qhat of its optimal action values, and what is known of how Qhat was made.

    The policy is greedy in Qhat. Fields from `phi` on may be None: rungs that need them are then left out of `bounds`. A pytree:
    `jax.vmap` and `jax.jit` take functions of a case.

    >>> mdp = ld.mdp([[[[1, 0], [0, 1]], [[0, 1], [1, 0]]]], [[[0, 0], [1, 1]]] * 3, [1, 0])
    >>> case = ld.theory.Case.of(mdp, Qhat=[[[0.0, 1.0], [1.0, 0.0]]] * 3)
    >>> list(ld.theory.bounds(case))
    ['suboptimality', 'identity', 'span_per_state', 'margin', 'span_per_stage', 'sup_norm']
    """

    mdp: MDP
    Qstar: Array  # [H, S, A] optimal action values
    Qhat: Array  # [H, S, A]
    phi: Array | None = None  # [S, A, d] features, Q*_h(s, a) = <phi(s, a), w_h>
    design: Array | None = None  # [S*A] law of the pairs of a context
    w: Array | None = None  # [H, d]
    weights: Array | None = None  # [H, d, d] of the layer: Qhat_h(s, a) = phi(s, a)' weights_h S_h
    best_weights: Array | None = None  # [H, d, d] A_N, if `weights` are trained ones; else `weights` themselves
    context: Array | None = None  # [H, d] S_h = (1/M) sum y x
    M: Array | float | None = None  # pairs in a context
    Psi: Array | None = None  # [H, d, d] E[w w'] over tasks
    noise_bound: Array | float = 0.0  # of the label noise, a number or [H, S*A]; infinity for Gaussian noise
    noise_variance: Array | float = 0.0  # a number or [H, S*A]
    delta: Array | float = 0.05  # of the statements that hold with probability 1 - delta

    @classmethod
    def of(
        cls,
        problem: LinearMDP | MDP,
        Qhat: ArrayLike | None = None,
        *,
        design: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        best_weights: ArrayLike | None = None,
        prompts: Prompt | None = None,
        Psi: ArrayLike | None = None,
        noise_bound: float = 0.0,
        noise_variance: float = 0.0,
        delta: float = 0.05,
    ) -> "Case":
        """The case of a problem: Q* and w by backward induction, S and M from the prompts of all stages.

        The arguments that are not listed are fields of the class.

        Args:
          problem: a linear MDP, or an MDP without features.
          Qhat: [H, S, A]; phi' weights S if not given.
          prompts: x [H, M, d], y [H, M]: the context of every stage.
          design: [S*A]; uniform if not given.

        Raises:
          ValueError: an array has a wrong shape or is not finite, or Qhat can not be computed.
        """
        with double_precision():
            linear = isinstance(problem, LinearMDP)
            problem = jax.tree.map(lambda a: jnp.asarray(a, float), problem)
            mdp = tabulate(problem) if linear else problem
            plan, w = plan_linear(problem) if linear else (backward_induction(problem), None)
            (H, S, A), phi = plan.Q.shape, getattr(problem, "phi", None)
            d = 0 if phi is None else phi.shape[-1]

            def array(value: ArrayLike | None, shape: tuple[int, ...], name: str, letters: str) -> Array | None:
                if value is None:
                    return None
                if not linear and name != "Qhat":
                    raise UsageError(f"{name} applies to a linear MDP; got an MDP without features")
                return jnp.asarray(validate.shaped(validate.finite(value, name), shape, name, letters), float)

            weights = array(weights, (H, d, d), "weights", "H, d, d")
            context, M = None, None
            if prompts is not None:
                M = prompts.y.shape[-1]
                x, y = array(prompts.x, (H, M, d), "x", "H, M, d"), array(prompts.y, (H, M), "y", "H, M")
                context, M = jnp.einsum("hm,hmd->hd", y, x) / M, float(M)
            if Qhat is None:
                if weights is None or context is None:
                    raise UsageError("Qhat must be given, or weights and prompts")
                Qhat = jnp.einsum("sad,hde,he->hsa", phi, weights, context)
            validate.nonnegative(noise_variance, "noise_variance")
            validate.positive(delta, "delta")
            validate.fraction(delta, "delta")
            if design is None and linear:
                design = jnp.full(S * A, 1 / (S * A))
            return cls(
                mdp=mdp,
                Qstar=plan.Q,
                Qhat=array(Qhat, (H, S, A), "Qhat", "H, S, A"),  # pyright: ignore
                phi=phi,
                design=array(design, (S * A,), "design", "S*A"),
                w=w,
                weights=weights,
                best_weights=array(best_weights, (H, d, d), "best_weights", "H, d, d"),
                context=context,
                M=M,
                Psi=array(Psi, (H, d, d), "Psi", "H, d, d"),
                noise_bound=noise_bound,
                noise_variance=noise_variance,
                delta=delta,
            )

    @property
    def policy(self) -> Array:
        """[H, S] int: greedy in Qhat, by the tie rule of `lindm.solvers.ties`."""
        return greedy(self.Qhat)

    @property
    def occupancy(self) -> Array:
        """[H, S]: probability of the states under the policy."""
        with double_precision():
            return occupancy(self.mdp, self.policy)

    @property
    def gap(self) -> Array:
        """[H, S, A]: V* - Q*."""
        return jnp.max(self.Qstar, axis=-1, keepdims=True) - self.Qstar

    @property
    def pairs(self) -> Array:
        """[S*A, d]: features of all pairs."""
        return self.phi.reshape(-1, self.phi.shape[-1])  # pyright: ignore

    @property
    def Lambda(self) -> Array:
        """[d, d]: E[x x'] under the design."""
        return design_moment(self.pairs, self.design)  # pyright: ignore

    def missing(self, needs: tuple[str, ...]) -> list[str]:
        """Those of the named fields that are None."""
        return [name for name in needs if getattr(self, name) is None]


@dataclass(frozen=True)
class Rung:
    """A bound as a function of a case.

    >>> rung = ld.theory.RUNGS["high_probability"]
    >>> rung.needs
    ('phi', 'design', 'w', 'weights', 'M')
    >>> mdp = ld.mdp([[[[1, 0], [0, 1]], [[0, 1], [1, 0]]]], [[[0, 0], [1, 1]]], [1, 0])
    >>> rung(ld.theory.Case.of(mdp, Qhat=[[[0.0, 1.0], [1.0, 0.0]]]))
    Traceback (most recent call last):
    lindm.errors.UsageError: rung high_probability needs phi, design, w, weights, M of the case
    """

    name: str
    text: str  # the statement, in one line
    compute: Callable[[Case], Array]
    needs: tuple[str, ...] = ()

    def __call__(self, case: Case) -> Array:
        """The bound [] of a case.  Raises: UsageError: the case lacks what it needs."""
        if missing := case.missing(self.needs):
            raise UsageError(f"rung {self.name} needs {', '.join(missing)} of the case")
        with double_precision():
            return self.compute(case)


def _suboptimality(case: Case) -> Array:
    return case.mdp.rho @ (jnp.max(case.Qstar[0], axis=-1) - policy_value(case.mdp, case.policy)[0])


def _error_parts(case: Case) -> Array:
    best = case.weights if case.best_weights is None else case.best_weights
    bias, estimation = policy_bounds.error_parts(case.phi, best, case.Lambda, case.w, case.context)  # pyright: ignore
    optimization = None
    if case.best_weights is not None:
        optimization = jnp.einsum("sad,hde,he->hsa", case.phi, case.weights - best, case.context)  # pyright: ignore
    return policy_bounds.decomposed_rung(case.occupancy, bias, estimation, optimization)


def _stage_risks(case: Case) -> tuple[Array, Array, Array]:
    """Estimation, bias and scale-free risk [H] of the weights over tasks and contexts."""
    flat, Lambda = case.pairs, case.Lambda
    variances = jnp.broadcast_to(jnp.asarray(case.noise_variance, flat.dtype), (len(case.Psi), len(flat)))  # pyright: ignore

    def stage(A: Array, Psi: Array, variance: Array) -> tuple[Array, Array, Array]:
        K, noise = design_fourth(flat, case.design, Psi), design_moment(flat, case.design * variance)  # pyright: ignore
        parts = risk(A, Lambda, Psi, K, case.M, Lambda, noise)  # pyright: ignore
        ESS = context_second_moment(Lambda, Psi, K, case.M, noise)  # pyright: ignore
        return parts.estimation, parts.bias, policy_bounds.scale_free_risk(A, Lambda @ Psi, ESS, Psi, Lambda)

    return jax.vmap(stage)(case.weights, case.Psi, variances)  # pyright: ignore


def _expected(case: Case) -> Array:
    estimation, bias, _ = _stage_risks(case)
    return policy_bounds.expected_rung(policy_bounds.feature_norm(case.phi, case.Lambda), estimation, bias)  # pyright: ignore


def _expected_tight(case: Case) -> Array:
    free = _stage_risks(case)[2]
    span = policy_bounds.difference_norm(case.phi, case.Lambda)  # pyright: ignore
    return policy_bounds.expected_rung_tight(span, free, jnp.zeros_like(free))


def _differences(case: Case) -> tuple[Array, Array, Array]:
    return mean_policy.difference_moments(
        case.phi,
        case.weights,
        case.w,
        case.design,
        case.noise_bound,
        case.noise_variance,  # pyright: ignore
    )


def _kernels(case: Case) -> Array:
    return jnp.broadcast_to(case.mdp.P, (*case.gap.shape, case.gap.shape[1]))


def _mean_policy(case: Case) -> Array:
    caps = mean_policy.action_caps(mean_policy.flip_probability(*_differences(case), case.M))  # pyright: ignore
    return mean_policy.mean_policy_rung(_kernels(case), case.gap, case.mdp.rho, caps)


def _high_probability(case: Case) -> Array:
    noise = case.noise_bound, case.noise_variance
    where = case.phi, case.weights, case.w, case.design
    return concentration.high_probability_rung(*where, case.M, case.delta, case.Lambda, *noise)  # pyright: ignore


def _high_probability_margin(case: Case) -> Array:
    return mean_policy.high_probability_margin_rung(
        _kernels(case),
        case.gap,
        case.mdp.rho,
        *_differences(case),
        case.M,
        case.delta,  # pyright: ignore
    )


_LAYER = ("phi", "design", "w", "weights", "M")
RUNGS: dict[str, Rung] = {
    rung.name: rung
    for rung in (
        Rung("suboptimality", "the loss itself, by dynamic programming", _suboptimality),
        Rung(
            "identity",
            "0: what the policy's actions lose, along its own path; equal to the loss",
            lambda case: policy_bounds.loss_identity(case.occupancy, case.Qstar, case.policy),
        ),
        Rung(
            "span_per_state",
            "1: span of c Qhat - Q*, a scale c in every state",
            lambda case: policy_bounds.span_statewise_rung(case.occupancy, case.Qstar, case.Qhat),
        ),
        Rung(
            "margin",
            "1b: the span where it reaches the action gap",
            lambda case: policy_bounds.margin_rung(case.occupancy, case.Qstar, case.Qhat),
        ),
        Rung(
            "span_per_stage",
            "1: span of c Qhat - Q*, a scale c in every stage",
            lambda case: policy_bounds.span_rung(case.occupancy, case.Qstar, case.Qhat)[0],
        ),
        Rung(
            "sup_norm",
            "2: twice the largest error over actions, summed along the policy's path",
            lambda case: policy_bounds.sup_rung(case.occupancy, case.Qstar, case.Qhat),
        ),
        Rung(
            "error_parts",
            "3: as 2, for bias, estimation (and optimization) error each",
            _error_parts,
            ("phi", "design", "w", "weights", "context"),
        ),
        Rung("mean_policy", "6: on the mean over contexts of one task, independent in every stage", _mean_policy, _LAYER),
        Rung("expected_tight", "4, tightened: on the mean over tasks and contexts", _expected_tight, (*_LAYER, "Psi")),
        Rung("expected", "4: on the mean over tasks and contexts", _expected, (*_LAYER, "Psi")),
        Rung("high_probability", "5: with probability 1 - delta over contexts", _high_probability, _LAYER),
        Rung("high_probability_margin", "with probability 1 - delta; 0 for large M", _high_probability_margin, _LAYER),
    )
}
"""All rungs by name, from the loss itself down to the weakest statement."""


def bounds(case: Case) -> dict[str, float]:
    """Every rung whose needs the case has, by name, beside the exact loss ("suboptimality").

    mean_policy, expected and expected_tight bound a mean over contexts (and tasks), high_probability and high_probability_margin
    hold with probability 1 - delta; the others hold for this very policy.

    >>> problem = ld.linear_mdp([[[1, 0], [0, 1]], [[0, 1], [0.5, 0.5]]], [[[0, 1], [1, 0]]] * 2, [[0.0, 1.0]] * 2)
    >>> case = ld.theory.Case.of(problem, Qhat=[[[0.3, 0.2], [0.4, 0.1]], [[0, 1], [1, 0.5]]])
    >>> list(ld.theory.bounds(case))
    ['suboptimality', 'identity', 'span_per_state', 'margin', 'span_per_stage', 'sup_norm']
    """
    with double_precision():
        values = _all(case)
    return {name: float(values[name]) for name in RUNGS if name in values}  # jit sorts by name


@jax.jit
def _all(case: Case) -> dict[str, Array]:
    return {name: rung.compute(case) for name, rung in RUNGS.items() if not case.missing(rung.needs)}
