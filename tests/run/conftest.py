import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TASK = Path(__file__).with_name("tiny_task.py")
BUDGET = ["--max-drop", "6%", "--size", "60%", "--trials", "2"]


def penjing(*arguments, cwd=None, check=None, env=None, timeout=240):
    """Run the installed command line as a user would."""
    out = subprocess.run(
        [str(Path(sys.executable).with_name("penjing")), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if check is not None:
        assert out.returncode == check, f"exit {out.returncode}\n{out.stdout}\n{out.stderr}"
    return out


@pytest.fixture(scope="session")
def command():
    return penjing


@pytest.fixture(scope="session")
def task_file(tmp_path_factory):
    """The tiny task file in a folder of its own, its weights trained once."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("任务 task")
    path = folder / "tiny_task.py"
    shutil.copy(TASK, path)
    train = f"import runpy; runpy.run_path({str(path)!r})['model']()"
    subprocess.run([sys.executable, "-c", train], check=True)
    return path


@pytest.fixture(scope="session")
def finished(task_file, tmp_path_factory):
    """A finished run and the JSON that the command printed."""
    out = tmp_path_factory.mktemp("runs") / "实验 ü"
    done = penjing("optimize", task_file, *BUDGET, "--out", out, "--json")
    assert done.returncode in (0, 3), done.stderr
    return out, json.loads(done.stdout), done
