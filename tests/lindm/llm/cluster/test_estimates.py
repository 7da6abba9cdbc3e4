"""Estimates for devices without a compiler, against compiled steps."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lindm.llm.cluster import plan
from lindm.llm.config import read_model_config
from tests.lindm.llm.cluster.test_plan import GIB, JOB, LARGE_VOCABULARY, LIMITS, TINY, planned


def test_an_estimate_counts_what_the_backward_pass_recomputes_as_the_compiled_step_does():
    """The blocks with remat full, whose last product no gradient needs; and logits in two parts, of which one is in memory."""
    for job in (replace(JOB, remat="full"), LARGE_VOCABULARY):
        compiled = planned(job)
        (estimated,) = plan.estimate_plans(job, 1, LIMITS, [{"data": 1, "fsdp": 1, "tensor": 1}])
        last = 2 * job.batch * job.seq * TINY.num_layers * TINY.hidden_size * TINY.intermediate_size * (job.remat == "full")
        assert estimated.cost.flops - last == pytest.approx(compiled.cost.flops, rel=0.02)
    assert estimated.memory.peak == pytest.approx(compiled.memory.peak, rel=0.1)


# peaks in GiB that the TPU compiler reported for a model of Llama-3-8B's shape, batches of 2,048 tokens (docs/plan.md)
COMPILED = [
    ({"method": "lora", "batch": 16}, {"fsdp": 16}, 9.63),
    ({"method": "lora", "batch": 16}, {"fsdp": 8, "tensor": 2}, 10.56),
    ({"method": "lora", "batch": 16}, {"data": 2, "fsdp": 2, "tensor": 4}, 15.64),
    ({"method": "lora", "batch": 16}, {"data": 4, "fsdp": 2, "tensor": 2}, 17.92),
    ({"batch": 16}, {"fsdp": 16}, 17.17),
    ({"batch": 16, "remat": "full"}, {"fsdp": 16}, 11.1),
    ({"method": "qlora", "base": "nf4", "batch": 4}, {"fsdp": 4}, 9.89),
]


@pytest.mark.parametrize("step, sizes, peak", COMPILED)
def test_the_estimate_of_a_large_model_is_within_15_percent_of_its_compiled_memory(step, sizes, peak):
    config = read_model_config(Path(__file__).parents[1] / "files/llama-3-8b")
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | sizes
    spec = plan.StepSpec(model_config=config, seq=2048, **step)
    (estimated,) = plan.estimate_plans(spec, int(np.prod(list(sizes.values()))), LIMITS, [sizes])
    assert estimated.memory.peak / GIB == pytest.approx(peak, rel=0.15)


def test_an_estimate_refuses_a_mesh_that_leaves_devices_or_does_not_divide():
    with pytest.raises(ValueError, match="mesh must use all 8 devices; data=1,fsdp=2,tensor=1 uses 2"):
        plan.estimate_plans(JOB, 8, LIMITS, [{"data": 1, "fsdp": 2, "tensor": 1}])
    with pytest.raises(ValueError, match="batch must be a multiple of data x fsdp = 8; got 4"):
        plan.estimate_plans(JOB, 8, LIMITS, [{"data": 1, "fsdp": 8, "tensor": 1}])
