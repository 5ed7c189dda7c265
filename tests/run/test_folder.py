import errno
import os
import resource
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest

from penjing.core import files
from penjing.core.errors import Exit, Refused
from penjing.core.files import write_text
from penjing.run.folder import create_run, describe_environment, open_run, read_config, write_config


def test_default_folders_are_numbered_and_never_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "net-7").mkdir(parents=True)
    assert create_run(None, "net").path == tmp_path / "runs" / "net-8"
    assert create_run(None, "net").path.name == "net-9"
    assert create_run(None, "../a b/ü").path == tmp_path / "runs" / "a-b-ü-1"
    with ThreadPoolExecutor(8) as pool:
        names = {run.path.name for run in pool.map(lambda _: create_run(None, "many"), range(16))}
    assert names == {f"many-{i}" for i in range(1, 17)}


@pytest.mark.parametrize("name", ["实验 ü/--x y", "-dash", "deep/er/est", "x" * 200])
def test_odd_paths_work(tmp_path, name):
    run = create_run(tmp_path / name, "net")
    write_config(run, {"budget": {"max_drop": "1%"}})
    assert read_config(open_run(tmp_path / name)) == {"budget": {"max_drop": "1%"}}


def test_home_parent_and_links(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert create_run("~/runs/a", "net").path == tmp_path / "runs" / "a"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    create_run(tmp_path / "link" / ".." / "link" / "b", "net")
    assert (tmp_path / "real" / "b" / "artefacts").is_dir()


def test_a_folder_in_use_is_refused_with_the_next_step(tmp_path):
    run = create_run(tmp_path / "a", "net")
    write_config(run, {})
    with pytest.raises(Refused, match=r"unfinished run.*penjing resume") as caught:
        create_run(tmp_path / "a", "net")
    assert caught.value.code == Exit.USAGE
    write_text(run.record, "{}")
    assert run.finished
    with pytest.raises(Refused, match=r"a finished run.*penjing report"):
        create_run(tmp_path / "a", "net")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    with pytest.raises(Refused, match=r"chapter\.tex"):
        create_run(tmp_path / "thesis", "net")
    assert os.listdir(tmp_path / "thesis") == ["chapter.tex"]


def test_empty_folder_and_killed_creation_are_taken(tmp_path):
    create_run(tmp_path, "net")
    write_text(tmp_path / "env.json", "{}")
    assert create_run(tmp_path, "net").path == tmp_path


def test_out_is_a_file_or_below_one(tmp_path):
    (tmp_path / "file").write_text("keep")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(Refused) as caught:
            create_run(path, "net")
        assert caught.value.code == Exit.ENVIRONMENT
    assert (tmp_path / "file").read_text() == "keep"


def test_read_only_place_is_found_before_work(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(Refused, match="Read-only") as caught:
        create_run(tmp_path / "a", "net")
    assert caught.value.code == Exit.ENVIRONMENT
    assert not (tmp_path / "a").exists()


def test_no_room_is_found_before_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10**12, 0, 10**9))
    assert create_run(tmp_path / "a", "net", needed_bytes=10**8).path.is_dir()
    with pytest.raises(Refused, match="1,000,000,000 bytes free") as caught:
        create_run(tmp_path / "b", "net", needed_bytes=10**9)
    assert caught.value.code == Exit.ENVIRONMENT
    assert not (tmp_path / "b").exists()


def test_quota_is_found_before_work(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(Refused, match="must be room to write"):
            create_run(tmp_path / "a", "net")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "a").exists()


def test_open_run_refuses_other_folders(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(Refused) as caught:
            open_run(path)
        assert caught.value.code == Exit.USAGE


def test_newer_and_damaged_runs(tmp_path):
    run = create_run(tmp_path / "a", "net")
    write_config(run, {"seed": 0})
    write_text(run.config, run.config.read_text().replace("schema: 1", "schema: 2"))
    with pytest.raises(
        Refused, match=r"at most schema 1, that of penjing.*2, written by.*[Uu]pgrade"
    ) as caught:
        open_run(run.path)
    assert caught.value.code == Exit.ENVIRONMENT
    write_text(run.config, "")
    with pytest.raises(Refused, match="schema None"):
        open_run(run.path)


def test_environment_is_plain_data():
    found = describe_environment()
    assert found["cores"]["logical"] >= 1
    assert found["memory_bytes"] > 2**20
    assert found["packages"]["numpy"].startswith("2")
    files.json.dumps(found)
