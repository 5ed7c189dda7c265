"""What a delivered folder says was done is what `apply` did, and what `apply` returns has run."""

import contextlib
import copy
import gc
import json

import numpy as np
import pytest

import penjing as pj
from penjing.backends.numpy import BACKEND, Node, NumpyNet
from penjing.core import registry
from penjing.core.method import Changes, Method, Outcome, Stage
from penjing.core.provenance import Provenance, provenance_of, remember

RNG = np.random.default_rng(0)
X = RNG.normal(size=(90, 4)).astype(np.float32)
PRUNED, HALF = pj.PruneMagnitude(0.5), pj.PruneMagnitude(0.75)


class Enlarge(Method):
    """Multiply every weight."""

    stage = Stage.WEIGHTS
    factor: float = 1.0


@pytest.fixture
def enlarging(monkeypatch):
    registry.load_methods()
    monkeypatch.setattr(registry, "_HANDLERS", dict(registry._HANDLERS))

    @registry.handles(Enlarge)
    def enlarge(model, method, context):
        changes = Changes(method)
        for layer in context.backend.layers(model):
            weight = context.backend.read(model, layer.name)["weight"]
            context.backend.write(model, layer.name, {"weight": weight * np.float32(method.factor)})
            changes.done(layer.name)
        return Outcome(model, changes)


@pytest.fixture
def net():
    nodes = (Node("first", "linear", ("x",)), Node("last", "linear", ("first",)))
    weights = {
        name: {"weight": RNG.normal(size=shape)} for name, shape in (("first", (6, 4)), ("last", (3, 6)))
    }
    return NumpyNet(("x",), nodes, weights)


@pytest.fixture
def task():
    parts = {name: (X[i::3], np.arange(30) % 3) for i, name in enumerate(("train", "valid", "test"))}
    return pj.Task(**parts)


def test_what_several_calls_did_is_remembered_with_the_model(net, task):
    once = pj.apply(net, PRUNED, task)
    again = pj.apply(once, HALF, task)
    also = pj.apply(once.model, HALF, task)
    assert once.provenance == Provenance((PRUNED,), once.changes)
    for second in (again, also):
        assert second.plan == (HALF,)
        assert second.provenance.plan == (PRUNED, HALF)
        assert second.provenance.changes == (*once.changes, *second.changes)
        assert provenance_of(second.model) == second.provenance
    assert provenance_of(net) == Provenance()


def test_another_model_has_another_provenance(net, task):
    small = pj.apply(net, PRUNED, task).model
    assert provenance_of(copy.deepcopy(small)) == Provenance()
    place = id(small)
    del small
    gc.collect()
    from penjing.core import provenance

    assert place not in provenance._KNOWN
    remember(3, Provenance((PRUNED,)))
    assert provenance_of(3) == Provenance()


def test_the_delivered_plan_is_what_was_done(net, task, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    done = pj.apply(pj.apply(net, PRUNED, task), pj.Int8Static(examples=16), task)
    example = task.prepare().valid.example()
    for name, given in (("applied", done), ("model", done.model)):
        made = pj.deliver(given, pj.Target(), tmp_path / name, example=example)
        steps = json.loads((made.path / "plan.json").read_text())
        assert [step["method"] for step in steps] == ["PruneMagnitude", "Int8Static"]
        assert list(made.plan) == steps
        written = json.loads((made.path / "changes.json").read_text())
        assert {change["method"] for change in written} == {"PruneMagnitude", "Int8Static"}
        assert len(written) == len(done.provenance.changes)


def test_a_model_that_nothing_was_done_to_says_so(net, task, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    made = pj.deliver(net, pj.Target(), tmp_path / "float", example=(X[:1],))
    assert made.plan == ()
    assert json.loads((made.path / "changes.json").read_text()) == []


def test_a_result_with_outputs_that_are_not_finite_is_refused(task, enlarging):
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)).eval()
    with pytest.raises(
        pj.Refused, match=r"PruneMagnitude \+ Enlarge: the outputs of the result must be finite"
    ):
        pj.apply(net, (PRUNED, Enlarge(factor=1e30)), task)


def test_a_result_that_does_not_run_is_refused_with_what_the_framework_says(net, task, monkeypatch):
    calls, runs = [], type(BACKEND).run

    def run(self, model, inputs):
        calls.append(model)
        if model is not net:
            raise RuntimeError("mat1 and mat2 must have the same dtype")
        return runs(self, model, inputs)

    monkeypatch.setattr(type(BACKEND), "run", run)
    with pytest.raises(pj.Refused, match="must run on an example of valid, got RuntimeError: mat1 and mat2"):
        pj.apply(net, PRUNED, task)
    assert len([model for model in calls if model is not net]) == 1


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("method", [pj.QuantizeNearest("int8"), PRUNED], ids=["nearest", "magnitude"])
def test_a_model_of_another_precision_comes_back_able_to_run_or_is_refused(task, kind, method):
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    from penjing.core.backend import backend_for

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    model = model.to(getattr(torch, kind)).eval()
    with contextlib.suppress(pj.Refused):
        applied = pj.apply(model, method, task)
        outputs = backend_for(applied.model).run(applied.model, (X[:5],))
        assert outputs.shape == (5, 3)
        assert np.isfinite(outputs).all()
