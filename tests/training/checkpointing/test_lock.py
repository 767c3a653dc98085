"""The lock of a work directory, between real processes."""

import subprocess
import sys

import pytest

from fusedkv_jax.training.checkpointing.lock import WorkdirLockedError, lock_workdir

HOLDER = """
import pathlib, sys, time
from fusedkv_jax.training.checkpointing.lock import lock_workdir
with lock_workdir(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_second_process_is_refused_until_the_first_is_killed(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(WorkdirLockedError, match=f"process {holder.pid} on .*--workdir"):
            with lock_workdir(tmp_path):
                pass
        holder.kill()
    with lock_workdir(tmp_path):
        pass


def test_lock_is_free_again_after_the_block(tmp_path):
    for _ in range(2):
        with lock_workdir(tmp_path), pytest.raises(WorkdirLockedError):
            with lock_workdir(tmp_path):
                pass


def test_a_file_of_that_name_that_is_no_lock_stays(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xffmine")
    with pytest.raises(ValueError, match="is no lock of a run; move it away"):
        with lock_workdir(tmp_path):
            pass
    assert (tmp_path / ".lock").read_bytes() == b"\xffmine"
