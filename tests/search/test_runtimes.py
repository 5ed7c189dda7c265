"""Choosing runtime and precision by measurement, and runs in OpenVINO from start to end."""

import json

import pytest

import penjing as pj
from penjing.core.artefact import open_artefact
from penjing.core.errors import Exit, Refused
from penjing.core.measurement import Estimate, Latency, Measurement
from penjing.core.target import Target, runtime_for
from penjing.core.trial import Trial
from penjing.report.record import RuntimeRows
from penjing.report.words import chosen_runtime
from penjing.search import runtimes
from penjing.search.runtimes import check_target, list_competitors

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("openvino", reason="the extra openvino is not installed")

needs_bf16 = pytest.mark.skipif("bf16" not in runtimes.list_openvino_modes(), reason="no bfloat16 here")


def test_auto_is_compared_with_the_default_runtime_and_keeps_threads_and_batch():
    auto = Target("auto", threads=2, batch=3)
    assert auto.reference == Target("onnxruntime", threads=2, batch=3)
    found = list_competitors(auto, "onnx")
    assert [t.label for t in found] == [f"openvino {mode}" for mode in runtimes.list_openvino_modes()]
    assert all((t.threads, t.batch) == (2, 3) for t in found)


def test_torch_competes_only_where_it_is_asked_to(monkeypatch):
    monkeypatch.setattr(runtimes, "list_openvino_modes", lambda: ())
    asked = Target("auto", mode="torch")
    assert [t.label for t in list_competitors(asked, "torch")] == ["torch eager", "torch compiled"]
    assert list_competitors(asked, "onnx") == ()
    assert list_competitors(Target("auto"), "torch") == ()


def test_a_named_target_competes_only_with_its_own_float32():
    assert list_competitors(Target("openvino"), "torch") == ()
    low = Target("openvino", mode="bf16")
    assert list_competitors(low, "torch") == (low,)


def test_auto_is_no_runtime_by_itself():
    with pytest.raises(Refused, match="Let `optimize` choose"):
        runtime_for(Target("auto"))


def test_bf16_is_refused_before_anything_starts_where_the_processor_lacks_it(monkeypatch):
    monkeypatch.setattr(runtimes, "list_openvino_modes", lambda: ("f32",))
    with pytest.raises(Refused, match="computes in bf16") as caught:
        check_target(Target("openvino", mode="bf16"))
    assert caught.value.code == Exit.ENVIRONMENT
    check_target(Target("openvino"))


def test_a_missing_extra_is_said_with_the_line_to_type(monkeypatch):
    monkeypatch.setattr(
        "penjing.core.extras.missing", lambda extra: ("openvino",) if extra == "openvino" else ()
    )
    with pytest.raises(Refused, match=r'[Pp]ip install "penjing\[openvino\]"'):
        check_target(Target("openvino"))


def estimate(value, spread=0.0):
    return Estimate(value=value, low=value - spread, high=value + spread, n=15)


def trial(label, ratio, spread=0.01, drop=0.0):
    latency = Latency(
        p50_ms=estimate(ratio),
        p95_ms=estimate(ratio),
        p99_ms=estimate(ratio),
        throughput_per_s=estimate(1.0),
        ratio=estimate(ratio, spread),
        reference="float",
        batch=1,
        threads=1,
        calls=100,
        rounds=15,
    )
    found = Measurement(
        name=label,
        target=label,
        split="valid",
        metric="accuracy",
        quality=estimate(0.9),
        latency=latency,
        memory_bytes=estimate(1e8),
        size_bytes=1,
    )
    return Trial(key=label, name=label, plan=[], status="done", drop=drop, measurement=found)


class Asked:
    def __init__(self, target):
        self.target, self.reference = target, target.reference


def test_the_fastest_that_is_faster_with_certainty_is_chosen():
    auto = Asked(Target("auto"))
    trials = {"a": trial("a", 0.5), "b": trial("b", 0.4), "c": trial("c", 0.3, spread=0.8)}
    assert runtimes._fastest(auto, trials, {}) == "b"
    assert runtimes._fastest(auto, trials, {"b": "its quality would not be certified"}) == "a"
    assert runtimes._fastest(auto, {"c": trials["c"]}, {}) == "onnxruntime"
    assert runtimes._fastest(auto, {}, {}) == "onnxruntime"


def test_what_the_runtime_alone_gains_is_said():
    lines = runtimes._words(Asked(Target("auto")), {"a": trial("a", 0.5, drop=0.002)}, "a")
    assert lines == [
        "a: 0.5 ms, 2.00 times faster than onnxruntime, +0.20 points lost",
        "a alone is 2.00 times faster than onnxruntime",
    ]
    rows = RuntimeRows(chosen="a", rows={"a": runtimes._row(trial("a", 0.5))})
    said = chosen_runtime(rows, "onnxruntime")
    assert "a alone makes the float model 2.00 times faster than onnxruntime" in said
    assert chosen_runtime(RuntimeRows(), "onnxruntime") == ""


@pytest.fixture(scope="module")
def parts(task_file):
    import runpy

    found = runpy.run_path(str(task_file))
    return found["model"](), found["task"]().prepare()


@needs_bf16
def test_a_run_that_chooses_from_start_to_end(parts, tmp_path, quick, monkeypatch):
    """The float model of this test is slower in OpenVINO; a candidate is declared fast to be chosen."""
    monkeypatch.setattr(runtimes, "_fastest", lambda session, trials, reasons: "openvino bf16")
    model, task = parts
    said = []
    budget = pj.Budget(max_drop="6%", trials=1)
    result = pj.optimize(
        model,
        task,
        budget,
        target=Target("auto"),
        out=tmp_path / "run",
        say=lambda line: said.append(str(line)),
    )
    assert any(line.startswith("openvino bf16 alone is") for line in said)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["runtimes"]["asked"] == "auto"
    assert record["runtimes"]["chosen"] == "openvino bf16"
    assert set(record["runtimes"]["rows"]) == {"openvino f32", "openvino bf16"}
    assert record["baselines"]["target"]["target"] == "onnxruntime"
    assert record["ablation"][0]["step"] == "float model in onnxruntime"
    tried = {t["measurement"]["target"] for t in record["trials"] if t["measurement"]}
    assert tried == {"openvino bf16"}
    (trial,) = record["trials"]
    assert trial["status"] == "done", trial["reason"]
    delivered = open_artefact(result.artefact)
    assert delivered.target.label in ("onnxruntime", "openvino bf16")
    again = pj.verify(tmp_path / "run", task, budget)
    assert again.status == "reached"


@pytest.mark.slow
def test_a_run_in_openvino_keeps_integers_and_is_verified(parts, tmp_path, quick, monkeypatch):
    model, task = parts
    budget = pj.Budget(max_drop="6%", size="80%", trials=1)
    result = pj.optimize(model, task, budget, target=Target("openvino"), out=tmp_path / "run")
    record = result.record
    assert record["config"]["target"]["runtime"] == "openvino"
    assert record["runtimes"] == {"asked": "openvino f32", "chosen": "openvino f32", "words": [], "rows": {}}
    (trial,) = record["trials"]
    assert trial["plan"][0]["method"] == "Int8Static"
    assert trial["status"] == "done", trial["reason"]
    artefact = open_artefact(
        next((tmp_path / "run" / "artefacts").glob("trial-*/artefact/manifest.json")).parent
    )
    assert artefact.target.label == "openvino f32"
    assert result.report.is_file()
    x = task.test.arrays()[0][0][:5]
    assert result.load()(x).shape == (5, 10)
    again = pj.verify(tmp_path / "run", task, budget).limits["size"]
    assert (again.status, again.measured) == (
        result.verdict.limits["size"].status,
        result.verdict.limits["size"].measured,
    )
