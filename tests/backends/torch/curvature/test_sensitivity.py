"""Gates and curvature against plain autograd, finite differences and known Hessians."""

import contextlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402

from penjing.arrays.scores import fisher_score, taylor_score  # noqa: E402
from penjing.arrays.scores.units import consumers, sum_by_unit  # noqa: E402
from penjing.backends.torch import BACKEND  # noqa: E402
from penjing.core.backend import GradientBackend, Sample  # noqa: E402
from penjing.core.errors import Refused  # noqa: E402
from penjing.core.task import Split  # noqa: E402

torch.set_num_threads(1)


class Forked(nn.Module):
    """A residual stream that two convolutions and a linear layer take, and a layer called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)
        self.bn, self.twice, self.fc = nn.BatchNorm2d(6), nn.Linear(4, 4), nn.Linear(4 * 36, 3)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = self.b(x + self.a(x)).movedim(1, -1)
        x = self.twice(self.twice(x).tanh())
        return self.fc(x.flatten(1))


@pytest.fixture
def forked():
    torch.manual_seed(0)
    model = Forked()
    nn.init.uniform_(model.bn.weight, 0.5, 1.5)
    return model.train()


def split(n=12, seed=0, shape=(1, 8, 8)):
    rng = np.random.default_rng(seed)
    return Split((rng.normal(size=(n, *shape)).astype("float32"),), rng.integers(0, 3, n), "train")


def sample(data, batches=2, size=6, loss="cross_entropy"):
    return Sample(data, loss, batches, size, 0)


def test_gates_of_a_fork_and_of_a_layer_called_twice_equal_autograd_example_by_example(forked):
    data = split(6)
    [found] = BACKEND.gate_gradients(forked, ["a", "b", "twice", "fc"], sample(data))
    [(inputs, targets)] = data.batches(6, 0)
    forked.eval()
    for layer, width in (("a", 6), ("b", 6), ("twice", 4)):
        gate = torch.ones(width, requires_grad=True)
        shape = (1, -1, 1, 1) if layer in "ab" else (-1,)
        hook = forked.get_submodule(layer).register_forward_pre_hook(
            lambda _, x, gate=gate, shape=shape: (x[0] * gate.view(shape),)
        )
        for i in range(6):
            out = forked(torch.from_numpy(inputs[0][i : i + 1]))
            loss = nn.functional.cross_entropy(out, torch.from_numpy(targets[i : i + 1]))
            expected = torch.autograd.grad(loss, gate)[0]
            np.testing.assert_allclose(found.sums[layer][i], expected, rtol=1e-3, atol=1e-6)
        hook.remove()
    assert found.examples == 6
    assert found.width("a") == 6
    assert found.width("elsewhere") == 0
    assert found.squares["fc"] == pytest.approx(found.sums["fc"] ** 2), "one position, one term"
    assert (found.squares["a"] <= 36 * (found.sums["a"] ** 2).max() + 1).all()


def test_a_gate_on_inputs_is_the_weights_times_their_gradients_of_single_examples(forked):
    """Summed over the columns that take a unit, w dL/dw is the gate's derivative: a second way to Fisher."""
    data = split(5)
    groups = BACKEND.groups(forked, data.example()).groups
    layers = [s.layer for g in groups for s in consumers(g)]
    found = fisher_score(groups, BACKEND.gate_gradients(forked, layers, sample(data, 5, 2)))
    total = {g.name: np.zeros(g.size) for g in groups}
    for gradient in BACKEND.gradients(forked, data, "cross_entropy", 5, 1, 0):
        for g in groups:
            parts = [
                sum_by_unit(BACKEND.read(forked, s.layer)[s.tensor] * gradient[s.layer][s.tensor], s, g.size)
                for s in consumers(g)
            ]
            total[g.name] += sum(parts) ** 2 / 5
    assert len(groups) >= 1
    for name, expected in total.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-9)


def test_nothing_of_the_model_is_changed_even_if_its_weights_are_frozen(forked):
    forked.requires_grad_(False)
    forked.bn.weight.requires_grad_(True)
    before = {k: v.clone() for k, v in forked.state_dict().items()}
    [gates] = BACKEND.gate_gradients(forked, ["a"], sample(split(), 1, 12))
    [diagonal] = BACKEND.hessian_diagonals(forked, sample(split(), 1, 12))
    assert np.abs(gates.sums["a"]).max() > 0
    assert np.abs(diagonal["stem"]["weight"]).max() > 0
    assert [n for n, p in forked.named_parameters() if p.requires_grad] == ["bn.weight"]
    assert forked.training
    assert all(p.grad is None for p in forked.parameters())
    assert not any(m._forward_pre_hooks for m in forked.modules())
    assert all(torch.equal(v, before[k]) for k, v in forked.state_dict().items())


class Turned(nn.Module):
    """Sequence first, so that rows of a layer's input are no examples; and a layer that is not called."""

    def __init__(self):
        super().__init__()
        self.proj, self.used, self.fc = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.proj(x.transpose(0, 1))
        return self.fc(nn.functional.linear(x, self.used.weight, self.used.bias).mean(0))


def test_layers_that_are_not_called_or_not_by_example_are_left_out():
    data = split(4, shape=(5, 3))
    [found] = BACKEND.gate_gradients(Turned(), ["proj", "used", "fc"], sample(data, 1, 4))
    assert set(found.sums) == set(found.squares) == {"fc"}
    with pytest.raises(Refused, match="must be a layer of the model"):
        list(BACKEND.gate_gradients(Turned(), ["nothing"], sample(data)))


class Two(nn.Module):
    """Two layers without biases: scaling a unit's row or its column is the same."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_first_order_scores_are_the_true_change_of_the_loss_for_small_units():
    torch.manual_seed(0)
    model, data = Two().eval(), split(32, shape=(4,))
    with torch.no_grad():
        model.b.weight *= 0.002 * torch.arange(1, 9)
    x, y = torch.from_numpy(data.inputs[0]), torch.from_numpy(data.targets)

    def loss(without=None):
        mask = torch.ones(8)
        if without is not None:
            mask[without] = 0
        with torch.no_grad():
            out = model.b(model.a(x).relu() * mask).double()
            return float(nn.functional.cross_entropy(out, y))

    changes = np.array([loss(unit) - loss() for unit in range(8)])
    [group] = BACKEND.groups(model, data.example()).groups
    tensors = {name: BACKEND.read(model, name) for name in "ab"}
    batch = list(BACKEND.gradients(model, data, "cross_entropy", 1, 32, 0))
    # Row and column both carry the unit's whole first-order change: twice the change, squared.
    taylor = taylor_score([group], tensors, batch)[group.name]
    np.testing.assert_allclose(taylor, (2 * changes) ** 2, rtol=0.05)
    [gates] = BACKEND.gate_gradients(model, ["b"], sample(data, 1, 32))
    np.testing.assert_allclose(gates.sums["b"].mean(0), -changes, rtol=0.03)


def squared_error(outputs, targets):
    return ((outputs - targets[:, None]) ** 2).sum(1).mean()


def test_a_diagonal_hessian_is_found_exactly_by_every_probe():
    model, data = nn.Sequential(nn.Linear(3, 2, bias=False)), split(3, shape=(3,))
    data = Split((np.diag([1.0, 2.0, 3.0]).astype("float32"),), data.targets.astype("float32"), "train")
    for found in BACKEND.hessian_diagonals(model, sample(data, 3, 3, squared_error)):
        np.testing.assert_allclose(found["0"]["weight"], 2 / 3 * np.array([[1, 4, 9]] * 2), rtol=1e-5)


def test_hutchinson_has_the_right_mean_on_a_network_with_a_known_hessian():
    torch.manual_seed(0)
    model, data = Two(), split(16, shape=(4,))
    x, y = torch.from_numpy(data.inputs[0]), torch.from_numpy(data.targets)

    def loss(weight):
        return nn.functional.cross_entropy(torch.func.functional_call(model, {"b.weight": weight}, x), y)

    full = torch.autograd.functional.hessian(loss, model.b.weight.detach()).reshape(24, 24)
    expected = full.diagonal().reshape(3, 8).numpy()
    many = Split(tuple(np.tile(a, (400, 1)) for a in data.inputs), np.tile(data.targets, 400), "train")
    order = [
        next(
            BACKEND.hessian_diagonals(
                model, Sample(many.take(np.arange(16), "t"), "cross_entropy", 1, 16, seed)
            )
        )["b"]["weight"]
        for seed in range(300)
    ]
    noise = np.std(order, axis=0) / 300**0.5
    assert (np.abs(np.mean(order, axis=0) - expected) < 5 * noise + 1e-6).all()


def test_attention_has_second_derivatives_but_not_in_its_fused_kernels(monkeypatch):
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(20, 3))
    few = sample(split(4, shape=(5, 4)), 1, 4)
    [found] = BACKEND.hessian_diagonals(model, few)
    assert np.abs(found["0.linear1"]["weight"]).max() > 0
    monkeypatch.setattr(
        "penjing.backends.torch.curvature.sensitivity.sdpa_kernel", lambda _: contextlib.nullcontext()
    )
    with pytest.raises(Refused, match="twice differentiable"):
        list(BACKEND.hessian_diagonals(model, few))


def test_a_layer_with_several_inputs_has_no_gate():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(20, 3))
    [found] = BACKEND.gate_gradients(
        model, ["0.self_attn", "0.linear1", "2"], sample(split(4, shape=(5, 4)), 1, 4)
    )
    assert set(found.sums) == {"0.linear1", "2"}


def test_the_torch_backend_offers_gradients():
    assert isinstance(BACKEND, GradientBackend)
