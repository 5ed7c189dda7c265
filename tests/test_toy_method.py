"""How little a new method takes: a class, a handler, and everything else finds it.

A real one is its own file, its line in `core/names.py`, what `tools/write_stub.py` makes of that line, its
card in `docs/methods/`, and its row in `tests/test_every_method.py`.
"""

import json
from typing import ClassVar

import numpy as np
import pytest
from pydantic import Field

import penjing as pj
from penjing.backends.numpy import BACKEND, Node, NumpyNet
from penjing.core import registry
from penjing.core.method import Changes, Method, Outcome, Stage
from penjing.core.plan import plan_from_json, plan_to_json
from penjing.core.task import Split, Task


class ScaleWeights(Method):
    """Multiply the weights of linear layers.

    Attributes:
        factor: above 0.
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    factor: float = Field(default=0.5, gt=0)


def scale_weights(model, method, context):
    """Carry `ScaleWeights` out on any backend that reads and writes tensors."""
    changes = Changes(method)
    for layer in context.backend.layers(model):
        if layer.kind != "linear" or not context.covers(layer.name):
            changes.skip(layer.name, "no linear layer, or left out")
            continue
        weight = context.backend.read(model, layer.name)["weight"]
        context.backend.write(model, layer.name, {"weight": weight * method.factor})
        changes.done(layer.name, factor=method.factor)
    return Outcome(model, changes)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The method is known while a test runs, and no longer."""
    registry.load_methods()
    monkeypatch.setattr(registry, "_HANDLERS", dict(registry._HANDLERS))
    registry.handles(ScaleWeights)(scale_weights)


@pytest.fixture
def net():
    nodes = (
        Node("first", "linear", ("x",)),
        Node("relu", "relu", ("first",)),
        Node("last", "linear", ("relu",)),
    )
    rng = np.random.default_rng(0)
    shapes = {"first": (5, 4), "last": (3, 5)}
    return NumpyNet(
        ("x",), nodes, {name: {"weight": rng.normal(size=shape)} for name, shape in shapes.items()}
    )


@pytest.fixture
def task():
    x = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32)
    parts = {
        name: Split((x[i::3],), np.arange(10) % 3, name) for i, name in enumerate(("train", "valid", "test"))
    }
    return Task(**parts)


def test_it_is_applied_to_a_copy_and_every_layer_is_reported(net, task):
    x = task.valid.inputs
    before = BACKEND.run(net, x)
    applied = pj.apply(net, ScaleWeights(factor=0.5), task)
    np.testing.assert_allclose(BACKEND.run(applied.model, x), before / 4, rtol=1e-6)
    np.testing.assert_array_equal(BACKEND.run(net, x), before)
    assert [(c.method, c.layer, c.done) for c in applied.changes] == [
        ("ScaleWeights", "first", True),
        ("ScaleWeights", "last", True),
    ]


def test_it_is_limited_to_layers_and_put_in_order_like_any_other(net, task):
    plan = pj.chain(pj.PruneMagnitude(0.5), pj.only("last", ScaleWeights(factor=2)))
    applied = pj.apply(net, plan, task)
    assert [c.layer for c in applied.changes if c.method == "ScaleWeights" and c.done] == ["last"]
    with pytest.raises(pj.Refused, match="must not descend"):
        pj.chain(ScaleWeights(), pj.PruneChannels(ratio=0.5))


def test_it_is_rebuilt_from_its_json(net, task):
    plan = pj.chain(ScaleWeights(), pj.only("last", ScaleWeights(factor=2)))
    data = json.loads(json.dumps(plan_to_json(plan)))
    assert data[1] == {"method": "ScaleWeights", "factor": 2.0, "only": "last"}
    assert plan_from_json(data) == plan


@pytest.mark.parametrize("fields", [{"factor": 0}, {"factor": "much"}, {"factr": 1}])
def test_its_wrong_values_are_refused_with_its_name(fields):
    with pytest.raises(pj.Refused, match="ScaleWeights"):
        ScaleWeights(**fields)
