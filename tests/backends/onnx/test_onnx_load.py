"""What comes from outside: broken, foreign and hostile files."""

import os
import resource

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from penjing.backends.onnx import BACKEND, OnnxModel, load_onnx
from penjing.core.errors import Refused


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def linear_model(opset=18, nodes=None, constants=None, functions=(), domains=()):
    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(3, 4), "fc.weight")
    nodes = nodes or [helper.make_node("Gemm", ["x", "fc.weight"], ["y"], name="fc", transB=1)]
    graph = helper.make_graph(
        nodes, "g", [value("x", ["n", 4])], [value("y", ["n", "m"])], constants or [weight]
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(linear_model().SerializeToString())
    return path


def refuses(proto, tmp_path, match):
    path = tmp_path / "bad.onnx"
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    with pytest.raises(Refused, match=match):
        load_onnx(path)


def test_good_file_loads_and_runs_at_any_batch(good):
    model = load_onnx(good)
    for n in (1, 2, 7):
        x = np.ones((n, 4), np.float32)
        np.testing.assert_allclose(model.run((x,))[0], x @ np.arange(12, dtype=np.float32).reshape(3, 4).T)


def test_truncated_at_every_length_is_refused_and_never_crashes(good, tmp_path):
    data = good.read_bytes()
    for length in range(0, len(data), 7):
        refuses(
            data[:length], tmp_path, "whole ONNX file|not be empty|must hold a graph|checker|operator|opset"
        )


def test_flipped_bytes_are_refused_or_load_as_a_checked_model(good, tmp_path):
    data = good.read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped.onnx"
    for _ in range(150):
        broken = bytearray(data)
        broken[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(broken))
        try:
            load_onnx(path).session  # noqa: B018
        except Refused:
            continue


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + b"\0" * 200, b"\x80\x04cos\nsystem\n", b"<html></html>", b"\0" * 64]
)
def test_foreign_file_is_refused(content, tmp_path):
    refuses(content, tmp_path, "ONNX file|graph")


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "no.onnx", tmp_path):
        with pytest.raises(Refused, match="must be a file"):
            load_onnx(path)


def test_opset_of_the_future_and_of_the_past_is_named(tmp_path):
    refuses(linear_model(opset=9999), tmp_path, "opset must be from 7 to .*9999")
    refuses(linear_model(opset=3), tmp_path, "opset must be from 7")


def test_ir_version_of_the_future_is_named(tmp_path):
    proto = linear_model()
    proto.ir_version = 99
    refuses(proto, tmp_path, "IR version must be at most .*99")


@pytest.mark.parametrize("domain", ["", "my.company"])
def test_unknown_operator_is_named(domain, tmp_path):
    node = helper.make_node("FancyOp", ["x"], ["y"], name="odd", domain=domain)
    refuses(linear_model(nodes=[node], domains=[domain] if domain else []), tmp_path, "'odd'.*got .*FancyOp")


def external(location, tmp_path, length=48, offset=None):
    proto = linear_model()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    facts = {"location": location, "length": str(length)} | (
        {} if offset is None else {"offset": str(offset)}
    )
    for key, text in facts.items():
        tensor.external_data.add(key=key, value=text)
    return proto


def test_external_data_beside_the_model_is_read(tmp_path):
    weight = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    (tmp_path / "weights.bin").write_bytes(weight.tobytes())
    path = tmp_path / "model.onnx"
    path.write_bytes(external("weights.bin", tmp_path).SerializeToString())
    np.testing.assert_array_equal(BACKEND.read(load_onnx(path), "fc")["weight"], weight)


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/passwd", "a/../../secret.bin", "..\\secret.bin", "C:\\secret.bin", ""]
)
def test_external_data_outside_the_folder_is_refused(location, tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"\0" * 48)
    folder = tmp_path / "model"
    folder.mkdir()
    refuses(external(location, tmp_path), folder, "external data must lie in the model's folder")


def test_external_data_through_links_is_refused(tmp_path):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"\0" * 48)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "soft.bin").symlink_to(secret)
    os.link(secret, folder / "hard.bin")
    (folder / "sub").symlink_to(tmp_path)
    refuses(external("soft.bin", tmp_path), folder, "not be a link")
    refuses(external("sub/secret.bin", tmp_path), folder, "not be a link")
    refuses(external("hard.bin", tmp_path), folder, "without hard links")


def test_external_data_missing_or_short_is_named(tmp_path):
    refuses(external("none.bin", tmp_path), tmp_path, "external data must be in the model's folder.*none.bin")
    (tmp_path / "short.bin").write_bytes(b"\0" * 40)
    refuses(external("short.bin", tmp_path), tmp_path, "40 of 48 bytes")
    refuses(external("short.bin", tmp_path, offset=-8), tmp_path, "whole numbers")


def chain_of_functions(depth, closed=False):
    functions = []
    for i in range(depth):
        last = i == depth - 1
        callee = ("f0" if closed else "Relu") if last else f"f{i + 1}"
        node = helper.make_node(callee, ["a"], ["b"], domain="" if callee == "Relu" else "f")
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
        functions.append(helper.make_function("f", f"f{i}", ["a"], ["b"], [node], opsets))
    return linear_model(
        nodes=[helper.make_node("f0", ["x"], ["y"], domain="f")], functions=functions, domains=["f"]
    )


def test_deep_and_circular_functions_are_refused_before_the_runtime_sees_them(tmp_path):
    refuses(chain_of_functions(3000), tmp_path, "nested at most 64 deep")
    refuses(chain_of_functions(3, closed=True), tmp_path, "must not call themselves")


def test_shallow_functions_load(tmp_path):
    path = tmp_path / "f.onnx"
    path.write_bytes(chain_of_functions(5).SerializeToString())
    assert load_onnx(path).run((-np.ones((1, 4), np.float32),))[0].max() == 0


def test_constant_bomb_is_refused_without_the_memory(tmp_path):
    shape = numpy_helper.from_array(np.array([100_000, 100_000]), "shape")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["big"], name="bomb"),
        helper.make_node("ReduceSum", ["big"], ["y"]),
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(linear_model(nodes=nodes, constants=[shape]), tmp_path, "'bomb'")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_inputs_are_checked_by_number_name_type_and_shape(good):
    model = load_onnx(good)
    with pytest.raises(Refused, match="inputs must be 1, as many as the model has, got 0"):
        model.run(())
    with pytest.raises(Refused, match="names that the model declares, got wrong"):
        model.run({"wrong": np.ones((1, 4), np.float32)})
    with pytest.raises(Refused, match="input 'x' must be float32, got int64"):
        model.run((np.ones((1, 4), np.int64),))
    with pytest.raises(Refused, match=r"must run on inputs of shapes \{'x': \(1, 5\)\}"):
        model.run((np.ones((1, 5), np.float32),))
    assert model.run((np.ones((1, 4), np.float64),))[0].dtype == np.float32


def test_nan_weights_are_named_and_an_open_clip_is_not(good):
    model = OnnxModel(load_onnx(good).proto)
    x = (np.ones((1, 4), np.float32),)
    BACKEND.check(model, x)
    weight = BACKEND.read(model, "fc")["weight"]
    weight[1, 2] = np.nan
    BACKEND.write(model, "fc", {"weight": weight})
    with pytest.raises(Refused, match=r"fc.weight \(1 of 12\)"):
        BACKEND.check(model, x)


def test_model_that_the_runtime_rejects_is_a_refusal():
    proto = linear_model(nodes=[helper.make_node("Fancy", ["x"], ["y"])])
    with pytest.raises(Refused, match=r"must load in ONNX Runtime.*Fancy"):
        OnnxModel(proto).session  # noqa: B018


def test_models_survive_pickling_without_their_session(good):
    import pickle

    model = load_onnx(good)
    x = (np.ones((2, 4), np.float32),)
    expected = model.run(x)[0]
    again = pickle.loads(pickle.dumps(model))  # noqa: S301
    np.testing.assert_array_equal(again.run(x)[0], expected)


def test_checked_export_loads_back_equal(good, tmp_path):
    model = load_onnx(good)
    BACKEND.export(model, (np.ones((1, 4), np.float32),), tmp_path / "out.onnx")
    assert BACKEND.fingerprint(load_onnx(tmp_path / "out.onnx")) == BACKEND.fingerprint(model)
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
