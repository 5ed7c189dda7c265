"""Time one training step in each number format and layout, interleaved; the evidence for the rules of
`penjing.train.numerics`. Run it on a quiet machine: `python benchmarks/training_numerics.py [threads]`.

    python benchmarks/training_numerics.py 1 --compile

times a step as it is and through `torch.compile`, interleaved, in the format and layout that the rules
choose: processor seconds, the seconds of the step that compiles, and after how many steps they are paid back.

    python benchmarks/training_numerics.py 1 --products

times a step in float32, in float32 whose products oneDNN takes in bfloat16 (`torch.backends.fp32_precision`,
the one public way from the matrix library to oneDNN), and under autocast, interleaved, in processor seconds.

    python benchmarks/training_numerics.py 1 --eight-bit

times the steps of AdamW and of torchao's AdamW8bit alone, on the weights of the encoder, and tells the bytes
of their states.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import nn

from penjing.train.numerics import Numerics, numerics_for

SECONDS_A_NETWORK = 5.0
CHOICES = [Numerics(bfloat16=b, channels_last=c) for b in (False, True) for c in (False, True)]


class Block(nn.Module):
    """Two convolutions around a shortcut, as in He et al. (2016)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inside, outside, 3, stride), nn.ReLU(), *convolution(outside, outside, 3)
        )
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(inside, outside, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        return torch.relu(self.body(x) + self.shortcut(x))


def convolution(inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution without bias and its normalization."""
    layer = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outside)]


def resnet(widths: tuple[int, int, int], depth: int = 3) -> nn.Sequential:
    """Return a residual network for 32x32 images."""
    layers: list[nn.Module] = [*convolution(3, widths[0], 3), nn.ReLU()]
    inside = widths[0]
    for stage, width in enumerate(widths):
        for index in range(depth):
            layers.append(Block(inside, width, 2 if stage and not index else 1))
            inside = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))


def depthwise(widths: tuple[int, int, int], expand: int = 6) -> nn.Sequential:
    """Return a chain of inverted bottlenecks without shortcuts, as in MobileNetV2."""
    layers: list[nn.Module] = [*convolution(3, widths[0], 3), nn.ReLU6()]
    inside = widths[0]
    for width in widths:
        hidden = inside * expand
        layers += [*convolution(inside, hidden, 1), nn.ReLU6()]
        layers += [*convolution(hidden, hidden, 3, 2, groups=hidden), nn.ReLU6()]
        layers += convolution(hidden, width, 1)
        inside = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))


def perceptron(width: int, depth: int) -> nn.Sequential:
    """Return linear layers of one width."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(3072, width)]
    for _ in range(depth):
        layers += [nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.Linear(width, 10))


NETWORKS = {
    "ResNet-20": (resnet((16, 32, 64)), 128),
    "ResNet-20, batch 16": (resnet((16, 32, 64)), 16),
    "ResNet-20, widths 8 16 32": (resnet((8, 16, 32)), 128),
    "ResNet-20, widths 10 21 43": (resnet((10, 21, 43)), 128),
    "depthwise, widths 16 32 64": (depthwise((16, 32, 64)), 64),
    "depthwise, widths 13 21 30": (depthwise((13, 21, 30), 5), 64),
    "linear, width 64": (perceptron(64, 2), 128),
    "linear, width 1024": (perceptron(1024, 3), 128),
}


class Encoder(nn.Module):
    """A transformer encoder on the 48 patches of an image, four layers of width 256."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, 0.0, batch_first=True)
        self.patches, self.body = nn.Linear(64, 256), nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of images `[n, 3, 32, 32]`."""
        return self.head(self.body(self.patches(x.flatten(1).unflatten(1, (48, 64)))).mean(1))


def step_of(network: nn.Module, batch: int, numerics: Numerics, compiled: bool = False):
    """Return a function that takes one step on a copy of the network."""
    model = copy.deepcopy(network).train()
    if numerics.channels_last:
        model.to(memory_format=torch.channels_last)
    call = torch.compile(model, dynamic=False) if compiled else model
    x, y = numerics.to_layout((torch.randn(batch, 3, 32, 32),))[0], torch.randint(0, 10, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)

    def step() -> None:
        with numerics.autocast():
            outputs = call(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs.float(), y).backward()
        optimizer.step()

    return step


def milliseconds(network: nn.Module, batch: int) -> dict[Numerics, float]:
    """Return the median time of a step for each choice, measured in turn."""
    steps = {choice: step_of(network, batch, choice) for choice in CHOICES}
    times: dict[Numerics, list[float]] = {choice: [] for choice in CHOICES}
    for step in steps.values():
        for _ in range(3):
            step()
    end = time.perf_counter() + SECONDS_A_NETWORK
    while time.perf_counter() < end:
        for choice, step in steps.items():
            start = time.perf_counter()
            step()
            times[choice].append(1e3 * (time.perf_counter() - start))
    return {choice: median(values) for choice, values in times.items()}


def show_compiled() -> None:
    """Print what compiling costs and brings."""
    print("| | computed in | seconds to compile | ms a step, eager | compiled | paid back after steps |")
    print("|---|---|---|---|---|---|")
    networks = {
        name: NETWORKS[name] for name in ("ResNet-20", "depthwise, widths 16 32 64", "linear, width 1024")
    }
    for name, (network, batch) in {**networks, "encoder, 4 layers of 256": (Encoder(), 32)}.items():
        numerics = numerics_for(network, "auto")
        steps = [step_of(network, batch, numerics, compiled) for compiled in (False, True)]
        steps[0]()
        start = time.perf_counter()
        steps[1]()
        first = time.perf_counter() - start
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(20):
            for step, taken in zip(steps, times, strict=True):
                start = time.process_time()
                step()
                taken.append(time.process_time() - start)
        eager, compiled = (median(taken[3:]) for taken in times)
        paid = f"{first / (eager - compiled):.0f}" if compiled < eager else "never"
        print(
            f"| {name} | {numerics} | {first:.0f} | {1e3 * eager:.3g} | {1e3 * compiled:.3g} | {paid} |",
            flush=True,
        )


@contextmanager
def products(kind: str) -> Iterator[None]:
    """Let oneDNN take the products of float32 layers in `ieee` or `bf16`."""
    backends = (
        torch.backends,
        torch.backends.mkldnn,
        torch.backends.mkldnn.matmul,
        torch.backends.mkldnn.conv,
    )
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = kind
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def show_products() -> None:
    """Print what products in bfloat16 save, and how far their outputs are from those of float32."""
    print("| ms a step | float32 | products in bfloat16 | autocast | apart: products | apart: autocast |")
    print("|---|---|---|---|---|---|")
    single, half = (Numerics(bfloat16=bfloat16, channels_last=False) for bfloat16 in (False, True))
    kinds = (("ieee", single), ("bf16", single), ("ieee", half))
    for name in ("ResNet-20", "linear, width 1024", "encoder"):
        network, batch = NETWORKS[name] if name in NETWORKS else (Encoder(), 32)
        x, outputs = torch.randn(batch, 3, 32, 32), []
        steps = [step_of(network, batch, numerics) for _, numerics in kinds]
        times: list[list[float]] = [[] for _ in kinds]
        for kind, numerics in kinds:
            with products(kind), torch.no_grad(), numerics.autocast():
                outputs.append(network.eval()(x).float())
        for _ in range(15):
            for (kind, _), step, taken in zip(kinds, steps, times, strict=True):
                with products(kind):
                    start = time.process_time()
                    step()
                    taken.append(1e3 * (time.process_time() - start))
        apart = [float((y - outputs[0]).norm() / outputs[0].norm()) for y in outputs[1:]]
        cells = [*(f"{median(taken[3:]):.4g}" for taken in times), *(f"{value:.1e}" for value in apart)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def show_eight_bit() -> None:
    """Print what 8-bit states cost and save."""
    from torchao.optim import AdamW8bit

    print("| optimizer | seconds of the first step | ms a step | MB of state for", end=" ")
    network = Encoder()
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M weights |\n|---|---|---|---|")
    for cls in (torch.optim.AdamW, AdamW8bit):
        model = copy.deepcopy(network)
        optimizer = cls(model.parameters(), lr=1e-3)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        start = time.perf_counter()
        optimizer.step()
        first, taken = time.perf_counter() - start, []
        for _ in range(20):
            start = time.process_time()
            optimizer.step()
            taken.append(time.process_time() - start)
        size = sum(_bytes(v) for state in optimizer.state.values() for v in state.values())
        print(f"| {cls.__name__} | {first:.2g} | {1e3 * median(taken):.3g} | {size / 1e6:.1f} |", flush=True)


def _bytes(tensor: torch.Tensor) -> int:
    if type(tensor) is torch.Tensor:
        return tensor.numel() * tensor.element_size()
    inner, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in inner)


def main() -> None:
    """Print a table in Markdown; the choice of the rules is marked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("threads", nargs="?", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--eight-bit", action="store_true")
    parser.add_argument("--products", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.compile:
        show_compiled()
        return
    if options.products:
        show_products()
        return
    if options.eight_bit:
        show_eight_bit()
        return
    print("ms per step |", " | ".join(map(str, CHOICES)))
    print("|".join(["---"] * (len(CHOICES) + 1)))
    for name, (network, batch) in NETWORKS.items():
        chosen = numerics_for(network, "auto")
        cells = [f"{ms:.4g}{' *' if c == chosen else ''}" for c, ms in milliseconds(network, batch).items()]
        print(name, "|", " | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
