"""`lindm doctor`: what it looks at, and what it says of versions and of a directory."""

from lindm.cli import doctor
from lindm.cli.main import main


def test_doctor_looks_at_versions_devices_precision_disk_and_fonts(tmp_path, capsys):
    code = main(["doctor", "--out", str(tmp_path / "not" / "there")])
    lines = capsys.readouterr().out.splitlines()
    named = {line[6:20].strip() for line in lines}
    assert {"python", "jax", "lock", "devices", "64-bit floats", "cores", "output", "free disk", "fonts"} <= named
    assert code == int(any(line.startswith("FAIL") for line in lines))
    assert not (tmp_path / "not").exists()


def test_doctor_names_a_package_that_is_not_as_locked(tmp_path, monkeypatch):
    pins = ("numpy==0.0.1", "not-a-package==1.0", "not-here==1.0 ; python_full_version < '3'")
    (tmp_path / "lock.txt").write_text("".join(f"{pin} \\\n    --hash=sha256:00\n" for pin in pins))
    monkeypatch.setattr(doctor, "LOCK", tmp_path / "lock.txt")
    assert doctor.check_lock() == ("lock", True, "not used by this environment; 0 of 2 packages have its versions")
    monkeypatch.setattr(doctor, "is_locked_environment", lambda: True)
    check = doctor.check_lock()
    assert not check.ok and "locked 0.0.1" in check.result and "not-a-package missing" in check.result
    assert "not-here" not in check.result


def test_doctor_fails_for_versions_that_lindm_does_not_allow_and_notes_extras_that_are_missing():
    allowed = ["numpy>=2.1", "pytest>=1; extra == 'dev'", "not-a-package>=1; extra == 'data'", "not-a-package; extra == 'bench'"]
    requirements, extras = doctor.check_requirements(allowed)
    assert requirements == ("requirements", True, "as lindm allows")
    assert extras == ("extras", True, "not installed: data (datasets and evaluations)")
    requirements, extras = doctor.check_requirements(
        ["numpy<2", "not-here>=3", "pytest<1; extra == 'gym'", "x; python_version < '3'"]
    )
    assert not requirements.ok and extras.result == "all installed"
    wrong = requirements.result.split("; ")
    assert [text.split()[0] for text in wrong] == ["numpy", "not-here", "pytest"] and wrong[1] == "not-here missing, needs >=3"


def test_doctor_reports_that_results_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert not doctor.check_output(tmp_path / "file" / "below")[0].ok
