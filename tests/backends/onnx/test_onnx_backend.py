"""The protocol on hand-made graphs, and the normal form."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from penjing.backends.onnx import BACKEND, OnnxModel
from penjing.backends.onnx.normalize import normalize
from penjing.core.backend import backend_for
from penjing.core.errors import Refused
from penjing.core.task import Split

RNG = np.random.default_rng(0)


def randn(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def make(nodes, arrays, shape=("n", 3, 8, 8), opset=18, inputs_too=False, out="y"):
    def value(name, dims, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, dims)

    constants = [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()]
    extra = [value(n, np.shape(a)) for n, a in arrays.items()] if inputs_too else []
    graph = helper.make_graph(nodes, "g", [value("x", shape), *extra], [value(out, None)], constants)
    return OnnxModel(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def node(kind, inputs, output, **attributes):
    return helper.make_node(kind, inputs.split(), [output], name=f"n_{output}", **attributes)


def batchnorm(name, width):
    arrays = {f"{name}.{part}": randn(width) for part in ("weight", "bias", "running_mean")}
    return arrays | {f"{name}.running_var": np.abs(randn(width)) + 0.1}


def classifier():
    nodes = [
        node("Conv", "x conv.weight", "a", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "a bn.weight bn.bias bn.running_mean bn.running_var", "b"),
        node("Relu", "b", "c"),
        node("Conv", "c dw.weight dw.bias", "d", group=6),
        node("ReduceMean", "d axes", "e", keepdims=0),
        node("MatMul", "e fc.weight", "f"),
        node("Add", "f fc.bias", "y"),
    ]
    arrays = {
        "conv.weight": randn(6, 3, 3, 3),
        **batchnorm("bn", 6),
        "dw.weight": randn(6, 1, 3, 3),
        "dw.bias": randn(6),
        "axes": np.array([2, 3]),
        "fc.weight": randn(6, 10),
        "fc.bias": randn(10),
    }
    return make(nodes, arrays)


def test_backend_is_found_from_the_class():
    assert backend_for(classifier()) is BACKEND


def test_layers_have_kinds_and_canonical_shapes():
    layers = {layer.name: layer for layer in BACKEND.layers(classifier())}
    assert {name: layer.kind for name, layer in layers.items()} == {
        "conv": "conv",
        "bn": "batchnorm",
        "dw": "depthwise",
        "fc": "linear",
    }
    assert layers["fc"].shapes == {"weight": (10, 6)}
    assert layers["dw"].shapes == {"weight": (6, 1, 3, 3), "bias": (6,)}
    assert set(layers["bn"].shapes) == {"weight", "bias", "running_mean", "running_var"}


def test_read_and_write_are_inverse_in_every_layout():
    arrays = {
        "a.weight": randn(5, 4),
        "b.weight": randn(5, 6),
        "t.weight": randn(3, 2, 3, 3),
        "t.bias": randn(2),
    }
    nodes = [
        node("ConvTranspose", "x t.weight t.bias", "t"),
        node("GlobalAveragePool", "t", "p"),
        node("Flatten", "p", "f"),
        node("MatMul", "f two.weight", "m"),
        node("Gemm", "m a.weight", "g", transB=1),
        node("Gemm", "g b.weight", "y"),
    ]
    model = make(nodes, arrays | {"two.weight": randn(2, 4)})
    x = (randn(2, 3, 8, 8),)
    before = model.run(x)[0]
    shapes = {layer.name: layer.shapes["weight"] for layer in BACKEND.layers(model)}
    assert shapes == {"t": (2, 3, 3, 3), "two": (4, 2), "a": (5, 4), "b": (6, 5)}
    for name in shapes:
        BACKEND.write(model, name, BACKEND.read(model, name))
    np.testing.assert_array_equal(model.run(x)[0], before)
    BACKEND.write(model, "b", {"weight": 2 * BACKEND.read(model, "b")["weight"]})
    np.testing.assert_allclose(model.run(x)[0], 2 * before, rtol=1e-5)


def test_write_refuses_another_shape_and_unknown_names():
    model = classifier()
    with pytest.raises(Refused, match=r"conv\.weight must keep its shape"):
        BACKEND.write(model, "conv", {"weight": randn(5, 3, 3, 3)})
    with pytest.raises(Refused, match=r"must name a layer.*Known: .*conv"):
        BACKEND.read(model, "nothing")
    with pytest.raises(Refused, match="float constant"):
        BACKEND.write(model, "conv", {"bias": randn(6)})


def test_copy_is_independent_and_fingerprint_sees_weights():
    model = classifier()
    copy = BACKEND.copy(model)
    assert BACKEND.fingerprint(copy) == BACKEND.fingerprint(model)
    BACKEND.write(copy, "fc", {"weight": np.zeros((10, 6), np.float32)})
    assert BACKEND.fingerprint(copy) != BACKEND.fingerprint(model)
    assert BACKEND.read(model, "fc")["weight"].any()


def test_observe_yields_inputs_and_outputs_of_layers():
    model = classifier()
    split = Split((randn(5, 3, 8, 8),), np.zeros(5), "train")
    seen = list(BACKEND.observe(model, ["conv", "fc"], split.batches(2)))
    assert [len(batch["conv"][0]) for batch in seen] == [2, 2, 1]
    np.testing.assert_array_equal(seen[0]["conv"][0], split.inputs[0][:2])
    features, products = seen[0]["fc"]
    weight = BACKEND.read(model, "fc")["weight"]
    np.testing.assert_allclose(products, features @ weight.T, rtol=1e-4, atol=1e-5)


def test_operations_count_by_formula_and_name_the_unknown():
    model = classifier()
    found = BACKEND.operations(model, (randn(4, 3, 8, 8),))
    assert found.multiply_adds == 6 * 64 * 27 + 6 * 36 * 9 + 60
    assert found.parameters == 6 * 27 + 4 * 6 + 6 * 9 + 6 + 60 + 10
    assert found.uncounted == ()
    odd = make(
        [helper.make_node("LSTM", ["x", "w", "r"], ["", "y"], hidden_size=4)],
        {"w": randn(1, 16, 3), "r": randn(1, 16, 4)},
        shape=("n", 2, 3),
    )
    assert BACKEND.operations(odd, (randn(1, 2, 3),)).uncounted == ("LSTM",)


def test_pruning_is_refused_with_the_way_out():
    with pytest.raises(Refused, match="Start from the PyTorch model"):
        BACKEND.groups(classifier(), (randn(1, 3, 8, 8),))


def test_normal_form_folds_and_keeps_outputs_and_names():
    model = classifier()
    x = (randn(3, 3, 8, 8),)
    result = normalize(model, x)
    kinds = [n.op_type for n in result.proto.graph.node]
    assert kinds == ["Conv", "Relu", "Conv", "GlobalAveragePool", "Flatten", "Gemm"]
    np.testing.assert_allclose(result.run(x)[0], model.run(x)[0], rtol=1e-4, atol=1e-4)
    assert [layer.name for layer in BACKEND.layers(result)] == ["conv", "dw", "fc"]
    assert "BatchNormalization" in [n.op_type for n in model.proto.graph.node]
    again = normalize(result, x)
    assert BACKEND.fingerprint(again) == BACKEND.fingerprint(result)


@pytest.mark.parametrize(
    ("before", "arrays"),
    [
        (
            node("ConvTranspose", "x t.weight t.bias", "a"),
            {"t.weight": randn(3, 5, 2, 2), "t.bias": randn(5)},
        ),
        (node("Conv", "x t.weight", "a", group=3), {"t.weight": randn(6, 1, 2, 2)}),
    ],
)
def test_batchnorm_folds_into_any_convolution(before, arrays):
    width = 5 if before.op_type == "ConvTranspose" else 6
    names = "bn.weight bn.bias bn.running_mean bn.running_var"
    nodes = [before, node("BatchNormalization", f"a {names}", "y", epsilon=1e-3)]
    model = make(nodes, arrays | batchnorm("bn", width))
    x = (randn(2, 3, 8, 8),)
    result = normalize(model, x)
    assert [n.op_type for n in result.proto.graph.node] == [before.op_type]
    np.testing.assert_allclose(result.run(x)[0], model.run(x)[0], rtol=1e-4, atol=1e-4)


def test_batchnorm_stays_where_the_convolution_has_other_users():
    names = "bn.weight bn.bias bn.running_mean bn.running_var"
    nodes = [
        node("Conv", "x c.weight", "a"),
        node("BatchNormalization", f"a {names}", "b"),
        node("Add", "a b", "y"),
    ]
    model = make(nodes, {"c.weight": randn(4, 3, 1, 1)} | batchnorm("bn", 4))
    result = normalize(model, (randn(2, 3, 8, 8),))
    assert "BatchNormalization" in [n.op_type for n in result.proto.graph.node]


def test_old_model_with_initializers_as_inputs_is_brought_up_to_date():
    nodes = [
        node("Conv", "x c.weight", "a"),
        node("Dropout", "a", "b"),
        node("Identity", "b", "c"),
        node("Constant", "", "k", value=numpy_helper.from_array(np.float32(2.0))),
        node("Mul", "c k", "y"),
    ]
    model = make(nodes, {"c.weight": randn(4, 3, 1, 1)}, opset=9, inputs_too=True)
    assert model.inputs == ("x",)
    x = (randn(2, 3, 8, 8),)
    result = normalize(model, x)
    assert [n.op_type for n in result.proto.graph.node] == ["Conv", "Mul"]
    assert [value.name for value in result.proto.graph.input] == ["x"]
    np.testing.assert_allclose(result.run(x)[0], model.run(x)[0], rtol=1e-5, atol=1e-6)


def test_notes_with_paths_of_the_exporting_machine_do_not_travel():
    model = classifier()
    for entry in model.proto.graph.node:
        entry.metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "/home/somebody/net.py"')
    assert b"somebody" not in normalize(model, None).proto.SerializeToString()


@pytest.mark.parametrize("noted", [True, False])
def test_lost_names_of_linear_layers_come_back_from_the_note_or_the_bias(noted):
    nodes = [node("MatMul", "x val_3", "a"), node("Add", "a v.bias" if not noted else "a other", "y")]
    model = make(nodes, {"val_3": randn(8, 5), "other" if noted else "v.bias": randn(5)})
    if noted:
        entry = model.proto.graph.node[0].metadata_props
        entry.add(key="pkg.torch.onnx.name_scopes", value="['', 'v', 'linear_2']")
        entry.add(
            key="pkg.torch.onnx.class_hierarchy", value="['Net', 'torch.nn.modules.linear.Linear', 'aten']"
        )
    x = (randn(2, 3, 8, 8),)
    before = model.run(x)[0]
    result = normalize(model, x)
    assert [layer.name for layer in BACKEND.layers(result)] == ["v"]
    np.testing.assert_array_equal(result.run(x)[0], before)


def test_one_of_several_outputs_is_selected_by_name_or_index():
    nodes = [node("Conv", "x c.weight", "a"), node("Relu", "a", "y"), node("Conv", "a d.weight", "z")]
    model = make(nodes, {"c.weight": randn(4, 3, 1, 1), "d.weight": randn(2, 4, 1, 1)})
    model.proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    x = (randn(2, 3, 8, 8),)
    first, second = model.run(x)
    assert BACKEND.select(model, None) is model
    for output, wanted in ((0, first), ("y", first), ("z", second), (-1, second)):
        chosen = BACKEND.select(model, output)
        (got,) = chosen.run(x)
        np.testing.assert_array_equal(got, wanted)
    assert [layer.name for layer in BACKEND.layers(BACKEND.select(model, "y"))] == ["c"]
    for output in (2, "nothing", len):
        with pytest.raises(Refused, match="Known: y, z"):
            BACKEND.select(model, output)


def test_functions_are_inlined():
    opsets = [helper.make_opsetid("", 18)]
    body = [helper.make_node("Conv", ["a", "w"], ["b"]), helper.make_node("Relu", ["b"], ["c"])]
    function = helper.make_function("f", "Block", ["a", "w"], ["c"], body, opsets)
    block = helper.make_node("Block", ["x", "c.weight"], ["y"], domain="f")
    model = make([block], {"c.weight": randn(4, 3, 1, 1)})
    model.proto.functions.append(function)
    model.proto.opset_import.append(helper.make_opsetid("f", 1))
    x = (randn(2, 3, 8, 8),)
    result = normalize(model, x)
    assert [layer.name for layer in BACKEND.layers(result)] == ["c"]
    np.testing.assert_array_equal(result.run(x)[0], model.run(x)[0])
