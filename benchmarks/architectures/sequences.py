"""Networks on series, points and sound."""

import torch
from torch import nn
from torch.nn import functional as F

from architectures.registry import CLASSES, VOCABULARY, Architecture, conv_bn, images, seeded, tokens, waves

__all__ = ["SEQUENCES"]


class PointNet(nn.Module):
    """Shared MLPs over points, a maximum over them, joined back to each point (Qi et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv1d(16, 48, 1), nn.BatchNorm1d(48), nn.ReLU())
        self.transform = nn.Linear(16, 9)
        self.head = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, CLASSES))

    def forward(self, x):
        turn = self.transform(self.first(x).max(2)[0]).view(-1, 3, 3) + torch.eye(3)
        each = self.first(torch.bmm(turn, x))
        whole = torch.max(self.second(each), 2, keepdim=True)[0]
        joined = torch.cat([each, whole.repeat(1, 1, x.shape[2])], 1)
        return self.head(joined.mean(2))


class Tcn(nn.Module):
    """Dilated causal convolutions with shortcuts (Bai et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Conv1d(4, 24, 1)
        self.convs = nn.ModuleList(nn.Conv1d(24, 24, 3, dilation=2**i) for i in range(3))
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x):
        x = self.inputs(x)
        for i, conv in enumerate(self.convs):
            x = F.relu(x + F.relu(conv(F.pad(x, (2 * 2**i, 0)))))
        return self.head(x[:, :, -1])


class WaveNet(nn.Module):
    """Gated dilated convolutions: tanh of one half times sigmoid of the other (van den Oord et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Conv1d(4, 24, 1)
        self.gated = nn.ModuleList(nn.Conv1d(24, 48, 3, padding=2**i, dilation=2**i) for i in range(2))
        self.residual = nn.ModuleList(nn.Conv1d(24, 24, 1) for _ in range(2))
        self.skip = nn.ModuleList(nn.Conv1d(24, 32, 1) for _ in range(2))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(32, 32, 1), nn.ReLU(), nn.Conv1d(32, CLASSES, 1))

    def forward(self, x):
        x, total = self.inputs(x), 0.0
        for gated, residual, skip in zip(self.gated, self.residual, self.skip, strict=True):
            value, gate = gated(x).chunk(2, dim=1)
            y = torch.tanh(value) * torch.sigmoid(gate)
            x, total = x + residual(y), total + skip(y)
        return self.last(total)


class GatedConvolutions(nn.Module):
    """A classifier of words by `glu` (Dauphin et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 24)
        self.convs = nn.ModuleList(nn.Conv1d(24, 48, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(24, CLASSES)

    def forward(self, tokens):
        x = self.words(tokens).transpose(1, 2)
        for conv in self.convs:
            x = x + F.glu(conv(x), dim=1)
        return self.head(x.mean(2))


class TextCnn(nn.Module):
    """Convolutions of several widths over words, their maxima joined (Kim 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 32, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(32, 16, k) for k in (2, 3, 4))
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(48, CLASSES))

    def forward(self, tokens):
        x = self.words(tokens).permute(0, 2, 1)
        return self.head(torch.cat([F.relu(conv(x)).amax(dim=2) for conv in self.convs], dim=1))


class Crnn(nn.Module):
    """Convolutions, the height folded into channels, an LSTM along the width (Shi et al. 2017)."""

    def __init__(self, recurrent: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.convs = nn.Sequential(conv_bn(1, 16), nn.MaxPool2d(2), conv_bn(16, 32), nn.MaxPool2d((2, 1)))
        self.recurrent = recurrent(32 * 4, 24, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x):
        y = self.convs(x).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.recurrent(y)[0])


class ConformerConvolution(nn.Module):
    """The convolution module of the Conformer between two half-step MLPs (Gulati et al. 2020)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 64), nn.Linear(64, width)
        self.conv_norm, self.pointwise = nn.LayerNorm(width), nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, 5, padding=2, groups=width)
        self.batch_norm, self.last = nn.BatchNorm1d(width), nn.Conv1d(width, width, 1)

    def forward(self, x):
        x = x + 0.5 * self.down(F.silu(self.up(self.norm(x))))
        y = F.glu(self.pointwise(self.conv_norm(x).transpose(1, 2)), 1)
        return x + self.last(F.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)


class Conformer(nn.Module):
    """Two such blocks on a spectrogram."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(16, 32)
        self.blocks = nn.Sequential(ConformerConvolution(), ConformerConvolution())
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x):
        return self.head(self.blocks(self.inputs(x)).mean(1))


def _m5() -> nn.Module:
    """Raw sound through one-dimensional convolutions (Dai et al. 2017)."""
    parts, inputs = [], 1
    for outputs, kernel, stride in ((16, 16, 4), (16, 3, 1), (32, 3, 1)):
        parts += [
            nn.Conv1d(inputs, outputs, kernel, stride),
            nn.BatchNorm1d(outputs),
            nn.ReLU(),
            nn.MaxPool1d(4),
        ]
        inputs = outputs
    return nn.Sequential(*parts, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, CLASSES))


def _video() -> nn.Module:
    """C3D (Tran et al. 2015): three-dimensional convolutions, the frames made from one image's rows."""
    return nn.Sequential(
        nn.Unflatten(2, (4, 8)),
        nn.Conv3d(3, 16, 3, padding=1),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


_MODELS = {
    "pointnet": (PointNet, waves(3, 40)),
    "tcn": (Tcn, waves(4, 32)),
    "wavenet": (WaveNet, waves(4, 32)),
    "gated-convolutions": (GatedConvolutions, tokens()),
    "textcnn": (TextCnn, tokens()),
    "crnn-lstm": (Crnn, images(16, 1)),
    "crnn-gru": (lambda: Crnn(nn.GRU), images(16, 1)),
    "conformer-conv": (Conformer, waves(20, 16)),
    "m5": (_m5, waves(1, 600)),
    "c3d": (_video, images()),
}
SEQUENCES = {
    name: Architecture(name, "sequence", seeded(build), example) for name, (build, example) in _MODELS.items()
}
