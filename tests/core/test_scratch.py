"""Temporary folders: gone at the end, and found where their process was killed."""

import os
import signal
import subprocess
import sys

import pytest

from penjing.core import scratch as module
from penjing.core.files import is_temporary, remove_leftovers
from penjing.core.scratch import VARIABLE, remove_abandoned, scratch, scratch_in

HOLD = """
import sys, time
from penjing.core.scratch import scratch
with scratch() as folder:
    (folder / "inputs.npy").write_bytes(b"data of a user")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    module._sweep.cache_clear()


def hold(tmp_path, **environment):
    command = [sys.executable, "-c", HOLD]
    there = {**os.environ, "TMPDIR": str(tmp_path), **environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=there)
    return process, process.stdout.readline().strip()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_folder_is_removed_at_the_end_of_its_block(tmp_path):
    with scratch() as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_at_the_next_start_and_no_other(tmp_path):
    foreign = tmp_path / ".other-1.tmp"
    foreign.mkdir()
    dead, left = hold(tmp_path)
    kill(dead)
    alive, held = hold(tmp_path)
    try:
        # The second process removed what the first had left, and keeps its own.
        assert not os.path.exists(left)
        with scratch() as mine:
            assert {str(p) for p in tmp_path.iterdir()} == {held, str(mine), str(foreign)}
            assert remove_abandoned(tmp_path) == []
    finally:
        kill(alive)
    assert [str(path) for path in remove_abandoned(tmp_path)] == [held]


def test_folders_of_a_run_lie_in_its_folder_and_are_its_leftovers(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    with scratch_in(run):
        process, left = hold(elsewhere)
        kill(process)
        with scratch() as mine:
            assert mine.parent == run
            assert os.path.exists(left), "its next start removes it, not this process"
    assert os.path.dirname(left) == str(run)
    assert is_temporary(os.path.basename(left))
    assert remove_leftovers(run) == [os.path.basename(left)]
    assert VARIABLE not in os.environ
    assert list(elsewhere.iterdir()) == []


def test_without_locks_a_folder_is_given_and_never_taken_for_abandoned(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(95, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    with scratch() as folder:
        assert remove_abandoned(tmp_path) == []
        assert folder.is_dir()
