"""The presets of `lindm sft`: randomly initialized models with a vocabulary of the dataset's own symbols.

The initial weights have a standard deviation of 1 / sqrt(hidden_size), far more than in large models: these models then learn
many times faster.
"""

from typing import NamedTuple

from lindm.choices import Preset
from lindm.llm.config import ModelConfig

STEPS = 500  # by default


class PresetModel(NamedTuple):
    """A model, whose vocabulary has at most the size that its configuration has, and the default learning rate."""

    config: ModelConfig
    learning_rate: float


def _llama(hidden_size: int, num_layers: int, init_std: float) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=512,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=hidden_size // 32,
        num_kv_heads=hidden_size // 32,
        head_dim=32,
        intermediate_size=3 * hidden_size,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        init_std=init_std,
    )


PRESETS: dict[Preset, PresetModel] = {
    "tiny": PresetModel(_llama(160, 4, 0.08), 1e-3),  # 1.4 million weights
    "small": PresetModel(_llama(320, 8, 0.056), 5e-4),  # 10.8 million weights
}
