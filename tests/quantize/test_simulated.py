"""Rounding to nearest, learned by blocks, and trained, on a small convolutional network."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
datasets = pytest.importorskip("sklearn.datasets", reason="the extra metrics is not installed")

import penjing as pj  # noqa: E402
from penjing.backends.torch import BACKEND  # noqa: E402
from penjing.backends.torch.quantizers import Quantizer, broadcast_scale, quantized_layers, quantizers_of  # noqa: E402
from penjing.core.context import Context  # noqa: E402
from penjing.core.task import Split, Task  # noqa: E402
from penjing.examples import digits  # noqa: E402
from penjing.measurement.quality import accuracy  # noqa: E402

LEARN = {"steps": 60, "examples": 256}


@pytest.fixture(scope="module")
def task():
    data = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x, y = (data.images[order, None] / 16).astype(np.float32), data.target[order]
    bounds = {"train": slice(0, 1000), "valid": slice(1000, 1300), "test": slice(1300, 1797)}
    return Task(**{name: Split((x[part],), y[part], name) for name, part in bounds.items()}).prepare()


@pytest.fixture(scope="module")
def trained(task):
    torch.manual_seed(0)
    return pj.apply(
        digits.Net(16), pj.FineTune(epochs=6, lr=0.1, batch_size=50, schedule="one_cycle"), task
    ).model


def right(model, task):
    inputs, targets = task.test.arrays()
    return accuracy(BACKEND.run(model, inputs), targets)


def after(model, task, *plan):
    return pj.apply(model, plan, task, context=Context(task=task, backend=BACKEND, original=model))


def test_eight_bits_lose_next_to_nothing_and_every_layer_is_reported(trained, task):
    done = after(trained, task, pj.QuantizeNearest("int8", "uint8"))
    assert abs(right(done.model, task) - right(trained, task)) < 0.01
    by_layer = {change.layer: change for change in done.changes}
    convolutions = [x.name for x in BACKEND.layers(trained) if x.kind in ("conv", "depthwise", "linear")]
    assert set(by_layer) == set(convolutions)
    assert all(change.done and change.detail["weights"] == "int8 channel" for change in done.changes)
    assert any("folded" in change.detail for change in done.changes)


def test_weights_are_on_their_grid_and_ends_keep_eight_bits(trained, task):
    done = after(trained, task, pj.QuantizeNearest("int3", "uint3", examples=64))
    layers = dict(quantized_layers(done.model))
    bits = {name: layer.weight_quantizer.format.bits for name, layer in layers.items()}
    assert sorted(bits.values())[-2:] == [8, 8]
    assert set(bits.values()) == {3, 8}
    for layer in layers.values():
        values = layer.weight_quantizer(layer.weight).detach()
        assert (
            max(len(np.unique(row)) for row in values.flatten(1).numpy())
            <= 2**layer.weight_quantizer.format.bits
        )
    every = after(trained, task, pj.QuantizeNearest("int3", "uint3", examples=64, ends=False)).model
    assert {q.format.bits for q in quantizers_of(every)} == {3}


def test_learned_rounding_beats_nearest(trained, task):
    """At 2 bits of weights; every layer's weights are one of the two codes around the float ones."""
    formats = {"weights": "int2", "inputs": "uint4"}
    nearest = after(trained, task, pj.QuantizeNearest(**formats)).model
    learned = after(trained, task, pj.QuantizeReconstruct(**formats, **LEARN))
    assert right(learned.model, task) > right(nearest, task) + 0.02
    errors = [(c.detail["error_before"], c.detail["error_after"]) for c in learned.changes if c.done]
    assert sum(b for b, _ in errors) > sum(a for _, a in errors)
    for (_, a), (_, b) in zip(quantized_layers(nearest), quantized_layers(learned.model), strict=True):
        form, scale = (
            a.weight_quantizer.format,
            broadcast_scale(a.weight_quantizer.scale, a.weight_quantizer.format, a.weight.shape),
        )
        steps, codes = (layer.weight.detach() / scale.detach() for layer in (a, b))
        around = [end(steps).clamp(form.lowest, form.highest) for end in (torch.floor, torch.ceil)]
        assert bool(torch.minimum(*((codes - end).abs() for end in around)).max() < 1e-4)
        torch.testing.assert_close(b.weight_quantizer(b.weight), b.weight, msg="written on the codes")
    again = after(trained, task, pj.QuantizeReconstruct(**formats, **LEARN)).model
    x = task.test.arrays()[0]
    np.testing.assert_array_equal(BACKEND.run(again, x), BACKEND.run(learned.model, x))


def test_training_brings_accuracy_back_and_learns_scales(trained, task):
    plan = (pj.QuantizeNearest("int2", "uint3"), pj.TrainQuantized(epochs=3, lr=0.02, batch_size=50))
    nearest = after(trained, task, plan[0]).model
    found = after(trained, task, *plan).model
    assert right(found, task) > max(right(nearest, task) + 0.02, right(trained, task) - 0.05)
    moved = [
        bool((a.scale != b.scale).any())
        for a, b in zip(quantizers_of(nearest), quantizers_of(found), strict=True)
    ]
    assert all(moved)
    assert not any(q.scale.requires_grad for q in quantizers_of(found))


@pytest.mark.parametrize(
    ("weights", "inputs", "learned"),
    [("ternary", "uint8", True), ("binary", "uint8", True), ("mxfp4", "fp8_e4m3", False)],
)
def test_training_helps_formats_that_are_no_integers(trained, task, weights, inputs, learned):
    plan = (pj.QuantizeNearest(weights, inputs), pj.TrainQuantized(epochs=3, lr=0.02, batch_size=50))
    nearest = after(trained, task, plan[0]).model
    found = after(trained, task, *plan).model
    assert right(found, task) > min(right(nearest, task) + 0.05, right(trained, task) - 0.02)
    formats = {
        q.format.kind: bool((a.scale != q.scale).any())
        for a, q in zip(quantizers_of(nearest), quantizers_of(found), strict=True)
    }
    assert formats[weights] is learned
    assert all(torch.isfinite(q.scale).all() for q in quantizers_of(found))


@pytest.mark.parametrize("kind", ["nf4", "fp8_e5m2", "ternary", "binary"])
def test_the_scale_of_a_table_learns_by_the_slope_of_its_codes(kind):
    """With codes kept, y = code * scale: the slope by the scale is the code, less x / scale inside."""
    torch.manual_seed(0)
    format, x = pj.number_format(f"{kind} channel"), torch.randn(2, 8).double().float()
    quantizer = Quantizer(format, torch.full((2,), 0.4))
    quantizer.learned()
    x.requires_grad_()
    y = quantizer(x)
    y.backward(torch.ones_like(y))
    codes, steps = (y / 0.4).detach(), (x / 0.4).detach()
    end = {"nf4": 1.0, "fp8_e5m2": 57344.0, "ternary": 1.5, "binary": 1.0}[kind]
    inside = steps.abs() <= end
    by_scale = codes if kind == "binary" else torch.where(inside, codes - steps, codes)
    factor = 1 / np.sqrt(8 * max(end, 1))
    torch.testing.assert_close(quantizer.scale.grad, by_scale.sum(1) * factor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, inside.float())


def test_what_cannot_be_done_is_refused(trained, task):
    for wrong in (
        {"weights": "int1"},
        {"weights": "int8 token"},
        {"inputs": "uint8 channel"},
        {"inputs": "uint99"},
    ):
        with pytest.raises(pj.Refused):
            pj.QuantizeNearest(**wrong)
    twice = pj.QuantizeNearest("int8"), pj.QuantizeNearest("int8")
    with pytest.raises(pj.Refused, match=r"needs a model in float, got one whose layer stem\.0 is quantized"):
        after(trained, task, *twice)
    with pytest.raises(pj.Refused, match="TrainQuantized needs a quantized model"):
        after(trained, task, pj.TrainQuantized(epochs=1))
    few = Task(train=task.train.take(np.arange(31), "train"), valid=task.valid, test=task.test)
    with pytest.raises(pj.Refused, match="must have at least 32 examples"):
        after(trained, few, pj.QuantizeReconstruct())


def test_mixed_bits_keep_the_size_and_beat_one_format_of_it(trained, task):
    """At the stored bits of 3-bit weights with the ends at 8; the report says what each layer got and why."""
    formats = {"inputs": "uint8", "examples": 64}
    uniform = after(trained, task, pj.QuantizeNearest("int3", **formats)).model
    sizes = {name: layer.weight.numel() for name, layer in quantized_layers(uniform)}

    def stored(model):
        each = {
            n: q.weight_quantizer.format.bits_per_value(q.weight.shape) for n, q in quantized_layers(model)
        }
        return sum(each[name] * sizes[name] for name in sizes) / sum(sizes.values())

    bits = stored(uniform)
    mixed = pj.MixedBits(bits, options=("int2", "int3", "int4", "int8"), examples=512)
    done = after(trained, task, pj.QuantizeNearest(mixed=mixed, **formats, ends=False))
    assert stored(done.model) <= bits
    assert right(done.model, task) > right(uniform, task)
    found = [change.detail for change in done.changes if change.done]
    assert len({detail["weights"] for detail in found}) > 1
    assert sum(detail["share_of_bits"] for detail in found) == pytest.approx(1)
    assert all(detail["expected_loss"] > 0 for detail in found)
    mean = sum(d["bits_per_weight"] * sizes[c.layer] for c, d in zip(done.changes, found, strict=True))
    assert mean / sum(sizes.values()) == pytest.approx(stored(done.model))
    learned = after(trained, task, pj.QuantizeReconstruct(mixed=mixed, inputs="uint8", ends=False, **LEARN))
    assert right(learned.model, task) > right(done.model, task) - 0.02


def test_formats_by_layer_hold_as_they_are(trained, task):
    names = [name for name, _ in quantized_layers(after(trained, task, pj.QuantizeNearest()).model)]
    by_layer = {names[0]: "int3", names[1]: ("int5 group 8", "uint4"), "*": "int6"}
    method = pj.QuantizeNearest("int4", "uint7", examples=64, by_layer=by_layer)
    layers = dict(quantized_layers(after(trained, task, method).model))
    found = [[str(layers[n].weight_quantizer.format), str(layers[n].input_quantizer.format)] for n in names]
    assert found[:2] == [["int3 channel", "uint7"], ["int5 group 8", "uint4"]]
    assert found[2:] == [["int6 channel", "uint7"]] * len(names[2:])


def test_what_mixed_bits_cannot_be_is_refused(trained, task):
    with pytest.raises(pj.Refused, match="the smallest options take"):
        after(trained, task, pj.QuantizeNearest(mixed=pj.MixedBits(1.5), examples=64))
    with pytest.raises(pj.Refused, match="must match a layer that is rounded"):
        after(trained, task, pj.QuantizeNearest(by_layer={"nothing.*": "int4"}))
    with pytest.raises(pj.Refused, match="weights and mixed cannot both"):
        pj.QuantizeNearest("int4", mixed=pj.MixedBits(4))
    for wrong in (
        {"bits": 0},
        {"bits": 4, "options": ("int4",)},
        {"bits": 4, "options": ("int4", "int4")},
        {"bits": 4, "options": "int4"},
        {"bits": 4, "options": ("int4", "int8 token")},
        {"bits": 4, "option": ()},
    ):
        with pytest.raises(pj.Refused):
            pj.MixedBits(**wrong)


def test_blocks_that_take_arguments_by_name_are_learned_in_parts():
    """As the layers of the transformers library do."""

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, x, scale=None):
            return x + self.b(torch.relu(self.a(x))) * scale

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Inner(), torch.nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.inner(x, scale=0.5))

    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    y = np.arange(64) % 3
    small = Task(train=(x, y), valid=(x[:20], y[:20]), test=(x[20:40], y[20:40]), max_overlap=1)
    learn = pj.QuantizeReconstruct("int4", "uint8", ends=False, steps=20, examples=64)
    done = pj.apply(Outer(), learn, small)
    assert {c.layer: c.detail["block"] for c in done.changes} == {
        "inner.a": "inner.a",
        "inner.b": "inner.b",
        "head": "head",
    }
