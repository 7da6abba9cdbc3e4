"""Experiments from Python: the settings of the process are afterwards as they were, and the result is that of the command."""

import json
import os
import signal
import subprocess
import sys

import pytest

import lindm as ld
from lindm.errors import UsageError
from lindm.io import files
from lindm_experiments.harness.report import VERDICTS_FORMAT
from tests.clock import HANGS


@pytest.mark.slow
def test_the_settings_of_the_process_are_kept(tmp_path):
    code = (
        "import os, signal, jax, lindm as ld\n"
        "environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)\n"
        f"result = ld.run_experiment('controls', 'smoke', {str(tmp_path / 'run')!r}, seeds=1)\n"
        "assert result.summary['claims'] and not jax.config.jax_enable_x64\n"
        "assert signal.getsignal(signal.SIGTERM) == handler\n"
        "names = ('XLA_FLAGS', 'JAX_ENABLE_X64', 'GLIBC_TUNABLES')\n"
        "assert all(os.environ.get(name) == environment.get(name) for name in names)\n"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr


def test_the_result_is_what_verdicts_json_holds(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    result = ld.run_experiment("controls", "smoke", tmp_path / "run", seeds=1)
    written = files.read_json(tmp_path / "run" / "verdicts.json", format=VERDICTS_FORMAT)
    assert written == json.loads(json.dumps(result.summary))
    assert result.directory == tmp_path / "run" and signal.getsignal(signal.SIGINT) == before


def test_wrong_arguments_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="did you mean risk"):
        ld.run_experiment("rsk")
    with pytest.raises(UsageError, match="did you mean quick"):
        ld.verify("qick", tmp_path)
    with pytest.raises(UsageError, match="did you mean estimation-slope"):
        ld.verify("smoke", tmp_path, only=["estimation-slop"])
