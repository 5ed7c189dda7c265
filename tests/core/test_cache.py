"""The cache of findings: kept whole, and never a reason to fail."""

import json

import pytest

from penjing.core.cache import cache_folder, contents, keep, recall


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PENJING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_kept_is_recalled_and_counted(folder):
    assert recall("recipes", "ab").content is None
    assert contents() == {"folder": str(folder), "kinds": {}}
    assert keep("recipes", "ab", {"rows": [1, 0.5]}) == ""
    assert recall("recipes", "ab").content == {"rows": [1, 0.5]}
    assert recall("recipes", "cd").content is None
    assert recall("others", "ab").content is None
    assert contents()["kinds"]["recipes"]["files"] == 1


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2],
    lambda text: text.replace("0.5", "0.6"),
    lambda text: text.replace('"schema": 1', '"schema": 2'),
    lambda text: "[]",
    lambda text: "",
    lambda text: json.dumps({"schema": 1, "key": "ab", "content": 3}),
])  # fmt: skip
def test_a_damaged_file_counts_as_missing_and_is_named(folder, damage):
    keep("recipes", "ab", {"rows": [1, 0.5]})
    path = folder / "recipes" / "ab.json"
    path.write_text(damage(path.read_text()))
    found = recall("recipes", "ab")
    assert found.content is None
    assert "ab.json was not used" in found.note
    assert keep("recipes", "ab", {"rows": []}) == ""
    assert recall("recipes", "ab").content == {"rows": []}


def test_a_cache_that_cannot_be_written_is_said_and_no_error(folder):
    folder.write_text("a file where the folder should be")
    assert keep("recipes", "ab", {}).startswith("nothing was cached")
    assert recall("recipes", "ab").content is None


def test_the_usual_place(monkeypatch, tmp_path):
    monkeypatch.delenv("PENJING_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "penjing"
