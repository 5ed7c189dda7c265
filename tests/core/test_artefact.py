import importlib
import io
import json
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

import penjing as pj
from penjing.core import artefact as module
from penjing.core.apply import Applied
from penjing.core.artefact import deliver, load, open_artefact
from penjing.core.errors import Exit, Refused
from penjing.core.method import Change
from penjing.core.target import Target

EXAMPLE = (np.zeros((1, 3), np.float32),)


class FakeRuntime:
    """Writes a model, here bytes, as one file."""

    name = "fake"
    file = "model.onnx"

    def deliver(self, model, example, folder):
        if model == b"broken":
            (folder / "half").write_bytes(b"x")
            raise Refused("the model can be exported", value="broken", fix="mend it")
        if model:
            (folder / self.file).write_bytes(model)
        return {"format": "fake", "inputs": [list(example[0].shape)]}

    def open(self, folder, target, model=None):
        content = (Path(folder) / self.file).read_bytes()
        return lambda *inputs: (content, target.threads)


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    fake = FakeRuntime()
    monkeypatch.setattr(module, "runtime_for", lambda target: fake)
    return fake


def test_deliver_open_load(tmp_path):
    change = Change(method="PruneChannels", layer="conv", status="skipped", reason="one channel")
    folder, record = tmp_path / "new" / "a", {"verdict": "reached"}
    applied = Applied(b"weights", (change,), (pj.PruneChannels(ratio=0.5),))
    made = deliver(applied, Target(threads=2), folder, example=EXAMPLE, record=record)
    assert made == open_artefact(tmp_path / "new" / "a")
    assert made.size_bytes == 7
    assert {f.name for f in made.files} == {"model.onnx", "plan.json", "changes.json", "record.json"}
    assert made.facts == {"format": "fake", "inputs": [[1, 3]]}
    assert [step["method"] for step in made.plan] == ["PruneChannels"]
    assert made.target == Target(threads=2)
    assert json.loads((made.path / "changes.json").read_text())[0]["reason"] == "one channel"
    assert load(made.path)(EXAMPLE) == (b"weights", 2)
    assert json.loads(made.model_dump_json())["size_bytes"] == 7


def test_same_content_has_the_same_hash(tmp_path):
    first, second = (deliver(b"w", Target(), tmp_path / n, example=EXAMPLE) for n in "ab")
    third = deliver(b"v", Target(), tmp_path / "c", example=EXAMPLE)
    assert first.sha256 == second.sha256 != third.sha256


def test_a_refused_export_leaves_nothing(tmp_path):
    with pytest.raises(Refused, match="exported"):
        deliver(b"broken", Target(), tmp_path / "a", example=EXAMPLE)
    assert os.listdir(tmp_path) == []


def test_never_overwrites(tmp_path):
    deliver(b"one", Target(), tmp_path / "a", example=EXAMPLE)
    with pytest.raises(Refused, match="overwritten") as caught:
        deliver(b"two", Target(), tmp_path / "a", example=EXAMPLE)
    assert caught.value.code == Exit.USAGE
    assert load(tmp_path / "a")()[0] == b"one"


def test_no_model_file_is_a_defect(tmp_path):
    with pytest.raises(Refused, match="must write model files"):
        deliver(b"", Target(), tmp_path / "a", example=EXAMPLE)


def test_damage_is_found_before_the_runtime_sees_the_file(tmp_path, runtime, monkeypatch):
    made = deliver(b"weights", Target(), tmp_path / "a", example=EXAMPLE)
    (made.path / "model.onnx").write_bytes(b"weightz")
    monkeypatch.setattr(runtime, "open", lambda *a: pytest.fail("the damaged file was opened"))
    with pytest.raises(Refused, match=r"model\.onnx is damaged"):
        load(made.path)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def zipped(data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "name", ["m.pt", "m.pth", "m.bin", "m.pkl", "m.JOBLIB", "m.pt2", "m.safetensors", "m.onnx"]
)
def test_no_pickle_is_written_or_read(tmp_path, runtime, name, protocol):
    data = pickle.dumps(Bomb(tmp_path / "marker"), protocol)
    for content in (data, zipped(data)):
        runtime.file = name
        with pytest.raises(Refused, match="pickle"):
            deliver(content, Target(), tmp_path / "a", example=EXAMPLE)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refused, match="folder"):
            open_artefact(tmp_path / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_refuse_pickles", lambda folder, names: None)
        made = deliver(data, Target(), tmp_path / "smuggled", example=EXAMPLE)
    with pytest.raises(Refused, match="pickle"):
        load(made.path)
    assert not (tmp_path / "marker").exists()


def test_safetensors_with_an_unlucky_length_is_no_pickle(tmp_path, runtime):
    runtime.file = "m.safetensors"
    head = b"{" + b" " * (0x0280 - 2) + b"}"
    made = deliver(len(head).to_bytes(8, "little") + head, Target(), tmp_path / "a", example=EXAMPLE)
    assert open_artefact(made.path).size_bytes == 8 + 0x0280


class TwoFiles(FakeRuntime):
    """Bare numbers in `model.bin`, beside the file that describes them."""

    def deliver(self, model, example, folder):
        (folder / "model.xml").write_bytes(b"<net/>")
        (folder / "model.bin").write_bytes(model)
        return {
            "format": "fake",
            "changes": [Change(method="fake", layer="conv", status="skipped", reason="r")],
        }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_bare_numbers_may_start_like_a_pickle_but_be_none(tmp_path, monkeypatch, protocol):
    monkeypatch.setattr(module, "runtime_for", lambda target: TwoFiles())
    head = bytes([0x80, protocol])
    numbers = head + np.random.default_rng(protocol).standard_normal(1000).astype(np.float32).tobytes()
    assert open_artefact(deliver(numbers, Target(), tmp_path / "a", example=EXAMPLE).path).size_bytes == 4008
    data = pickle.dumps(Bomb(tmp_path / "marker"), protocol)
    for content in (data, data + bytes(100), zipped(data)):
        with pytest.raises(Refused, match="pickle"):
            deliver(content, Target(), tmp_path / "b", example=EXAMPLE)
    assert not (tmp_path / "marker").exists()


def test_what_a_runtime_makes_of_layers_joins_the_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "runtime_for", lambda target: TwoFiles())
    mine = Change(method="Int8Static", layer="conv", status="done")
    made = deliver(Applied(b"w", (mine,), ()), Target(), tmp_path / "a", example=EXAMPLE)
    assert made.facts == {"format": "fake"}
    written = json.loads((made.path / "changes.json").read_text())
    assert [(c["method"], c["reason"]) for c in written] == [("Int8Static", ""), ("fake", "r")]


def test_folder_of_another_kind(tmp_path):
    files = importlib.import_module("penjing.core.files")
    files.write_folder(tmp_path / "a", lambda folder: {"kind": "something else"})
    with pytest.raises(Refused, match="delivered model"):
        open_artefact(tmp_path / "a")


def test_the_compressed_size_is_of_the_model_files_and_survives_opening(tmp_path):
    data = bytes(3_000_000) + np.random.default_rng(0).bytes(1000)
    made = deliver(data, Target(), tmp_path / "a", example=EXAMPLE)
    assert made.size_bytes == len(data)
    assert made.compressed_bytes == len(zlib.compress(data, 6)) < 6000
    assert open_artefact(tmp_path / "a").compressed_bytes == made.compressed_bytes
