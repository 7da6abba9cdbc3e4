"""What cannot be planned for is refused with a reason."""

import importlib.util
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from lindm.errors import LindmError, UsageError
from lindm.llm.cluster import plan
from lindm.llm.parallel.sharding import make_mesh
from tests.lindm.llm.cluster.test_plan import GIB, JOB, LIMITS, lowered


class Refusing:
    def __init__(self, message):
        self.message = message

    def lower(self, *arguments):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    "message, needs",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm.\nmore", 21.5 * GIB),
        (
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (149.06G) exceeds available HBM (15.75G).",
            149.06 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: no more", None),
    ],
)
def test_a_program_that_exceeds_the_memory_has_a_plan_that_does_not_fit(monkeypatch, message, needs):
    program = plan.step_program(JOB, make_mesh({}, jax.devices()[:1]))
    monkeypatch.setattr(plan, "step_program", lambda job, mesh: program._replace(step=Refusing(message)))
    answer = plan.compile_plan(JOB, make_mesh({}, jax.devices()[:1]), LIMITS)
    assert not answer.fits and answer.memory is None and answer.bound_seconds == np.inf
    assert answer.refusal == message.splitlines()[0] and answer.required_bytes == (needs and int(needs))
    assert json.loads(json.dumps(plan.plan_to_json(answer), allow_nan=False))["refusal"] == answer.refusal


def test_another_failure_of_the_compiler_raises_an_error(monkeypatch):
    program = plan.step_program(JOB, make_mesh({}, jax.devices()[:1]))
    monkeypatch.setattr(plan, "step_program", lambda job, mesh: program._replace(step=Refusing("INTERNAL: something else")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        plan.compile_plan(JOB, make_mesh({}, jax.devices()[:1]), LIMITS)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"seq": 4}, "seq must be at least labels_per_row = 8"),
        ({"remat": "some"}, "remat must be one of full, selective, none; got 'some'"),
        ({"seq": 256}, "at most the model's 128; got 256"),
        ({"method": "adapters"}, "method must be one of full, lora, qlora; got 'adapters'"),
        ({"base": "nf4"}, "base must be one of f32 with method full; got 'nf4'"),
        ({"method": "qlora", "base": "bf16"}, "base must be one of int8, nf4 with method qlora; got 'bf16'"),
        ({"dtype": "f16"}, "dtype must be one of f32, bf16; got 'f16'"),
    ],
)
def test_an_invalid_job_raises_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        replace(JOB, **change)


def test_a_mesh_that_divides_neither_batch_nor_weights_raises_an_error():
    with pytest.raises(ValueError, match="batch must be a multiple of data x fsdp = 8; got 4"):
        lowered(JOB, fsdp=8)
    with pytest.raises(ValueError, match=r"mesh must divide blocks\.\w+\.kernel .* tensor=3 does not divide"):
        lowered(JOB, tensor=3)
    with pytest.raises(ValueError, match="mesh must use all 8 devices"):
        plan.compile_plans(JOB, jax.devices(), LIMITS, [{"fsdp": 2}])


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:4", "v5p:4x4", "v5e:2x2x2", "tpu", "v5e:4x4 ", "v5p-3", "l40s:8"])
def test_an_invalid_topology_raises_an_error_with_the_known_forms(name):
    with pytest.raises(ValueError, match=r"slice by its chips \(v5e:4x4, .* v5p-32, tpu7x-8; .* \(h100:8, .*; got '"):
        plan.topology_devices(name)


def test_a_name_that_is_near_others_names_them():
    with pytest.raises(ValueError, match=r"got 'v5e-17'; did you mean v5e-1 or v5e-16\?"):
        plan.topology_devices("v5e-17")


def test_without_the_compiler_of_tpus_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LindmError) as e:
        plan.topology_devices("v5e:4x4")
    assert isinstance(e.value, UsageError) and "pip install -e '.[tpu]'" in str(e.value)
