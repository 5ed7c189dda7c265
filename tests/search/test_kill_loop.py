"""A driver with lock, ledger and workers, killed at random times until it is done."""

import random
import signal
import subprocess
import sys
import time

import psutil

from penjing.run.ledger import Ledger
from penjing.run.lock import find_owner

DRIVER = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from penjing.core.executor import Limits, candidate_seed
from penjing.core.files import remove_leftovers, write_bytes, write_folder
from penjing.run.ledger import Ledger
from penjing.run.lock import DriverLock
from penjing.processes.local import LocalExecutor

folder = Path(sys.argv[1])

def job(payload, say, key, seed):
    import random, time
    time.sleep(0.4)  # six of these outlast the first kill on any machine
    target = folder / key
    if not target.exists():
        content = random.Random(seed).randbytes(1000)
        write_folder(target, lambda made: write_bytes(made / "model", content))
    return {"value": random.Random(seed).random()}

with DriverLock(folder / "lock"), Ledger(folder / "ledger") as ledger, LocalExecutor(None) as executor:
    remove_leftovers(folder)

    def candidate(key):
        if ledger.get(key) is None:
            ledger.begin(key, most=1000)
            finished = executor.run(job, key, candidate_seed(3, key), limits=Limits(seconds=60))
            assert ledger.put(key, finished.value)

    with ThreadPoolExecutor(int(sys.argv[2])) as pool:
        list(pool.map(candidate, [f"trial-{i}" for i in range(6)]))
"""


def start(folder, workers):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", DRIVER, folder, str(workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, cwd=folder)


def results(folder):
    with Ledger(folder / "ledger") as ledger:
        return dict(ledger.all())


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob("trial-*/*")}


def test_any_kill_gives_the_answer_of_an_undisturbed_run(tmp_path):
    calm = start(tmp_path / "calm", 2)
    assert calm.wait(60) == 0, calm.stderr.read()
    calm.stderr.close()
    rng, kills, finished = random.Random(2), 0, set()
    while True:
        driver = start(tmp_path / "shot", 1)
        try:
            driver.wait(0.6 + rng.random() if kills < 8 else 60)
        except subprocess.TimeoutExpired:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            kills += 1
        errors = driver.stderr.read().decode()
        driver.stderr.close()
        if driver.returncode == 0:
            break
        assert driver.returncode == -signal.SIGKILL, errors
        assert find_owner(tmp_path / "shot" / "lock") is None
        if (tmp_path / "shot" / "ledger").exists():
            assert finished <= results(tmp_path / "shot").keys()
            finished = set(results(tmp_path / "shot"))
    assert kills >= 1
    assert results(tmp_path / "shot") == results(tmp_path / "calm")
    assert files(tmp_path / "shot") == files(tmp_path / "calm")
    deadline = time.monotonic() + 10
    while working_in(tmp_path / "shot"):
        assert time.monotonic() < deadline, "a worker outlived its driver"
        time.sleep(0.05)


def working_in(folder):
    cwds = (process.info["cwd"] for process in psutil.process_iter(["cwd"]))
    return [cwd for cwd in cwds if cwd == str(folder)]
