"""The front door: `penjing demo` on real data, from an empty folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

for module in ("torch", "onnxruntime", "sklearn"):
    pytest.importorskip(module)

PENJING = str(Path(sys.executable).with_name("penjing"))


@pytest.mark.timeout(600)
def test_the_demo_ends_with_a_table_and_a_report(tmp_path):
    done = subprocess.run(
        [PENJING, "demo", "--out", "my demo", "--time", "5min"],  # enough on a busy machine too
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 3), done.stderr
    run = tmp_path / "my demo" / "run-1"
    record = json.loads((run / "record.json").read_text())
    for words in (
        "float, torch eager",
        "float, onnxruntime",
        "result",
        "Quality drop",
        "Latency",
        "Size on disk",
    ):
        assert words in done.stdout
    assert str(run / "report.html") in done.stdout
    assert (run / "report.html").stat().st_size < 2e6
    assert record["verdict"]["limits"]["max_drop"]["status"] == "reached"
    assert record["plan"], "something was really done"
    task = tmp_path / "my demo" / "task.py"
    dry = subprocess.run(
        [PENJING, "optimize", task, "--max-drop", "5%", "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert dry.returncode == 0, dry.stderr
    assert "700 examples" in dry.stdout


def test_dry_run_starts_nothing(tmp_path):
    done = subprocess.run(
        [PENJING, "demo", "--dry-run", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dry_run"] is True
    assert not list(tmp_path.rglob("ledger.sqlite"))
