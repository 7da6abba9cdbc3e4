"""The optimizer: AdamW with linear warm-up, cosine decay and clipping by the global norm of the gradient."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lindm.llm.parallel.sharding import WEIGHT_AXES, weight_path

MATRICES = {path for path in WEIGHT_AXES if not path.endswith(".bias")}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov, Hutter, 2019); the learning rate rises linearly and then falls as a cosine to `floor` times its peak.

    Raises:
      ValueError: a value out of its range, with the name of the argument.
    """

    steps: int
    learning_rate: float = 2e-4
    """peak"""
    warmup: float = 0.1
    """fraction of the steps"""
    floor: float = 0.1
    """last learning rate as a fraction of the peak"""
    weight_decay: float = 0.0
    """of matrices; norms and biases are never decayed"""
    clip: float = 1.0
    """maximum global norm of the gradient"""
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self):
        rules = {
            "steps": (self.steps >= 1, "at least 1"),
            "learning_rate": (self.learning_rate >= 0, "at least 0"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "floor": (0 <= self.floor <= 1, "in [0, 1]"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "clip": (self.clip > 0, "above 0"),
            "beta1": (0 <= self.beta1 < 1, "in [0, 1)"),
            "beta2": (0 <= self.beta2 < 1, "in [0, 1)"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {rule}; got {getattr(self, name)}")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW with the learning-rate schedule of the config."""
    return optax.chain(
        optax.stateless(lambda grads, _: clip_by_global_norm(grads, config.clip)),
        optax.adamw(learning_rate_schedule(config), config.beta1, config.beta2, weight_decay=config.weight_decay, mask=is_matrix),
    )


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Step -> learning rate: linear warm-up of at least one step, then a cosine to `floor` times the peak."""
    warmup_steps = min(max(1, round(config.warmup * config.steps)), config.steps)
    warmup = optax.linear_schedule(config.learning_rate / warmup_steps, config.learning_rate, max(warmup_steps - 1, 1))
    decay = optax.cosine_decay_schedule(config.learning_rate, max(config.steps - warmup_steps, 1), config.floor)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def clip_by_global_norm(grads: Any, max_norm: float) -> Any:
    """optax's `clip_by_global_norm` as one product, which XLA fuses with what follows; a division would be written out first."""
    scale = max_norm / jnp.maximum(optax.tree.norm(grads), max_norm)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)


def is_matrix(params: Any) -> Any:
    """A tree of booleans: which weights are matrices. By name, since stacked norms and biases have two axes too."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: weight_path(keys) in MATRICES, params)
