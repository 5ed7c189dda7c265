"""Faults 40 and 43-47: budgets out of reach, disks, terminals, packages."""

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

from penjing.cli.show import exit_code
from penjing.core.errors import Exit, Refused
from penjing.diagnostics.doctor import examine

PENJING = str(Path(sys.executable).with_name("penjing"))
MB = 2**20
Disk = namedtuple("Disk", "total used free")


@pytest.fixture(scope="module")
def unreachable(tiny, shorten, tmp_path_factory):
    """A finished run whose limit on size nothing can keep."""
    import penjing as pj

    said = []
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        budget = pj.Budget(max_drop="5%", size="0.1%", trials=1)
        out = tmp_path_factory.mktemp("runs") / "unreachable"
        result = pj.optimize(
            tiny["model"](), tiny["task"](), budget, out=out, say=lambda line: said.append(str(line))
        )
    return result, said


def test_an_unreachable_budget_is_said_before_and_the_best_is_kept(unreachable):
    result, said = unreachable
    forecast = next(line for line in said if line.startswith("limit size"))
    assert "looks out of reach" in forecast
    assert said.index(forecast) < next(i for i, line in enumerate(said) if line.startswith("done:"))
    limit = result.record["verdict"]["limits"]["size"]
    assert limit["status"] == "not_reached"
    assert limit["measured"] > 100 * limit["limit"], "the gap is in numbers"
    assert result.record["verdict"]["limits"]["max_drop"]["status"] == "reached"
    assert exit_code(result) == Exit.BUDGET_NOT_REACHED
    assert result.artefact.is_dir()
    assert result.load() is not None


@pytest.mark.parametrize("place", ["a file", "below a file", "another run", "something else"])
def test_the_run_folder_is_checked_before_any_work(optimize, unreachable, tmp_path, place):
    out = tmp_path / "taken"
    if place == "another run":
        out = unreachable[0].folder
    elif place == "something else":
        out.mkdir()
        (out / "thesis.tex").write_text("precious")
    else:
        out.write_text("precious")
    said = []
    with pytest.raises(Refused) as refused:
        optimize(out=out / "run" if place == "below a file" else out, said=said)
    assert str(out) in str(refused.value)
    assert not any(line.startswith("looking") for line in said)
    if place != "another run":
        kept = out / "thesis.tex" if out.is_dir() else out
        assert kept.read_text() == "precious"


def test_too_little_disk_is_refused_before_the_start_with_need_and_have(
    optimize, tiny, monkeypatch, tmp_path
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**12, 10**12 - 65 * MB, 65 * MB))
    model = tiny["model"]()
    optimize(model, out="enough", budget={"size": "200%", "trials": 1})
    model.tensors["fc"]["weight"] = model.tensors["fc"]["weight"].repeat(10_000, axis=0)
    monkeypatch.setattr("penjing.backends.numpy.backend.NumpyBackend.check", lambda *args: None)
    with pytest.raises(
        Refused, match=r"about 18.* of room for the run, got 68,157,440 bytes free"
    ) as refused:
        optimize(model, out="little", budget={"size": "50%", "trials": 2})
    assert refused.value.code == Exit.ENVIRONMENT
    assert not (tmp_path / "little").exists(), "nothing is left behind"


ANSI = re.compile(r"\x1b\[")


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"COLUMNS": "40"}, {"CI": "1"}])
def test_without_a_terminal_lines_are_plain_and_fit(command, unreachable, env):
    done = command("report", unreachable[0].folder, env=env)
    assert done.returncode == 0, done.stderr
    assert not ANSI.search(done.stdout + done.stderr)
    assert "not reached" in done.stdout.replace("\n    ", " ")
    if "COLUMNS" in env:
        free = [line for line in done.stdout.splitlines() if "/" not in line and "load" not in line]
        assert max(map(len, free)) <= 40


@pytest.mark.parametrize("verb", ["report", "status"])
def test_a_reader_that_goes_away_is_no_error(unreachable, verb):
    """The pipe is closed before the first line is written."""
    code = (
        "import os, sys; from penjing.cli.main import run\n"
        "out, end = os.pipe(); os.close(out); os.dup2(end, 1)\n"
        "os._exit(run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, verb, str(unreachable[0].folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_no_error(unreachable, closed):
    line = f"{PENJING} report {shlex.quote(str(unreachable[0].folder))} {closed}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("module", "arguments", "line"),
    [
        ("torch", ["demo"], 'penjing[torch]"'),
        ("onnxruntime", ["optimize", "{task}", "--size", "50%"], 'penjing[onnx]"'),
    ],
)
def test_a_missing_extra_is_one_line_with_the_command_to_type(task_file, tmp_path, module, arguments, line):
    code = f"import sys; sys.modules[{module!r}] = None; from penjing.cli.main import main; main()"
    filled = [part.format(task=task_file) for part in arguments]
    done = subprocess.run(
        [sys.executable, "-c", code, *filled, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == Exit.ENVIRONMENT, done.stderr
    assert f'pip install "{line}' in done.stderr
    assert module in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_doctor_names_what_is_too_old(monkeypatch):
    versions = {"torch": "2.4.1", "onnx": "1.15.0", "onnxruntime": "1.31.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name, "1.0"))
    monkeypatch.setattr("penjing.diagnostics.doctor.bring", ModuleType)
    found = examine()
    assert found["code"] == Exit.ENVIRONMENT
    assert any("torch 2.4.1 is older than 2.10" in problem for problem in found["problems"])
    assert any("onnx 1.15.0 is older than" in problem for problem in found["problems"])
    assert not any("onnxruntime" in problem for problem in found["problems"])


def test_doctor_names_what_is_installed_and_cannot_be_imported(monkeypatch):
    def broken(name):
        if name == "sklearn":
            raise ImportError("numpy.core.multiarray failed to import (auto-generated because of numpy ABI)")
        return ModuleType(name)

    monkeypatch.setattr("penjing.diagnostics.doctor.bring", broken)
    found = examine()
    assert found["code"] == Exit.ENVIRONMENT
    assert not found["extras"]["metrics"]["usable"]
    assert "numpy ABI" in found["extras"]["metrics"]["reason"]
    assert found["extras"]["onnx"]["usable"], "one broken package leaves the others"
    assert json.dumps(found)
