"""The from-scratch attention layer (Flax NNX), its trainer and its bench."""

from lindm.attention.layer import FullAttention, ReducedAttention, SoftmaxAttention, embed, moments, pad, sinusoidal
from lindm.attention.trainer import train, train_many

__all__ = [
    "FullAttention",
    "ReducedAttention",
    "SoftmaxAttention",
    "embed",
    "moments",
    "pad",
    "sinusoidal",
    "train",
    "train_many",
]
