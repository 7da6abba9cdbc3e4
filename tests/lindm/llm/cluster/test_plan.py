"""Plans of tiny models on virtual devices: XLA's figures for the training step against figures by hand."""

import importlib.util
import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lindm.cli import plan as cli
from lindm.llm.cluster import estimate, plan
from lindm.llm.cluster.program_cost import ProgramCost
from lindm.llm.config import ModelConfig, to_config_json
from lindm.llm.lora import add_lora, quantize
from lindm.llm.model import Decoder
from lindm.llm.parallel.sharding import make_mesh
from lindm.llm.sft.loss import ComputeConfig
from lindm.llm.sft.optimizer import OptimizerConfig, make_optimizer
from lindm.llm.sft.packing import Batch
from lindm.llm.sft.step import init_train_state, jit_train_step, make_train_step, step_shardings

TINY = ModelConfig(
    model_type="llama",
    vocab_size=96,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    max_position_embeddings=128,
)
JOB = plan.StepSpec(model_config=TINY, batch=4, seq=32, labels_per_row=8, dtype="f32", lora_rank=4)
LARGE_VOCABULARY = plan.StepSpec(
    model_config=replace(TINY, vocab_size=32768, max_position_embeddings=400), batch=1, seq=400, labels_per_row=300, dtype="f32"
)
LIMITS = plan.DeviceLimits("a chip", 2**30, 1e12, 1e11, 1e10)
GIB = 2**30


def lowered(job, **sizes):
    n = int(np.prod(list(sizes.values()) or [1]))
    program = plan.step_program(job, make_mesh(sizes, jax.devices()[:n]))
    return program.step.lower(*program.arguments)


def planned(job, **sizes):
    return plan.plan_from_compiled(lowered(job, **sizes).compile(), sizes, LIMITS)


@pytest.fixture(scope="module")
def full():
    return planned(JOB)


@pytest.fixture(scope="module")
def program_in_parts():
    return lowered(JOB, fsdp=2, tensor=2).compile()


@pytest.fixture(scope="module")
def cut(program_in_parts):
    return plan.plan_from_compiled(program_in_parts, {"fsdp": 2, "tensor": 2}, LIMITS)


def argument_bytes(job):
    """Bytes of what a step takes, on one device."""
    program = plan.step_program(job, make_mesh({}, jax.devices()[:1]))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.arguments))


def arithmetic(job, forward):
    """Operations of a step by hand, every matrix product of the forward pass so often."""
    config, tokens = job.model_config, job.batch * job.seq
    heads = config.num_heads * config.head_dim
    kernels = (
        2 * config.hidden_size * heads
        + 2 * config.hidden_size * config.num_kv_heads * config.head_dim
        + 3 * config.hidden_size * config.intermediate_size
    )
    blocks = config.num_layers * 2 * tokens * kernels
    scores = config.num_layers * job.batch * 2 * (2 * heads * job.seq**2)
    return blocks * forward, scores * forward, 2 * job.batch * job.labels_per_row * config.hidden_size * config.vocab_size * 3


# --- the figures of a plan -------------------------------------------------------------------------------------------------


def test_a_step_without_recomputation_takes_three_times_the_forward_products_of_every_micro_batch():
    job = replace(JOB, remat="none", accumulate=3)
    result = planned(job)
    assert result.cost is not None and result.cost.unknown_loops == 0
    assert result.cost.flops == pytest.approx(3 * sum(arithmetic(JOB, 3)), rel=0.01)
    assert estimate.model_flops(job) == pytest.approx(3 * sum(arithmetic(JOB, 3)))
    assert result.memory is not None and result.memory.arguments == argument_bytes(job) == argument_bytes(JOB) + 2 * 4 * (
        3 * 4 * 32 + 2 * 4 * 8
    )


def test_recomputation_adds_a_forward_pass_of_the_blocks_or_of_attention_alone(full):
    blocks, scores, head = arithmetic(JOB, 4)
    result = planned(replace(JOB, remat="full"))
    last = (
        TINY.num_layers * 2 * JOB.batch * JOB.seq * TINY.hidden_size * TINY.intermediate_size
    )  # no gradient needs what the last product gives
    assert blocks + scores + head - last <= 1.01 * result.cost.flops <= 1.02 * (blocks + scores + head)
    assert full.cost.flops == pytest.approx(blocks * 3 / 4 + scores + head, rel=0.02)


def test_devices_share_work_and_weights_and_talk_to_each_other(full, cut):
    assert full.cost.collectives == [] and cut.cost.collectives
    assert {c.kind for c in cut.cost.collectives} >= {"all-gather", "all-reduce"}
    assert cut.cost.flops == pytest.approx(full.cost.flops / 4, rel=0.05)
    weights = 3 * 4 * TINY.num_parameters  # masters and two moments
    assert weights <= full.memory.arguments <= 1.02 * weights
    assert weights / 4 <= cut.memory.arguments <= 1.1 * weights / 4
    assert full.time_bounds["links"] == 0 and cut.time_bounds["links"] == cut.cost.sent_bytes / 1e10


def test_adapters_leave_most_arguments_frozen_and_few_bits_make_them_small(full):
    lora, few = replace(JOB, method="lora"), replace(JOB, method="qlora", base="nf4")
    kernels = TINY.num_layers * TINY.hidden_size * (2 * 64 + 2 * 32 + 3 * TINY.intermediate_size)
    assert full.memory.arguments == argument_bytes(JOB)
    assert argument_bytes(lora) < 0.6 * argument_bytes(JOB)
    assert argument_bytes(lora) - argument_bytes(few) == kernels * 4 - kernels / 2 - kernels * 4 / 64


def test_the_bound_is_the_slowest_of_the_three(full):
    work = full.cost
    assert full.time_bounds == {"compute": work.flops / 1e12, "memory": work.memory_bytes / 1e11, "links": work.sent_bytes / 1e10}
    assert full.bound_seconds == max(full.time_bounds.values())


def test_a_program_that_exceeds_memory_minus_headroom_does_not_fit(full, program_in_parts, cut):
    assert full.fits and full.memory.peak > 0
    for room, fits in ((cut.memory.peak / (1 - plan.HEADROOM) + 1, True), (cut.memory.peak * 1.04, False)):
        assert plan.plan_from_compiled(program_in_parts, {}, LIMITS._replace(memory=int(room))).fits is fits


@pytest.mark.parametrize("compiled, sizes", [("full", {"fsdp": 1}), ("cut", {"fsdp": 2, "tensor": 2})])
def test_an_estimate_has_the_arguments_of_the_compiled_step_and_is_near_its_memory_and_products(request, compiled, sizes):
    compiled, sizes = request.getfixturevalue(compiled), {"data": 1, "fsdp": 1, "tensor": 1} | sizes
    devices = int(np.prod(list(sizes.values())))
    (estimated,) = plan.estimate_plans(JOB, devices, LIMITS, [sizes])
    assert estimated.estimated and not compiled.estimated
    assert estimated.memory.arguments == pytest.approx(compiled.memory.arguments, rel=0.02)  # all but the batch
    assert estimated.memory.peak == pytest.approx(compiled.memory.peak, rel=0.35)
    assert estimated.cost.flops == pytest.approx(compiled.cost.flops, rel=0.02)
    if devices > 1:
        assert 0.5 * compiled.cost.sent_bytes <= estimated.cost.sent_bytes <= 1.1 * compiled.cost.sent_bytes


# --- the step is the one that trains -----------------------------------------------------------------------------------------


def batch_of(job, seed=0):
    rng = np.random.default_rng(seed)
    shape, few = (job.accumulate, job.batch, job.seq), (job.accumulate, job.batch, job.labels_per_row)
    order = np.broadcast_to(np.arange(job.seq), shape).astype(np.int32)
    ids, target = (rng.integers(0, job.model_config.vocab_size, s).astype(np.int32) for s in (shape, few))
    at = np.broadcast_to(np.arange(job.labels_per_row), few).astype(np.int32)
    return Batch(ids=ids, positions=order, segments=np.zeros(shape, np.int32), label_positions=at, targets=target)


def test_the_program_of_a_plan_trains_and_is_that_of_a_run(program_in_parts):
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    graphdef, params, frozen = nnx.split(Decoder(TINY, nnx.Rngs(0)), nnx.Param, ...)
    optimizer = make_optimizer(OptimizerConfig(steps=1000))
    state = init_train_state(params, optimizer)
    shardings = step_shardings(state, frozen, mesh)
    step = jit_train_step(make_train_step(graphdef, optimizer, ComputeConfig(), mesh), shardings)
    given = jax.device_put((state, frozen, batch_of(JOB), np.zeros(4, np.int32)), tuple(shardings))
    theirs = step.lower(*given)
    assert theirs.as_text() == lowered(JOB, fsdp=2, tensor=2).as_text()
    after, metrics = program_in_parts(*given)  # takes the state's memory
    assert bool(metrics.finite) and int(after.step) == 1 and int(metrics.num_labels) == JOB.batch * JOB.labels_per_row
    assert abs(float(metrics.loss) - np.log(TINY.vocab_size)) < 0.1
    after, again = program_in_parts(after, *given[1:])
    assert float(again.loss) < float(metrics.loss)


@pytest.mark.parametrize("base", ["bf16", "int8"])
def test_the_shapes_of_a_plan_are_those_of_a_model(base):
    job = replace(JOB, method="lora", base=base)
    model = Decoder(TINY, nnx.Rngs(0), jnp.bfloat16 if base == "bf16" else jnp.float32)
    add_lora(quantize(model, base), job.lora_rank, 2.0 * job.lora_rank, jax.random.key(0))
    real, shapes = (nnx.split(m, nnx.Param, ...) for m in (model, plan.abstract_model(job)))
    assert real[0] == shapes[0]
    for ours, theirs in zip(shapes[1:], real[1:], strict=True):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), ours) == jax.tree.map(lambda x: (x.shape, x.dtype), theirs)


@pytest.mark.parametrize(
    "settings, least, most", [({}, 12, 12.1), ({"moments": "bf16"}, 10, 10.1), ({"optimizer": "adafactor"}, 4, 4.5)]
)
def test_the_memory_of_the_optimizer_is_counted(settings, least, most):
    """Bytes of the state per weight, which is what candidate meshes are ranked by and what the compiler reports."""
    wide = replace(TINY, hidden_size=256, head_dim=64, num_kv_heads=4, intermediate_size=256, vocab_size=256)
    state = plan.step_program(replace(JOB, model_config=wide, **settings), make_mesh({}, jax.devices()[:1])).arguments[0]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert least <= size / wide.num_parameters <= most


# --- meshes ----------------------------------------------------------------------------------------------------------------


def test_sensible_meshes_use_all_devices_and_divide_heads_and_batch():
    meshes = plan.candidate_meshes(JOB, 8, None)
    assert 1 < len(meshes) <= plan.MAX_MESHES
    for sizes in meshes:
        assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] == 8
        assert TINY.num_kv_heads % sizes["tensor"] == 0 and JOB.batch % (sizes["data"] * sizes["fsdp"]) == 0
    assert meshes == [s for i, s in enumerate(meshes) if s not in meshes[:i]]
    with pytest.raises(ValueError, match="batch must be a multiple"):
        plan.candidate_meshes(replace(JOB, batch=3), 8, None)


def test_the_default_mesh_of_training_is_always_compared(monkeypatch):
    monkeypatch.setattr(plan, "MAX_MESHES", 1)
    few = replace(JOB, batch=8)
    assert {"data": 1, "fsdp": 8, "tensor": 1} in plan.candidate_meshes(few, 8, None)
    monkeypatch.setattr(
        plan, "estimate_cost", lambda job, sizes: ProgramCost(totals={("all-gather", 8, "x"): (1, sizes["fsdp"])})
    )  # as if it sent most
    assert plan.candidate_meshes(few, 8, None)[-1] == {"data": 1, "fsdp": 8, "tensor": 1}


def test_plans_that_fit_come_first_and_then_the_fastest(monkeypatch, full):
    outcomes = iter([(True, 3.0), (False, 1.0), (True, 2.0)])

    def compiled(job, mesh, limits):
        fits, seconds = next(outcomes)
        return replace(full, fits=fits, time_bounds={"compute": seconds})

    monkeypatch.setattr(plan, "compile_plan", compiled)
    calls = []
    plans = plan.compile_plans(
        JOB, jax.devices(), LIMITS, [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 8}], lambda *given: calls.append(given)
    )
    assert [(p.fits, p.bound_seconds) for p in plans] == [(True, 2.0), (True, 3.0), (False, 1.0)]
    assert calls[1] == (1, 3, "fsdp=4,tensor=2")


class Card:
    """A GPU, by its name and the bytes that jax may take of it."""

    platform = "gpu"

    def __init__(self, device_kind, limit):
        self.device_kind, self.limit = device_kind, limit

    def memory_stats(self):
        if self.limit is None:
            raise RuntimeError("not addressable")
        return {"bytes_limit": self.limit}


def test_a_card_that_is_here_has_at_most_the_memory_that_jax_may_take_and_the_speed_of_its_own_kind():
    for limit, memory in ((30 * GIB, 30 * GIB), (90 * GIB, 40 * GIB), (None, 40 * GIB)):
        assert plan.device_limits([Card("NVIDIA A100-SXM4-40GB", limit)]).memory == memory
    assert plan.device_limits([Card("NVIDIA A100-SXM-64GB", 48 * GIB)]).memory == 48 * GIB, "not in the table by its memory"
    sxm, pcie, nvl = (plan.device_limits([Card(f"NVIDIA H100{kind}", None)]) for kind in (" 80GB HBM3", " PCIe", " NVL"))
    assert pcie.peak_flops < nvl.peak_flops < sxm.peak_flops == 989e12


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "measured_peak_flops", lambda: 8e9)
    (tmp_path / "config.json").write_text(json.dumps(to_config_json(TINY)))
    return tmp_path / "config.json"


def parsed(config, **options):
    return cli.Plan(model=config, topology="host", batch=8, seq=32, labels_per_row=8, **options)


def test_the_command_prints_a_table_of_the_plans(config, capsys, monkeypatch, cut):
    monkeypatch.setattr(plan, "compile_plan", lambda job, mesh, limits: replace(cut, mesh={**mesh.shape}))
    monkeypatch.setattr("lindm.io.progress.SILENT_SECONDS", 0)
    assert cli.run(parsed(config, mesh="fsdp=8", method="lora", lora_rank=4, accumulate=2)) == 0
    out, err = capsys.readouterr()
    assert "meshes compiled: 0 of 1, fsdp=8" in err
    assert "lora: adapters of rank 4 over f32 weights" in out and "2 x 8 rows x 32 tokens, 8 labels per row, f32" in out
    row = next(line for line in out.splitlines() if line.startswith("fsdp=8"))
    assert row.split()[1] == "yes" and "all-gather" in out and "not a prediction" in out
    assert "a step fits if XLA compiles it and its peak leaves" in out and "left out" not in out
    assert cli.run(replace(parsed(config), batch=4)) == 0
    assert "meshes whose data x fsdp does not divide the 4 rows of --batch are left out" in capsys.readouterr().out


def test_the_command_prints_one_json_object(config, capsys):
    assert cli.run(parsed(config.parent, mesh="fsdp=4,tensor=2", method="qlora", lora_rank=4, json=True)) == 0
    said = json.loads(capsys.readouterr().out)
    (one,) = said["plans"]
    assert one["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2} and one["fits"]
    assert one["memory"]["peak"] == sum(one["memory"][k] for k in ("arguments", "outputs", "temporaries", "code"))
    assert (
        one["sent_bytes"] == pytest.approx(sum(c["sent_bytes"] for c in one["collectives"])) and one["time_bounds"]["compute"] > 0
    )
    assert said["step"]["method"] == "qlora" and said["step"]["base"] == "nf4" and said["step"]["lora_rank"] == 4
    assert said["devices"] == 8 and said["limits"]["peak_flops"] == 1e9 and said["step"]["parameters"] == TINY.num_parameters
    assert one["flops"] >= said["model_flops"] > 0


def test_a_plan_for_gpus_is_marked_as_an_estimate_in_text_and_json(config, capsys):
    options = {"model": config, "topology": "h100:8", "batch": 8, "seq": 32, "labels_per_row": 8}
    assert cli.run(cli.Plan(**options)) == 0
    out = capsys.readouterr().out
    assert "h100:8: 8 x NVIDIA H100" in out and "ESTIMATE by arithmetic" in out and "XLA compiled" not in out
    assert cli.run(cli.Plan(**options, mesh="fsdp=8", json=True)) == 0
    said = json.loads(capsys.readouterr().out)
    (one,) = said["plans"]
    assert said["estimated"] and one["estimated"] and "compile_seconds" not in one and one["memory_bytes"] is None
    assert said["limits"]["memory"] == 80 * GIB and said["step"]["dtype"] == "bf16" and one["memory"]["peak"] > 0
    with pytest.raises(ValueError, match=r"topology must be 1, 2, 4 or 8 GPUs of one node, such as h100:8, .* got 'h100:16'"):
        cli.run(cli.Plan(**options | {"topology": "h100:16"}))


@pytest.mark.parametrize(
    "share, temporary, fits",
    [
        (0.74, 0.0, "yes"),
        (0.76, 0.0, f"yes, with {cli.MORE_MEMORY}"),
        (0.96, 0.0, "no"),
        (0.5, 0.18, "yes"),  # with a third more temporaries 0.74, 0.78, 0.99, 1.02 of the memory
        (0.5, 0.21, f"yes, with {cli.MORE_MEMORY}"),
        (0.28, 0.53, f"yes, with {cli.MORE_MEMORY}"),
        (0.29, 0.55, f"perhaps, with {cli.MORE_MEMORY}"),
    ],
)
def test_a_plan_of_gpus_above_what_jax_takes_by_itself_says_what_to_set(config, capsys, monkeypatch, cut, share, temporary, fits):
    size = {"arguments": int(share * 80 * GIB), "temporaries": int(temporary * 80 * GIB)}
    memory = plan.DeviceMemory(**size, outputs=0, code=0)
    monkeypatch.setattr(plan, "estimate_memory", lambda *a: memory)
    options = {"batch": 8, "seq": 32, "labels_per_row": 8, "mesh": "fsdp=1"}
    assert cli.run(cli.Plan(model=config, topology="h100:1", **options)) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fsdp=1 "))
    assert re.split("  +", row)[1] == fits


def test_a_plan_that_was_refused_has_a_row_too(config, capsys, monkeypatch):
    refused = plan.MeshPlan(mesh={"fsdp": 8}, fits=False, refusal="too much", required_bytes=int(21.5 * GIB))
    monkeypatch.setattr(plan, "compile_plans", lambda *a: [refused])
    assert cli.run(parsed(config, mesh="fsdp=8")) == 0
    out = capsys.readouterr().out
    assert "21.50" in out and "fsdp=8 was refused: too much" in out


# --- with the compiler of TPUs -----------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("method, base", [("full", "f32"), ("qlora", "nf4")])
def test_a_slice_of_tpus_is_planned_for_without_one(monkeypatch, method, base):
    for name, value in cli.QUIET.items():
        monkeypatch.setenv(name, value)
    devices = plan.topology_devices("v5e:2x2")
    limits = plan.device_limits(devices)
    assert (len(devices), limits.memory, limits.link_bandwidth) == (4, 16 * GIB, 200e9)
    wide = replace(TINY, hidden_size=256, head_dim=64, intermediate_size=512, vocab_size=1024)
    job = replace(JOB, model_config=wide, batch=8, seq=128, dtype="bf16", method=method, base=base)
    mesh = make_mesh({"fsdp": 4}, devices)
    with jax.enable_x64(False):  # as the command runs; a TPU has no 64-bit counters
        result = plan.compile_plan(job, mesh, limits)
        program = plan.step_program(job, mesh)
        done = program.step.lower(*program.arguments).compile()
    assert result.fits and result.cost is not None and result.cost.unknown_loops == 0 and result.cost.sent_bytes > 0
    once = plan.program_cost(done.as_text(), loops=False).flops
    blocks, scores, head = arithmetic(job, 4)
    scores = scores * 11 / 8  # the kernels compute the scores twice more: 2 products forward, 2 again, and 3 and 4 backward
    kernels = scores / wide.num_layers / 4  # XLA counts elementwise work too, and nothing of the attention kernels
    assert once - kernels == pytest.approx(done.cost_analysis()["flops"], rel=0.15)
    if method == "full":
        most = (blocks * 3 / 4 + scores + head) / 4
        assert 0.98 * most <= result.cost.flops <= 1.05 * most


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_slices_that_do_not_exist_are_refused_and_the_smallest_does(monkeypatch):
    for name, value in cli.QUIET.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="topology v5e:3x3 does not exist"):
        plan.topology_devices("v5e:3x3")
    assert len(plan.topology_devices("v5e:1x1")) == 1
    assert jnp.zeros(1).devices() <= set(jax.devices())  # nothing of this is where arrays go
