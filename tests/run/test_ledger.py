import contextlib
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc

import pytest

from penjing.core.errors import Exit, Refused
from penjing.run import ledger_file as module
from penjing.run.ledger import Event, Ledger, LedgerReader
from penjing.run.ledger_rows import digest_row, pack_record
from penjing.run.lock import DriverLock
from penjing.run.repair import repair_run


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
        "import os, sys; from penjing.run import ledger, ledger_file\n"
        "ledger_file.os.link = lambda *a: os._exit(9)\n"
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
            ledger.put(f"key-{i}", {"i": i, "pad": "x" * 100, "deep": {"long": list(range(i, i + 100))}})
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
            assert path.read_bytes() == content, "only repair moves a damaged ledger"
        else:
            assert read == expected
    assert found > len(bad) // 4  # the others hit free space


def listing(folder):
    """Everything in a folder, with its content and time."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_damage_is_named_and_nothing_is_moved(tmp_path):
    path = tmp_path / "ledger.sqlite"
    filled(path)
    path.write_bytes(path.read_bytes()[:5000])
    before = listing(tmp_path)
    for opened in (LedgerReader, Ledger):
        with pytest.raises(Refused, match=f"a damaged ledger.*penjing repair {tmp_path}"):
            opened(path).all()
    assert listing(tmp_path) == before


def test_a_reader_writes_nothing_and_sees_what_its_writer_put(tmp_path):
    path = tmp_path / "ledger.sqlite"
    expected = filled(path)
    before = listing(tmp_path)
    with LedgerReader(path) as reader:
        assert (reader.all(), reader.events()) == expected
        assert reader.get("key-3") == dict(expected[0])["key-3"]
    assert listing(tmp_path) == before
    with Ledger(path) as ledger, LedgerReader(path) as reader:
        ledger.put("later", {})
        assert reader.get("later") == {}
    with pytest.raises(Refused, match="must exist"):
        LedgerReader(tmp_path / "none")
    assert not (tmp_path / "none").exists()


UNFINISHED = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN IMMEDIATE")
for i in range(300):
    db.execute("INSERT INTO events VALUES (?, 'x', 'half', ?, '')", (1000 + i, "x" * 2000))
os._exit(9)
"""


def test_a_transaction_that_was_cut_short_is_read_around_and_not_undone_in_place(tmp_path):
    path = tmp_path / "ledger.sqlite"
    expected = filled(path)
    subprocess.run([sys.executable, "-c", UNFINISHED, path], check=False)
    assert (tmp_path / "ledger.sqlite-journal").stat().st_size > 0
    before = listing(tmp_path)
    with LedgerReader(path) as reader:
        assert (reader.all(), reader.events()) == expected
    assert listing(tmp_path) == before
    with Ledger(path) as ledger:
        assert (ledger.all(), ledger.events()) == expected


def test_long_lists_lie_beside_their_rows(tmp_path):
    path, long = tmp_path / "l", [0.123456789 + i for i in range(100)]
    record = {"p50": 1.5, "latency": {"quantiles": long, "few": [1, 2]}, "changes": [{"layer": "x" * 300}]}
    record["per_class"] = {f"class {i}": i / 7 for i in range(40)}
    with Ledger(path) as ledger:
        ledger.put("trial-1", record)
        ledger.put("build-1", {})
        assert list(ledger.summaries("trial-")) == [
            (
                "trial-1",
                {
                    "p50": 1.5,
                    "latency": {"quantiles": None, "few": [1, 2]},
                    "changes": None,
                    "per_class": None,
                },
            )
        ]
        assert [key for key, _ in ledger.summaries()] == ["trial-1", "build-1"]
        assert ledger.get("trial-1") == record
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE arrays SET data = zeroblob(10)")
        db.commit()
    with LedgerReader(path) as reader:
        assert len(list(reader.summaries())) == 2
        with pytest.raises(Refused, match="arrays of result 1 do not match"):
            reader.get("trial-1")


def test_a_ledger_is_read_row_by_row(tmp_path):
    """Memory does not grow with the run: 2,000 rows of 20 kB take less than three of them."""
    path = tmp_path / "l"
    with Ledger(path) as ledger:
        ledger.restore(rows_with(2000, {"pad": "x" * 20_000}), ())
    tracemalloc.start()
    try:
        with LedgerReader(path) as reader:
            assert sum(1 for _ in reader.summaries()) == 2000
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()


def rows_with(count, record):
    for seq in range(1, count + 1):
        text = pack_record(record).text
        yield seq, f"key-{seq}", text, digest_row(seq, f"key-{seq}", text), "", None


@pytest.mark.parametrize(
    "hostile",
    [
        "CREATE VIEW results AS WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) "
        "SELECT x AS seq, '' AS key, '' AS record, '' AS sha256, '' AS arrays FROM r",
        "CREATE TABLE results (seq INTEGER PRIMARY KEY, key TEXT, record TEXT "
        "GENERATED ALWAYS AS (hex(zeroblob(1000000000))), sha256 TEXT, arrays TEXT)",
    ],
    ids=["view", "computed"],
)
def test_tables_of_another_make_are_not_read(tmp_path, hostile):
    path = tmp_path / "ledger.sqlite"
    filled(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(f"DROP TABLE results; {hostile}")
    for opened in (LedgerReader, Ledger):
        with pytest.raises(Refused, match="tables are malformed"):
            opened(path)
    assert repair_run(tmp_path)["repaired"][0]["results"] == 0


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "3", '{"a": NaN', b"\xff", b"{}"], ids=["deep", "number", "cut", "bytes", "blob"]
)
def test_rows_that_match_their_hash_and_hold_something_else_are_damage(tmp_path, text):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.restore([(1, "trial-1", text, digest_row(1, "trial-1", text), "", None)], ())
    with LedgerReader(path) as reader, pytest.raises(Refused, match="a damaged ledger"):
        list(reader.summaries())


def test_arrays_that_would_fill_the_memory_are_not_expanded(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite"
    monkeypatch.setattr("penjing.run.ledger_rows.MOST_BYTES", 10_000)
    with Ledger(path) as ledger:
        ledger.put("a", {"long": [0] * 100_000})
        with pytest.raises(Refused, match="more than 10,000 bytes"):
            ledger.get("a")


@pytest.mark.parametrize("words", [b'"i": 0', b'"i": 17', b"attempt", b"key-29"])
def test_repair_keeps_every_row_that_can_be_read_and_the_old_file(tmp_path, words):
    path = tmp_path / "ledger.sqlite"
    results, events = filled(path)
    damaged = bytearray(path.read_bytes())
    place = damaged.rindex(words)
    end = min(place + 200, 4096 * (place // 4096 + 1))  # of its page, which may be the root of another table
    damaged[place:end] = bytes(end - place)
    path.write_bytes(damaged)
    with pytest.raises(Refused):
        Ledger(path)
    data = repair_run(tmp_path)
    (file,) = data["repaired"]
    assert (tmp_path / file["kept_as"]).read_bytes() == bytes(damaged)
    with Ledger(path) as ledger:
        kept, seen = ledger.all(), ledger.events()
    assert (len(kept), len(seen)) == (file["results"], file["events"])
    lost = len(results) + len(events) - len(kept) - len(seen)
    assert lost == 0 if words == b"attempt" else 0 < lost < 20, "an index holds nothing of its own"
    assert set(map(str, kept)) <= set(map(str, results))
    assert set(map(str, seen)) <= set(map(str, events))
    assert repair_run(tmp_path)["repaired"] == [], "what was repaired is sound"


def test_repair_sets_a_hopeless_ledger_aside_with_its_journal(tmp_path):
    path = tmp_path / "ledger.sqlite"
    for number in (1, 2):
        path.write_bytes(b"no ledger" * 1000)
        (tmp_path / "ledger.sqlite-journal").write_bytes(b"\0" * 600)
        (file,) = repair_run(tmp_path)["repaired"]
        assert (file["kept_as"], file["results"]) == (f"ledger.sqlite.damaged-{number}", 0)
        assert (tmp_path / f"ledger.sqlite.damaged-{number}-journal").exists()
        with Ledger(path, create=False) as ledger:
            assert ledger.all() == []


def test_repair_of_no_run_and_of_one_that_is_driven_is_refused(tmp_path):
    with pytest.raises(Refused, match="must hold a run"):
        repair_run(tmp_path)
    assert list(tmp_path.iterdir()) == []
    filled(tmp_path / "ledger.sqlite")
    with DriverLock(tmp_path / "driver.lock"), pytest.raises(Refused, match="one process only"):
        repair_run(tmp_path)


def test_foreign_database_is_left_alone(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE mine (x)")
    with pytest.raises(Refused, match="another program"):
        Ledger(path)
    assert os.listdir(tmp_path).count("ledger.sqlite") == 1


def test_old_ledger_is_read_as_it_is_migrated_by_its_driver_and_a_new_one_refused(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(module.MIGRATIONS[0])
        db.execute(f"PRAGMA application_id = {module._APPLICATION}")
        db.execute("PRAGMA user_version = 1")
        for seq in (1, 2):
            text = '{"long": [' + "0, " * 200 + "0]}"
            row = (seq, f"key-{seq}", text, digest_row(seq, f"key-{seq}", text))
            db.execute("INSERT INTO results VALUES (?, ?, ?, ?)", row)
        db.commit()
    old = [(f"key-{seq}", {"long": [0] * 201}) for seq in (1, 2)]
    before = listing(tmp_path)
    with LedgerReader(path) as reader:
        assert reader.all() == old == list(reader.summaries())
    assert listing(tmp_path) == before
    damaged = path.read_bytes().replace(b"key-2", b"kez-2")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "ledger.sqlite").write_bytes(damaged)
    assert repair_run(tmp_path / "other")["repaired"][0]["results"] == 1
    with Ledger(path) as ledger:
        assert ledger.all() == old
        ledger.put("new", {"long": [1] * 200})
        assert ledger.get("new") == {"long": [1] * 200}
    monkeypatch.setattr(module, "MIGRATIONS", module.MIGRATIONS[:1])
    for opened in (LedgerReader, Ledger):
        with pytest.raises(Refused, match=r"at most schema 1, that of penjing.*got 2.*Upgrade") as caught:
            opened(path)
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
