"""The from-scratch attention layer (Flax NNX), its trainer and its bench."""

from lindm.icl.attention import FullAttention, ReducedAttention, SoftmaxAttention, embed, moments, pad, query_columns, sinusoidal
from lindm.icl.trainer import predict_many, train, train_many

__all__ = [
    "FullAttention",
    "ReducedAttention",
    "SoftmaxAttention",
    "embed",
    "moments",
    "pad",
    "predict_many",
    "query_columns",
    "sinusoidal",
    "train",
    "train_many",
]
