# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A covariance and a layer of your own
#
# The theory of lindm is not tied to one law of the data or to one layer. This tutorial computes the exact error of a linear
# attention layer for a covariance of your own, then for a law of the features of your own. It trains a layer of your own beside
# it, and measures what the policies of both layers lose. [Bounds in ten minutes](bounds.py) introduces the setting: a layer
# reads $M$ pairs of features $x_i$ and labels $y_i = \langle x_i, w \rangle + \text{noise}$, and predicts $\langle x, w
# \rangle$ for another $x$. Its *risk* is the mean squared error of that.
#
# ## A covariance
#
# Features with mean zero and a covariance matrix $\Lambda = E[x x^\top]$, and labels with noise of standard deviation 0.3.
# `risk` takes the matrix, the numbers of pairs $N$ in the contexts of the training and the numbers $M$ in those of the test.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib import pyplot

import lindm as ld
from lindm.figures.style import BLUE, RED, render
from lindm.problems.linear_mdp import simplex_family

covariance = np.array([[2.0, 0.9, 0.0], [0.9, 1.0, 0.2], [0.0, 0.2, 0.3]])
lengths = {"train_lengths": [8, 32, 128], "test_lengths": [8, 32, 128]}
table = ld.theory.risk(covariance, noise=0.3, **lengths)
print("eigenvalues of the covariance:", np.linalg.eigvalsh(covariance).round(3))
for N, total, bias in zip([8, 32, 128], table.total, table.bias[:, 0], strict=True):
    print(
        f"N = {N:3}: risk at M = 8, 32, 128:", total.round(4), f" of it bias {bias:.4f}"
    )

# %% [markdown]
# The risk has two parts: the *estimation error* of a finite test context, and the *training-length bias*, which is there
# because the trained weights fit contexts of length $N$. Where $N$ is small, a longer test context hardly helps, because the
# bias stays.

# %%
assert table.bias[0, 0] > 0.8 * table.total[0, 2]

# %% mystnb={"image": {"alt": "Left: contours of the exact risk for the covariance over test length and training length, with the line N = M of the smallest risk and a dashed line where bias and estimation error are equal. Right: the risk along the test length for three training lengths, and the general bound dashed above each."}}
table.plot("covariance.png")

# %% [markdown]
# ## A law of the features
#
# A covariance alone does not determine the risk: the fourth moment matters too. A law of your own is an object with a method
# `sample`. In this one each of four entries is zero with probability 3/4 and otherwise a random sign. If it knows its moments,
# `second_moment` is $E[x x^\top]$ and `fourth_moment` is $E[x x^\top \Psi\, x x^\top]$ for a matrix $\Psi$; the risk is then
# exact.


# %%
class SparseSigns:
    d, present = 4, 0.25

    def sample(self, key, shape):
        places, signs = jax.random.split(key)
        here = jax.random.bernoulli(places, self.present, (*shape, self.d))
        return here * jax.random.rademacher(signs, (*shape, self.d), float)

    def second_moment(self):
        return self.present * np.eye(self.d)

    def fourth_moment(self, Psi):
        p, diagonal = self.present, np.diag(Psi)
        same = p * diagonal + p**2 * (diagonal.sum() - diagonal)
        return 2 * p**2 * (Psi - np.diag(diagonal)) + np.diag(same)


class SampledSigns:
    """The same law without its moments."""

    sample = SparseSigns().sample


exact = ld.theory.risk(law=SparseSigns(), noise=0.3, **lengths)
sampled = ld.theory.risk(law=SampledSigns(), noise=0.3, **lengths)
gaussian = ld.theory.risk(exact.covariance, noise=0.3, **lengths)
print("risk at N = M = 8, 32, 128")
for name, found in (("exact", exact), ("sampled", sampled), ("Gaussian", gaussian)):
    print(f"{name:9}", np.diag(found.total).round(4))
print(
    f"{'+-':9}", (1.96 * np.diag(sampled.standard_error)).round(4), "of the sampled one"
)

# %% [markdown]
# Two checks of the formulas. Without its moments the law is sampled, and the estimates agree with the exact risks within four
# standard errors. A Gaussian law with the same covariance has another risk: here a smaller one, as rare large entries carry
# less information about $w$.

# %%
assert (abs(sampled.total - exact.total) < 4 * sampled.standard_error).all()
assert (np.diag(gaussian.total) < np.diag(exact.total)).all()

# %% [markdown]
# ## A layer
#
# Any module of Flax NNX is a layer that maps one prompt to predictions: features `x` [M, d], labels `y` [M], and `query` [Q,
# d]. This one takes four steps of gradient descent on the squared error of its context and learns the size of each step. After
# one step it would be a linear attention layer; later steps correct it by the covariance of the context itself, which a linear
# layer cannot see.


# %%
class GradientSteps(nnx.Module):
    def __init__(self, depth=4):
        self.sizes = nnx.Param(jnp.ones(depth))

    def __call__(self, prompt):
        w = jnp.zeros(prompt.x.shape[-1])
        for size in self.sizes[...]:
            w += size * prompt.x.T @ (prompt.y - prompt.x @ w) / len(prompt.y)
        return prompt.query @ w


M = [8, 32, 128, 512]
sizes = {"noise": 0.3, "train_length": 32, "test_lengths": M, "seeds": 5, "steps": 500}
measured = ld.measure_risk(GradientSteps(), SparseSigns(), **sizes)
linear = measured.exact.total[0]
for m, mean, (low, high), one in zip(
    M, measured.mean, measured.interval, linear, strict=True
):
    print(
        f"M = {m:3}: {mean:.4f} in [{low:.4f}, {high:.4f}], best linear layer {one:.4f}"
    )

# %% mystnb={"image": {"alt": "Risk over the length of the test context, both logarithmic: measured points of the layer with four gradient steps, with intervals, beside the line of the exact risk of the best linear layer and its two parts."}}
measured.plot("own-layer-risk.png")

# %% [markdown]
# From the training length on, the layer has a small part of the risk of the best linear layer, and longer contexts keep
# helping. On 8 pairs it is worse. A likely reason: the covariance of a short context can have a larger eigenvalue than those of
# the training, and steps that fit contexts of 32 pairs are too long for it.

# %%
assert (measured.interval[1:, 1] < linear[1:] / 5).all() and measured.interval[
    0, 0
] > linear[0]
for m in (8, 32):
    x = np.asarray(SparseSigns().sample(jax.random.key(1), (1000, m)))
    largest = np.linalg.eigvalsh(x.swapaxes(1, 2) @ x / m)[:, -1]
    print(
        f"M = {m:2}: largest eigenvalue of the covariance of a context: "
        f"{largest.mean():.2f}, at most {largest.max():.2f}"
    )

# %% [markdown]
# ## Its decisions
#
# Is a smaller error a better policy? `measure_ladder` trains one copy of a layer for each stage of a linear MDP, where labels
# are noisy optimal action values, and takes the action with the largest prediction. The *loss* of a policy is the value of the
# best policy minus its own; it is exact. Here every seed has random features of its own (8 states, 3 actions, 4 features, 3
# stages).

# %%
layers = {
    "linear layer": ld.icl.ReducedAttention(4),
    "four gradient steps": GradientSteps(),
}
sizes = {"noise": 0.2, "train_length": 32, "seeds": 5, "steps": 300, "tasks": 64}
ladders = {
    name: ld.measure_ladder(
        layer, lambda key: simplex_family(key, 8, 3, 4, 3), test_length=32, **sizes
    )
    for name, layer in layers.items()
}
for name, ladder in ladders.items():
    low, high = ladder.interval["suboptimality"]
    loss, bound = ladder.mean["suboptimality"], ladder.mean["sup_norm"]
    print(
        f"{name:20} loss {loss:.4f} in [{low:.4f}, {high:.4f}], "
        f"sup-norm bound {bound:.3f}"
    )
    violations = sum(ladder.violations.values())
    print(f"{'':20} policies that lose more than a bound says: {violations}")


# %% mystnb={"image": {"alt": "Points on a logarithmic axis: the exact loss of the policies of the linear layer and of the layer with four gradient steps, and for each the span and sup-norm bounds, which lie to the right of the loss."}}
def draw_losses():
    figure, axis = pyplot.subplots(figsize=(7.0, 3.0))
    rungs = ("suboptimality", "span_per_state", "span_per_stage", "sup_norm")
    for (name, ladder), color, marker, shift in zip(
        ladders.items(), (BLUE, RED), "os", (-0.12, 0.12), strict=True
    ):
        for row, rung in enumerate(rungs):
            seeds = ladder.values[rung].mean(axis=1)
            axis.plot(
                seeds, np.full(len(seeds), row + shift), "|", color=color, alpha=0.7
            )
            label = "" if row else name
            axis.plot(
                seeds.mean(),
                row + shift,
                marker,
                color=color,
                label=label,
                linestyle="none",
            )
    axis.set_yticks(
        range(len(rungs)), ["exact loss", *(r.replace("_", " ") for r in rungs[1:])]
    )
    axis.set(xscale="log", xlabel="loss of the policy and its bounds")
    axis.invert_yaxis()
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


render(draw_losses, "own-layer-losses.png")

# %% [markdown]
# On these problems the policy of the four steps loses less, with intervals that do not touch, and all bounds hold for both
# layers: they need $\hat Q$ alone, not the layer behind it. The bounds shrink less than the loss, so a comparison of two layers
# by their bounds would understate the difference.

# %%
one, four = ladders.values()
assert four.interval["suboptimality"][1] < one.interval["suboptimality"][0]
assert sum(one.violations.values()) + sum(four.violations.values()) == 0
for rung in ("span_per_state", "span_per_stage", "sup_norm"):
    assert (
        four.mean[rung] / one.mean[rung]
        > four.mean["suboptimality"] / one.mean["suboptimality"]
    )

# %% [markdown]
# ## Where to go on
#
# [Theory for a law or a layer of your own](../theory-toolkit.md) has samples in place of a law, the command line, and the
# bounds of one problem at a time. [Add an attention layer](../how-to/layer.md) and [add a bound](../how-to/bound.md) make a
# layer or a bound a part of lindm. What is proved about linear, softmax and deep layers is in [the theory in
# equations](../explanations/theory.md), what was measured in [claims](../claims.md).
