"""Weights from a Hugging Face directory into a decoder, and from a decoder into such a directory.

Loading first checks the headers of the files against the configuration. Then it reads one weight after another, each device its
own shard from slices of the files; kernels are quantized as they are read. So neither a file nor the model is in memory twice.
Saving writes tensor by tensor, merges adapters on the way, and renames the finished directory into place. With several processes
each reads its own shards; all take part in gathering, and the first one writes.
"""

import functools
import itertools
import math
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
from lindm.io.files import read_json, write_json
from lindm.io.progress import Progress
from lindm.io.provenance import write_provenance
from lindm.io.verification import verify_file_list, write_file_list
from lindm.llm.config import CONFIG, BaseFormat, ModelConfig, read_model_config, to_config_json
from lindm.llm.io import safetensors_files
from lindm.llm.io.safetensors_files import READABLE_DTYPES, FileDtype, StoredTensor
from lindm.llm.io.tensor_names import TOP_LEVEL, TensorSpec, tensor_specs
from lindm.llm.lora import dense_kernel, quantize_kernel
from lindm.llm.model import Decoder, Linear, abstract_decoder
from lindm.llm.parallel.sharding import weight_path, weight_spec

COMPANION_FILES = (  # tokenizer and generation settings that a model directory may have beside weights and configuration
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
BLOCK_VALUES = 2**24  # values that are in memory at a time while a file is checked
TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


# --- loading ---------------------------------------------------------------------------------------------------------------


def load(directory: Path, *, mesh: Mesh | None = None, base: BaseFormat = "f32", dtype: DTypeLike = jnp.float32) -> Decoder:
    """The decoder of a Hugging Face directory.

    Args:
      mesh: devices that the weights are sharded over (`lindm.llm.parallel.sharding`); None: one device.
      base: storage format of the kernels of the layers; they are frozen unless it is f32.
      dtype: of all other weights, and of the kernels where base is f32.

    Raises:
      ValueError: an unknown base, or one that does not fit the kernels; a mesh that does not divide a weight.
      DataError: the directory does not have exactly the tensors of its configuration in f32, bf16 or f16, or a file is not
        what lindm wrote; names file and tensor or key.
      NonFiniteError: a weight is NaN or infinite; names file and tensor.
    """
    if base not in get_args(BaseFormat):
        raise ValueError(f"base must be one of {', '.join(get_args(BaseFormat))}; got {base!r}")
    config = read_model_config(directory)
    stored = check_tensors(directory, config)
    model = abstract_decoder(config, dtype)
    specs: dict[str, list[TensorSpec]] = {}
    for spec in tensor_specs(config):
        specs.setdefault(spec.path, []).append(spec)
    loaders = {path: _WeightLoader(model, path, mesh, base) for path in specs}  # all checked before the first is read
    with Progress(quiet=jax.process_index() > 0) as progress:
        task = progress.add("load weights", total=len(loaders))
        for done, (path, loader) in enumerate(loaders.items(), start=1):
            loader.load(specs[path], stored)
            task.update(done)
    return model


def check_tensors(directory: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors of a directory, from their headers. Raises: DataError, naming one, if they are not those of `config`."""
    verify_file_list(directory)
    stored = safetensors_files.read_directory_headers(directory)
    for name, tensor in stored.items():
        if tensor.dtype not in READABLE_DTYPES:
            raise DataError(f"{tensor.file}: {name} must be of dtype {', '.join(READABLE_DTYPES)}; got {tensor.dtype}")
    specs = {spec.name: spec for spec in tensor_specs(config)}
    for name, spec in specs.items():
        if name not in stored:
            raise DataError(f"{directory} lacks the tensor {name}")
        if stored[name].shape != spec.shape:
            raise DataError(f"{stored[name].file}: {name} must be {list(spec.shape)}; got {list(stored[name].shape)}")
    lm_head, embedding = TOP_LEVEL["lm_head"], TOP_LEVEL["embedding"]
    for name in sorted(stored.keys() - specs.keys()):
        if name == lm_head:  # of a tied model: transformers unties it where the two differ
            _check_tied(stored[lm_head], stored[embedding])
        elif not name.endswith("rotary_emb.inv_freq"):  # follows from the configuration
            raise DataError(f"{stored[name].file}: has the tensor {name}, which this model does not have")
    return stored


def _check_tied(head: StoredTensor, embedding: StoredTensor) -> None:
    a, b = (
        safetensors_files.open_file(tensor.file).get_slice(TOP_LEVEL[path])
        for tensor, path in ((head, "lm_head"), (embedding, "embedding"))
    )
    rows, step = embedding.shape[0], 4096
    chunks = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
    if head.shape != embedding.shape or not all(np.array_equal(a[chunk], b[chunk]) for chunk in chunks):
        name = TOP_LEVEL["lm_head"]
        raise DataError(f"{head.file}: {name} differs from the embedding, although {CONFIG} says tie_word_embeddings")


def check_finite(stored: Iterable[tuple[str, StoredTensor]]) -> None:
    """NonFiniteError where a tensor of these files has a value that is NaN or infinite; names file and tensor."""
    for name, tensor in stored:
        view = safetensors_files.open_file(tensor.file).get_slice(name)
        rows = tensor.shape[0] if tensor.shape else 1
        step = max(1, BLOCK_VALUES * rows // max(math.prod(tensor.shape), 1))
        for start in range(0, rows, step):
            safetensors_files.require_finite(
                view[start : min(start + step, rows)] if tensor.shape else view[...], name, tensor.file
            )


def _read_slice(
    specs: list[TensorSpec], files: dict[str, Any], stored: dict[str, StoredTensor], dtype: DTypeLike, index: tuple[slice, ...]
) -> np.ndarray:
    """A slice of one weight of the decoder ([layers, in, out] if it is stacked) from the tensors of the files."""
    stacked = specs[0].layer is not None
    inner = index[1:] if stacked else index
    out: np.ndarray | None = None
    layers = specs[index[0]] if stacked else specs
    for i, spec in enumerate(layers):
        rows, *rest = inner[::-1] if spec.transposed else inner
        if spec.rows < spec.shape[0]:
            start, stop, _ = rows.indices(spec.rows)
            rows = slice(spec.first_row + start, spec.first_row + stop)
        value = files[spec.name].get_slice(spec.name)[(rows, *rest)]
        value = value.T if spec.transposed else value
        out = np.empty((len(layers), *value.shape), dtype) if out is None else out
        out[i] = value
        safetensors_files.require_finite(out[i], spec.name, stored[spec.name].file)
    assert out is not None
    return out if stacked else out[0]


class _WeightLoader:
    """Reads one weight of the decoder: its place in the abstract model, its sharding and its format."""

    def __init__(self, model: Decoder, path: str, mesh: Mesh | None, base: BaseFormat):
        *owners, self.leaf = path.split(".")
        self.owner = functools.reduce(getattr, owners, model)
        self.variable: nnx.Variable = getattr(self.owner, self.leaf)
        self.base: BaseFormat = base if self.leaf == "kernel" else "f32"
        self.shape = self.variable.get_value().shape

        def sharding_of(path: str, shape: tuple[int, ...]) -> Sharding:
            if mesh is None:
                return SingleDeviceSharding(jax.local_devices()[0])
            return NamedSharding(mesh, weight_spec(path, shape, mesh))

        self.sharding = sharding_of(path, self.shape)
        if self.base in ("int8", "nf4"):
            kernel = jax.ShapeDtypeStruct(self.shape, jnp.float32)
            self.graphdef, shapes = nnx.split(nnx.eval_shape(lambda k: quantize_kernel(k, base), kernel))
            self.quantized_shardings = jax.tree_util.tree_map_with_path(
                lambda keys, leaf: sharding_of(f"{path}.{weight_path(keys)}", leaf.shape), shapes
            )

    def load(self, specs: list[TensorSpec], stored: dict[str, StoredTensor]) -> None:
        """Read the weight into the model. Files are mapped only meanwhile, so what was read does not stay in memory."""
        dtypes, open_file = {stored[s.name].dtype for s in specs}, functools.cache(safetensors_files.open_file)
        files = {s.name: open_file(stored[s.name].file) for s in specs}

        def read(dtype: DTypeLike) -> jax.Array:
            read_slice = _cache_slices(functools.partial(_read_slice, specs, files, stored, dtype))
            return jax.make_array_from_callback(self.shape, self.sharding, read_slice)

        if self.base == "f32":
            self.variable.set_value(read(self.variable.get_value().dtype))
        elif self.base == "bf16":
            setattr(self.owner, self.leaf, nnx.data(quantize_kernel(read(jnp.bfloat16), "bf16")))
        else:
            kernel = read(jnp.bfloat16 if dtypes == {"BF16"} else jnp.float32)
            leaves, treedef = jax.tree.flatten(self.quantized_shardings)
            quantized = _quantizer(self.base, treedef, tuple(leaves))(kernel)
            setattr(self.owner, self.leaf, nnx.data(nnx.merge(self.graphdef, quantized)))


@functools.cache
def _quantizer(base: BaseFormat, treedef: Any, shardings: tuple[Sharding, ...]) -> Callable[[jax.Array], nnx.State]:
    """From a stacked kernel to the state of the quantized one, layer by layer."""

    def quantize(kernel: jax.Array) -> nnx.State:
        return jax.lax.map(lambda layer: nnx.state(quantize_kernel(layer, base)), kernel)

    return jax.jit(quantize, out_shardings=jax.tree.unflatten(treedef, shardings))


def _cache_slices(read: Callable[[tuple[slice, ...]], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Devices with the same shard share one read."""
    known: dict[str, np.ndarray] = {}

    def read_once(index: tuple[slice, ...]) -> np.ndarray:
        return known[key] if (key := str(index)) in known else known.setdefault(key, read(index))

    return read_once


# --- saving ----------------------------------------------------------------------------------------------------------------


def save(
    model: Decoder,
    directory: Path,
    *,
    like: Path | None = None,
    dtype: FileDtype = "f32",
    provenance: bool = False,
    max_shard_bytes: int = safetensors_files.MAX_SHARD_BYTES,
    edit: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads; adapters are merged, quantized kernels dequantized.

    Args:
      directory: appears at the end, complete.
      like: directory of the original model; its tokenizer, generation_config.json and special token ids are copied.
      dtype: of the files; max_shard_bytes: largest size of one file.
      provenance: write provenance.json, too. All other files depend on the model alone.
      edit: changes the small files of the directory before it appears; called on the first process.

    Raises:
      ValueError: an unknown dtype.
      UsageError: the directory exists and is not empty.
      NonFiniteError: a weight is NaN or infinite, or does not fit the dtype; names the tensor.
      StorageError: the disk is full or not writable. Nothing is left behind.
    """
    if dtype not in get_args(FileDtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(FileDtype))}; got {dtype!r}")
    specs = list(tensor_specs(model.config))
    original = read_json(like / CONFIG) if like is not None and (like / CONFIG).exists() else {}
    ids = {
        f"{name}_token_id": original.get(f"{name}_token_id") for name in ("bos", "eos", "pad")
    }  # absent, they would be 1 and 2
    config = to_config_json(model.config, **ids, dtype=TORCH_DTYPES[dtype])

    def write(values: Iterator[np.ndarray]) -> None:
        with atomic_directory(directory) as temporary:
            write_json(temporary / CONFIG, config)
            for name in COMPANION_FILES if like is not None else ():
                if like is not None and (like / name).is_file():
                    copy_file(like / name, temporary / name)
            edit(temporary)
            shapes = {spec.name: spec.shape for spec in specs}
            safetensors_files.write_shards(temporary, shapes, values, dtype, max_shard_bytes)
            if provenance:
                write_provenance(temporary)
            write_file_list(temporary)

    write_on_first_process(directory, tensor_values(model, specs), write)


def write_on_first_process(directory: Path, values: Iterable[np.ndarray], write: Callable[[Iterator[np.ndarray]], None]) -> None:
    """Write on the first process; the others take part in gathering the values and fail if the first one failed."""
    stream, problem = iter(values), None
    if jax.process_index() == 0:
        try:
            write(stream)
        except Exception as e:
            problem = e
    if jax.process_count() > 1:
        for _ in stream:  # the values that the first process did not reach too: gathering needs all processes
            pass
        kind = -1 if problem is None else kind_number(problem)
        kind = int(multihost_utils.broadcast_one_to_all(np.int32(kind)))
        if kind >= 0 and problem is None:
            raise KINDS[kind](f"process 0 could not write {directory}")
    if problem is not None:
        raise problem


def tensor_values(model: Decoder, specs: Iterable[TensorSpec]) -> Iterator[np.ndarray]:
    """The tensors of a file, one after another, on the host."""
    for _, parts in itertools.groupby(specs, key=lambda spec: spec.name):
        values = [_weight_value(model, spec) for spec in parts]
        yield values[0] if len(values) == 1 else np.concatenate(values)


def _weight_value(model: Decoder, spec: TensorSpec) -> np.ndarray:
    """A tensor of a file, or the rows of one that are of one weight."""
    *owners, leaf = spec.path.split(".")
    owner = functools.reduce(getattr, owners, model)
    if leaf == "kernel":
        graphdef, state = nnx.split(owner)
        value = gather_to_host(_merged_kernel(graphdef, state, np.int32(spec.layer or 0)))
    else:
        value = gather_to_host(getattr(owner, leaf)[...] if spec.layer is None else getattr(owner, leaf)[...][spec.layer])
    return value.T if spec.transposed else value


@functools.partial(jax.jit, static_argnums=0)
def _merged_kernel(graphdef: nnx.GraphDef[Linear], state: nnx.State, layer: jax.Array) -> jax.Array:
    """W + (alpha / rank) A B of one layer [in, out], in float32."""
    linear = nnx.merge(graphdef, jax.tree.map(lambda x: x[layer], state))
    kernel = dense_kernel(linear)
    if linear.lora_a is None or linear.lora_b is None:
        return kernel
    a, b = (x[...].astype(jnp.float32) for x in (linear.lora_a, linear.lora_b))
    return kernel + linear.lora_scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def gather_to_host(array: jax.Array) -> np.ndarray:
    """The whole array, on every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
