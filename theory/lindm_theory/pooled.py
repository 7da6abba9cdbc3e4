"""One prompt for all stages: K trajectories of H pairs serve the layers of every stage (ours).

A trajectory z_1, ..., z_H of pairs is a Markov chain; pair i carries the label y_i of its own stage. One trajectory contributes
Z = (y_1 x_1, ..., y_H x_H) in R^{Hd}, and all that a layer reads is linear in S, the mean of K independent copies of Z. So

    Qhat_h(s, a) = phi(s, a)' B_h S,      risk_h = tr(Lq B_h C B_h') / K + E ||B_h m - w_h||^2_Lq,

with m = E[Z | task], C = E Cov(Z | task), trajectories i.i.d. given the task: a trajectory takes the place of a pair, whatever
the dependence inside it. Readers: one layer a stage, B_h = A_h E_h (E_h: block h); stage-augmented features phi (x) e_h, any
B_h; stage-blind, B_h = A mean_i E_i.

The policy: the greedy rules of different stages are functions of one S, so the mean policy of `mean_policy` has another loss than
the mean over contexts. The policy weighted by occupancy has that loss, whatever the dependence.  Proofs: notes/pooled.md.
"""

import jax
import jax.numpy as jnp
from jax import Array

from lindm_theory.concentration import cantelli
from lindm_theory.in_context import Prediction
from lindm_theory.mean_policy import action_caps
from lindm_theory.moments import Number

# --- moments of one trajectory -----------------------------------------------------------------------------------------------


def pair_chain(P: Array, rho: Array, pi: Array) -> tuple[Array, Array]:
    """Law of the first pair [n] and kernels [H - 1, n, n] of the pairs (s, a) under a behavior policy, n = S A.

    P [H, S, A, S], rho [S], pi [H, S, A]: K_h((s,a), (s',a')) = P_h(s'|s,a) pi_{h+1}(a'|s').
    """
    H, S, A, _ = P.shape
    kernels = jnp.einsum("hsat,htb->hsatb", P[:-1], pi[1:])
    return (rho[:, None] * pi[0]).reshape(-1), kernels.reshape(H - 1, S * A, S * A)


def _all_blocks(rows: Array) -> Array:
    """rows [j, i] = E[u_i u_j'] for i <= j, zero above -> [H, H, d, d] indexed (i, j)."""
    upper = jnp.swapaxes(rows, 0, 1)
    own = jnp.eye(len(rows), dtype=bool)[:, :, None, None]
    return upper + jnp.where(own, 0.0, jnp.transpose(upper, (1, 0, 3, 2)))


def _forward(kernels: Array) -> Array:
    """The kernels with one more, which is not used, so that a scan has one for every stage."""
    return jnp.concatenate([kernels, jnp.eye(kernels.shape[-1], dtype=kernels.dtype)[None]])


def trajectory_moments(
    kernels: Array, start: Array, phi: Array, label: Array, variance: Array | None = None
) -> tuple[Array, Array]:
    """E[Z] [H, d] and E[Z Z'] [H, H, d, d] of one trajectory whose labels are independent given the pairs.

    kernels [H - 1, n, n], start [n], phi [n, d]; label, variance [H, n]: mean and variance of y_i given z_i (oracle labels, noisy
    ones, or the return of a rollout after each pair).  E[y_i y_j x_i x_j'] = sum_z F_ij(z) label_j(z) phi(z)' for i < j, with
    F_ij(z) = E[y_i x_i 1{z_j = z}], carried forward by the kernels.
    """
    H, (n, d) = len(label), phi.shape

    def stage(carry: tuple[Array, Array], at: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        p, past = carry
        j, kernel, label, variance = at
        now = label[:, None] * phi
        rows = jnp.einsum("inx,ny->ixy", past, now)
        rows = rows.at[j].set(jnp.einsum("n,nx,ny->xy", p * (jnp.square(label) + variance), phi, phi))
        past = past.at[j].set(p[:, None] * now)
        return (p @ kernel, jnp.einsum("nm,inx->imx", kernel, past)), (p @ now, rows)

    at = jnp.arange(H), _forward(kernels), label, jnp.zeros_like(label) if variance is None else variance
    _, (mean, rows) = jax.lax.scan(stage, (start, jnp.zeros((H, n, d), phi.dtype)), at)
    return mean, _all_blocks(rows)


def return_values(kernels: Array, r: Array) -> tuple[Array, Array]:
    """Mean and second moment [H, n] of the return-to-go y_i = sum_{l >= i} r_l(z_l) given z_i = z.  r [H, n].

    m_j = r_j + K_j m_{j+1},   q_j = r_j^2 + 2 r_j K_j m_{j+1} + K_j q_{j+1}  (Sobel 1982).
    """

    def stage(ahead: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        kernel, reward = at
        value, square = kernel @ ahead[0], kernel @ ahead[1]
        now = reward + value, jnp.square(reward) + 2.0 * reward * value + square
        return now, now

    zero = jnp.zeros_like(r[0])
    return jax.lax.scan(stage, (zero, zero), (_forward(kernels), r), reverse=True)[1]


def return_trajectory_moments(kernels: Array, start: Array, phi: Array, r: Array) -> tuple[Array, Array]:
    """E[Z] [H, d] and E[Z Z'] [H, H, d, d] for return labels cut from the trajectory itself, y_i = sum_{l >= i} r_l(z_l).

    y_i = (r_i + ... + r_{j-1}) + y_j, so for i <= j, with f_ij(z) = E[x_i 1{z_j = z}] and
    g_ij(z) = E[x_i (r_i + ... + r_{j-1}) 1{z_j = z}],  E[y_i y_j x_i x_j'] = sum_z [ g_ij(z) m_j(z) + f_ij(z) q_j(z) ] phi(z)'.
    This contains the noise that stages share, and the dependence of an early label's noise on later features. Arguments as in
    `trajectory_moments`; r [H, n].
    """
    H, (n, d) = len(r), phi.shape

    def stage(carry: tuple[Array, ...], at: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        p, visits, earned = carry
        j, kernel, reward, value, square = at
        visits = visits.at[j].set(p[:, None] * phi)
        rows = jnp.einsum("inx,ny->ixy", earned * value[None, :, None] + visits * square[None, :, None], phi)
        ahead = jnp.stack([visits, earned + reward[None, :, None] * visits])
        return (p @ kernel, *jnp.einsum("nm,cinx->cimx", kernel, ahead)), ((p * value) @ phi, rows)

    zero = jnp.zeros((H, n, d), phi.dtype)
    at = jnp.arange(H), _forward(kernels), r, *return_values(kernels, r)
    _, (mean, rows) = jax.lax.scan(stage, (start, zero, zero), at)
    return mean, _all_blocks(rows)


def stack(mean: Array, second: Array) -> tuple[Array, Array]:
    """(E[Z], Cov(Z)) as [Hd] and [Hd, Hd], from `trajectory_moments` [H, d], [H, H, d, d]; Cov(S) is Cov(Z) / K."""
    m = mean.reshape(-1)
    return m, jnp.swapaxes(second, 1, 2).reshape(len(m), len(m)) - jnp.outer(m, m)


def without_cross_blocks(covariance: Array, H: int) -> Array:
    """[..., Hd, Hd] -> the same with zeros between stages: every pair from a trajectory of its own."""
    stage = jnp.repeat(jnp.arange(H), covariance.shape[-1] // H)
    return jnp.where(stage[:, None] == stage[None, :], covariance, 0.0)


# --- readers and their risk --------------------------------------------------------------------------------------------------


def block(h: int, H: int, d: int) -> Array:
    """E_h [d, Hd]: selects the pairs of stage h."""
    return jnp.eye(H * d)[h * d : (h + 1) * d]


def average(H: int, d: int) -> Array:
    """(1/H) sum_i E_i [d, Hd]: all H K pairs, whatever their stage."""
    return jnp.tile(jnp.eye(d), (1, H)) / H


def best_reader(T: Array, ESS: Array, ESw: Array) -> Array:
    """The best B = A T among all A: A = E[w S'] T' (T E[S S'] T')^{-1}.  T [k, m], ESS [m, m], ESw [m, d] -> [d, m].

    T = I: stage-augmented features; `block`: one layer a stage; `average`: stage-blind (ESw averaged over the stages for one A).
    """
    return jnp.linalg.solve(T @ ESS @ T.T, T @ ESw).T @ T


def reader_risk(B: Array, mean: Array, covariance: Array, w: Array, Lambda_q: Array) -> Prediction:
    """Risk of Qhat_h = phi' B_h S for one task, exactly: tr(Lq B_h Cov(S) B_h') and ||B_h E[S] - w_h||^2_Lq, [H] each.

    B [H, d, m], mean [H, m] and covariance [H, m, m] of the sums that stage h reads, w [H, d] the targets, Lambda_q [d, d].
    """
    miss = jnp.einsum("hdm,hm->hd", B, mean) - w
    estimation = jnp.einsum("de,hem,hmk,hdk->h", Lambda_q, B, covariance, B)
    return Prediction(estimation, jnp.einsum("hd,de,he->h", miss, Lambda_q, miss))


def blind_floor(signal: Array, cross: Array, Psi: Array, Lambda_q: Array) -> tuple[Array, Array]:
    """Least mean risk over the stages of one stage-blind matrix A at K = infinity, and its part that no predictor removes.

    signal [d, d] = E[s s'] of s = (1/H) sum_i E[y_i x_i | task], cross [H, d, d] = E[s w_h'], Psi [H, H, d, d] = E[w_h w_i'].
    With wbar = (1/H) sum_h w_h:  min_A (1/H) sum_h E||A s - w_h||^2 = min_A E||A s - wbar||^2 + (1/H) sum_h E||w_h - wbar||^2;
    the second term is the part. The first vanishes iff wbar is linear in s, e.g. if labels have the mean x'w and all stages of
    all tasks one covariance. signal must be invertible; all stages have one query law, of second moment Lambda_q.
    """
    H = len(Psi)
    c = cross.mean(0)
    own = jnp.einsum("de,hhde->", Lambda_q, Psi) / H
    common = jnp.einsum("de,hide->", Lambda_q, Psi) / H**2
    explained = jnp.trace(Lambda_q @ c.T @ jnp.linalg.solve(signal, c))
    return own - explained, own - common


# --- the policy ---------------------------------------------------------------------------------------------------------------


def mean_rule(chance: Array, pi: Array, A: int) -> Array:
    """pibar_h(a|s) = P(pihat_h(s) = a).  chance [n] of the contexts, pi [n, H, S] int -> [H, S, A]."""
    return jnp.einsum("n,nhsa->hsa", chance, jax.nn.one_hot(pi, A, dtype=chance.dtype))


def occupancy_rule(chance: Array, d: Array, pi: Array, A: int) -> Array:
    """pi~_h(a|s) = E[d_h(s) 1{pihat_h(s) = a}] / E d_h(s), d the occupancy of pihat: its loss is E SubOpt, for every dependence.

    chance [n], d [n, H, S], pi [n, H, S] -> [H, S, A]. For independent stages it is `mean_rule`, used also where E d_h(s) = 0.
    """
    joint = jnp.einsum("n,nhs,nhsa->hsa", chance, d, jax.nn.one_hot(pi, A, dtype=chance.dtype))
    mass = jnp.sum(joint, axis=-1, keepdims=True)
    return jnp.where(mass > 0, joint / jnp.where(mass > 0, mass, 1.0), mean_rule(chance, pi, A))


def _loss_ahead(P: Array, gap: Array, pi: Array) -> Array:
    """U_h(s,a) = gap_h(s,a) + P_h(.|s,a)' sum_a' pi_{h+1}(a'|.) U_{h+1}(., a').  [H, S, A]."""

    def stage(V: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        kernel, gap, rule = inputs
        U = gap + kernel @ V
        return jnp.sum(rule * U, axis=-1), U

    return jax.lax.scan(stage, jnp.zeros_like(gap[0, :, 0]), (P, gap, pi), reverse=True)[1]


def sharing_price(P: Array, gap: Array, chance: Array, d: Array, pi: Array) -> Array:
    """E SubOpt - loss(pibar) = sum_{h,s,a} Cov(d_h(s), 1{pihat_h(s) = a}) U_h(s,a), exactly; U the loss ahead under pibar.

    P [H, S, A, S], gap [H, S, A]; chance [n], d [n, H, S], pi [n, H, S].  -> [].
    """
    A = gap.shape[-1]
    pibar = mean_rule(chance, pi, A)
    joint = jnp.einsum("n,nhs,nhsa->hsa", chance, d, jax.nn.one_hot(pi, A, dtype=chance.dtype))
    covariance = joint - jnp.einsum("n,nhs->hs", chance, d)[..., None] * pibar
    return jnp.sum(covariance * _loss_ahead(P, gap, pibar))


def reach(P: Array, rho: Array) -> Array:
    """D_h(s) = the largest probability, over all policies, of being in s at stage h.  P [H, S, A, S], rho [S] -> [H, S]."""
    S = len(rho)
    rows = []
    for h in range(len(P)):
        F = jnp.eye(S, dtype=rho.dtype)  # [from, target]
        for i in reversed(range(h)):
            F = jnp.max(P[i] @ F, axis=1)
        rows.append(rho @ F)
    return jnp.stack(rows)


def sharing_bound(P: Array, gap: Array, rho: Array, pibar: Array) -> Array:
    """|E SubOpt - loss(pibar)| <= (1/2) sum_{h >= 2} sum_s D_h(s) range_a U_h(s,.) sum_a pibar(a|s)(1 - pibar(a|s)).  -> [].

    For any joint law of the rules of the stages with P(pihat_h(s) = a) = pibar_h(a|s). Zero if pibar is deterministic.
    """
    U = _loss_ahead(P, gap, pibar)
    spread = jnp.max(U, axis=-1) - jnp.min(U, axis=-1)
    doubt = jnp.sum(pibar * (1.0 - pibar), axis=-1)
    return 0.5 * jnp.sum((reach(P, rho) * spread * doubt)[1:])


def reader_caps(phi: Array, B: Array, mean: Array, covariance: Array) -> Array:
    """Caps [H, S, A] on P(pihat_h(s) = a) by Cantelli, from the exact mean and covariance of the sums that stage h reads.

    phi [S, A, d], B [H, d, m], mean [H, m], covariance [H, m, m] of S (that of Z over K).
    """
    side = jnp.einsum("sabd,hdm->hsabm", phi[:, None, :, :] - phi[:, :, None, :], B)  # Qhat(s, b) - Qhat(s, a)
    variance = jnp.einsum("hsabm,hmk,hsabk->hsab", side, covariance, side)
    return action_caps(cantelli(jnp.einsum("hsabm,hm->hsab", side, mean), jnp.maximum(variance, 0.0)))


def shared_context_rung(P: Array, gap: Array, rho: Array, caps: Array, multipliers: Array) -> Array:
    """Bound on E SubOpt for any dependence between stages, where P(pihat_h(s) = a) <= caps_h(s,a) (ours).

    The mean occupancy mu_h(s,a) = E[d_h(s) 1{pihat_h(s) = a}] is that of a policy and mu_h(s,a) <= D_h(s) caps_h(s,a), so
    E SubOpt is at most the linear program max <gap, mu>. Every multiplier >= 0 gives an upper bound of it:

        sum multipliers D caps + max_pi E^pi sum_h (gap_h - multipliers_h)(s_h, a_h).

    multipliers = gap is the union bound sum gap D caps; those of the program's dual attain it.  All [H, S, A]; -> [].
    """

    def stage(V: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        kernel, reward = inputs
        return jnp.max(reward + kernel @ V, axis=-1), None

    limit = reach(P, rho)[..., None] * jnp.minimum(caps, 1.0)
    V, _ = jax.lax.scan(stage, jnp.zeros_like(rho), (P, gap - multipliers), reverse=True)
    return jnp.sum(multipliers * limit) + rho @ V


def copied_trajectory_loss(p: Number, gap: Number, H: int) -> tuple[Array, Array]:
    """(E SubOpt, loss of the mean policy) where the policy copies the one trajectory of its prompt (ours).

    Two states; action 1 stays in the first, where action 1 of the last stage loses `gap`; action 0 leads to the second for good;
    all else is optimal; the behavior takes action 1 with chance p. Ties go to action 0. One-hot pairs with positive labels and
    K = 1 make the greedy policy take the actions that it saw: gap p^H, against gap p^{H(H+1)/2} from
    pibar_h(1) = p^h. With the exact chances as caps `shared_context_rung` is attained.
    """
    return jnp.asarray(gap * p**H), jnp.asarray(gap * p ** (H * (H + 1) // 2))
