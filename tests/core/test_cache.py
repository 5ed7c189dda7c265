"""The cache of findings: kept whole, and never a reason to fail."""

import json

import numpy as np
import pytest

import penjing.core.cache as module
from penjing.core.cache import cache_folder, describe_cache, keep, keep_array, recall, recall_array


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PENJING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_kept_is_recalled_and_counted(folder):
    assert recall("recipes", "ab").content is None
    assert describe_cache() == {"folder": str(folder), "kinds": {}}
    assert keep("recipes", "ab", {"rows": [1, 0.5]}) == ""
    assert recall("recipes", "ab").content == {"rows": [1, 0.5]}
    assert recall("recipes", "cd").content is None
    assert recall("others", "ab").content is None
    assert describe_cache()["kinds"]["recipes"]["files"] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.5", "0.6"),
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: "[]",
        lambda text: "",
        lambda text: json.dumps({"schema": 1, "key": "ab", "content": 3}),
    ],
)
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


def test_an_array_is_recalled_and_its_file_is_never_written_to(folder):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert recall_array("teachers", "ab").array is None
    assert keep_array("teachers", "ab", array) == ""
    for _ in range(2):
        found = recall_array("teachers", "ab").array
        np.testing.assert_array_equal(found, array)
        found += 1
    assert describe_cache()["kinds"]["teachers"]["files"] == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-4],
        lambda data: data[:-4] + b"abcd",
        lambda data: b"",
        lambda data: None,
    ],
)
def test_a_damaged_array_counts_as_missing(folder, damage):
    keep_array("teachers", "ab", np.ones(5))
    path = folder / "teachers" / "ab.npy"
    data = damage(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    found = recall_array("teachers", "ab")
    assert found.array is None
    assert data is None or "ab.npy was not used" in found.note
    assert keep_array("teachers", "ab", np.zeros(2)) == ""
    assert recall_array("teachers", "ab").array.tolist() == [0, 0]


def test_the_oldest_arrays_make_room(folder, monkeypatch):
    import os

    monkeypatch.setattr(module, "ARRAY_BYTES", 3000)
    for age, key in enumerate(("aa", "bb", "cc")):
        keep_array("teachers", key, np.ones(150))
        os.utime(folder / "teachers" / f"{key}.npy", (age, age))
    assert [recall_array("teachers", key).array is None for key in ("aa", "bb", "cc")] == [True, False, False]
    keep_array("teachers", "dd", np.ones(1000))
    assert [path.stem for path in (folder / "teachers").glob("*.npy")] == ["dd"]


def test_an_array_that_cannot_be_written_is_said_and_no_error(folder):
    folder.write_text("a file where the folder should be")
    assert keep_array("teachers", "ab", np.ones(3)).startswith("nothing was cached")
