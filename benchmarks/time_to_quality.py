"""Seconds and multiply-adds of training to a fixed accuracy: plain loops against what `pj.tune` chose.

    PENJING_DATA=/path/to/data python benchmarks/time_to_quality.py [--data fashion cifar10] [--seeds 3]
        [--search 8min] [--out runs/time_to_quality]

The plain loops are what most people write: a shuffling `DataLoader` with batches of 128, float32, and
either SGD at 0.1 with Nesterov momentum, weight decay 5e-4 and a rate that falls to a tenth at a half and
three quarters of the epochs, or Adam at 0.001. `pj.tune` sees 5,000 images held back from the training data
and looks for the goal plus a margin; its time is printed and counts for itself: it searches once, and what it
finds trains networks of other seeds here. All sides look at the unseen test images after each pass, looks not
counted, and stop when their accuracy reaches the goal. The seeds go round: one run of each side, then the
next. The network is a small convolutional one with BatchNorm; nothing is augmented. One row a run, then
medians.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

import penjing as pj

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cifar10

GOALS = {"fashion": 0.9, "cifar10": 0.7}
MARGIN = 0.005
EPOCHS = 8
HELD_BACK = 5000


Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Row = tuple[float | None, int, float]
"""Seconds to the goal, examples seen, accuracy in the end."""


class Net(nn.Module):
    """Four convolutions with BatchNorm, 16 to 64 channels, the mean over the image, and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((channels, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [n, 10]."""
        return self.head(self.body(x).mean((2, 3)))


def images(name: str) -> Data:
    """Return normalized training and test images with their labels."""
    if name == "cifar10":
        data = cifar10.images()
        return (
            cifar10.normalised(data["train_x"]),
            data["train_y"],
            cifar10.normalised(data["test_x"]),
            data["test_y"],
        )
    with np.load(cifar10.data_folder() / "cv" / "fashion_mnist.npz") as data:
        x, u = (((data[f"{part}_images"] / np.float32(255)) - 0.286) / 0.353 for part in ("train", "test"))
        y, v = (data[f"{part}_labels"].astype(np.int64) for part in ("train", "test"))
    return x[:, None].astype(np.float32), y, u[:, None].astype(np.float32), v


def fresh(x: np.ndarray, seed: int) -> Net:
    """Return a network with weights drawn from a seed."""
    torch.manual_seed(seed)
    return Net(x.shape[1])


def accuracy(net: nn.Module, x: np.ndarray, y: np.ndarray) -> float:
    """Return the share of right answers, in evaluation mode."""
    net.eval()
    with torch.no_grad():
        right = sum(
            int((net(torch.from_numpy(x[i : i + 500])).argmax(1).numpy() == y[i : i + 500]).sum())
            for i in range(0, len(x), 500)
        )
    net.train()
    return right / len(x)


def plain(kind: str, data: Data, goal: float, seed: int) -> Row:
    """Train by a loop as most people write it."""
    x, y, u, v = data
    net = fresh(x, seed)
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    loader = torch.utils.data.DataLoader(pairs, batch_size=128, shuffle=True)
    if kind == "sgd":
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [EPOCHS // 2, 3 * EPOCHS // 4])
    else:
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    loss_of, seconds, found = nn.CrossEntropyLoss(), 0.0, 0.0
    for epoch in range(EPOCHS):
        start = time.perf_counter()
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss_of(net(inputs), targets).backward()
            optimizer.step()
        scheduler.step()
        seconds += time.perf_counter() - start
        found = accuracy(net, u, v)
        if found >= goal:
            return seconds, (epoch + 1) * len(x), found
    return None, EPOCHS * len(x), found


def tuned(
    data: tuple[np.ndarray, ...], strategy: pj.Strategy, goal: float, seed: int
) -> tuple[float | None, int, float]:
    """Train by a strategy; return as `plain`."""
    x, y, u, v = data
    task = pj.Task(train=(x, y), valid=(u, v), test=(u[:1], v[:1]), max_overlap=1)
    record = pj.fit(fresh(x, seed), task, strategy, goal=f"accuracy >= {goal}", seed=seed, say=_quiet).record
    return (None if record.reached is None else record.reached.seconds), record.examples, record.quality


def _quiet(line: str) -> None:
    return None


def compare(name: str, options: argparse.Namespace) -> None:
    """Search once, then print a row for each run and the medians."""
    data, goal = images(name), options.goal or GOALS[name]
    x, y, u, v = data
    held = np.random.default_rng(0).permutation(len(x))
    train, valid = held[HELD_BACK:], held[:HELD_BACK]
    task = pj.Task(train=(x[train], y[train]), valid=(x[valid], y[valid]), test=(u, v))
    found = pj.tune(
        lambda: fresh(x, 100),
        task,
        goal=f"accuracy >= {goal + MARGIN}",
        time=options.search,
        out=options.out / name,
        seed=100,
    )
    macs = 3 * _multiply_adds(fresh(x, 0), x)
    print(f"\n{name}: accuracy >= {goal:.1%} on {len(u)} test images, {torch.get_num_threads()} thread(s)")
    print(f"search of {found.record.spent_s:.0f} s, {len(found.record.runs)} runs: {found.strategy!r}")
    sides = {"sgd": "plain SGD", "adam": "plain Adam", "tuned": "pj.tune's choice"}
    rows: dict[str, list[Row]] = {side: [] for side in sides}
    for seed in range(options.seeds):
        for side in sides:
            if side == "tuned":
                row = tuned(data, found.strategy, goal, seed)
            else:
                row = plain(side, data, goal, seed)
            rows[side].append(row)
            print(
                json.dumps(
                    {
                        "data": name,
                        "side": side,
                        "seed": seed,
                        "seconds": row[0],
                        "multiply_adds": row[1] * macs,
                        "accuracy": row[2],
                    }
                ),
                flush=True,
            )
    print(f"{'':<18} seconds, median [least, most]  multiply-adds  reached")
    for side, words in sides.items():
        reached = sorted(row[0] for row in rows[side] if row[0] is not None)
        work = median(row[1] for row in rows[side]) * macs / 1e12
        text = f"{median(reached):.1f} [{reached[0]:.1f}, {reached[-1]:.1f}]" if reached else "never"
        print(f"{words:<18} {text:<30} {work:>8.2f} T    {len(reached)} of {options.seeds}", flush=True)


def _multiply_adds(net: nn.Module, x: np.ndarray) -> int:
    from penjing.core.backend import backend_for

    return backend_for(net).operations(net.eval(), (x[:1],)).multiply_adds


def main() -> None:
    """Parse arguments and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--goal", type=float, help="accuracy to reach, instead of 0.9 and 0.7")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search", default="8min", help="time of pj.tune")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_quality"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.data:
        compare(name, options)


if __name__ == "__main__":
    main()
