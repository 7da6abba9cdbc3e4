"""Floating-point operations of a training step."""

import numpy as np

from lindm.llm.config import ModelConfig
from lindm.llm.sft.options import Method


def train_step_flops(config: ModelConfig, method: Method, rows: int, seq_len: int, max_labels: int) -> float:
    """Operations of the model's own arithmetic in one step on `rows` rows; recomputation is not counted.

    Matrices of the blocks: 2 per token and weight forward, and 2 more backward for each of the two gradients, of which adapters
    need one; attention over all seq_len keys; the head at labeled positions only.
    """
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.num_layers * (config.hidden_size * (2 * q + 2 * kv) + 3 * config.hidden_size * config.intermediate_size)
    attention = config.num_layers * 4 * seq_len * q
    passes = 3 if method == "full" else 2
    head = max_labels * passes * 2 * config.hidden_size * config.vocab_size
    return rows * (seq_len * (passes * 2 * weights + 3 * attention) + head)


def useful_flops(config: ModelConfig, method: Method, tokens: np.ndarray, labels: np.ndarray) -> float:
    """`train_step_flops` of documents of `tokens` [n] and `labels` [n] alone: each attends to itself, and nothing is padded."""
    return sum(train_step_flops(config, method, 1, *sizes) for sizes in zip(tokens.tolist(), labels.tolist(), strict=True))
