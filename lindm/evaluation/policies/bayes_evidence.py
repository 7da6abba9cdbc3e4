"""What demonstrations tell of a model: probabilities of observations and of actions, and weights from log probabilities."""

from collections.abc import Sequence

import numpy as np

from lindm.solvers.belief import child_history, first_history, normalize, step_index
from lindm.text import Step
from lindm.types import APOMDP


def action_evidence(best: np.ndarray, epsilon: float, num_actions: int) -> np.ndarray:
    """Log probability [K] of demonstrated actions, from whether each is the best action of each model [steps, K]."""
    hits = best.sum(0)
    misses = len(best) - hits
    if epsilon == 0:
        return np.where(misses, -np.inf, 0.0)
    return hits * np.log(1 - epsilon + epsilon / num_actions) + misses * np.log(epsilon / num_actions)


def observation_probabilities(models: APOMDP, demonstrations: Sequence[Sequence[Step]]) -> np.ndarray:
    """Probabilities [K, steps] of the observations under K models, given actions, nature's models and the steps before.

    Steps are in the order of their stages, those of a stage in the order of the demonstrations.
    """
    P, O, rho = (np.asarray(getattr(models.models, name)) for name in ("P", "O", "rho"))
    belief, parts = np.zeros((0, *rho[:, 0].shape)), []
    rows = np.arange(len(demonstrations))
    for t in range(max(map(len, demonstrations))):
        taken = np.array([len(steps) > t for steps in demonstrations])[rows]
        rows = rows[taken]
        steps = [demonstrations[row][t] for row in rows]
        a, o = (np.array([getattr(step, name) for step in steps]) for name in ("action", "observation"))
        m = np.array([step.model or 0 for step in steps])
        belief = belief[taken] if t else np.moveaxis(rho[:, m], 1, 0)  # [demonstrations, K, S]
        # indices apart from each other put their axis in front: [demonstrations, K, ...]
        kernel, signal = P[:, m, min(t, P.shape[2] - 1), :, a], O[:, m, min(t, O.shape[2] - 1), a, :, o]
        belief, mass = normalize(np.einsum("dks,dksu->dku", belief, kernel) * signal)
        parts.append(mass)
    return np.concatenate(parts).T


def demonstrated_actions(problem: APOMDP, demonstrations: Sequence[Sequence[Step]]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [steps] of the histories in a table over all stages, and the actions [steps] there; any order of steps."""
    histories, actions = [], []
    for steps in demonstrations:
        history = 0
        for t, step in enumerate(steps):
            assert step.action is not None and step.observation is not None
            m, a, o = step.model or 0, step.action, step.observation
            B = problem.num_actions * problem.num_models * problem.num_observations
            histories.append(first_history(B, t) + history)
            actions.append(a)
            history = int(child_history(problem, t, history, step_index(problem, a, m, o)))
    return np.array(histories), np.array(actions)


def normalized_weights(log_weight: np.ndarray) -> np.ndarray:
    """Weights [n, K] that sum to one; all alike where no model is possible."""
    top = log_weight.max(-1, keepdims=True)
    weight = np.exp(np.where(np.isfinite(top), log_weight - np.where(np.isfinite(top), top, 0), 0))
    return weight / weight.sum(-1, keepdims=True)
