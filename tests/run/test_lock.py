import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from penjing.core.errors import Exit, Refused
from penjing.run import lock as module
from penjing.run.lock import DriverLock, Owner, find_owner

HOLDER = """
import os, sys, time
from penjing.run import lock as module
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
    with DriverLock(tmp_path / "lock"), pytest.raises(Refused, match=str(os.getpid())):
        DriverLock(tmp_path / "lock").__enter__()
    assert find_owner(tmp_path / "lock") is None
    with DriverLock(tmp_path / "lock"):
        pass
    assert find_owner(tmp_path / "none") is None


TAKER = """
import sys
from penjing.core.errors import Refused
from penjing.run import lock as module
from penjing.run.lock import DriverLock
try:
    with DriverLock(sys.argv[1]):
        print("got it")
except Refused as refused:
    print(refused)
"""


def taker(path):
    return subprocess.run(
        [sys.executable, "-c", TAKER, path], capture_output=True, text=True, check=True
    ).stdout


def test_it_holds_though_its_own_process_reads_the_file(tmp_path):
    path = tmp_path / "lock"
    with DriverLock(path):
        for read in (path.read_bytes, lambda: open(path, "r+b").close(), lambda: find_owner(path)):
            read()
            assert f"PID {os.getpid()}" in taker(path)
        assert find_owner(path).pid == os.getpid()
    assert taker(path) == "got it\n"


def test_a_child_that_is_forked_inside_and_leaves_the_context_frees_nothing(tmp_path):
    with DriverLock(tmp_path / "lock") as lock:
        child = os.fork()
        if child == 0:
            lock.__exit__(None, None, None)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert find_owner(tmp_path / "lock").pid == os.getpid()


def test_whoever_asks_for_the_owner_turns_no_driver_away(tmp_path, monkeypatch):
    """The shared lock of one who asks is held for a moment; here until the driver waits."""
    path = tmp_path / "lock"
    path.touch()
    asking = os.open(path, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    waited = []
    monkeypatch.setattr(module.time, "sleep", lambda s: waited.append(fcntl.flock(asking, fcntl.LOCK_UN)))
    with DriverLock(path):
        assert len(waited) == 1
    os.close(asking)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with pytest.raises(Refused, match=r"needs a file system that can lock files.*local disk") as caught:
        DriverLock(tmp_path / "lock").__enter__()
    assert caught.value.code == Exit.ENVIRONMENT
    assert find_owner(tmp_path / "lock") is None


def test_a_link_is_not_followed_and_a_pipe_not_waited_for(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refused, match="symbolic links"):
        DriverLock(tmp_path / "link").__enter__()
    with pytest.raises(Refused, match="symbolic links"):
        find_owner(tmp_path / "link")
    assert find_owner(tmp_path / "pipe") is None
    assert (tmp_path / "precious").read_text() == "mine"


def test_no_folder(tmp_path):
    with pytest.raises(Refused) as caught:
        DriverLock(tmp_path / "none" / "lock").__enter__()
    assert caught.value.code == Exit.ENVIRONMENT
