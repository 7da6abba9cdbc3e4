"""What a program does, counted from its text, beside XLA's own count where there are no loops, and beside pencil and paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lindm.llm.blockwise_attention import BLOCK, blockwise_attention
from lindm.llm.cluster.hlo import parse_hlo
from lindm.llm.cluster.program_cost import program_cost

P = PartitionSpec


def compiled(f, *shapes, **options):
    return jax.jit(f, **options).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


def chain(x, layers):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]


# --- products --------------------------------------------------------------------------------------------------------------


def test_the_body_of_a_loop_counts_as_often_as_it_turns():
    text = compiled(chain, (32, 64), (7, 64, 64)).as_text()
    assert program_cost(text).flops == 7 * 2 * 32 * 64 * 64
    assert program_cost(text, loops=False).flops == 2 * 32 * 64 * 64
    assert program_cost(text).unknown_loops == 0


def test_loops_within_loops_multiply():
    def twice(x, layers):
        return jax.lax.fori_loop(0, 5, lambda _, x: chain(x, layers), x)

    assert program_cost(compiled(twice, (16, 32), (3, 32, 32)).as_text()).flops == 5 * 3 * 2 * 16 * 32 * 32


def test_a_loop_whose_turns_depend_on_the_data_is_counted_once_and_said_to_be_unread():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ w, x)

    counted = program_cost(compiled(until, (32, 32), (32, 32)).as_text())
    assert (counted.flops, counted.unknown_loops) == (2 * 32**3, 1)


@pytest.mark.parametrize(
    "equation, left, right, flops",
    [
        ("ij,jk->ik", (40, 50), (50, 60), 2 * 40 * 50 * 60),
        ("bij,bjk->bik", (3, 40, 50), (3, 50, 60), 3 * 2 * 40 * 50 * 60),
        ("btgie,bcge->bgitc", (2, 16, 2, 3, 32), (2, 24, 2, 32), 2 * (2 * 2 * 3) * 16 * 24 * 32),
        ("abi,abj->ij", (4, 30, 40), (4, 30, 50), 2 * (4 * 30) * 40 * 50),
    ],
)
def test_products_of_any_shape_are_counted(equation, left, right, flops):
    program = compiled(lambda a, b: jnp.einsum(equation, a, b), left, right)
    assert program_cost(program.as_text()).flops == flops


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": [(2, 1), (0, 3)]},
        {"window_strides": (2, 3), "padding": [(1, 1), (1, 1)], "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": [(3, 2), (2, 2)], "lhs_dilation": (2, 3)},
        {"window_strides": (1, 1), "padding": [(0, 0), (0, 0)], "feature_group_count": 2},
    ],
)
def test_convolutions_count_what_does_not_fall_into_the_padding_as_xla_does(options):
    groups = options.get("feature_group_count", 1)
    program = compiled(lambda a, b: jax.lax.conv_general_dilated(a, b, **options), (2, 4, 9, 8), (6, 4 // groups, 3, 2))
    said = program.cost_analysis()
    assert said is not None and program_cost(program.as_text()).flops == said["flops"]


def test_costs_of_programs_without_loops_equal_those_of_xla():
    def unrolled(x, layers):
        for w in layers:
            x = jnp.tanh(x @ w)
        return (x * x).sum()

    program = compiled(jax.grad(unrolled, argnums=1), (64, 128), (3, 128, 128))
    counted, said = program_cost(program.as_text()), program.cost_analysis()
    assert said is not None
    assert counted.flops == (3 + 3 + 2) * 2 * 64 * 128 * 128  # forward, weights, and inputs but the first
    assert counted.flops == pytest.approx(said["flops"], rel=0.02)  # which counts elementwise work too
    assert counted.memory_bytes == pytest.approx(said["bytes accessed"], rel=0.05)


# --- memory ----------------------------------------------------------------------------------------------------------------


def test_a_slice_that_a_loop_takes_of_stacked_weights_is_not_the_whole_stack():
    n, k = 16, 128
    counted = program_cost(compiled(chain, (8, k), (n, k, k)).as_text())
    assert n * k * k * 4 <= counted.memory_bytes <= 4 * n * k * k * 4  # each layer is read once, perhaps copied first


def test_a_loop_that_writes_into_a_stack_counts_the_written_slice():
    def outputs(x):
        return jax.lax.scan(lambda x, _: (x * 1.5, x), x, None, length=64)[1]

    size = 4 * 4096
    assert 64 * size <= program_cost(compiled(outputs, (4096,)).as_text()).memory_bytes <= 10 * 64 * size


# --- messages --------------------------------------------------------------------------------------------------------------


def exchanged(f, *shapes, sizes=(8,), names=("x",), specs):
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))
    inside, outside = specs
    mapped = jax.shard_map(f, mesh=mesh, in_specs=inside, out_specs=outside, check_vma=False)
    shardings = tuple(NamedSharding(mesh, s) for s in inside)
    return program_cost(compiled(mapped, *shapes, in_shardings=shardings).as_text())


SHARD = 16 * 32 * 4  # bytes of f32[16, 32]


@pytest.mark.parametrize(
    "f, spec, kind, sent",
    [
        (lambda x: jax.lax.psum(x, "x"), P(), "all-reduce", 2 * 7 / 8 * SHARD),
        (lambda x: jax.lax.all_gather(x, "x", tiled=True), P(), "all-gather", 7 * SHARD),
        (lambda x: jax.lax.psum_scatter(x, "x", tiled=True), P("x"), "reduce-scatter", 7 / 8 * SHARD),
        (lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), P("x"), "all-to-all", 7 / 8 * SHARD),
        (lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]), P("x"), "collective-permute", SHARD),
    ],
)
def test_sent_bytes_of_collectives(f, spec, kind, sent):
    counted = exchanged(f, (128, 32), specs=((P("x"),), spec))
    (one,) = counted.collectives
    assert (one.kind, one.count) == (kind, 1) and counted.sent_bytes == pytest.approx(sent)
    assert one.group_size == 8


@pytest.mark.parametrize("axis, group", [("x", 2), ("y", 4), (("x", "y"), 8)])
def test_the_devices_of_a_message_are_those_of_its_axes(axis, group):
    specs = ((P("x", "y"),), P("x", "y"))
    counted = exchanged(lambda x: jax.lax.psum(x, axis), (32, 128), sizes=(2, 4), names=("x", "y"), specs=specs)
    assert [c.group_size for c in counted.collectives] == [group]
    assert counted.sent_bytes == pytest.approx(2 * (group - 1) / group * SHARD)


def test_messages_of_a_loop_are_sent_every_turn_and_one_device_sends_none():
    def step(x, w):
        return jax.lax.scan(lambda x, w: (jax.lax.psum(x @ w, "x"), None), x, w)[0]

    (one,) = exchanged(step, (16, 32), (5, 32, 32), specs=((P(), P()), P())).collectives
    assert one.count == 5 and one.shape == "f32[16,32]"
    assert program_cost(compiled(chain, (8, 16), (2, 16, 16)).as_text()).collectives == []


# --- what XLA:TPU writes ---------------------------------------------------------------------------------------------------

# a product whose right side is gathered beside a loop: it begins, is carried through the loop's fusions, and ends. The loop's
# counter goes from 2 in steps of 3 while it is below 12: 4 turns. Batched products are convolutions, mostly with padding.
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=4

%begin (p.0: bf16[8,32]) -> (bf16[8,32], bf16[32,32], u32[]) {
  %p.0 = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[32,32]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[8,32]{1,0}, bf16[32,32]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[8,32], p.2: bf16[32,32], p.3: bf16[4,16,64], p.4: bf16[4,24,64]) -> (bf16[4,16,24], bf16[8,32], bf16[32,32]) {
  %p.1 = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[32,32]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.2 = bf16[32,32]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={0}
  %p.3 = bf16[4,16,64]{2,1,0:T(8,128)(2,1)} parameter(2)
  %p.4 = bf16[4,24,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(3)
  %convolution.1 = bf16[4,16,24]{2,1,0} convolution(%p.3, %p.4), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
  ROOT %tuple.1 = (bf16[4,16,24]{2,1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}) tuple(%convolution.1, %p.1, %all-gather.2)
}

%end (p.5: bf16[8,32], p.6: bf16[32,32]) -> bf16[32,32] {
  %p.5 = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(0)
  %p.6 = bf16[32,32]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.3 = bf16[32,32]{1,0:T(8,128)(2,1)} all-gather(%p.5), channel_id=7, replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={0}
  ROOT %custom-call.2 = bf16[32,32]{1,0:T(8,128)(2,1)} custom-call(%p.5, %p.6, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%body (b.0: (u32[], bf16[4,16,64], bf16[8,32], bf16[32,32], bf16[4,24,64])) -> (u32[], bf16[4,16,64], bf16[8,32], bf16[32,32], /*index=4*/bf16[4,24,64]) {
  %three = u32[]{:T(128)} constant(3)
  %b.0 = (u32[]{:T(128)}, bf16[4,16,64]{2,1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}, /*index=4*/bf16[4,24,64]{2,1,0:S(1)}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%b.0), index=0
  %rows = bf16[4,16,64]{2,1,0} get-tuple-element(%b.0), index=1
  %shard = bf16[8,32]{1,0} get-tuple-element(%b.0), index=2
  %room = bf16[32,32]{1,0} get-tuple-element(%b.0), index=3
  %near = bf16[4,24,64]{2,1,0:S(1)} get-tuple-element(%b.0), index=4
  %fusion.1 = (bf16[4,16,24]{2,1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}) fusion(%shard, %room, %rows, %near), kind=kOutput, calls=%beside
  %pass.1 = (bf16[4,16,64]{2,1,0:S(1)}, bf16[4,16,64]{2,1,0}, u32[]{:S(2)}) collective-permute-start(%rows), channel_id=9, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %pass.2 = bf16[4,16,64]{2,1,0} collective-permute-done(%pass.1)
  %more = u32[]{:T(128)} add(%counter, %three)
  ROOT %tuple.2 = (u32[]{:T(128)}, bf16[4,16,64]{2,1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}, /*index=4*/bf16[4,24,64]{2,1,0:S(1)}) tuple(%more, %pass.2, %shard, %room, %near)
}

%condition (c.0: (u32[], bf16[4,16,64], bf16[8,32], bf16[32,32], bf16[4,24,64])) -> pred[] {
  %c.0 = (u32[]{:T(128)}, bf16[4,16,64]{2,1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}, /*index=4*/bf16[4,24,64]{2,1,0:S(1)}) parameter(0)
  %twelve = u32[]{:T(128)} constant(12)
  %here = u32[]{:T(128)} get-tuple-element(%c.0), index=0
  ROOT %below = pred[]{:T(512)} compare(%here, %twelve), direction=LT
}

ENTRY %main (a.0: bf16[8,32], a.1: bf16[4,16,64], a.2: bf16[4,24,64]) -> bf16[32,32] {
  %a.0 = bf16[8,32]{1,0} parameter(0)
  %a.1 = bf16[4,16,64]{2,1,0} parameter(1)
  %a.2 = bf16[4,24,64]{2,1,0} parameter(2)
  %two = u32[]{:T(128)} constant(2)
  %fusion.0 = (bf16[8,32]{1,0}, bf16[32,32]{1,0}, u32[]{:S(2)}) fusion(%a.0), kind=kCustom, calls=%begin
  %given = bf16[8,32]{1,0} get-tuple-element(%fusion.0), index=0
  %space = bf16[32,32]{1,0} get-tuple-element(%fusion.0), index=1
  %copy-start.1 = (bf16[4,24,64]{2,1,0:S(1)}, bf16[4,24,64]{2,1,0}, u32[]{:S(2)}) copy-start(%a.2)
  %copy-done.1 = bf16[4,24,64]{2,1,0:S(1)} copy-done(%copy-start.1)
  %tuple.3 = (u32[]{:T(128)}, bf16[4,16,64]{2,1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}, /*index=4*/bf16[4,24,64]{2,1,0:S(1)}) tuple(%two, %a.1, %given, %space, %copy-done.1)
  %while.1 = (u32[]{:T(128)}, bf16[4,16,64]{2,1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}, /*index=4*/bf16[4,24,64]{2,1,0:S(1)}) while(%tuple.3), condition=%condition, body=%body
  %last.1 = bf16[8,32]{1,0} get-tuple-element(%while.1), index=2
  %last.2 = bf16[32,32]{1,0} get-tuple-element(%while.1), index=3
  ROOT %fusion.2 = bf16[32,32]{1,0} fusion(%last.1, %last.2), kind=kCustom, calls=%end
}
"""

SMALL, LARGE, ROWS, NEAR, OUT = 2 * 8 * 32, 2 * 32 * 32, 2 * 4 * 16 * 64, 2 * 4 * 24 * 64, 2 * 4 * 16 * 24


def test_a_batched_product_of_a_tpu_is_one_product_for_each_of_the_batch_and_turns_follow_from_the_counter():
    assert program_cost(TPU).flops == 4 * (4 * 2 * 16 * 24 * 64)
    assert program_cost(TPU, loops=False).flops == 4 * 2 * 16 * 24 * 64
    assert program_cost(TPU).unknown_loops == 0
    assert program_cost(TPU.replace("constant(12)", "constant(13)")).flops == program_cost(TPU).flops  # 2, 5, 8, 11
    assert program_cost(TPU.replace("constant(12)", "constant(15)")).flops / program_cost(TPU).flops == 5 / 4
    assert program_cost(TPU.replace("direction=LT", "direction=GT")).unknown_loops == 1


def test_a_gather_that_runs_beside_others_is_one_gather_and_what_is_passed_on_is_counted_every_turn():
    gather, permute = sorted(program_cost(TPU).collectives, key=lambda c: c.kind)
    assert (gather.kind, gather.group_size, gather.shape, gather.count) == ("all-gather", 4, "bf16[8,32]", 1)
    assert gather.sent_bytes == 3 * SMALL
    assert (permute.kind, permute.shape, permute.count, permute.sent_bytes) == (
        "collective-permute",
        "bf16[4,16,64]",
        4,
        4 * ROWS,
    )


def test_vector_memory_costs_nothing_and_what_is_carried_through_is_not_read_again():
    begin = SMALL + LARGE
    copy = NEAR  # read only: it arrives in vector memory
    turn = (ROWS + OUT) + (ROWS + ROWS) + 3 * 4  # the product, the message, the counter
    assert program_cost(TPU).memory_bytes == begin + copy + 4 * turn


SPLASH = """HloModule kernel, num_partitions=1

ENTRY %main (a.0: s8[1,2,2], a.1: bf16[2,4,1024,128], a.2: bf16[2,2,1024,128]) -> bf16[2,4,1024,128] {
  %a.0 = s8[1,2,2]{2,1,0} parameter(0)
  %a.1 = bf16[2,4,1024,128]{3,2,1,0} parameter(1)
  %a.2 = bf16[2,2,1024,128]{3,2,1,0} parameter(2)
  ROOT %splash.1 = bf16[2,4,1024,128]{3,2,1,0} custom-call(%a.0, %a.1, %a.2), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512}"
}}, metadata={op_name="jit(f)/attention_window0/vmap(static_sparsity_splash)/splash_mha_fwd_segmented/pallas_call"}
}
"""


@pytest.mark.parametrize(("phase", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_an_attention_kernel_counts_the_products_of_the_blocks_that_it_meets(phase, products):
    text = SPLASH.replace("_fwd_", f"_{phase}_")
    block = products * 2 * 2 * 4 * 512 * 512 * 128
    assert program_cost(text).flops == 3 * block
    assert program_cost(text.replace("window0", "window513")).flops == 3 * block
    assert program_cost(text.replace("window0", "window1")).flops == 2 * block
    assert program_cost(text.replace("[2,4,", "[4,").replace("[2,2,1024", "[2,1024")).flops == 3 * block / 2  # one row
    assert program_cost(text).memory_bytes == 4 + 2 * 2 * (4 + 4 + 2) * 1024 * 128


def test_blockwise_attention_counts_the_blocks_that_order_and_window_leave():
    def flops(window):
        q = jax.ShapeDtypeStruct((1, 4 * BLOCK, 2, 16), jnp.float32)
        return program_cost(jax.jit(lambda q: blockwise_attention(q, q, q, None, window)).lower(q).compile().as_text()).flops

    block = 2 * 2 * 2 * BLOCK * BLOCK * 16
    assert flops(0) == 10 * block
    assert flops(BLOCK) == 7 * block


def test_a_conditional_counts_as_its_largest_branch():
    def chosen(number, x):
        return jax.lax.switch(number, [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x], x)

    text = jax.jit(chosen).lower(jnp.int32(0), jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile().as_text()
    assert text is not None and "conditional(" in text
    assert program_cost(text).flops == 2 * 2 * 16**3


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse_hlo("HloModule nothing\n")


def test_shapes_are_read_with_their_kind_size_and_place():
    computations, entry = parse_hlo(TPU)
    assert entry == "main" and set(computations) == {"begin", "beside", "end", "body", "condition", "main"}
    shapes = computations["main"]["copy-start.1"].shapes
    assert [s.on_chip for s in shapes] == [True, False, True]
    assert shapes[0].num_bytes == np.zeros((4, 24, 64), np.float16).nbytes
    kinds = "%a (x: s4[8]) -> s4[8] {\n  ROOT %x = (s4[8]{0}, pred[3]{0}, f8e4m3fn[5]{0}, c64[2]{0}, token[]) parameter(0)\n}\n"
    (leaf,) = parse_hlo("ENTRY " + kinds)[0]["a"].values()
    assert [s.num_bytes for s in leaf.shapes] == [4, 3, 5, 16, 0]
