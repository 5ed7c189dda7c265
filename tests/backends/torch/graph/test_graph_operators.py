"""Operators that move channels, each in a small net: what goes together, and cut nets equal masked ones."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from oracles.selection import select
from penjing import Refused
from penjing.backends.torch import BACKEND
from penjing.backends.torch.cut.exported import ExportedNet

torch.set_num_threads(1)
X = (np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype("float32"),)


class Net(nn.Module):
    """Convolutions by name around a function that is the forward."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def conv(wide, out, kernel=1, **options):
    return nn.Conv2d(wide, out, kernel, **options)


def pooled(y):
    return y.mean((2, 3))


def cut(model, inputs, ratio=0.5, seed=0, heads="whole"):
    groups = BACKEND.groups(model, inputs, heads)
    rng = np.random.default_rng(seed)
    kept = {g.name: select(rng.random(g.size), ratio, g.blocks, 1) for g in groups.groups}
    return BACKEND.keep(model, groups, kept), kept, groups


def zeroed(model, inputs, groups, kept):
    """The slow oracle: rows and columns of what goes are zero."""
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for group in groups.groups:
            for slot in group.slots:
                tensor = tensors[f"{slot.layer}.{slot.tensor}".lstrip(".")]
                gone = torch.from_numpy((slot.units >= 0) & ~np.isin(slot.units, kept[group.name]))
                if len(gone) == tensor.shape[slot.axis]:
                    tensor[(slice(None),) * slot.axis + (gone,)] = 0
                    continue
                for block, columns in zip(
                    tensor.chunk(len(gone) // tensor.shape[1]), gone.split(tensor.shape[1]), strict=True
                ):
                    block[:, columns] = 0
    return BACKEND.run(model, inputs)


def close(a, b, tolerance=1e-5):
    return a.shape == b.shape and np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6)


def shuffled(y, blocks):
    n, c, h, w = y.shape
    return y.view(n, blocks, c // blocks, h, w).transpose(1, 2).reshape(n, c, h, w)


def shuffle_net(self, x):
    left, right = self.a(x).chunk(2, 1)
    y = shuffled(torch.cat([left, self.b(right).relu()], 1), 2)
    left, right = y.chunk(2, 1)
    return self.head(pooled(torch.cat([left, self.c(right)], 1)))


def grouped_shuffle(self, x):
    return self.head(pooled(self.c(shuffled(self.b(self.a(x)), 2).relu())))


def windows(self, x):
    y = F.unfold(self.a(x), 3, padding=1)
    y = F.fold(self.b(y).relu(), (8, 8), 3, padding=1)
    return self.head(pooled(y))


CASES = {
    # forward, modules, sizes of the groups by their first layer, whether the user's class goes on
    "pixel shuffle": (
        lambda self, x: self.head(pooled(F.pixel_unshuffle(F.pixel_shuffle(self.a(x), 2).relu(), 4))),
        lambda: {"a": conv(3, 16), "head": nn.Linear(4 * 16, 2)},
        {"a": 4},
        True,
    ),
    "channel shuffle": (
        shuffle_net,
        lambda: {"a": conv(3, 8), "b": conv(4, 4), "c": conv(4, 4), "head": nn.Linear(8, 2)},
        {"a": 2, "a#2": 2, "a#3": 4, "c": 4},
        None,
    ),
    "grouped convolution and shuffle": (
        grouped_shuffle,
        lambda: {
            "a": conv(3, 8),
            "b": conv(8, 12, groups=2),
            "c": conv(12, 8, groups=2),
            "head": nn.Linear(8, 2),
        },
        {"a": 8, "b": 6, "c": 8},
        True,
    ),
    "im2col and col2im": (
        windows,
        lambda: {"a": conv(3, 4), "b": nn.Conv1d(36, 45, 1), "head": nn.Linear(5, 2)},
        {"a": 4, "b": 5},
        True,
    ),
    "transposed convolution in blocks": (
        lambda self, x: self.head(pooled(self.c(self.b(self.a(x)).relu()))),
        lambda: {
            "a": conv(3, 8),
            "b": nn.ConvTranspose2d(8, 12, 2, groups=2),
            "c": nn.ConvTranspose2d(12, 12, 2, groups=12),
            "head": nn.Linear(12, 2),
        },
        {"a": 8, "b": 12},
        True,
    ),
    "depthwise transposed, two channels each": (
        lambda self, x: self.head(pooled(self.b(self.a(x)).relu())),
        lambda: {"a": conv(3, 6), "b": nn.ConvTranspose2d(6, 12, 2, groups=6), "head": nn.Linear(12, 2)},
        {"a": 6},
        True,
    ),
    "strided slices": (
        lambda self, x: self.head(pooled(self.a(x)[:, ::2].relu() * self.b(x).sigmoid())),
        lambda: {"a": conv(3, 12), "b": conv(3, 6), "head": nn.Linear(6, 2)},
        {"a": 6},
        False,
    ),
    "narrow and select": (
        lambda self, x: self.head(pooled(self.a(x).narrow(1, 2, 5).relu() * self.a(x)[:, 1:2])),
        lambda: {"a": conv(3, 9), "head": nn.Linear(5, 2)},
        {"a": 5},
        False,
    ),
    "gated linear unit": (
        lambda self, x: self.head(pooled(F.glu(self.a(x), 1))),
        lambda: {"a": conv(3, 12), "head": nn.Linear(6, 2)},
        {"a": 6},
        True,
    ),
    "constant indices": (
        lambda self, x: self.head((y := pooled(self.a(x)).relu())[:, [5, 0, 3, 1]] + y[:, [2, 4, 1, 0]]),
        lambda: {"a": conv(3, 6), "head": nn.Linear(4, 2)},
        {},
        None,
    ),
    "flip, tile, repeat": (
        lambda self, x: self.head(
            pooled(self.a(x).flip(1).repeat(1, 2, 1, 1).repeat_interleave(2, 1).roll(3, 2))
        ),
        lambda: {"a": conv(3, 6), "head": nn.Linear(24, 2)},
        {"a": 6},
        True,
    ),
    "normalized vectors": (
        lambda self, x: F.normalize(self.a(pooled(x)), dim=1) @ F.normalize(self.b(pooled(x)), dim=1).T,
        lambda: {"a": nn.Linear(3, 8), "b": nn.Linear(3, 8)},
        {"a": 8},
        True,
    ),
    "stacked and summed": (
        lambda self, x: self.head(torch.stack([pooled(self.a(x)), pooled(self.b(x).relu())], 1).sum(1)),
        lambda: {"a": conv(3, 6), "b": conv(3, 6), "head": nn.Linear(6, 2)},
        {"a": 6},
        True,
    ),
    "attention over channels": (
        lambda self, x: self.head(
            pooled(self.a(x) * self.m(torch.stack([self.a(x).mean(1), self.a(x).amax(1)], 1)).sigmoid())
        ),
        lambda: {"a": conv(3, 8), "m": conv(2, 1, 3, padding=1), "head": nn.Linear(8, 2)},
        {"a": 8},
        True,
    ),
    "split into an image": (
        lambda self, x: self.head(pooled(self.up(self.a(x.flatten(1)).relu().unflatten(1, (8, 3, 3))))),
        lambda: {"a": nn.Linear(192, 72), "up": nn.ConvTranspose2d(8, 4, 2), "head": nn.Linear(4, 2)},
        {"a": 8, "up": 4},
        False,
    ),
    "numbers in a row": (
        lambda self, x: self.head((y := pooled(self.a(x))) * torch.arange(1, y.shape[1] + 1) / 8),
        lambda: {"a": conv(3, 8), "head": nn.Linear(8, 2)},
        {"a": 8},
        False,
    ),
    "chosen by a tensor": (
        lambda self, x: self.head(
            torch.gather(
                self.a(x).flatten(2), 2, self.b(x).flatten(2).argsort(-1)[:, :1, :4].expand(-1, 8, -1)
            ).mean(2)
        ),
        lambda: {"a": conv(3, 8), "b": conv(3, 8), "head": nn.Linear(8, 2)},
        {"a": 8},
        False,
    ),
    "einsum": (
        lambda self, x: self.head(torch.einsum("nchw,nchw->nc", self.a(x), self.b(x)) @ self.m),
        lambda: {"a": conv(3, 6), "b": conv(3, 6), "head": nn.Linear(5, 2)},
        {"a": 6, "": 5},
        True,
    ),
    "interactions of embeddings": (
        lambda self, x: torch.bmm(
            t := torch.stack([self.a(pooled(x)), self.b(pooled(x)).relu()], 1), t.mT
        ).flatten(1),
        lambda: {"a": nn.Linear(3, 8), "b": nn.Linear(3, 8)},
        {"a": 8},
        True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_channels_move(settled, name):
    forward, modules, sizes, own = CASES[name]
    model = Net(forward, **modules())
    if name == "einsum":
        model.m = nn.Parameter(torch.zeros(6, 5))
    model = settled(model)
    for ratio, seed in ((0.5, 0), (0.2, 1)):
        small, kept, groups = cut(model, X, ratio, seed)
        if sizes:
            assert {g.name: g.size for g in groups.groups} == sizes
        if own is not None and kept and ratio == 0.5:
            assert isinstance(small, ExportedNet) != own
        if {g.kind for g in groups.groups} == {"channel"}:
            assert close(BACKEND.run(small, X), zeroed(model, X, groups, kept))
    small.train()
    small(torch.from_numpy(X[0])).square().mean().backward()


class Bags(nn.Module):
    """A recommender: bags of numbers and one table, dense features beside."""

    def __init__(self):
        super().__init__()
        self.bag, self.table = nn.EmbeddingBag(20, 6, mode="mean"), nn.Embedding(10, 4)
        self.dense, self.up, self.head = nn.Linear(3, 5), nn.Linear(15, 8), nn.Linear(8, 1)

    def forward(self, bags, item, features):
        joined = torch.cat([self.bag(bags), self.table(item), self.dense(features).relu()], 1)
        return self.head(self.up(joined).relu())


def test_embeddings_of_recommenders(settled):
    rng = np.random.default_rng(0)
    inputs = (rng.integers(0, 20, (2, 4)), rng.integers(0, 10, 2), rng.normal(size=(2, 3)).astype("float32"))
    small, kept, groups = cut(settled(Bags()), inputs)
    assert {g.name: g.size for g in groups.groups} == {"bag": 6, "table": 4, "dense": 5, "up": 8}
    assert type(small) is Bags
    assert (small.bag.embedding_dim, small.table.embedding_dim, small.up.in_features) == (3, 2, 3 + 2 + 3)
    assert close(BACKEND.run(small, inputs), zeroed(settled(Bags()), inputs, groups, kept))


class Outputs(nn.Module):
    """Two heads in a dictionary with a tuple, a width in the code."""

    def __init__(self):
        super().__init__()
        self.body, self.one, self.two = conv(3, 8), nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x):
        y = pooled(self.body(x)).view(-1, 8)
        return {"scores": self.one(y), "more": (self.two(y.relu()), y.sum(1))}


def test_all_outputs_stay_and_are_compared(settled):
    model = settled(Outputs())
    small, kept, groups = cut(model, X)
    assert isinstance(small, ExportedNet)
    assert small.body.out_channels == 4
    assert set(groups.frozen) == {"one", "two"}
    twin = copy.deepcopy(small)
    with torch.no_grad():
        found, gone = twin(torch.from_numpy(X[0])), np.setdiff1d(np.arange(8), kept["body"])
        y = pooled(model.body(torch.from_numpy(X[0])))
        y[:, gone] = 0
    assert torch.allclose(found["scores"], model.one(y), atol=1e-5)
    assert torch.allclose(found["more"][0], model.two(y.relu()), atol=1e-5)
    assert torch.allclose(found["more"][1], y.sum(1), atol=1e-5)


class Table(nn.Module):
    """A mask that is no buffer, a table computed without gradients from one, a width in the code."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.mask = torch.arange(1.0, 9.0)
        self.register_buffer("rates", torch.linspace(0.1, 1, 8))

    def forward(self, x):
        with torch.no_grad():
            scale = torch.cos(self.rates)
        return self.head((self.up(x.mean((2, 3))) * scale * self.mask).view(-1, 8))


def test_constants_and_tables_follow(settled):
    model = settled(Table())
    small, kept, groups = cut(model, X)
    assert isinstance(small, ExportedNet)
    assert len(small.rates) == 4
    expected = zeroed(model, X, groups, kept)
    assert close(BACKEND.run(small, X), expected)
    assert close(BACKEND.run(copy.deepcopy(small), X), expected)


def test_a_model_without_weights_is_not_cut(settled):
    model = Outputs().to("meta")
    groups = BACKEND.groups(model, X)
    assert [g.name for g in groups.groups] == ["body"]
    with pytest.raises(Refused, match="must have its weights"):
        BACKEND.keep(model, groups, {"body": np.array([0])})


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.rnn, self.down = nn.Linear(3, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.down(self.rnn(self.up(x.flatten(2).transpose(1, 2)))[0][:, -1]).relu())


def test_recurrent_layers_are_frozen_with_the_reason(settled):
    groups = BACKEND.groups(settled(Recurrent()), X)
    assert [g.name for g in groups.groups] == ["down"]
    assert "without a rule (lstm.input" in groups.frozen["up"]
