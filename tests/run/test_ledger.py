import contextlib
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from penjing.core.errors import Exit, Refused
from penjing.run import ledger as module
from penjing.run.ledger import Event, Ledger


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as made:
        yield made


def test_a_result_is_kept_once(ledger):
    assert ledger.get("a") is None
    assert ledger.put("b", {"quality": 0.5, "text": "实"})
    assert ledger.put("a", {"quality": 1})
    assert not ledger.put("b", {"quality": 0.9})
    assert ledger.get("b") == {"quality": 0.5, "text": "实"}
    assert ledger.all() == [("b", {"quality": 0.5, "text": "实"}), ("a", {"quality": 1})]


def test_nan_is_refused_and_leaves_no_transaction(ledger):
    with pytest.raises(ValueError, match="JSON"):
        ledger.put("a", {"x": float("nan")})
    assert ledger.put("a", {"x": 1})


def test_events_and_attempts(ledger):
    ledger.event("started", seed=3)
    assert ledger.begin("plan") == 1
    assert ledger.begin("other") == 1
    assert ledger.begin("plan") == 2
    with pytest.raises(Refused, match="cannot be begun more than 2 times"):
        ledger.begin("plan")
    ledger.take_back("plan")
    assert ledger.begin("plan") == 2
    assert (ledger.attempts("plan"), ledger.attempts("none")) == (2, 0)
    assert ledger.events("started") == [Event("", "started", {"seed": 3})]
    assert [e.data["number"] for e in ledger.events("attempt", "plan")] == [1, 2, 2]
    assert len(ledger.events()) == 6


def test_results_survive_reopening(tmp_path):
    with Ledger(tmp_path / "l") as first:
        first.put("a", {"x": 1})
        first.begin("b")
    with Ledger(tmp_path / "l", create=False) as second:
        assert second.all() == [("a", {"x": 1})]
        assert second.attempts("b") == 1


def test_missing_ledger(tmp_path):
    with pytest.raises(Refused, match="no file"):
        Ledger(tmp_path / "l", create=False)
    with pytest.raises(Refused) as caught:
        Ledger(tmp_path / "none" / "l")
    assert caught.value.code == Exit.ENVIRONMENT


WRITER = """
import sys
from penjing.run.ledger import Ledger
me = int(sys.argv[2])
with Ledger(sys.argv[1]) as ledger:
    mine = sum(ledger.put(f"key-{i}", {"by": me, "i": i}) for i in range(50))
    ledger.event("won", count=mine)
"""


def test_eight_processes_on_a_fresh_folder(tmp_path):
    path = tmp_path / "ledger.sqlite"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, str(i)], stderr=subprocess.PIPE)
        for i in range(8)
    ]
    errors = [w.communicate()[1] for w in writers]
    assert [w.returncode for w in writers] == [0] * 8, errors
    with Ledger(path) as ledger:
        results = ledger.all()
        assert sorted(k for k, _ in results) == sorted(f"key-{i}" for i in range(50))
        assert all(key == f"key-{record['i']}" for key, record in results)
        assert sum(e.data["count"] for e in ledger.events("won")) == 50


DRIVER = """
import sys
from penjing.run.ledger import Ledger
with Ledger(sys.argv[1]) as ledger:
    print("open", flush=True)
    for i in range(100_000):
        key = f"key-{i}"
        if ledger.get(key) is None:
            ledger.begin(key, most=1000)
            ledger.put(key, {"i": i, "pad": "x" * 500})
            print(key, flush=True)
"""


def test_kill_loop_loses_nothing(tmp_path):
    path, reported, rng = tmp_path / "ledger.sqlite", [], random.Random(1)
    for _ in range(6):
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, path], stdout=subprocess.PIPE, text=True)
        assert driver.stdout.readline() == "open\n"
        reported += [driver.stdout.readline().strip() for _ in range(2 + rng.randrange(3))]
        time.sleep(0.01 * rng.random())  # into the middle of the next one
        driver.send_signal(signal.SIGKILL)
        reported += driver.communicate()[0].split()
        with Ledger(path) as ledger:
            keys = [key for key, _ in ledger.all()]
        assert keys == [f"key-{i}" for i in range(len(keys))]
        assert set(reported) <= set(keys)
    assert len(reported) == len(set(reported)) > 10


def test_kill_while_a_ledger_is_made(tmp_path):
    """A process that dies while it makes the file leaves none, and the next one makes it."""
    script = (
        "import os, sys; from penjing.run import ledger; ledger.os.replace = lambda *a: os._exit(9)\n"
        "ledger.Ledger(sys.argv[1])"
    )
    path = tmp_path / "ledger.sqlite"
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == 9
    assert not path.exists()
    with Ledger(path) as ledger:
        assert ledger.put("a", {})


def filled(path):
    with Ledger(path) as ledger:
        for i in range(30):
            ledger.begin(f"key-{i}")
            ledger.put(f"key-{i}", {"i": i, "pad": "x" * 100})
        return ledger.all(), ledger.events()


def test_flips_and_truncations_are_found_or_harmless(tmp_path):
    path, rng = tmp_path / "ledger.sqlite", random.Random(0)
    expected = filled(path)
    good = path.read_bytes()
    bad = [good[:n] for n in range(0, len(good), 1024)]
    for _ in range(250):
        flipped = bytearray(good)
        flipped[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        bad.append(bytes(flipped))
    found = 0
    for content in bad:
        path.write_bytes(content)
        try:
            with Ledger(path) as ledger:
                read = ledger.all(), ledger.events()
        except Refused:
            found += 1
            kept = tmp_path / "ledger.sqlite.damaged-1"
            if kept.exists():
                assert kept.read_bytes() == content
                assert not path.exists()
                kept.unlink()
        else:
            assert read == expected
    assert found > len(bad) // 4  # the others hit free space


def test_damage_is_named_and_the_next_ledger_starts_clean(tmp_path):
    path = tmp_path / "ledger.sqlite"
    for number in (1, 2):
        filled(path)
        path.write_bytes(path.read_bytes()[:5000])
        (tmp_path / "ledger.sqlite-journal").write_bytes(b"")
        with pytest.raises(Refused, match=f"kept as ledger.sqlite.damaged-{number}"):
            Ledger(path)
        assert (tmp_path / f"ledger.sqlite.damaged-{number}-journal").exists()
    with Ledger(path) as ledger:
        assert ledger.all() == []


def test_foreign_database_is_left_alone(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE mine (x)")
    with pytest.raises(Refused, match="another program"):
        Ledger(path)
    assert os.listdir(tmp_path).count("ledger.sqlite") == 1


def test_old_ledger_is_migrated_and_new_one_refused(tmp_path, monkeypatch):
    path = tmp_path / "l"
    results, _ = filled(path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, "CREATE TABLE later (x TEXT)"))
        for _ in range(2):
            with Ledger(path) as ledger:
                assert ledger.all() == results
                assert ledger._db.execute("SELECT count(*) FROM later").fetchone() == (0,)
    with pytest.raises(Refused, match=r"at most schema 1, that of penjing.*got 2.*Upgrade") as caught:
        Ledger(path)
    assert caught.value.code == Exit.ENVIRONMENT


def test_full_disk_keeps_what_was_put_and_goes_on_after(tmp_path):
    path = tmp_path / "ledger.sqlite"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Ledger(path) as ledger:
        assert ledger.put("a", {"x": 1})
        try:
            for size in (1, 600, 4096, path.stat().st_size):
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
                with pytest.raises(Refused, match="bytes free") as caught:
                    ledger.put("big", {"pad": "x" * 200_000})
                assert caught.value.code == Exit.ENVIRONMENT
                assert ledger.all() == [("a", {"x": 1})]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert ledger.put("big", {"pad": "x" * 200_000})
    with Ledger(path) as ledger:
        assert [key for key, _ in ledger.all()] == ["a", "big"]
