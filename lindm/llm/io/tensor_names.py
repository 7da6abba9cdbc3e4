"""The table that maps the tensors of a Hugging Face file to the weights of the decoder, for reading and for writing.

A file has one tensor per layer, with kernels [out, in]; the decoder has one array for all layers, with kernels [in, out].
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from flax import nnx

from lindm.llm.config import ModelConfig
from lindm.llm.model import abstract_decoder
from lindm.llm.model_families import FAMILIES, NormOrder

TOP_LEVEL = {"embedding": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "lm_head": "lm_head.weight"}
MODULES = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    "norm_q": "self_attn.q_norm",
    "norm_k": "self_attn.k_norm",
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
# norms of a layer by where they stand: the same name means another norm in another family
NORMS: dict[NormOrder, dict[str, str]] = {
    "before": {"norm_attention": "input_layernorm", "norm_mlp": "post_attention_layernorm"},
    "after": {"norm_attention_out": "post_attention_layernorm", "norm_mlp_out": "post_feedforward_layernorm"},
    "both": {
        "norm_attention": "input_layernorm",
        "norm_attention_out": "post_attention_layernorm",
        "norm_mlp": "pre_feedforward_layernorm",
        "norm_mlp_out": "post_feedforward_layernorm",
    },
}
ORDER = (  # of the modules of a layer, as they compute
    *("norm_attention", "q", "k", "v", "o", "norm_q", "norm_k", "norm_attention_out"),
    *("norm_mlp", "gate", "up", "down", "norm_mlp_out"),
)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor that a file must have, or, where the family has one tensor for several modules, rows of one."""

    name: str
    shape: tuple[int, ...]  # in the file
    first_row: int = 0  # of the rows that are this weight's
    rows: int  # number of them
    path: str  # of the decoder's weight, such as blocks.q.kernel
    layer: int | None  # index on the first axis of that weight; None: the tensor is the whole weight
    transposed: bool  # the file has the transpose


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of a file for this configuration, in the order of computation, layer by layer."""
    _, state = nnx.split(abstract_decoder(config))
    shapes = {".".join(map(str, keys)): leaf.shape for keys, leaf in nnx.to_flat_state(state)}
    yield _spec("embedding", TOP_LEVEL["embedding"], shapes, None)
    modules = stored_modules(config)
    for layer in range(config.num_layers):
        for name, parts in modules.items():
            for leaf in ("weight", "kernel", "bias"):
                if f"blocks.{parts[0]}.{leaf}" in shapes:
                    tensor = f"model.layers.{layer}.{name}.{'weight' if leaf == 'kernel' else leaf}"
                    yield from _joined([_spec(f"blocks.{part}.{leaf}", tensor, shapes, layer) for part in parts])
    yield _spec("norm.weight", TOP_LEVEL["norm.weight"], shapes, None)
    if not config.tie_word_embeddings:
        yield _spec("lm_head", TOP_LEVEL["lm_head"], shapes, None)


def stored_modules(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The modules of a layer in a file, in the order of computation, and those of the decoder whose rows each has."""
    fused = FAMILIES[config.model_type].tensors
    names = MODULES | NORMS[config.norm_order] | {part: name for name, parts in fused.items() for part in parts}
    return {names[module]: fused.get(names[module], (module,)) for module in ORDER if module in names}


def _joined(specs: list[TensorSpec]) -> Iterator[TensorSpec]:
    """Specs of the rows of one tensor, from specs of tensors."""
    rows = sum(spec.rows for spec in specs)
    for spec in specs:
        before = sum(other.rows for other in specs[: specs.index(spec)])
        yield replace(spec, shape=(rows, *spec.shape[1:]), first_row=before)


def _spec(path: str, name: str, shapes: dict[str, tuple[int, ...]], layer: int | None) -> TensorSpec:
    shape = shapes[path] if layer is None else shapes[path][1:]
    transposed = path == "lm_head" or path.endswith(".kernel")
    shape = shape[::-1] if transposed else shape
    return TensorSpec(name=name, shape=shape, rows=shape[0], path=path, layer=layer, transposed=transposed)
