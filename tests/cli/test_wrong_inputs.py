"""What a user gets for wrong input from the shell: a code, the rule, the value, the place, the fix."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from penjing.core.extras import EXTRAS

PENJING = str(Path(sys.executable).with_name("penjing"))


def penjing(*arguments, cwd=None):
    return subprocess.run(
        [PENJING, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "task.py"
    path.write_text("def model():\n    return 1\n\ndef task():\n    return 2\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-drop", "1"], "must be above 0 and below 100%"),
        (["--max-drop", "-1%"], "positive"),
        (["--max-drop", "nan"], "budget.max_drop"),
        (["--latency", "50"], "Write a share like 50% or an amount like 5ms"),
        (["--latency", "5MB"], "budget.latency"),
        (["--size", "0"], "positive"),
        (["--time", "10"], "Write 90s, 10min or 1.5h"),
        (["--max-drop", "1%", "--trials", "0"], "trials"),
        (
            ["--max-drop", "1%", "--target", "tensorrt"],
            "Known: auto, auto-torch, onnxruntime, openvino, openvino-bf16, torch, torch-compiled",
        ),
        (["--max-drop", "1%", "--threads", "0"], "threads"),
        (["--max-drop", "1%", "--confidence", "95"], "budget.confidence"),
        (["--max-dorp", "1%"], "--max-drop"),
        ([], "budget must have a limit on quality or cost"),
    ],
)
def test_a_wrong_budget_is_refused_with_2(task_file, arguments, words):
    out = penjing("optimize", task_file, *arguments)
    assert out.returncode == 2, out.stderr
    assert words in out.stderr
    assert "Traceback" not in out.stderr
    assert out.stdout == ""


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        (None, 2, "the task file must exist"),
        ("def model(): return 1\n", 2, "needs a function task()"),
        ("import nothing_like_this\n", 4, "No module named 'nothing_like_this'"),
        ("def model(:\n", 4, "task.py:1"),
        ("def model(): return 1\ndef task(): raise KeyError('x')\n", 4, "task.py:2"),
        ("def model(): return 1\ndef task(): return 2\n", 4, "task() must return a penjing.Task"),
    ],
)
def test_a_wrong_task_file_is_refused_with_its_line(tmp_path, source, code, words):
    path = tmp_path / "task.py"
    if source is not None:
        path.write_text(source)
    out = penjing("optimize", path, "--max-drop", "1%")
    assert out.returncode == code, out.stderr
    assert words in out.stderr
    assert "Traceback" not in out.stderr


def test_a_pickled_model_is_never_opened(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x04.")
    out = penjing("optimize", path, "--max-drop", "1%")
    assert out.returncode == 2
    assert "never loaded from pickles" in out.stderr


def test_json_refusals_are_json_on_stdout(task_file):
    out = penjing("optimize", task_file, "--latency", "50", "--json")
    assert json.loads(out.stdout)["error"]["code"] == 2


@pytest.mark.parametrize("verb", ["status", "report", "resume", "verify"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, verb):
    out = penjing(verb, tmp_path)
    assert out.returncode in (2, 4), out.stderr
    assert str(tmp_path) in out.stderr
    assert "Traceback" not in out.stderr


def test_help_imports_no_framework_and_names_every_verb():
    code = "import sys; from penjing.cli.main import run; run(['--help']); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in (
        "demo",
        "inspect",
        "benchmark",
        "optimize",
        "resume",
        "status",
        "report",
        "compare",
        "verify",
        "doctor",
    ):
        assert f"  {verb} " in out.stdout
    for name in ("'torch'", "'onnx'", "'onnxruntime'", "'sklearn'", "'scipy'"):
        assert name not in out.stdout


def test_a_closed_pipe_is_no_error():
    out = subprocess.run(
        f"{PENJING} optimize --help | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in out.stderr


def test_doctor_names_versions_and_extras():
    out = penjing("doctor", "--json")
    data = json.loads(out.stdout)
    assert set(data["extras"]) == set(EXTRAS)
    assert out.returncode == data["code"]


def test_the_module_is_the_command():
    asked = subprocess.run(
        [sys.executable, "-m", "penjing", "fit"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (asked.returncode, asked.stderr) == (penjing("fit").returncode, penjing("fit").stderr)
