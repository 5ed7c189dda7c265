"""A realistic record, built from the values of the core so that it keeps step with them."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

from penjing.core.budget import Budget
from penjing.core.measurement import Estimate, Latency, Measurement, NotMeasured, Operations
from penjing.core.method import Change
from penjing.core.target import Target
from penjing.core.verdict import Certificate, Flips, Step, Verdict, WorstClass, judge_drop, judge_upper

DIGITS = tuple("0123456789")


def estimate(value: float, spread: float, unit: str = "", n: int = 600, how: str = "") -> Estimate:
    return Estimate(value=value, low=value - spread, high=value + spread, n=n, unit=unit, how=how)


def measurement(
    name: str,
    accuracy: float,
    p50: float,
    size: int,
    multiply_adds: int,
    *,
    target: str = "onnxruntime",
    split: str = "test",
    reference: float = 0.262,
    uncounted: tuple[str, ...] = (),
) -> Measurement:
    quantiles = p50 * (0.9 + 0.1 * np.exp(np.linspace(0, 1, 101) ** 6 * 1.8))
    latency = Latency(
        p50_ms=estimate(p50, p50 * 0.02, "ms"),
        p95_ms=estimate(p50 * 1.2, p50 * 0.05, "ms"),
        p99_ms=estimate(p50 * 1.4, p50 * 0.1, "ms"),
        throughput_per_s=estimate(1000 / p50, 20 / p50, "1/s"),
        ratio=estimate(p50 / reference, 0.02 * p50 / reference),
        reference="float",
        quantiles_ms=tuple(float(q) for q in quantiles),
        batch=1,
        threads=1,
        calls=4000,
        rounds=20,
    )
    return Measurement(
        name=name,
        target=target,
        split=split,
        metric="accuracy",
        quality=estimate(accuracy, 0.011, how="Wilson"),
        metrics={"accuracy": accuracy, "f1_macro": accuracy - 0.004, "ece": 0.021},
        per_class={d: min(1.0, accuracy - 0.03 + 0.006 * i) for i, d in enumerate(DIGITS)},
        latency=latency,
        memory_bytes=estimate(48e6, 4e5, "bytes", n=3),
        size_bytes=size,
        operations=Operations(parameters=size // 4, multiply_adds=multiply_adds, uncounted=uncounted),
        difference=2.1e-6,
    )


def build_record() -> dict[str, Any]:
    base = measurement("float", 0.9817, 0.262, 312_400, 4_630_000)
    eager = measurement("float", 0.9817, 1.31, 315_000, 4_630_000, target="torch eager")
    plan = [
        {"method": "PruneChannels", "ratio": 0.5, "score": "taylor"},
        {"method": "ReestimateBatchNorm"},
        {"method": "Distill", "epochs": 3},
        {"method": "Int8Static", "only": "conv*"},
    ]
    name = "PruneChannels(ratio=0.5) + ReestimateBatchNorm() + Distill(epochs=3) + Int8Static()"
    result = measurement(name, 0.9783, 0.081, 31_300, 1_190_000)
    runner = measurement("PruneChannels(ratio=0.375) + Int8Static()", 0.98, 0.114, 47_100, 1_820_000)
    slow = measurement("Int8Dynamic()", 0.9811, 0.301, 84_000, 4_630_000)
    slow = slow.model_copy(
        update={"memory_bytes": NotMeasured(reason="the process ended before its peak was read")}
    )
    trials = []
    for i, ratio in enumerate((0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)):
        quality = 0.982 - 0.05 * ratio**4
        m = measurement(
            f"PruneChannels(ratio={ratio})",
            quality,
            0.17 * (1 - 0.8 * ratio),
            int(9e4 * (1 - ratio) + 4e3),
            int(4.6e6 * (1 - ratio) ** 2),
            split="valid",
        )
        trials.append(
            {
                "id": i,
                "name": f"PruneChannels(ratio={ratio}) + Distill(epochs=3) + Int8Static()",
                "plan": plan,
                "drop": None,
                "flips": None,
                "breaks": {},
                "status": "done",
                "reason": "",
                "measurement": m.model_dump(mode="json"),
                "feasible": ratio <= 0.5,
                "pareto": True,
                "seconds": 4.2 + i,
            }
        )
    trials.append(
        {
            "id": 7,
            "name": "Int8Dynamic()",
            "plan": [],
            "drop": None,
            "flips": None,
            "breaks": {},
            "status": "done",
            "reason": "",
            "feasible": False,
            "measurement": slow.model_copy(update={"split": "valid"}).model_dump(mode="json"),
            "pareto": False,
            "seconds": 1.5,
        }
    )
    for i in (8, 9):
        trials.append(
            {
                "id": i,
                "name": f"PruneChannels(ratio=0.9{i})",
                "plan": [],
                "status": "failed",
                "feasible": False,
                "drop": None,
                "flips": None,
                "breaks": {},
                "reason": "the worker was killed (signal 9, probably out of memory)",
                "measurement": None,
                "pareto": False,
                "seconds": 2.0,
            }
        )
    changes = [
        Change(
            method="PruneChannels",
            layer=f"layer{i // 4 + 1}.{i % 4}.conv1",
            status="done",
            detail={"channels_before": 32, "channels_after": 16, "score": 0.0183},
        )
        for i in range(12)
    ] + [
        Change(method="PruneChannels", layer="fc", status="skipped", reason="the classes are the output"),
        Change(method="ReestimateBatchNorm", layer="layer1.0.bn1", status="done", detail={"examples": 1024}),
        Change(method="Int8Static", layer="conv1", status="done", detail={"scale": 0.0121, "error": 0.004}),
        Change(method="Int8Static", layer="fc", status="skipped", reason="the pattern conv* does not match"),
    ]
    budget = Budget(max_drop="1%", latency="60%", size="25%", time="5min")
    certificate = Certificate(
        candidate=name,
        metric="accuracy",
        max_drop=0.01,
        n=899,
        confidence=0.95,
        method="Tango score interval",
        drop=estimate(0.0034, 0.0055, n=899),
        flips=Flips(total=11, correct_to_wrong=7, wrong_to_correct=4),
        worst_class=WorstClass(label="8", drop=0.023, low=-0.01, high=0.071, n=87, p_holm=0.4),
        smallest_certifiable_drop=0.0091,
        needed_n=760,
        sequence=(
            Step(name="PruneChannels(ratio=0.25)", drop=0.001, upper=0.0061, p_value=0.0008, certified=True),
            Step(name=name, drop=0.0034, upper=0.0089, p_value=0.031, certified=True),
            Step(
                name="PruneChannels(ratio=0.625)",
                drop=0.0117,
                upper=0.0193,
                p_value=0.72,
                certified=False,
                reason="the upper bound is above the limit",
            ),
        ),
    )
    latency = result.latency
    assert isinstance(latency, Latency)
    limits = {
        "max_drop": judge_drop(certificate, 0.01, 0.9817),
        "latency": judge_upper(0.1572, latency.p50_ms, 0.262, "ms"),
        "size": judge_upper(78_100, estimate(31_300, 0), 312_400, "bytes"),
    }
    verdict = Verdict.of(limits, certificate, ("test was made from half of valid",))
    record = {
        "schema": 1,
        "penjing": "0.1.0",
        "name": "digits-1",
        "created": "2026-11-23T10:15:00+00:00",
        "config": {
            "budget": budget.model_dump(mode="json"),
            "target": Target().model_dump(mode="json"),
            "seed": 0,
            "metric": "accuracy",
            "class_names": list(DIGITS),
        },
        "verdict": verdict.model_dump(mode="json"),
        "artefact": {
            "path": "trials/5/artefact",
            "sha256": "5f" * 32,
            "files": [
                {"name": "model.onnx", "sha256": "a1" * 32, "bytes": 31_300},
                {"name": "plan.json", "sha256": "b2" * 32, "bytes": 412},
            ],
        },
        "baselines": {"eager": eager.model_dump(mode="json"), "target": base.model_dump(mode="json")},
        "result": result.model_dump(mode="json"),
        "runners_up": [runner.model_dump(mode="json"), slow.model_dump(mode="json")],
        "plan": plan,
        "changes": [c.model_dump(mode="json") for c in changes],
        "ablation": [
            {
                "step": step,
                "quality": q.model_dump(mode="json"),
                "latency_ms": ms,
                "low": ms and ms * 0.97,
                "high": ms and ms * 1.03,
                "size_bytes": size,
                "operations": ops and ops.model_dump(mode="json"),
            }
            for step, q, ms, size, ops in (
                ("float", base.quality, 0.262, 312_400, base.operations),
                ("PruneChannels(ratio=0.5)", estimate(0.41, 0.03), 0.118, 79_000, result.operations),
                ("ReestimateBatchNorm()", estimate(0.93, 0.015), 0.118, 79_000, result.operations),
                ("Distill(epochs=3)", estimate(0.979, 0.01), 0.117, 79_000, result.operations),
                ("Int8Static()", result.quality, 0.081, 31_300, result.operations),
            )
        ],
        "trials": trials,
        "environment": {
            "python": "3.11.2",
            "cpu": {"model": "Example CPU", "cores": 2},
            "packages": {"onnxruntime": "1.23.2"},
        },
        "spent": {
            "seconds": 54.0,
            "trials": 10,
            "by": {"training": 31.0, "evaluation": 8.0, "export": 6.0, "measurement": 7.5, "other": 1.5},
        },
        "notes": ["seed 0; 2 trials failed"],
    }
    return json.loads(json.dumps(record))


_RECORD = build_record()


@pytest.fixture
def record() -> dict[str, Any]:
    """A record as plain data, to be changed and made a `Record` of."""
    return copy.deepcopy(_RECORD)
