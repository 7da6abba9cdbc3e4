"""Every rung of a case against the loss and against the theory's functions called by hand."""

import jax
import numpy as np
import pytest

import lindm as ld
from lindm.icl.label_laws import oracle_labels
from lindm.icl.prompts import stage_prompts
from lindm.problems.linear_mdp import draw_task, simplex_family, tabulate
from lindm.solvers.dp import plan_linear
from lindm.solvers.rollout import cumulative


@pytest.fixture(scope="module")
def layer():
    """A problem, its prompts of M pairs, and weights that are not the best."""
    keys = jax.random.split(jax.random.key(5), 3)
    family = simplex_family(keys[0], 5, 3, 3, 2)
    problem = draw_task(keys[1], family)
    w = plan_linear(problem)[1]
    prompts = stage_prompts(keys[2], family.phi, cumulative(family.design), 2, 20, lambda key, idx, x: oracle_labels(x, w))
    weights = np.stack([2.0 * np.eye(3), 3.0 * np.eye(3) + 0.1])
    return problem, prompts, weights


def case_of(layer, **more):
    problem, prompts, weights = layer
    return ld.theory.Case.of(problem, weights=weights, prompts=prompts, Psi=np.stack([np.eye(3)] * 2), delta=0.1, **more)


def test_every_rung_has_one_signature_and_holds(layer):
    case = case_of(layer)
    found = ld.theory.bounds(case)
    assert list(found) == list(ld.theory.RUNGS)
    assert found["suboptimality"] > 0.01
    assert found["identity"] == pytest.approx(found["suboptimality"], rel=1e-12)
    order = ["identity", "span_per_state", "span_per_stage", "sup_norm", "error_parts"]
    values = [found[name] for name in order]
    assert values == sorted(values) and found["high_probability"] > found["sup_norm"]
    assert found["identity"] <= found["margin"] <= found["span_per_stage"]
    assert found["expected_tight"] <= found["expected"]


def test_the_loss_and_the_sup_norm_are_those_of_numpy(layer):
    case = case_of(layer)
    problem, prompts, weights = layer
    mdp = tabulate(problem)
    P, r, rho = (np.asarray(a) for a in (mdp.P, mdp.r, mdp.rho))
    S = np.einsum("hm,hmd->hd", prompts.y, prompts.x) / 20
    Qhat = np.einsum("sad,hde,he->hsa", problem.phi, weights, S)
    np.testing.assert_allclose(case.Qhat, Qhat, rtol=1e-12)
    best, V = np.zeros(5), np.zeros(5)
    errors, visits = [], [rho]
    for h in (1, 0):
        Q = r[h] + P[h] @ best
        chosen = Qhat[h].argmax(-1)
        V = (r[h] + P[h] @ V)[np.arange(5), chosen]
        best = Q.max(-1)
        errors.insert(0, np.abs(Qhat[h] - Q).max(-1))
    visits.append(rho @ P[0][np.arange(5), Qhat[0].argmax(-1)])
    found = ld.theory.bounds(case)
    assert found["suboptimality"] == pytest.approx(rho @ (best - V), rel=1e-10)
    assert found["sup_norm"] == pytest.approx(2 * sum(v @ e for v, e in zip(visits, errors, strict=True)), rel=1e-10)


def test_the_policy_of_a_case_and_its_occupancy_need_no_double_precision_of_the_process(layer):
    case = case_of(layer)
    expected = np.asarray(case.occupancy)
    with jax.enable_x64(False):
        np.testing.assert_array_equal(case.occupancy, expected)


def test_trained_weights_add_the_optimization_part(layer):
    plain = ld.theory.bounds(case_of(layer))["error_parts"]
    assert ld.theory.bounds(case_of(layer, best_weights=layer[2]))["error_parts"] == pytest.approx(plain, rel=1e-12)
    assert ld.theory.bounds(case_of(layer, best_weights=layer[2] * 0.5))["error_parts"] != pytest.approx(plain, rel=1e-3)


def test_without_features_the_rungs_on_qhat_remain(layer):
    mdp = tabulate(layer[0])
    case = ld.theory.Case.of(mdp, case_of(layer).Qhat)
    found = ld.theory.bounds(case)
    assert found == pytest.approx({name: ld.theory.bounds(case_of(layer))[name] for name in found}, rel=1e-10)
    with pytest.raises(ValueError, match="rung error_parts needs phi, design, w, weights, context of the case"):
        ld.theory.RUNGS["error_parts"](case)


@pytest.mark.parametrize(
    "message, arguments",
    [
        (r"Qhat must have shape \[H, S, A\] = \(2, 5, 3\)", {"Qhat": np.zeros((2, 5, 2))}),
        ("Qhat must be finite", {"Qhat": np.full((2, 5, 3), np.nan)}),
        ("Qhat must be given, or weights and prompts", {}),
        (r"weights must have shape", {"Qhat": np.zeros((2, 5, 3)), "weights": np.eye(3)}),
        ("delta must be a number in", {"Qhat": np.zeros((2, 5, 3)), "delta": 2.0}),
    ],
)
def test_a_wrong_case_is_named(message, arguments, layer):
    with pytest.raises(ValueError, match=message):
        ld.theory.Case.of(layer[0], **arguments)
