"""The main job end to end, from the command line and from Python, on real data."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import penjing as pj
from penjing.core.artefact import open_artefact
from penjing.core.verdict import Verdict
from penjing.run.ledger import Ledger
from penjing.search.result import open_result

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")


def agree(record, other):
    """Check that two runs found the same, up to choices that measured latency makes (microseconds here)."""
    mine, theirs = ({trial["name"]: trial for trial in r["trials"]} for r in (record, other))
    shared = mine.keys() & theirs.keys()
    assert next(iter(mine)) == next(iter(theirs))
    assert len(shared) >= 2
    for name in shared:
        for key in ("status", "plan", "drop", "flips"):
            assert mine[name][key] == theirs[name][key], (name, key)
    assert record["plan"] in [trial["plan"] for trial in record["trials"]]
    if record["plan"] == other["plan"]:
        assert record["result"]["quality"] == other["result"]["quality"]


LIMIT = {"status", "limit", "measured", "low", "high", "baseline", "unit", "reason"}


def test_the_record_has_the_documented_form(finished):
    out, record, done = finished
    assert record == json.loads((out / "record.json").read_text())
    assert record["schema"] == 1
    for name in ("max_drop", "size", "trials"):
        assert set(record["verdict"]["limits"][name]) == LIMIT
    assert record["verdict"]["status"] in ("reached", "not_reached", "inconclusive")
    assert set(record["artefact"]) == {"path", "sha256", "files"}
    assert {"name", "sha256", "bytes"} == set(record["artefact"]["files"][0])
    for key in (
        "plan",
        "changes",
        "trials",
        "environment",
        "spent",
        "baselines",
        "result",
        "ablation",
        "notes",
    ):
        assert key in record, key
    documented = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
    for key in record:
        assert f"`{key}`" in documented or f"`{key}." in documented, f"docs/json.md does not name {key}"
    assert done.stdout.count("\n") == 1, "stdout holds one JSON document and nothing else"


def test_the_artefact_is_what_the_record_says(finished):
    out, record, _ = finished
    artefact = open_artefact(out / record["artefact"]["path"])
    assert artefact.sha256 == record["artefact"]["sha256"]
    assert record["result"]["size_bytes"] == artefact.size_bytes
    assert record["result"]["difference"] is None or record["result"]["difference"] < 1e-3
    runner = pj.load(artefact.path)
    for batch in (1, 2, 7):
        assert runner(np.zeros((batch, 1, 8, 8), np.float32)).shape == (batch, 10)


def test_what_was_delivered_is_really_smaller(finished):
    _out, record, _ = finished
    baseline = record["baselines"]["target"]
    assert record["plan"], "this budget needs a change of the model"
    assert record["result"]["size_bytes"] < 0.6 * baseline["size_bytes"]
    assert record["verdict"]["limits"]["size"]["status"] == "reached"
    assert any(change["status"] == "done" for change in record["changes"])
    assert next(row["step"] for row in record["ablation"]).startswith("float")
    steps = record["ablation"][1:]
    assert [row["step"].partition("(")[0] for row in steps] == [entry["method"] for entry in record["plan"]]
    assert all(row["quality"]["kind"] == "estimate" for row in steps), "each step has a quality of its own"


def test_quality_is_certified_on_data_that_the_search_never_saw(finished):
    _, record, _ = finished
    certificate = record["verdict"]["certificate"]
    assert certificate["n"] == record["result"]["quality"]["n"] == 697
    assert record["result"]["split"] == "test"
    assert all(trial["measurement"]["split"] == "valid" for trial in record["trials"] if trial["measurement"])
    assert certificate["sequence"][0]["name"] == "float"
    drop = record["baselines"]["target"]["quality"]["value"] - record["result"]["quality"]["value"]
    assert certificate["drop"]["value"] == pytest.approx(drop, abs=1e-9)


def test_the_baseline_is_shown_in_eager_and_in_the_target(finished):
    _, record, _ = finished
    assert record["baselines"]["eager"]["target"] == "torch eager"
    assert record["baselines"]["target"]["target"] == "onnxruntime"
    for part in ("eager", "target"):
        assert record["baselines"][part]["latency"]["kind"] == "latency"
        assert record["baselines"][part]["memory_bytes"]["value"] > 1e6


def test_time_is_accounted_for(finished):
    _, record, _ = finished
    spent = record["spent"]
    assert sum(spent["by"].values()) == pytest.approx(spent["seconds"], rel=0.05)
    assert spent["trials"] == len(record["trials"]) == 2


def test_the_report_is_one_small_offline_file(finished):
    out, _, _ = finished
    page = (out / "report.html").read_text()
    assert len(page) < 2e6
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_status_report_and_verify_read_the_run(finished, command, task_file):
    out, record, _ = finished
    status = json.loads(command("status", out, "--json", check=0).stdout)
    assert status["state"] == "finished"
    assert len(status["trials"]) >= 2
    again = command("report", out, "--json", check=0)
    assert json.loads(again.stdout) == record
    verified = command("verify", out, "--json")
    verdict = Verdict.model_validate_json(verified.stdout)
    assert verdict.certificate is not None
    assert verdict.certificate.drop.value == pytest.approx(record["verdict"]["certificate"]["drop"]["value"])
    assert verified.returncode == (0 if verdict.status == "reached" else 3)


def test_resuming_a_finished_run_repeats_nothing(finished, command):
    out, record, _ = finished
    start = time.monotonic()
    again = command("resume", out, "--json")
    assert json.loads(again.stdout) == record
    assert time.monotonic() - start < 30


def test_a_finished_run_is_never_overwritten(finished, command, task_file):
    out, _, _ = finished
    refused = command("optimize", task_file, "--max-drop", "5%", "--out", out, check=2)
    assert "finished run" in refused.stderr


def test_two_runs_are_compared(finished, command):
    out, _, _ = finished
    data = json.loads(command("compare", out, out, "--json", check=0).stdout)
    assert {row["name"] for row in data["rows"]} >= {"accuracy", "latency", "size", "verdict"}


@pytest.mark.slow  # runs that were killed are compared always, and the README's Python runs
def test_python_gives_the_same_result_as_the_command(finished, task_file, tmp_path):
    """Three lines of Python, without a main guard, from a script of the user's own; timed but briefly."""
    _out, record, _ = finished
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(task_file.parent)!r})\n"
        "import tiny_task, penjing as pj, penjing.search.session\n"
        "penjing.search.session.MOST_TIMING = 0.2\n"
        "task = tiny_task.task()\n"
        "budget = pj.Budget(max_drop='6%', size='60%', trials=2)\n"
        f"result = pj.optimize(tiny_task.model(), task, budget, out={str(tmp_path / 'run')!r})\n"
        "print(result.verdict)\n"
        "print(result.load()(task.test[0][:3]).shape)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "(3, 10)" in done.stdout
    mine = open_result(tmp_path / "run").record
    agree(mine, record)


def test_a_run_killed_at_any_moment_resumes_to_the_same_answer(finished, command, task_file, tmp_path):
    """SIGKILL again and again: nothing finished is lost or repeated, and the answer is the same."""
    _undisturbed_out, undisturbed, _ = finished
    out = tmp_path / "killed"
    start = ["optimize", task_file, "--max-drop", "6%", "--size", "60%", "--trials", "2", "--out", out]
    seen: dict[str, dict] = {}
    executable = str(Path(sys.executable).with_name("penjing"))
    for wait in (5, 9, 14):
        arguments = ["resume", out] if (out / "config.resolved.yaml").exists() else start
        process = subprocess.Popen(
            [executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        if not (out / "config.resolved.yaml").exists():
            continue
        with Ledger(out / "ledger.sqlite") as ledger:
            now = dict(ledger.all())
        for key, value in seen.items():
            assert now[key] == value, "a finished result changed"
        seen = now
    arguments = ["resume", out, "--json"] if (out / "config.resolved.yaml").exists() else [*start, "--json"]
    done = command(*arguments)
    assert done.returncode in (0, 3), done.stderr
    record = json.loads(done.stdout)
    assert len(record["trials"]) == 2
    agree(record, undisturbed)
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_resume_and_exits_130(task_file, tmp_path, number):
    out = tmp_path / "run"
    executable = str(Path(sys.executable).with_name("penjing"))
    arguments = ["optimize", str(task_file), "--max-drop", "6%", "--trials", "2", "--out", str(out)]
    process = subprocess.Popen(
        [executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (out / "ledger.sqlite").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"penjing resume {out}" in errors
