"""Run directories that somebody sent: nothing runs, nothing hangs, nothing outside of them changes."""

import json
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from penjing.cli.main import run as penjing
from penjing.run.ledger_rows import digest_row

CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
ESCAPES = "\x1b]0;owned\x07\x9b5m\u202eevil"
DEEP = "[" * 20_000


class Stranger:
    """A run directory to be tampered with, and what must not be touched by it."""

    def __init__(self, run, home):
        self.run, self.home = run, home
        self.evil = f"import pathlib; pathlib.Path({str(home / 'marker')!r}).touch()\n"
        (home / "precious").write_text("mine")

    def code(self, *parts):
        """Put a task file that leaves a mark somewhere; return its path."""
        path = self.home.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.evil)
        return path

    def config(self, **fields):
        """Replace fields of the configuration by text that is put there as it is."""
        path = self.run / "config.resolved.yaml"
        lines = path.read_text().splitlines()
        for name, text in fields.items():
            lines = [line for line in lines if not line.startswith(f"{name}:")] + [f"{name}: {text}"]
        path.write_text("\n".join(lines) + "\n")

    def interrupt(self):
        (self.run / "record.json").unlink()

    def link(self, name, target):
        path = self.run / name
        if path.is_dir():
            path.rename(self.run / f"old-{name}")
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(target)

    def pipe(self, name):
        (self.run / name).unlink(missing_ok=True)
        os.mkfifo(self.run / name)

    def document(self, name, change):
        """Change a JSON file of the run."""
        content = json.loads((self.run / name).read_text())
        change(content)
        (self.run / name).write_text(json.dumps(content))

    def rows(self, record, key="trial-evil"):
        """Put a row into the ledger that matches its hash."""
        text = record if isinstance(record, str) else json.dumps(record)
        with closing(sqlite3.connect(self.run / "ledger.sqlite")) as db:
            db.execute(
                "INSERT INTO results VALUES (999, ?, ?, ?, '')", (key, text, digest_row(999, key, text))
            )
            db.commit()

    def sql(self, script):
        with closing(sqlite3.connect(self.run / "ledger.sqlite")) as db:
            db.executescript(script)


@pytest.fixture
def stranger(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(run)
    return Stranger(run, tmp_path)


@pytest.fixture
def verbs(stranger, capsys):
    """Run verbs on the stranger's folder; return codes, check what was printed and what was left alone."""

    def run_all(names):
        codes = {}
        for name in names:
            folders = [str(stranger.run)] * (2 if name == "compare" else 1)
            codes[name] = int(penjing([name, *folders]))
            out, err = capsys.readouterr()
            assert not CONTROLS.search(out + err), name
            assert "Traceback" not in out + err, name
            json_code = int(penjing([name, *folders, "--json"])) if name != "repair" else codes[name]
            out, err = capsys.readouterr()
            assert not CONTROLS.search(out + err), name
            assert json_code == codes[name]
            if name != "repair":
                json.loads(out)
        assert not (stranger.home / "marker").exists(), "nothing ran"
        assert (stranger.home / "precious").read_text() == "mine"
        return codes

    return run_all


FORMS = {
    "inside the run": lambda s: s.code("run", "task.py"),
    "deep inside the run": lambda s: s.code("run", "artefacts", "x", "task.py"),
    "home": lambda s: s.code("run", "b", "evil.py") and "~/run/b/evil.py",
    "relative": lambda s: s.code("run", "task.py") and "task.py",
    "dots": lambda s: s.code("task.py") and f"{s.home}/run/../task.py",
    "more dots": lambda s: s.code("run", "task.py") and f"{s.home}/other/../run/task.py",
    "proc": lambda s: s.code("run", "evil.py") and "/proc/self/cwd/evil.py",
    "link out of the run": lambda s: (
        (s.home / "run" / "sub").mkdir()
        or (s.home / "run" / "sub" / "l.py").symlink_to(s.code("task.py"))
        or s.home / "run" / "sub" / "l.py"
    ),
    "link into the run": lambda s: (s.home / "l.py").symlink_to(s.code("run", "task.py")) or s.home / "l.py",
    "linked folder": lambda s: (
        (s.home / "d").symlink_to(s.code("run", "task.py").parent) or s.home / "d" / "task.py"
    ),
    "network": lambda s: "//server/share/task.py",
    "url": lambda s: "https://example.org/task.py",
    "a folder": lambda s: s.home,
    "nothing there": lambda s: s.home / "none.py",
    "a pickle": lambda s: s.code("task.pt"),
    "a number": lambda s: 3,
    "a list": lambda s: "[a, b]",
    "null byte": lambda s: '"/tmp/a\\0.py"',
    "escapes": lambda s: json.dumps(f"/{ESCAPES}.py"),
}


@pytest.mark.parametrize("form", FORMS)
def test_no_name_of_a_task_file_gets_code_to_run(stranger, verbs, form):
    stranger.interrupt()
    stranger.config(task_file=FORMS[form](stranger))
    codes = verbs(["resume", "verify", "status"])
    assert codes["status"] in (0, 4)
    assert {codes["resume"], codes["verify"]} <= {2, 4}


def test_a_task_file_in_the_current_directory_needs_to_be_named(stranger, verbs, monkeypatch, capsys):
    stranger.interrupt()
    (stranger.home / "work" / "deep").mkdir(parents=True)
    path = stranger.code("work", "deep", "task.py")
    stranger.config(task_file=path)
    monkeypatch.chdir(stranger.home / "work")
    assert verbs(["resume", "verify"]) == {"resume": 2, "verify": 2}
    assert penjing(["resume", str(stranger.run)]) == 2
    said = capsys.readouterr().err
    assert f"cannot lie in the current directory, got {path} with sha256 " in said
    assert f"--task {path}" in said
    assert penjing(["resume", str(stranger.run), "--task", str(path)]) == 2  # it has no model()
    assert (stranger.home / "marker").exists(), "the user named it"


def test_what_runs_is_shown_with_its_hash_and_is_what_was_hashed(stranger, tmp_path, monkeypatch, capsys):
    import hashlib
    import py_compile

    stranger.interrupt()
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "task.py"
    path.write_text("raise ValueError('mine')\n")
    compiled = Path(py_compile.compile(str(stranger.code("other", "task.py"))))
    hidden = tmp_path / "mine" / "__pycache__" / compiled.name
    hidden.parent.mkdir()
    data = bytearray(compiled.read_bytes())
    status = path.stat()
    data[8:16] = int(status.st_mtime).to_bytes(4, "little") + status.st_size.to_bytes(4, "little")
    hidden.write_bytes(data)
    stranger.config(task_file=path)
    monkeypatch.chdir(tmp_path / "other")
    assert penjing(["verify", str(stranger.run)]) == 4
    said = capsys.readouterr().err
    assert f"running {path}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in said
    assert "ValueError: mine" in said
    assert not (tmp_path / "marker").exists(), "compiled code beside it is not used"


CONFIGURATIONS = {
    "python tag": {"seed": "!!python/object/apply:os.system ['touch marker']"},
    "aliases": {"a": "&a [x, x]", "b": "&b [*a, *a]", "c": "[*b, *b]"},
    "deep": {"budget": DEEP},
    "large": {"budget": "'" + "x" * 2_000_000 + "'"},
    "twice": {"target": "{runtime: onnxruntime, runtime: torch}"},
    "seed": {"seed": "1e400"},
    "negative seed": {"seed": "-1"},
    "budget": {"budget": "{latency: nan, trials: -3}"},
    "budget of another kind": {"budget": "[1, 2]"},
    "target": {"target": "{runtime: ../../evil}"},
    "target of another kind": {"target": "7"},
    "schema": {"schema": "true"},
    "newer": {"schema": "99999999999999999999"},
    "escapes": {"budget": json.dumps(ESCAPES)},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_hostile_configuration_is_refused_and_runs_nothing(stranger, verbs, name, monkeypatch):
    monkeypatch.chdir("/")
    stranger.interrupt()
    stranger.config(**CONFIGURATIONS[name])
    codes = verbs(["status", "resume", "verify"])
    assert codes["status"] in (0, 2, 4, 5)
    assert {codes["resume"], codes["verify"]} <= {2, 4, 5}


FOLDERS = {
    "ledger is a pipe": lambda s: s.pipe("ledger.sqlite"),
    "ledger is a link": lambda s: s.link("ledger.sqlite", s.home / "precious"),
    "ledger is a folder": lambda s: (s.run / "ledger.sqlite").unlink() or (s.run / "ledger.sqlite").mkdir(),
    "ledger of views": lambda s: s.sql(
        "DROP TABLE results; CREATE VIEW results AS "
        "WITH RECURSIVE r(seq) AS (SELECT 1 UNION ALL SELECT seq + 1 FROM r) "
        "SELECT seq, '' key, '' record, '' sha256, '' arrays FROM r"
    ),
    "ledger with a trigger": lambda s: s.sql(
        "CREATE TRIGGER t AFTER INSERT ON results BEGIN DELETE FROM results; END"
    ),
    "deep row": lambda s: s.rows(DEEP),
    "row of another kind": lambda s: s.rows({"trial": [1, 2, 3], "elapsed": "long"}),
    "trial without a name": lambda s: s.rows({"trial": {"status": "done"}, "elapsed": 1e308}),
    "trial with escapes": lambda s: s.rows(
        {"trial": {"name": ESCAPES, "status": "failed", "reason": ESCAPES}}
    ),
    "lock is a pipe": lambda s: s.pipe("driver.lock"),
    "lock is a link": lambda s: s.link("driver.lock", s.home / "precious"),
    "artefacts elsewhere": lambda s: s.link("artefacts", s.home),
    "logs elsewhere": lambda s: s.link("logs", s.home),
    "best is a link": lambda s: s.link("best.json", "/dev/zero"),
    "best is deep": lambda s: (s.run / "best.json").write_text(DEEP),
    "best is a list": lambda s: (s.run / "best.json").write_text("[]"),
    "best leads out": lambda s: s.document("best.json", lambda d: d.update(artefact="../../etc")),
    "record is deep": lambda s: (s.run / "record.json").write_text(DEEP),
    "record is a number": lambda s: (s.run / "record.json").write_text("3"),
    "record with NaN": lambda s: (s.run / "record.json").write_text('{"schema": NaN}'),
    "record of another time": lambda s: s.document("record.json", lambda d: d.update(schema=10**30)),
    "record leads out": lambda s: s.document("record.json", lambda d: d["artefact"].update(path="/etc")),
    "record with escapes": lambda s: s.document(
        "record.json", lambda d: d["environment"].update(processor=ESCAPES)
    ),
    "record without limits": lambda s: s.document("record.json", lambda d: d["verdict"].update(limits=None)),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder_is_refused_or_read_and_touches_nothing(stranger, verbs, name, monkeypatch):
    monkeypatch.chdir("/")
    FOLDERS[name](stranger)
    codes = verbs(["status", "report", "compare"])
    assert set(codes.values()) <= {0, 2, 4, 5}
    assert verbs(["repair"])["repair"] in (0, 4, 5)


def test_what_a_stranger_wrote_does_not_command_the_terminal(stranger, verbs, capsys):
    stranger.rows({"trial": {"name": ESCAPES, "status": "failed", "reason": ESCAPES}})
    stranger.document("record.json", lambda d: d["environment"].update(processor=ESCAPES))
    stranger.document("record.json", lambda d: d["result"].update(metric=ESCAPES, target=ESCAPES))
    verbs(["status", "compare", "report"])
    penjing(["status", str(stranger.run)])
    assert "trial    evil: failed (evil)" in capsys.readouterr().out
    penjing(["status", str(stranger.run), "--json"])
    assert json.loads(capsys.readouterr().out)["trials"][-1]["name"] == ESCAPES
