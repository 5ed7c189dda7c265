"""Faults of the machine are told apart from those of the job, whatever raised them and however deep."""

import errno
import os
import subprocess
import sys

import pytest

from penjing.core.errors import Exit, Refused
from penjing.core.executor import Limits, refusal_of, refused_from
from penjing.core.files import refusing
from penjing.core.system import NAMES, system_fault
from penjing.processes.local import LocalExecutor

ENOUGH = Limits(seconds=60, grace_s=0.3)


def fail(payload, say, how, number):
    error = OSError(number, os.strerror(number), "/data/x.npy")
    if how == "plain":
        raise error
    if how == "refused":
        with refusing("/data/x.npy"):
            raise error
    if how == "caused":
        raise ValueError("could not be saved") from error
    if how == "handled":
        try:
            raise error
        except OSError:
            raise KeyError("while handling")  # noqa: B904
    if how == "worded":
        raise RuntimeError(f"the writer failed: {os.strerror(number)} [file.cc:12]")
    if how == "forgotten":
        try:
            raise error
        except OSError:
            raise ValueError("a fault of its own") from None


@pytest.mark.parametrize("how", ["plain", "refused", "caused", "handled", "worded"])
def test_a_full_disk_is_a_fault_of_the_machine_however_it_is_told(how):
    with LocalExecutor(None) as executor:
        finished = executor.run(fail, how, errno.ENOSPC, limits=ENOUGH)
    assert finished.status == ("refused" if how == "refused" else "crashed")
    assert finished.fault == "ENOSPC"


@pytest.mark.parametrize("name", NAMES)
def test_every_error_that_more_room_or_a_permission_mends_is_named(name):
    number = getattr(errno, name)
    assert system_fault(OSError(number, os.strerror(number))) == name


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EISDIR, errno.EINVAL, errno.ENOMEM])
def test_errors_of_the_job_itself_are_no_fault_of_the_machine(number):
    with LocalExecutor(None) as executor:
        finished = executor.run(fail, "plain", number, limits=ENOUGH)
        assert (finished.status, finished.fault) == ("crashed", "")
        assert executor.run(fail, "forgotten", errno.ENOSPC, limits=ENOUGH).fault == ""
        assert executor.run(lambda payload, say: {}, limits=ENOUGH).fault == ""


def test_a_job_in_the_driver_s_process_tells_the_same():
    with LocalExecutor(None, in_process=True) as executor:
        assert executor.run(fail, "caused", errno.EMFILE, limits=ENOUGH).fault == "EMFILE"


def test_a_refusal_keeps_its_fault_through_processes():
    with pytest.raises(Refused) as caught:
        fail(None, None, "refused", errno.EACCES)
    there = refused_from(refusal_of(caught.value))
    assert system_fault(there) == "EACCES"
    assert refusal_of(there) == refusal_of(caught.value)
    assert there.code == Exit.ENVIRONMENT


FEW_FILES = """
import os, resource, sys
import psutil
from penjing.core.errors import Exit, Refused
from penjing.core.executor import Limits
from penjing.processes.local import LocalExecutor

def job(payload, say):
    return {"x": 1}

with LocalExecutor(None) as executor:
    assert executor.run(job, limits=Limits(seconds=60)).value == {"x": 1}
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    for more in range(14):
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, hard))
        try:
            print(executor.run(job, limits=Limits(seconds=60)).status)
        except Refused as refused:
            assert refused.code == Exit.ENVIRONMENT, refused
            print("refused")
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        assert psutil.Process().children() == []
"""


def test_too_many_open_files_are_refused_wherever_they_run_out():
    command = [sys.executable, "-W", "error", "-c", FEW_FILES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout.split()
    assert done.returncode == 0, done.stderr
    assert said == sorted(said, reverse=True), "refused up to some number of files, done from there on"
    assert {"refused", "done"} == set(said)
    assert "Exception ignored" not in done.stderr
