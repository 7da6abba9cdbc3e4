"""Cosines and sines of the rotary position embedding for given positions, of each kind of rotation that a model's layers have.

Shapes: B rows, T tokens, R rotated coordinates of a head.
"""

import jax
import jax.numpy as jnp
from jax import Array

from lindm.llm.config import ModelConfig
from lindm.llm.rope import RopeParameters, rope_frequencies


def in_long_document(config: ModelConfig, positions: Array, segment_ids: Array | None) -> Array | bool:
    """Which tokens are of a document longer than `original_max_position_embeddings`: [B, T] or [B, 1]; False without longrope."""
    rope, T = config.rope_parameters, positions.shape[1]
    if rope.rope_type != "longrope":
        return False
    last = positions.max(axis=1, keepdims=True)
    if segment_ids is not None:
        ends = jnp.concatenate([segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones_like(last, bool)], axis=1)
        end = jax.lax.cummin(jnp.where(ends, jnp.arange(T)[None], T), axis=1, reverse=True)
        last = jnp.take_along_axis(positions, end, axis=1)
    return last >= rope.original_max_position_embeddings


def rope_tables(config: ModelConfig, positions: Array, long: Array | bool) -> tuple[tuple[Array, Array], list[int]]:
    """Cosines and sines [kinds, B, T, R/2] of each kind of rotation that the layers have, and the kind of each layer.

    long: of `in_long_document`.
    """
    main, sliding = config.rope_parameters, config.sliding_rope_parameters
    windows = config.sliding_windows or (0,) * config.num_layers
    none: RopeParameters | None = None
    of_layer = [
        none if layer in config.no_rope_layers else sliding if windows[layer] and sliding is not None else main
        for layer in range(config.num_layers)
    ]
    kinds = list(dict.fromkeys(of_layer))
    like = next((rope for rope in kinds if rope is not None), main)
    cosines, sines = [], []
    for rope in kinds:
        frequencies = jnp.array(rope_frequencies(rope or like, config.head_dim), jnp.float32)[None, None]
        turns = positions[..., None].astype(jnp.float32)
        angles = turns * (frequencies if rope is not None else jnp.zeros_like(frequencies))
        if rope is not None and rope.rope_type == "longrope":
            of_long = jnp.array(rope_frequencies(rope, config.head_dim, long=True), jnp.float32)[None, None]
            angles = jnp.where(jnp.asarray(long)[..., None], turns * of_long, angles)
        factor = 1.0 if rope is None else rope.attention_factor
        cosines.append(factor * jnp.cos(angles))
        sines.append(factor * jnp.sin(angles))
    return (jnp.stack(cosines), jnp.stack(sines)), [kinds.index(rope) for rope in of_layer]
