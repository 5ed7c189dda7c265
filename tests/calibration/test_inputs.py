"""The order of layers by trial, and moments of what each output is computed from."""

import numpy as np
import pytest

import penjing as pj
from penjing.backends.numpy import BACKEND as NUMPY
from penjing.backends.numpy import Node, NumpyNet
from penjing.calibration import inputs as calibration
from penjing.calibration.inputs import calibration_batches, execution_levels, input_grams, why_not_called
from penjing.core.backend import Layer, Window
from penjing.core.context import Context
from penjing.core.task import Split

RNG = np.random.default_rng(0)


def branches():
    """x → a, b (apart) → sum → c; listed in another order than the data take."""
    nodes = (
        Node("a", "linear", ("x",)),
        Node("b", "linear", ("x",)),
        Node("sum", "add", ("a", "b")),
        Node("c", "linear", ("sum",)),
    )
    return NumpyNet(("x",), nodes, {name: {"weight": RNG.normal(size=(4, 4))} for name in "abc"})


def test_layers_that_do_not_feed_each_other_share_a_pass():
    net, x = branches(), (RNG.normal(size=(2, 4)).astype("float32"),)
    before = NUMPY.fingerprint(net)
    assert execution_levels(NUMPY, net, ["c", "b", "a"], x, 0) == [["b", "a"], ["c"]]
    assert NUMPY.fingerprint(net) == before


def test_a_circle_is_broken_at_its_first_name():
    assert calibration._levels({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == [["a"], ["b", "c"]]


def test_the_order_of_torch_layers_is_that_of_the_data_not_of_the_module():
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    from penjing.backends.torch import BACKEND

    class Backwards(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, 2)
            self.unused = torch.nn.Linear(4, 2)
            self.key, self.query = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
            self.stem = torch.nn.Conv1d(3, 6, 1)

        def forward(self, x):
            y = self.stem(x).mean(2)
            return self.head(torch.tanh(self.key(y) * self.query(y)))

    torch.manual_seed(0)
    model, x = Backwards(), (RNG.normal(size=(2, 3, 5)).astype("float32"),)
    names = ["head", "unused", "key", "query", "stem"]
    reasons = why_not_called(BACKEND, model, names, x)
    assert list(reasons) == ["unused"]
    assert "called as a module" in reasons["unused"]
    assert execution_levels(BACKEND, model, [n for n in names if n not in reasons], x, 0) == [
        ["stem"],
        ["key", "query"],
        ["head"],
    ]


def test_a_layer_called_on_several_shapes_cannot_be_observed():
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    from penjing.backends.torch import BACKEND

    class Pyramid(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Conv1d(3, 2, 1)

        def forward(self, x):
            return self.head(x).mean(2) + self.head(x[:, :, ::2]).mean(2)

    x = (RNG.normal(size=(2, 3, 6)).astype("float32"),)
    assert "inputs of one shape" in why_not_called(BACKEND, Pyramid(), ["head"], x)["head"]


def conv_net(groups):
    node = Node("conv", "conv2d", ("x",), {"padding": 1, "stride": 2, "groups": groups})
    return NumpyNet(("x",), (node,), {"conv": {"weight": RNG.normal(size=(4, 4 // groups, 3, 3))}})


def moments(net, x, limit=None, monkeypatch=None):
    if limit is not None:
        monkeypatch.setattr(calibration, "ROWS", limit)
    (layer,) = NUMPY.layers(net)
    batches = [((x[:3],), np.zeros(3)), ((x[3:],), np.zeros(len(x) - 3))]
    return layer, input_grams(NUMPY, net, [layer], batches, 0)["conv"]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_outputs_have_the_squares_that_the_moments_foretell(groups):
    net, x = conv_net(groups), RNG.normal(size=(5, 4, 7, 7)).astype("float32")
    layer, gram = moments(net, x)
    assert layer.window == Window((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), groups)
    assert gram.total.shape == (groups, 36 // groups, 36 // groups)
    assert gram.rows == 5 * 16
    y = NUMPY.run(net, (x,))
    weight = NUMPY.read(net, "conv")["weight"].reshape(groups, 4 // groups, -1).astype(float)
    foretold = np.einsum("goi,gij,goj->go", weight, gram.mean, weight).ravel()
    np.testing.assert_allclose(foretold, np.square(y).mean((0, 2, 3)), rtol=1e-4)


def test_positions_are_drawn_where_there_are_many(monkeypatch):
    net, x = conv_net(1), RNG.normal(size=(5, 4, 7, 7)).astype("float32")
    _, all_of_them = moments(net, x)
    _, some = moments(net, x, 25, monkeypatch)
    assert some.rows == 25
    _, again = moments(net, x, 25, monkeypatch)
    np.testing.assert_array_equal(some.total, again.total)
    diagonals = [np.trace(gram.mean[0]) for gram in (all_of_them, some)]
    assert diagonals[1] == pytest.approx(diagonals[0], rel=0.3)


def test_inputs_of_linear_layers_on_sequences_are_rows():
    gram = calibration._empty(Layer("l", "linear", {"weight": (2, 4)}))
    x = RNG.normal(size=(3, 5, 4)).astype("float32")
    calibration.add_rows(gram, Layer("l", "linear", {"weight": (2, 4)}), [x], 100, RNG)
    rows = x.reshape(15, 4).astype(float)
    np.testing.assert_allclose(gram.mean[0], rows.T @ rows / 15, rtol=1e-12)


@pytest.mark.parametrize("kind", ["constant", "reflect", "edge", "wrap"])
def test_windows_of_torch_convolutions(kind):
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    from penjing.backends.torch import BACKEND

    mode = {"constant": "zeros", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[kind]
    conv = torch.nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, groups=2, padding_mode=mode, bias=False)
    model = torch.nn.Sequential(conv)
    (layer,) = BACKEND.layers(model)
    assert layer.window == Window((3, 2), (1, 1), ((2, 2), (1, 1)), (2, 2), 2, kind)
    x = RNG.normal(size=(2, 4, 8, 8)).astype("float32")
    gram = input_grams(BACKEND, model, [layer], [((x,), np.zeros(2))], 0)["0"]
    weight = conv.weight.detach().numpy().reshape(2, 3, -1).astype(float)
    foretold = np.einsum("goi,gij,goj->go", weight, gram.mean, weight).ravel()
    np.testing.assert_allclose(foretold, np.square(BACKEND.run(model, (x,))).mean((0, 2, 3)), rtol=1e-4)


def context(x):
    y = np.zeros(len(x), np.int64)
    task = pj.Task(Split((x,), y, "train"), Split((x,), y, "valid"), Split((x,), y, "test"), max_overlap=1)
    return Context(task=task, backend=NUMPY, original=None)


def test_exactly_so_many_examples_are_drawn():
    x = np.arange(10, dtype="float32")[:, None]
    batches = calibration_batches(context(x), 7, 3)
    assert [len(targets) for _, targets in batches] == [3, 3, 1]
    drawn = np.concatenate([inputs[0] for inputs, _ in batches]).ravel()
    assert len(set(drawn)) == 7
    assert sum(len(targets) for _, targets in calibration_batches(context(x), 99, 4)) == 10
    with pytest.raises(pj.Refused, match=r"task\.train must have examples to calibrate on, got 0"):
        calibration_batches(context(x[:0]), 5, 3)


def test_inputs_that_are_not_finite_are_refused():
    net, x = conv_net(1), np.full((5, 4, 7, 7), 1e30, np.float32)
    x[0] = np.inf
    with np.errstate(invalid="ignore"), pytest.raises(pj.Refused, match="finite") as caught:
        moments(net, x)
    assert caught.value.place == "conv"
