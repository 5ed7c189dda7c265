"""Plain, residual and densely connected image classifiers, hand-written after their papers."""

import torch
from torch import nn
from torch.nn import functional as F

from architectures.registry import CLASSES, SqueezeExcite, architectures, conv_bn, head, images

__all__ = ["RESIDUAL"]


def _vgg() -> nn.Module:
    """VGG (Simonyan and Zisserman 2015): convolutions, then fully connected layers on the flattened map."""
    parts, inputs = [], 3
    for width, convs in ((16, 1), (32, 2), (48, 2)):
        for _ in range(convs):
            parts, inputs = [*parts, conv_bn(inputs, width)], width
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *parts,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48 * 4, 64),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(64, CLASSES),
    )


class AlexNet(nn.Module):
    """AlexNet (Krizhevsky et al. 2012): biases instead of norms, a view with a size."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 24, 5, 2, 2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(24, 32, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 24, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(3),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(24 * 9, 48), nn.ReLU(), nn.Linear(48, CLASSES)
        )

    def forward(self, x):
        return self.classifier(self.features(x).view(-1, 24 * 9))


class Residual(nn.Module):
    """A body beside a shortcut (He et al. 2016)."""

    def __init__(
        self, body: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut or nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.act(self.body(x) + self.shortcut(x))


def _project(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    return None if inputs == outputs and stride == 1 else conv_bn(inputs, outputs, 1, stride, act=nn.Identity)


def _basic(inputs: int, outputs: int, stride: int) -> nn.Module:
    body = nn.Sequential(conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs, act=nn.Identity))
    return Residual(body, _project(inputs, outputs, stride), nn.ReLU())


def _bottleneck(inputs: int, outputs: int, stride: int, groups: int = 1, se: bool = False) -> nn.Module:
    inner = outputs // 2
    body = nn.Sequential(
        conv_bn(inputs, inner, 1),
        conv_bn(inner, inner, 3, stride, groups),
        *([SqueezeExcite(inner, inner // 4)] if se else []),
        conv_bn(inner, outputs, 1, act=nn.Identity),
    )
    return Residual(body, _project(inputs, outputs, stride), nn.ReLU())


def _staged(block, widths=(16, 32, 48), depth: int = 2) -> nn.Module:
    """Stem, stages that halve the map, and a pooled head."""
    parts, inputs = [conv_bn(3, widths[0])], widths[0]
    for stage, width in enumerate(widths):
        for number in range(depth):
            parts.append(block(inputs, width, 2 if stage and not number else 1))
            inputs = width
    return nn.Sequential(*parts, head(inputs))


class PreActivation(nn.Module):
    """Norm and activation before each convolution; the sum is left raw (He et al. 2016b)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x):
        y = F.relu(self.norm1(x))
        rest = x if self.shortcut is None else self.shortcut(y)
        return rest + self.conv2(F.relu(self.norm2(self.conv1(y))))


class OptionA(nn.Module):
    """The CIFAR ResNet's block, its shortcut without weights: every second pixel, zeros for new channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs, act=nn.Identity)
        )
        self.added = (outputs - inputs) // 2

    def forward(self, x):
        rest = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added)) if self.added else x
        return F.relu(self.body(x) + rest)


class GroupNormBlock(nn.Module):
    """A basic block with GroupNorm (Wu and He 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(4, outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1), nn.GroupNorm(4, outputs)
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()
        )

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Res2NetBlock(nn.Module):
    """Splits channels in four; each part also sees the part before it (Gao et al. 2019)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.reduce, self.expand = conv_bn(inputs, outputs, 1), conv_bn(outputs, outputs, 1, act=nn.Identity)
        self.convs = nn.ModuleList(conv_bn(outputs // 4, outputs // 4) for _ in range(3))
        self.shortcut = _project(inputs, outputs, stride) or nn.Identity()
        self.pool = nn.AvgPool2d(stride)

    def forward(self, x):
        parts = torch.chunk(self.reduce(x), 4, 1)
        done = [parts[0]]
        for part, conv in zip(parts[1:], self.convs, strict=True):
            done.append(conv(part if len(done) == 1 else part + done[-1]))
        return F.relu(self.expand(self.pool(torch.cat(done, 1))) + self.shortcut(x))


class DenseLayer(nn.Module):
    """Adds a few channels to all that came before (Huang et al. 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def _densenet() -> nn.Module:
    parts, width = [nn.Conv2d(3, 16, 3, padding=1, bias=False)], 16
    for stage in range(2):
        for _ in range(3):
            parts, width = [*parts, DenseLayer(width, 8)], width + 8
        if stage == 0:
            parts += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1), nn.AvgPool2d(2)]
            width //= 2
    return nn.Sequential(*parts, nn.BatchNorm2d(width), nn.ReLU(), head(width))


class Inception(nn.Module):
    """Four branches side by side (Szegedy et al. 2015)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.one = conv_bn(inputs, width, 1)
        self.three = nn.Sequential(conv_bn(inputs, width, 1), conv_bn(width, width))
        self.five = nn.Sequential(conv_bn(inputs, 8, 1), conv_bn(8, 8, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(inputs, 8, 1))

    def forward(self, x):
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class RepVggBlock(nn.Module):
    """Three linear branches summed before the activation (Ding et al. 2021), as in training."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.three = conv_bn(inputs, outputs, 3, stride, act=nn.Identity)
        self.one = conv_bn(inputs, outputs, 1, stride, act=nn.Identity)
        self.same = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x):
        y = self.three(x) + self.one(x)
        return F.relu(y if self.same is None else y + self.same(x))


class Csp(nn.Module):
    """CSPDarknet's stage: half of the channels goes around the blocks (Wang et al. 2020)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.down = conv_bn(inputs, outputs, 3, stride, act=nn.SiLU)
        inner = outputs // 2
        self.left, self.right = (conv_bn(outputs, inner, 1, act=nn.SiLU) for _ in range(2))
        self.body = Residual(nn.Sequential(conv_bn(inner, inner, 1), conv_bn(inner, inner, act=nn.SiLU)))
        self.join = conv_bn(outputs, outputs, 1, act=nn.SiLU)

    def forward(self, x):
        x = self.down(x)
        return self.join(torch.cat((self.body(self.left(x)), self.right(x)), dim=1))


class Cbam(nn.Module):
    """Channel and spatial attention after a basic block (Woo et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.block = _basic(inputs, outputs, stride)
        self.mlp = nn.Sequential(
            nn.Linear(outputs, outputs // 4), nn.ReLU(), nn.Linear(outputs // 4, outputs)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        x = self.block(x)
        gate = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))
        x = x * gate[:, :, None, None]
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.spatial(seen))


RESIDUAL = architectures(
    "vision",
    {
        "vgg": _vgg,
        "alexnet": AlexNet,
        "resnet-basic": lambda: _staged(_basic),
        "resnet-bottleneck": lambda: _staged(_bottleneck),
        "resnext": lambda: _staged(lambda i, o, s: _bottleneck(i, o, s, groups=4)),
        "regnet-y": lambda: _staged(lambda i, o, s: _bottleneck(i, o, s, groups=o // 16, se=True)),
        "resnet-preactivation": lambda: _staged(PreActivation),
        "resnet-option-a": lambda: _staged(OptionA, (16, 32, 64)),
        "resnet-groupnorm": lambda: _staged(GroupNormBlock),
        "resnet-cbam": lambda: _staged(Cbam),
        "res2net": lambda: _staged(Res2NetBlock),
        "densenet": _densenet,
        "inception": lambda: nn.Sequential(
            conv_bn(3, 16), nn.MaxPool2d(2), Inception(16, 16), Inception(48, 24), head(64)
        ),
        "repvgg": lambda: _staged(RepVggBlock),
        "cspdarknet": lambda: _staged(Csp),
    },
    images(),
)
