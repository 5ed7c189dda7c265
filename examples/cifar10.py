"""A task file: ResNet-20 (or ResNet-56) on CIFAR-10, its images as JPEG copies.

    export PENJING_DATA=/path/to/data   # with cv/cifar10_jpeg.npz, weights/cifar10_resnet20.safetensors
    penjing optimize examples/cifar10.py --max-drop 1% --time 20min

The published weights were trained on the lossless images; the copies are a slightly different domain, so the
network is first adapted to them (a few epochs, cached): that is the baseline. The published
training set contains the originals of our training copies: validation images come from the test part.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

import penjing as pj

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)
DEPTH = int(os.environ.get("CIFAR_RESNET", "20"))
CACHE = Path(os.environ.get("PENJING_CACHE", "~/.cache/penjing")).expanduser()
EPOCHS = {20: 3, 56: 1}
"""Epochs of adaptation: minutes on two cores."""

VALID = 2500
"""Images of the test part that the search may see; the other 7,000 certify."""


class Block(nn.Module):
    """A basic block whose shortcut subsamples and pads with zero channels (option A of He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.padding = (after - before) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, after, h / stride, w / stride]."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.padding:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return (y + x).relu()


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016 with 6n + 2 layers; module names as in the published weights."""

    def __init__(self, depth: int = 20, width: int = 16) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, n, 1)
        self.layer2 = self._stage(width, 2 * width, n, 2)
        self.layer3 = self._stage(2 * width, 4 * width, n, 2)
        self.linear = nn.Linear(4 * width, 10)

    @staticmethod
    def _stage(before: int, after: int, blocks: int, stride: int) -> nn.Sequential:
        first = Block(before, after, stride)
        return nn.Sequential(first, *[Block(after, after, 1) for _ in range(blocks - 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [n, 10] of images [n, 3, 32, 32], normalised by MEAN and STD."""
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class Augmented:
    """Batches of shuffled, shifted and mirrored training images; each walk is the next epoch."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], size: int = 128) -> None:
        self.images, self.labels, self.size, self.epoch = images, labels, size, 0

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        rng = np.random.default_rng(self.epoch)
        self.epoch += 1
        padded = np.pad(self.images, ((0, 0), (0, 0), (4, 4), (4, 4)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), (2, 3))
        order = rng.permutation(len(self.images))
        for start in range(0, len(order), self.size):
            index = order[start : start + self.size]
            y, x = rng.integers(0, 9, (2, len(index)))
            batch = windows[index, :, y, x]
            mirrored = rng.random(len(index)) < 0.5
            batch[mirrored] = batch[mirrored, ..., ::-1]
            yield normalised(batch), self.labels[index]


def normalised(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return float images as the published weights expect them."""
    return (images.astype(np.float32) / np.float32(255) - MEAN) / STD


def data_folder() -> Path:
    """Return the folder that PENJING_DATA names."""
    folder = os.environ.get("PENJING_DATA")
    if not folder or not (Path(folder) / "cv" / "cifar10_jpeg.npz").is_file():
        raise pj.Refused(
            "the data are there",
            value=folder or "PENJING_DATA is not set",
            place="cifar10.py",
            fix="set PENJING_DATA to the folder with cv/cifar10_jpeg.npz",
        )
    return Path(folder)


def images() -> dict[str, NDArray]:
    """Return the decoded images [n, 3, 32, 32] and labels of both parts; cached."""
    path = CACHE / "cifar10_decoded.npz"
    if not path.is_file():
        from PIL import Image

        with np.load(data_folder() / "cv" / "cifar10_jpeg.npz") as stored:
            found = {}
            for part in ("train", "test"):
                data, ends = stored[f"{part}_jpeg"].tobytes(), stored[f"{part}_offsets"]
                decoded = [Image.open(BytesIO(data[a:b])) for a, b in itertools.pairwise(ends)]
                found[f"{part}_x"] = np.stack([np.asarray(image) for image in decoded]).transpose(0, 3, 1, 2)
                found[f"{part}_y"] = stored[f"{part}_labels"].astype(np.int64)
        CACHE.mkdir(parents=True, exist_ok=True)
        np.savez(path, **found)
    with np.load(path) as stored:
        return dict(stored)


def task() -> pj.Task:
    """Return 50,000 augmented images to train on, 2,500 to search with, 7,000 to certify on."""
    data = images()
    test_x, test_y = normalised(data["test_x"]), data["test_y"]
    return pj.Task(
        train=Augmented(data["train_x"], data["train_y"]),
        valid=(test_x[:VALID], test_y[:VALID]),
        test=(test_x[VALID:], test_y[VALID:]),
        class_names=CLASSES,
    )


def published() -> ResNet:
    """Return the network with its published weights."""
    net = ResNet(DEPTH)
    weights = load_file(data_folder() / "weights" / f"cifar10_resnet{DEPTH}.safetensors")
    net.load_state_dict(weights, strict=False)
    return net


def model() -> ResNet:
    """Return the network, adapted to the JPEG copies by a few epochs at a small learning rate; cached."""
    net, path = ResNet(DEPTH), CACHE / f"cifar10_resnet{DEPTH}_jpeg.safetensors"
    if not path.is_file():
        adapted = pj.apply(published(), pj.FineTune(epochs=EPOCHS[DEPTH], lr=0.02), task()).model
        save_file(adapted.state_dict(), path)
    net.load_state_dict(load_file(path))
    return net.eval()


if __name__ == "__main__":
    from penjing.cli.main import main

    main(["optimize", __file__, *sys.argv[1:]])
