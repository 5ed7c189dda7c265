"""The frame of the benchmarks on small language models: data, perplexities with intervals, and the table.

Calibration data are other sequences than those that judge. Intervals are 95%, from a bootstrap over
sequences (tokens of one sequence hang together); ratios are paired, on the same sequences. Seconds are of the
processor.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import penjing as pj
from language_models import characters, stories
from penjing.arrays.bootstrap import Resampled, bootstrap

MODELS = {"stories": stories, "characters": characters}
Change = Callable[[nn.Module, pj.Task], nn.Module]
"""From a model and a task to a smaller model."""


@dataclass(frozen=True)
class Line:
    """One line of the table; intervals as (low, high); `ratio` is over the unchanged model."""

    model: str
    row: str
    method: str
    perplexity: float
    interval: tuple[float, float]
    ratio: float
    ratio_interval: tuple[float, float]
    seconds: float


@dataclass(frozen=True)
class Table:
    """What a benchmark compares.

    Attributes:
        rows: by name of the row, by name of the method, how the model is changed.
        head: what the rows are of.
        whole: row and method of the unchanged model.
    """

    rows: Mapping[str, Mapping[str, Change]]
    head: str
    whole: tuple[str, str]

    def show(self, models: Sequence[str], file: str | None = None) -> None:
        """Judge and print model after model, and write the lines to a JSON file where one is named."""
        lines: list[Line] = []
        for name in models:
            steps: list[str] = []
            for line in self._judge(name, steps):
                print(as_row(line), flush=True)
                lines.append(line)
            print("", *steps, sep="\n")
        if file:
            with open(file, "w", encoding="utf-8") as out:
                json.dump([asdict(line) for line in lines], out, indent=1)

    def _judge(self, name: str, steps: list[str]) -> Iterator[Line]:
        """Yield the unchanged model's line, then those of every method at every row; note the steps."""
        model, calibration, evaluation = MODELS[name]()
        task, whole = task_of(calibration, evaluation), losses(model, evaluation)
        print(
            f"\n{name}: {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{calibration.size:,} tokens to calibrate, {whole.size:,} judged\n"
        )
        heads = ("model", self.head, "method", "perplexity", "95%", f"over {self.whole[1]}", "95%", "s")
        print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n")
        yield Line(name, *self.whole, *numbers(whole), 1.0, (1.0, 1.0), 0.0)
        for row, methods in self.rows.items():
            before = None
            for method, change in methods.items():
                start = time.process_time()
                small = change(model, task)
                seconds = time.process_time() - start
                found = losses(small, evaluation)
                yield Line(name, row, method, *numbers(found), *numbers(found - whole), seconds)
                if before is not None:
                    steps.append(f"{row} {method} / {before[0]}: {step(found - before[1])}")
                before = method, found


def step(nats: np.ndarray) -> str:
    """Return the ratio of two perplexities in words."""
    ratio, (low, high) = numbers(nats)
    return f"{ratio:.3f} ({low:.3f} to {high:.3f})" + (", not told apart" if low <= 1 <= high else "")


def task_of(calibration: np.ndarray, evaluation: np.ndarray) -> pj.Task:
    """Return next-token prediction as a task; the search never sees what judges, so valid is calibration."""
    (x, y), (test_x, test_y) = ((part[:, :-1], part[:, 1:]) for part in (calibration, evaluation))
    return pj.Task(
        train=(x, y),
        valid=(x[:8], y[:8]),
        test=(test_x, test_y),
        loss=lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        metric=lambda logits, targets: 0.0,
        direction="minimize",
        max_overlap=1,
    )


def losses(model: nn.Module, sequences: np.ndarray) -> np.ndarray:
    """Return the negative log-likelihood of every token but the first, in nats, [sequences, tokens - 1]."""
    parts = []
    with torch.no_grad():
        for ids in torch.from_numpy(sequences).split(32):
            logits = model(ids[:, :-1]).transpose(1, 2)
            parts.append(F.cross_entropy(logits, ids[:, 1:], reduction="none").numpy())
    return np.concatenate(parts).astype(float)


def numbers(nats: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return exp of the mean, and its 95% interval over sequences."""
    means = nats.mean(1)
    if np.ptp(means) == 0:
        return float(np.exp(means[0])), (float(np.exp(means[0])),) * 2
    found: Resampled = bootstrap(lambda weights: weights @ means / weights.sum(1), len(means))
    low, high = (float(np.exp(found.quantile(share))) for share in (0.025, 0.975))
    return float(np.exp(found.value)), (low, high)


def as_row(line: Line) -> str:
    """Return a line of the table in Markdown."""
    (low, high), (least, most) = line.interval, line.ratio_interval
    return (
        f"| {line.model} | {line.row} | {line.method} | {line.perplexity:.3f} | {low:.3f} to {high:.3f} "
        f"| {line.ratio:.3f} | {least:.3f} to {most:.3f} | {line.seconds:.0f} |"
    )
