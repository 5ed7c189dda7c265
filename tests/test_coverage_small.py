"""A small part of the coverage table: what `benchmarks/coverage_pruning.py` asks of every architecture."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from architectures import ARCHITECTURES  # noqa: E402
from coverage_pruning import EXPECTED, markdown, selected  # noqa: E402
from penjing.backends.torch import BACKEND  # noqa: E402
from penjing.backends.torch.tensors import to_inputs  # noqa: E402
from pruning_examination import Row, examine, fresh, leaves  # noqa: E402

HAND_WRITTEN = [name for name in ARCHITECTURES if not name.startswith("hf-")]
CUT = (
    "alexnet",
    "shufflenet-v2",
    "detector-fpn",
    "unet-pixelshuffle",
    "vit-fused-qkv",
    "llama-stories",
    "textcnn",
    "dlrm",
)


def test_every_hand_written_architecture_builds_the_same_weights_twice_and_runs_on_any_batch() -> None:
    assert len(HAND_WRITTEN) >= 60
    for name in HAND_WRITTEN:
        architecture = ARCHITECTURES[name]
        first, second = architecture.build(), architecture.build()
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)), (
            name
        )
        assert not first.training, name
        for inputs in (architecture.example(), fresh(architecture.example(), 5)):
            with torch.no_grad():
                found = leaves(first(*to_inputs(first, inputs)))
            assert found, name
            assert all(len(x) == len(inputs[0]) and bool(x.isfinite().all()) for x in found), name


@pytest.mark.parametrize("name", CUT)
def test_pruned_matched_trained_and_reloaded(name: str) -> None:
    row = examine(ARCHITECTURES[name], 0.7, onnx=False)
    assert not row.reason, (row.stage, row.reason)
    assert row.trained
    assert row.matched is not None
    assert row.matched <= 1e-5
    for change in (row.parameters, row.multiply_adds):
        assert change is not None
        assert change[1] < 0.9 * change[0]


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="the extra onnx is not installed")
def test_pruned_and_exported() -> None:
    row = examine(ARCHITECTURES["mobilenet-v1"], 0.3)
    assert not row.reason, (row.stage, row.reason)
    assert row.exported is not None
    assert row.exported <= 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", ["hf-llama"])
def test_a_model_of_the_transformers_library(name: str) -> None:
    row = examine(ARCHITECTURES[name], 0.3, onnx=False)
    assert not row.reason, (row.stage, row.reason)


def test_a_failure_is_a_row_with_its_step_and_reason_and_stands_in_the_table() -> None:
    def broken() -> torch.nn.Module:
        raise RuntimeError("no weights here")

    architecture = ARCHITECTURES["vgg"]
    row = examine(type(architecture)("broken", "vision", broken, architecture.example), 0.5)
    assert (row.stage, row.reason) == ("build", "RuntimeError: no weights here")
    assert "`broken` at 0.5, build: RuntimeError: no weights here" in markdown([row.plain()])


def test_a_cut_of_other_units_than_those_chosen_does_not_match(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = BACKEND.keep

    def wrong(model, groups, kept):
        sizes = {group.name: group.size for group in groups.groups}
        return keep(model, groups, {n: np.setdiff1d(np.arange(sizes[n]), units) for n, units in kept.items()})

    monkeypatch.setattr(BACKEND, "keep", wrong)
    row = examine(ARCHITECTURES["ncf"], 0.5, onnx=False)
    assert row.stage == "match", (row.stage, row.reason)
    assert "shrunk differs from zeroed weights" in row.reason


def test_other_inputs_are_of_the_same_kind() -> None:
    example = (np.zeros((2, 4), np.float32), np.array([[3, 5], [7, 3]]))
    floats, numbers = fresh(example)
    assert floats.shape == (3, 4)
    assert floats.dtype == np.float32
    assert numbers.shape == (3, 2)
    assert set(numbers.reshape(-1).tolist()) <= {3, 5, 7}


def test_names_are_chosen_by_patterns_and_expected_failures_exist() -> None:
    assert selected("vgg|resnet-b*") == ["vgg", "resnet-basic", "resnet-bottleneck"]
    assert set(EXPECTED) <= set(ARCHITECTURES)
    assert Row("a", "b", 0.5).plain()["reason"] == ""
