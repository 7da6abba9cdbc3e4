"""`lindm bench accelerator [--model DIR] [--out FILE]`: does training work on the device of this machine, and how fast is it?

    kernels          the attention of this platform and the blockwise one against the dense form in float32, with packed documents
                     and a sliding window: outputs and gradients
    logits           a small random model on the device and on the CPU
    step             one training step of it on the device and on the CPU: loss, norm of the gradient, updated weights
    smollm2, 1b      steps of SmolLM2 (its directory is given, or models/SmolLM2-135M-Instruct is there) and of a random model of
                     Llama-3.2-1B's shape: useful tokens a second, share of the peak (MFU), memory
    ... torch        the same steps with transformers and torch on the same device

On a CPU the sizes are tiny: the same code in seconds. Every part is a process of its own with a time limit, so that a crash, a
lack of memory or a library that hangs ends that part alone: it is passed, failed or skipped, with the reason. All of them share
`SECONDS`. One device is used. The result is one JSON document.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lindm.bench.timing import LESS, MORE, Row, answer, in_worker, row
from lindm.errors import from_library
from lindm.io.limits import GIB
from lindm.llm.attention import dense_attention
from lindm.llm.attention_kernels import attention_for
from lindm.llm.blockwise_attention import blockwise_attention
from lindm.llm.config import ModelConfig, read_model_config, to_config_json
from lindm.llm.io import weights
from lindm.llm.lora import add_lora
from lindm.llm.model import Decoder
from lindm.llm.parallel.devices import available_memory, peak_flops
from lindm.llm.parallel.sharding import make_mesh, shard_array
from lindm.llm.rope import RopeParameters
from lindm.llm.sft.flops import train_step_flops
from lindm.llm.sft.loss import ComputeConfig
from lindm.llm.sft.optimizer import OptimizerConfig, make_optimizer
from lindm.llm.sft.options import Method, Remat
from lindm.llm.sft.packing import Batch
from lindm.llm.sft.step import StepMetrics, TrainState, init_train_state, jit_train_step, make_train_step, step_shardings

MODULE = "lindm.bench.accelerator"
PARTS = ("kernels", "logits", "step", "smollm2", "smollm2 torch", "1b", "1b torch")
SECONDS = 480.0  # of all parts together
SMOLLM2 = Path("models/SmolLM2-135M-Instruct")
LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "torch", "transformers")
EXACT, ROUNDED = 1e-4, 3e-2  # relative distances that pass: in float32, and where products are rounded to bfloat16
FULL_BYTES = 32 * GIB  # memory from which on all weights of the 1B model are trained; below, adapters
ONE_B = ModelConfig(
    model_type="llama",
    vocab_size=128256,
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=8192,
    max_position_embeddings=8192,
    rope_parameters=RopeParameters(rope_theta=500_000.0),
    tie_word_embeddings=True,
)
SMALL = dataclasses.replace(
    ONE_B, vocab_size=256, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=128
)


class Skipped(Exception):
    """A part that this machine cannot run, with the reason."""


class Failed(Exception):
    """A part whose result is wrong, with the numbers."""


# --- parity -------------------------------------------------------------------------------------------------------------


def distance(value: Any, reference: Any) -> float:
    """Largest difference relative to the largest value of the reference; NaN where a value is."""
    value, reference = (np.asarray(x, np.float64) for x in (value, reference))
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def _check(distances: dict[str, float], tolerance: float) -> dict[str, Any]:
    """The numbers of a part.  Raises: Failed where one of them is above the tolerance, or is NaN."""
    wrong = {name: d for name, d in distances.items() if not d <= tolerance}
    if wrong:
        raise Failed(f"relative distances above {tolerance:g}: " + ", ".join(f"{name} {d:.3g}" for name, d in wrong.items()))
    return {"distances": distances, "tolerance": tolerance}


def check_kernels(device: Any) -> dict[str, Any]:
    """Outputs and gradients of the attention kernels against the dense form in float32 on the same inputs."""
    tokens, dtype = (256, jnp.float32) if device.platform == "cpu" else (1024, jnp.bfloat16)
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.normal(size=(2, tokens, heads, 64)), dtype) for heads in (4, 2, 2, 4))
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (2, tokens)), axis=-1), jnp.int32)
    kernels = {"of this platform": attention_for(None), "blockwise": blockwise_attention}
    distances = {}
    for window in (0, tokens // 4):

        def outputs(kernel: Any, inputs: Any, window: int = window) -> tuple[Any, ...]:
            out, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, segments, window), *inputs)
            return (out, *pull(g.astype(out.dtype)))

        with jax.default_matmul_precision("highest"):
            reference = jax.jit(lambda x: outputs(dense_attention, x))([x.astype(jnp.float32) for x in (q, k, v)])
        for name, kernel in kernels.items():
            got = jax.jit(lambda x, kernel=kernel: outputs(kernel, x))([q, k, v])
            for what, x, y in zip(("output", "dq", "dk", "dv"), got, reference, strict=True):
                distances[f"{name}, window {window}, {what}"] = distance(x.astype(jnp.float32), y)
    return _check(distances, EXACT if dtype == jnp.float32 else ROUNDED) | {"tokens": tokens, "dtype": jnp.dtype(dtype).name}


def _cpu() -> Any:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError as e:
        raise Skipped(f"jax has no CPU device here to compare with (JAX_PLATFORMS): {e}") from e


def check_logits(device: Any) -> dict[str, Any]:
    """Logits of a small random model: on the device with its kernel, on the CPU with dense attention."""
    tokens = 256
    with jax.default_device(_cpu()):
        graphdef, state = nnx.split(Decoder(SMALL, nnx.Rngs(0)))
    ids = np.random.default_rng(1).integers(0, SMALL.vocab_size, (2, tokens), np.int32)
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), ids.shape)

    def logits(on: Any, attention: Any) -> np.ndarray:
        def forward(state: Any, ids: Any) -> Any:
            model = nnx.merge(graphdef, state)
            return model.logits(model.last_hidden_state(ids, jnp.asarray(positions), None, attention=attention))

        with jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(forward)(*jax.device_put((state, ids), on)))

    kernel = blockwise_attention if device.platform == "cpu" else attention_for(make_mesh({}, [device]))
    tolerance = EXACT if device.platform == "cpu" else ROUNDED
    return _check({"logits": distance(logits(device, kernel), logits(_cpu(), dense_attention))}, tolerance)


def check_step(device: Any) -> dict[str, Any]:
    """One training step of a small model on the device and on the CPU, where it keeps all activations."""
    outcomes = []
    cases: tuple[tuple[Any, Remat], ...] = ((device, "selective"), (_cpu(), "none"))
    for on, remat in cases:
        with jax.default_device(_cpu()):
            model = Decoder(SMALL, nnx.Rngs(0))
        before = [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]
        training = Training(model, "full", on, jnp.float32, remat)
        with jax.default_matmul_precision("highest"):
            metrics = training.step(batch_of(SMALL, 2, 128, 16))
        after = [np.asarray(x) for x in jax.tree.leaves(training.state.params)]
        outcomes.append((metrics, np.concatenate([(y - x).ravel() for x, y in zip(before, after, strict=True)])))
    (ours, change), (reference, expected) = outcomes
    # Adam divides by the size of the gradient: the change of a weight whose gradient is nearly zero is rounding, so norms compare
    moved = float(np.linalg.norm(change - expected) / np.linalg.norm(expected))
    distances = {name: distance(getattr(ours, name), getattr(reference, name)) for name in ("loss", "grad_norm")}
    return _check(distances | {"weights": moved}, 1e-3 if device.platform == "cpu" else ROUNDED)


# --- training -------------------------------------------------------------------------------------------------------------


def batch_of(config: ModelConfig, rows: int, tokens: int, labels: int) -> Batch:
    """A batch [1, rows, tokens] of random tokens, one document a row, with evenly spread labels."""
    ids = np.random.default_rng(2).integers(0, config.vocab_size, (1, rows, tokens), np.int32)
    at = np.broadcast_to(np.linspace(0, tokens - 2, labels).astype(np.int32), (1, rows, labels))
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), ids.shape)
    targets = np.take_along_axis(ids, at + 1, -1)
    return Batch(ids=ids, positions=positions, segments=np.zeros_like(ids), label_positions=at, targets=targets)


class Training:
    """The step of `lindm sft` on one device."""

    def __init__(self, model: Decoder, method: Method, device: Any, dtype: Any, remat: Remat = "selective"):
        mesh = make_mesh({}, [device])
        if method == "lora":
            add_lora(model, 16, 32.0, jax.random.key(0))
        optimizer: optax.GradientTransformation = make_optimizer(OptimizerConfig(steps=1000, learning_rate=1e-4))
        graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
        abstract = jax.eval_shape(lambda p: init_train_state(p, optimizer), params)
        self.shardings = step_shardings(abstract, frozen, mesh)
        self.frozen = jax.device_put(frozen, self.shardings.frozen)
        params = jax.device_put(params, self.shardings.state.params)
        self.state: TrainState = jax.jit(lambda p: init_train_state(p, optimizer), out_shardings=self.shardings.state)(params)
        compute = ComputeConfig(dtype=dtype, remat=remat)
        self.compiled = jit_train_step(make_train_step(graphdef, optimizer, compute, mesh), self.shardings)
        self.stop = shard_array(np.zeros(1, np.int32), self.shardings.stop_flags)

    def step(self, batch: Batch) -> StepMetrics:
        placed = jax.tree.map(lambda x: shard_array(x, self.shardings.batch), batch)
        self.state, metrics = self.compiled(self.state, self.frozen, placed, self.stop)
        return metrics


def _work(device: Any) -> tuple[int, int, int, int]:
    """Rows, tokens, labels and timed steps of a measurement."""
    return (2, 64, 8, 2) if device.platform == "cpu" else (4, 2048, 256, 10)


def _method(config: ModelConfig, device: Any) -> Method:
    memory = available_memory(device)
    return "lora" if config.num_parameters > 5e8 and memory is not None and memory < FULL_BYTES else "full"


def measure_training(config: ModelConfig, build: Callable[[], Decoder], device: Any) -> dict[str, Any]:
    """Tokens a second, share of the peak and memory of training steps."""
    rows, tokens, labels, steps = _work(device)
    method = _method(config, device)
    start = time.perf_counter()
    training = Training(build(), method, device, jnp.float32 if device.platform == "cpu" else jnp.bfloat16)
    batch = batch_of(config, rows, tokens, labels)
    first = float(training.step(batch).loss)
    ready = time.perf_counter()
    for _ in range(steps):
        metrics = training.step(batch)
    last = float(metrics.loss)
    seconds = (time.perf_counter() - ready) / steps
    if not (np.isfinite(last) and last < first):
        raise Failed(f"the loss of the same batch must fall; it went from {first:.4g} to {last:.4g} in {steps} steps")
    flops = train_step_flops(config, method, rows, tokens, labels)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use") if device.platform != "cpu" else None
    return {
        "method": method,
        "parameters": config.num_parameters,
        "tokens_per_second": rows * tokens / seconds,
        "mfu": flops / seconds / peak_flops([device]),
        "peak_bytes": memory,
        "start_seconds": ready - start,
        "loss": [first, last],
    }


def _smollm2(model: str) -> Path:
    directory = Path(model) if model else SMOLLM2
    if not (directory / "config.json").is_file():
        raise Skipped(f"{directory} has no model; give its directory by --model, or get it by `make smollm2`")
    return directory


def _model_of(part: str, model: str, device: Any) -> tuple[ModelConfig, Callable[[], Decoder], Path | None]:
    """Configuration and weights of smollm2 or 1b; the directory of its weights, None where they are random."""
    if part.startswith("1b"):
        config = SMALL if device.platform == "cpu" else ONE_B
        return config, lambda: Decoder(config, nnx.Rngs(0)), None
    directory = _smollm2(model)
    mesh = make_mesh({}, [device])
    return read_model_config(directory), lambda: weights.load(directory, mesh=mesh), directory


def measure_torch(config: ModelConfig, directory: Path | None, device: Any) -> dict[str, Any]:
    """The same steps with transformers and torch: scaled-dot-product attention, fused AdamW, bfloat16 by autocast on a GPU."""
    for library in ("torch", "transformers"):
        if importlib.util.find_spec(library) is None:
            raise Skipped(f"{library} is not installed")
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, LlamaConfig

    if device.platform != "cpu" and not torch.cuda.is_available():
        raise Skipped(f"torch {torch.__version__} has no access to the {device.device_kind}")
    if _method(config, device) != "full":
        raise Skipped("the device has no memory for all weights; adapters are not measured with torch")
    on = "cpu" if device.platform == "cpu" else "cuda"
    rows, tokens, labels, steps = _work(device)
    if directory is None:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**to_config_json(config)), attn_implementation="sdpa").to(on)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32)
        model = model.to(on)  # pyright: ignore[reportArgumentType]  (the decorator of `to` hides that it is a method)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    batch = batch_of(config, rows, tokens, labels)
    ids = torch.from_numpy(np.asarray(batch.ids[0], np.int64)).to(on)
    targets = torch.full_like(ids, -100)
    at = torch.from_numpy(np.asarray(batch.label_positions[0], np.int64)).to(on) + 1
    targets.scatter_(1, at, ids.gather(1, at))

    def step() -> float:
        with torch.autocast(on, torch.bfloat16, enabled=on == "cuda"):
            loss = model(input_ids=ids, labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = (time.perf_counter() - start) / steps
    flops = train_step_flops(config, "full", rows, tokens, labels)
    memory = torch.cuda.max_memory_allocated() if on == "cuda" else None
    mfu = flops / seconds / peak_flops([device])
    return {"method": "full", "tokens_per_second": rows * tokens / seconds, "mfu": mfu, "peak_bytes": memory}


# --- parts ----------------------------------------------------------------------------------------------------------------


def run_part(part: str, model: str) -> dict[str, Any]:
    """The numbers of a part, in this process, on the first device.  Raises: Skipped, Failed, and what libraries raise."""
    device = jax.devices()[0]
    checks = {"kernels": check_kernels, "logits": check_logits, "step": check_step}
    if part in checks:
        return checks[part](device)
    config, build, directory = _model_of(part, model, device)
    return measure_torch(config, directory, device) if part.endswith("torch") else measure_training(config, build, device)


def measure(part: str, model: str) -> dict[str, Any]:
    """A part as it stands in the document: status, reason, seconds, device and numbers."""
    start = time.perf_counter()
    try:
        outcome: dict[str, Any] = {"status": "passed", "reason": ""} | run_part(part, model)
    except Skipped as e:
        outcome = {"status": "skipped", "reason": str(e)}
    except Failed as e:
        outcome = {"status": "failed", "reason": str(e)}
    except Exception as e:  # whatever a library raises is the finding of this part
        outcome = {"status": "failed", "reason": f"{type(e).__name__}: {from_library(e)}"[:500]}
    device = jax.devices()[0]
    about = {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}
    return {"part": part, **outcome, "seconds": round(time.perf_counter() - start, 1), "device": about}


def _in_process_of_its_own(part: str, model: str, seconds: float) -> dict[str, Any]:
    if seconds <= 0:
        return {"part": part, "status": "skipped", "reason": f"the {SECONDS:.0f} seconds of all parts were over", "seconds": 0.0}
    start = time.monotonic()
    try:
        return in_worker(MODULE, part, model, timeout=seconds)
    except RuntimeError as e:
        reason = str(e)[-1000:]
        return {"part": part, "status": "failed", "reason": reason, "seconds": round(time.monotonic() - start, 1)}


def check(model: Path | None = None) -> dict[str, Any]:
    """The document: device, versions, and the parts with status, reason and numbers.

    Args:
      model: the directory of SmolLM2, or of another Llama. [default: models/SmolLM2-135M-Instruct, if it is there]
    """
    end = time.monotonic() + SECONDS
    parts = [_in_process_of_its_own(part, str(model or ""), end - time.monotonic()) for part in PARTS]
    devices = [part.pop("device") for part in parts if "device" in part]
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES if importlib.util.find_spec(name) is not None}
    small = bool(devices) and devices[0]["platform"] == "cpu"
    return {"device": devices[0] if devices else None, "small": small, "versions": versions, "parts": parts}


def benchmark() -> list[Row]:
    """The figures of the trained models beside torch, as rows; `check` has all parts."""
    parts = {part["part"]: part for part in check()["parts"]}
    rows = []
    for name in ("smollm2", "1b"):
        ours, peer = parts[name], parts[f"{name} torch"]
        label = "torch" if peer["status"] == "passed" else f"torch ({peer['status']})"
        for key, unit, better in (("tokens_per_second", "tokens/s", MORE), ("mfu", "share", MORE), ("peak_bytes", "bytes", LESS)):
            rows.append(row(f"{name}: {key}", ours.get(key), peer.get(key), label, unit, better))
    return rows


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # of a GPU; jax takes 0.75 unless it is set
    answer(measure, pinned=False)
