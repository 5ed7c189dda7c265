"""LeastSquares: what can be recovered is, exactly; what cannot be judged stays, with the reason."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.backends.torch.masks import masks_of, set_masks  # noqa: E402
from penjing.core.backend import backend_named  # noqa: E402
from penjing.core.context import Context  # noqa: E402

torch.set_num_threads(1)
BACKEND = backend_named("torch")
REFIT = pj.LeastSquares(examples=96, ridge=1e-9)


def task_of(shape, n=96, dtype="float32"):
    x = np.random.default_rng(0).normal(1, 2, size=(n, *shape)).astype(dtype)
    y = np.arange(n) % 2
    return pj.Task(train=(x, y), valid=(x[:8] + 1, y[:8]), test=(x[:8] - 1, y[:8])).prepare()


def repaired(model, original, task, method=REFIT):
    context = Context(task=task, backend=BACKEND, original=original)
    return pj.apply(model, method, task, context=context)


def combined(layer, kept, blocks=1):
    """Make every other output of a layer a linear combination of the kept ones of its block."""
    generator = torch.Generator().manual_seed(1)
    size = len(layer.weight) // blocks
    with torch.no_grad():
        for start in range(0, len(layer.weight), size):
            mine = [k for k in kept if start <= k < start + size]
            for row in range(start, start + size):
                if row not in mine:
                    mix = torch.randn(len(mine), generator=generator)
                    layer.weight[row] = torch.tensordot(mix, layer.weight[mine], 1)
                    if layer.bias is not None:
                        layer.bias[row] = mix @ layer.bias[mine]


def cut(model, task, kept, group=0):
    groups = BACKEND.groups(model, task.valid.example())
    return BACKEND.keep(model, groups, {groups.groups[group].name: np.array(kept)})


def outputs(model, task):
    return BACKEND.run(model, task.valid.arrays()[0])


def gap(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


CONVOLUTIONS = {
    "plain": (nn.Conv2d(6, 5, 3, padding=1), 1),
    "strided and dilated": (nn.Conv2d(6, 5, (3, 2), stride=2, dilation=2), 1),
    "circular": (nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular", bias=False), 1),
    "grouped": (nn.Conv2d(6, 4, 3, padding="same", groups=2), 2),
}


@pytest.mark.parametrize(("layer", "blocks"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_channels_that_are_combinations_of_the_kept_ones_are_no_loss(layer, blocks):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), copy.deepcopy(layer), nn.Flatten(), nn.LazyLinear(2)).eval()
    task = task_of((2, 7, 8))
    model(torch.from_numpy(task.valid.arrays()[0][0]))
    combined(model[0], [0, 1, 3, 4], blocks)
    small = cut(model, task, [0, 1, 3, 4])
    assert gap(outputs(small, task), outputs(model, task)) > 0.05
    applied = repaired(small, model, task)
    assert gap(outputs(applied.model, task), outputs(model, task)) < 1e-3
    assert [(c.layer, c.done) for c in applied.changes] == [("0", False), ("1", True), ("3", False)]
    reasons = [c.reason for c in applied.changes if not c.done]
    assert reasons == ["its outputs are those of the original"] * 2
    assert applied.changes[1].detail["error_after"] < 1e-6 < applied.changes[1].detail["error_before"]


def test_features_that_are_combinations_of_the_kept_ones_are_no_loss_in_sequences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4), nn.Flatten(), nn.Linear(20, 2)).eval()
    combined(model[0], [0, 2, 5])
    task = task_of((5, 3))
    small = cut(model, task, [0, 2, 5])
    found = repaired(small, model, task).model
    assert gap(outputs(found, task), outputs(model, task)) < 1e-3


def test_a_depthwise_layer_is_refitted_channel_by_channel():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(4, 8, 3, groups=4), nn.Flatten(), nn.Linear(8 * 9, 2)
    ).eval()
    task = task_of((2, 5, 5))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight.mul_(torch.tensor([0.5, 2.0, -1.0, 3.0]).reshape(4, 1, 1, 1))
    applied = repaired(changed, model, task, pj.only("1", REFIT))
    assert gap(outputs(applied.model, task), outputs(model, task)) < 1e-4
    assert [c.layer for c in applied.changes if c.done] == ["1"]
    assert torch.equal(applied.model[0].weight, changed[0].weight)


def test_each_layer_is_fitted_to_what_the_layers_before_it_now_give():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    task = task_of((6,), n=600)
    small = cut(model, task, range(8))
    method = pj.LeastSquares(examples=600, ridge=1e-9)
    found = repaired(small, model, task, method).model
    data = torch.from_numpy(task.train.arrays()[0][0])
    with torch.no_grad():
        for number in (2, 4):
            inputs, wanted = found[:number](data), model[: number + 1](data)
            residual = (wanted - found[number](inputs)).double()
            design = torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double()
            scale = design.norm(dim=0)[:, None] * wanted.norm()
            cosine = design.T @ residual / scale.clamp(min=1e-9)
            assert float(cosine.abs().max()) < 1e-5, "orthogonal to the inputs"


def with_batchnorm():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(36, 2),
    )


def test_batchnorm_behind_a_refitted_layer_gets_the_statistics_of_its_output():
    model, task = with_batchnorm(), task_of((2, 7, 7))
    model = pj.apply(model, pj.ReestimateBatchNorm(examples=1920, batch_size=96), task).model.eval()
    small = cut(model, task, range(4))
    before = small[2].running_mean.clone()
    applied = repaired(small, model, task, pj.only("1|2", REFIT))
    data = torch.from_numpy(task.train.arrays()[0][0])
    after = applied.model[:2](data).detach()
    assert torch.allclose(applied.model[2].running_mean, after.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(applied.model[2].running_var, after.var((0, 2, 3)), rtol=1e-3)
    assert {c.layer: c.done for c in applied.changes} == {"1": True, "2": True}
    alone = repaired(small, model, task, pj.only("1", REFIT))
    assert torch.equal(alone.model[2].running_mean, before)
    assert [c.layer for c in alone.changes] == ["1"]


def test_channels_before_batchnorm_are_recovered_too():
    model, task = with_batchnorm(), task_of((2, 7, 7))
    combined(model[0], range(4))
    model = pj.apply(model, pj.ReestimateBatchNorm(examples=1920, batch_size=96), task).model.eval()
    applied = repaired(cut(model, task, range(4)), model, task)
    assert gap(outputs(applied.model, task), outputs(model, task)) < 1e-3


class PreActivation(nn.Module):
    """BatchNorm takes a sum, so that no layer's output is what it takes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 8, 3), nn.Conv2d(2, 8, 3)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x) + self.second(x)).relu().mean((2, 3)))


def test_batchnorm_behind_a_sum_gets_the_statistics_of_what_it_takes():
    torch.manual_seed(0)
    model, task = PreActivation().eval(), task_of((2, 7, 7))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.first.weight[:4] = 0
    applied = repaired(changed, model, task, pj.only("norm", REFIT))
    assert [c.layer for c in applied.changes if c.done] == ["norm"]
    data = torch.from_numpy(task.train.arrays()[0][0])
    after = (changed.first(data) + changed.second(data)).detach()
    assert torch.allclose(applied.model.norm.running_mean, after.mean((0, 2, 3)), atol=1e-4)


def test_batchnorm_takes_up_a_shift_that_leaves_nothing_to_fit():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2)
    )
    task = task_of((2, 3, 3))
    model = pj.apply(model, pj.ReestimateBatchNorm(examples=1920, batch_size=96), task).model.eval()
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted[0].bias.add_(torch.tensor([1.0, -2.0, 3.0]))
    applied = repaired(shifted, model, task, pj.only("1|2", REFIT))
    assert gap(outputs(applied.model, task), outputs(model, task)) < 1e-3
    assert next(c for c in applied.changes if c.layer == "2").done


def test_masked_weights_stay_zero_and_the_others_are_refitted():
    model, task = with_batchnorm().eval(), task_of((2, 7, 7))
    masked = copy.deepcopy(model)
    generator = np.random.default_rng(0)
    set_masks(masked, {"1.weight": generator.random(tuple(model[1].weight.shape)) < 0.5})
    applied = repaired(masked, model, task, pj.LeastSquares(examples=96))
    mask = masks_of(applied.model)["1.weight"]
    assert (applied.model[1].weight.detach().numpy()[~mask] == 0).all()
    assert (applied.model[1].weight.detach().numpy()[mask] != masked[1].weight.detach().numpy()[mask]).all()
    change = next(c for c in applied.changes if c.layer == "1")
    assert change.detail["error_after"] < change.detail["error_before"]


def test_an_original_that_was_cut_before_is_the_reference():
    torch.manual_seed(0)
    first, task = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 6), nn.Linear(6, 2)).eval(), task_of((4,))
    original = cut(first, task, range(2, 10))
    combined(original[0], [1, 2, 4, 7])
    small = cut(original, task, [1, 2, 4, 7])
    smaller = cut(small, task, [0, 3, 5], group=1)
    found = repaired(smaller, original, task, pj.only("1", REFIT)).model
    data = torch.from_numpy(task.valid.arrays()[0][0])
    assert torch.allclose(found[:2](data), original[:2](data)[:, [0, 3, 5]], atol=1e-3)


def test_too_little_data_is_refused_or_skipped_with_the_reason():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 2)).eval()
    few = task_of((60,), n=31)
    with pytest.raises(pj.Refused, match="at least 32 training examples"):
        repaired(cut(model, few, range(40)), model, few)
    task = task_of((60,), n=40)
    small = cut(model, task, range(40))
    with pytest.raises(pj.Refused, match="2: 40 observations are too few for 40 inputs"):
        repaired(small, model, task)
    assert repaired(small, model, task_of((60,), n=80), pj.LeastSquares()).changes[1].done


class Odd(nn.Module):
    """A layer called twice, one used as a function, two that share a weight, one that only one model has."""

    def __init__(self):
        super().__init__()
        self.inside, self.twice, self.function = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = nn.functional.linear(self.twice(self.twice(self.inside(x))), self.function.weight)
        return self.last(self.second(self.first(x).relu()))


def test_layers_that_cannot_be_compared_say_why():
    torch.manual_seed(0)
    original, task = Odd().eval(), task_of((4,))
    model = copy.deepcopy(original)
    model.extra = nn.Linear(1, 1)
    with torch.no_grad():
        model.inside.weight.mul_(0.5)
    found = {c.layer: c.reason for c in repaired(model, original, task).changes}
    assert found == {
        "inside": "",
        "twice": "it is called several times",
        "function": "the model does not call it as a module",
        "first": "it shares a tensor with second.weight",
        "second": "it shares a tensor with first.weight",
        "last": "its outputs are those of the original",
        "extra": "the original has no layer of this name",
    }


def test_nothing_to_repair_is_refused():
    model, task = with_batchnorm().eval(), task_of((2, 7, 7))
    with pytest.raises(pj.Refused, match="outputs are those of the original"):
        repaired(model, model, task)
    flat = nn.Sequential(nn.Flatten(), nn.LayerNorm(98))
    with pytest.raises(pj.Refused, match="no convolution, linear or BatchNorm layer"):
        repaired(flat, flat, task)


def test_a_transformer_that_lost_heads_and_neurons_comes_nearer_to_the_original(tiny_transformer):
    model, task = tiny_transformer(), task_of((1, 8, 8), n=128)
    small = pj.apply(model, pj.PruneChannels(0.5, units=("head", "channel"), round_to=1), task).model
    applied = repaired(small, model, task, pj.LeastSquares(examples=128))
    shifted = [np.square(outputs(m, task) - outputs(model, task)).mean() for m in (small, applied.model)]
    assert shifted[1] < 0.5 * shifted[0]
    done = {c.layer for c in applied.changes if c.done}
    assert {"body.0.project", "body.0.down", "body.1.project", "body.1.down", "fc"} <= done
    assert "embed" not in done
