"""Blocks that are left out by chance, and blocks that are computed again."""

import pytest
import torch
from torch import nn

from penjing.core.errors import Refused
from penjing.core.task import Task
from penjing.train.depth import wrap_blocks
from penjing.train.loop import fit
from penjing.train.objective import make_objective
from penjing.train.strategy import Strategy

LOSS = make_objective(Task(train=None))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm, self.drop = (
            nn.Conv2d(width, width, 3, 1, 1),
            nn.BatchNorm2d(width),
            nn.Dropout(0.1),
        )

    def forward(self, x):
        return x + self.drop(self.norm(self.conv(x)).relu())


def residual(seed=0, blocks=4):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = [Residual(8) for _ in range(blocks)]
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, 1, 1), *body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)
        )


def run(split, **fields):
    model = residual()
    done = fit(model, split, LOSS, Strategy(**{"epochs": 1, "batch_size": 50, **fields}))
    assert not any("forward" in vars(module) for module in model.modules())
    return model, done


def test_recomputing_changes_nothing_but_the_memory(split):
    plain, _ = run(split)
    again, _ = run(split, recompute=True)
    for (name, a), b in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def kept_bytes(model, x, strategy):
    """Bytes that autograd keeps between the passes, each tensor once."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    example = (x[:1].numpy(),)
    with (
        wrap_blocks(model, example, strategy),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        model(x)
    return sum(found.values())


def test_recomputing_keeps_less():
    x = torch.rand(64, 1, 8, 8)
    plain = kept_bytes(residual(blocks=8), x, Strategy())
    less = kept_bytes(residual(blocks=8), x, Strategy(recompute=True))
    assert less < 0.5 * plain


def test_blocks_are_left_out_in_proportion_to_their_place():
    model, counts = residual(blocks=4), [0] * 4
    for index in range(4):
        inner = model[index + 1].conv
        inner.register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
    x = torch.rand(2, 1, 8, 8)
    with wrap_blocks(model, (x[:1].numpy(),), Strategy(stochastic_depth=0.8)):
        counts[:] = [0] * 4
        model.train()
        torch.manual_seed(0)
        for _ in range(500):
            model(x)
    shares = [1 - count / 500 for count in counts]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=0.07)


def test_what_a_block_adds_keeps_its_mean():
    model = residual(blocks=1)
    block = model[1].eval()
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        inner = model[0](x)
        whole = block(inner)
    with wrap_blocks(model, (x[:1].numpy(),), Strategy(stochastic_depth=0.5)), torch.no_grad():
        assert torch.equal(block(inner), whole), "evaluation does not change"
        block.training = True
        torch.manual_seed(0)
        made = torch.stack([block(inner) for _ in range(400)])
    torch.testing.assert_close(made.mean(0) - inner, whole - inner, rtol=0.2, atol=0.02)


def test_training_with_blocks_left_out_learns(split):
    _, done = run(split, stochastic_depth=0.3, epochs=6)
    assert done.losses[-1] < 0.7 * done.losses[0]


def test_a_network_without_blocks_is_refused(net, split):
    with pytest.raises(Refused, match="need residual blocks"):
        fit(net(), split, LOSS, Strategy(recompute=True))
