"""Work that could be lost: stops in every phase, faults of the machine, files that a power cut emptied."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import penjing as pj
from penjing.core.artefact import deliver
from penjing.core.errors import Exit, Refused
from penjing.core.executor import Finished, refusal_of
from penjing.run.folder import RunFolder
from penjing.run.ledger import Ledger
from penjing.run.stopwatch import INTERVAL_S, Stopwatch, read_elapsed
from penjing.search.expected import EXPECTED, is_whole, read_expected, write_expected
from penjing.search.finished import stop_on_fault, stopping_on_fault

PENJING = str(Path(sys.executable).with_name("penjing"))


CUT = {"budget": {"max_drop": "50%", "size": "90%", "trials": 1}, "score": "l2"}
"""A run with one candidate, which is cut."""


class Stop(list):
    """Listens, and stops the run at a line."""

    def __init__(self, at):
        self.at = at

    def append(self, line):
        super().append(line)
        if line.startswith(self.at):
            raise KeyboardInterrupt


def rows(folder, kind):
    with Ledger(folder / "ledger.sqlite", create=False) as ledger:
        return [row for key, row in ledger.all() if key.startswith(f"{kind}-")]


def test_a_run_stopped_in_the_survey_goes_on(optimize, tiny, tmp_path):
    """The float model was delivered already: a folder is made once, so what was half-made goes first."""
    with pytest.raises(KeyboardInterrupt):
        optimize(said=Stop("looking"))
    model, task = tiny["model"](), tiny["task"]().prepare()
    deliver(model, pj.Target(), tmp_path / "run" / "float" / "target", example=task.valid.example())
    assert optimize(budget={"size": "40%", "trials": 2}).record["artefact"]["path"]


def test_a_run_killed_before_its_ledger_was_there_goes_on(optimize, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        optimize(said=Stop("looking"))
    for path in (tmp_path / "run").glob("ledger*"):
        path.unlink()
    shutil.rmtree(tmp_path / "run" / "float", ignore_errors=True)
    assert optimize().verdict.status


def test_a_ledger_that_is_gone_after_work_is_missed(optimize, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        optimize(said=Stop("measuring"))
    (tmp_path / "run" / "ledger.sqlite").unlink()
    with pytest.raises(Refused, match=r"ledger\.sqlite must exist"):
        optimize()


def test_a_folder_killed_before_it_was_a_run_can_be_used(optimize, tmp_path):
    run = RunFolder(tmp_path / "run")
    for folder in (run.path, run.artefacts, run.logs):
        folder.mkdir()
    for name in (".penjing-probe.tmp", ".penjing-0123.tmp", "env.json", "driver.lock"):
        (run.path / name).write_text("half")
    assert optimize(budget={"size": "200%"}).verdict.status == "reached"


def test_outputs_of_the_original_that_a_power_cut_took_are_made_again(optimize, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        optimize(said=Stop("measuring"), budget={"size": "200%"})
    hurt(tmp_path / "run" / "float" / EXPECTED, "empty")
    optimize(budget={"size": "200%"})
    (baseline,) = rows(tmp_path / "run", "baseline")
    assert baseline["trial"]["measurement"]["difference"] < 1e-3
    assert len(rows(tmp_path / "run", "survey")) == 1


def test_outputs_of_a_candidate_that_a_power_cut_took_are_made_again(optimize, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("penjing.search.evaluate._trial", stop)
        with pytest.raises(KeyboardInterrupt):
            optimize(**CUT)
    (expected,) = (tmp_path / "run" / "artefacts").glob(f"*/{EXPECTED}")
    assert len(rows(tmp_path / "run", "build")) == 1
    hurt(expected, "empty")
    (trial,) = optimize(**CUT).record["trials"]
    assert trial["status"] == "done", trial["reason"]


def hurt(path, damage):
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:50] if damage == "torn" else b"")


def test_expected_outputs_are_whole_or_refused(tmp_path):
    write_expected(tmp_path, np.arange(6.0).reshape(2, 3))
    assert (read_expected(tmp_path) == np.arange(6.0).reshape(2, 3)).all()
    assert not is_whole(tmp_path, "artefact"), "the artefact is missing"
    (tmp_path / "artefact").mkdir()
    (tmp_path / "artefact" / "manifest.json").write_text("{}")
    assert is_whole(tmp_path, "artefact")
    for damage in ("torn", "empty", "missing"):
        hurt(tmp_path / EXPECTED, damage)
        assert not is_whole(tmp_path, "artefact")
        with pytest.raises(Refused):
            read_expected(tmp_path)


def test_expected_outputs_are_on_disk_before_anything_counts_on_them(tmp_path, monkeypatch):
    """The file is synced under another name, and the folder after the rename."""
    done = []
    real_sync, real_replace = os.fsync, os.replace

    def note_sync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append("folder" if Path(name) == tmp_path else "file")
        real_sync(descriptor)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", lambda *pair: (done.append("rename"), real_replace(*pair)))
    write_expected(tmp_path, np.zeros(3))
    assert done == ["file", "rename", "folder"]


def full_disk(shared, say, plan, target, folder, seed):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_fault_of_the_machine_stops_the_run_and_is_no_candidates(optimize, tmp_path, monkeypatch):
    """Exit 5, as often as the disk is full; what is tried again once there is room counts no attempt."""
    with monkeypatch.context() as patched:
        patched.setattr("penjing.search.evaluate.build", full_disk)
        patched.setattr("penjing.search.session.MOST_ATTEMPTS", 2)
        for _ in range(3):
            with pytest.raises(Refused, match="ENOSPC") as refused:
                optimize(**CUT)
            assert refused.value.code == Exit.ENVIRONMENT
            assert "resume" in refused.value.fix
        assert rows(tmp_path / "run", "build") == rows(tmp_path / "run", "trial") == []
    (trial,) = optimize(**CUT).record["trials"]
    assert trial["status"] == "done", trial["reason"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EMFILE, errno.EROFS])
def test_faults_are_known_from_jobs_and_from_exceptions_of_any_kind(number):
    words, name = os.strerror(number), errno.errorcode[number]
    refusal = refusal_of(Refused("the file must be written", fix="", code=Exit.BAD_INPUT))
    refusal = refusal.model_copy(update={"fault": name})
    for ended in (
        Finished(status="crashed", reason=f"OSError: {words}", fault=name, seconds=1.0),
        Finished(status="refused", reason="not written", refusal=refusal, fault=name, seconds=1.0),
    ):
        with pytest.raises(Refused, match=name) as refused:
            stop_on_fault(ended, "a plan")
        assert refused.value.code == Exit.ENVIRONMENT
    for error in (OSError(number, words), Refused("must be saved", value=f"RuntimeError: {words}", fix="")):
        with pytest.raises(Refused, match=name) as refused, stopping_on_fault("a plan"):
            raise error
        assert refused.value.code == Exit.ENVIRONMENT


def test_what_is_the_candidates_own_fault_stays_so():
    for status in ("crashed", "killed", "timeout"):
        ended = Finished(status=status, reason="no luck", seconds=1.0)
        assert stop_on_fault(ended, "a plan") is ended
    with pytest.raises(Refused, match="no luck") as refused, stopping_on_fault("a plan"):
        raise Refused("no luck must be had", fix="")
    assert refused.value.code == Exit.BAD_INPUT


def test_a_fault_while_measuring_stops_the_run_too(optimize, tmp_path, monkeypatch):

    def full(session, folders, *arguments, **options):
        if folders:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return measure(session, folders, *arguments, **options)

    from penjing.search.evaluate import measure_candidates as measure

    with monkeypatch.context() as patched:
        patched.setattr("penjing.search.evaluate.measure_candidates", full)
        with pytest.raises(Refused) as refused:
            optimize(**CUT)
    assert refused.value.code == Exit.ENVIRONMENT
    assert len(rows(tmp_path / "run", "build")) == 1, "what was built stays"
    assert rows(tmp_path / "run", "trial") == []
    (trial,) = optimize(**CUT).record["trials"]
    assert trial["status"] == "done"


def test_the_time_of_a_killed_run_counts(task_file, tmp_path, command):
    """SIGKILL in the middle of the first phase: no row tells of it, and its seconds count all the same."""
    out = tmp_path / "run"
    line = [PENJING, "optimize", str(task_file), "--size", "200%", "--time", "10min", "--out", str(out)]
    started = time.monotonic()
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while (read_elapsed(out / "elapsed") or 0.0) < 3 * INTERVAL_S:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    noted = read_elapsed(out / "elapsed")
    assert 3 * INTERVAL_S <= noted <= time.monotonic() - started
    done = command("resume", out, "--json")
    assert done.returncode in (0, 3), done.stderr
    assert json.loads(done.stdout)["spent"]["seconds"] > noted


def test_a_stopwatch_goes_on_from_what_was_noted(tmp_path):
    path = tmp_path / "elapsed"
    with Stopwatch(path, 100.0) as first:
        assert first.elapsed >= 100.0
    noted = read_elapsed(path)
    with Stopwatch(path, noted) as second:
        assert second.elapsed >= noted
    for damaged in (b"", b"\0\0\0", b"nan", b"-1", b"inf"):
        path.write_bytes(damaged)
        assert read_elapsed(path) is None


def test_time_that_nobody_noted_leaves_its_limit_open(optimize, tmp_path):
    budget = {"size": "200%", "time": "10min"}
    with pytest.raises(KeyboardInterrupt):
        optimize(said=Stop("measuring"), budget=budget)
    (tmp_path / "run" / "elapsed").unlink()
    verdict = optimize(budget=budget).verdict
    assert verdict.limits["time"].status == verdict.status == "inconclusive"
    assert "how long it had taken by then is not known" in verdict.limits["time"].reason


def test_a_swapped_artefact_is_refused_by_everything_that_speaks_for_it(
    optimize, tiny, tmp_path, monkeypatch, command
):
    """Another trial's folder, its manifest valid, in the place of the one that was judged."""
    result = optimize(**CUT)
    delivered = result.artefact
    assert delivered.name == "artefact", "a candidate was delivered"
    run, kept = tmp_path / "run", tmp_path / "kept"
    os.rename(delivered, kept)
    shutil.copytree(run / "float" / "target", delivered)
    words = "must be the artefact that the"
    task, limits = tiny["task"](), pj.Budget(**CUT["budget"])
    for speak in (
        result.load,
        lambda: result.artefact,
        lambda: pj.load(delivered),
        lambda: pj.verify(run, task, limits),
        lambda: pj.measure(delivered, task),
    ):
        with pytest.raises(Refused, match=words):
            speak()
    for verb in (("report", run), ("compare", run, run), ("resume", run)):
        done = command(*verb)
        assert done.returncode == Exit.BAD_INPUT, done.stderr
        assert words in done.stderr
    assert pj.load(run / "float" / "target") is not None, "its own place is right for it"
    shutil.rmtree(delivered)
    os.rename(kept, delivered)
    assert result.load() is not None
    assert command("report", run).returncode == 0
