r"""The optimizer: AdamW or Adafactor with linear warm-up, cosine decay and clipping by the global norm of the gradient.

Bytes of state per trained weight, beside the weight itself (4): AdamW 8; with first moments in bfloat16 6; Adafactor nearly none
for a matrix with sides of at least 128, and 4 for other weights.

Second moments stay in float32. Where the gradient keeps its size, a step changes them by a part of 1 - beta2 = 0.01, and bfloat16
has eight bits: a change below 1/512 of the value would be rounded away, so the moments would not follow. The first moments change
by a part of 1 - beta1 = 0.1, with an error that the gradient of every step renews.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lindm.choices import Moments, Optimizer, check_choices
from lindm.llm.config import ModelConfig
from lindm.llm.parallel.sharding import WEIGHT_AXES, weight_path
from lindm.llm.sft.options import Method

MIN_FACTORED_SIDE = 128  # of matrices whose second moments Adafactor keeps by rows and columns, as in optax
MATRICES = {path for path in WEIGHT_AXES if not path.endswith(".bias")}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov, Hutter, 2019) or Adafactor (Shazeer, Stern, 2018) without its relative step size, so that both have the
    same learning rates; the learning rate rises linearly and then falls as a cosine to `floor` times its peak.

    Raises:
      ValueError: a value out of its range, with the name of the argument.
    """

    steps: int
    optimizer: Optimizer = "adamw"
    moments: Moments = "f32"
    """storage of AdamW's first moments"""
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
        check_choices(self)
        if self.optimizer == "adafactor" and self.moments != "f32":
            raise ValueError(f"moments must be f32 with optimizer adafactor, which has no first moments; got {self.moments!r}")
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
    """Clipping, then the optimizer with the learning-rate schedule of the config."""
    clip = optax.stateless(lambda grads, _: clip_by_global_norm(grads, config.clip))
    rate, decay = learning_rate_schedule(config), config.weight_decay
    if config.optimizer == "adafactor":
        return optax.chain(
            clip,
            optax.scale_by_factored_rms(min_dim_size_to_factor=MIN_FACTORED_SIDE),
            optax.stateless(lambda updates, _: clip_by_layer_rms(updates, 1.0)),
            optax.add_decayed_weights(decay, is_matrix),
            optax.scale_by_learning_rate(rate),
        )
    mu_dtype = jnp.bfloat16 if config.moments == "bf16" else None
    return optax.chain(clip, optax.adamw(rate, config.beta1, config.beta2, weight_decay=decay, mask=is_matrix, mu_dtype=mu_dtype))


def default_learning_rate(method: Method, config: ModelConfig) -> float:
    """5e-5 (2000 / hidden_size)^p for all weights, and ten times as much for adapters, in two digits.

    Source: Schulman et al., LoRA Without Regret (Thinking Machines Lab, 2025), and the formula of the Tinker documentation, whose
    exponents p were fitted to Llama (0.781) and Qwen (0.0775) models of 1 to 70 billion weights; other families have that of
    Llama. Below a width of 512, far from those models, the rate is that of 512.
    """
    exponent = 0.0775 if config.model_type.startswith("qwen") else 0.781
    rate = 5e-5 * (2000 / max(config.hidden_size, 512)) ** exponent
    return float(f"{rate if method == 'full' else 10 * rate:.1e}")


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


def clip_by_layer_rms(updates: Any, most: float) -> Any:
    """Every update divided by max(1, rms / most), layer by layer where layers are stacked; rms over the entries of one weight."""

    def clip(keys: Any, u: jax.Array) -> jax.Array:
        axes = tuple(range(weight_path(keys).startswith("blocks."), u.ndim))
        rms = jnp.sqrt(jnp.mean(u * u, axis=axes, keepdims=True))
        return u / jnp.maximum(1.0, rms / most)

    return jax.tree_util.tree_map_with_path(clip, updates)


def is_matrix(params: Any) -> Any:
    """A tree of booleans: which weights are matrices. By name, since stacked norms and biases have two axes too."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: weight_path(keys) in MATRICES, params)
