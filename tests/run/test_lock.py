import os
import signal
import socket
import subprocess
import sys

import pytest

from penjing.core.errors import Exit, Refused
from penjing.run.lock import DriverLock, Owner, find_owner

HOLDER = """
import os, sys, time
from penjing.run.lock import DriverLock
with DriverLock(sys.argv[1]):
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(30)
    print("held", flush=True)
    time.sleep(30)
"""


def hold(path, *more):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, *more], stdout=subprocess.PIPE, start_new_session=True
    )
    assert holder.stdout.readline() == b"held\n"
    return holder


def end(holder):
    os.killpg(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()


def test_second_process_is_told_who_drives(tmp_path):
    holder = hold(tmp_path / "lock")
    try:
        with pytest.raises(Refused, match=f"PID {holder.pid} on {socket.gethostname()}") as caught:
            DriverLock(tmp_path / "lock").__enter__()
        assert caught.value.code == Exit.ENVIRONMENT
        assert find_owner(tmp_path / "lock") == Owner(pid=holder.pid, host=socket.gethostname())
        os.kill(holder.pid, signal.SIGSTOP)  # a driver that sleeps still drives
        with pytest.raises(Refused):
            DriverLock(tmp_path / "lock").__enter__()
    finally:
        end(holder)


def test_dead_drivers_lock_is_recovered(tmp_path):
    """Even where a child that it forked lives on."""
    holder = hold(tmp_path / "lock", "fork")
    holder.kill()
    holder.wait()
    try:
        assert find_owner(tmp_path / "lock") is None
        with DriverLock(tmp_path / "lock"):
            assert find_owner(tmp_path / "lock").pid == os.getpid()
    finally:
        end(holder)


def test_once_in_a_process_and_again_after_leaving(tmp_path):
    with DriverLock(tmp_path / "lock"):
        (tmp_path / "other").symlink_to(tmp_path / "lock")
        for name in ("lock", "other"):
            with pytest.raises(Refused, match=str(os.getpid())):
                DriverLock(tmp_path / name).__enter__()
    assert find_owner(tmp_path / "lock") is None
    with DriverLock(tmp_path / "lock"):
        pass
    assert find_owner(tmp_path / "none") is None


def test_no_folder(tmp_path):
    with pytest.raises(Refused) as caught:
        DriverLock(tmp_path / "none" / "lock").__enter__()
    assert caught.value.code == Exit.ENVIRONMENT
