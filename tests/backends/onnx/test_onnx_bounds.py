"""Memory and work of a model are bounded before a runtime sees it: bombs are refused, models are not."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest
from onnx import TensorProto, helper, numpy_helper

from penjing.backends.onnx import load_onnx
from penjing.backends.onnx.safety.bounds import check_bounds
from penjing.backends.onnx.safety.functions import LARGEST_GRAPH, check_functions
from penjing.backends.onnx.safety.intervals import Interval, evaluate_interval
from penjing.core.artefact import deliver
from penjing.core.errors import Refused
from penjing.core.memory_limit import LARGEST_PEAK, has_memory_limit

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from hostile.onnx_files import FLOAT, INT64, body, model, node


def write(proto, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def loads(proto, tmp_path, **how):
    return load_onnx(write(proto, tmp_path), **how)


X = np.arange(12, dtype=np.float32).reshape(3, 4)


def in_shape_of_x(*nodes, constants=None, out=(FLOAT, 2)):
    """A model whose sizes come from the shape of its input, as exporters write it."""
    return model([node("Shape", "x", "s"), *nodes], constants, out=out)


DYNAMIC = {
    "expand to the input's shape": in_shape_of_x(
        node("Expand", "one s", "e"), node("Add", "x e", "y"), constants={"one": 1.0}
    ),
    "a length times two": in_shape_of_x(
        node("Mul", "s two", "t"),
        node("ConstantOfShape", "t", "z"),
        node("ReduceSum", "z", "r", keepdims=0),
        node("Add", "x r", "y"),
        constants={"two": np.array([2, 2])},
    ),
    "positions": in_shape_of_x(
        node("Gather", "s zero", "n"),
        node("Range", "zero n one", "p"),
        node("Unsqueeze", "p last", "u"),
        node("Cast", "u", "f", to=FLOAT),
        node("Add", "x f", "y"),
        constants={"zero": np.int64(0), "one": np.int64(1), "last": np.array([1])},
    ),
    "a reshape by pieces of the shape": in_shape_of_x(
        node("Slice", "s zero one", "n"),
        node("Concat", "n two two", "t", axis=0),
        node("Reshape", "x t", "r"),
        node("Reshape", "r s", "y"),
        constants={"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])},
    ),
    "what is not zero": model(
        [node("NonZero", "x", "z"), node("Transpose", "z", "t"), node("Cast", "t", "y", to=FLOAT)]
    ),
    "the few that are chosen": model(
        [node("Greater", "x t", "c"), node("Compress", "x c0", "p", axis=0), node("Add", "p p", "y")][1:],
        {"c0": np.array([True, False, True])},
    ),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_sizes_that_come_from_the_inputs_shape_are_no_bomb(name, tmp_path):
    loaded = loads(DYNAMIC[name], tmp_path)
    assert check_bounds(loaded.proto, "here") == ""
    loaded.run((X,))


def loop(trips, nodes, state=("n", 4)):
    inside = body(
        nodes,
        {"i": (INT64, []), "c": (TensorProto.BOOL, []), "a": (FLOAT, state)},
        {"k": (TensorProto.BOOL, []), "b": (FLOAT, state)},
    )
    return model([node("Loop", "m _ x", "y", body=inside)], {"m": np.int64(trips)})


def test_a_loop_with_a_count_and_a_steady_state_runs(tmp_path):
    proto = loop(5, [node("Identity", "c", "k"), node("Add", "a a", "b")])
    np.testing.assert_array_equal(loads(proto, tmp_path).run((X,))[0], 32 * X)


def test_a_loop_that_ends_early_may_have_a_huge_count_if_it_is_trusted(tmp_path):
    stop = [node("ReduceMax", "a", "m0", keepdims=0), node("Less", "m0 far", "k"), node("Add", "a a", "b")]
    proto = loop(2**62, stop)
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(100), "far"))
    with pytest.raises(Refused, match=r"limit on its memory.*no bound on its iterations"):
        loads(proto, tmp_path)
    assert loads(proto, tmp_path, trusted=True).run((X,))[0].max() > 100


def test_a_delivered_model_without_a_bound_is_loaded_where_it_is_trusted(tmp_path):
    import penjing as pj

    stop = [node("ReduceMax", "a", "m0", keepdims=0), node("Less", "m0 far", "k"), node("Add", "a a", "b")]
    proto = loop(2**62, stop)
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(100), "far"))
    deliver(loads(proto, tmp_path, trusted=True), pj.Target(), tmp_path / "artefact", example=(X,))
    with pytest.raises(Refused, match="trusted=True"):
        pj.load(tmp_path / "artefact")
    assert pj.load(tmp_path / "artefact", trusted=True)(X).max() > 100


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**33, resource.RLIM_INFINITY))
from penjing.backends.onnx import load_onnx
from penjing.core.memory_limit import has_memory_limit
assert has_memory_limit()
load_onnx(sys.argv[1])
"""


def test_what_has_no_bound_is_read_where_the_process_has_a_limit(tmp_path):
    grows = [
        node("ReduceSum", "x", "t", keepdims=0),
        node("Range", "zero t one", "r"),
        node("ReduceSum", "r", "s", keepdims=0),
        node("Add", "x s", "y"),
    ]
    path = write(model(grows, {"zero": 0.0, "one": 1.0}), tmp_path)
    if not has_memory_limit():
        with pytest.raises(Refused, match="what Range makes depends on values"):
            load_onnx(path)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_bound_is_never_below_what_operators_make():
    """Every tensor that ONNX's own examples of operators give fits the bound for the shapes they take."""
    from onnx.backend.test.case.node import collect_testcases

    from penjing.backends.onnx.safety.bounds import _Account, _Scope, _walk, bound_of

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    checked = 0
    for case in cases:
        proto = onnx.inliner.inline_local_functions(case.model) if case.model.functions else case.model
        weights = {tensor.name for tensor in proto.graph.initializer}
        given = [value for value in proto.graph.input if value.name not in weights]
        for inputs, outputs in case.data_sets:
            if not all(isinstance(array, np.ndarray) for array in (*inputs, *outputs)):
                continue  # sequences and optional values
            scope = _Scope({}, proto.opset_import, _Account())
            for value, array in zip(given, inputs, strict=True):
                scope.bounds[value.name] = bound_of(value.type.tensor_type.elem_type, array.shape)
            for bound, array in zip(_walk(proto.graph, scope), outputs, strict=True):
                assert bound.count >= array.size, case.name
                checked += math.isfinite(bound.count)
                if bound.shape is not None:
                    assert all(a >= b for a, b in zip(bound.shape, array.shape, strict=True)), case.name
    assert checked > 1500


@pytest.mark.parametrize(
    ("operator", "given", "low", "high"),
    [
        ("Add", [(1, 2), (10, 20)], 11, 22),
        ("Sub", [(1, 2), (10, 20)], -19, -8),
        ("Mul", [(-2, 3), (-5, 7)], -15, 21),
        ("Div", [(10, 20), (2, 5)], 2, 10),
        ("Max", [(1, 5), (3, 4)], 3, 5),
        ("Mod", [(7, 7), (4, 4)], 3, 3),
        ("Mod", [(0, 99), (4, 4)], -4, 4),
        ("Neg", [(1, 2)], -2, -1),
        ("Equal", [(1, 2), (1, 2)], 0, 1),
        ("Equal", [(2, 2), (2, 2)], 1, 1),
    ],
)
def test_ranges_of_integers(operator, given, low, high):
    ranges = [Interval(np.array(float(a)), np.array(float(b))) for a, b in given]
    found = evaluate_interval(helper.make_node(operator, ["a", "b"][: len(given)], ["c"]), ranges, (), 64)
    assert (float(found.low), float(found.high)) == (low, high)


def test_a_division_by_what_may_be_zero_and_an_overflow_are_unknown():
    zero, one = Interval(np.array(-1.0), np.array(1.0)), Interval.of(1.0)
    assert evaluate_interval(helper.make_node("Div", ["a", "b"], ["c"]), [one, zero], (), 64) is None
    wide = Interval.of(float(2**40))
    assert evaluate_interval(helper.make_node("Mul", ["a", "b"], ["c"]), [wide, wide], (), 64) is None


def test_memory_counts_all_that_is_alive_at_once(tmp_path):
    side = math.isqrt(LARGEST_PEAK // 16)  # a quarter of the limit each
    pieces = [node("Expand", "x0 shape", f"p{i}") for i in range(6)]
    total = [node("ReduceSum", "x", "x0", keepdims=0), *pieces]
    together = model(
        [*total, node("Sum", " ".join(f"p{i}" for i in range(6)), "y")], {"shape": np.array([side, side])}
    )
    with pytest.raises(Refused, match="bytes at once"):
        loads(together, tmp_path)
    chain = [node("ReduceSum", "x", "x0", keepdims=0)]
    for i in range(6):
        chain += [node("Expand", f"x{i} shape", f"p{i}"), node("ReduceMax", f"p{i}", f"x{i + 1}", keepdims=0)]
    one_by_one = model([*chain, node("Add", "x x6", "y")], {"shape": np.array([side, side])})
    assert check_bounds(one_by_one, "here") == ""


def test_weights_may_be_large_and_are_no_unfolding(tmp_path):
    weight = np.zeros((4, 2**20), np.int8)
    nodes = [
        node("DequantizeLinear", "w s", "f"),
        node("MatMul", "x f", "h"),
        node("ReduceSum", "h last", "r"),
        node("Add", "x r", "y"),
    ]
    loads(model(nodes, {"w": weight, "s": 1.0, "last": np.array([1])}), tmp_path)


def test_functions_are_counted_as_a_product_in_any_order():
    """The count is that of the expanded graph, and does not depend on the order of the functions."""
    rng = np.random.default_rng(0)
    functions = []
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    for level in range(6):
        callee, domain = (f"f{level + 1}", "f") if level < 5 else ("Relu", "")
        inside = [helper.make_node(callee, ["a"], [f"t{i}"], domain=domain) for i in range(3)]
        functions.append(helper.make_function("f", f"f{level}", ["a"], ["t0"], inside, opsets))
    proto = model(
        [helper.make_node("f0", ["x"], ["y"], domain="f")], functions=rng.permutation(functions).tolist()
    )
    check_functions(proto, "here")
    many = math.ceil(LARGEST_GRAPH / 3**6)
    for i in range(many):
        proto.graph.node.add().CopyFrom(helper.make_node("f0", ["x"], [f"y{i}"], domain="f"))
    with pytest.raises(Refused, match=f"at most {LARGEST_GRAPH} nodes.*got {(many + 1) * 3**6}"):
        check_functions(proto, "here")


def test_two_functions_of_one_name_are_refused():
    opsets = [helper.make_opsetid("", 18)]
    inside = [helper.make_node("Relu", ["a"], ["b"])]
    functions = [helper.make_function("f", "f0", ["a"], ["b"], inside, opsets) for _ in range(2)]
    with pytest.raises(Refused, match="different names"):
        check_functions(model([node("Relu", "x", "y")], functions=functions), "here")
