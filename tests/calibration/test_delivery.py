"""From a simulation of number formats to a graph on the very codes."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from onnx import numpy_helper  # noqa: E402
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.backends.onnx import BACKEND as ONNX  # noqa: E402
from penjing.backends.torch import BACKEND as TORCH  # noqa: E402
from penjing.backends.torch.quant.stated import layer_formats  # noqa: E402
from penjing.backends.torch.quantizers import quantized_layers  # noqa: E402
from penjing.core.task import Task  # noqa: E402


class Residual(nn.Module):
    """Two layers on one input, an addition, a pooling that hands a grid on, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.left = nn.Conv2d(16, 16, 3, padding=1)
        self.right = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16 * 9, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.left(x) + self.right(x))
        x = torch.max_pool2d(torch.relu(self.last(x)), 2)
        return self.head(x.flatten(1))


class Perceptron(nn.Module):
    """Linear layers only; no block divides the first one's inputs."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(72, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def task_on(x):
    y = np.arange(len(x)) % 5
    return Task(train=(x, y), valid=(x[:16], y[:16]), test=(x[16:], y[16:]), max_overlap=1)


@pytest.fixture
def images():
    return task_on(np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32))


@pytest.fixture
def vectors():
    return task_on(np.random.default_rng(0).standard_normal((96, 72)).astype(np.float32))


@pytest.fixture
def residual():
    torch.manual_seed(0)
    model = Residual().eval()
    model.norm.running_mean.uniform_(-0.5, 0.5)
    return model


def arrays(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.proto.graph.initializer}


def codes_of(simulation, layer):
    """Return codes and scales of a layer's weight, worked out again from its quantizer."""
    module = dict(quantized_layers(simulation))[layer]
    quantizer = module.weight_quantizer
    scale = quantizer.scale.detach().numpy().reshape(-1, *[1] * (module.weight.ndim - 1))
    codes = np.rint(module.weight.detach().numpy() / scale)
    return np.clip(codes, quantizer.format.lowest, quantizer.format.highest), scale.ravel()


def change(applied, layer, method):
    (found,) = [c for c in applied.changes if c.layer == layer and c.method == method]
    return found


@pytest.mark.parametrize("weights", ["int8", "int4", "int3"])
def test_the_graph_has_the_codes_and_grids_of_the_simulation(residual, images, weights):
    step = pj.QuantizeNearest(weights, "uint8", ends=False)
    simulation = pj.apply(residual, step, images).model
    applied = pj.apply(residual, (step, pj.Int8Static()), images)
    stored = arrays(applied.model)
    for layer in ("stem", "left", "right", "last", "head"):
        codes, scales = codes_of(simulation, layer)
        np.testing.assert_array_equal(stored[f"{layer}.weight_quantized"], codes)
        np.testing.assert_allclose(stored[f"{layer}.weight_scale"], scales, rtol=1e-6)
        facts = change(applied, layer, "Int8Static").detail
        quantizer = dict(quantized_layers(simulation))[layer].input_quantizer
        assert facts["input_scale"] == pytest.approx(float(quantizer.scale))
        assert facts["weight_error"] < 1e-6
        assert facts["simulation_error"] < 0.03
    x = images.prepare().test.arrays()[0]
    wanted, found = TORCH.run(simulation, x), ONNX.run(applied.model, x)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < 0.03
    whole = change(applied, "*", "Int8Static").detail
    assert whole["worst_layer"] in ("left", "right", "last", "head")
    assert whole["simulation_error"] == pytest.approx(error, rel=1)


def test_signed_inputs_run_where_no_activation_cuts_them_off(residual, images):
    applied = pj.apply(residual, (pj.QuantizeNearest("int8", "int8", ends=False), pj.Int8Static()), images)
    assert change(applied, "stem", "Int8Static").done
    assert change(applied, "stem", "Int8Static").detail["simulation_error"] < 1e-3
    assert arrays(applied.model)["x_zero_point"] == 128
    for layer in ("left", "right", "last", "head"):
        assert "the activation before it" in change(applied, layer, "Int8Static").reason


def test_layers_that_take_one_tensor_share_its_quantizer(residual, images):
    model = pj.apply(residual, pj.QuantizeNearest("int8", "uint8", ends=False), images).model
    assert model.left.input_quantizer is model.right.input_quantizer
    assert model.left.input_quantizer is not model.last.input_quantizer
    learned = pj.QuantizeReconstruct("int4", "uint8", ends=False, steps=20, examples=64)
    model = pj.apply(residual, learned, images).model
    assert model.left.input_quantizer is model.right.input_quantizer


def test_learned_rounding_is_what_runs(residual, images):
    learn = pj.QuantizeReconstruct("int3", "uint8", ends=False, steps=30, examples=64)
    simulation = pj.apply(residual, learn, images).model
    stored = arrays(pj.apply(residual, (learn, pj.Int8Static()), images).model)
    nearest = arrays(
        pj.apply(residual, (pj.QuantizeNearest("int3", "uint8", ends=False), pj.Int8Static()), images).model
    )
    codes, _ = codes_of(simulation, "left")
    np.testing.assert_array_equal(stored["left.weight_quantized"], codes)
    assert (stored["left.weight_quantized"] != nearest["left.weight_quantized"]).any()


@pytest.mark.parametrize(
    ("weights", "inputs", "reason"),
    [
        ("int4", "uint4", "8-bit inputs on one grid"),
        ("int8", "uint8 token", "8-bit inputs on one grid"),
        ("nf4", "uint8", "signed symmetric integers"),
        ("uint4", "uint8", "signed symmetric integers"),
        ("int4 group 16", "uint8", "a scale for each channel"),
        ("int8", None, "its input stays float"),
    ],
)
def test_formats_without_a_kernel_say_so(residual, images, weights, inputs, reason):
    plan = (pj.QuantizeNearest(weights, inputs, ends=False), pj.Int8Static())
    with pytest.raises(pj.Refused, match=reason):
        pj.apply(residual, plan, images)


def test_a_layer_that_was_left_float_stays_so(residual, images):
    plan = (pj.only("!last", pj.QuantizeNearest("int4", "uint8")), pj.Int8Static())
    applied = pj.apply(residual, plan, images)
    assert "left it float" in change(applied, "last", "Int8Static").reason
    assert change(applied, "head", "Int8Static").done
    assert "last.weight" in arrays(applied.model)


def test_two_grids_on_one_tensor_are_told(residual, images):
    simulation = pj.apply(residual, pj.QuantizeNearest("int8", "uint8", ends=False), images).model
    other = TORCH.copy(simulation)
    other.right.input_quantizer = TORCH.copy(other.right.input_quantizer)
    other.right.input_quantizer.scale.data *= 1.5
    applied = pj.apply(other, pj.Int8Static(), images)
    assert "takes what left takes" in change(applied, "right", "Int8Static").reason
    assert change(applied, "left", "Int8Static").done


@pytest.mark.parametrize(
    "weights", ["int4 group 32", "uint4 group 16", "int3 group 16", "int8", "uint3 group 64"]
)
def test_packed_weights_are_the_codes_of_the_simulation(vectors, weights):
    torch.manual_seed(0)
    model = Perceptron()
    step = pj.QuantizeNearest(weights, None, ends=False)
    simulation = pj.apply(model, step, vectors).model
    applied = pj.apply(model, (step, pj.WeightOnly(compute="float32")), vectors)
    (x,) = vectors.prepare().test.arrays()[0]
    np.testing.assert_allclose(
        ONNX.run(applied.model, (x,)), TORCH.run(simulation, (x,)), rtol=1e-4, atol=1e-5
    )
    assert change(applied, "*", "WeightOnly").detail["simulation_error"] < 1e-5
    bits = 4 if "8" not in weights else 8
    assert change(applied, "up", "WeightOnly").detail["stored_bits"] == bits
    assert (
        arrays(applied.model)["up.weight_packed"].size
        == 64 * -(-72 // (block := change(applied, "up", "WeightOnly").detail["block"])) * block * bits // 8
    )


def test_a_bias_of_its_own_belongs_to_the_layer(vectors):
    """Linear layers on sequences become a product and a sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.Flatten())
    with torch.no_grad():
        model[0].bias.fill_(5)
    task = task_on(np.random.default_rng(0).standard_normal((96, 3, 16)).astype(np.float32))
    for plan in (
        (pj.QuantizeNearest("int4 group 16", None, ends=False), pj.WeightOnly(compute="float32")),
        (pj.QuantizeNearest("int8", "uint8", ends=False), pj.Int8Static()),
    ):
        applied = pj.apply(model, plan, task)
        for layer in ("0", "2"):
            assert change(applied, layer, type(plan[1]).__name__).detail["simulation_error"] < 0.03


def test_what_packed_weights_are_not_for(vectors):
    for step, reason in (
        (pj.QuantizeNearest("int8", "uint8"), "multiply float inputs"),
        (pj.QuantizeNearest("nf4", None, ends=False), "integers of at most 8 bits"),
        (pj.QuantizeNearest("int4 group 24", None, ends=False), "groups of 16"),
    ):
        with pytest.raises(pj.Refused, match=reason):
            pj.apply(Perceptron(), (step, pj.WeightOnly()), vectors)


def test_other_methods_and_delivery_still_refuse_a_simulation(residual, images, tmp_path):
    step = pj.QuantizeNearest("int8", "uint8")
    with pytest.raises(pj.Refused, match="cannot be a simulation of number formats"):
        pj.apply(residual, (step, pj.Int8Dynamic()), images)
    model = pj.apply(residual, step, images).model
    example = images.prepare().test.example()
    with pytest.raises(pj.Refused, match="cannot be a simulation of number formats"):
        pj.deliver(model, pj.Target(), tmp_path / "a", example=example)


def test_formats_hold_what_the_quantizers_say(residual, images):
    model = pj.apply(residual, pj.QuantizeNearest("int8", "uint8 token"), images).model
    found = layer_formats(model)
    assert list(found) == ["stem", "left", "right", "last", "head"]
    assert found["left"].input_parameters is None
    assert found["left"].weights.codes.dtype == np.int8
