"""The verbs that look and measure without searching."""

import json

import pytest

import penjing as pj
from penjing.diagnostics.benchmark import benchmark
from penjing.diagnostics.inspect import inspect_model
from penjing.search.runtimes import list_openvino_modes

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")


IN_OPENVINO = [f"float, openvino {mode}" for mode in list_openvino_modes()]


@pytest.fixture(scope="module")
def parts(task_file):
    import runpy

    found = runpy.run_path(str(task_file))
    return found["model"](), found["task"]().prepare()


def test_inspect_names_layers_groups_and_what_is_frozen(parts):
    data = inspect_model(*parts)
    rows = {row["name"]: row for row in data["layers"]}
    assert list(rows) == ["conv1", "bn1", "conv2", "head"]
    assert rows["conv1"]["group"] == rows["bn1"]["group"] != rows["conv2"]["group"]
    assert rows["head"]["group"] == ""
    assert "output" in rows["head"]["frozen"]
    macs = 9 * 32 * 64 + 9 * 32 * 64 * 16 + 64 * 10
    assert data["multiply_adds"] == macs
    assert data["parameters"] == sum(p.numel() for p in parts[0].parameters())
    assert "PruneChannels" in data["methods"]
    assert data["whole"] == ""


def test_inspect_prints_for_people_and_as_json(command, task_file):
    data = json.loads(command("inspect", task_file, "--json", check=0).stdout)
    text = command("inspect", task_file, check=0).stdout
    for row in data["layers"]:
        assert row["name"] in text
    assert f"{data['parameters']:,} parameters" in text


def test_an_onnx_file_is_inspected_and_says_why_nothing_can_go(parts, tmp_path):
    model, task = parts
    folder = pj.deliver(model, pj.Target(), tmp_path / "a", example=task.valid.example()).path
    data = inspect_model(pj.load_onnx(folder / "model.onnx"), task)
    assert [row["name"] for row in data["layers"]] == ["conv1", "conv2", "head"]
    assert "the plan prunes it and makes it ONNX" in data["whole"]


def test_benchmark_puts_artefacts_beside_the_float_model(parts, tmp_path):
    model, task = parts
    example = task.valid.example()
    onnx = pj.load_onnx(pj.deliver(model, pj.Target(), tmp_path / "a", example=example).path / "model.onnx")
    small = pj.apply(model, pj.PruneChannels(0.5), task).model
    folder = pj.deliver(small, pj.Target(), tmp_path / "b", example=example).path
    data = benchmark(onnx, task, [folder])
    assert list(data["rows"]) == ["float, onnxruntime", *IN_OPENVINO, str(folder)]
    float_row, *_, small_row = data["rows"].values()
    assert small_row["size_bytes"] < float_row["size_bytes"]
    assert small_row["latency"]["ratio"]["n"] > 1
    assert float_row["quality"]["value"] > 0.9


@pytest.mark.slow
def test_benchmark_measures_every_runtime(command, task_file):
    data = json.loads(command("benchmark", task_file, "--json", check=0).stdout)
    in_torch = ["float, torch eager", "float, torch compiled"]
    assert list(data["rows"]) == ["float, onnxruntime", *IN_OPENVINO, *in_torch]
    assert all(row["latency"]["kind"] == "latency" for row in data["rows"].values())
