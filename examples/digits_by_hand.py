"""By hand: train a small network on handwritten digits, then prune, distil, quantize, measure and deliver it.

    python examples/digits_by_hand.py

Writes the folder `digits-small`, which must not exist yet.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import penjing as pj


def splits() -> list[tuple[np.ndarray, np.ndarray]]:
    """Return training, validation and test data: images [n, 1, 8, 8] and labels [n]."""
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    return [(images[part], digits.target[part]) for part in np.split(order, [700, 1000])]


def trained(images: np.ndarray, labels: np.ndarray, epochs: int = 8) -> nn.Module:
    """Return a network trained on these images."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
    return net.eval()


def main() -> None:
    """Go through every step and print what came of it."""
    train, valid, test = splits()
    task = pj.Task(train=train, valid=valid, test=test).prepare()
    model = trained(*train)

    plan = pj.chain(
        pj.only("3", pj.PruneChannels(0.5)),  # the second convolution only
        pj.ReestimateBatchNorm(),
        pj.Distill(epochs=2),
        pj.Int8Static(),
        pj.CorrectBias(),
    )
    small = pj.apply(model, plan, task)
    for change in small.changes:
        print(f"{change.method:<20} {change.layer:<4} {change.status:<8} {change.reason}")

    for name, candidate in (("float", model), ("small", small.model)):
        m = pj.measure(candidate, task)
        print(
            f"{name}: {m.metric} {m.quality.value:.4f}, {m.latency.p50_ms.value:.4f} ms, {m.size_bytes} bytes"
        )

    target, example = pj.Target(), task.valid.example()
    artefact = pj.deliver(small, target, "digits-small", example=example)
    print(artefact.path)
    predict = pj.load("digits-small")
    images, labels = test
    print(f"test accuracy of the delivered file: {(predict(images).argmax(axis=1) == labels).mean():.4f}")


if __name__ == "__main__":
    main()
