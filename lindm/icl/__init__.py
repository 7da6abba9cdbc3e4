"""In-context learning: the attention layer (Flax NNX) and its trainer; prompts, label laws and baseline predictors."""

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
