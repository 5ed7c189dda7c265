"""patches: the same values as torch's unfold, and a convolution as a product."""

import numpy as np
import pytest

import penjing as pj
from oracles.patches import patches

X = np.random.default_rng(0).normal(size=(2, 3, 9, 7)).astype("float32")


@pytest.fixture(scope="module")
def torch():
    found = pytest.importorskip("torch", reason="the extra torch is not installed")
    found.set_num_threads(1)
    return found


@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
@pytest.mark.parametrize("padding", [0, 1, (2, 0)])
@pytest.mark.parametrize("dilation", [1, (1, 2)])
def test_rows_are_the_columns_of_unfold(torch, stride, padding, dilation):
    found = patches(X, (3, 2), stride, padding, dilation)
    fold = torch.nn.functional.unfold(torch.from_numpy(X), (3, 2), dilation, padding, stride)
    np.testing.assert_array_equal(found, fold.transpose(1, 2).reshape(-1, 18).numpy())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_convolution_is_a_product(torch, rank):
    rng = np.random.default_rng(rank)
    x, kernel = rng.normal(size=(2, 3, *(6, 5, 4)[:rank])), (3, 2, 2)[:rank]
    weight = rng.normal(size=(4, 3, *kernel))
    function = getattr(torch.nn.functional, f"conv{rank}d")
    y = function(torch.from_numpy(x), torch.from_numpy(weight), stride=2, padding=1)
    rows = patches(x, kernel, stride=2, padding=1) @ weight.reshape(4, -1).T
    np.testing.assert_allclose(rows, y.flatten(2).transpose(1, 2).reshape(-1, 4).numpy(), atol=1e-12)


@pytest.mark.parametrize(
    ("mode", "name"), [("reflect", "reflect"), ("edge", "replicate"), ("wrap", "circular")]
)
def test_borders_other_than_zeros(torch, mode, name):
    module = torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode=name, bias=False)
    y = module(torch.from_numpy(X)).detach()
    rows = patches(X, (3, 3), padding=1, mode=mode) @ module.weight.detach().numpy().reshape(4, -1).T
    np.testing.assert_allclose(rows, y.flatten(2).transpose(1, 2).reshape(-1, 4).numpy(), atol=1e-5)


def test_sides_can_differ():
    x = np.arange(3.0).reshape(1, 1, 3)
    assert patches(x, (2,), padding=((0, 1),)).tolist() == [[0, 1], [1, 2], [2, 0]]


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3,), {}),
        ((10, 1), {}),
        ((3, 3), {"stride": 0}),
        ((3, 3), {"padding": (1,)}),
        ((3, 3), {"dilation": 5}),
    ],
)
def test_what_does_not_fit_is_refused(kernel, options):
    with pytest.raises(pj.Refused):
        patches(X, kernel, **options)
