"""Networks whose output is a map or several: segmentation, detection, restoration, generation."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from architectures.registry import CLASSES, Architecture, architectures, conv_bn, images, seeded

__all__ = ["DENSE"]


class UNet(nn.Module):
    """Down, up by transposed convolution or pixel shuffle, joined with the way down (Ronneberger 2015)."""

    def __init__(self, shuffle: bool) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv_bn(3, 16), conv_bn(16, 32), conv_bn(32, 48)
        self.up2, self.up1 = self._up(48, 32, shuffle), self._up(32, 16, shuffle)
        self.join2, self.join1 = conv_bn(64, 32), conv_bn(32, 16)
        self.last = nn.Conv2d(16, CLASSES, 1)

    @staticmethod
    def _up(inputs: int, outputs: int, shuffle: bool) -> nn.Module:
        if shuffle:
            return nn.Sequential(nn.Conv2d(inputs, 4 * outputs, 3, padding=1), nn.PixelShuffle(2), nn.ReLU())
        return nn.ConvTranspose2d(inputs, outputs, 2, 2)

    def forward(self, x):
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = self.middle(F.max_pool2d(two, 2))
        y = self.join2(torch.cat([self.up2(y), two], 1))
        return self.last(self.join1(torch.cat([self.up1(y), one], 1)))


class Detector(nn.Module):
    """A backbone, a feature pyramid (Lin et al. 2017) and one head for two maps: classes, boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage1, self.stage2 = (
            conv_bn(3, 16, 3, 2),
            conv_bn(16, 32, 3, 2),
            conv_bn(32, 48, 3, 2),
        )
        self.lateral1, self.lateral2 = nn.Conv2d(32, 24, 1), nn.Conv2d(48, 24, 1)
        self.smooth = nn.ModuleList(nn.Conv2d(24, 24, 3, padding=1) for _ in range(2))
        self.tower = nn.Sequential(conv_bn(24, 24), conv_bn(24, 24))
        self.classes, self.boxes = nn.Conv2d(24, 3 * CLASSES, 3, padding=1), nn.Conv2d(24, 12, 3, padding=1)

    def forward(self, x):
        fine = self.stage1(self.stem(x))
        coarse = self.lateral2(self.stage2(fine))
        fine = self.lateral1(fine) + F.interpolate(coarse, scale_factor=2, mode="nearest")
        found = []
        for level, smooth in zip((fine, coarse), self.smooth, strict=True):
            y = self.tower(smooth(level))
            found += [self.classes(y), self.boxes(y)]
        return tuple(found)


class YoloHead(nn.Module):
    """Spatial pyramid pooling, two scales, predictions `[N, anchors * cells, 5 + classes]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 16, 3, 2, act=nn.SiLU), conv_bn(16, 32, 3, 2, act=nn.SiLU))
        self.reduce, self.mix = conv_bn(32, 16, 1, act=nn.SiLU), conv_bn(64, 32, 1, act=nn.SiLU)
        self.down = conv_bn(32, 32, 3, 2, act=nn.SiLU)
        self.predict = nn.ModuleList(nn.Conv2d(32, 3 * (5 + CLASSES), 1) for _ in range(2))

    def forward(self, x):
        pooled = [self.reduce(self.stem(x))]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
        fine = self.mix(torch.cat(pooled, 1))
        maps = []
        for level, predict in zip((fine, self.down(fine)), self.predict, strict=True):
            y = predict(level)
            n, _, rows, columns = y.shape
            y = y.view(n, 3, 5 + CLASSES, rows, columns).permute(0, 1, 3, 4, 2)
            maps.append(y.reshape(n, -1, 5 + CLASSES))
        return torch.cat(maps, 1)


class Aspp(nn.Module):
    """DeepLab's head: dilated branches and the pooled image (Chen et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 16, 3, 2), conv_bn(16, 32, 3, 2))
        self.branches = nn.ModuleList(nn.Conv2d(32, 16, 3, padding=d, dilation=d) for d in (1, 2, 3))
        self.pooled, self.join, self.last = (
            nn.Conv2d(32, 16, 1),
            conv_bn(64, 32, 1),
            nn.Conv2d(32, CLASSES, 1),
        )

    def forward(self, x):
        y = self.stem(x)
        image = self.pooled(F.adaptive_avg_pool2d(y, 1)).expand(-1, -1, y.shape[2], y.shape[3])
        y = self.last(self.join(torch.cat([*(F.relu(b(y)) for b in self.branches), image], 1)))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)


class HrNet(nn.Module):
    """Two resolutions side by side that exchange what they see (Sun et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.split = conv_bn(3, 16, 3, 2), conv_bn(16, 32, 3, 2)
        self.high, self.low = conv_bn(16, 16), conv_bn(32, 32)
        self.to_high, self.to_low = (
            conv_bn(32, 16, 1, act=nn.Identity),
            conv_bn(16, 32, 3, 2, act=nn.Identity),
        )
        self.last = nn.Conv2d(48, CLASSES, 1)

    def forward(self, x):
        high = self.stem(x)
        low = self.low(self.split(high))
        high = self.high(high)
        up = F.interpolate(self.to_high(low), size=high.shape[-2:], mode="bilinear")
        high, low = F.relu(high + up), F.relu(low + self.to_low(high))
        return self.last(torch.cat([high, F.interpolate(low, scale_factor=2)], 1))


class Edsr(nn.Module):
    """Super-resolution without norms: residual blocks, a long shortcut, pixel shuffle (Lim et al. 2017)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
            )
            for _ in range(2)
        )
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x):
        first = y = self.first(x)
        for block in self.blocks:
            y = y + 0.1 * block(y)
        return self.last(self.up(first + y))


class Autoencoder(nn.Module):
    """Convolutions to a flat code and back through a reshape and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_bn(3, 16, 3, 2), conv_bn(16, 32, 3, 2), nn.Flatten())
        self.narrow, self.widen = nn.Linear(32 * 64, 24), nn.Linear(24, 32 * 64)
        self.decoder = nn.Sequential(
            nn.Unflatten(1, (32, 8, 8)),
            nn.ConvTranspose2d(32, 16, 4, 2, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, x):
        return self.decoder(F.relu(self.widen(self.narrow(self.encoder(x)))))


def _generator() -> nn.Module:
    """DCGAN's generator (Radford et al. 2016): noise to an image by transposed convolutions."""
    return nn.Sequential(
        nn.Unflatten(1, (16, 1, 1)),
        nn.ConvTranspose2d(16, 48, 4),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.ConvTranspose2d(48, 32, 4, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 32, 4, 2, 1, groups=4),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(32, 3, 4, 2, 1),
        nn.Tanh(),
    )


def _noise() -> tuple[np.ndarray, ...]:
    return (np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32),)


class StyleTransfer(nn.Module):
    """Instance norm, reflection padding and nearest upsampling (Johnson et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.pad, self.first = nn.ReflectionPad2d(1), nn.Conv2d(3, 16, 3)
        self.down, self.norm1 = nn.Conv2d(16, 32, 3, 2, 1), nn.InstanceNorm2d(32, affine=True)
        self.up, self.norm2 = nn.Conv2d(32, 16, 3), nn.InstanceNorm2d(16, affine=True)
        self.last = nn.Conv2d(16, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, x):
        y = F.relu(self.norm1(self.down(F.relu(self.first(self.pad(x))))))
        y = F.interpolate(y, scale_factor=2, mode="nearest")
        return torch.sigmoid(self.last(F.relu(self.norm2(self.up(self.pad(y))))))


DENSE = architectures(
    "dense prediction",
    {
        "unet-transposed": lambda: UNet(shuffle=False),
        "unet-pixelshuffle": lambda: UNet(shuffle=True),
        "detector-fpn": Detector,
        "yolo-head": YoloHead,
        "deeplab-aspp": Aspp,
        "hrnet": HrNet,
        "edsr": Edsr,
        "autoencoder": Autoencoder,
        "style-transfer": StyleTransfer,
    },
    images(),
) | {"dcgan": Architecture("dcgan", "dense prediction", seeded(_generator), _noise)}
