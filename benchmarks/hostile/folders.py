"""Delivered folders with true manifests around hostile contents, and hostile manifests."""

import json
import pickle
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from penjing.core.artefact import deliver
from penjing.core.files import MANIFEST, write_folder
from penjing.core.target import Target

NET = """<?xml version="1.0"?>
<net name="m" version="11"><layers>{layers}</layers><edges>{edges}</edges><rt_info/></net>
"""
Content = dict[str, bytes]


class Bomb:
    """Unpickled, it makes the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def write_artefact(folder: Path, content: Content, runtime: str, facts: Any = None) -> Path:
    """Write files as a folder whose manifest is right about them."""

    def build(made: Path) -> dict[str, Any]:
        for name, data in content.items():
            (made / name).write_bytes(data)
        target = {"runtime": runtime} | ({"mode": "f32"} if runtime == "openvino" else {})
        return {"target": target, "plan": [], "model_files": sorted(content), "runtime": facts or {}}

    write_folder(folder, build)
    return folder


def _port(index: int, kind: str, dims: tuple[int, ...]) -> str:
    inside = "".join(f"<dim>{dim}</dim>" for dim in dims)
    return f'<port id="{index}" precision="{kind}">{inside}</port>'


class Network:
    """Writes the text of an OpenVINO model layer by layer; shapes of outputs may lie."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.edges: list[str] = []
        self.weights = b""
        self.add("Parameter", (), "FP32", (1, 4), 'shape="1,4" element_type="f32"', name="x")

    def constant(self, values: Any, kind: str = "i64") -> int:
        """Add a constant and return its number."""
        array = np.asarray(values, {"i64": np.int64, "f32": np.float32, "boolean": np.bool_}[kind])
        start, self.weights = len(self.weights), self.weights + array.tobytes()
        shape = ",".join(str(size) for size in array.shape)
        data = f'element_type="{kind}" shape="{shape}" offset="{start}" size="{array.nbytes}"'
        precision = {"i64": "I64", "f32": "FP32", "boolean": "BOOL"}[kind]
        return self.add("Const", (), precision, array.shape, data)

    def add(
        self,
        kind: str,
        inputs: tuple[int, ...],
        precision: str,
        dims: tuple[int, ...],
        data: str = "",
        **more: str,
    ) -> int:
        """Add a layer that takes the outputs of others, and return its number."""
        number = len(self.layers)
        for port, source in enumerate(inputs):
            out = self.layers[source].count("<port id", 0, self.layers[source].index("<output>"))
            self.edges.append(
                f'<edge from-layer="{source}" from-port="{out}" to-layer="{number}" to-port="{port}"/>'
            )
        given = "".join(_port(port, "I64", ()) for port in range(len(inputs)))
        self.layers.append(
            f'<layer id="{number}" name="{more.get("name", f"l{number}")}" type="{kind}" '
            f'version="{more.get("version", "opset1")}"><data {data}/>{more.get("inside", "")}'
            f"<input>{given}</input><output>{_port(len(inputs), precision, dims)}</output></layer>"
        )
        return number

    def files(self, last: int) -> Content:
        """Return the files of the model that ends in a layer, added to `x`."""
        axes = self.constant([0, 1, 2][:2])
        total = self.add("ReduceSum", (last, axes), "FP32", (), 'keep_dims="false"')
        out = self.add("Add", (0, total), "FP32", (1, 4), 'auto_broadcast="numpy"')
        self.result(out)
        return self.text()

    def result(self, last: int) -> None:
        """Make a layer's output the model's."""
        self.add("Result", (last,), "FP32", (1, 4))
        self.layers[-1] = self.layers[-1][: self.layers[-1].index("<output>")] + "</layer>"

    def text(self) -> Content:
        """Return both files."""
        text = NET.format(layers="".join(self.layers), edges="".join(self.edges))
        return {"model.xml": text.encode(), "model.bin": self.weights or b"\0"}


def _grown(kind: str, target: list[int], **more: str) -> Content:
    net = Network()
    one = net.constant(np.ones((1, 1)), "f32")
    size = net.constant(target)
    return net.files(net.add(kind, (one, size), "FP32", (1, 1), **more))


def _behind_a_blown_tensor() -> Content:
    """A size that is taken out of a tensor of 4,000,000,000 numbers."""
    net = Network()
    many = net.add("Broadcast", (net.constant([7]), net.constant([4 * 10**9])), "I64", (1,), 'mode="numpy"')
    first = net.add(
        "Slice",
        (many, net.constant([0]), net.constant([2]), net.constant([1])),
        "I64",
        (2,),
        version="opset8",
    )
    one = net.constant(np.ones((1, 1)), "f32")
    return net.files(net.add("Broadcast", (one, first), "FP32", (7, 7), 'mode="numpy"'))


def _range() -> Content:
    net = Network()
    limits = tuple(net.constant(value, "f32") for value in (0.0, 1e10, 1.0))
    many = net.add("Range", limits, "FP32", (1,), 'output_type="f32"', version="opset4")
    shape = net.constant([1, -1])
    return net.files(net.add("Reshape", (many, shape), "FP32", (1, 1), 'special_zero="false"'))


def _random() -> Content:
    net = Network()
    given = net.constant([100_000, 100_000]), net.constant(0.0, "f32"), net.constant(1.0, "f32")
    data = 'output_type="f32" op_seed="0" global_seed="0" alignment="tensorflow"'
    return net.files(net.add("RandomUniform", given, "FP32", (1, 1), data, version="opset8"))


def _loop(trips: int) -> Content:
    net = Network()
    given = net.constant(trips), net.constant(True, "boolean"), 0
    inner = Network()
    inner.layers.clear()
    inner.add("Parameter", (), "FP32", (1, 4), 'shape="1,4" element_type="f32"')
    inner.weights = net.weights
    go = inner.constant(True, "boolean")
    step = inner.add("Add", (0, 0), "FP32", (1, 4), 'auto_broadcast="numpy"')
    inner.result(step)
    inner.result(go)
    net.weights = inner.weights
    body = f"<body><layers>{''.join(inner.layers)}</layers><edges>{''.join(inner.edges)}</edges></body>"
    ports = (
        '<port_map><input external_port_id="2" internal_layer_id="0"/>'
        '<output external_port_id="3" internal_layer_id="3"/>'
        '<output external_port_id="-1" internal_layer_id="4" purpose="execution_condition"/></port_map>'
        '<back_edges><edge from-layer="3" to-layer="0"/></back_edges>'
    )
    out = net.add("Loop", given, "FP32", (1, 4), version="opset5", inside=ports)
    net.layers[out] = net.layers[out].replace("</output></layer>", f"</output>{body}</layer>")
    net.result(out)
    return net.text()


def _entities(declared: str, used: str) -> Content:
    plain = _grown("Broadcast", [1, 1], data='mode="numpy"')
    text = plain["model.xml"].decode().replace("?>", f"?>\n<!DOCTYPE net [{declared}]>", 1)
    return plain | {"model.xml": text.replace('name="m"', f'name="{used}"').encode()}


def _laughs() -> Content:
    levels = ['<!ENTITY a0 "ha">']
    levels += [f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10)]
    return _entities("".join(levels), "&a9;")


def _many_layers() -> Content:
    net = Network()
    net.layers += [f'<layer id="{i}" type="Relu" version="opset1"/>' for i in range(1, 250_001)]
    return net.text()


def _beyond_the_weights() -> Content:
    plain = _grown("Broadcast", [1, 1], data='mode="numpy"')
    text = plain["model.xml"].decode().replace('offset="0"', 'offset="99999999999"', 1)
    return plain | {"model.xml": text.encode()}


OPENVINO: dict[str, Callable[[], Content]] = {
    "Broadcast": lambda: _grown("Broadcast", [100_000, 100_000], data='mode="numpy"'),
    "Tile": lambda: _grown("Tile", [100_000, 100_000]),
    "Range": _range,
    "RandomUniform": _random,
    "a size behind a blown-up tensor": _behind_a_blown_tensor,
    "Loop without an end": lambda: _loop(-1),
    "Loop of 10**12 iterations": lambda: _loop(10**12),
    "entities that unfold": _laughs,
    "an entity that is a file": lambda: _entities('<!ENTITY e SYSTEM "file:///etc/passwd">', "&e;"),
    "250,000 layers": _many_layers,
    "a constant beyond the weights": _beyond_the_weights,
    "a text that is cut off": lambda: {"model.xml": _range()["model.xml"][:500], "model.bin": b"\0"},
}


def _stored_parts(folder: Path) -> tuple[Any, Content]:
    """Return the graph of a small delivered torch model as data, and its files."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deliver(Net().eval(), Target("torch"), folder, example=(np.ones((2, 4), np.float32),))
    names = ("graph.json", "model.safetensors", "recipe.json")
    content = {name: (folder / name).read_bytes() for name in names}
    return json.loads(content["graph.json"]), content


Change = Callable[[dict[str, Any]], None]


def _nodes(*added: dict[str, Any]) -> Change:
    """Put nodes behind the others, the last one added to the output."""

    def change(graph: dict[str, Any]) -> None:
        graph["nodes"] += added
        last = len(graph["nodes"]) - 1
        whole = {"op": "aten.sum.default", "args": [{"node": last}]}
        graph["nodes"] += [whole, {"op": "aten.add.Tensor", "args": [{"node": 0}, {"node": last + 1}]}]
        graph["outputs"] = [{"node": last + 2}]

    return change


def _tower(operator: str, rounds: int) -> Change:
    """Compute an integer of very many digits, and use it as a size."""

    def change(graph: dict[str, Any]) -> None:
        start = len(graph["nodes"])
        graph["nodes"].append({"op": "aten.sym_size.int", "args": [{"input": 0}, 1]})
        for i in range(rounds):
            graph["nodes"].append({"op": operator, "args": [{"node": start + i}, {"node": start + i}]})
        last = len(graph["nodes"]) - 1
        graph["nodes"].append({"op": "aten.mul.Scalar", "args": [{"node": 0}, {"node": last}]})
        graph["outputs"] = [{"node": last + 1}]

    return change


STORED: dict[str, Change] = {
    "an operator of the system": lambda graph: graph["nodes"][0].update(op="os.system"),
    "text that looks like code": lambda graph: graph["nodes"][0].update(
        kwargs={"x); __import__('os').abort(": 1}
    ),
    "pow towers": _tower("operator.pow", 6),
    "squares of squares": _tower("operator.mul", 60),
    "aten.zeros": _nodes({"op": "aten.zeros.default", "args": [[40_000, 40_000]]}),
    "aten.full": _nodes({"op": "aten.full.default", "args": [[40_000, 40_000], 1.0]}),
    "aten.arange": _nodes({"op": "aten.arange.default", "args": [10**9]}),
    "aten.repeat": _nodes({"op": "aten.repeat.default", "args": [{"node": 0}, [20_000, 20_000]]}),
    "aten.eye": _nodes({"op": "aten.eye.default", "args": [40_000]}),
    "aten.expand, made whole": _nodes(
        {"op": "aten.sum.default", "args": [{"node": 0}]},
        {"op": "aten.expand.default", "args": [{"node": 1}, [40_000, 40_000]]},
        {"op": "aten.clone.default", "args": [{"node": 2}]},
    ),
    "a tensor of lies": lambda graph: graph["tensors"]["layer.weight"].update(shape=[10**6, 10**6]),
}


def _safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


_WEIGHT = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}
SAFETENSORS: dict[str, bytes] = {
    "a header of 2**60 bytes": _safetensors({}, length=2**60),
    "a header of brackets": _safetensors(b"[" * 100_000),
    "offsets beyond the file": _safetensors(
        {"layer.weight": _WEIGHT | {"data_offsets": [0, 2**50], "shape": [2**48]}}
    ),
    "a shape that overflows": _safetensors({"layer.weight": _WEIGHT | {"shape": [2**33, 2**33]}}, b"\0" * 48),
    "tensors that overlap": _safetensors({"layer.weight": _WEIGHT, "layer.bias": _WEIGHT}, b"\0" * 48),
    "a pickle": pickle.dumps([1.0] * 100),
}


def _manifest(change: Change) -> Callable[[Path], Path]:
    """Make a whole artefact and change its manifest; the digest is made right again."""

    def make(folder: Path) -> Path:
        from penjing.core.files import _own_digest

        write_artefact(folder, {"model.onnx": b"nothing"}, "onnxruntime")
        content = json.loads((folder / MANIFEST).read_text())
        content.pop("sha256")
        change(content)
        content["sha256"] = _own_digest(content)
        (folder / MANIFEST).write_text(json.dumps(content))
        return folder

    return make


def _entry(name: str) -> Change:
    return lambda content: content["files"].append({"name": name, "sha256": "0" * 64, "bytes": 1})


def _deep(content: dict[str, Any]) -> None:
    inside: Any = 1
    for _ in range(900):
        inside = [inside]
    content["facts"]["runtime"] = inside


def _brackets(folder: Path) -> Path:
    folder.mkdir()
    (folder / MANIFEST).write_bytes(b"[" * 10**6)
    return folder


def _pipe(folder: Path) -> Path:
    import os

    write_artefact(folder, {"model.onnx": b"nothing"}, "onnxruntime")
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    return folder


MANIFESTS: dict[str, Callable[[Path], Path]] = {
    "a file of the system": _manifest(_entry("/etc/passwd")),
    "a file above the folder": _manifest(_entry("../../etc/passwd")),
    "a device": _manifest(_entry("/dev/zero")),
    "100,000 files": _manifest(lambda c: c["files"].extend({**c["files"][0]} for _ in range(100_000))),
    "a deep value": _manifest(_deep),
    "a million brackets": _brackets,
    "a pipe in the place of a file": _pipe,
    "a runtime of the system": _manifest(lambda c: c["facts"]["target"].update(runtime="os")),
    "a billion threads": _manifest(lambda c: c["facts"]["target"].update(threads=10**9)),
}


def _objects(marker: Path) -> bytes:
    import io

    file = io.BytesIO()
    np.savez(file, a=np.array([Bomb(marker)], dtype=object))
    return file.getvalue()


def _zeros() -> bytes:
    import io

    file = io.BytesIO()
    np.savez_compressed(file, a=np.zeros(2**26, np.uint8))
    return file.getvalue()


def made_folders(scratch: Path, marker: Path) -> Iterator[tuple[str, str, Callable[[Path], Path]]]:
    """Yield kind and name of each folder, and what makes it at a path."""
    for name, content in OPENVINO.items():
        yield "OpenVINO", name, lambda path, c=content: write_artefact(path, c(), "openvino")  # type: ignore[misc]
    graph, files = _stored_parts(scratch / "stored")
    for name, change in STORED.items():
        changed = json.loads(json.dumps(graph))
        change(changed)
        whole = files | {"graph.json": json.dumps(changed).encode()}
        yield "torch graph", name, lambda path, c=whole: write_artefact(path, c, "torch")  # type: ignore[misc]
    for name, data in SAFETENSORS.items():
        whole = files | {"model.safetensors": data}
        yield "safetensors", name, lambda path, c=whole: write_artefact(path, c, "torch")  # type: ignore[misc]
    for name, make in MANIFESTS.items():
        yield "manifest", name, make
    for name, data in (("objects", _objects(marker)), ("zeros", _zeros())):
        whole = {"model.onnx": b"\x08", "arrays.npz": data}
        yield ".npz", name, lambda path, c=whole: write_artefact(path, c, "onnxruntime")  # type: ignore[misc]
    code = {"model.onnx": pickle.dumps(Bomb(marker))}
    yield "pickle", "in the place of a model", lambda path: write_artefact(path, code, "onnxruntime")
