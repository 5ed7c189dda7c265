"""The sentence on what masks save, in the terminal and in the HTML page."""

import copy

import pytest

from penjing.report.html import write_report
from penjing.report.record import Record
from penjing.report.sparsity import describe_zeros
from penjing.report.terminal import plain_table


@pytest.fixture
def masked(record):
    data = copy.deepcopy(record)
    data["result"]["operations"] |= {"parameters": 1000, "zeros": 800}
    data["result"]["compressed_bytes"] = 30_000
    data["baselines"]["target"]["compressed_bytes"] = 90_000
    data["changes"] = [
        {
            "method": "PruneMagnitude",
            "layer": "conv",
            "status": "done",
            "reason": "",
            "detail": {"sparsity": 0.8},
        }
    ]
    return data


def test_zeros_are_told_with_bytes_and_without_time(masked, tmp_path):
    record = Record.model_validate(masked)
    said = describe_zeros(record)
    assert said.startswith("80% of the parameters are zero.")
    assert "as zip they have 30 kB, those of the float model 90 kB." in said
    assert said.endswith("they save none.")
    assert record.result.target in said
    assert said in plain_table(record, width=1000)
    write_report(record, tmp_path / "report.html")
    assert said in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_older_records_have_no_compressed_size(masked):
    masked["result"]["compressed_bytes"] = None
    assert "where the files are compressed." in describe_zeros(Record.model_validate(masked))


@pytest.mark.parametrize("part", ["changes", "zeros", "operations"])
def test_without_masks_nothing_is_said(masked, part):
    if part == "changes":
        masked["changes"][0]["status"] = "skipped"
    elif part == "zeros":
        masked["result"]["operations"]["zeros"] = 0
    else:
        masked["result"]["operations"] = None
    assert describe_zeros(Record.model_validate(masked)) == ""
