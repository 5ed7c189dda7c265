import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from penjing.core import files
from penjing.core.errors import Exit, Refused


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def delivered(tmp_path):
    def build(folder):
        (folder / "model.onnx").write_bytes(bytes(range(256)) * 40)
        (folder / "sub").mkdir()
        (folder / "sub" / "notes ü.txt").write_text("x")
        return {"format": "onnx", "by_axis": {2: 1, 10: 2}}

    files.write_folder(tmp_path / "a", build)
    return tmp_path / "a"


def test_write_and_read_back(tmp_path):
    path = tmp_path / "-- 实验 ü.json"
    files.write_json(path, {"a": [1, 2.5, None], "ü": "实"})
    assert files.read_json(path) == {"a": [1, 2.5, None], "ü": "实"}
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("text", ["", "{", '{"a":1,"a":2}', "NaN", "[" * 100_000, "\xff"])
def test_read_json_refuses_what_is_no_json(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(Refused, match=r"x\.json"):
        files.read_json(tmp_path / "x.json")


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x", {"a": float("nan")})
    assert os.listdir(tmp_path) == []


CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir")


class Crash(BaseException):
    """Stands for a kill: nothing may catch it for good."""


def fail_at(monkeypatch, k, error):
    """Let the k-th call of the system during a write fail; return the counter."""
    count = [0]

    def wrap(real):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == k:
                raise error
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return count


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "no"), Crash()]
)
def test_every_crash_point_leaves_old_or_new(tmp_path, error):
    path = tmp_path / "x"
    for k in range(1, 50):
        path.write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Refused, Crash):
            count = fail_at(patch, k, error)
            files.write_bytes(path, b"new" * 1000)
        assert path.read_bytes() in (b"old", b"new" * 1000)
        assert os.listdir(tmp_path) == ["x"]
        if count[0] < k:
            break
    assert k > 5
    assert path.read_bytes() == b"new" * 1000


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), Crash()])
def test_every_crash_point_of_a_folder(tmp_path, error):
    def build(folder):
        files.write_bytes(folder / "one", b"1")
        files.write_bytes(folder / "two", b"2")

    for k in range(1, 100):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Refused, Crash):
            count = fail_at(patch, k, error)
            files.write_folder(tmp_path / "a", build)
        if (tmp_path / "a").exists():
            files.verify_manifest(tmp_path / "a")
            shutil.rmtree(tmp_path / "a")
        assert os.listdir(tmp_path) == []
        if count[0] < k:
            break
    assert k > 15


def test_power_loss_before_fsync_never_reaches_the_name(tmp_path, monkeypatch):
    """A shim forgets what was not synced when the rename comes, as a disk may."""
    synced = set()
    real_sync, real_replace, order = os.fsync, os.replace, []

    def sync(descriptor):
        order.append("sync")
        synced.add(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def replace(source, target):
        order.append("replace")
        if os.stat(source).st_ino not in synced:
            os.truncate(source, 0)
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    files.write_bytes(tmp_path / "x", b"content")
    assert (tmp_path / "x").read_bytes() == b"content"
    assert order == ["sync", "replace", "sync"]
    assert os.stat(tmp_path).st_ino in synced


def test_full_disk_at_every_offset(tmp_path):
    """RLIMIT_FSIZE makes the write fail with EFBIG after any number of bytes, as root too."""
    path = tmp_path / "x"
    path.write_bytes(b"o" * 300)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in [0, 1, 2, *range(3, 300, 7), 299]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(Refused) as caught:
                files.write_bytes(path, b"n" * 300)
            assert caught.value.code == Exit.ENVIRONMENT
            assert str(path) in str(caught.value)
            assert "bytes free" in str(caught.value)
            assert path.read_bytes() == b"o" * 300
            assert os.listdir(tmp_path) == ["x"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    files.write_bytes(path, b"n" * 300)
    assert path.read_bytes() == b"n" * 300


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_failing_rename_is_never_silent(tmp_path, monkeypatch, number):
    def replace(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Refused, match=os.strerror(number)) as caught:
        files.write_bytes(tmp_path / "x", b"1")
    assert caught.value.code == Exit.ENVIRONMENT
    assert os.listdir(tmp_path) == []


def test_missing_folder_or_file_as_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "x", tmp_path / "file" / "x", tmp_path):
        with pytest.raises(Refused) as caught:
            files.write_bytes(path, b"")
        assert caught.value.code == Exit.ENVIRONMENT


def test_kill_at_random_times_leaves_old_or_new(tmp_path):
    script = (
        "import sys; from penjing.core import files; print('ready', flush=True)\n"
        "while True:\n for c in 'ab': files.write_bytes(sys.argv[1], c.encode() * 3_000_000)"
    )
    rng = random.Random(0)
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", script, tmp_path / "x"], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"ready\n"
        writer.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(0.05 + 0.1 * rng.random())
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        content = (tmp_path / "x").read_bytes()
        assert len(content) == 3_000_000
        assert len(set(content)) == 1
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["x"]


def test_remove_leftovers_spares_everything_else(tmp_path):
    for name in (".penjing-1.tmp", "sub/.penjing-2.tmp", "sub/keep.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / ".penjing-3.tmp2").mkdir()
    (tmp_path / ".penjing-4.tmp").mkdir()
    (tmp_path / ".penjing-4.tmp" / "part").write_text("")
    removed = files.remove_leftovers(tmp_path)
    assert sorted(removed) == [".penjing-1.tmp", ".penjing-4.tmp", "sub/.penjing-2.tmp"]
    assert set(tree(tmp_path)) == {"sub/keep.tmp"}


def test_folder_is_never_overwritten(delivered):
    before = tree(delivered)
    with pytest.raises(Refused, match="must not exist yet"):
        files.write_folder(delivered, lambda folder: None)
    assert tree(delivered) == before


def test_manifest_names_every_file(delivered):
    content = files.verify_manifest(delivered)
    assert [e["name"] for e in content["files"]] == ["model.onnx", "sub/notes ü.txt"]
    assert content["files"][0]["bytes"] == 256 * 40
    assert content["files"][0]["sha256"] == files.sha256_file(delivered / "model.onnx")
    assert content["facts"]["format"] == "onnx"


def test_every_flip_and_truncation_is_found(delivered):
    rng = random.Random(0)
    for name in ("model.onnx", "manifest.json", "sub/notes ü.txt"):
        good = (delivered / name).read_bytes()
        cuts = [good[:n] for n in {0, 1, len(good) // 2, len(good) - 1}]
        for position in [rng.randrange(len(good)) for _ in range(60)]:
            flipped = bytearray(good)
            flipped[position] ^= 1 << rng.randrange(8)
            cuts.append(bytes(flipped))
        for bad in cuts:
            (delivered / name).write_bytes(bad)
            if bad == good or (name == "manifest.json" and bad.rstrip() == good.rstrip()):
                continue  # white space at its end carries nothing
            with pytest.raises(Refused) as caught:
                files.verify_manifest(delivered)
            assert name in str(caught.value) or name == "manifest.json"
        (delivered / name).write_bytes(good)
    files.verify_manifest(delivered)


def test_missing_foreign_swapped_and_linked_files(delivered):
    (delivered / "sub" / "extra").write_text("")
    with pytest.raises(Refused, match="sub/extra is foreign"):
        files.verify_manifest(delivered)
    os.unlink(delivered / "sub" / "extra")
    (delivered / "model.onnx").rename(delivered.parent / "away")
    with pytest.raises(Refused, match=r"model\.onnx is missing"):
        files.verify_manifest(delivered)
    (delivered / "model.onnx").symlink_to(delivered.parent / "away")
    with pytest.raises(Refused, match=r"no links.*model\.onnx"):
        files.verify_manifest(delivered)
    os.unlink(delivered / "model.onnx")
    os.mkfifo(delivered / "model.onnx")
    with pytest.raises(Refused, match=r"plain files.*model\.onnx"):
        files.verify_manifest(delivered)


def test_link_made_while_building_is_refused(tmp_path):
    with pytest.raises(Refused, match="no links"):
        files.write_folder(tmp_path / "a", lambda folder: (folder / "x").symlink_to("/etc/passwd"))
    assert os.listdir(tmp_path) == []


def rewrite(folder, **changed):
    content = json.loads((folder / "manifest.json").read_text()) | changed
    content.pop("sha256")
    content["sha256"] = files._own_digest(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def test_newer_schema_is_refused_with_versions(delivered):
    rewrite(delivered, schema=99, penjing="7.1")
    with pytest.raises(Refused, match=r"at most 1.*99, written by penjing 7\.1.*Upgrade") as caught:
        files.verify_manifest(delivered)
    assert caught.value.code == Exit.ENVIRONMENT


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "", 3])
def test_names_that_leave_the_folder(delivered, name):
    rewrite(delivered, files=[{"name": name, "sha256": "0", "bytes": 1}])
    with pytest.raises(Refused, match="damaged"):
        files.verify_manifest(delivered)


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": "1"}'])
def test_foreign_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(Refused, match="Penjing's"):
        files.verify_manifest(tmp_path)


def test_folder_without_manifest(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(Refused):
            files.verify_manifest(path)


def test_a_file_written_in_parts_is_whole_or_not_there(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def stopped(file):
        file.write(b"half")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        files.write_file(path, stopped)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]
    files.write_file(path, lambda file: [file.write(part) for part in (b"n", b"ew")] and None)
    assert path.read_bytes() == b"new"


def test_a_folder_gets_its_name_with_its_manifest(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a").write_text("1")
    files.publish_folder(tmp_path / "made", tmp_path / "named", {"fact": 1})
    assert files.verify_manifest(tmp_path / "named")["facts"] == {"fact": 1}
    assert os.listdir(tmp_path) == ["named"]
    (tmp_path / "made").mkdir()
    with pytest.raises(Refused):
        files.publish_folder(tmp_path / "made", tmp_path / "named", {})
    assert (tmp_path / "made").is_dir()


def test_reading_what_is_not_there_is_refused_without_a_word_of_room(tmp_path):
    path = tmp_path / "none"
    with pytest.raises(Refused, match="none: the file must exist") as caught, files.refusing(path, "read"):
        path.read_bytes()
    assert "bytes free" not in str(caught.value)
    assert caught.value.fix == "correct the path"
