"""Commands on disks that are full or read-only, and in directories that vanish: exit code 7, and with room they finish."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from lindm.cli.main import main
from lindm.io.temporaries import TEMPORARY_SUFFIX
from tests.limits import largest_file, read_only
from tests.promises import Trials

MAX_LIMITS = 4


def check_full_disk(command: Sequence[str], out: Path, capsys, trials: Trials) -> None:
    """The disk is full at the start, and at the end of files of every size that the command writes."""
    assert main(command) == 0, capsys.readouterr().err
    sizes = sorted({p.stat().st_size for p in out.rglob("*") if p.is_file() and p.stat().st_size})
    shutil.rmtree(out)
    limits = [0, *(size - 1 for size in sizes if size > 1)]
    for limit in sorted({limits[round(i * (len(limits) - 1) / (MAX_LIMITS - 1))] for i in range(MAX_LIMITS)}):
        with largest_file(limit):
            code = main(command)
        error = capsys.readouterr().err
        assert code == 7 and "cannot write" in error, f"files of at most {limit} bytes: {code}, {error}"
        assert TEMPORARY_SUFFIX not in error and not partial_files(out.parent)
        assert main(command) == 0, capsys.readouterr().err
        shutil.rmtree(out)
        trials.add()


def check_read_only(command: Sequence[str], out: Path, capsys, trials: Trials, closed: Sequence[Path]) -> None:
    """In each of the directories `closed`, one at a time, nothing may be written."""
    for directory in closed:
        out.mkdir(exist_ok=True)
        if directory != out:
            out.rmdir()
        with read_only(directory):
            code = main(command)
        error = capsys.readouterr().err
        assert code == 7 and f"cannot write {out}" in error, f"{directory}: {code}, {error}"
        trials.add()
    assert main(command) == 0, capsys.readouterr().err


def partial_files(directory: Path) -> list[Path]:
    return list(directory.rglob(f"*{TEMPORARY_SUFFIX}*"))
