"""Losses by name and of the user's: pairs that mean nothing are refused with both shapes."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from penjing.backends.torch.losses import OwnLoss, resolve_loss
from penjing.core.errors import Refused

OUT = torch.tensor([[0.5], [-2.0], [3.0], [0.1]])
ONE = torch.tensor([0.0, 1.0, 1.0, 0.0])


def numbers(name):
    """The definitions, in NumPy."""
    o, y = OUT[:, 0].double().numpy(), ONE.double().numpy()
    d = np.abs(o - y)
    return {
        "bce": np.mean(np.log1p(np.exp(o)) - y * o),
        "binary_cross_entropy": np.mean(np.log1p(np.exp(o)) - y * o),
        "mse": np.mean(d**2),
        "mae": np.mean(d),
        "huber": np.mean(np.where(d <= 1, d**2 / 2, d - 0.5)),
    }[name]


@pytest.mark.parametrize("name", ["bce", "binary_cross_entropy", "mse", "mae", "huber"])
def test_a_column_may_be_missing_on_either_side(name):
    loss = resolve_loss(name)
    pairs = [(OUT, ONE), (OUT, ONE[:, None]), (OUT[:, 0], ONE), (OUT[:, 0], ONE[:, None]), (OUT, ONE.long())]
    for outputs, targets in pairs:
        assert float(loss(outputs, targets)) == pytest.approx(numbers(name), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "words"),
    [
        (
            "cross_entropy",
            (4, 1),
            torch.zeros(4).long(),
            r"at least two logits.*outputs \(4, 1\), targets \(4,\)",
        ),
        (
            "cross_entropy",
            (4,),
            torch.zeros(4).long(),
            r"at least two logits.*outputs \(4,\), targets \(4,\)",
        ),
        (
            "cross_entropy",
            (4, 3),
            torch.zeros(4, 3).long(),
            r"class indices.*\(4, 3\), targets \(4, 3\) of int64",
        ),
        (
            "cross_entropy",
            (4, 3),
            torch.zeros(4),
            r"class indices.*outputs \(4, 3\), targets \(4,\) of float32",
        ),
        ("bce", (4, 3), torch.zeros(4).long(), r"outputs' shape.*\(4, 3\), targets \(4,\).*cross_entropy"),
        ("bce", (4, 3), torch.zeros(4, 2), r"outputs' shape.*\(4, 3\), targets \(4, 2\)"),
        ("bce", (4, 3), torch.full((4, 3), 2.0), r"targets in \[0, 1\], got 2"),
        ("mse", (4, 1), torch.zeros(4, 2), r"outputs' shape.*\(4, 1\), targets \(4, 2\)"),
    ],
)
def test_what_does_not_belong_together_is_refused_with_both_shapes(name, outputs, targets, words):
    with pytest.raises(Refused, match=words):
        resolve_loss(name)(torch.zeros(outputs), targets)


def test_an_unknown_name_is_refused():
    with pytest.raises(Refused, match="Did you mean 'huber'"):
        resolve_loss("hubert")


BROADCAST = {
    "difference": lambda o, y: (o - y).square().mean(),
    "mse_loss": functional.mse_loss,
    "of probabilities": lambda o, y: -(y * o.log() + (1 - y) * (1 - o).log()).mean(),
    "whole targets": lambda o, y: (o - y.long()).abs().mean(),
}


@pytest.mark.parametrize("loss", BROADCAST.values(), ids=list(BROADCAST))
@pytest.mark.parametrize("swapped", [False, True])
def test_every_output_with_every_target_is_refused(loss, swapped):
    outputs, targets = (OUT[:, 0], ONE[:, None]) if swapped else (OUT, ONE)
    shapes = r"\(4,\), targets \(4, 1\)" if swapped else r"\(4, 1\), targets \(4,\)"
    with pytest.raises(Refused, match=rf"its own target, not with every one, got outputs {shapes}"):
        OwnLoss(loss)(outputs, targets)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: (o[:, 0] - y).square().mean(),
        lambda o, y: (o - y.unsqueeze(1)).square().mean(),
        lambda o, y: functional.binary_cross_entropy_with_logits(o.squeeze(1), y),
        lambda o, y: o.square().mean(),
        lambda o, y: (o - o.detach()).mean() + 0 * y.mean(),
    ],
)
def test_a_loss_that_pairs_them_or_reads_no_targets_is_believed(loss):
    value = OwnLoss(loss)(OUT, ONE)
    assert torch.equal(value, loss(OUT, ONE))


def test_a_loss_is_looked_at_once_and_the_callers_random_numbers_stay():
    calls = []

    def loss(outputs, targets):
        calls.append(len(outputs))
        return (outputs[:, 0] - targets).square().mean() + 0 * torch.rand(())

    own, state = OwnLoss(loss), torch.get_rng_state()
    own(OUT, ONE)
    looked = len(calls)
    torch.set_rng_state(state)
    own(OUT, ONE)
    assert (looked, len(calls)) == (6, 7)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (
            functional.binary_cross_entropy_with_logits,
            r"must take.*outputs \(4, 1\), targets \(4,\)",
        ),
        (lambda o, y: o[:, 0] - y, r"must return one number, as a tensor, got \(4,\)"),
        (lambda o, y: 0.5, "must return one number, as a tensor, got float"),
    ],
)
def test_a_loss_that_fails_or_returns_no_number_is_refused(loss, words):
    with pytest.raises(Refused, match=words):
        OwnLoss(loss)(OUT, ONE)


def test_a_lack_of_memory_passes_through():
    def loss(outputs, targets):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="allocate"):
        OwnLoss(loss)(OUT, ONE)
