"""Bias correction on a small network with a residual add, depthwise layer and classifier."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import penjing as pj
from penjing.backends.onnx import BACKEND, OnnxModel
from penjing.backends.onnx.integers.segments import Segments
from penjing.core.errors import Refused
from penjing.core.task import Task


def network(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "a.weight": (8, 3, 3, 3),
        "b.weight": (8, 1, 3, 3),
        "b.bias": (8,),
        "c.weight": (8, 8, 1, 1),
        "fc.weight": (5, 8),
        "fc.bias": (5,),
    }
    arrays = {
        name: (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for name, shape in shapes.items()
    }

    def node(kind, inputs, out, **attributes):
        return helper.make_node(kind, inputs.split(), [out], name=f"n_{out}", **attributes)

    same = {"pads": [1, 1, 1, 1]}
    nodes = [
        node("Conv", "x a.weight", "t0", **same),
        node("Relu", "t0", "t1"),
        node("Conv", "t1 b.weight b.bias", "t2", group=8, **same),
        node("Relu", "t2", "t3"),
        node("Conv", "t3 c.weight", "t4"),
        node("Add", "t4 t1", "t5"),
        node("Relu", "t5", "t6"),
        node("GlobalAveragePool", "t6", "t7"),
        node("Flatten", "t7", "t8"),
        node("Gemm", "t8 fc.weight fc.bias", "y", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(v, k) for k, v in arrays.items()],
    )
    return OnnxModel(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).standard_normal((256, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def task(x):
    y = np.arange(len(x)) % 5
    return Task(train=(x[:128], y[:128]), valid=(x[128:192], y[128:192]), test=(x[192:], y[192:])).prepare()


COARSE = pj.Int8Static(observer="minmax", examples=2)
"""Ranges from two examples clip the others, which shifts means."""


def channel_gap(model, reference, x):
    return np.abs(model.run((x,))[0].mean(0) - reference.run((x,))[0].mean(0)).mean()


def test_means_come_closer_on_unseen_examples_and_outputs_do_not_get_worse(x, task):
    model = network()
    rough = pj.apply(model, COARSE, task).model
    fixed = pj.apply(model, pj.chain(COARSE, pj.CorrectBias(examples=128)), task).model
    unseen = x[128:]
    assert channel_gap(fixed, model, unseen) < 0.5 * channel_gap(rough, model, unseen)
    wanted = model.run((unseen,))[0]
    rough_error, fixed_error = (np.linalg.norm(m.run((unseen,))[0] - wanted) for m in (rough, fixed))
    assert fixed_error < rough_error
    agree = [(m.run((unseen,))[0].argmax(1) == wanted.argmax(1)).mean() for m in (rough, fixed)]
    assert agree[1] >= agree[0]


def test_every_layer_is_reported_with_its_error_before_and_after(task):
    applied = pj.apply(network(), pj.chain(COARSE, pj.CorrectBias()), task)
    found = {c.layer: c.detail for c in applied.changes if c.method == "CorrectBias"}
    assert list(found) == ["a", "b", "c", "fc"]
    for detail in found.values():
        assert detail["mean_error_after"] <= detail["mean_error_before"]
    assert found["a"]["mean_error_after"] < 0.1 * found["a"]["mean_error_before"]


def test_each_layer_is_corrected_behind_the_corrected_ones_before_it(x, task):
    model = network()
    fixed = pj.apply(model, pj.chain(COARSE, pj.CorrectBias(examples=128)), task).model
    train = task.train.inputs[0]
    float_names = {node.name: node.output[0] for node in fixed.reference.graph.node}
    for node in fixed.proto.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            got = _tensor(fixed.proto, node.output[0], train)
            wanted = _tensor(fixed.reference, float_names[node.name], train)
            axes = (0, 2, 3)[: 1 if got.ndim == 2 else 3]
            np.testing.assert_allclose(got.mean(axes), wanted.mean(axes), atol=2e-3)


def _tensor(proto, name, x):
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    if name not in [value.name for value in copy.graph.output]:
        copy.graph.output.append(helper.make_empty_tensor_value_info(name))
    names = [value.name for value in copy.graph.output]
    return OnnxModel(copy).run((x,))[names.index(name)]


def test_pieces_give_what_the_whole_graph_gives(x, task):
    model = pj.apply(network(), COARSE, task).model
    ends = [node.output[0] for node in model.proto.graph.node if node.op_type in ("Conv", "Gemm")]
    pieces = Segments(model.proto, list(reversed(ends)))
    assert pieces.ends == ends
    live = {"x": x[:16]}
    for index in range(len(ends)):
        live = pieces.run(index, live)
    np.testing.assert_allclose(live[ends[-1]], model.run((x[:16],))[0], atol=1e-2)
    assert pieces.peak_bytes({"x": x[:1]}) > 8 * 8 * 8


def test_argument_is_untouched_and_the_result_repeats(task):
    rough = pj.apply(network(), COARSE, task).model
    before = BACKEND.fingerprint(rough)
    first, second = (pj.apply(rough, pj.CorrectBias(examples=64), task).model for _ in range(2))
    assert BACKEND.fingerprint(rough) == before
    assert BACKEND.fingerprint(first) == BACKEND.fingerprint(second) != before


def test_layers_outside_the_pattern_keep_their_bias(task):
    rough = pj.apply(network(), COARSE, task).model
    applied = pj.apply(rough, pj.only("fc", pj.CorrectBias()), task)
    assert [c.layer for c in applied.changes if c.done] == ["fc"]
    np.testing.assert_array_equal(BACKEND.read(applied.model, "b")["bias"], BACKEND.read(rough, "b")["bias"])


@pytest.mark.parametrize("quantized", [False, True])
def test_model_without_float_reference_is_refused(task, quantized):
    model = network()
    if quantized:
        model = OnnxModel(pj.apply(model, COARSE, task).model.proto)
    with pytest.raises(Refused, match=r"needs the float model beside the quantized one.*after Int8Static"):
        pj.apply(model, pj.CorrectBias(), task)


def test_few_examples_fit_a_small_memory_and_still_work(task, monkeypatch):
    monkeypatch.setattr("penjing.repair.bias.LIVE_BYTES", 1)
    applied = pj.apply(network(), pj.chain(COARSE, pj.CorrectBias()), task)
    assert all(c.done for c in applied.changes if c.method == "CorrectBias")
