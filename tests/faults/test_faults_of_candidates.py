"""Faults 49-53, 57 and 58: whatever a candidate does to its process, the search goes on and says why."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

import penjing as pj
from penjing.cli.show import exit_code
from penjing.core.artefact import open_artefact
from penjing.core.plan import plan_to_json
from penjing.search.build_job import build

FAULTS = {2: "kill", 3: "segfault", 4: "memory", 5: "hang"}
"""What the n-th candidate does; the first is the probe of the forecast, the others are really built."""


def faulty_build(shared, say, plan, target, folder, seed):
    number = len(list(folder.parent.iterdir()))
    with open(folder.parent.parent / "builds.txt", "a") as file:
        file.write(f"{number}\n")
    fault = FAULTS.get(number)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "memory":
        raise MemoryError("Unable to allocate 1 TiB")
    if fault == "hang":
        child = subprocess.Popen(["sleep", "600"])
        (folder.parent.parent / "child.txt").write_text(str(child.pid))
        time.sleep(600)
    return build(shared, say, plan, target, folder, seed)


def broken_build(shared, say, plan, target, folder, seed):
    raise ValueError("no luck")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("penjing.search.forecast.LEAST_PATIENCE", 2.0)
    monkeypatch.setattr("penjing.search.forecast.PATIENCE", 0.0)


def test_the_search_survives_every_end_of_a_candidate(optimize, impatient, monkeypatch, tmp_path):
    monkeypatch.setattr("penjing.search.evaluate.build", faulty_build)
    options = {"budget": {"size": "40%", "trials": 5}, "score": "l2", "round_to": (1,)}

    class Stop(list):
        def append(self, line):
            super().append(line)
            if line.startswith("certifying"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"what was finished is kept.*same call and out="):
        optimize(said=Stop(), **options)
    built = (tmp_path / "run" / "builds.txt").read_text()
    assert built.split() == ["1", "2", "3", "4", "5", "6"]

    record = optimize(**options).record
    assert (tmp_path / "run" / "builds.txt").read_text() == built, "failed or done, no candidate is repeated"
    killed, crashed, memory, hung, good = record["trials"]
    assert "killed (signal 9, probably out of memory)" in killed["reason"]
    assert "SIGSEGV" in crashed["reason"]
    assert "MemoryError: Unable to allocate 1 TiB" in memory["reason"]
    assert hung["reason"] == "timeout: stopped after 2 s"
    assert not psutil.pid_exists(int((tmp_path / "run" / "child.txt").read_text())), "an orphan is left"
    assert [t["status"] for t in record["trials"]] == ["failed"] * 4 + ["done"]
    assert record["plan"] == good["plan"], "the best of what worked is delivered"
    assert record["verdict"]["limits"]["size"]["status"] == "not_reached"
    log = next(p for p in (tmp_path / "run" / "logs").iterdir() if "Segmentation fault" in p.read_text())
    assert "faulty_build" in log.read_text(), "the log tells where the native crash came from"


def test_all_candidates_fail_and_the_original_is_returned(optimize, monkeypatch, tmp_path):
    monkeypatch.setattr("penjing.search.evaluate.build", broken_build)
    result = optimize(budget={"size": "40%", "trials": 2})
    assert [t["status"] for t in result.record["trials"]] == ["failed", "failed"]
    assert result.record["artefact"]["path"] == "float/target"
    assert result.record["result"]["size_bytes"] == result.record["baselines"]["target"]["size_bytes"]
    assert exit_code(result) == 3
    page = Path(result.report).read_text()
    assert "ValueError: no luck" in page
    assert result.load() is not None


def counted_build(shared, say, plan, target, folder, seed):
    with open(folder.parent.parent / "builds.txt", "a") as file:
        file.write("built\n")
    raise ValueError("no luck")


def repetitive(setting, options):
    for _ in range(3):
        yield pj.chain(pj.Int8Static())


def test_an_equal_plan_is_built_once(optimize, monkeypatch, tmp_path):
    monkeypatch.setattr("penjing.search.evaluate.build", counted_build)
    monkeypatch.setattr("penjing.search.optimize.bisect", repetitive)
    record = optimize(budget={"max_drop": "5%", "trials": 12}).record
    assert (tmp_path / "run" / "builds.txt").read_text() == "built\n"
    assert len({t["name"] for t in record["trials"]}) == 1
    assert record["verdict"]["limits"]["trials"]["measured"] <= 3, "the planner ended before the limit"


def test_steps_of_precision_behind_a_cut_keep_the_cut_float_model_for_the_ablation(tiny, tmp_path):
    plan = [pj.PruneChannels(ratio=0.5, score="l2"), pj.SmoothActivations(), pj.Int8Static()]
    model = tiny["model"]()
    build((model, tiny["task"]().prepare()), print, plan_to_json(plan), pj.Target(), tmp_path, 0)
    kept = open_artefact(tmp_path / "structure")
    assert [step["method"] for step in kept.plan] == ["PruneChannels"]
    assert kept.size_bytes < sum(weights["weight"].nbytes for weights in model.tensors.values())
