"""Weights from a Hugging Face directory into a decoder, and from a decoder into such a directory.

Loading: everything is checked against the architecture from the files' headers, before any weight is read. Then one weight after
another is read, each device's part of it straight from the slices of the files where it lies; kernels that are to be held in
fewer bits are converted as they come, so that neither a file nor the model is ever in memory twice. Saving goes tensor by tensor
too, adapters merged on the way, and the directory appears whole or not at all. With several processes each reads its own parts,
and the first one writes what all gather.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from lindm.errors import KINDS, DataError, kind_number
from lindm.io.directories import atomic_directory, copy_file
from lindm.io.files import write_json
from lindm.llm.config import CONFIG, BaseFormat, ModelConfig, read_config_json, read_model_config, to_config_json
from lindm.llm.io import safetensors_files
from lindm.llm.io.safetensors_files import DTYPES, READABLE, Stored
from lindm.llm.io.tensor_names import HEAD, TOP, Tensor
from lindm.llm.io.tensor_names import tensors as expected
from lindm.llm.lora import quantize_kernel
from lindm.llm.model import Decoder, Linear, abstract_decoder
from lindm.llm.parallel.sharding import weight_path, weight_spec

BESIDE = (  # what a model's directory may have beside weights and configuration: its text, and how it is asked to generate
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
TORCH = {"f32": "float32", "bf16": "bfloat16"}


# --- in --------------------------------------------------------------------------------------------------------------------


def load(directory: Path, *, mesh: Mesh | None = None, base: BaseFormat = "f32", dtype: DTypeLike = jnp.float32) -> Decoder:
    """The decoder of a Hugging Face directory.

    Args:
      mesh: where the weights lie (`lindm.llm.parallel.sharding`); None: whole on one device.
      base: what the kernels of the blocks are held in, f32, bf16, int8 or nf4; they are frozen unless it is f32.
      dtype: of everything else, and of the kernels where base is f32.

    Raises:
      ValueError: a base that is not known or does not fit the kernels, a mesh that does not divide a weight.
      LindmError: 3, naming file and tensor or key, for a directory that does not hold exactly this architecture in f32, bf16 or
        f16.
    """
    if base not in get_args(BaseFormat):
        raise ValueError(f"base must be one of {', '.join(get_args(BaseFormat))}; got {base!r}")
    model_config = read_model_config(directory)
    stored = check(directory, model_config)
    model = abstract_decoder(model_config, dtype)
    parts: dict[str, list[Tensor]] = {}
    for tensor in expected(model_config):
        parts.setdefault(tensor.path, []).append(tensor)
    plans = {path: _Plan(model, path, mesh, base) for path in parts}  # all of them, before the first is read
    for path, plan in plans.items():
        plan.fill(parts[path], stored)
    return model


def check(directory: Path, model_config: ModelConfig) -> dict[str, Stored]:
    """The tensors of a directory, from their headers, if they are those of the architecture; DataError, naming one, otherwise."""
    stored = safetensors_files.inventory(directory)
    for name, there in stored.items():
        if there.dtype not in READABLE:
            raise DataError(f"{there.file}: {name} must be held as one of {', '.join(READABLE)}; got {there.dtype}")
    wanted = {tensor.name: tensor for tensor in expected(model_config)}
    for name, tensor in wanted.items():
        if name not in stored:
            raise DataError(f"{directory} lacks the tensor {name}")
        if stored[name].shape != tensor.shape:
            raise DataError(f"{stored[name].file}: {name} must be {list(tensor.shape)}; got {list(stored[name].shape)}")
    for name in sorted(stored.keys() - wanted.keys()):
        if name == HEAD:  # of a tied model: transformers unties it where the two differ
            _check_tied(stored[HEAD], stored[TOP["embedding"]])
        elif not name.endswith("rotary_emb.inv_freq"):  # follows from the config
            raise DataError(f"{stored[name].file}: holds {name}, which this architecture does not have")
    return stored


def _check_tied(head: Stored, embedding: Stored) -> None:
    ours, theirs = (safetensors_files.opened(s.file).get_slice(n) for s, n in ((head, HEAD), (embedding, TOP["embedding"])))
    rows, step = embedding.shape[0], 4096
    parts = (slice(at, min(at + step, rows)) for at in range(0, rows, step))
    if head.shape != embedding.shape or not all(np.array_equal(ours[part], theirs[part]) for part in parts):
        raise DataError(f"{head.file}: {HEAD} differs from the embedding, although {CONFIG} says tie_word_embeddings")


def _part(part: list[Tensor], files: dict[str, Any], dtype: DTypeLike, index: tuple[slice, ...]) -> np.ndarray:
    """The slices of a weight of ours, [layers, in, out] where it is stacked, from the tensors of the files."""
    inner = index if part[0].layer is None else index[1:]
    rows = part if part[0].layer is None else part[index[0]]
    out: np.ndarray | None = None
    for i, tensor in enumerate(rows):
        value = files[tensor.name].get_slice(tensor.name)[tuple(inner[::-1] if tensor.turned else inner)]
        value = value.T if tensor.turned else value
        out = np.empty((len(rows), *value.shape), dtype) if out is None else out
        out[i] = value
    assert out is not None
    return out[0] if part[0].layer is None else out


class _Plan:
    """Where one weight of the abstract model comes to lie, and as what."""

    def __init__(self, model: Decoder, path: str, mesh: Mesh | None, base: BaseFormat):
        *owners, self.leaf = path.split(".")
        self.owner = functools.reduce(getattr, owners, model)
        self.variable: nnx.Variable = getattr(self.owner, self.leaf)
        self.base = base if self.leaf == "kernel" else "f32"
        self.shape = self.variable.get_value().shape

        def lies(path: str, shape: tuple[int, ...]) -> Sharding:
            if mesh is None:
                return SingleDeviceSharding(jax.local_devices()[0])
            return NamedSharding(mesh, weight_spec(path, shape, mesh))

        self.sharding = lies(path, self.shape)
        if self.base in ("int8", "nf4"):
            kernel = jax.ShapeDtypeStruct(self.shape, jnp.float32)
            self.graphdef, shapes = nnx.split(nnx.eval_shape(lambda k: quantize_kernel(k, base), kernel))
            self.parts = jax.tree_util.tree_map_with_path(lambda k, leaf: lies(f"{path}.{weight_path(k)}", leaf.shape), shapes)

    def fill(self, part: list[Tensor], stored: dict[str, Stored]) -> None:
        """Read the weight into the model. The files are mapped only for so long: what was read does not stay in memory."""
        kinds, opened = {stored[t.name].dtype for t in part}, functools.cache(safetensors_files.opened)
        files = {t.name: opened(stored[t.name].file) for t in part}

        def read(dtype: DTypeLike) -> jax.Array:
            return jax.make_array_from_callback(self.shape, self.sharding, _once(functools.partial(_part, part, files, dtype)))

        if self.base == "f32":
            self.variable.set_value(read(self.variable.get_value().dtype))
        elif self.base == "bf16":
            setattr(self.owner, self.leaf, nnx.data(quantize_kernel(read(jnp.bfloat16), "bf16")))
        else:
            kernel = read(jnp.bfloat16 if kinds == {"BF16"} else jnp.float32)
            leaves, treedef = jax.tree.flatten(self.parts)
            packed = _packing(self.base, treedef, tuple(leaves))(kernel)
            setattr(self.owner, self.leaf, nnx.data(nnx.merge(self.graphdef, packed)))


@functools.cache
def _packing(base: BaseFormat, treedef: Any, shardings: tuple[Sharding, ...]) -> Callable[[jax.Array], nnx.State]:
    """From a kernel to the parts of what holds it, one layer after another."""

    def packed(kernel: jax.Array) -> nnx.State:
        return jax.lax.map(lambda layer: nnx.state(quantize_kernel(layer, base)), kernel)

    return jax.jit(packed, out_shardings=jax.tree.unflatten(treedef, shardings))


def _once(read: Callable[[tuple[slice, ...]], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Devices that hold the same part share what was read."""
    known: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return known[key] if (key := str(index)) in known else known.setdefault(key, read(index))

    return part


# --- out -------------------------------------------------------------------------------------------------------------------


def save(
    model: Decoder,
    directory: Path,
    *,
    like: Path | None = None,
    dtype: str = "f32",
    limit: int = safetensors_files.LIMIT,
    extra_config: dict[str, Any] | None = None,
) -> None:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads; adapters are merged, packed kernels put together.

    Args:
      directory: where it appears, whole, at the end.
      like: the directory the model came from: its tokenizer, its generation_config.json and its special tokens go along.
      dtype: f32 or bf16, of the files; limit: bytes of one file.
      extra_config: further keys of config.json.

    Raises:
      ValueError: another dtype.
      LindmError: 2 where something is there already, 7 where the disk refuses; nothing is left behind then.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    wanted = list(expected(model.config))
    known = read_config_json(like / CONFIG) if like is not None and (like / CONFIG).exists() else {}
    ids = {f"{name}_token_id": known.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}  # left out, they would be 1 and 2
    config = to_config_json(model.config, **ids | {"dtype": TORCH[dtype]} | (extra_config or {}))

    def write(values: Iterator[np.ndarray]) -> None:
        with atomic_directory(directory) as temporary:
            write_json(temporary / CONFIG, config)
            for name in BESIDE if like is not None else ():
                if like is not None and (like / name).is_file():
                    copy_file(like / name, temporary / name)
            safetensors_files.write(temporary, {t.name: t.shape for t in wanted}, values, dtype, limit)

    by_the_first(directory, _values(model, wanted), write)


def by_the_first(directory: Path, values: Iterable[np.ndarray], write: Callable[[Iterator[np.ndarray]], None]) -> None:
    """The first process writes; the others take their part in gathering the values, and fail where it failed."""
    stream, problem = iter(values), None
    if jax.process_index() == 0:
        try:
            write(stream)
        except Exception as e:
            problem = e
    if jax.process_count() > 1:
        for _ in stream:  # also those that the first did not come to take: gathering needs everybody
            pass
        kind = -1 if problem is None else kind_number(problem)
        kind = int(multihost_utils.broadcast_one_to_all(np.int32(kind)))
        if kind >= 0 and problem is None:
            raise KINDS[kind](f"process 0 could not write {directory}")
    if problem is not None:
        raise problem


def _values(model: Decoder, wanted: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """The tensors of a file, one after another, on the host."""
    for tensor in wanted:
        *owners, leaf = tensor.path.split(".")
        owner = functools.reduce(getattr, owners, model)
        if leaf == "kernel":
            graphdef, state = nnx.split(owner)
            value = gathered(_merged(graphdef, state, np.int32(tensor.layer or 0)))
        else:
            value = gathered(getattr(owner, leaf)[...] if tensor.layer is None else getattr(owner, leaf)[...][tensor.layer])
        yield value.T if tensor.turned else value


@functools.partial(jax.jit, static_argnums=0)
def _merged(graphdef: nnx.GraphDef[Linear], state: nnx.State, layer: jax.Array) -> jax.Array:
    """W + (alpha / rank) A B of one layer [in, out], in f32."""
    linear = nnx.merge(graphdef, jax.tree.map(lambda x: x[layer], state))
    kernel = linear.kernel
    dense = kernel[...].astype(jnp.float32) if isinstance(kernel, nnx.Variable) else kernel.dequantize(jnp.float32)
    if linear.lora_a is None or linear.lora_b is None:
        return dense
    a, b = (x[...].astype(jnp.float32) for x in (linear.lora_a, linear.lora_b))
    return dense + linear.lora_scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def gathered(array: jax.Array) -> np.ndarray:
    """The whole of an array, on every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
