# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Bounds in ten minutes
#
# An attention layer reads examples of a task in its context and estimates how good each action is. How large is its error,
# which bounds hold for it, and what does the policy lose that follows the estimates? This tutorial trains such a layer, puts
# the measured error beside the exact one, compares the bounds, goes from the error to the loss of decisions, and ends with the
# verdict on a claim.
#
# ## The setting
#
# In a *linear MDP*, a Markov decision process with states $s$ and actions $a$, the optimal action value of a stage is linear in
# known *features* $\phi(s, a)$ of dimension $d$: $Q^*(s, a) = \langle \phi(s, a), w \rangle$. A *task* is a vector $w$ that the
# layer does not know. It sees a *context*: $M$ pairs of features $x_i = \phi(s_i, a_i)$ and labels $y_i = \langle x_i, w
# \rangle$. The *reduced attention layer* has one matrix $A$ and predicts
#
# $$
# \hat Q(s, a) = \phi(s, a)^\top A \, \frac{1}{M} \sum_i y_i x_i .
# $$
#
# It is trained on contexts of $N$ pairs and tested on contexts of $M$ pairs, which need not be equal. Below, a *family* of
# linear MDPs has random features for 12 states and 3 actions, and the *law* of the pairs draws each of the 36 pairs with the
# same probability.

# %%
import textwrap

import jax
import numpy as np

import lindm as ld
from lindm.problems.linear_mdp import simplex_family

family = simplex_family(jax.random.key(0), S=12, A=3, d=4, H=3, feature_power=2.0)
law = ld.icl.feature_laws.table(family.phi.reshape(-1, 4))
print("features [S, A, d]:", family.phi.shape, " stages:", len(family.theta_low))

# %% [markdown]
# ## The exact error
#
# The *risk* is the mean of $(\hat Q - Q^*)^2$ over tasks, contexts and pairs. For the matrix that is best at length $N$ it has
# an exact formula with two parts, for every law of the features. The *estimation error* comes from the finite context of the
# test, the *training-length bias* from weights that fit contexts of length $N$.

# %%
lengths = [8, 32, 128, 512]
table = ld.theory.risk(law=law, train_lengths=lengths, test_lengths=lengths)
print("   N    bias      estimation error at M =", *lengths)
for N, bias, row in zip(lengths, table.bias[:, 0], table.estimation, strict=True):
    print(f"{N:4}    {bias:.6f} ", "".join(f"{value:10.5f}" for value in row))

# %% [markdown]
# Along a row the estimation error falls as $1/M$, exactly. Down the column the bias falls nearly as $1/N^2$ once $N$ is large.
# For a given test length $M$ the risk is smallest at $N = M$: weights that were trained on longer contexts trust a short one
# too much.

# %%
np.testing.assert_allclose(table.estimation[:, 0] * 8, table.estimation[:, 3] * 512)
slope = np.log(table.bias[3, 0] / table.bias[2, 0]) / np.log(512 / 128)
print(f"log-log slope of the bias from N = 128 to N = 512: {slope:.2f}")
assert -2 < slope < -1.85 and (table.total.argmin(axis=0) == np.arange(4)).all()

# %% mystnb={"image": {"alt": "Left: contours of the exact risk over test length and training length, with the line N = M of the smallest risk and a dashed line where bias and estimation error are equal. Right: the exact risk falls along the test length for four training lengths, to a floor that is lower for longer training; the general bounds are dashed above."}}
table.plot("risk.png")

# %% [markdown]
# ## The measured error
#
# Now train: five copies of the layer, each on fresh tasks and contexts of $N = 32$ pairs at every step, and test them on tasks
# that no training has seen.

# %%
layer = ld.icl.ReducedAttention(4)
measured = ld.measure_risk(
    layer, law, train_length=32, test_lengths=lengths, seeds=5, steps=1000, tasks=2048
)
exact = measured.exact.total[0]
for M, mean, (low, high), value in zip(
    lengths, measured.mean, measured.interval, exact, strict=True
):
    print(f"M = {M:3}: measured {mean:.5f} in [{low:.5f}, {high:.5f}], exact {value:.5f}")
assert (abs(measured.mean / exact - 1) < 0.05).all()

# %% mystnb={"image": {"alt": "Measured risks of five trained layers as points with intervals at four test lengths. They lie on the line of the exact risk, which falls and then flattens at the level of the training-length bias; the estimation error and the bias are drawn as thinner lines."}}
measured.plot("measured.png")

# %% [markdown]
# The exact risk of the best matrix predicts the measured one within 5 % at every length: training has found that matrix, and
# nothing was fitted.
#
# ## Two bounds
#
# A bound says less than the exact risk, but shows what matters. Eq. (6) of the paper ([arXiv
# 2605.09009](https://arxiv.org/abs/2605.09009)) holds for Gaussian features without label noise, and lindm computes it nowhere
# else:

# %%
print("eq. (6) for this law:", table.paper_bound_reason)
gaussian = ld.theory.risk(table.covariance, train_lengths=lengths, test_lengths=lengths)
print("bound / exact risk at N = M = 8, 32, 128, 512:")
for name, of, bound in (
    ("general bound, this law", table, table.general_bound),
    ("general bound, Gaussian", gaussian, gaussian.general_bound),
    ("eq. (6), Gaussian", gaussian, gaussian.paper_bound),
):
    ratio = bound / of.total
    print(f"{name:24} {ratio.diagonal().round(2)}, largest of all {ratio.max():.2f}")
    assert ratio.min() >= 1

# %% [markdown]
# The *general bound* holds for every law of the features with a finite fourth moment, and for label noise. On Gaussian features
# it is never above eq. (6) here. Both come close to the exact risk when training contexts are long, and they are loosest for
# short training and long test contexts, where the bias is most of the risk.

# %%
assert (gaussian.general_bound <= gaussian.paper_bound * (1 + 1e-9)).all()
for of, bound in ((table, table.general_bound), (gaussian, gaussian.paper_bound)):
    assert (
        bound / of.total
    ).argmax() == 3  # the first row, N = 8, and the last column, M = 512

# %% [markdown]
# ## From the error to the loss of decisions
#
# The *policy* takes in each state the action with the largest $\hat Q$. Its *loss* is the value of the best policy minus its
# own, and dynamic programming computes it exactly. A *ladder* of bounds leads from the loss to the error of $\hat Q$. A rung
# higher up needs more about the policy and says more. The number before a text is that of the rung in [the theory in
# equations](../explanations/theory.md#from-q-to-the-policy); 1b is a variant of rung 1:

# %%
sizes = {"seeds": 3, "steps": 300, "tasks": 128}
ladders = {
    n: ld.measure_ladder(layer, family, train_length=n, test_length=n, **sizes)
    for n in (32, 128)
}
for name in ladders[32].mean:
    print(f"{name}, {ld.theory.RUNGS[name].text}:")
    print("   ", *(f"{ladders[n].mean[name]:.3f}" for n in (32, 128)))
violations = sum(ladders[128].violations.values())
print("policies that lose more than a bound says:", violations)

# %% mystnb={"image": {"alt": "The exact loss of the policies at N = M = 128 and the bounds above it as points on a logarithmic axis, with numbers and multiples of the loss: the identity equals it, the spans are a few times as large, the sup norm is the largest."}}
ladders[128].plot("ladder.png")

# %% [markdown]
# The numbers are means over tasks, at $N = M = 32$ and at 128. Every bound holds for every policy, and the identity is the loss
# itself. But `sup_norm`, twice the largest error of $\hat Q$ over the actions in the mean over the states of the policy, is several
# times the loss, because a policy loses only where the error changes the order of two actions. Longer contexts widen the distance: they reduce the loss more than this
# bound.

# %%
ratios = []
for n, ladder in ladders.items():
    assert sum(ladder.violations.values()) == 0
    ratios.append(ladder.mean["sup_norm"] / ladder.mean["suboptimality"])
    print(f"sup norm / loss at N = M = {n}: {ratios[-1]:.1f}")
assert 3 < ratios[0] < ratios[1]

# %% [markdown]
# ## The verdict on a claim
#
# What this page shows once, lindm tests as *claims* with a criterion that is fixed before the run: a claim gets PASS, FAIL or
# INCONCLUSIVE. Would a wrong statement be noticed? The experiment `controls` puts mistakes into statements of this page on
# purpose, such as $N$ and $M$ exchanged in the formula of the risk. Each wrong statement must FAIL. The claim
# `controls` says that all of them do, so it must PASS.

# %% tags=["remove-stderr"]
result = ld.run_experiment("controls", "quick", "controls")
for claim in result.summary["claims"]:
    right = claim["verdict"] == claim["expected"]
    how = "as expected" if right else "NOT as expected"
    print(f"{claim['id']:25} {claim['verdict']:5} {how}")
    print(textwrap.indent(textwrap.fill(claim["statement"], 80), "    "))
assert all(claim["verdict"] == claim["expected"] for claim in result.summary["claims"])

# %% [markdown]
# ## Where to go on
#
# All claims with their verdicts are in [claims](../claims.md), the statements with proofs in [the theory in
# equations](../explanations/theory.md) and [the ledger](../../theory/README.md). A covariance, a law, a layer or a problem of
# your own: [theory for a law or a layer of your own](../theory-toolkit.md). To try a bound of your own against random problems,
# see [add a bound](../how-to/bound.md).
