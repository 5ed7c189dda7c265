"""Packed embedding tables, looked up by ONNX Runtime."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from onnx import TensorProto

import penjing as pj
from penjing.arrays.formats.clipping import clipped_parameters
from penjing.arrays.formats.coding import rounded
from penjing.core.number_format import number_format
from penjing.core.task import Task

INDEX = np.random.default_rng(0).integers(-30, 30, (40, 6))
"""Rows from both ends: negative ones count from the last."""


@pytest.fixture
def task():
    y = np.zeros(40, np.int64)
    return Task(train=(INDEX, y), valid=(INDEX[:20], y[:20]), test=(INDEX[20:], y[20:]), max_overlap=1)


@pytest.fixture
def lookup(net):
    """A network that gives the rows of a table, and its table."""

    def make(width=24, rows=30, more=None):
        made = net((6,))
        table = made.constant("items.weight", made.randn(rows, width))
        out = made.node("Gather", table, "x", axis=0)
        if more is not None:
            out = more(made, table, out)
        return made.model(out, kind=TensorProto.INT64), made.arrays["items.weight"]

    return make


NAMES = [
    "int8",
    "uint8",
    "int4",
    "uint4",
    "int4 group 16",
    "uint4 group 16",
    "uint4 group 32",
    "int8 group 16",
    "uint8 group 32",
]


@pytest.mark.parametrize("width", [24, 64])
@pytest.mark.parametrize("name", NAMES)
def test_a_lookup_is_the_reference_to_the_bit(lookup, task, name, width):
    model, table = lookup(width)
    done = pj.apply(model, pj.QuantizeEmbeddings(name), task)
    form = done.plan[0].weights
    wanted = rounded(table, form, *clipped_parameters(table, form))
    np.testing.assert_array_equal(done.model.run((INDEX,))[0], wanted[INDEX])
    facts = {c.layer: c.detail for c in done.changes}["items"]
    assert facts["format"] == str(form)
    assert form.bits_per_value(table.shape) <= facts["bits_per_value"] < 14
    stored = sum(len(t.raw_data) for t in done.model.proto.graph.initializer)
    assert 8 * stored / table.size == pytest.approx(facts["bits_per_value"])


def test_large_tables_are_rounded_some_rows_at_a_time(lookup, task, monkeypatch):
    import penjing.quantize.embeddings as module

    model, table = lookup()
    whole = pj.apply(model, pj.QuantizeEmbeddings("uint4 group 16"), task).model
    monkeypatch.setattr(module, "CHUNK", 7 * table.shape[1])
    parts = pj.apply(model, pj.QuantizeEmbeddings("uint4 group 16"), task).model
    assert whole.proto.SerializeToString() == parts.proto.SerializeToString()


def test_the_artefact_is_smaller_and_computes_in_a_runtime_of_its_own(lookup, task, tmp_path):
    sizes = {}
    for name in ("float", "int8", "int4 group 32"):
        plan = () if name == "float" else (pj.QuantizeEmbeddings(name),)
        model, _ = lookup(64, 2000)
        model = pj.apply(model, plan, task).model if plan else model
        artefact = pj.deliver(model, pj.Target(), tmp_path / name, example=(INDEX[:1],))
        sizes[name] = artefact.size_bytes
        np.testing.assert_array_equal(pj.load(artefact.path)(INDEX), model.run((INDEX,))[0])
    assert sizes["int8"] < 0.29 * sizes["float"]
    assert sizes["int4 group 32"] < 0.18 * sizes["float"]


def test_a_table_that_is_looked_up_twice_is_stored_once_and_linear_layers_can_follow(lookup, task):
    def twice(made, table, out):
        other = made.node("Gather", table, made.constant("first", np.zeros((1, 6), np.int64)))
        return made.linear(made.node("Flatten", made.node("Add", out, other)), "up", 16, 6 * 24)

    model, _ = lookup(more=twice)
    done = pj.apply(model, pj.QuantizeEmbeddings("int4 group 16"), task)
    kinds = [node.op_type for node in done.model.proto.graph.node]
    assert kinds.count("GatherBlockQuantized") == 2
    assert len([t for t in done.model.proto.graph.initializer if t.name.startswith("items")]) == 2
    reasons = {c.layer: c.reason for c in done.changes if not c.done}
    assert reasons == {"up": "it is no embedding table"}
    both = pj.apply(model, pj.chain(pj.QuantizeEmbeddings("int4"), pj.WeightOnly("int8 group 16")), task)
    kinds = [node.op_type for node in both.model.proto.graph.node]
    assert {"GatherBlockQuantized", "MatMulNBits"} <= set(kinds)


def test_tables_that_gain_nothing_stay_with_a_reason(lookup, net, task):
    def tied(made, table, out):
        back = made.node("Transpose", table, perm=[1, 0])
        return made.node("MatMul", out, back)

    cases = [
        (lookup(more=tied)[0], "int8", "used as a matrix too"),
        (lookup(1)[0], "int8", "no smaller"),
        (lookup(15)[0], "int4", "no whole bytes"),
    ]
    for model, name, reason in cases:
        with pytest.raises(pj.Refused, match=reason):
            pj.apply(model, pj.QuantizeEmbeddings(name), task)


def test_twice_and_bad_formats_are_refused(lookup, task):
    for name in ("int8", "int4"):
        once = pj.apply(lookup()[0], pj.QuantizeEmbeddings(name), task).model
        with pytest.raises(pj.Refused, match="must change at least one layer"):
            pj.apply(once, pj.QuantizeEmbeddings(name), task)
    for wrong in (
        "int3",
        "int4 group 24",
        "int8 group 8",
        "int8 narrow",
        "nf4",
        "uint8 symmetric",
        "int8 token",
    ):
        with pytest.raises(pj.Refused, match="weights"):
            pj.QuantizeEmbeddings(wrong)
    assert pj.QuantizeEmbeddings("int4").weights == number_format("int4 channel")
