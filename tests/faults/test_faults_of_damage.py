"""Files of a run that are damaged: verbs that read move nothing; repair is a verb, and what it says works."""

import shlex

import pytest

from penjing.cli.main import run as penjing
from penjing.core.errors import Exit
from penjing.search.result import open_result

STOP = "trying"


def listing(folder):
    """Every file below a folder with its content and time."""
    return {
        p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture
def interrupted(optimize, task_file, tmp_path):
    """A run that was stopped in its first trial."""

    class Stop(list):
        def append(self, line):
            if line.startswith(STOP):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize(said=Stop(), config={"task_file": str(task_file)})
    return tmp_path / "run"


@pytest.fixture
def said(capsys):
    """Run a verb; return its code and what it printed."""

    def run(*arguments):
        code = int(penjing([str(argument) for argument in arguments]))
        out, err = capsys.readouterr()
        return code, out + err

    return run


def zeros_in_the_middle(path):
    data = bytearray(path.read_bytes())
    place = data.rindex(b"baseline-")
    data[place : place + 40] = bytes(40)
    path.write_bytes(data)


DAMAGE = {
    "zeros": zeros_in_the_middle,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_ledger_is_left_to_repair_which_makes_resume_work(interrupted, optimize, said, kind):
    DAMAGE[kind](interrupted / "ledger.sqlite")
    before = listing(interrupted)
    for verb in ("status", "resume"):
        code, words = said(verb, interrupted)
        if kind == "gone" and verb == "status":
            assert (code, "interrupted" in words) == (0, True)
            continue
        assert code == Exit.BAD_INPUT, words
        advice = words.partition("`")[2].partition("`")[0]
        assert shlex.split(advice) == ["penjing", "repair", str(interrupted)]
    held = {name: content for name, content in listing(interrupted).items() if name.name != "driver.lock"}
    assert held == {name: content for name, content in before.items() if name.name != "driver.lock"}
    code, words = said("repair", interrupted)
    assert code == Exit.DONE
    assert f"penjing resume {interrupted}" in words
    result = optimize()
    assert result.record["trials"], "the run went on to its end"
    assert said("status", interrupted)[0] == Exit.DONE
    assert "nothing is damaged" in said("repair", interrupted)[1]
    if kind != "gone":
        assert (interrupted / "ledger.sqlite.damaged-1").read_bytes() == before_of(before, "ledger.sqlite")


def before_of(listed, name):
    return next(content for path, (content, _) in listed.items() if path.name == name)


def test_damaged_pointers_and_records_are_set_aside_and_written_anew(optimize, said, tmp_path):
    first = optimize(budget={"size": "200%"})
    for name in ("best.json", "record.json"):
        (tmp_path / "run" / name).write_text('{"artefact": ')
    for verb in ("status", "report", "resume"):
        assert said(verb, tmp_path / "run")[0] == Exit.BAD_INPUT
    code, words = said("repair", tmp_path / "run")
    assert code == Exit.DONE
    assert "record.json.damaged-1" in words
    assert "best.json.damaged-1" in words
    again = optimize(budget={"size": "200%"})
    assert again.record["plan"] == first.record["plan"]
    assert open_result(tmp_path / "run").record["trials"] == again.record["trials"]


def test_verbs_that_read_change_nothing(optimize, said, tmp_path):
    run = optimize(budget={"size": "200%"}).folder
    (run / "report.html").unlink()
    before = listing(run)
    for line in (["status", run], ["compare", run, run], ["report", run, "--out", tmp_path / "r.html"]):
        assert said(*line)[0] == Exit.DONE
        assert listing(run) == before
    assert (tmp_path / "r.html").stat().st_size > 10_000


def test_a_report_that_cannot_be_written_is_said_and_the_table_is_printed(optimize, said, monkeypatch):
    run = optimize(budget={"size": "200%"}).folder

    def refuse(*arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("penjing.core.files.os.replace", refuse)
    code, words = said("report", run)
    assert code == Exit.DONE
    assert "was not written anew, --out FILE puts it elsewhere" in words
    assert "reached" in words
    assert said("report", run, "--out", run.parent / "r.html")[0] == Exit.ENVIRONMENT
