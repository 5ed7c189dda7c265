"""Cuts on modules of every kind: right widths, the masked model's output, nothing lost on the way."""

import copy

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from penjing import Refused
from penjing.backends.torch import BACKEND
from penjing.backends.torch.cut.exported import ExportedNet
from penjing.backends.torch.structure.history import history, lineage


def masked(model, inputs, groups, kept):
    """The slow oracle: columns of removed units set to zero in the weights of a copy."""
    model = copy.deepcopy(model)
    for group in groups.groups:
        gone = np.setdiff1d(np.arange(group.size), kept[group.name])
        for slot in group.slots:
            if slot.role == "in":
                weight = model.get_parameter(f"{slot.layer}.{slot.tensor}".lstrip("."))
                columns = np.isin(slot.units, gone)
                with torch.no_grad():
                    if len(columns) == weight.shape[slot.axis]:
                        weight[(slice(None),) * slot.axis + (torch.from_numpy(columns),)] = 0
                    else:
                        blocks = len(columns) // weight.shape[1]
                        view = weight.view(blocks, -1, *weight.shape[1:])
                        for block, part in enumerate(np.split(columns, blocks)):
                            view[block][:, torch.from_numpy(part)] = 0
    return BACKEND.run(model, inputs)


def close(a, b, tolerance=1e-5):
    return a.shape == b.shape and np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 6, 3)
        self.l = nn.Linear(6 * 3 * 3, 4)

    def forward(self, x):
        return self.l(F.max_pool2d(F.relu(self.c(x)), 2).view(-1, 6 * 3 * 3))


class Flexible(nn.Module):
    """No width in the code: stays the user's class. Concatenation, depthwise, grouped, squeeze-excite."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 4, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.mid = nn.Conv2d(12, 16, 1)
        self.grouped = nn.Conv2d(16, 8, 3, padding=1, groups=4)
        self.squeeze = nn.Conv2d(8, 2, 1)
        self.excite = nn.Conv2d(2, 8, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.slope = nn.PReLU(8)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x):
        y = F.hardswish(self.norm(self.depthwise(torch.cat([self.a(x), self.b(x)], 1))))
        y = self.slope(self.grouped(F.gelu(self.mid(y))))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True))))) * self.scale
        return self.head(F.adaptive_avg_pool2d(y, 2).flatten(1))


def test_option_a_shortcut_pads_fewer_channels(shortcut, images, halve):
    small, kept, groups = halve(shortcut, images)
    assert isinstance(small, ExportedNet)
    assert {g.name: g.size for g in groups.groups} == {
        "stem.0": 8,
        "one.conv1": 8,
        "two.conv1": 16,
        "two.conv2": 8,
    }
    assert small.two.conv2.weight.shape == (8, 8, 3, 3)
    assert close(BACKEND.run(small, images), masked(shortcut, images, groups, kept))
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in shortcut.named_parameters()]
    assert shortcut.stem[0].out_channels == 8, "the argument is untouched"


def test_hard_coded_view_falls_back_and_twice(images, halve, settled):
    model = settled(Flat())
    once, kept, groups = halve(model, images, ratio=0.3)
    assert isinstance(once, ExportedNet)
    assert once.l.in_features == 4 * 9
    assert close(BACKEND.run(once, images), masked(model, images, groups, kept))
    twice, again, groups_again = halve(once, images)
    assert twice.c.out_channels == 2
    assert close(BACKEND.run(twice, images), masked(once, images, groups_again, again))
    cuts = [{name: units.tolist() for name, units in cut.items()} for cut in (kept, again)]
    assert history(twice) == [{"keep": cut} for cut in cuts]
    assert history(copy.deepcopy(twice)) == history(twice)
    assert [len(BACKEND.run(twice, (np.repeat(images[0][:1], n, 0),))) for n in (1, 2, 7)] == [1, 2, 7]


def test_cuts_replay_on_the_users_class(shortcut, images, halve):
    small, _, _ = halve(*[shortcut, images])
    small, _, _ = halve(small, images, seed=1)
    fresh = type(shortcut)()
    for step in history(small):
        groups = BACKEND.groups(fresh, (np.zeros((1, 3, 8, 8), "float32"),))
        fresh = BACKEND.keep(fresh, groups, {k: np.array(v) for k, v in step["keep"].items()})
    fresh.load_state_dict(small.state_dict())
    assert np.array_equal(BACKEND.run(fresh, images), BACKEND.run(small, images))


def test_what_is_left_is_traced_to_the_first_tensors(shortcut, images, halve):
    once, _, _ = halve(shortcut, images)
    small, _, _ = halve(once, images, seed=1)
    first, last, found = dict(shortcut.named_parameters()), dict(small.named_parameters()), lineage(small)
    assert {"stem.0.weight", "one.conv1.weight"} <= set(found)
    for name, axes in found.items():
        if name in first:
            expected = first[name].detach()
            for axis, indices in axes.items():
                expected = expected.index_select(axis, torch.from_numpy(indices))
            assert torch.equal(last[name], expected), name


def test_flexible_code_keeps_its_class_and_attributes(images, halve, settled):
    model = settled(Flexible())
    model.train()
    model.norm.eval()
    model.squeeze.weight.requires_grad_(False)
    small, kept, groups = halve(model, images)
    assert type(small) is Flexible
    by_layer = {layer: g for g in groups.groups for layer in g.layers}
    assert by_layer["a"].layers == ("a", "depthwise"), "concatenation moves channels without tying a to b"
    assert by_layer["b"].layers == ("b", "depthwise")
    assert len(set(by_layer["mid"].blocks.tolist())) == 4
    assert "excite" in by_layer["grouped"].layers
    assert (small.depthwise.groups, small.depthwise.in_channels) == (6, 6)
    assert (small.grouped.groups, small.grouped.in_channels, small.grouped.out_channels) == (4, 8, 4)
    assert small.norm.num_features == 6
    assert small.scale.shape == (4, 1, 1)
    assert small.slope.num_parameters == 4
    assert close(BACKEND.run(small, images), masked(model, images, groups, kept))
    assert small.training
    assert not small.norm.training
    assert not small.squeeze.weight.requires_grad
    assert small.mid.weight.requires_grad


def test_stand_in_trains_copies_pickles_and_compiles(shortcut, images, halve):
    small, _, _ = halve(shortcut, images)
    before, statistics = BACKEND.run(small, images), small.stem[1].running_mean.clone()
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    torch.nn.functional.cross_entropy(small(torch.from_numpy(images[0])), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert not torch.equal(small.stem[1].running_mean, statistics), "BatchNorm is in batch mode"
    assert all(p.grad is not None for p in small.parameters())
    torch.manual_seed(0)
    assert not torch.equal(*(small(torch.from_numpy(images[0])) for _ in range(2))), "dropout is on"
    after = BACKEND.run(small, images)
    assert small.training
    assert not np.allclose(before, after)
    twin, sent = copy.deepcopy(small), cloudpickle.loads(cloudpickle.dumps(small))
    small.head.weight.data.zero_()
    assert np.array_equal(BACKEND.run(twin, images), after)
    assert np.array_equal(BACKEND.run(sent, images), after)
    twin.eval()
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    assert np.allclose(compiled(torch.from_numpy(images[0])).detach(), after, atol=1e-6)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.one(x)) + x
        return self.last(torch.relu(self.two(x)) + x)


def test_tied_weights_stay_tied_and_count_once(halve, settled):
    x = (np.random.default_rng(1).normal(size=(2, 5)).astype("float32"),)
    model = settled(Tied())
    small, kept, groups = halve(model, x)
    assert small.one.weight is small.two.weight
    assert small.one.weight.shape == (4, 4)
    assert small.two.in_features == 4
    assert close(BACKEND.run(small, x), masked(model, x, groups, kept))
    assert BACKEND.operations(model, x).parameters == 5 * 8 + 8 + 64 + 8 + 8 + 8 * 3 + 3


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU())
        self.head = nn.Linear(12, 2)

    def forward(self, left, right):
        pair = [self.tower(x).mean((2, 3)) for x in (left, right)]
        return self.head(torch.cat(pair, 1))


def test_a_module_called_twice_with_two_inputs(halve, settled, images):
    model, pair = settled(Siamese()), (images[0], images[0][::-1].copy())
    small, kept, groups = halve(model, pair)
    assert small.tower[2].weight.shape == (3, 3, 3, 3)
    assert small.head.in_features == 6
    assert close(BACKEND.run(small, pair), masked(model, pair, groups, kept))


class Mixing(nn.Module):
    """Everything that must freeze channels, each after a convolution of its own."""

    def __init__(self):
        super().__init__()
        self.soft, self.sort, self.index, self.run, self.free = (nn.Conv2d(3, 8, 1) for _ in range(5))
        self.out = nn.Linear(8 * 4 + 1, 2)

    def forward(self, x):
        parts = [
            torch.softmax(self.soft(x), 1).mean((2, 3)),
            torch.sort(self.sort(x).mean((2, 3)), 1)[0],
            self.index(x).argmax(1).float().mean((1, 2)).unsqueeze(1),
            self.run(x).cumsum(1).mean((2, 3)),
            self.free(x).mean((2, 3)),
        ]
        return self.out(torch.cat(parts, 1))


def test_what_mixes_channels_is_frozen_with_a_reason(halve, settled, images):
    model = settled(Mixing())
    small, kept, groups = halve(model, images)
    assert [g.layers for g in groups.groups] == [("free",)]
    assert {"soft", "sort", "index", "run", "out"} == set(groups.frozen)
    assert "softmax" in groups.frozen["soft"]
    assert "test_cut.py" in groups.frozen["soft"]
    assert "without a rule" in groups.frozen["sort"]
    assert "chosen among" in groups.frozen["index"]
    assert "output of the model" in groups.frozen["out"]
    assert close(BACKEND.run(small, images), masked(model, images, groups, kept))


class Sliced(nn.Module):
    """Chunk, slice, cat, transpose, unflatten and zeros with widths in the code."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 12, 1)
        self.c = nn.Conv2d(12, 4, 1)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        y = torch.relu(self.a(x))
        left, right = y.chunk(2, 1)
        y = torch.cat([right, left], 1)
        y = self.b(y)
        y = torch.cat([y[:, 4:], y[:, :2], y.new_zeros(y.shape[0], 2, y.shape[2], y.shape[3])], 1)
        y = torch.relu(self.up(torch.relu(self.c(y))))
        y = y.flatten(1).unflatten(1, (6, 9, 9))
        return self.last(y.transpose(1, 2).mean((1, 3)).reshape(-1, 6))


def test_slices_and_joins_are_rewritten(halve, settled, images):
    model = settled(Sliced())
    for ratio, seed in ((0.4, 0), (0.7, 1)):
        small, kept, groups = halve(model, images, ratio, seed=seed)
        assert {layer for g in groups.groups for layer in g.layers} == {"a", "b", "c", "up"}
        assert close(BACKEND.run(small, images), masked(model, images, groups, kept))


def test_parametrized_and_hooked_weights_are_left_out(images):
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(256, 2),
    )
    before = BACKEND.run(model, images)
    groups = BACKEND.groups(model, images)
    assert [g.layers for g in groups.groups] == [("1",)]
    small = BACKEND.keep(model, groups, {"1": np.array([0, 3])})
    assert BACKEND.run(small, images).shape == before.shape


@pytest.mark.parametrize("units", [[], [1, 0], [0, 0], [8], [-1], [0.5]])
def test_wrong_units_are_refused(shortcut, images, units):
    groups = BACKEND.groups(shortcut, images)
    with pytest.raises(Refused, match="unit"):
        BACKEND.keep(shortcut, groups, {"stem.0": np.array(units)})


def test_unequal_blocks_foreign_groups_and_names_are_refused(images, settled):
    model = settled(Flexible())
    groups = BACKEND.groups(model, images)
    with pytest.raises(Refused, match="every block must keep equally many"):
        BACKEND.keep(model, groups, {"mid": np.array([0, 1, 2, 3, 4, 8, 12])})
    with pytest.raises(Refused, match="the group must be one of the model's"):
        BACKEND.keep(model, groups, {"nose": np.array([0])})
    plain = __import__("penjing.core.backend", fromlist=["Groups"]).Groups(groups.groups)
    with pytest.raises(Refused, match="torch backend"):
        BACKEND.keep(model, plain, {})


class NoGrad(nn.Module):
    """A gradient mode inside forward becomes a nested graph."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 2)
        self.width = width

    def forward(self, x):
        with torch.no_grad():
            y = self.a(x)
        y = torch.relu(self.c(self.b(y)))
        return self.d(y.view(-1, self.width) if self.width else y)


def test_a_nested_graph_freezes_or_is_refused(halve, settled):
    x = (np.ones((2, 4), "float32"),)
    model = settled(NoGrad(0))
    small, kept, groups = halve(model, x)
    assert {layer for g in groups.groups for layer in g.layers} == {"b", "c"}
    assert close(BACKEND.run(small, x), masked(model, x, groups, kept))
    with pytest.raises(Refused, match="written as code"):
        halve(settled(NoGrad(8)), x)


class FixedBatch(Flat):
    def forward(self, x):
        y = F.max_pool2d(F.relu(self.c(x)), 2)
        return self.l(y.reshape(3, 6 * 3 * 3))


def test_a_fixed_batch_is_refused(images):
    with pytest.raises(Refused, match="any batch size"):
        BACKEND.export(FixedBatch(), images, None)


def test_identity_and_single_layer(images):
    identity = nn.Identity()
    assert BACKEND.groups(identity, images).groups == ()
    counted = BACKEND.operations(identity, images)
    assert (counted.parameters, counted.multiply_adds, counted.uncounted) == (0, 0, ())
    single = nn.Conv2d(3, 4, 1)
    groups = BACKEND.groups(single, images)
    assert groups.groups == ()
    assert "output" in groups.frozen[""]
