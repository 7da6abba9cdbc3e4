"""The table of chips against the makers' pages, and what is looked up in it."""

import subprocess
import sys

import pytest

from lindm.llm.parallel.chips import CHIPS, GPUS, PLANNED, TPU_GENERATIONS, find_chip, parse_gpus, parse_topology, tpu_topology


@pytest.mark.parametrize(
    "topology, chips, hosts, accelerator",
    [
        ("v5e:1x1", 1, 1, "v5litepod-1"),
        ("v5e:2x4", 8, 1, "v5litepod-8"),
        ("v5e:4x4", 16, 4, "v5litepod-16"),
        ("v6e:2x2", 4, 1, "v6e-4"),
        ("v6e:16x16", 256, 64, "v6e-256"),
        ("v5p:2x2x1", 4, 1, "v5p-8"),
        ("v5p:2x2x2", 8, 2, "v5p-16"),
        ("v5p:4x4x4", 64, 16, "v5p-128"),
        ("v5p:8x16x16", 2048, 512, "v5p-4096"),
        ("v5p:16x16x24", 6144, 1536, "v5p-12288"),
    ],
)
def test_a_slice_has_the_chips_and_hosts_of_the_makers_table(topology, chips, hosts, accelerator):
    topology_of = parse_topology(topology)
    assert (topology_of.num_chips, topology_of.num_hosts, topology_of.accelerator_type) == (chips, hosts, accelerator)
    assert topology_of.chips_per_host * hosts == chips


def test_no_two_shapes_of_a_generation_have_as_many_chips():
    """The accelerator type of a Cloud TPU, which has only a count, therefore determines the shape."""
    for name, generation in TPU_GENERATIONS.items():
        assert len({parse_topology(f"{name}:{shape}").accelerator_type for shape in generation.slices}) == len(generation.slices)


@pytest.mark.parametrize(
    "device_kind, name",
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200-NVL"),
        ("NVIDIA B200", "B200"),
        ("TPU7x", "tpu7x"),
        ("cpu", None),
        ("TPU v9", None),
    ],
)
def test_a_chip_is_recognized_by_the_longest_prefix_of_its_device_kind(device_kind, name):
    chip = find_chip(device_kind)
    assert (chip and chip.name) == name


def test_names_and_device_kinds_are_unique_and_every_generation_has_a_link_bandwidth():
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(set(kinds)) == len(kinds) and len({chip.name for chip in CHIPS}) == len(CHIPS)
    assert set(TPU_GENERATIONS) == {"v5e", "v6e", "v5p"}
    assert all(chip.link_bandwidth for chip in CHIPS if chip.tpu)


def test_the_sizes_of_a_topology_need_not_be_those_of_a_slice_that_is_offered():
    assert tpu_topology("v5e:3x5") == "v5e:3x5" and tpu_topology("v5p:2x2x1") == "v5p:2x2x1"


@pytest.mark.parametrize(
    "name, topology",
    [
        ("v5e-16", "v5e:4x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-1", "v5e:1x1"),
        ("v6e-8", "v6e:2x4"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-32", "v5p:2x2x4"),
        ("tpu7x-8", "tpu7x:2x2x1"),
        ("tpu7x-16", "tpu7x:2x2x2"),
        ("v5p:2x2x2", "v5p:2x2x2"),
    ],
)
def test_the_name_of_a_cloud_counts_chips_or_cores(name, topology):
    assert tpu_topology(name) == topology


def test_a_job_takes_the_names_of_clouds_too_and_refuses_what_it_cannot_start():
    assert parse_topology("v5e-16") == parse_topology("v5e:4x4") and parse_topology("v5p-32").num_chips == 16
    assert "tpu7x" in PLANNED
    for name in ("tpu7x:2x2x1", "tpu7x-8"):
        with pytest.raises(ValueError, match=f"topology must be one of v5e:1x1, .*got '{name}'"):
            parse_topology(name)


def test_gpus_are_those_of_one_node():
    cards = {"a100-40gb", "a100-pcie", "a100-pcie-40gb", "h100-pcie", "h100-nvl", "h200-nvl"}
    assert set(GPUS) == {"a100", "h100", "h200", "b200"} | cards
    assert parse_gpus("h100-NVL:2") == (find_chip("NVIDIA H100 NVL"), 2)
    assert parse_gpus("h100:8") == (find_chip("NVIDIA H100 80GB HBM3"), 8) and parse_gpus("B200:2") == (
        find_chip("NVIDIA B200"),
        2,
    )
    assert parse_gpus("v5e:4x4") is None and parse_gpus("host") is None
    for name in ("h100:16", "h100", "h100:", "h100:0", "h200:x"):
        with pytest.raises(ValueError, match=f"1, 2, 4 or 8 GPUs of one node, .* got '{name}'"):
            parse_gpus(name)


def test_the_table_imports_nothing_heavy():
    code = "import sys, lindm.llm.parallel.chips; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
