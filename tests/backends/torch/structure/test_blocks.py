"""Blocks that can go: found on residual networks and transformers, taken out so that nothing else changes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from penjing import Refused
from penjing.backends.torch import BACKEND
from penjing.backends.torch.cut.shortened import Shortened
from penjing.backends.torch.structure.blocks import find_blocks, remove_blocks
from penjing.backends.torch.structure.history import history
from penjing.backends.torch.structure.pass_through import PassThrough

IMAGE = (np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype("float32"),)
TOKENS = (np.random.default_rng(0).integers(1, 30, (2, 6)),)


class Block(nn.Module):
    def __init__(self, before, after, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Residual(nn.Module):
    def __init__(self, blocks=(3, 3)):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(*[Block(8, 8) for _ in range(blocks[0])])
        self.layer2 = nn.Sequential(Block(8, 16, 2), *[Block(16, 16) for _ in range(blocks[1] - 1)])
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def test_residual_blocks_are_found_and_their_neighbours_have_reasons(settled):
    blocks = find_blocks(settled(Residual()), IMAGE)
    assert list(blocks.found) == ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2"]
    assert blocks.kept == {"layer2.0": "it makes [16, 4, 4] of [8, 8, 8] for each example"}


def test_without_blocks_it_is_the_shallower_network_with_the_same_weights(settled):
    model = settled(Residual((3, 3)))
    before = copy.deepcopy(model.state_dict())
    small = remove_blocks(model, find_blocks(model, IMAGE), ["layer1.1", "layer2.2"], IMAGE)
    by_hand = Residual((2, 2))
    names = {"layer1.0": "layer1.0", "layer1.2": "layer1.1", "layer2.0": "layer2.0", "layer2.1": "layer2.1"}
    weights = {}
    for name, tensor in model.state_dict().items():
        place = ".".join(name.split(".")[:2])
        if place in names:
            weights[name.replace(place, names[place])] = tensor
        elif not name.startswith("layer"):
            weights[name] = tensor
    by_hand.load_state_dict(weights)
    np.testing.assert_array_equal(BACKEND.run(small, IMAGE), BACKEND.run(by_hand, IMAGE))
    count = [sum(p.numel() for p in m.parameters()) for m in (small, by_hand)]
    assert count[0] == count[1]
    assert history(small) == [{"skip": ["layer1.1", "layer2.2"]}]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert isinstance(model.layer1[1], Block), "the argument is untouched"
    again = find_blocks(small, IMAGE)
    assert list(again.found) == ["layer1.0", "layer1.2", "layer2.1"]
    assert history(remove_blocks(small, again, ["layer1.0"], IMAGE))[-1] == {"skip": ["layer1.0"]}


def test_what_cannot_go_is_refused_by_name(settled):
    model = settled(Residual())
    blocks = find_blocks(model, IMAGE)
    with pytest.raises(Refused, match=r"layer2.0: it makes .*; nothing: no block of this name"):
        remove_blocks(model, blocks, ["layer2.0", "nothing"], IMAGE)


def test_a_chain_without_shortcuts_has_no_blocks(settled):
    conv = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)]
    blocks = find_blocks(settled(nn.Sequential(*conv, nn.Flatten(), nn.Linear(192, 4))), IMAGE)
    assert not blocks.found
    assert blocks.kept == dict.fromkeys("012", "it has no path around its weights")


def test_a_block_that_holds_a_smaller_one_counts_as_a_whole(settled):
    class Excite(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 2), nn.Linear(2, 12)

        def forward(self, x):
            return x * torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3))))))[:, :, None, None]

    class Inverted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 12, 1), Excite(), nn.ReLU(), nn.Conv2d(12, 3, 1))

        def forward(self, x):
            return x.add_(self.body(x))

    model = settled(nn.Sequential(Inverted(), Inverted(), nn.Flatten(), nn.Linear(192, 4)))
    assert list(find_blocks(model, IMAGE).found) == ["0", "1"], "not 0.body.1"
    stages = nn.Sequential(nn.Sequential(Inverted(), Inverted()), nn.Sequential(Inverted(), Inverted()))
    assert list(find_blocks(settled(stages), IMAGE).found) == ["0.0", "0.1", "1.0", "1.1"]


def test_shared_and_uncalled_modules_stay(settled):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(3, 3), Block(3, 3), Block(3, 3)])

        def forward(self, x):
            return self.blocks[1](self.blocks[0](self.blocks[0](x)))

    blocks = find_blocks(settled(Twice()), IMAGE)
    assert list(blocks.found) == ["blocks.1"]
    assert blocks.kept == {
        "blocks.0": "it runs 2 times in a pass",
        "blocks.2": "the model does not call it as a module",
    }


def test_code_that_reads_a_block_keeps_it_and_numbers_are_passed_on(settled):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(3, 3), Block(3, 3)])
            for number, block in enumerate(self.blocks):
                block.gain = 1.0 + number

        def forward(self, x):
            x = x * self.blocks[0].conv1.weight.mean()
            for block in self.blocks:
                x = block(x) * block.gain
            return x

    model = settled(Reader()).eval()
    blocks = find_blocks(model, IMAGE)
    assert list(blocks.found) == ["blocks.1"]
    assert "conv1" in blocks.kept["blocks.0"]
    small = remove_blocks(model, blocks, ["blocks.1"], IMAGE)
    assert small.blocks[1].gain == 2.0
    with torch.no_grad():
        x = torch.from_numpy(IMAGE[0])
        wanted = 2.0 * model.blocks[0](x * model.blocks[0].conv1.weight.mean())
    np.testing.assert_allclose(BACKEND.run(small, IMAGE), wanted.numpy(), rtol=1e-6)


def test_a_tuple_of_more_is_passed_on_where_the_block_got_it(settled):
    class Pair(Block):
        def forward(self, x, *, bias=None, cache=None):
            return super().forward(x), None, bias

    class Fresh(Block):
        def forward(self, x, *, bias=None):
            return super().forward(x), x.mean()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Pair(3, 3), Pair(3, 3)])
            self.others = nn.ModuleList([Fresh(3, 3), Block(3, 3)])

        def forward(self, x):
            bias = torch.ones(1)
            for block in self.blocks:
                x, _, bias = block(x, bias=bias)
            return self.others[1](self.others[0](x)[0]) * bias

    model = settled(Net()).eval()
    blocks = find_blocks(model, IMAGE)
    assert list(blocks.found) == ["blocks.0", "blocks.1", "others.1"]
    assert blocks.kept == {"others.0": "it also returns Tensor that it did not get"}
    small = remove_blocks(model, blocks, ["blocks.0", "blocks.1"], IMAGE)
    with torch.no_grad():
        x = torch.from_numpy(IMAGE[0])
        wanted = model.others[1](model.others[0](x)[0])
    np.testing.assert_allclose(BACKEND.run(small, IMAGE), wanted.numpy(), rtol=1e-6)


def bert(layers=3):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
    )
    torch.manual_seed(0)
    return BACKEND.select(transformers.BertForSequenceClassification(config).eval(), "logits")


def test_layers_of_bert_go_and_it_is_the_shallower_bert():
    model = bert()
    blocks = find_blocks(model, TOKENS)
    names = [f"model.bert.encoder.layer.{i}" for i in range(3)]
    assert list(blocks.found) == names
    small = remove_blocks(model, blocks, names[1:2], TOKENS)
    by_hand = bert(2)
    weights = {n: t for n, t in model.state_dict().items() if names[1] not in n}
    by_hand.load_state_dict({n.replace("layer.2.", "layer.1."): t for n, t in weights.items()})
    np.testing.assert_array_equal(BACKEND.run(small, TOKENS), BACKEND.run(by_hand, TOKENS))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "T5Encoder", "Albert", "GPT2"])
def test_other_transformers_have_blocks_or_a_reason(family):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
    }
    if family == "T5Encoder":
        made = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}
        config = transformers.T5Config(**made)
    elif family == "GPT2":
        config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=3, n_head=2, n_positions=16)
    elif family == "Albert":
        del sizes["num_key_value_heads"]
        config = transformers.AlbertConfig(**sizes, embedding_size=16)
    else:
        config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    model = BACKEND.select(getattr(transformers, f"{family}Model")(config).eval(), "last_hidden_state")
    blocks = find_blocks(model, TOKENS)
    if family == "Albert":
        assert not blocks.found
        assert "it runs 3 times in a pass" in blocks.kept.values()
        return
    # T5 has a residual around attention and another around its feed-forward part, and its first attention
    # makes the position bias of all.
    assert len(blocks.found) == (5 if family == "T5Encoder" else 3)
    small = remove_blocks(model, blocks, list(blocks.found)[:1], TOKENS)
    assert BACKEND.run(small, TOKENS).shape == (2, 6, 16)
    assert np.abs(BACKEND.run(small, TOKENS) - BACKEND.run(model, TOKENS)).max() > 1e-3


def test_divergence_is_measured_after_statistics_are_taken_anew(settled):
    model = settled(Residual())
    state = copy.deepcopy(model.state_dict())
    blocks = find_blocks(model, IMAGE)
    x = np.random.default_rng(1).normal(size=(64, 3, 8, 8)).astype("float32")
    shortened = Shortened(model, blocks, [(x,)], model, logits=True)
    found = shortened.divergence(["layer1.1"])

    small = remove_blocks(model, blocks, ["layer1.1"], IMAGE)
    for module in small.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    small.train()
    with torch.no_grad():
        by_hand = F.kl_div(
            F.log_softmax(small(torch.from_numpy(x)), 1),
            F.log_softmax(model.eval()(torch.from_numpy(x)), 1),
            log_target=True,
            reduction="batchmean",
        )
    assert found == pytest.approx(float(by_hand), rel=1e-4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(m, PassThrough) for m in model.modules())


def test_influence_is_that_of_the_blocks_own_input_and_output(settled):
    model = settled(Residual())
    with torch.no_grad():
        model.layer1[1].bn2.weight.zero_()
        model.layer1[1].bn2.bias.zero_()
    shortened = Shortened(model, find_blocks(model, IMAGE), [IMAGE], model, logits=True)
    influences = shortened.influences()
    assert influences["layer1.1"] == pytest.approx(0, abs=1e-9)
    assert min(v for k, v in influences.items() if k != "layer1.1") > 1e-3
