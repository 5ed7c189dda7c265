"""A task file: MobileNetV1 0.25 on a sample of ImageNet, 224 by 224.

    export PENJING_DATA=/path/to/data   # with cv/imagenet_sample_500a.npz, weights/mobilenet_v1_025_...
    penjing optimize examples/mobilenet.py --max-drop 3% --time 10min

Published weights (Howard et al. 2017, "MobileNets"), 500 images of 500 classes. So few tell differences of
several points only, and the sample is probably of the training images: it is a test of speed, and that
nothing breaks. Nothing can be trained on it.
"""

import itertools
import os
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import penjing as pj

STRIDES = {2: 2, 4: 2, 6: 2, 12: 2}
WIDTHS = (16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
"""Output channels of the thirteen separable blocks."""
CLASSES = 1000
TRAIN, VALID = 128, 122
"""Images for calibration and for the search; the other 250 certify."""


class MobileNet(nn.Module):
    """A convolution, thirteen depthwise separable blocks, a mean over space, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, bias=False)
        self.conv1_bn = nn.BatchNorm2d(8, eps=1e-3)
        width = 8
        for i, out in enumerate(WIDTHS, 1):
            stride = STRIDES.get(i, 1)
            padding = 1 if stride == 1 else 0
            self.add_module(
                f"conv_dw_{i}", nn.Conv2d(width, width, 3, stride, padding, groups=width, bias=False)
            )
            self.add_module(f"conv_dw_{i}_bn", nn.BatchNorm2d(width, eps=1e-3))
            self.add_module(f"conv_pw_{i}", nn.Conv2d(width, out, 1, bias=False))
            self.add_module(f"conv_pw_{i}_bn", nn.BatchNorm2d(out, eps=1e-3))
            width = out
        self.conv_preds = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, 1000] logits of [n, 3, 224, 224] images; strides pad right and below only."""
        x = F.relu6(self.conv1_bn(self.conv1(F.pad(x, (0, 1, 0, 1)))))
        for i in range(1, len(WIDTHS) + 1):
            if i in STRIDES:
                x = F.pad(x, (0, 1, 0, 1))
            for kind in ("dw", "pw"):
                name = f"conv_{kind}_{i}"
                x = F.relu6(getattr(self, f"{name}_bn")(getattr(self, name)(x)))
        return self.conv_preds(x.mean((2, 3), keepdim=True)).flatten(1)


def data_folder() -> Path:
    """Return the folder that PENJING_DATA names."""
    folder = os.environ.get("PENJING_DATA")
    if not folder:
        raise SystemExit("set PENJING_DATA to the folder with cv/imagenet_sample_500a.npz")
    return Path(folder)


def images() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return 500 images [500, 3, 224, 224] in [-1, 1] and their classes."""
    from PIL import Image

    with np.load(data_folder() / "cv" / "imagenet_sample_500a.npz") as stored:
        ends, raw = stored["offsets"], stored["jpeg"].tobytes()
        labels = stored["labels"].astype(np.int64)
    files = [raw[a:b] for a, b in itertools.pairwise(ends)]
    pixels = np.stack([np.asarray(Image.open(BytesIO(file)).convert("RGB"))[1:225, 1:225] for file in files])
    return (pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1)), labels


def task() -> pj.Task:
    """Return 128 images to calibrate on, 122 to search with, 250 to certify on."""
    x, y = images()
    order = np.random.default_rng(0).permutation(len(y))
    parts = np.split(order, [TRAIN, TRAIN + VALID])
    train, valid, test = ((x[part], y[part]) for part in parts)
    return pj.Task(train=train, valid=valid, test=test)


def model() -> MobileNet:
    """Return the network with its published weights."""
    net = MobileNet()
    net.load_state_dict(load_file(data_folder() / "weights" / "mobilenet_v1_025_224_imagenet.safetensors"))
    return net.eval()
