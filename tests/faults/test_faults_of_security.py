"""Faults 71 and 72: hostile files run nothing and hostile names are only text, by every public way in."""

import io
import json
import os
import pickle
import sqlite3
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

import penjing as pj
from penjing.core.artefact import open_artefact
from penjing.core.errors import Refused
from penjing.core.files import write_folder, write_text
from penjing.search.result import open_result


class Bomb:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def payload(marker):
    data = pickle.dumps(Bomb(marker))
    pickle.loads(data)  # noqa: S301  our own
    assert marker.exists(), "the bomb works"
    marker.unlink()
    return data


def zipped(data, name="archive/data.pkl"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
    return file.getvalue()


def safetensors(data):
    header = json.dumps({"__metadata__": {"_target_": "os.system", "x": "touch marker"}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def object_array(marker):
    file = io.BytesIO()
    np.save(file, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.fixture
def corpus(payload, marker):
    files = {
        f"model{suffix}": payload
        for suffix in (
            ".pt",
            ".pth",
            ".bin",
            ".pkl",
            ".joblib",
            ".ckpt",
            ".safetensors",
            ".onnx",
            ".json",
            ".txt",
        )
    }
    files |= {f"zip{suffix}": zipped(payload) for suffix in (".pt", ".pt2", ".nemo", ".onnx", ".safetensors")}
    files |= {"model.npz": zipped(object_array(marker), "a.npy"), "target.safetensors": safetensors(payload)}
    return files


def test_files_with_code_are_refused_by_every_loader(corpus, marker, tmp_path):
    for name, data in corpus.items():
        path = tmp_path / name
        path.write_bytes(data)
        for loader in (pj.load, open_artefact, pj.load_onnx, open_result):
            with pytest.raises(Refused):
                loader(path)
    assert not marker.exists()


def facts(file):
    return {"model_files": [file], "target": {"runtime": "onnxruntime"}, "plan": [], "runtime": {}}


def test_an_artefact_with_a_true_manifest_is_searched_for_code(corpus, marker, tmp_path):
    for number, (name, data) in enumerate(corpus.items()):
        folder = tmp_path / f"artefact{number}"
        write_folder(folder, lambda new, n=name, d=data: (new / n).write_bytes(d) and facts(n))
        with pytest.raises(Refused):
            pj.load(folder)
        (folder / "model.onnx").exists()
    assert not marker.exists()


def test_hostile_names_are_only_text_in_report_and_terminal(finished, command):
    page = (finished / "report.html").read_text()
    for bad in ("<script>alert", "<img src=x", " 49<", "\x1b"):
        assert bad not in page, bad
    assert "&lt;script&gt;alert(1)" in page or "\\u003cscript\\u003ealert(1)" in page
    for verb in ("report", "status", "compare"):
        again = (finished,) if verb == "compare" else ()
        done = command(verb, finished, *again)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        assert "\x07" not in done.stdout + done.stderr
    assert "\x1b" not in command("report", finished, "--json").stdout, "JSON escapes control characters"


@pytest.mark.parametrize("where", ["best.json", "record.json"])
@pytest.mark.parametrize("place", ["../../../etc", "/etc", "artefacts/../../x"])
def test_an_artefact_outside_the_run_is_refused(run, command, where, place):
    content = json.loads((run / where).read_text())
    if where == "best.json":
        content["artefact"] = place
    else:
        content["artefact"]["path"] = place
    write_text(run / where, json.dumps(content))
    done = command("verify" if where == "best.json" else "report", run)
    assert done.returncode == 4
    assert "inside its run directory" in done.stderr


def test_a_run_that_brings_its_own_code_does_not_run_it(run, command, marker):
    (run / "task.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    config = (run / "config.resolved.yaml").read_text()
    line = next(line for line in config.splitlines() if line.startswith("task_file:"))
    write_text(run / "config.resolved.yaml", config.replace(line, f"task_file: {run / 'task.py'}"))
    (run / "record.json").unlink()
    for verb in ("resume", "verify"):
        done = command(verb, run)
        assert done.returncode == 2, done.stderr
        assert "config.resolved.yaml cannot lie in" in done.stderr
    assert not marker.exists()


def test_a_configuration_with_python_tags_is_only_text(run, command, marker):
    tag = f"task_file: !!python/object/apply:os.system ['touch {marker}']\n"
    config = (run / "config.resolved.yaml").read_text()
    write_text(run / "config.resolved.yaml", config + tag.replace("task_file", "evil"))
    for verb in ("resume", "status", "verify"):
        done = command(verb, run)
        assert done.returncode in (2, 4)
        assert "Traceback" not in done.stderr
        assert "config.resolved.yaml:" in done.stderr
    assert not marker.exists()


def test_a_ledger_of_something_else_is_refused(run, command, payload, marker):
    (run / "record.json").unlink()
    for content in (payload, b"", os.urandom(4096)):
        (run / "ledger.sqlite").write_bytes(content)
        done = command("status", run)
        assert done.returncode in (4, 5), done.stdout
        assert "Traceback" not in done.stderr
        for left in run.glob("ledger.sqlite?*"):
            left.unlink()
    with sqlite3.connect(run / "foreign") as base:
        base.execute("CREATE TABLE results (key, record)")
    os.replace(run / "foreign", run / "ledger.sqlite")
    assert command("status", run).returncode in (4, 5)
    assert not marker.exists()


def spoiled(value, path=()):
    """Yield ways to each part of a document, three levels deep."""
    if len(path) < 3 and isinstance(value, dict | list):
        for key in list(value)[:12] if isinstance(value, dict) else range(min(len(value), 1)):
            yield (*path, key)
            yield from spoiled(value[key], (*path, key))


def test_a_record_that_was_tampered_with_is_refused_or_read_never_a_crash(run):
    from penjing.report.html import write_report

    whole = json.loads((run / "record.json").read_text())
    read = 0
    for path in spoiled(whole):
        for bad in (None, "<script>alert(9)</script>"):
            record = json.loads(json.dumps(whole))
            part = record
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = bad
            write_text(run / "record.json", json.dumps(record))
            try:
                result = open_result(run)
                write_report(result.typed, result.report)
                read += 1
            except Refused:
                continue
            assert "<script>alert" not in result.report.read_text()
    assert read, "parts that do not matter may differ"
