"""What a run keeps of a point without a record: it removes its own directories alone, and restarts what it cannot continue."""

from types import SimpleNamespace

import pytest

from lindm.errors import OccupiedError, StorageError
from lindm_experiments.harness import tasks, unfinished
from lindm_experiments.harness.unfinished import directory_of, measuring_in, point_directory, remove_all_but


def test_the_directories_of_points_are_removed_and_files_of_the_user_stay(tmp_path):
    kept, old = directory_of(tmp_path, "kept"), directory_of(tmp_path, "old")
    half, drafts = old.with_name(f".{'0' * 16}.removed.lindm-tmp"), old.with_name("drafts")
    for directory in (kept, old, half, drafts):
        directory.mkdir(parents=True)
        (directory / "file").touch()
    remove_all_but(tmp_path, {kept})
    assert kept.exists() and drafts.exists() and not old.exists() and not half.exists()
    remove_all_but(tmp_path, set())
    assert [path.name for path in kept.parent.iterdir()] == ["drafts"]


def test_a_link_in_place_of_the_directory_is_not_followed(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    (mine := elsewhere / ("a" * 16)).mkdir(parents=True)
    (run / unfinished.UNFINISHED).symlink_to(elsewhere)
    remove_all_but(run, set())
    assert mine.exists()


def test_a_run_directory_that_was_removed_does_not_come_back(tmp_path):
    with (
        measuring_in(directory_of(tmp_path / "run", "point")),
        pytest.raises(StorageError, match="No such file"),
        point_directory(),
    ):
        pass
    assert not list(tmp_path.iterdir())


def record_of(monkeypatch, directory, measure):
    """The record of a point whose `measure` gets its directory."""

    def with_directory(cfg, point):
        with point_directory() as path:
            return {"found": measure(path)}

    monkeypatch.setattr(tasks, "load", lambda _: SimpleNamespace(Config=dict, measure=with_directory))
    return tasks.measure(tasks.Point(reference="toy", config={}, point={"seed": 0}, directory=directory))


def test_a_point_that_other_versions_began_is_measured_from_its_start(monkeypatch, tmp_path):
    def measure(path):
        if (path / "old").exists():
            raise OccupiedError("begun by other versions")
        return sorted(file.name for file in path.iterdir())

    directory = directory_of(tmp_path, "point")
    directory.mkdir(parents=True)
    (directory / "old").touch()
    assert '"found":[]' in record_of(monkeypatch, directory, measure).replace(" ", "")


def test_a_point_that_refuses_its_own_directory_is_an_error(monkeypatch, tmp_path):
    def measure(path):
        raise OccupiedError("another dataset")

    (tmp_path / unfinished.UNFINISHED).mkdir()
    with pytest.raises(OccupiedError, match="another dataset"):
        record_of(monkeypatch, directory_of(tmp_path, "point"), measure)
