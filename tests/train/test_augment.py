"""What changes a batch: images moved, mirrored, resized and blended, with the labels that follow."""

import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from penjing.core.errors import Refused  # noqa: E402
from penjing.train.augment import augment, changes_inputs  # noqa: E402
from penjing.train.strategy import Strategy  # noqa: E402


def images(n=64, size=16):
    torch.manual_seed(0)
    return torch.rand(n, 3, size, size), torch.arange(n) % 10


def test_without_anything_asked_the_batch_is_the_same_object():
    x, y = images()
    batch = augment(Strategy(), (x,), y, 0.0)
    assert batch.inputs[0] is x
    assert batch.other_targets is None
    assert not changes_inputs(Strategy(label_smoothing=0.1))


def test_flip_mirrors_about_half_and_leaves_the_rest():
    x, y = images()
    got = augment(Strategy(flip=True), (x,), y, 0.0).inputs[0]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(got, x, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(got, x, strict=True)]
    assert all(m or s for m, s in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48


def test_shift_moves_each_image_as_a_padded_crop_does():
    x, y = images()
    got = augment(Strategy(shift=2), (x,), y, 0.0).inputs[0]
    wide = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    found = set()
    for image, source in zip(got, wide, strict=True):
        places = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if torch.equal(image, source[:, i : i + 16, j : j + 16])
        ]
        assert len(places) == 1
        found.update(places)
    assert len(found) > 15


@pytest.mark.parametrize(("progress", "side"), [(0.0, 8), (0.375, 12), (0.75, 16), (0.9, 16)])
def test_images_grow_to_their_own_size(progress, side):
    x, y = images()
    assert augment(Strategy(start_size=0.5), (x,), y, progress).inputs[0].shape[-2:] == (side, side)


def test_mixup_blends_by_the_share_of_the_labels():
    x, y = images()
    batch = augment(Strategy(mixup=1.0), (x,), y, 0.0)
    order = torch.stack(
        [
            (batch.weight * x + (1 - batch.weight) * other - batch.inputs[0]).abs().amax((1, 2, 3))
            for other in x
        ]
    ).argmin(0)
    torch.testing.assert_close(batch.inputs[0], batch.weight * x + (1 - batch.weight) * x[order])
    assert torch.equal(batch.other_targets, y[order])
    assert 0 < batch.weight < 1


def test_cutmix_pastes_one_rectangle_and_counts_its_area():
    x, y = images()
    for seed in range(10):
        torch.manual_seed(seed)
        batch = augment(Strategy(cutmix=1.0), (x,), y, 0.0)
        changed = (batch.inputs[0] != x).any(1).any(0)
        rows, columns = changed.any(1).nonzero().ravel(), changed.any(0).nonzero().ravel()
        assert changed.sum() == len(rows) * len(columns)
        assert 1 - changed.float().mean() == pytest.approx(batch.weight, abs=1e-6)


def test_what_cannot_be_changed_is_refused():
    words = torch.zeros(4, 7, dtype=torch.long)
    with pytest.raises(Refused, match="need images"):
        augment(Strategy(flip=True), (words,), words[:, 0], 0.0)
    with pytest.raises(Refused, match="needs floating-point inputs"):
        augment(Strategy(mixup=0.2), (words,), words[:, 0], 0.0)
    with pytest.raises(Refused, match="another input"):
        augment(Strategy(mixup=0.2), (words.float(), words), words[:, 0], 0.0)
