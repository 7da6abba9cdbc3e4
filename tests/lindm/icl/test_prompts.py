"""Pairs, episodes and prompts against counts, enumeration and numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.icl import label_laws, prompts
from lindm.icl.attention import FullAttention, ReducedAttention, SoftmaxAttention
from lindm.solvers import rollout as rollouts
from tests.lindm.mdps import as_mdp

# compiled once for each shape; an eager scan is compiled again at every call
rollout = jax.jit(rollouts.rollout, static_argnames="n")
invert = jax.jit(rollouts.invert)
cumulative = jax.jit(rollouts.cumulative)

S, A, H, D = 4, 3, 3, 5


def numpy_mdp(seed: int, sparse: bool = False):
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.ones(S), (H, S, A))
    if sparse:
        P[..., ::2] = 0
        P /= P.sum(-1, keepdims=True)
    return P, rng.normal(size=(H, S, A)), rng.dirichlet(np.ones(S))


def assert_frequencies(drawn, law):
    """Every frequency within five standard errors of the law, and none where the law has no mass."""
    n = np.size(drawn)
    counts = np.bincount(np.ravel(drawn), minlength=len(law))
    assert len(counts) == len(law)
    assert (np.abs(counts / n - law) <= 5 * np.sqrt(law * (1 - law) / n) + 1e-12).all()


# --- inverse CDF


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), n=st.sampled_from([1, 40, 1000]), single=st.booleans())
def test_no_pair_of_probability_zero_is_ever_drawn(seed, n, single):
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=n) ** 4 * (rng.uniform(size=n) < 0.5)
    if weights.sum() == 0:
        weights[-1] = 1.0
    design = (weights / weights.sum()).astype(np.float32 if single else np.float64)
    for cdf in (prompts.design_cdf(design), cumulative(jnp.asarray(design))):
        assert cdf.dtype == design.dtype
        edges = [0.0, np.nextafter(cdf.dtype.type(1), cdf.dtype.type(0)), *np.asarray(cdf) / np.asarray(cdf)[-1]]
        edge = np.array([min(e, edges[1]) for e in edges], cdf.dtype)
        for u in (edge, np.nextafter(edge, cdf.dtype.type(0)).clip(0)):
            shared = np.asarray(invert(cdf, jnp.asarray(u)))
            assert (shared < n).all()
            assert (design[shared] > 0).all()
            rows = jnp.broadcast_to(cdf, (len(u), n))
            np.testing.assert_array_equal(invert(rows, jnp.asarray(u)), shared)


def test_a_last_entry_below_one_does_not_lead_past_the_table():
    cdf = jnp.asarray([0.5, 0.9, 0.9], jnp.float32)  # a sum that rounding left short of one, and an impossible last pair
    u = jnp.asarray([0.0, 0.5, 0.99999, np.nextafter(np.float32(1), np.float32(0))], jnp.float32)
    np.testing.assert_array_equal(invert(cdf, u), [0, 0, 1, 1])


def test_pairs_are_drawn_with_the_frequencies_of_the_design():
    design = np.array([0.0, 0.4, 0.05, 0.0, 0.25, 0.3, 0.0])
    idx = prompts.draw_pairs(jax.random.key(0), prompts.design_cdf(design), 50_000)
    assert idx.dtype == jnp.int32
    assert_frequencies(idx, design)


def test_pairs_drawn_in_a_shape_are_independent_between_its_rows():
    idx = np.asarray(prompts.draw_pairs(jax.random.key(1), prompts.design_cdf(np.full(3, 1 / 3)), (2, 30_000)))
    assert idx.shape == (2, 30_000)
    assert_frequencies(idx[0] * 3 + idx[1], np.full(9, 1 / 9))


@pytest.mark.parametrize(
    ("design", "rule"),
    [
        ([0.5, np.nan], "design must be finite"),
        ([0.5, np.inf], "design must be finite"),
        ([1.5, -0.5], "design .*below zero"),
        ([0.5, 0.4], "design must sum to one"),
        ([], "design"),
    ],
)
def test_a_design_that_is_no_law_raises_an_error(design, rule):
    with pytest.raises(ValueError, match=rule):
        prompts.design_cdf(np.array(design))


# --- rollouts


def test_episodes_have_the_stagewise_law_of_all_enumerated_paths():
    P, r, rho = numpy_mdp(0, sparse=True)
    pi = np.random.default_rng(1).dirichlet(np.ones(A), (H, S))
    law = np.zeros((H, S * A))
    for path in itertools.product(range(S * A), repeat=H):
        s, a = np.divmod(path, A)
        p = rho[s[0]] * pi[0, s[0], a[0]]
        for h in range(1, H):
            p *= P[h - 1, s[h - 1], a[h - 1], s[h]] * pi[h, s[h], a[h]]
        for h in range(H):
            law[h, path[h]] += p
    n = 40_000
    episodes = rollout(jax.random.key(2), as_mdp(P, r, rho), jnp.asarray(pi), n)
    assert episodes.s.shape == episodes.a.shape == episodes.r.shape == (n, H)
    assert episodes.s.dtype == episodes.a.dtype == jnp.int32
    for h in range(H):
        assert_frequencies(episodes.s[:, h] * A + episodes.a[:, h], law[h])
    np.testing.assert_array_equal(episodes.r, r[np.arange(H), episodes.s, episodes.a])


def test_the_next_state_follows_the_kernel_of_the_pair_before_it():
    P, r, rho = numpy_mdp(3)
    episodes = rollout(jax.random.key(0), as_mdp(P, r, rho), jnp.full((H, S, A), 1 / A), 60_000)
    s, a = np.asarray(episodes.s), np.asarray(episodes.a)
    for state, action in itertools.product(range(S), range(A)):
        after = s[(s[:, 1] == state) & (a[:, 1] == action), 2]
        assert_frequencies(after, P[1, state, action])


def test_integer_and_one_hot_policies_give_the_same_episodes():
    mdp = as_mdp(*numpy_mdp(4))
    pi = np.random.default_rng(0).integers(0, A, (H, S))
    for key in jax.random.split(jax.random.key(0), 3):
        one = rollout(key, mdp, jnp.asarray(pi), 50)
        two = rollout(key, mdp, jnp.asarray(np.eye(A)[pi]), 50)
        np.testing.assert_array_equal(one.s, two.s)
        np.testing.assert_array_equal(one.a, two.a)


def test_few_and_many_episodes_use_kernels_summed_by_row_and_by_table_alike():
    mdp = as_mdp(*numpy_mdp(5))
    idx = jnp.tile(jnp.arange(S * A, dtype=jnp.int32), 3)
    many = label_laws.next_states(jax.random.key(0), mdp, 1, idx)
    u = jax.random.uniform(jax.random.key(0), idx.shape)
    cdf = np.cumsum(np.asarray(mdp.P)[1].reshape(S * A, S), -1)[np.asarray(idx)]
    np.testing.assert_array_equal(many, (cdf <= np.asarray(u)[:, None]).sum(-1))
    few = rollouts.step(mdp.P[1], idx[:5] // A, idx[:5] % A, u[:5])
    np.testing.assert_array_equal(few, many[:5])


def test_a_stack_of_mdps_is_a_loop_over_them():
    problems = [numpy_mdp(seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[as_mdp(*p) for p in problems])
    keys = jax.random.split(jax.random.key(0), 3)
    pi = jnp.zeros((H, S), jnp.int32)
    stacked = jax.jit(jax.vmap(lambda k, m: rollouts.rollout(k, m, pi, 8)))(keys, stack)
    for i, problem in enumerate(problems):
        one = rollout(keys[i], as_mdp(*problem), pi, 8)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf, i=i: leaf[i], stacked), one)


# --- one long trajectory


def test_the_pair_kernel_is_transition_then_action():
    P, _, _ = numpy_mdp(8)
    pi = np.random.default_rng(0).dirichlet(np.ones(A), S)
    kernel = np.asarray(prompts.pair_kernel(jnp.asarray(P[0]), jnp.asarray(pi)))
    for i, j in itertools.product(range(S * A), repeat=2):
        assert kernel[i, j] == pytest.approx(P[0, i // A, i % A, j // A] * pi[j // A, j % A], rel=1e-14)


def test_the_stationary_law_is_what_powers_of_the_kernel_tend_to():
    kernel = np.random.default_rng(0).dirichlet(np.ones(7), 7)
    law = prompts.stationary(jnp.asarray(kernel))
    np.testing.assert_allclose(law, np.linalg.matrix_power(kernel, 200)[0], rtol=1e-12)


def test_a_chain_starts_and_moves_by_its_laws():
    kernel = np.random.default_rng(1).dirichlet(np.ones(5) * 0.5, 5)
    kernel[2] = [0, 0, 0, 1, 0]
    start = np.array([0.0, 0.7, 0.3, 0.0, 0.0])
    keys = jax.random.split(jax.random.key(0), 4_000)
    idx = np.asarray(jax.vmap(lambda k: prompts.chain(k, jnp.asarray(kernel), jnp.asarray(start), 12))(keys))
    assert idx.shape == (4_000, 12)
    assert idx.dtype == np.int32
    assert_frequencies(idx[:, 0], start)
    for i in range(5):
        assert_frequencies(idx[:, 1:][idx[:, :-1] == i], kernel[i])


def test_a_chain_of_length_one_is_its_first_pair():
    assert prompts.chain(jax.random.key(0), jnp.eye(3), jnp.asarray([0.0, 1.0, 0.0]), 1).tolist() == [1]


@pytest.mark.parametrize("bad", [0, -1, 1.5])
def test_numbers_of_draws_that_are_no_counts_raise_an_error(bad):
    with pytest.raises(ValueError, match="n must be a whole number"):
        rollout(jax.random.key(0), as_mdp(*numpy_mdp(0)), jnp.zeros((H, S), jnp.int32), bad)
    with pytest.raises(ValueError, match="length must be a whole number"):
        prompts.chain(jax.random.key(0), jnp.eye(3), jnp.ones(3) / 3, bad)


def test_transitions_hold_the_reward_and_the_features_of_a_possible_next_state():
    P, r, rho = numpy_mdp(15, sparse=True)
    phi = np.random.default_rng(0).normal(size=(S, A, D))
    idx = prompts.draw_pairs(jax.random.key(0), prompts.design_cdf(np.full(S * A, 1 / (S * A))), (H, 200))
    x, reward, after = prompts.transitions(jax.random.key(1), as_mdp(P, r, rho), jnp.asarray(phi), idx)
    s, a = np.divmod(np.asarray(idx), A)
    np.testing.assert_array_equal(x, phi[s, a])
    np.testing.assert_array_equal(reward, r[np.arange(H)[:, None], s, a])
    landed = (np.asarray(after)[:, :, None] == phi[None, None]).all((-1, -2)).argmax(-1)
    np.testing.assert_array_equal(after, phi[landed])
    assert (P[np.arange(H)[:, None], s, a, landed] > 0).all()


# --- prompts


def prompt_arrays(seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(S, A, D)), rng.normal(size=(H, D)), rng.dirichlet(np.ones(S * A))


def test_stage_prompts_pair_every_label_with_its_own_features_and_ask_for_every_pair():
    phi, w, design = prompt_arrays()
    cdf = prompts.design_cdf(design)
    prompt = prompts.stage_prompts(jax.random.key(0), jnp.asarray(phi), cdf, H, 30, label_laws.oracle_law(jnp.asarray(w)))
    assert prompt.x.shape == (H, 30, D)
    assert prompt.y.shape == (H, 30)
    assert prompt.query.shape == (H, S * A, D)
    for h in range(H):
        np.testing.assert_allclose(prompt.y[h], np.asarray(prompt.x)[h] @ w[h], rtol=1e-12, atol=1e-12)
        for s, a in itertools.product(range(S), range(A)):
            np.testing.assert_array_equal(prompt.query[h, s * A + a], phi[s, a])


def test_contexts_of_different_stages_are_drawn_independently():
    keys = jax.random.split(jax.random.key(0), 20_000)
    labels = label_laws.oracle_law(jnp.zeros((2, 1)))
    code = jnp.arange(3.0).reshape(3, 1, 1)
    cdf = prompts.design_cdf(np.full(3, 1 / 3))
    x = jax.vmap(lambda k: prompts.stage_prompts(k, code, cdf, 2, 1, labels).x)(keys)
    first, second = np.asarray(x)[:, :, 0, 0].astype(int).T
    assert_frequencies(first * 3 + second, np.full(9, 1 / 9))


@pytest.mark.parametrize("law", ["noisy", "bounded", "return"])
def test_label_laws_of_a_task_are_centered_on_the_oracle(law):
    P, r, rho = numpy_mdp(16)
    mdp = as_mdp(P, r, rho)
    phi = np.eye(S * A).reshape(S, A, S * A)
    pi = jnp.zeros((H, S), jnp.int32)
    Q = np.asarray(label_laws.return_moments(mdp, pi)[0]).reshape(H, S * A)
    w = jnp.asarray(Q)  # one-hot features: the weights are the table
    labels = {
        "noisy": label_laws.noisy_law(w, 0.5),
        "bounded": label_laws.bounded_law(w, 0.5),
        "return": label_laws.return_law(mdp, pi),
    }[law]
    idx = jnp.asarray(np.random.default_rng(0).integers(0, S * A, (H, 9)), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 5_000)
    y = np.asarray(jax.vmap(lambda k: prompts.label_pairs(k, jnp.asarray(phi), idx, labels).y)(keys))
    want = np.take_along_axis(Q, np.asarray(idx), -1)
    assert (np.abs(y.mean(0) - want) <= 5 * y.std(0) / np.sqrt(len(y)) + 1e-9).all()


def test_a_training_prompt_has_noiseless_targets_and_separate_queries():
    phi, w, design = prompt_arrays()
    cdf = prompts.design_cdf(design)
    draw = jax.vmap(lambda k: prompts.training_prompt(k, jnp.asarray(phi), jnp.asarray(w[0]), cdf, 6, 4, sigma=0.5))
    prompt, target = draw(jax.random.split(jax.random.key(0), 5_000))
    assert (prompt.x.shape, prompt.y.shape, prompt.query.shape) == ((5_000, 6, D), (5_000, 6), (5_000, 4, D))
    np.testing.assert_allclose(target, np.asarray(prompt.query) @ w[0], rtol=1e-12, atol=1e-12)
    noise = np.asarray(prompt.y) - np.asarray(prompt.x) @ w[0]
    assert abs(noise.var() - 0.25) < 5 * 0.25 * np.sqrt(2 / noise.size)
    clean, _ = prompts.training_prompt(jax.random.key(0), jnp.asarray(phi), jnp.asarray(w[0]), cdf, 6, 4)
    np.testing.assert_allclose(clean.y, np.asarray(clean.x) @ w[0], rtol=1e-12)


def test_single_precision_in_is_single_precision_out():
    phi, w, design = (jnp.asarray(v, jnp.float32) for v in prompt_arrays())
    prompt = prompts.stage_prompts(jax.random.key(0), phi, rollouts.cumulative(design), H, 5, label_laws.noisy_law(w, 0.1))
    training, target = prompts.training_prompt(jax.random.key(0), phi, w[0], rollouts.cumulative(design), 5, 2, 0.1)
    mdp = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), as_mdp(*numpy_mdp(0)))
    episodes = rollout(jax.random.key(0), mdp, jnp.full((H, S, A), 1 / A, jnp.float32), 4)
    y = label_laws.return_labels(jax.random.key(0), mdp, jnp.zeros((H, S), jnp.int32), 0, jnp.arange(5, dtype=jnp.int32))
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((prompt, training, target, episodes.r, y))}
    assert dtypes == {"float32"}


@pytest.mark.parametrize("kind", [ReducedAttention, FullAttention])
def test_a_prompt_of_transitions_makes_hand_set_layers_batch_td(kind):
    """Float64, five layers, another matrix in each: the difference to a loop over transitions is rounding."""
    rng = np.random.default_rng(3)
    n, features, depth, gamma = 12, 3, 5, 0.9
    x, x_next, r = rng.normal(size=(n, features)), rng.normal(size=(n, features)), rng.normal(size=n)
    C, q = 0.2 * rng.normal(size=(depth, features, features)), rng.normal(size=(4, features))
    blocks = np.block([[C, 0 * C], [-C, 0 * C]])
    if kind is ReducedAttention:
        layer = kind(2 * features, depth, A=jnp.asarray(blocks))
    else:
        layer = kind(2 * features, depth, dtype=jnp.float64)
        layer.W_PV[...] = jnp.zeros_like(layer.W_PV[...]).at[:, -1, -1].set(1)
        layer.W_KQ[...] = jnp.zeros_like(layer.W_KQ[...]).at[:, :-1, :-1].set(jnp.swapaxes(jnp.asarray(blocks), 1, 2))
    w = np.zeros(features)
    for k in range(depth):
        w = w + C[k] @ np.mean([x[i] * (r[i] + gamma * x_next[i] @ w - x[i] @ w) for i in range(n)], axis=0)
    got = layer(prompts.td_prompt(*map(jnp.asarray, (x, x_next, r, q)), gamma))
    np.testing.assert_allclose(got, q @ w, rtol=1e-12)


def test_two_softmax_heads_on_a_prompt_of_transitions_are_weighted_td():
    """Each layer adds to the value of every point the mean of the TD errors, weighted by the softmax of its scores."""
    rng = np.random.default_rng(5)
    n, features, depth, gamma, rate = 10, 3, 4, 0.6, 0.4
    x, x_next, r = rng.normal(size=(n, features)), rng.normal(size=(n, features)), rng.normal(size=n)
    W, q = rng.normal(size=(features, features)), rng.normal(size=(2, features))
    layer = SoftmaxAttention(2 * features, depth, heads=2, dtype=jnp.float64)
    zero = jnp.zeros((depth, 2, 2 * features + 1, 2 * features + 1))
    layer.W_PV[...] = zero.at[:, 0, -1, -1].set(rate).at[:, 1, -1, -1].set(-gamma * rate)
    layer.W_KQ[...] = zero.at[:, 0, :features, :features].set(W).at[:, 1, :features, features:-1].set(W)
    points = np.vstack([x, x_next, q])
    weight = np.exp(points @ (x @ W).T)
    weight /= weight.sum(1, keepdims=True)
    v = np.zeros(len(points))
    for _ in range(depth):
        v = v + rate * weight @ (r + gamma * v[n : 2 * n] - v[:n])
    arrays = map(jnp.asarray, (x, x_next, r, np.vstack([q, np.zeros((1, features))])))
    *at_q, at_zero = layer(prompts.td_prompt(*arrays, 1.0))  # gamma is in the value weights
    np.testing.assert_allclose(np.array(at_q) + gamma / (1 - gamma) * at_zero, v[2 * n :], rtol=1e-12)
