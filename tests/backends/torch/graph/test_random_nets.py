"""Random networks, pruned at random ratios: the forward works and equals the masked one; trains; exports."""

import os
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnxruntime
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from penjing.backends.torch import BACKEND

COMMON = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)


class Random(nn.Module):
    """A graph drawn as a list of (operator, choice of input, choice of width)."""

    def __init__(self, recipe, pool, hard_coded):
        super().__init__()
        self.plan, self.pool, self.hard_coded = [], pool, hard_coded
        widths = [3]
        for name, source, width in recipe:
            source %= len(widths)
            self._add(name, source, width, widths)
        joined = sum(widths[1:]) if len(widths) > 1 else 3
        self.features = joined * (4 if pool else 1)
        self.head = nn.Linear(self.features, 3)

    def _add(self, name, source, width, widths):
        wide = widths[source]
        module, other = None, None
        if name == "conv":
            module, out = nn.Conv2d(wide, width, 3, padding=1, bias=width % 2 == 0), width
        elif name == "depthwise":
            module, out = (
                nn.Conv2d(wide, wide * (1 + width % 2), 3, padding=1, groups=wide),
                wide * (1 + width % 2),
            )
        elif name == "grouped":
            blocks = next(b for b in (4, 3, 2, 1) if wide % b == 0)
            module, out = nn.Conv2d(wide, width * blocks, 1, groups=blocks), width * blocks
        elif name == "norm":
            module, out = nn.BatchNorm2d(wide), wide
        elif name in ("add", "mul"):
            other = next(
                (i for i in reversed(range(len(widths))) if widths[i] == wide and i != source), source
            )
            out = wide
        elif name == "cat":
            other = width % len(widths)
            out = wide + widths[other]
        elif name == "split":
            out = wide - wide // 2
        else:
            out = wide
        if out > 24:
            return
        if module is not None:
            self.add_module(f"m{len(widths)}", module)
        self.plan.append((name, source, other))
        widths.append(out)

    def forward(self, x):
        values = [x]
        for number, (name, source, other) in enumerate(self.plan, 1):
            y = values[source]
            if name in ("conv", "depthwise", "grouped", "norm"):
                y = getattr(self, f"m{number}")(y)
            elif name == "add":
                y = y + values[other]
            elif name == "mul":
                y = y * torch.sigmoid(values[other].mean((2, 3), keepdim=True))
            elif name == "cat":
                y = torch.cat([y, values[other]], 1)
            elif name == "split":
                y = y[:, y.shape[1] // 2 :]
            elif name == "hard_split":
                y = y.clone()
            else:
                y = getattr(torch, name)(y)
            values.append(y)
        y = torch.cat(values[1:] or values, 1)
        y = nn.functional.adaptive_avg_pool2d(y, 2 if self.pool else 1)
        return self.head(y.view(-1, self.features) if self.hard_coded else y.flatten(1))


STEP = st.tuples(
    st.sampled_from(
        ["conv", "conv", "conv", "depthwise", "grouped", "norm", "relu", "tanh", "add", "mul", "cat", "split"]
    ),
    st.integers(0, 9),
    st.integers(2, 8),
)
NETS = st.builds(Random, st.lists(STEP, min_size=1, max_size=9), st.booleans(), st.booleans())
X = (np.random.default_rng(5).normal(size=(2, 3, 5, 5)).astype("float32"),)


def oracle(model, groups, kept):
    """Zero the removed units' columns in a copy."""
    model = BACKEND.copy(model)
    for group in groups.groups:
        for slot in (s for s in group.slots if s.role == "in"):
            weight = BACKEND.read(model, slot.layer)[slot.tensor]
            stays = (slot.units < 0) | np.isin(slot.units, kept[group.name])
            blocks = len(stays) // weight.shape[1]
            view = weight.reshape(blocks, -1, *weight.shape[1:])
            view *= stays.reshape(blocks, 1, -1, *[1] * (weight.ndim - 2))
            BACKEND.write(model, slot.layer, {slot.tensor: view.reshape(weight.shape)})
    return model


@settings(COMMON, max_examples=int(os.environ.get("PENJING_EXAMPLES", "40")))
@given(NETS, st.floats(0.05, 0.95), st.sampled_from([1, 2]), st.integers(0, 99))
def test_shrunk_equals_masked_and_trains(settled, halve, net, ratio, round_to, seed):
    net = settled(net, seed)
    small, kept, groups = halve(net, X, ratio, round_to, seed)
    expected = BACKEND.run(oracle(net, groups, kept), X)
    assert np.abs(BACKEND.run(small, X) - expected).max() <= 1e-4 * max(np.abs(expected).max(), 1e-3)
    layers = {layer.name for layer in BACKEND.layers(net) if layer.kind in ("conv", "depthwise", "linear")}
    reported = {layer for g in groups.groups for layer in g.layers} | set(groups.frozen)
    assert layers <= reported | _unused(net)
    small.train()
    small(torch.from_numpy(X[0])).square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in small.parameters())


def _unused(net):
    return {f"m{i}" for i in range(1, 20)} if not net.plan else set()


@settings(COMMON, max_examples=2)
@given(NETS, st.integers(0, 99))
def test_exported_after_the_cut(settled, halve, net, seed):
    small, _, _ = halve(settled(net, seed), X, 0.5, 1, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.onnx"
        BACKEND.export(small, X, path)
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        x = np.random.default_rng(batch).normal(size=(batch, 3, 5, 5)).astype("float32")
        expected = BACKEND.run(small, (x,))
        assert np.abs(session.run(None, {"x": x})[0] - expected).max() <= 1e-4 * max(
            np.abs(expected).max(), 1e-3
        )
