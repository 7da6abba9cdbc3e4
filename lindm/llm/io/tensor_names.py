"""Which tensor of a Hugging Face file is which part of which of our weights: one table, read in both directions.

A file has one tensor a layer and kernels as [out, in]; here all layers are one array and kernels are [in, out].
"""

from collections.abc import Iterator
from dataclasses import dataclass

from flax import nnx

from lindm.llm.config import ModelConfig
from lindm.llm.model import abstract_decoder

TOP = {"embedding": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "lm_head": "lm_head.weight"}
MODULES = {
    "norm_attention": "input_layernorm",
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    "norm_q": "self_attn.q_norm",
    "norm_k": "self_attn.k_norm",
    "norm_mlp": "post_attention_layernorm",
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
HEAD = TOP["lm_head"]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]  # in the file
    path: str  # of the weight of ours, blocks.q.kernel
    layer: int | None  # its place on the first axis of that weight; None: it is the whole
    turned: bool  # the file has the transpose


def tensors(model_config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor that a file of this architecture has, in the order of computation, layer after layer."""
    _, state = nnx.split(abstract_decoder(model_config))
    shapes = {".".join(map(str, keys)): leaf.shape for keys, leaf in nnx.to_flat_state(state)}
    yield _tensor("embedding", shapes, None)
    for layer in range(model_config.num_layers):
        for module in MODULES:
            for leaf in ("weight", "kernel", "bias"):
                if (path := f"blocks.{module}.{leaf}") in shapes:
                    yield _tensor(path, shapes, layer)
    yield _tensor("norm.weight", shapes, None)
    if not model_config.tie_word_embeddings:
        yield _tensor("lm_head", shapes, None)


def _tensor(path: str, shapes: dict[str, tuple[int, ...]], layer: int | None) -> Tensor:
    shape = shapes[path] if layer is None else shapes[path][1:]
    turned = path == "lm_head" or path.endswith(".kernel")
    return Tensor(name=name(path, layer), shape=shape[::-1] if turned else shape, path=path, layer=layer, turned=turned)


def name(path: str, layer: int | None) -> str:
    """The tensor's name in a file."""
    if layer is None:
        return TOP[path]
    _, module, leaf = path.split(".")
    return f"model.layers.{layer}.{MODULES[module]}.{'weight' if leaf == 'kernel' else leaf}"
