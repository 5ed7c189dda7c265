"""The table in docs/faults.md has every fault, and names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "faults.md").read_text()
ROWS = re.findall(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|$", TABLE, re.M)
MENDED = re.findall(r"^\| (F\d+) \| (.+) \| (.+) \| (.+) \|$", TABLE, re.M)


def test_every_fault_has_a_row():
    assert [int(row[0]) for row in ROWS] == list(range(1, 73))


def test_every_named_test_exists():
    for number, _, behaviour, tests in ROWS + MENDED:
        if tests == "waits":
            assert re.search(r"waits|no reader", behaviour), number
            continue
        for name in tests.split(", "):
            path, function = name.split("::")
            assert f"def {function}(" in (ROOT / path).read_text(), name
