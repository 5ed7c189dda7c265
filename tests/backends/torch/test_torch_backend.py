"""The rest of the torch backend: reading, observing, gradients, checks, counts, files."""

import threading
import types
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from penjing import Refused
from penjing.backends.torch import BACKEND, Selected, select_output
from penjing.core.backend import GradientBackend, backend_for
from penjing.core.task import Split


def test_protocol_and_lookup(shortcut):
    assert isinstance(BACKEND, GradientBackend)
    assert backend_for(shortcut) is BACKEND


def test_layers_read_and_write_keep_ties_and_types(shortcut):
    kinds = {layer.name: layer.kind for layer in BACKEND.layers(shortcut)}
    assert kinds["stem.0"] == "conv"
    assert kinds["stem.1"] == "batchnorm"
    assert kinds["head"] == "linear"
    assert "drop" not in kinds
    tensors = BACKEND.read(shortcut, "stem.1")
    assert set(tensors) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    tensors["weight"][:] = 7
    assert not (BACKEND.read(shortcut, "stem.1")["weight"] == 7).any(), "reading copies"
    parameter = shortcut.stem[1].weight
    BACKEND.write(shortcut, "stem.1", {"weight": tensors["weight"]})
    assert shortcut.stem[1].weight is parameter
    assert (parameter == 7).all()
    half = nn.Linear(2, 2).bfloat16()
    BACKEND.write(half, "", {"weight": np.full((2, 2), 1.5, "float32")})
    assert half.weight.dtype == torch.bfloat16
    assert BACKEND.read(half, "")["weight"].tolist() == [[1.5, 1.5], [1.5, 1.5]]


@pytest.mark.parametrize(
    ("layer", "tensors", "message"),
    [
        ("steam.0", {}, "Did you mean 'stem.0'"),
        ("stem.0", {"wait": np.ones(1)}, "Did you mean 'weight'"),
        ("stem.0", {"weight": np.ones(3)}, r"stem\.0\.weight must keep its shape"),
        ("head", {"bias": np.array([0, 1, np.nan, 2.0])}, "finite"),
    ],
)
def test_bad_writes_are_refused(shortcut, layer, tensors, message):
    with pytest.raises(Refused, match=message):
        BACKEND.write(shortcut, layer, tensors)


def test_run_and_observe_in_evaluation_mode_and_modes_come_back(shortcut, images):
    shortcut.train()
    shortcut.one.eval()
    statistics = shortcut.stem[1].running_mean.clone()
    assert np.array_equal(BACKEND.run(shortcut, images), BACKEND.run(shortcut, images))
    [seen] = BACKEND.observe(shortcut, ["stem.0", "head"], iter([(images, np.zeros(2))]))
    assert np.array_equal(seen["stem.0"][0], images[0])
    assert np.allclose(seen["head"][1], BACKEND.run(shortcut, images))
    assert shortcut.training
    assert not shortcut.one.training
    assert torch.equal(shortcut.stem[1].running_mean, statistics)
    assert not shortcut.head._forward_hooks


def test_gradients_match_finite_differences_and_leave_no_trace(shortcut, images):
    shortcut.head.weight.requires_grad_(False)
    targets = np.array([1, 3])
    [gradient] = BACKEND.gradients(shortcut, Split(images, targets, "train"), "cross_entropy", 5, 2, 0)
    assert shortcut.head.weight.grad is None
    assert not shortcut.head.weight.requires_grad
    double, step = BACKEND.copy(shortcut).double(), 1e-6

    def loss(shift):
        with torch.no_grad():
            double.head.weight[1, 2] += shift
            return float(
                nn.functional.cross_entropy(
                    double.eval()(torch.from_numpy(images[0]).double()), torch.from_numpy(targets)
                )
            )

    up, down = loss(step), loss(-2 * step)
    slope = (up - down) / (2 * step)
    assert gradient["head"]["weight"][1, 2] == pytest.approx(slope, rel=1e-3)
    assert gradient["stem.0"]["weight"].shape == shortcut.stem[0].weight.shape


def test_unknown_loss_is_refused(shortcut, images):
    with pytest.raises(Refused, match="must be a known loss or a function"):
        next(BACKEND.gradients(shortcut, Split(images, np.zeros(2, int), "train"), "hinge", 1, 2, 0))


def broken(change):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 2))
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (broken(lambda m: m[0].weight.data[0, :2].fill_(float("nan"))), r"finite.*0\.weight \(2\)"),
        (broken(lambda m: m[1].running_var.fill_(float("inf"))), r"1\.running_var \(4\)"),
        (broken(lambda m: m.to("meta")), "meta device"),
        (
            broken(lambda m: m[3].register_buffer("z", torch.zeros(2, dtype=torch.complex64))),
            r"complex.*3\.z",
        ),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), r"initialized.*1\.weight"),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), "must run on an example"),
        (nn.LSTM(8, 2, batch_first=True), "must run on an example|must select a tensor among the outputs"),
    ],
)
def test_check_refuses_what_cannot_be_worked_on(model, message, images):
    with pytest.raises(Refused, match=message):
        BACKEND.check(model, images)


def test_check_passes_good_models_and_leaves_the_mode(shortcut, images):
    shortcut.train()
    BACKEND.check(shortcut, images)
    BACKEND.check(nn.Identity(), images)
    assert shortcut.training


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].cache = model[0](torch.ones(1, 2))
    with pytest.raises(Refused, match=r"0\.cache: .*deepcopy.*Remove locks and hooks, and detach"):
        BACKEND.copy(model)
    model = nn.Sequential(nn.Linear(2, 2))
    model.lock = threading.Lock()
    with pytest.raises(Refused, match=r"^lock: the model must be one that"):
        BACKEND.copy(model)


@dataclass
class Result:
    logits: object
    extra: object = None


OUT = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("output", "selector"),
    [
        (OUT, None),
        ((OUT, None), 0),
        ([None, OUT], -1),
        ({"logits": OUT}, "logits"),
        ({"logits": OUT}, 0),
        (Result(OUT), "logits"),
        (types.SimpleNamespace(a=OUT), "a"),
        ({"a": {"b": OUT}}, lambda o: o["a"]["b"]),
    ],
)
def test_outputs_are_selected(output, selector):
    assert select_output(output, selector) is OUT


@pytest.mark.parametrize(
    ("output", "selector", "holds"),
    [
        (None, None, "NoneType"),
        ((OUT, OUT), None, "tuple of 2"),
        ({"logits": OUT}, None, "keys 'logits'"),
        ({"logits": OUT}, "logit", "keys 'logits'"),
        (Result(OUT), None, "attributes logits, extra"),
        ((OUT,), 3, "tuple of 1"),
    ],
)
def test_missing_outputs_are_listed(output, selector, holds):
    with pytest.raises(Refused, match=holds):
        select_output(output, selector)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.one, self.two = nn.Conv2d(3, 8, 1), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, picture, scale):
        y = self.body(picture).mean((2, 3)) * scale
        return {"logits": self.one(y), "aux": self.two(y)}


def test_a_selected_output_is_cut_and_exported(images, halve, settled, tmp_path):
    model = Selected(settled(Heads()), "logits")
    inputs = (*images, np.ones((2, 1), "float32"))
    small, _, _ = halve(model, inputs)
    assert small.model.body.out_channels == 4
    BACKEND.export(small, inputs, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["picture", "scale"]
    assert np.allclose(
        session.run(None, dict(zip(["picture", "scale"], inputs, strict=True)))[0],
        BACKEND.run(small, inputs),
        atol=1e-5,
    )


def test_several_outputs_are_exported_in_their_order(images, settled, tmp_path):
    model, inputs = settled(Heads()), (*images, np.ones((2, 1), "float32"))
    BACKEND.export(model, inputs, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["output0", "output1"]
    found = session.run(None, dict(zip(["picture", "scale"], inputs, strict=True)))
    for array, name in zip(found, ("logits", "aux"), strict=True):
        assert np.allclose(array, BACKEND.run(Selected(model, name), inputs), atol=1e-5)


class Windows(nn.Module):
    """Attention in windows with a learned bias: its kernel lays memory out otherwise than the exporter."""

    def __init__(self):
        super().__init__()
        self.qkv, self.bias = nn.Linear(8, 24), nn.Parameter(torch.randn(25, 2))

    def forward(self, x):
        windows = x.reshape(-1, 5, 8)
        q, k, v = self.qkv(windows).reshape(windows.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind()
        bias = self.bias.view(5, 5, -1).permute(2, 0, 1).unsqueeze(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return y.transpose(1, 2).reshape(windows.shape).view(x.shape)


def test_attention_in_windows_is_exported(tmp_path):
    model, inputs = Windows(), (np.random.default_rng(0).normal(size=(2, 4, 5, 8)).astype("float32"),)
    BACKEND.export(model, inputs, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, {"x": inputs[0]})[0], BACKEND.run(model, inputs), atol=1e-5)


def test_what_stops_the_exporter_is_told_without_its_advice(shortcut, images, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError(
            "Failed. Next steps:\n- report\n\n<class 'a.b.Cause'>: no such thing\n\n(Refer above)"
        )

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(Refused, match=r"torch\.onnx can export, got Cause: no such thing"):
        BACKEND.export(shortcut, images, tmp_path / "m.onnx")


def test_export_names_opset_and_dynamic_batch(shortcut, images, tmp_path, capfd):
    shortcut.train()
    BACKEND.export(shortcut, images, tmp_path / "m.onnx")
    assert shortcut.training
    assert capfd.readouterr() == ("", "")
    proto = onnx.load(tmp_path / "m.onnx")
    assert proto.opset_import[0].version >= 18
    assert not proto.graph.value_info
    assert proto.graph.input[0].name == "image"
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {"stem.0.weight", "two.conv2.weight", "head.weight"} <= {i.name for i in proto.graph.initializer}
    assert "conftest" not in str(proto), "no traces of source files"
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        x = np.random.default_rng(batch).normal(size=(batch, 3, 8, 8)).astype("float32")
        assert np.allclose(session.run(None, {"image": x})[0], BACKEND.run(shortcut, (x,)), atol=1e-4)


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


def test_data_dependent_code_is_refused_in_one_line_with_its_place(images, capfd):
    with pytest.raises(Refused) as refused:
        BACKEND.groups(Branching(), images)
    assert "x.sum() > 0" in str(refused.value)
    assert "test_torch_backend.py:" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.lin(x) * self.calls


def test_state_that_changes_from_call_to_call_is_refused():
    with pytest.raises(Refused, match=r"graph must compute what the model|can capture"):
        BACKEND.groups(Counter(), (np.ones((1, 3), "float32"),))


def test_operations_by_hand_and_uncounted_names(images):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, groups=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )
    counted = BACKEND.operations(model, images)
    assert counted.multiply_adds == 64 * 4 * 27 + 36 * 4 * 9 + 144 * 5
    assert counted.parameters == 4 * 27 + 4 + 36 + 4 + 144 * 5 + 5
    assert counted.uncounted == ()

    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.fft.rfft(x).abs()

    assert "fft" in BACKEND.operations(Spectrum(), images).uncounted[0]


def test_fingerprint_knows_weights_buffers_and_code(shortcut):
    first = BACKEND.fingerprint(shortcut)
    assert first == BACKEND.fingerprint(BACKEND.copy(shortcut).train())
    changed = BACKEND.copy(shortcut)
    changed.stem[1].running_mean[0] += 1
    assert BACKEND.fingerprint(changed) != first
    wider = BACKEND.copy(shortcut)
    wider.drop.p = 0.5
    assert BACKEND.fingerprint(wider) != first


@torch.library.custom_op("penjing_test::twist", mutates_args=())
def twist(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1).clone()


@twist.register_fake
def _(x):
    return torch.empty_like(x)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        return self.c(self.b(torch.ops.penjing_test.twist(self.a(x))).mean((2, 3)))


def test_a_custom_operator_freezes_its_neighbours_only(images):
    model = Custom()
    groups = BACKEND.groups(model, images)
    assert [g.layers for g in groups.groups] == [("b",)]
    assert "twist" in groups.frozen["a"]
    assert "twist" in BACKEND.operations(model, images).uncounted[0]
