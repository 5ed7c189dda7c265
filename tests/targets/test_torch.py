"""PyTorch as a target: weights and cuts, onto the user's own class."""

import json

import numpy as np
import pytest

from penjing.core.backend import Group, Groups, backend_named
from penjing.core.errors import Refused
from penjing.core.target import Target, runtime_for

torch = pytest.importorskip("torch")
nn = torch.nn

RUNTIME = runtime_for(Target("torch"))
X = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return {"logits": self.b(self.a(x)), "hidden": x}


def net() -> Net:
    torch.manual_seed(1)
    made = Net()
    made.norm.running_mean += 0.3
    return made.eval()


def outputs(module, x=X):
    with torch.no_grad():
        return module.eval()(torch.from_numpy(x)).numpy()


def test_weights_and_buffers_come_back_onto_the_users_class(tmp_path):
    model = net()
    facts = RUNTIME.deliver(model, (X[:1],), tmp_path)
    assert facts["format"] == "safetensors"
    assert facts["inputs"] == [{"name": "input0", "dtype": "float32", "shape": [None, 3, 8, 8]}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph.json", "model.safetensors", "recipe.json"]
    runner = RUNTIME.open(tmp_path, Target("torch"), Net)
    np.testing.assert_array_equal(runner(X), outputs(model))
    assert torch.get_num_threads() == 1


class Narrowing:
    """A backend with one group per convolution, whose cuts it records as the torch backend does."""

    def groups(self, model, example):
        assert example[0].shape == (1, 3, 8, 8)
        size = model.body.out_channels
        return Groups((Group("body", size, (), ("body",), np.zeros(size, np.int64)),))

    def keep(self, model, groups, kept):
        keep = torch.from_numpy(kept["body"])
        model.body.weight = nn.Parameter(model.body.weight[keep])
        model.body.bias = nn.Parameter(model.body.bias[keep])
        model.body.out_channels = len(keep)
        model.head.weight = nn.Parameter(model.head.weight[:, keep])
        model.head.in_features = len(keep)
        model._penjing_history = [
            *getattr(model, "_penjing_history", []),
            {"keep": {"body": kept["body"].tolist()}},
        ]
        return model


def test_recorded_cuts_are_replayed_in_order(tmp_path, monkeypatch):
    backend, model = Narrowing(), net()
    monkeypatch.setattr("penjing.backends.torch.replay.TorchBackend", lambda: backend)
    for kept in ([0, 1, 2, 5, 6, 7], [1, 2, 5]):
        model = backend.keep(model, backend.groups(model, (X[:1],)), {"body": np.array(kept)})
    RUNTIME.deliver(model, (X[:1],), tmp_path)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["history"] == [{"keep": {"body": [0, 1, 2, 5, 6, 7]}}, {"keep": {"body": [1, 2, 5]}}]
    np.testing.assert_array_equal(RUNTIME.open(tmp_path, Target("torch"), Net)(X), outputs(model))


class Hard(nn.Module):
    """Code that hard-codes a size, so that its cut form is a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8 * 36, 4)

    def forward(self, x):
        return self.head(torch.relu(self.stem(x)).view(-1, 8 * 36))


@pytest.mark.parametrize("make", [Net, Hard])
def test_what_the_torch_backend_cuts_comes_back(tmp_path, make):
    torch.manual_seed(2)
    backend, model = backend_named("torch"), make().eval()
    for count in (6, 4):
        groups = backend.groups(model, (X[:1],))
        model = backend.keep(model, groups, {g.name: np.arange(count) for g in groups.groups})
    RUNTIME.deliver(model, (X[:1],), tmp_path)
    runner = RUNTIME.open(tmp_path, Target("torch"), make)
    assert {name: tuple(p.shape) for name, p in runner._call.named_parameters()}["stem.weight"][0] == 4
    np.testing.assert_allclose(runner(X), outputs(model), rtol=1e-5, atol=1e-6)
    again = RUNTIME.open(tmp_path, Target("torch"), lambda: backend.copy(model))
    np.testing.assert_allclose(again(X), outputs(model), rtol=1e-5, atol=1e-6)


def test_a_class_that_was_cut_in_another_way_is_refused(tmp_path):
    RUNTIME.deliver(net(), (X[:1],), tmp_path)
    other = net()
    other._penjing_history = [{"keep": {"body": [0]}}]
    with pytest.raises(Refused, match="cut in another way"):
        RUNTIME.open(tmp_path, Target("torch"), lambda: other)


def test_a_step_that_no_version_knows_is_refused(tmp_path):
    model = net()
    model._penjing_history = [{"fold": ["norm"]}]
    RUNTIME.deliver(model, (X[:1],), tmp_path)
    with pytest.raises(Refused, match=r"step must be of a known kind.*fold"):
        RUNTIME.open(tmp_path, Target("torch"), Net)


def test_blocks_that_the_class_lacks_are_refused(tmp_path):
    model = net()
    model._penjing_history = [{"skip": ["body"]}]
    RUNTIME.deliver(model, (X[:1],), tmp_path)
    with pytest.raises(Refused, match=r"blocks that were removed.*body"):
        RUNTIME.open(tmp_path, Target("torch"), Net)


def test_cuts_of_groups_that_the_class_lacks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("penjing.backends.torch.replay.TorchBackend", Narrowing)
    model = net()
    model._penjing_history = [{"keep": {"stem": [0]}}]
    RUNTIME.deliver(model, (X[:1],), tmp_path)
    with pytest.raises(Refused, match=r"groups that were cut.*stem"):
        RUNTIME.open(tmp_path, Target("torch"), Net)


def test_tied_weights_and_a_dictionary_of_outputs(tmp_path):
    model = Tied()
    x = X[:, 0, 0, :4].copy()
    RUNTIME.deliver(model, (x[:1],), tmp_path)
    with torch.no_grad():
        wanted = model(torch.from_numpy(x))["logits"].numpy()
    np.testing.assert_array_equal(RUNTIME.open(tmp_path, Target("torch"), Tied)(x), wanted)


def test_without_class_and_graph_it_is_refused_with_the_reason(tmp_path):
    class Frozen(Net):
        def forward(self, x):
            return super().forward(x.view(5, 3, 8, 8)).view(5, 4)

    facts = RUNTIME.deliver(Frozen().eval(), (X,), tmp_path)
    assert "batch size" in facts["no_graph"] or "capture" in facts["no_graph"]
    assert not (tmp_path / "graph.json").exists()
    rule = r"needs the class of the model.*(batch size|capture).*function without arguments"
    with pytest.raises(Refused, match=rule):
        RUNTIME.open(tmp_path, Target("torch"))


def test_another_class_is_refused_with_what_is_missing(tmp_path):
    RUNTIME.deliver(net(), (X[:1],), tmp_path)
    with pytest.raises(Refused, match=r"must hold the tensors of the class.*(Missing|Unexpected)"):
        RUNTIME.open(tmp_path, Target("torch"), lambda: nn.Linear(3, 4))
    with pytest.raises(Refused, match=r"must return a torch module.*dict"):
        RUNTIME.open(tmp_path, Target("torch"), dict)


def test_damaged_files_are_refused(tmp_path):
    RUNTIME.deliver(net(), (X[:1],), tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refused, match="must be a whole safetensors file"):
        RUNTIME.open(tmp_path, Target("torch"), Net)
    weights.write_bytes(whole)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(Refused, match="must be a readable recipe"):
        RUNTIME.open(tmp_path, Target("torch"), Net)


def test_a_model_of_another_framework_is_refused(tmp_path):
    with pytest.raises(Refused, match="must be a torch module"):
        RUNTIME.deliver(object(), (X[:1],), tmp_path)


def test_inputs_and_failures_of_the_module_are_refused(tmp_path):
    RUNTIME.deliver(net(), (X[:1],), tmp_path)
    runner = RUNTIME.open(tmp_path, Target("torch"), Net)
    with pytest.raises(Refused, match=r"input0.*float32"):
        runner(X.astype(np.float64))
    with pytest.raises(Refused, match=r"must run on the batch.*RuntimeError"):
        runner(X[:, :2])


@pytest.mark.slow
def test_compiled_gives_the_outputs_of_eager(tmp_path):
    model = net()
    RUNTIME.deliver(model, (X[:1],), tmp_path)
    runner = RUNTIME.open(tmp_path, Target("torch", mode="compiled"), Net)
    np.testing.assert_allclose(runner(X), outputs(model), rtol=1e-4, atol=1e-5)
