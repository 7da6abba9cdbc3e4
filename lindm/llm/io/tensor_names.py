"""The table that maps the tensors of a Hugging Face file to the weights of the decoder, for reading and for writing.

A file has one tensor per layer, with kernels [out, in]; the decoder has one array for all layers, with kernels [in, out].
"""

from collections.abc import Iterator
from dataclasses import dataclass

from flax import nnx

from lindm.llm.config import ModelConfig
from lindm.llm.model import abstract_decoder

TOP_LEVEL = {"embedding": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "lm_head": "lm_head.weight"}
MODULES = {
    "norm_attention": "input_layernorm",
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    "norm_q": "self_attn.q_norm",
    "norm_k": "self_attn.k_norm",
    "norm_mlp": "post_attention_layernorm",
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor that a file must have."""

    name: str
    shape: tuple[int, ...]  # in the file
    path: str  # of the decoder's weight, such as blocks.q.kernel
    layer: int | None  # index on the first axis of that weight; None: the tensor is the whole weight
    transposed: bool  # the file has the transpose


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of a file for this configuration, in the order of computation, layer by layer."""
    _, state = nnx.split(abstract_decoder(config))
    shapes = {".".join(map(str, keys)): leaf.shape for keys, leaf in nnx.to_flat_state(state)}
    yield _spec("embedding", shapes, None)
    for layer in range(config.num_layers):
        for module in MODULES:
            for leaf in ("weight", "kernel", "bias"):
                if (path := f"blocks.{module}.{leaf}") in shapes:
                    yield _spec(path, shapes, layer)
    yield _spec("norm.weight", shapes, None)
    if not config.tie_word_embeddings:
        yield _spec("lm_head", shapes, None)


def _spec(path: str, shapes: dict[str, tuple[int, ...]], layer: int | None) -> TensorSpec:
    shape = shapes[path] if layer is None else shapes[path][1:]
    transposed = path == "lm_head" or path.endswith(".kernel")
    shape = shape[::-1] if transposed else shape
    return TensorSpec(name=_tensor_name(path, layer), shape=shape, path=path, layer=layer, transposed=transposed)


def _tensor_name(path: str, layer: int | None) -> str:
    if layer is None:
        return TOP_LEVEL[path]
    _, module, leaf = path.split(".")
    return f"model.layers.{layer}.{MODULES[module]}.{'weight' if leaf == 'kernel' else leaf}"
