"""The NumPy backend: exact against loops, against torch and against ONNX Runtime."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.selection import select
from penjing.backends.numpy import BACKEND, Node, NumpyNet
from penjing.backends.numpy.evaluate import COMPUTE, evaluate
from penjing.backends.numpy.export import WRITE
from penjing.backends.numpy.flow import RULES
from penjing.backends.numpy.net import OPERATORS
from penjing.backends.numpy.statistics import pool_statistics
from penjing.core.backend import Backend, GradientBackend, backend_for
from penjing.core.errors import Refused

seeds = st.integers(0, 2**32 - 1)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def batchnorm(rng, width):
    return {
        "weight": rng.uniform(0.5, 2, width),
        "bias": rng.normal(size=width),
        "running_mean": rng.normal(size=width),
        "running_var": rng.uniform(0.5, 2, width),
    }


class Builder:
    """Draws a random network on images `[n, 3, 8, 8]`, with every operator that couples channels."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.nodes, self.tensors = [], {}
        self.width = {"x": 3}

    def node(self, op, *inputs, width, **attributes):
        name = f"{op}{len(self.nodes)}"
        self.nodes.append(Node(name, op, inputs, attributes))
        self.width[name] = width
        return name

    def conv(self, x, width, kernel=3, groups=1, bias=True):
        name = self.node("conv2d", x, width=width, padding=kernel // 2, groups=groups)
        fan = self.width[x] // groups
        self.tensors[name] = {"weight": normal(self.rng, width, fan, kernel, kernel) / (fan * kernel)}
        if bias:
            self.tensors[name]["bias"] = normal(self.rng, width)
        return name

    def block(self, x):
        width = self.width[x]
        kind = self.rng.choice(["conv", "depthwise", "grouped", "residual", "concat", "normalized", "pooled"])
        if kind == "conv":
            made = self.conv(x, int(self.rng.choice([4, 6, 8])))
            return self.node("relu", made, width=self.width[made])
        if kind == "depthwise":
            return self.conv(x, width * int(self.rng.choice([1, 2])), groups=width)
        if kind == "grouped":
            return self.conv(self.conv(x, 8), 12, groups=4, bias=False)
        if kind == "residual":
            return self.node("add", x, self.conv(self.conv(x, 6), width), width=width)
        if kind == "concat":
            other = self.conv(x, 4, kernel=1)
            return self.node("concat", x, other, width=width + 4)
        if kind == "pooled":
            return self.node("max_pool", x, width=width, kernel=3, stride=1, padding=1)
        name = self.node("batchnorm", x, width=width)
        self.tensors[name] = batchnorm(self.rng, width)
        return name

    def net(self, blocks):
        value = self.conv("x", 8)
        for _ in range(blocks):
            value = self.block(value)
        if self.rng.random() < 0.5:
            value = self.node("global_mean", value, width=self.width[value])
        else:
            value = self.node("avg_pool", value, width=self.width[value], kernel=4, stride=4, padding=1)
            value = self.node("flatten", value, width=4 * self.width[value])
        name = self.node("linear", value, width=5)
        self.tensors[name] = {
            "weight": normal(self.rng, 5, self.width[value]) / 4,
            "bias": normal(self.rng, 5),
        }
        return NumpyNet(("x",), tuple(self.nodes), self.tensors)


def random_net(seed, blocks=4):
    return Builder(seed).net(blocks)


def images(seed, n=3):
    return (normal(np.random.default_rng(seed + 1), n, 3, 8, 8),)


def one(op, x, tensors=None, *more, **attributes):
    names = tuple("xyz"[: 1 + len(more)])
    net = NumpyNet(names, (Node("n", op, names, attributes),), {"n": tensors} if tensors else {})
    return BACKEND.run(net, (x, *more))


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6)


def masked(net, groups, kept):
    """The same net with what removed units give to any weight multiplied by zero."""
    fresh = BACKEND.copy(net)
    for group in groups.groups:
        gone = np.ones(group.size, bool)
        gone[kept.get(group.name, slice(None))] = False
        for slot in (s for s in group.slots if s.role == "in"):
            weight = fresh.tensors[slot.layer][slot.tensor]
            lost = np.where(slot.units >= 0, gone[slot.units], False)
            blocks = len(lost) // weight.shape[1]
            for rows, columns in zip(np.split(weight, blocks), np.split(lost, blocks), strict=True):
                rows[:, columns] = 0
    return fresh


@settings(max_examples=20)
@given(
    seed=seeds,
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    kernel=st.integers(1, 3),
    blocks=st.sampled_from([1, 2, 4]),
)
def test_convolution_equals_its_definition_in_loops(seed, stride, padding, kernel, blocks):
    rng = np.random.default_rng(seed)
    x, weight, bias = normal(rng, 2, 4, 5, 6), normal(rng, 8, 4 // blocks, kernel, kernel), normal(rng, 8)
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    rows, columns = ((size - kernel) // stride + 1 for size in padded.shape[2:])
    expected = np.zeros((2, 8, rows, columns))
    for n, o, h, w in np.ndindex(*expected.shape):
        first = o // (8 // blocks) * (4 // blocks)
        patch = padded[n, first : first + 4 // blocks, h * stride :, w * stride :][:, :kernel, :kernel]
        expected[n, o, h, w] = bias[o] + (patch.astype(float) * weight[o]).sum()
    found = one("conv2d", x, {"weight": weight, "bias": bias}, stride=stride, padding=padding, groups=blocks)
    close(found, expected)
    assert found.dtype == np.float32


def test_small_operators_by_hand():
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4) - 8
    np.testing.assert_array_equal(one("max_pool", x)[0, 0], [[-3, -1], [5, 7]])
    np.testing.assert_array_equal(
        one("max_pool", x, None, stride=3, kernel=3, padding=1)[0, 0], [[-3, -1], [5, 7]]
    )
    np.testing.assert_array_equal(one("avg_pool", x, None, kernel=4, stride=1)[0, 0], [[-0.5]])
    padded = one("avg_pool", x, None, kernel=2, stride=4, padding=1)[0, 0]
    np.testing.assert_array_equal(padded, [[-2, -1.25], [1, 1.75]])
    np.testing.assert_array_equal(one("global_mean", x), [[-0.5]])
    np.testing.assert_array_equal(one("flatten", x), x.reshape(1, 16))
    np.testing.assert_array_equal(one("relu", x), np.maximum(x, 0))
    np.testing.assert_array_equal(one("add", x, None, x), 2 * x)
    np.testing.assert_array_equal(one("concat", x, None, -x)[0], [x[0, 0], -x[0, 0]])
    tensors = {"weight": [2.0], "bias": [1.0], "running_mean": [-0.5], "running_var": [4.0]}
    np.testing.assert_allclose(one("batchnorm", x, tensors, eps=0.0), (x + 0.5) + 1, rtol=1e-6)


def test_every_operator_is_computed_labelled_and_written():
    assert set(OPERATORS) == set(COMPUTE) == set(RULES) == set(WRITE)


@settings(max_examples=12)
@given(seed=seeds)
def test_shrunk_equals_masked(seed):
    net, x = random_net(seed), images(seed)
    groups = BACKEND.groups(net, x)
    rng = np.random.default_rng(seed)
    kept = {g.name: select(rng.random(g.size), rng.uniform(0.2, 0.8), g.blocks, 1) for g in groups.groups}
    kept = dict(list(kept.items())[: rng.integers(1, len(kept) + 1)])
    small = BACKEND.keep(net, groups, kept)
    close(BACKEND.run(small, x), BACKEND.run(masked(net, groups, kept), x))
    for group in BACKEND.groups(small, x).groups:
        assert group.size == len(kept.get(group.name, range(group.size)))
    assert BACKEND.operations(small, x).parameters < BACKEND.operations(net, x).parameters


def test_pruned_twice_equals_pruned_once():
    net, x = random_net(3, blocks=6), images(3)
    groups = BACKEND.groups(net, x)
    first = {g.name: select(np.arange(g.size, dtype=float), 0.25, g.blocks, 1) for g in groups.groups}
    small = BACKEND.keep(net, groups, first)
    again = BACKEND.groups(small, x)
    second = {g.name: select(np.arange(g.size, dtype=float), 0.5, g.blocks, 1) for g in again.groups}
    twice = BACKEND.keep(small, again, second)
    once = BACKEND.keep(net, groups, {name: first[name][second[name]] for name in first})
    assert BACKEND.fingerprint(twice) == BACKEND.fingerprint(once)


def test_torch_computes_the_same_and_finds_the_same_groups(torch_twin):
    for seed in (3, 4, 6):  # between them every kind of block
        net, x = random_net(seed), images(seed)
        twin = torch_twin(net)
        torch_backend = backend_for(twin)
        close(torch_backend.run(twin, x), BACKEND.run(net, x))
        mine, theirs = BACKEND.groups(net, x), torch_backend.groups(twin, x)
        assert mine.frozen.keys() == theirs.frozen.keys()
        assert described(mine) == described(theirs)
        assert BACKEND.operations(net, x) == torch_backend.operations(twin, x)
        kinds = [(layer.name, layer.kind) for layer in BACKEND.layers(net)]
        assert kinds == [(layer.name, layer.kind) for layer in torch_backend.layers(twin)]
        kept = {g.name: select(np.arange(g.size, dtype=float), 0.5, g.blocks, 1) for g in mine.groups}
        close(
            torch_backend.run(torch_backend.keep(twin, theirs, kept), x),
            BACKEND.run(BACKEND.keep(net, mine, kept), x),
        )


def described(groups):
    def slots(group):
        return frozenset((s.layer, s.tensor, s.axis, tuple(s.units), s.role) for s in group.slots)

    return {(g.name, g.layers, tuple(g.blocks), slots(g)) for g in groups.groups}


def test_the_exported_file_computes_the_same_for_any_batch(tmp_path):
    load = pytest.importorskip(
        "penjing.backends.onnx.model", reason="the extra onnx is not installed"
    ).load_onnx
    for seed in range(3):
        net = random_net(seed)
        path = tmp_path / f"{seed}.onnx"
        BACKEND.export(net, images(seed, 1), path)
        model = load(path)
        for n in (1, 4):
            close(model.run(images(seed, n))[0], BACKEND.run(net, images(seed, n)))
        assert {"conv2d0.weight", "conv2d0.bias"} <= {tensor.name for tensor in model.proto.graph.initializer}


def test_pooled_statistics_are_those_of_all_batches_together():
    rng = np.random.default_rng(0)
    tensors = {"conv": {"weight": normal(rng, 4, 3, 1, 1)}, "bn": batchnorm(rng, 4)}
    net = NumpyNet(("x",), (Node("conv", "conv2d", ("x",)), Node("bn", "batchnorm", ("conv",))), tensors)
    batches = [images(seed, n) for seed, n in ((0, 4), (1, 6), (2, 2))]
    before = BACKEND.fingerprint(net)
    found = pool_statistics(net, ["bn"], batches)["bn"]
    rows = np.concatenate([evaluate(net, b)["conv"] for b in batches]).transpose(0, 2, 3, 1).reshape(-1, 4)
    np.testing.assert_allclose(found.mean, rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.variance, rows.var(0, ddof=1), rtol=1e-5)
    assert found.count == 12 * 64
    assert BACKEND.fingerprint(net) == before
    assert pool_statistics(net, [], batches) == {}


def test_observe_yields_inputs_and_outputs_of_layers():
    net = random_net(1)
    layer = BACKEND.layers(net)[0].name
    batches = [(images(0, 2), np.zeros(2)), (images(1, 1), np.zeros(1))]
    seen = list(BACKEND.observe(net, [layer], iter(batches)))
    assert [s[layer][0].shape[0] for s in seen] == [2, 1]
    for (inputs, _), values in zip(batches, seen, strict=True):
        np.testing.assert_array_equal(values[layer][0], inputs[0])
        np.testing.assert_array_equal(values[layer][1], evaluate(net, inputs)[layer])


def test_the_backend_is_found_and_cannot_train():
    assert backend_for(random_net(0)) is BACKEND
    assert isinstance(BACKEND, Backend)
    assert not isinstance(BACKEND, GradientBackend)


def test_a_copy_is_independent_and_a_write_changes_the_fingerprint():
    net = random_net(0)
    copied = BACKEND.copy(net)
    assert BACKEND.fingerprint(copied) == BACKEND.fingerprint(net)
    tensors = BACKEND.read(copied, "conv2d0")
    tensors["weight"] += 1
    assert BACKEND.fingerprint(copied) == BACKEND.fingerprint(net)
    BACKEND.write(copied, "conv2d0", tensors)
    assert BACKEND.fingerprint(copied) != BACKEND.fingerprint(net)
    np.testing.assert_array_equal(BACKEND.read(copied, "conv2d0")["weight"], tensors["weight"])


def test_arrays_given_are_copied():
    weight = np.eye(2)
    net = NumpyNet(("x",), (Node("fc", "linear", ("x",)),), {"fc": {"weight": weight}})
    weight[:] = 7
    np.testing.assert_array_equal(net.tensors["fc"]["weight"], np.eye(2))


RELU = Node("a", "relu", ("x",))
FC = Node("fc", "linear", ("x",))


@pytest.mark.parametrize(
    ("nodes", "tensors", "said"),
    [
        ((), {}, "net must have inputs and nodes"),
        ((Node("a", "gelu", ("x",)),), {}, "a must have a known operator.*gelu"),
        ((RELU, RELU), {}, "names of values must differ.*'a'"),
        ((Node("a", "relu", ("z",)),), {}, "made before.*'z'"),
        ((Node("a", "add", ("x",)),), {}, "needs 2 inputs, as add takes, got 1"),
        ((Node("a", "concat", ("x",)),), {}, "two or more"),
        ((Node("a", "relu", ("x",), {"slope": 1}),), {}, "attributes of relu only.*slope"),
        ((Node("a", "max_pool", ("x",), {"stride": 0}),), {}, "stride must be a whole number of at least 1"),
        ((Node("a", "max_pool", ("x",), {"kernel": 2.5}),), {}, "kernel must be a whole number"),
        ((FC,), {}, "linear must have all its tensors.*weight"),
        ((FC,), {"fc": {"weight": np.eye(2), "scale": np.ones(2)}}, "tensors of linear only.*scale"),
        ((FC,), {"fc": {"weight": np.ones(2)}}, "weight must have 2 axes"),
        (
            (FC,),
            {"fc": {"weight": np.eye(2), "bias": np.ones(3)}},
            "fc.bias must have a row for each of 2 channels",
        ),
        ((RELU,), {"b": {"weight": np.eye(2)}}, "must belong to a node.*'b'"),
    ],
)
def test_nets_that_make_no_sense_are_refused(nodes, tensors, said):
    with pytest.raises(Refused, match=said):
        NumpyNet(("x",), nodes, tensors)


def test_models_that_cannot_be_worked_on_are_refused():
    net = random_net(0)
    with pytest.raises(Refused, match=r"conv2d0 needs inputs of shapes that conv2d takes.*4, 8, 8"):
        BACKEND.check(net, (np.zeros((1, 4, 8, 8)),))
    with pytest.raises(Refused, match="inputs must be 1, as many as the net has, got 2"):
        BACKEND.check(net, (*images(0), *images(0)))
    net.tensors["conv2d0"]["bias"][1] = np.nan
    with pytest.raises(Refused, match=r"weights must be finite.*conv2d0\.bias \(1 of 8\)"):
        BACKEND.check(net, images(0))
    with pytest.raises(Refused, match="needs inputs of shapes that add takes"):
        one("add", np.zeros((1, 2, 3, 3)), None, np.zeros((1, 1, 3, 3)))


def test_writes_and_reads_that_do_not_fit_are_refused():
    net = random_net(0)
    with pytest.raises(Refused, match=r"must name a node of the net, got 'conv2d00'.*'conv2d0'"):
        BACKEND.read(net, "conv2d00")
    with pytest.raises(Refused, match=r"conv2d0\.bias must keep its shape, got \(3,\)"):
        BACKEND.write(net, "conv2d0", {"bias": np.zeros(3)})
    with pytest.raises(Refused, match="finite"):
        BACKEND.write(net, "conv2d0", {"bias": np.full(8, np.inf)})
    with pytest.raises(Refused, match=r"must name a tensor of the layer.*scale"):
        BACKEND.write(net, "conv2d0", {"scale": np.zeros(8)})


def test_units_that_cannot_be_kept_are_refused():
    builder = Builder(0)
    grouped = builder.conv(builder.conv("x", 8), 8, groups=4)
    last = builder.node("linear", builder.node("global_mean", grouped, width=8), width=2)
    builder.tensors[last] = {"weight": np.ones((2, 8))}
    net = NumpyNet(("x",), tuple(builder.nodes), builder.tensors)
    groups = BACKEND.groups(net, images(0))
    name = groups.groups[0].name
    for kept, said in (
        ({"no": [0]}, "must name a group of the net"),
        ({name: []}, "whole numbers, at least one"),
        ({name: [1, 0]}, "sorted"),
        ({name: [0, 99]}, "from 0 to 7"),
        ({name: [0, 1, 2]}, "equally many"),
    ):
        with pytest.raises(Refused, match=said):
            BACKEND.keep(net, groups, {k: np.asarray(v, np.int64) for k, v in kept.items()})
