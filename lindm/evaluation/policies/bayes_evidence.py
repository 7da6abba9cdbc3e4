"""What demonstrated actions tell of a model, and weights from log probabilities."""

import numpy as np


def action_evidence(best: np.ndarray, epsilon: float, num_actions: int) -> np.ndarray:
    """Log probability [K] of demonstrated actions, from whether each is the best action of each model [steps, K]."""
    hits = best.sum(0)
    misses = len(best) - hits
    if epsilon == 0:
        return np.where(misses, -np.inf, 0.0)
    return hits * np.log(1 - epsilon + epsilon / num_actions) + misses * np.log(epsilon / num_actions)


def normalized_weights(log_weight: np.ndarray) -> np.ndarray:
    """Weights [n, K] that sum to one; all alike where no model is possible."""
    top = log_weight.max(-1, keepdims=True)
    weight = np.exp(np.where(np.isfinite(top), log_weight - np.where(np.isfinite(top), top, 0), 0))
    return weight / weight.sum(-1, keepdims=True)
