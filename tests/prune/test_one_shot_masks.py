"""One-shot pruning of real modules: zeros, masks, reasons, and outputs that stay near."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.backends.torch import BACKEND  # noqa: E402
from penjing.backends.torch.masks import masks_of  # noqa: E402
from penjing.calibration import inputs  # noqa: E402
from penjing.core.context import Context  # noqa: E402

FEW = {"examples": 64, "batch_size": 32}
LAYERWISE = [
    pj.PruneWanda(0.5, **FEW),
    pj.PruneSparseGPT(0.5, **FEW),
    pj.PruneALPS(0.5, **FEW),
    pj.PruneOBC(0.5, **FEW),
    pj.PruneOBC(0.5, allocation="global", **FEW),
]


def task(x):
    y = np.arange(len(x)) % 2
    return pj.Task(train=(x, y), valid=(x[:8], y[:8]), test=(x[8:16], y[8:16]), max_overlap=1)


@pytest.fixture(scope="module")
def images():
    """Neighbouring pixels are alike, so that inputs of a convolution correlate."""
    noise = np.random.default_rng(0).normal(size=(96, 3, 14, 14))
    kernel = np.ones(5) / 5
    for axis in (2, 3):
        noise = np.apply_along_axis(np.convolve, axis, noise, kernel, "valid")
    return (3 * noise).astype("float32")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    ).eval()


def zeros(model):
    return {name: 1 - float((p != 0).float().mean()) for name, p in model.named_parameters() if p.ndim > 1}


def distance(model, other, x):
    with torch.no_grad():
        a, b = (net(torch.from_numpy(x)) for net in (model, other))
    return float((a - b).square().mean() / a.square().mean())


@pytest.mark.parametrize("method", [pj.PruneMagnitude(0.5), *LAYERWISE], ids=repr)
def test_every_layer_gets_zeros_a_mask_and_an_entry(method, images):
    model = network()
    applied = pj.apply(model, method, task(images))
    masks = masks_of(applied.model)
    assert [c.layer for c in applied.changes] == ["0", "2", "4", "8"]
    for change in applied.changes:
        weight = applied.model.get_submodule(change.layer).weight.detach().numpy()
        mask = masks[f"{change.layer}.weight"]
        np.testing.assert_array_equal(weight != 0, mask)
        assert change.detail["weights"] == weight.size
        assert change.detail["sparsity"] == pytest.approx(1 - mask.mean(), abs=1e-6)
    total = sum(mask.size for mask in masks.values())
    share = 1 - sum(mask.sum() for mask in masks.values()) / total
    assert share == pytest.approx(0.5, abs=0.06), "a depthwise kernel of nine rounds to five"
    if getattr(method, "scope", "") != "global" and getattr(method, "allocation", "") != "global":
        assert all(value == pytest.approx(0.5, abs=0.06) for value in zeros(applied.model).values())
    assert zeros(model) == dict.fromkeys(zeros(model), 0.0)


def test_methods_that_correct_keep_outputs_nearer(images):
    model, found = network(), {}
    for method in (pj.PruneMagnitude(0.5, scope="layer"), *LAYERWISE[:4]):
        small = pj.apply(model, method, task(images)).model
        found[type(method).__name__] = distance(model, small, images[64:])
    assert found["PruneALPS"] < found["PruneSparseGPT"] < found["PruneMagnitude"]
    assert found["PruneOBC"] < found["PruneSparseGPT"]


def test_the_error_reported_is_that_of_the_layers_outputs(images):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)).eval()
    head = nn.Sequential(model, nn.Flatten(), nn.Linear(150, 2))
    x = images[:40]
    applied = pj.apply(head, pj.only("0.*", pj.PruneALPS(0.6, examples=1000)), task(x))
    (change,) = applied.changes
    measured = distance(head[0], applied.model[0], x)
    assert change.detail["relative_error"] == pytest.approx(measured, rel=1e-3)


def test_compensation_makes_up_for_the_layers_before(images):
    """With the classifier left out, the last pruned layer's outputs are what the rest of the network gets."""
    model, found = network(), {}
    x = np.tile(images, (3, 1, 1, 1))
    for compensate in (False, True):
        method = pj.only("0|2|4", pj.PruneALPS(0.7, compensate=compensate, examples=200))
        small = pj.apply(model, method, task(x)).model
        found[compensate] = distance(model[:5], small[:5], images)
    assert found[True] < 0.9 * found[False]


def test_shares_of_the_allocation_hold_for_every_method(images):
    shares = [
        {c.layer: c.detail["sparsity"] for c in pj.apply(network(), method, task(images)).changes}
        for method in (kind(0.7, allocation="global", **FEW) for kind in (pj.PruneOBC, pj.PruneALPS))
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.06)


def test_later_layers_see_what_earlier_ones_became(images):
    model = network()
    plan = pj.chain(pj.only("0", pj.PruneSparseGPT(0.8, **FEW)), pj.only("4", pj.PruneSparseGPT(0.8, **FEW)))
    one_by_one = pj.apply(model, plan, task(images)).model
    both = pj.only("0|4", pj.PruneSparseGPT(0.8, **FEW))
    together = pj.apply(model, both, task(images)).model
    assert torch.equal(one_by_one[4].weight, together[4].weight)
    apart = pj.only("0|4", pj.PruneSparseGPT(0.8, sequential=False, **FEW))
    dense_inputs = pj.apply(model, apart, task(images)).model
    assert torch.equal(dense_inputs[0].weight, together[0].weight)
    assert not torch.equal(dense_inputs[4].weight, together[4].weight)


def test_global_allocation_takes_zeros_where_they_cost_least(images):
    model = network()
    plans = {a: pj.PruneOBC(0.7, allocation=a, **FEW) for a in ("uniform", "global")}
    found = {a: pj.apply(model, plan, task(images)) for a, plan in plans.items()}
    shares = {c.layer: c.detail["sparsity"] for c in found["global"].changes}
    assert max(shares.values()) - min(shares.values()) > 0.1
    kept = {a: sum(m.sum() for m in masks_of(f.model).values()) for a, f in found.items()}
    assert kept["global"] == pytest.approx(kept["uniform"], rel=0.06)
    errors = {a: sum(c.detail["relative_error"] for c in f.changes) for a, f in found.items()}
    assert errors["global"] < errors["uniform"]


@pytest.mark.parametrize("method", [pj.PruneMagnitude, pj.PruneWanda, pj.PruneALPS], ids=lambda m: m.__name__)
def test_two_of_four_lie_along_the_input_axis(method, images):
    applied = pj.apply(network(), method(pattern="2:4"), task(images))
    reasons = {c.layer: c.reason for c in applied.changes if not c.done}
    assert reasons == {
        "0": "the pattern 2:4 does not fit: 3 inputs are no multiple of 4",
        "2": "the pattern 2:4 does not fit: 1 inputs are no multiple of 4",
    }
    weight = applied.model[4].weight.detach().numpy()
    assert (np.count_nonzero(weight, axis=1) == 2).all(), "of [16, 4, 3, 3], two inputs at every position"


@pytest.mark.parametrize(
    "method", [pj.PruneMagnitude, pj.PruneSparseGPT, pj.PruneOBC], ids=lambda m: m.__name__
)
def test_blocks_of_outputs_go_together(method, images):
    applied = pj.apply(network(), method(0.5, pattern="block:4x1"), task(images))
    done = {c.layer for c in applied.changes if c.done}
    assert done == {"0", "4", "8"}
    for layer in done:
        weight = applied.model.get_submodule(layer).weight.detach().numpy()
        kept = (weight.reshape(len(weight) // 4, 4, -1) != 0).sum(1)
        assert set(np.unique(kept)) == {0, 4}


class Language(nn.Module):
    """A tied output, a layer used twice under one name, and one under two names."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.inner, self.lstm = nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.inner.weight
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 12, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        y = self.twin(self.inner(self.inner(self.table(x)))).relu()
        return self.out(self.norm(self.lstm(y)[0])).mean(1)


@pytest.mark.parametrize("method", [pj.PruneMagnitude(0.5), pj.PruneALPS(0.5)], ids=repr)
def test_what_cannot_become_sparse_says_why(method):
    torch.manual_seed(0)
    x = np.random.default_rng(0).integers(0, 12, (64, 6))
    applied = pj.apply(Language(), method, task(x))
    reasons = {c.layer: c.reason for c in applied.changes}
    assert reasons == {
        "inner": "",
        "table": "a table of embeddings is looked up, not multiplied",
        "lstm": "its weights are not read as [out, in, *kernel]",
        "twin": "its weight is that of inner",
        "out": "its weight is that of the embedding table",
    }
    assert torch.equal(applied.model.inner.weight, applied.model.twin.weight)
    assert (applied.model.table.weight != 0).all()


def test_a_layer_with_fewer_observations_than_inputs_stays(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(300, 16), nn.ReLU(), nn.Linear(16, 4))
    applied = pj.apply(model, pj.PruneSparseGPT(0.5, **FEW), task(images))
    reasons = {c.layer: c.reason for c in applied.changes}
    assert reasons["1"].startswith("64 observations of 300 inputs")
    assert reasons["3"] == ""
    assert all(c.done for c in pj.apply(model, pj.PruneWanda(0.5, **FEW), task(images)).changes)


def test_memory_bounds_how_many_layers_share_a_pass(images, monkeypatch):
    method = pj.PruneALPS(0.5, sequential=False, **FEW)
    whole = pj.apply(network(), method, task(images))
    moments = {"0": 27**2 * 8, "2": 8 * 9**2 * 8, "4": 2 * 36**2 * 8, "8": 16**2 * 8}
    monkeypatch.setattr(inputs, "GRAM_BYTES", moments["2"] + moments["0"])
    said: list[str] = []
    prepared = task(images).prepare()
    context = Context(task=prepared, backend=BACKEND, original=None, say=lambda line: said.append(str(line)))
    parts = pj.apply(network(), method, prepared, context=context)
    reasons = {c.layer: c.reason for c in parts.changes if not c.done}
    assert list(reasons) == ["4"]
    assert "GiB" in reasons["4"]
    assert said == ["PruneALPS: 0, 2 (1 of 2)", "PruneALPS: 8 (2 of 2)"]
    for layer in (0, 2, 8):
        assert torch.equal(parts.model[layer].weight, whole.model[layer].weight)


def test_zeros_that_are_there_already(images):
    model = network()
    once = pj.apply(model, pj.PruneMagnitude(0.6, scope="layer"), task(images)).model
    for scope, whose in (("layer", "its weights"), ("global", "the weights of these layers together")):
        with pytest.raises(pj.Refused, match=rf"already \d\d\.\d% of {whose} are zero"):
            pj.apply(once, pj.PruneMagnitude(0.5, scope=scope), task(images))
    more = pj.apply(once, pj.PruneMagnitude(0.8, scope="layer"), task(images)).model
    assert all(value > 0.75 for value in zeros(more).values())
    for name, mask in masks_of(more).items():
        assert not (mask & ~masks_of(once)[name]).any(), "what was zero stays zero"


def test_masks_outlive_training(images):
    plan = pj.chain(pj.PruneALPS(0.7, **FEW), pj.FineTune(epochs=1, batch_size=32, precision="float32"))
    applied = pj.apply(network(), plan, task(images))
    for name, mask in masks_of(applied.model).items():
        weight = applied.model.get_parameter(name).detach().numpy()
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).any()


def test_weights_that_are_not_finite_are_refused_before_anything_slow(images):
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(pj.Refused, match=r"4\.weight"):
        pj.apply(model, pj.PruneALPS(0.5), task(images))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "sparsity must be given"),
        ({"pattern": "2:4", "sparsity": 0.7}, "sparsity must be 0.5, which the pattern 2:4 brings, got 0.7"),
        ({"pattern": "block:axb", "sparsity": 0.5}, "must be a pattern, got 'block:axb'"),
        ({"sparsity": 1.0}, "less than 1"),
    ],
)
def test_bad_settings_are_refused_at_construction(fields, word):
    with pytest.raises(pj.Refused, match=word):
        pj.PruneALPS(**fields)


def test_a_pattern_brings_its_sparsity():
    assert pj.PruneWanda(pattern="1:4").sparsity == 0.75
    assert pj.PruneWanda(0.5, pattern="2:4") == pj.PruneWanda(pattern="2:4")
