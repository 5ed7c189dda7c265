"""Whole runs, killed at random moments of every phase, until each has come to its end all the same.

    python benchmarks/kill_anywhere.py [--kills 100] [--out build/kills]

A tiny network is optimized from the command line. After a random phase has begun and a random time has
passed, the driver or one of its child processes gets a signal: SIGKILL, SIGINT, SIGTERM, or SIGSTOP followed
by SIGCONT or by SIGKILL for the driver. Then the run is resumed, and hit again, four times; the fifth session
is left in peace. Counted are:

- rows lost: results in the ledger before a kill that are gone or changed after it;
- dead runs: sessions that end with another code than they should, or a last one that does not finish;
- leftovers: processes that outlive their driver, temporary files in the run folder and in the system's.

Every line printed is one kill; `kills.jsonl` keeps them, and a second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

PENJING = str(Path(sys.executable).with_name("penjing"))
HITS = 4
"""Kills of one run before it is left in peace."""

PHASES = (
    "",  # from the first byte
    "run directory",
    "looking at the model",
    "exporting the original",
    "measuring the original",
    "comparing precision recipes",
    "writing recipe",
    "probing",
    "trying",
    "done:",
    "certifying",
)
"""Beginnings of the lines after which a signal may come; nothing: of the command itself."""

WAYS = ("kill", "interrupt", "terminate", "pause", "pause and kill", "kill a child", "pause a child and kill")

TASK = """
import numpy as np
import torch
import penjing as pj
from torch import nn


def task():
    rng = np.random.default_rng(0)
    labels = np.arange(1500) % 5
    inputs = (rng.standard_normal((5, 16))[labels] + 0.4 * rng.standard_normal((1500, 16))).astype(np.float32)
    parts = (slice(0, 500), slice(500, 1000), slice(1000, 1500))
    train, valid, test = ((inputs[part], labels[part]) for part in parts)
    return pj.Task(train=train, valid=valid, test=test)


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    data = task()
    x, y = map(torch.from_numpy, data.train)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net
"""
LIMITS = ("--max-drop", "20%", "--size", "70%", "--trials", "2")


def rows(run: Path) -> dict[str, str]:
    """Return the ledger's results by key; none before there is a ledger."""
    if not (run / "ledger.sqlite").is_file():
        return {}
    with sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True, timeout=60) as db:
        return dict(db.execute("SELECT key, record FROM results"))


class Session:
    """One start of the command, with what it says."""

    def __init__(self, folder: Path, run: Path) -> None:
        fresh = not (run / "config.resolved.yaml").is_file()
        arguments = (
            ["optimize", str(folder / "task.py"), *LIMITS, "--out", str(run)]
            if fresh
            else ["resume", str(run)]
        )
        self.log = folder / "stderr.txt"
        with self.log.open("wb") as file:
            self.process = subprocess.Popen([PENJING, *arguments], stdout=subprocess.DEVNULL, stderr=file)

    def wait_for(self, phase: str, limit: float = 600.0) -> bool:
        """Wait until a line begins so; False where the session ends before."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if not phase or any(line.startswith(phase) for line in self.said()):
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        raise TimeoutError(f"no line {phase!r} in {limit:g} s: {self.said()[-3:]}")

    def said(self) -> list[str]:
        """Return the lines so far."""
        return self.log.read_text("utf-8", "replace").splitlines()


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return all processes below a driver."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def hit(session: Session, way: str, rng: random.Random) -> bool:
    """Send the signals of a way; tell whether the driver is expected to end by them."""
    driver, children = session.process, family(session.process)
    if way == "kill":
        driver.kill()
    elif way == "interrupt":
        driver.send_signal(signal.SIGINT)
    elif way == "terminate":
        driver.terminate()
    elif way.startswith("pause a child") or way == "kill a child":
        if not children:
            driver.kill()
            return True
        child = rng.choice(children)
        number = signal.SIGKILL if way == "kill a child" else signal.SIGSTOP
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)
        if way == "kill a child":
            return False
        time.sleep(0.3)
        driver.kill()
    else:
        driver.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        driver.send_signal(signal.SIGKILL if way == "pause and kill" else signal.SIGCONT)
        return way == "pause and kill"
    return True


ENDS = {"interrupt": {130}, "terminate": {130}}
ENDED = {0, 3}


def one_kill(folder: Path, run: Path, rng: random.Random) -> dict[str, Any]:
    """Start or resume a run, hit it once, wait for its end, and look at what is left."""
    phase, way, delay = rng.choice(PHASES), rng.choice(WAYS), rng.random() ** 2 * 2.0
    session = Session(folder, run)
    reached = session.wait_for(phase)
    time.sleep(delay)
    before, children = rows(run), family(session.process)
    alive = session.process.poll() is None
    ends = hit(session, way, rng) if alive else True
    code = wait(session, None if ends else 600.0)
    _, orphans = psutil.wait_procs(children, timeout=15)
    after = rows(run)
    lost = sum(after.get(key) != value for key, value in before.items())
    expected = {-9} | ENDS.get(way, set()) | ENDED
    if not ends:
        expected |= {
            4,
            5,
        }  # a child that dies may be one that the run cannot do without: it says so, and goes on later
    return {
        "phase": phase or "start",
        "reached": reached and alive,
        "way": way,
        "delay": round(delay, 3),
        "code": code,
        "lost": lost,
        "dead": code not in expected,
        "orphans": len(orphans),
        "said": session.said()[-2:] if code not in expected else [],
    }


def wait(session: Session, limit: float | None) -> int:
    """Return the code of a driver; one that must end by a signal has 60 seconds for it."""
    try:
        return session.process.wait(60.0 if limit is None else limit)
    except subprocess.TimeoutExpired:
        session.process.kill()
        session.process.wait()
        return 999


def leftovers(run: Path) -> list[str]:
    """Return what a finished run must not leave: half-made files there and in the system's folder."""
    found = [str(path.relative_to(run)) for path in run.rglob(".penjing-*")]
    return found + [
        path.name for path in Path(tempfile.gettempdir()).glob("penjing-*") if path.stat().st_mtime > START
    ]


START = time.time()


def whole_run(folder: Path, number: int, seed: int, out: Path) -> list[dict[str, Any]]:
    """Hit one run several times, then let it finish; return its kills with what the end was like."""
    rng, run, kills = random.Random(f"{seed}/{number}"), folder / f"run{number}", []
    for _ in range(HITS):
        if (run / "record.json").is_file():
            break
        kills.append({"run": number, **one_kill(folder, run, rng)})
        print(json.dumps(kills[-1]), flush=True)
    last = Session(folder, run)
    code = wait(last, 1200.0)
    end = {
        "code": code,
        "dead": code not in ENDED or not (run / "record.json").is_file(),
        "left": leftovers(run),
    }
    end |= {"said": last.said()[-2:] if end["dead"] else []}
    print(json.dumps({"run": number, "end": end}), flush=True)
    with out.open("a") as file:
        file.writelines(json.dumps(kill | {"end": end}) + "\n" for kill in kills)
    if not end["dead"]:
        shutil.rmtree(run)
    return kills


def report(found: list[dict[str, Any]]) -> None:
    """Print the counts, by phase and by way."""
    runs = {kill["run"]: kill["end"] for kill in found}
    dead = sum(kill["dead"] for kill in found) + sum(end["dead"] for end in runs.values())
    left = sum(kill["orphans"] for kill in found) + sum(len(end["left"]) for end in runs.values())
    working = sum(kill["reached"] for kill in found)
    print(f"{len(found)} kills in {len(runs)} runs, {working} while the run was at work")
    print(f"rows lost: {sum(kill['lost'] for kill in found)}; dead runs: {dead}; leftovers: {left}")
    for name in ("phase", "way"):
        counts = Counter(kill[name] for kill in found)
        print("\n".join(f"| {key} | {count} |" for key, count in sorted(counts.items())))


def main() -> None:
    """Kill until there were enough, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/kills"))
    options = parser.parse_args()
    folder = options.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.py").write_text(TASK)
    kept = folder / "kills.jsonl"
    found = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    number = max((kill["run"] for kill in found), default=0)
    while len(found) < options.kills:
        number += 1
        whole_run(folder, number, options.seed, kept)
        found = [json.loads(line) for line in kept.read_text().splitlines()]
    report(found)


if __name__ == "__main__":
    main()
