"""Every hostile file of the corpus is refused, in this very process and without its memory.

`benchmarks/hostile_files.py` tries the same files in processes of their own, and runs what loads.
"""

import resource
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("torch", reason="the extra torch is not installed")

import penjing as pj

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from hostile import folders, onnx_files

HARMLESS = {"graphs in graphs"}
"""Odd, but not more than a model may be."""
ONNX = dict(onnx_files.made_onnx())
MEMORY = 2**29


def refused(load, path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(pj.Refused) as caught:
        load(path)
    assert caught.value.fix
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


@pytest.mark.parametrize("name", sorted(ONNX.keys() - HARMLESS))
def test_hostile_onnx_files_are_refused(name, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(ONNX[name](tmp_path).SerializeToString())
    refused(pj.load_onnx, path)


@pytest.fixture(scope="module")
def marker(tmp_path_factory):
    return tmp_path_factory.mktemp("marker") / "executed"


@pytest.fixture(scope="module")
def made(tmp_path_factory, marker):
    """What makes each folder, by kind and name."""
    scratch = tmp_path_factory.mktemp("hostile")
    return {(kind, name): make for kind, name, make in folders.made_folders(scratch, marker)}


FOLDERS = [
    *(("OpenVINO", name) for name in folders.OPENVINO),
    *(("torch graph", name) for name in folders.STORED),
    *(("safetensors", name) for name in folders.SAFETENSORS),
    *(("manifest", name) for name in folders.MANIFESTS),
    (".npz", "objects"),
    (".npz", "zeros"),
    ("pickle", "in the place of a model"),
]


@pytest.mark.parametrize(("kind", "name"), FOLDERS)
def test_hostile_folders_are_refused(kind, name, made, marker, tmp_path):
    if kind == "OpenVINO":
        pytest.importorskip("openvino", reason="the extra openvino is not installed")
    path = made[kind, name](tmp_path / "artefact")
    refused(pj.load, path)
    assert not marker.exists()


def test_the_corpus_is_whole(made):
    assert set(made) == set(FOLDERS)
    assert len(ONNX) + len(FOLDERS) >= 80
