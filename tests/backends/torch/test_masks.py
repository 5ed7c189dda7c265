"""Masks of torch modules: set, kept through copies, cuts and wrappers, enforced on weights and optimizers."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from penjing.backends.torch import BACKEND
from penjing.backends.torch.masks import count_zeros, enforce_masks, masks_of, set_masks
from penjing.backends.torch.tensors import Selected
from penjing.core.backend import MaskBackend
from penjing.core.errors import Refused

RNG = np.random.default_rng(0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 3),
    ).eval()


def halves(model: nn.Module) -> dict[str, np.ndarray]:
    return {
        name: np.random.default_rng(1).random(tuple(tensor.shape)) < 0.5
        for name, tensor in model.named_parameters()
        if tensor.ndim > 1
    }


def test_a_mask_zeroes_and_is_read_back_and_does_not_enter_the_state():
    model = net()
    keys, masks = set(model.state_dict()), halves(model)
    assert isinstance(BACKEND, MaskBackend)
    assert BACKEND.masks_of(model) == {}
    BACKEND.set_masks(model, masks)
    assert masks_of(model).keys() == masks.keys()
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach().numpy()
        np.testing.assert_array_equal(masks_of(model)[name], mask)
        np.testing.assert_array_equal(weight[~mask], 0)
        assert (weight[mask] != 0).all()
    assert set(model.state_dict()) == keys
    zeros, weights = count_zeros(model)
    assert (zeros, weights) == (sum((~m).sum() for m in masks.values()), sum(m.size for m in masks.values()))


def test_what_masks_of_returns_is_a_copy_and_a_full_mask_takes_it_away():
    model = net()
    set_masks(model, halves(model))
    masks_of(model)["0.weight"][:] = True
    assert not masks_of(model)["0.weight"].all()
    set_masks(model, {"0.weight": np.ones((8, 1, 3, 3), bool)})
    assert "0.weight" not in masks_of(model)
    assert "6.weight" in masks_of(model)


def test_masks_survive_copies_pickles_and_the_choice_of_an_output():
    model = net()
    set_masks(model, halves(model))
    expected = masks_of(model)
    for other in (copy.deepcopy(model), BACKEND.copy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        found = masks_of(other)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    twin = copy.deepcopy(model)
    set_masks(twin, {"0.weight": ~expected["0.weight"]})
    np.testing.assert_array_equal(masks_of(model)["0.weight"], expected["0.weight"])
    assert set(masks_of(Selected(model, 0))) == {f"model.{name}" for name in expected}


def test_tied_tensors_share_their_mask():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

    model, mask = Tied(), RNG.random((4, 4)) < 0.5
    set_masks(model, {"b.weight": mask})
    assert set(masks_of(model)) == {"a.weight", "b.weight"}
    assert count_zeros(model) == (int((~mask).sum()), 16)


def test_enforcing_covers_weights_gradients_and_momentum():
    model = net()
    set_masks(model, halves(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 4, 4)).square().mean().backward()
        optimizer.step()
    gone = torch.from_numpy(~masks_of(model)["6.weight"])
    weight = model.get_parameter("6.weight")
    state = optimizer.state[weight]["momentum_buffer"]
    assert weight[gone].abs().max() > 0
    assert state[gone].abs().max() > 0
    enforce_masks(model, optimizer)
    for tensor in (weight, weight.grad, state):
        assert tensor[gone].abs().max() == 0
        assert tensor[~gone].abs().min() >= 0
        assert tensor[~gone].abs().max() > 0


@pytest.mark.parametrize("layer", ["0", "3"])
def test_masks_are_cut_with_their_tensors(layer):
    model, x = net(), (RNG.standard_normal((2, 1, 4, 4)).astype(np.float32),)
    set_masks(model, halves(model))
    before = masks_of(model)
    groups = BACKEND.groups(model, x)
    group = next(g for g in groups.groups if layer in g.layers)
    kept = np.array([0, 1, 4, 6])
    small = BACKEND.keep(model, groups, {group.name: kept})
    after = masks_of(small)
    assert after.keys() == before.keys()
    np.testing.assert_array_equal(after[f"{layer}.weight"], before[f"{layer}.weight"][kept])
    for name, mask in after.items():
        weight = small.get_parameter(name).detach().numpy()
        assert mask.shape == weight.shape
        np.testing.assert_array_equal(weight[~mask], 0)
    assert all(np.array_equal(masks_of(model)[name], mask) for name, mask in before.items())


def test_the_fingerprint_tells_masks_apart():
    model = net()
    model[6].weight.data[:, :64] = 0
    plain = BACKEND.fingerprint(model)
    set_masks(model, {"6.weight": model[6].weight.detach().numpy() != 0})
    assert BACKEND.fingerprint(model) != plain


@pytest.mark.parametrize(
    ("masks", "rule"),
    [
        ({"7.weight": np.ones((1, 1), bool)}, "must be of a parameter of the model"),
        ({"6.weight": np.ones((128, 3), bool)}, r"6\.weight needs a boolean mask of shape \(3, 128\)"),
        ({"6.weight": np.ones((3, 128))}, r"6\.weight needs a boolean mask of shape \(3, 128\)"),
        ({"6.weight": np.zeros((3, 128), bool)}, "must keep at least one"),
    ],
)
def test_bad_masks_are_refused_before_anything_changes(masks, rule):
    model = net()
    before = BACKEND.fingerprint(model)
    with pytest.raises(Refused, match=rule):
        set_masks(model, {"0.weight": np.eye(8, 9, dtype=bool).reshape(8, 1, 3, 3)} | masks)
    assert BACKEND.fingerprint(model) == before
