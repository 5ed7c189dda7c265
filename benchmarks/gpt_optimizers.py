"""Steps and seconds to one validation loss of a small GPT: AdamW, Muon and Schedule-Free through `pj.fit`.

    PENJING_DATA=/path/to/data python benchmarks/gpt_optimizers.py [--steps 360] [--seeds 2] [--width 96]

A GPT over the characters of tinyshakespeare, of three layers, trains on random windows of 64 characters
from the first nine tenths of the text; 128 windows of the last tenth judge it every 20 steps. AdamW and
Muon anneal over all the steps, Schedule-Free keeps its rate, as its authors do. Each side chooses among
three rates, a factor of three apart around a usual one, by the loss at the end of a run with a seed of its
own; then all sides train with the same seeds in turn. The goal is what AdamW with cosine decay came to in
its best run of the choice, plus 0.01. A side that anneals would need fewer steps yet were its schedule as
short as its way to the goal. Seconds are of the processor, since other work may share it; looks at the
validation data are in them.
"""

import argparse
import gzip
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

import penjing as pj
from language_models import HELD_OUT, Gpt, data_file
from penjing.core.goal import Goal, parse_goal
from penjing.experiments.fit import FitRecord

LENGTH, BATCH, LAYERS = 64, 16, 3
LOOK_EVERY = 20
JUDGED = 128
CHOOSING_SEED = 100
MARGIN = 0.01
FACTORS = (1 / 3, 1.0, 3.0)

Windows = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Side:
    """One way to train; `rate` is the middle of those tried."""

    optimizer: str
    schedule: str
    rate: float

    def strategy(self, rate: float, steps: int) -> pj.Strategy:
        """Return it at a rate; a pass is so many steps as lie between two looks."""
        return pj.Strategy(
            optimizer=self.optimizer,
            schedule=self.schedule,
            lr=rate,
            weight_decay=0.1,
            clip_norm=1.0,
            batch_size=BATCH,
            epochs=steps / LOOK_EVERY,
        )


SIDES = {
    "AdamW, cosine": Side("adamw", "cosine", 3e-3),
    "AdamW, linear": Side("adamw", "linear", 3e-3),
    "Muon, linear": Side("muon", "linear", 0.02),
    "Schedule-Free AdamW": Side("schedule_free", "constant", 1 / 300),
}


class Text:
    """Training windows of a text at random places; each walk goes on with others."""

    def __init__(self, ids: np.ndarray, seed: int) -> None:
        self._ids, self._rng = ids, np.random.default_rng(seed)

    def __len__(self) -> int:
        return LOOK_EVERY

    def __iter__(self) -> Iterator[Windows]:
        for _ in range(LOOK_EVERY):
            yield windows(self._ids, self._rng.integers(0, len(self._ids) - LENGTH - 1, BATCH))


@dataclass(frozen=True)
class Run:
    """A training run, and the seconds of the processor that lay behind at each look."""

    record: FitRecord
    seconds: list[float]

    def way(self, goal: Goal) -> tuple[int, float] | None:
        """Return steps and seconds to the first look that meets the goal."""
        looks = zip(self.record.curve, self.seconds, strict=True)
        return next(((point.step, seconds) for point, seconds in looks if goal.met(point.quality)), None)


def windows(ids: np.ndarray, starts: np.ndarray) -> Windows:
    """Return the characters after these starts, and the characters that follow each, both [n, 64]."""
    found = ids[starts[:, None] + np.arange(LENGTH + 1)]
    return found[:, :-1], found[:, 1:]


def training_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of logits [n, tokens, symbols] in nats."""
    return F.cross_entropy(logits.flatten(0, 1), targets.long().flatten())


def loss(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the same of arrays: the metric."""
    return float(training_loss(torch.from_numpy(logits), torch.from_numpy(targets)))


def read_text() -> tuple[np.ndarray, np.ndarray, int]:
    """Return the characters to train on and to judge with as numbers, and how many symbols there are."""
    text = gzip.decompress(data_file("nlp/tinyshakespeare.txt.gz").read_bytes()).decode()
    symbols = {symbol: index for index, symbol in enumerate(sorted(set(text)))}
    ids = np.array([symbols[symbol] for symbol in text], np.int64)
    cut = int(len(ids) * (1 - HELD_OUT))
    return ids[:cut], ids[cut:], len(symbols)


def run(side: Side, rate: float, seed: int, options: argparse.Namespace) -> Run:
    """Train one fresh GPT."""
    train, judged, symbols = read_text()
    starts = np.linspace(0, len(judged) - LENGTH - 2, 2 * JUDGED).astype(np.int64)
    task = pj.Task(
        train=Text(train, seed),
        valid=windows(judged, starts[::2]),
        test=windows(judged, starts[1::2]),
        loss=training_loss,
        metric=loss,
        direction="minimize",
    )
    torch.manual_seed(seed)
    model = Gpt(symbols, options.width, LAYERS)
    start, seconds = time.process_time(), []
    fitted = pj.fit(
        model,
        task,
        side.strategy(rate, options.steps),
        seed=seed,
        say=lambda line: seconds.append(time.process_time() - start),
    )
    return Run(fitted.record, seconds)


def chosen(name: str, options: argparse.Namespace) -> tuple[float, float]:
    """Return the best of three rates and its loss at the end, and print all."""
    side, ends = SIDES[name], {}
    for factor in FACTORS:
        try:
            ends[factor] = run(side, factor * side.rate, CHOOSING_SEED, options).record.quality
        except pj.Refused as refused:
            print(f"{name} at {factor * side.rate:.2g}: {refused}", flush=True)
            continue
        print(f"{name} at {factor * side.rate:.2g}: loss {ends[factor]:.3f} at the end", flush=True)
    best = min(ends, key=lambda factor: ends[factor])
    return best * side.rate, ends[best]


def show(options: argparse.Namespace) -> None:
    """Choose rates, then train with the seeds in turn, and print the table."""
    parameters = sum(p.numel() for p in Gpt(read_text()[2], options.width, LAYERS).parameters())
    print(
        f"{parameters:,} parameters, {options.steps} steps of {BATCH} windows of {LENGTH} characters, "
        f"{torch.get_num_threads()} thread(s)"
    )
    rates = {name: chosen(name, options) for name in SIDES}
    goal = parse_goal(f"loss <= {next(iter(rates.values()))[1] + MARGIN:.3f}")
    runs: dict[str, list[Run]] = {name: [] for name in SIDES}
    for seed in range(options.seeds):
        for name, side in SIDES.items():
            runs[name].append(run(side, rates[name][0], seed, options))
    print(f"\n| optimizer | rate | loss at the end | steps to {goal} | seconds to it | seconds a step |")
    print("|---" * 6 + "|")
    for name, found in runs.items():
        ends = ", ".join(f"{one.record.quality:.3f}" for one in found)
        ways = [one.way(goal) for one in found]
        steps = ", ".join("not reached" if one is None else f"{one[0]}" for one in ways)
        seconds = ", ".join("not reached" if one is None else f"{one[1]:.1f}" for one in ways)
        each = np.mean([one.seconds[-1] / one.record.steps for one in found])
        print(f"| {name} | {rates[name][0]:.2g} | {ends} | {steps} | {seconds} | {each:.3f} |", flush=True)


def main() -> None:
    """Parse arguments and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    show(options)


if __name__ == "__main__":
    main()
