"""Two finished runs side by side: the rows, and what a reader must know before comparing them."""

import pytest

from penjing.core.measurement import Estimate, Latency, Measurement, NotMeasured
from penjing.core.verdict import Verdict
from penjing.report.record import Record
from penjing.search import compare
from penjing.search.result import Result


def estimate(value):
    return Estimate(value=value, low=value, high=value, n=30)


def record(ms, processor):
    latency = Latency(
        p50_ms=estimate(ms),
        p95_ms=estimate(ms),
        p99_ms=estimate(ms),
        throughput_per_s=estimate(1000 / ms),
        ratio=estimate(ms / 4),
        reference="float",
        batch=1,
        threads=1,
        calls=100,
        rounds=10,
    )
    result = Measurement(
        name="m",
        target="onnxruntime",
        split="test",
        metric="accuracy",
        quality=estimate(0.9),
        latency=latency,
        memory_bytes=NotMeasured(reason="no /proc here"),
        size_bytes=1000,
    )
    verdict = Verdict(status="reached")
    return Record.model_construct(result=result, environment={"processor": processor}, verdict=verdict)


@pytest.fixture
def compared(monkeypatch):
    """A function that compares two records."""

    def run(**records):
        monkeypatch.setattr(compare, "open_result", lambda name: Result(name, records[name]))
        return compare.compare_runs(*records)

    return run


def test_costs_are_compared_and_what_was_not_measured_says_so(compared):
    data = compared(a=record(2.0, "one"), b=record(1.0, "one"))
    rows = {row["name"]: row for row in data["rows"]}
    assert rows["latency"]["words"] == "0.50×"
    assert rows["memory"]["first"] == "not measured"
    assert rows["latency / own float model"]["second"] == "0.250"
    assert len(data["notes"]) == 1


def test_runs_of_different_machines_are_noted(compared):
    assert (
        "different machines: one and another"
        in compared(a=record(2.0, "one"), b=record(1.0, "another"))["notes"]
    )
