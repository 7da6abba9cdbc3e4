"""The manifest of a directory: where its files come from, and what they are."""

import json
import platform

from lindm.io import files
from lindm.io.manifest import FORMAT, write_manifest


def test_a_manifest_has_provenance_what_the_caller_adds_and_a_hash_of_every_output(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("a.txt", "below/b.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path, ["a.txt", "below/b.txt"], preset="quick")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format"] == FORMAT and manifest["preset"] == "quick"
    assert manifest["python"] == platform.python_version() and {"lindm", "jax", "numpy"} <= manifest["versions"].keys()
    assert set(manifest["git"]) == {"commit", "dirty"} and manifest["date"] and manifest["command"]
    assert manifest["outputs"] == {name: files.sha256(tmp_path / name) for name in ("a.txt", "below/b.txt")}
