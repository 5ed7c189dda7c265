"""ONNX files that ask for memory or time without end, or for data that are not theirs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

OPSET = 21
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
HUGE = 100_000


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """Return a node; tensors are separated by blanks, `_` is one that is left out."""
    names = ["" if name == "_" else name for name in inputs.split()]
    return helper.make_node(kind, names, outputs.split(), name=f"{outputs.split()[0]}_node", **attributes)


def model(
    nodes: list[NodeProto],
    constants: dict[str, Any] | None = None,
    functions: Any = (),
    out: tuple[int, int] = (FLOAT, 2),
    **fields: Any,
) -> ModelProto:
    """Return a model from `x` [n, 4] to `y` of a type and rank, with constants of int64 or float32."""
    tensors = [
        numpy_helper.from_array(np.asarray(value, np.float32 if isinstance(value, float) else None), name)
        for name, value in (constants or {}).items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", out[0], [None] * out[1])],
        tensors,
        **fields,
    )
    domains = sorted({entry.domain for entry in functions})
    opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)]
    made = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    return made


def body(nodes: list[NodeProto], inputs: dict[str, Any], outputs: dict[str, Any]) -> GraphProto:
    """Return a graph for the inside of a node, its values given as (type, shape)."""
    given, made = (
        [helper.make_tensor_value_info(name, *kind) for name, kind in values.items()]
        for values in (inputs, outputs)
    )
    return helper.make_graph(nodes, "body", given, made)


def _added(*nodes: NodeProto) -> list[NodeProto]:
    """Return nodes that make `big`, with its sum added to `x`."""
    return [*nodes, node("ReduceSum", "big", "sum", keepdims=0), node("Add", "x sum", "y")]


def _calls(depth: int, each: int) -> ModelProto:
    functions = []
    for level in range(depth):
        callee = f"f{level + 1}" if level < depth - 1 else "Relu"
        domain = "" if callee == "Relu" else "f"
        nodes = [
            helper.make_node(callee, ["a" if i == 0 else f"t{i}"], [f"t{i + 1}"], domain=domain)
            for i in range(each)
        ]
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("f", 1)]
        functions.append(helper.make_function("f", f"f{level}", ["a"], [f"t{each}"], nodes, opsets))
    return model([helper.make_node("f0", ["x"], ["y"], domain="f")], functions=functions)


def _recursion() -> ModelProto:
    made = _calls(3, 1)
    made.functions[2].node[0].op_type, made.functions[2].node[0].domain = "f0", "f"
    return made


def _filled(*shape_nodes: NodeProto, **constants: Any) -> ModelProto:
    return model(_added(*shape_nodes, node("ConstantOfShape", "shape", "big")), constants)


def _loop(trips: str, keep: str, nodes: list[NodeProto], state: list[Any], **constants: Any) -> ModelProto:
    inside = body(
        nodes,
        {"i": (INT64, []), "c": (BOOL, []), "s": (FLOAT, state)},
        {"k": (BOOL, []), "t": (FLOAT, state)},
    )
    return model([node("Loop", f"{trips} {keep} x", "y", body=inside)], constants)


_STEP = [node("Identity", "c", "k"), node("Add", "s s", "t")]


def _nested() -> ModelProto:
    inner = body(
        [node("Identity", "ci", "ki"), node("Add", "si si", "ti")],
        {"ii": (INT64, []), "ci": (BOOL, []), "si": (FLOAT, None)},
        {"ki": (BOOL, []), "ti": (FLOAT, None)},
    )
    outer = [node("Identity", "c", "k"), node("Loop", "many _ s", "t", body=inner)]
    return _loop("many", "_", outer, ["n", 4], many=np.int64(100_000))


def _scan() -> ModelProto:
    inside = body([node("Expand", "e shape", "o")], {"e": (FLOAT, [])}, {"o": (FLOAT, None)})
    shape = np.array([200_000])
    nodes = [
        node("ConstantOfShape", "rows", "many"),
        node("Scan", "many", "big", body=inside, num_scan_inputs=1),
    ]
    return model(_added(*nodes), {"shape": shape, "rows": np.array([HUGE])})


def _sparse(as_attribute: bool) -> ModelProto:
    values = numpy_helper.from_array(np.ones(1, np.float32), "big")
    indices = numpy_helper.from_array(np.array([[0, 0]]), "indices")
    sparse = helper.make_sparse_tensor(values, indices, [HUGE, HUGE])
    if as_attribute:
        return model(_added(node("Constant", "", "big", sparse_value=sparse)))
    return model(_added(), sparse_initializer=[sparse])


def _doubling(operator: str, first: NodeProto, rounds: int, **attributes: Any) -> ModelProto:
    nodes = [first]
    for i in range(rounds):
        nodes.append(node(operator, f"d{i} d{i}", f"d{i + 1}", **attributes))
    return model([*nodes, node("Shape", f"d{rounds}", "y")], out=(INT64, 1))


def _outer_products() -> ModelProto:
    nodes = [node("Reshape", "x flat", "v0")]
    for i in range(12):
        nodes += [node("Unsqueeze", f"v{i} last", f"a{i}"), node("Unsqueeze", f"v{i} first", f"b{i}")]
        nodes += [node("Mul", f"a{i} b{i}", f"m{i}"), node("Reshape", f"m{i} flat", f"v{i + 1}")]
    constants = {"flat": np.array([-1]), "last": np.array([1]), "first": np.array([0])}
    return model([*nodes, node("ReduceSum", "v12", "y")], constants, out=(FLOAT, 1))


def _products_of_constants() -> ModelProto:
    nodes = [node("ConstantOfShape", "shape", "m0")]
    nodes += [node("MatMul", f"m{i} m{i}", f"m{i + 1}") for i in range(200)]
    nodes += [node("Identity", "m200", "big")]
    return model(_added(*nodes), {"shape": np.array([8192, 8192])})


def _many_pieces() -> ModelProto:
    nodes = [node("ConstantOfShape", "shape", f"p{i}") for i in range(200)]
    nodes += [node("Concat", " ".join(f"p{i}" for i in range(200)), "big", axis=0)]
    return model(_added(*nodes), {"shape": np.array([5_000, 5_000])})


def _wrapped_size() -> ModelProto:
    """A size that overflows 64 bits to something large: (2**32 + 1)**2 is 2**33 + 1."""
    nodes = [node("Mul", "a a", "shape"), node("ConstantOfShape", "shape", "big")]
    return model(_added(*nodes), {"a": np.array([2**32 + 1])})


def _external(location: str, folder: Path, attribute: bool = False, length: int = 16) -> ModelProto:
    tensor = TensorProto(data_type=FLOAT, name="w", data_location=TensorProto.EXTERNAL)
    tensor.dims.extend([4])
    for key, text in (("location", location), ("length", str(length))):
        tensor.external_data.add(key=key, value=text)
    if attribute:
        indices = numpy_helper.from_array(np.array([0]), "i")
        sparse = helper.make_sparse_tensor(tensor, indices, [4])
        inside = node("Identity", "x", "y")
        inside.attribute.append(onnx.AttributeProto(name="s", type=onnx.AttributeProto.SPARSE_TENSORS))
        inside.attribute[-1].sparse_tensors.append(sparse)
        return model([inside])
    made = model([node("Add", "x w", "y")])
    made.graph.initializer.append(tensor)
    return made


def _through_a_link(folder: Path) -> ModelProto:
    (folder / "weights.bin").symlink_to("/etc/passwd")
    return _external("weights.bin", folder)


def _training() -> ModelProto:
    made = model([node("Relu", "x", "y")])
    made.training_info.add().algorithm.CopyFrom(_filled(shape=np.array([HUGE, HUGE])).graph)
    return made


def _hidden_in_branches() -> ModelProto:
    grown = [node("ConstantOfShape", "shape", "big"), node("ReduceSum", "big", "r", keepdims=0)]
    small = [node("ReduceSum", "x", "r", keepdims=0)]
    out = {"r": (FLOAT, [])}
    branches = {"then_branch": body(grown, {}, out), "else_branch": body(small, {}, out)}
    nodes = [node("ReduceSum", "x", "s", keepdims=0), node("Cast", "s", "c", to=BOOL)]
    constants = {"shape": np.array([HUGE, HUGE])}
    return model([*nodes, node("If", "c", "y", **branches)], constants, out=(FLOAT, 0))


def _deep_graphs() -> ModelProto:
    inside = body([node("Identity", "x", "r")], {}, {"r": (FLOAT, None)})
    for _ in range(60):
        branches = {"then_branch": inside, "else_branch": inside}
        inside = body([node("If", "c", "r", **branches)], {}, {"r": (FLOAT, None)})
        if inside.ByteSize() > 2**17:
            break
    constants = {"c": np.bool_(True)}
    return model([node("If", "c", "y", then_branch=inside, else_branch=inside)], constants)


def _lying_weight() -> ModelProto:
    made = model([node("Add", "x w", "y")], {"w": np.ones(4, np.float32)})
    made.graph.initializer[0].dims[:] = [2**31, 2**31]
    return made


_SHAPE = np.array([HUGE, HUGE])


def made_onnx() -> Iterator[tuple[str, Callable[[Path], ModelProto]]]:
    """Yield the name of each file, and what makes its model in a folder."""
    plain: dict[str, Callable[[], ModelProto]] = {
        "functions that double, 40 deep": lambda: _calls(40, 2),
        "functions that multiply by 10, 12 deep": lambda: _calls(12, 10),
        "functions 3000 deep": lambda: _calls(3000, 1),
        "functions that call themselves": _recursion,
        "ConstantOfShape": lambda: _filled(shape=_SHAPE),
        "ConstantOfShape behind Concat": lambda: _filled(
            node("Concat", "a a", "shape", axis=0), a=np.array([HUGE])
        ),
        "ConstantOfShape behind Identity": lambda: _filled(node("Identity", "a", "shape"), a=_SHAPE),
        "ConstantOfShape of value_ints": lambda: _filled(
            node("Constant", "", "shape", value_ints=[HUGE, HUGE])
        ),
        "ConstantOfShape behind Mul": lambda: _filled(node("Mul", "a a", "shape"), a=np.array([HUGE])),
        "ConstantOfShape behind Cast": lambda: _filled(
            node("Cast", "a", "shape", to=INT64), a=np.array([1e10], np.float32)
        ),
        "ConstantOfShape behind Gather": lambda: _filled(
            node("Gather", "a i", "shape"), a=np.array([1, HUGE]), i=np.array([1, 1])
        ),
        "ConstantOfShape behind Slice": lambda: _filled(
            node("Slice", "a s e", "shape"), a=np.array([1, HUGE, HUGE]), s=np.array([1]), e=np.array([3])
        ),
        "ConstantOfShape that wraps around": _wrapped_size,
        "ConstantOfShape in a branch": _hidden_in_branches,
        "ConstantOfShape 200 times": _many_pieces,
        "a size that is read from the input": lambda: model(
            _added(
                node("ReduceSum", "x", "total"),
                node("Reshape", "total one", "flat"),
                node("Cast", "flat", "shape", to=INT64),
                node("ConstantOfShape", "shape", "big"),
            ),
            {"one": np.array([1])},
        ),
        "Expand": lambda: model(_added(node("Expand", "a shape", "big")), {"a": 1.0, "shape": _SHAPE}),
        "Expand of the input": lambda: model(
            _added(node("ReduceSum", "x", "s"), node("Expand", "s shape", "big")), {"shape": _SHAPE}
        ),
        "Tile": lambda: model(_added(node("Tile", "x times", "big")), {"times": np.array([HUGE, HUGE])}),
        "Range": lambda: model(_added(node("Range", "a b c", "big")), {"a": 0.0, "b": 1e10, "c": 1.0}),
        "Range up to the input": lambda: model(
            _added(node("ReduceSum", "x", "b", keepdims=0), node("Range", "a b c", "big")),
            {"a": 0.0, "c": 1e-9},
        ),
        "RandomNormal": lambda: model(_added(node("RandomNormal", "", "big", shape=[HUGE, HUGE]))),
        "RandomUniform in pieces": lambda: model(
            _added(
                *(node("RandomUniform", "", f"r{i}", shape=[20_000, 20_000]) for i in range(8)),
                node("Sum", " ".join(f"r{i}" for i in range(8)), "big"),
            )
        ),
        "OneHot": lambda: model(
            _added(node("OneHot", "i d v", "h"), node("Cast", "h", "big", to=FLOAT)),
            {"i": np.arange(1000), "d": np.int64(10**9), "v": np.array([0, 1])},
        ),
        "Pad": lambda: model(_added(node("Pad", "x p", "big")), {"p": np.array([HUGE, HUGE, HUGE, HUGE])}),
        "Resize": lambda: model(
            _added(node("Reshape", "x s", "i"), node("Resize", "i _ k", "big")),
            {"s": np.array([-1, 1, 2, 2]), "k": np.array([1, 1, HUGE, HUGE], np.float32)},
        ),
        "EyeLike of a huge tensor": lambda: model(
            _added(node("ConstantOfShape", "shape", "z"), node("EyeLike", "z", "big")), {"shape": _SHAPE}
        ),
        "Loop of 10**12 iterations": lambda: _loop("m", "_", _STEP, ["n", 4], m=np.int64(10**12)),
        "Loop without an end": lambda: _loop("_", "on", _STEP, ["n", 4], on=np.bool_(True)),
        "Loop until the input says so": lambda: _loop(
            "_",
            "on",
            [
                node("ReduceMin", "s", "least", keepdims=0),
                node("Less", "least far", "k"),
                node("Identity", "s", "t"),
            ],
            ["n", 4],
            on=np.bool_(True),
            far=1e30,
        ),
        "Loop whose state doubles": lambda: _loop(
            "m",
            "_",
            [node("Identity", "c", "k"), node("Concat", "s s", "t", axis=0)],
            [None, 4],
            m=np.int64(60),
        ),
        "Loop in a Loop": _nested,
        "Scan": _scan,
        "a sparse weight": lambda: _sparse(as_attribute=False),
        "a sparse Constant": lambda: _sparse(as_attribute=True),
        "Concat that doubles 40 times": lambda: _doubling("Concat", node("Identity", "x", "d0"), 40, axis=0),
        "StringConcat that doubles 40 times": lambda: _doubling(
            "StringConcat", node("Constant", "", "d0", value_strings=["word"]), 40
        ),
        "outer products": _outer_products,
        "Einsum of many letters": lambda: model(
            [node("Einsum", " ".join(["x"] * 13), "big", equation=_letters(13)), *_added()],
        ),
        "products of constants": _products_of_constants,
        "AveragePool of a huge window": lambda: model(
            [
                node("Reshape", "x s", "i"),
                node("AveragePool", "i", "y", kernel_shape=[30_000] * 2, pads=[29_999] * 4),
            ],
            {"s": np.array([-1, 1, 2, 2])},
            out=(FLOAT, 4),
        ),
        "a weight of other dimensions than it has": _lying_weight,
        "graphs in graphs": _deep_graphs,
        "an unknown operator": lambda: model([node("Fancy", "x", "y")]),
        "graphs for training": _training,
    }
    for name, make in plain.items():
        yield name, lambda folder, make=make: make()  # type: ignore[misc]
    yield "external data of the system", lambda folder: _external("/etc/passwd", folder)
    yield "external data above the folder", lambda folder: _external("../../etc/passwd", folder)
    yield "external data through a link", _through_a_link
    yield "external data in an attribute", lambda folder: _external("/etc/passwd", folder, attribute=True)
    yield "external data without a file", lambda folder: _external("none.bin", folder)


def _letters(operands: int) -> str:
    """Return the equation of an outer product of matrices."""
    terms = [chr(97 + 2 * i) + chr(98 + 2 * i) for i in range(operands)]
    return f"{','.join(terms)}->{''.join(terms)}"
