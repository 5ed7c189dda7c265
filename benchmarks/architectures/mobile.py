"""Image classifiers made for small devices, and modern ones of large kernels or none."""

import torch
from torch import nn
from torch.nn import functional as F

from architectures.registry import CLASSES, SqueezeExcite, architectures, conv_bn, head, images

__all__ = ["MOBILE"]


class InvertedResidual(nn.Module):
    """Expand, depthwise, optional squeeze-and-excite, project (Sandler et al. 2018; Howard et al. 2019)."""

    def __init__(self, inputs, outputs, stride=1, act=nn.ReLU6, gate=None, kernel=3) -> None:
        super().__init__()
        inner = 3 * inputs
        se = [] if gate is None else [SqueezeExcite(inner, 8, gate)]
        self.body = nn.Sequential(
            conv_bn(inputs, inner, 1, act=act),
            conv_bn(inner, inner, kernel, stride, inner, act),
            *se,
            conv_bn(inner, outputs, 1, act=nn.Identity),
        )
        self.same = inputs == outputs and stride == 1

    def forward(self, x):
        return x + self.body(x) if self.same else self.body(x)


def _inverted(act: type[nn.Module], gate: type[nn.Module] | None, kernel: int = 3) -> nn.Module:
    def block(i, o, s=1):
        return InvertedResidual(i, o, s, act, gate, kernel)

    return nn.Sequential(
        conv_bn(3, 16, 3, 2, act=act),
        block(16, 16),
        block(16, 24, 2),
        block(24, 24),
        block(24, 32, 2),
        block(32, 32),
        conv_bn(32, 64, 1, act=act),
        head(64),
    )


def _mobilenet_v1() -> nn.Module:
    """Depthwise and pointwise convolutions in turn (Howard et al. 2017)."""
    parts, inputs = [conv_bn(3, 16, 3, 2)], 16
    for outputs, stride in ((32, 1), (48, 2), (48, 1), (64, 2)):
        parts += [conv_bn(inputs, inputs, 3, stride, inputs), conv_bn(inputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*parts, head(inputs))


def _shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    batch, width, rows, columns = x.shape
    return x.view(batch, groups, width // groups, rows, columns).transpose(1, 2).reshape(x.shape)


class ShuffleV1(nn.Module):
    """Grouped pointwise convolutions with a shuffle between (Zhang et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.middle = conv_bn(width, width, 1, groups=4), conv_bn(width, width, 3, 1, width)
        self.last = conv_bn(width, width, 1, groups=4, act=nn.Identity)

    def forward(self, x):
        return F.relu(x + self.last(self.middle(_shuffle(self.first(x), 4))))


class ShuffleV2(nn.Module):
    """Half of the channels through a branch, then shuffled (Ma et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, inner = stride, outputs // 2
        first = inputs if stride > 1 else inner
        self.left = nn.Sequential(
            conv_bn(inputs, inputs, 3, 2, inputs, nn.Identity), conv_bn(inputs, inner, 1)
        )
        self.right = nn.Sequential(
            conv_bn(first, inner, 1),
            conv_bn(inner, inner, 3, stride, inner, nn.Identity),
            conv_bn(inner, inner, 1),
        )

    def forward(self, x):
        if self.stride > 1:
            return _shuffle(torch.cat((self.left(x), self.right(x)), 1), 2)
        same, rest = x.chunk(2, dim=1)
        return _shuffle(torch.cat((same, self.right(rest)), 1), 2)


class Fire(nn.Module):
    """Squeeze, then 1x1 and 3x3 side by side (Iandola et al. 2016)."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


class Ghost(nn.Module):
    """Half of the channels by a convolution, half by cheap depthwise ones from them (Han et al. 2020)."""

    def __init__(self, inputs: int, outputs: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        half = (outputs + 1) // 2
        self.outputs = outputs
        self.primary, self.cheap = conv_bn(inputs, half, 1, act=act), conv_bn(half, half, 3, 1, half, act)

    def forward(self, x):
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], dim=1)[:, : self.outputs]


class GhostBottleneck(nn.Module):
    """Two ghost modules beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            Ghost(width, 2 * width),
            SqueezeExcite(2 * width, 8, nn.Hardsigmoid),
            Ghost(2 * width, width, nn.Identity),
        )

    def forward(self, x):
        return x + self.body(x)


class ConvNeXt(nn.Module):
    """Depthwise 7x7, LayerNorm over channels last, an MLP and a learned scale (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.scale * self.down(F.gelu(self.up(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map `[N, C, H, W]`."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _convnext() -> nn.Module:
    down = nn.Sequential(ChannelNorm(24), nn.Conv2d(24, 48, 2, 2))
    blocks = [nn.Conv2d(3, 24, 4, 4), ChannelNorm(24), ConvNeXt(24), ConvNeXt(24), down, ConvNeXt(48)]
    return nn.Sequential(
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, CLASSES)
    )


class ConvMixer(nn.Module):
    """Patches, then depthwise convolutions with a shortcut and pointwise ones (Trockman and Kolter 2022)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.GELU(), nn.BatchNorm2d(width))
        self.depthwise = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 5, groups=width, padding="same"), nn.GELU(), nn.BatchNorm2d(width)
            )
            for _ in range(2)
        )
        self.pointwise = nn.ModuleList(conv_bn(width, width, 1, act=nn.GELU) for _ in range(2))
        self.head = head(width)

    def forward(self, x):
        x = self.stem(x)
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = pointwise(x + depthwise(x))
        return self.head(x)


class Mixer(nn.Module):
    """One MLP over the patches, one over the channels (Tolstikhin et al. 2021)."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(patches, 32), nn.GELU(), nn.Linear(32, patches))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class SpatialGating(nn.Module):
    """gMLP's block: half of the channels, mixed over patches, gates the other half (Liu et al. 2021)."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(2 * width, width),
        )
        self.gate_norm, self.mix = nn.LayerNorm(2 * width), nn.Conv1d(patches, patches, 1)

    def forward(self, x):
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, dim=-1)
        return x + self.down(u * self.mix(self.gate_norm(v)))


class Patched(nn.Module):
    """Patches of 8x8 as tokens, blocks on `[N, 16, width]`, the mean of the tokens classified."""

    def __init__(self, block, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(block(16, width), block(16, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(dim=1))


def _squeezenet() -> nn.Module:
    stem = [nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]
    last = [nn.Dropout(), nn.Conv2d(48, CLASSES, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, Fire(32, 8, 16), Fire(32, 8, 24), *last)


MOBILE = architectures(
    "vision",
    {
        "mobilenet-v1": _mobilenet_v1,
        "mobilenet-v2": lambda: _inverted(nn.ReLU6, None),
        "mobilenet-v3": lambda: _inverted(nn.Hardswish, nn.Hardsigmoid, 5),
        "efficientnet": lambda: _inverted(nn.SiLU, nn.Sigmoid),
        "shufflenet-v1": lambda: nn.Sequential(conv_bn(3, 32, 3, 2), ShuffleV1(32), ShuffleV1(32), head(32)),
        "shufflenet-v2": lambda: nn.Sequential(
            conv_bn(3, 24, 3, 2),
            ShuffleV2(24, 32, 2),
            ShuffleV2(32, 32, 1),
            ShuffleV2(32, 32, 1),
            conv_bn(32, 64, 1),
            head(64),
        ),
        "squeezenet": _squeezenet,
        "ghostnet": lambda: nn.Sequential(
            conv_bn(3, 16, 3, 2), GhostBottleneck(16), GhostBottleneck(16), conv_bn(16, 32, 1), head(32)
        ),
        "convnext": _convnext,
        "convmixer": ConvMixer,
        "mlp-mixer": lambda: Patched(Mixer),
        "gmlp": lambda: Patched(SpatialGating),
    },
    images(),
)
