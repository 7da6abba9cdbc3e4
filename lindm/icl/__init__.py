"""In-context learning: the attention layer (Flax NNX) and its trainer; prompts, laws of features and labels, baseline predictors.

>>> import jax, jax.numpy as jnp
>>> from lindm.problems.regression import draw_regression
>>> def draw(key):  # 64 prompts of 16 pairs and 4 queries
...     one = lambda key: draw_regression(key, jnp.eye(2), jnp.eye(2), 16, 4)[:2]
...     return jax.vmap(one)(jax.random.split(key, 64))
>>> layer, losses = ld.icl.train(ld.icl.ReducedAttention(2), draw, jax.random.key(0), steps=100)
>>> bool(losses[-10:].mean() < 0.5 * losses[:10].mean())
True
"""

from lindm.icl import feature_laws
from lindm.icl.attention import FullAttention, ReducedAttention, SoftmaxAttention, embed, moments, pad, query_columns, sinusoidal
from lindm.icl.feature_laws import FeatureLaw
from lindm.icl.trainer import predict_many, train, train_many

__all__ = [
    "FeatureLaw",
    "FullAttention",
    "ReducedAttention",
    "SoftmaxAttention",
    "embed",
    "feature_laws",
    "moments",
    "pad",
    "predict_many",
    "query_columns",
    "sinusoidal",
    "train",
    "train_many",
]
