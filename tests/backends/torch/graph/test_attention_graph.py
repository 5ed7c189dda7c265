"""Attention by heads and by width, normalized residual streams, tied embeddings, in many dialects."""

import copy
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.nn import functional as F

from oracles.selection import select
from penjing.backends.torch import BACKEND
from penjing.backends.torch.cut.exported import ExportedNet
from penjing.backends.torch.structure.history import history

sys.path.insert(0, str(Path(__file__).parent))
from transformer_blocks import ATTENTIONS, FEEDS, NORMS, Transformer

torch.set_num_threads(1)
IDS = (np.random.default_rng(0).integers(0, 11, (2, 5)),)


def cut(model, inputs, heads="whole", ratio=0.5, seed=0, kinds=("channel", "head", "head width", "hidden")):
    groups = BACKEND.groups(model, inputs, heads)
    rng = np.random.default_rng(seed)
    kept = {g.name: select(rng.random(g.size), ratio, g.blocks, 1) for g in groups.groups if g.kind in kinds}
    return BACKEND.keep(model, groups, kept), kept, groups


def zeroed(model, groups, kept):
    """The slow oracle where nothing is normalized: every row and every column of what goes is zero."""
    model = copy.deepcopy(model)
    for group in groups.groups:
        for slot in group.slots:
            if group.name in kept and slot.layer is not None:
                tensors = dict(model.named_parameters()) | dict(model.named_buffers())
                tensor = tensors[f"{slot.layer}.{slot.tensor}".lstrip(".")]
                gone = (slot.units >= 0) & ~np.isin(slot.units, kept[group.name])
                assert len(gone) == tensor.shape[slot.axis]
                tensor.data[(slice(None),) * slot.axis + (torch.from_numpy(gone),)] = 0
    return BACKEND.run(model, IDS)


def close(a, b, tolerance=1e-5):
    return a.shape == b.shape and np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("heads", ["whole", "width"])
def test_heads_and_widths_in_every_dialect(settled, attention, heads):
    model = settled(Transformer([(attention, "gated")], "none"))
    small, kept, groups = cut(model, IDS, heads)
    kinds = {group.kind for group in groups.groups}
    one_key = attention == "one key" and heads == "whole"
    assert ("head" if heads == "whole" else "head width") in kinds
    assert not (heads == "whole" and "head width" in kinds)
    if attention != "normalized" or heads == "whole":
        assert close(BACKEND.run(small, IDS), zeroed(model, groups, kept))
    sizes = {group.size for group in groups.groups if group.kind == "head"}
    assert sizes <= {2 if attention in ("grouped", "rotary") else 3 if one_key else 4}
    assert all(small_p.numel() for small_p in small.parameters())
    assert history(small)[-1].get("heads", "whole") == heads


def test_fused_rows_of_one_head_go_together(settled):
    model = settled(Transformer([("fused", "plain")]))
    _, _, groups = cut(model, IDS)
    [group] = [g for g in groups.groups if g.kind == "head"]
    slots = {(s.layer, s.tensor, s.axis): s for s in group.slots}
    assert set(slots) == {
        ("attentions.0.qkv", "weight", 0),
        ("attentions.0.qkv", "bias", 0),
        ("attentions.0.proj", "weight", 1),
        ("attentions.0", "bias", 0),
    }
    assert (
        slots["attentions.0.qkv", "weight", 0].units.tolist() == np.tile(np.arange(4).repeat(5), 3).tolist()
    )
    assert slots["attentions.0.proj", "weight", 1].role == "in"
    assert group.layers == ("attentions.0.qkv",)


@pytest.mark.parametrize("norm", NORMS)
def test_the_residual_stream_of_tied_embeddings(settled, norm):
    model = settled(Transformer([("rotary", "half gated"), ("fused", "plain")], norm))
    small, _, groups = cut(model, IDS, kinds=("hidden", "channel"))
    stream = next(g for g in groups.groups if "tokens" in g.layers)
    assert (stream.size, stream.kind) == (16, "channel" if norm == "none" else "hidden")
    assert {"tokens", "attentions.0.o", "feeds.0.down", "attentions.1.proj"} <= set(stream.layers)
    assert small.head.weight is small.tokens.weight
    assert small.tokens.weight.shape == (11, 8)
    assert small.positions.shape == (1, 5, 8)
    assert "tokens" not in groups.frozen


def test_layer_norm_sees_only_what_is_left(settled):
    model = settled(nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
    x = np.random.default_rng(1).normal(size=(4, 3)).astype("float32")
    groups = BACKEND.groups(model, (x,))
    [group] = groups.groups
    units = np.array([0, 2, 3, 6])
    small = BACKEND.keep(model, groups, {group.name: units})
    assert type(small) is nn.Sequential
    assert small[1].normalized_shape == (4,)
    t = {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}
    h = (x @ t["0.weight"].T + t["0.bias"])[:, units]
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
    expected = (h * t["1.weight"][units] + t["1.bias"][units]) @ t["2.weight"][:, units].T + t["2.bias"]
    assert np.allclose(BACKEND.run(small, (x,)), expected, atol=1e-5)


def test_group_norm_keeps_equally_many_in_every_group(settled, images):
    layers = [nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.GroupNorm(1, 6)]
    model = settled(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)))
    groups = BACKEND.groups(model, images)
    assert [(g.kind, len(set(g.blocks.tolist()))) for g in groups.groups] == [("channel", 3), ("hidden", 1)]
    small = BACKEND.keep(model, groups, {"0": np.array([1, 3, 4, 7, 8, 10]), "3": np.array([0, 4])})
    assert (small[1].num_channels, small[4].num_channels) == (6, 2)
    p = dict(model.named_parameters())
    with torch.no_grad():
        h = model[0](torch.from_numpy(images[0]))[:, [1, 3, 4, 7, 8, 10]]
        h = F.group_norm(h, 3, p["1.weight"][[1, 3, 4, 7, 8, 10]], p["1.bias"][[1, 3, 4, 7, 8, 10]])
        h = F.conv2d(h.relu(), p["3.weight"][[0, 4]][:, [1, 3, 4, 7, 8, 10]], p["3.bias"][[0, 4]])
        h = F.group_norm(h, 1, p["4.weight"][[0, 4]], p["4.bias"][[0, 4]]).mean((2, 3))
        expected = (h @ p["7.weight"][:, [0, 4]].T + p["7.bias"]).numpy()
    assert close(BACKEND.run(small, images), expected)


class Library(nn.Module):
    """torch's own layers."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(3, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        y = self.layer(self.inside(x))
        return self.head(self.attention(y, y, y, need_weights=False)[0].mean(1))


def test_layers_of_torch_itself(settled):
    model = settled(Library())
    x = (np.random.default_rng(2).normal(size=(2, 5, 3)).astype("float32"),)
    small, _, groups = cut(model, x)
    assert sorted(g.kind for g in groups.groups) == ["channel", "channel", "head", "head", "hidden"] or (
        sorted(g.kind for g in groups.groups) == ["channel", "head", "head", "hidden", "hidden"]
    )
    assert isinstance(small, ExportedNet)
    assert small.layer.self_attn.in_proj_weight.shape == (3 * 2 * 4, 8)
    small.train()
    small(torch.from_numpy(x[0])).square().mean().backward()
    assert small.layer.self_attn.in_proj_weight.grad.abs().sum() > 0
    again, _, _ = cut(small.eval(), x, seed=1)
    assert again.layer.linear1.weight.shape[0] == 6


def test_a_cut_transformer_exports(settled, tmp_path):
    model = settled(Transformer([("rotary", "gated"), ("fused", "plain")]))
    small, _, _ = cut(model, IDS)
    BACKEND.export(small, IDS, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        ids = np.random.default_rng(batch).integers(0, 11, (batch, 5))
        assert close(
            session.run(None, {session.get_inputs()[0].name: ids})[0], BACKEND.run(small, (ids,)), 1e-4
        )


def test_weights_on_the_meta_device_have_a_graph(settled):
    build = [("rotary", "gated"), ("chunked", "plain")]
    real = BACKEND.groups(settled(Transformer(build)), IDS)
    with torch.device("meta"):
        meta = BACKEND.groups(Transformer(build), IDS)
    assert [(g.name, g.size, g.kind, g.layers) for g in meta.groups] == [
        (g.name, g.size, g.kind, g.layers) for g in real.groups
    ]


BLOCKS = st.lists(
    st.tuples(st.sampled_from(sorted(ATTENTIONS)), st.sampled_from(sorted(FEEDS))), min_size=1, max_size=2
)
COMMON = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)


@settings(COMMON, max_examples=6)
@given(
    BLOCKS,
    st.sampled_from(sorted(NORMS)),
    st.booleans(),
    st.sampled_from(["whole", "width"]),
    st.floats(0.1, 0.9),
    st.integers(0, 99),
)
def test_random_transformers_shrink_train_and_shrink_again(settled, blocks, norm, tied, heads, ratio, seed):
    model = settled(Transformer(blocks, norm, tied=tied), seed)
    small, kept, groups = cut(model, IDS, heads, ratio, seed)
    if norm == "none" and "normalized" not in [name for name, _ in blocks]:
        assert close(BACKEND.run(small, IDS), zeroed(model, groups, kept), 1e-4)
    layers = {layer.name for layer in BACKEND.layers(model) if layer.kind in ("linear", "embedding")}
    assert layers - {"head"} <= {layer for g in groups.groups for layer in g.layers} | set(groups.frozen)
    small.train()
    small(torch.from_numpy(IDS[0])).square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in small.parameters())
    cut(small.eval(), IDS, heads, 0.2, seed)
