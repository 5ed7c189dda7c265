"""Small ONNX networks with random weights, written by hand."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from penjing.backends.onnx import OnnxModel
from penjing.core.task import Task


class Net:
    """Writes a graph node by node; every method returns the name of its output."""

    def __init__(self, shape, seed=0):
        self.rng = np.random.default_rng(seed)
        self.nodes, self.arrays, self.shape = [], {}, shape

    def randn(self, *shape):
        return self.rng.standard_normal(shape).astype(np.float32)

    def node(self, kind, *inputs, **attributes):
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def constant(self, name, array):
        self.arrays[name] = np.asarray(array)
        return name

    def conv(self, x, name, shape, bias=True, **attributes):
        fan = np.prod(shape[1:])
        names = [self.constant(f"{name}.weight", self.randn(*shape) * np.float32(1.6 / np.sqrt(fan)))]
        if bias:
            names.append(self.constant(f"{name}.bias", self.randn(shape[0]) * np.float32(0.1)))
        attributes.setdefault("pads", [(k - 1) // 2 for k in shape[2:]] * 2)
        return self.node("Conv", x, *names, **attributes)

    def linear(self, x, name, out, given):
        weight = self.constant(f"{name}.weight", self.randn(out, given) / np.float32(np.sqrt(given)))
        return self.node("Gemm", x, weight, self.constant(f"{name}.bias", self.randn(out)), transB=1)

    def relu6(self, x):
        low, high = self.constant("low", np.float32(0)), self.constant("high", np.float32(6))
        return self.node("Clip", x, low, high)

    def model(self, *outputs, kind=TensorProto.FLOAT):
        constants = [numpy_helper.from_array(array, name) for name, array in self.arrays.items()]
        given = [helper.make_tensor_value_info("x", kind, ["n", *self.shape])]
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", given, made, constants)
        opsets = [helper.make_opsetid("", 18)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return OnnxModel(onnx.shape_inference.infer_shapes(model))


def images(n, shape, seed=1):
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


@pytest.fixture
def net():
    return Net


@pytest.fixture
def task_of():
    def make(x):
        y = np.zeros(len(x), np.int64)
        return Task(train=(x, y), valid=(x[:8], y[:8]), test=(x[8:16], y[8:16]), max_overlap=1).prepare()

    return make


@pytest.fixture
def resnet():
    """Residual adds, a padded shortcut, concatenation, pooling, a classifier; [3, 16, 16] to 10."""
    net = Net((3, 16, 16))
    stem = net.node("Relu", net.conv("x", "stem", (8, 3, 3, 3)))
    a = net.node("Relu", net.conv(stem, "block1.conv1", (8, 8, 3, 3)))
    a = net.node("Relu", net.node("Add", net.conv(a, "block1.conv2", (8, 8, 3, 3)), stem))
    b = net.node("Relu", net.conv(a, "block2.conv1", (16, 8, 3, 3), strides=[2, 2]))
    b = net.conv(b, "block2.conv2", (16, 16, 3, 3))
    numbers = {"start": [0, 0], "end": [99, 99], "axes": [2, 3], "step": [2, 2], "pad": [0, 4, 0, 0] * 2}
    axes = [net.constant(name, np.array(values)) for name, values in numbers.items()]
    short = net.node("Pad", net.node("Slice", a, *axes[:4]), axes[4])
    b = net.node("Relu", net.node("Add", b, short))
    c = net.node("Concat", b, net.node("Relu", net.conv(b, "side", (8, 16, 1, 1), bias=False)), axis=1)
    c = net.node("MaxPool", c, kernel_shape=[2, 2], strides=[2, 2])
    c = net.node("Relu", net.conv(c, "last", (32, 24, 3, 3)))
    flat = net.node("Flatten", net.node("GlobalAveragePool", c))
    return net.model(net.linear(flat, "fc", 10, 32)), images(128, (3, 16, 16))


@pytest.fixture
def mobilenet():
    """Depthwise and pointwise convolutions with ReLU6, squeeze and excitation; [3, 16, 16] to 10."""
    net = Net((3, 16, 16))
    a = net.relu6(net.conv("x", "stem", (16, 3, 3, 3), strides=[2, 2]))
    a = net.relu6(net.conv(a, "dw", (16, 1, 3, 3), group=16))
    gate = net.node("Relu", net.conv(net.node("GlobalAveragePool", a), "squeeze", (4, 16, 1, 1)))
    gate = net.node("Sigmoid", net.conv(gate, "excite", (16, 4, 1, 1)))
    a = net.conv(net.node("Mul", a, gate), "pw", (24, 16, 1, 1))
    a = net.relu6(net.conv(a, "grouped", (24, 8, 3, 3), group=3))
    flat = net.node("Flatten", net.node("AveragePool", a, kernel_shape=[8, 8]))
    return net.model(net.linear(flat, "fc", 10, 24)), images(128, (3, 16, 16))
