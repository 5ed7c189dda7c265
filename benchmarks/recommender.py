"""A recommender with its embedding tables in rows of 8 and 4 bits: MovieLens-small, size, NDCG@10, lookups.

    PENJING_DATA=/path/to/data python benchmarks/recommender.py [--width 64] [--rounds 15]

The data are those of F. M. Harper and J. A. Konstan 2015, "The MovieLens datasets: history and context" (the
small set: 610 users, 9,724 films). The last fifth of each user's ratings in time is the test, each rating
counts as seen. The model is a matrix factorization with a bias for each film, trained on the softmax over all
films (seconds; cached): a score is the product of a row of the users' table and one of the films'. NDCG@10 is
over all films that the user has not seen, with a bootstrap interval over users (BCa, 95%), and paired with
that of the float tables. Popularity alone is the row below which nothing is learned.

Time is that of ONNX Runtime on one thread, models in turn: one user with all films, and 12,800 lookups (256
by 50) in a table of 100,000 random rows, which no cache holds. Medians with an interval over rounds.
"""

import argparse
import gzip
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

import penjing as pj
from penjing.arrays.bootstrap import bootstrap
from penjing.arrays.latency_statistics import percentile, rounds_interval

CACHE = Path(os.environ.get("PENJING_CACHE", "~/.cache/penjing")).expanduser()
FORMATS = ("float", "int8 channel", "uint4 group 32", "int4 group 32", "int4 channel")
K = 10
Floats = NDArray[np.float64]


class Factors(nn.Module):
    """Scores of films for users."""

    def __init__(self, users: int, films: int, width: int) -> None:
        super().__init__()
        self.users, self.films = nn.Embedding(users, width), nn.Embedding(films, width)
        self.bias = nn.Embedding(films, 1)
        for table, size in ((self.users, 0.1), (self.films, 0.1), (self.bias, 0.0)):
            nn.init.normal_(table.weight, std=size)

    def forward(self, user: torch.Tensor, films: torch.Tensor) -> torch.Tensor:
        """Return scores [n, k] of films [n, k] for users [n]."""
        product = (self.users(user)[:, None] * self.films(films)).sum(-1)
        return product + self.bias(films)[..., 0]


class Lookup(nn.Module):
    """A table alone."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [n, k, width] of rows [n, k]."""
        return self.table(rows)


def ratings() -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which films each user rated, `[users, films]`: the earlier four fifths, and the last fifth."""
    path = Path(os.environ.get("PENJING_DATA", "")) / "recsys" / "ml_latest_small_ratings.csv.gz"
    if not path.is_file():
        raise pj.Refused(
            "the data are there",
            value=str(path),
            place="recommender.py",
            fix="set PENJING_DATA to the folder with recsys/",
        )
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", skiprows=1)
    user, film = (np.unique(table[:, column], return_inverse=True)[1] for column in (0, 1))
    early, late = (np.zeros((user.max() + 1, film.max() + 1), bool) for _ in range(2))
    for number in range(len(early)):
        mine = np.flatnonzero(user == number)
        mine = mine[np.argsort(table[mine, 3], kind="stable")]
        cut = len(mine) - max(1, len(mine) // 5)
        early[number, film[mine[:cut]]] = late[number, film[mine[cut:]]] = True
    return early, late


def trained(early: NDArray[np.bool_], width: int, steps: int = 120) -> Factors:
    """Return the model trained on the earlier ratings; cached."""
    torch.manual_seed(0)
    model, path = Factors(*early.shape, width), CACHE / f"movielens_factors_{width}_{steps}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    wanted = torch.from_numpy(early / early.sum(1, keepdims=True)).float()
    optimizer = torch.optim.Adam(model.parameters(), 0.02, weight_decay=1e-5)
    for _ in range(steps):
        users = nn.functional.dropout(model.users.weight, 0.3)
        scores = users @ model.films.weight.T + model.bias.weight.T
        loss = -(wanted * scores.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model.eval()


def ndcg(scores: NDArray[np.float32], early: NDArray[np.bool_], late: NDArray[np.bool_]) -> Floats:
    """Return NDCG@10 of each user, with what was seen left out; relevance is 0 or 1 (Jarvelin 2002)."""
    best = np.argsort(np.where(early, np.inf, -scores), axis=1, kind="stable")[:, :K]
    gains = 1 / np.log2(np.arange(2, K + 2))
    found = (np.take_along_axis(late, best, 1) * gains).sum(1)
    return found / np.cumsum(gains)[np.minimum(late.sum(1), K) - 1]


def interval(values: Floats) -> tuple[float, float, float]:
    """Return the mean over users with its interval."""
    found = bootstrap(lambda weights: weights @ values / weights.sum(1), len(values))
    return found.value, found.quantile(0.025), found.quantile(0.975)


def task_of(make: Callable[[np.random.Generator, int], tuple[NDArray[np.int64], ...]]) -> pj.Task:
    """Return a task for outputs to be compared on; nothing is learned from it."""
    parts, count = {}, 8
    for seed, name in enumerate(("train", "valid", "test")):
        inputs = make(np.random.default_rng(seed), count)
        parts[name] = (inputs, np.zeros(count, np.int64))
    return pj.Task(**parts)


def packed(model: nn.Module, task: pj.Task, name: str, folder: Path) -> tuple[Path, int, list[str]]:
    """Return the file of a model with its tables in a format, its bytes, and what was done to each layer."""
    plan = () if name == "float" else (pj.QuantizeEmbeddings(name),)
    done = pj.apply(model, plan, task)
    example = task.prepare().valid.example()
    artefact = pj.deliver(done, pj.Target(), folder / name.replace(" ", "-"), example=example)
    path = next(artefact.path.rglob("*.onnx"))
    notes = []
    for change in (c for c in done.changes if c.layer != "*"):
        what = f"{change.detail['bits_per_value']:.2f} bits a value" if change.done else change.reason
        notes.append(f"{change.layer}: {what}")
    return path, path.stat().st_size, notes


def in_turn(files: Mapping[str, Path], inputs: tuple[NDArray, ...], rounds: int) -> None:
    """Print medians in microseconds with intervals over rounds."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    sessions = {
        name: ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        for name, path in files.items()
    }
    feeds = {n: dict(zip([i.name for i in s.get_inputs()], inputs, strict=True)) for n, s in sessions.items()}
    samples: dict[str, list[list[float]]] = {name: [] for name in sessions}
    for number in range(rounds + 1):
        for name, session in sessions.items():
            times = []
            for _ in range(20):
                start = time.perf_counter()
                session.run(None, feeds[name])
                times.append(1e6 * (time.perf_counter() - start))
            if number:
                samples[name].append(times)
    for name, found in samples.items():
        value, low, high = rounds_interval(found, percentile(0.5))
        print(f"    {name:<16} {value:9.1f} us [{low:9.1f}, {high:9.1f}]", flush=True)


def show(options: argparse.Namespace, folder: Path) -> None:
    """Print the tables."""
    early, late = ratings()
    start = time.perf_counter()
    model = trained(early, options.width)
    print(
        f"MovieLens-small, {len(early)} users, {early.shape[1]} films, width {options.width}; model in "
        f"{time.perf_counter() - start:.0f} s"
    )
    users, films = np.arange(len(early)), np.tile(np.arange(early.shape[1]), (32, 1))
    task = task_of(lambda rng, n: (rng.integers(0, len(users), n), films[:n]))
    popular = interval(ndcg(np.tile(early.sum(0, dtype=np.float32), (len(early), 1)), early, late))
    print(f"{'popularity':<16} {'':>9} NDCG@10 {popular[0]:.4f} [{popular[1]:.4f}, {popular[2]:.4f}]")
    files, dense = {}, np.zeros(0)
    for name in FORMATS:
        files[name], size, notes = packed(model, task, name, folder)
        loaded, parts = pj.load_onnx(files[name]), np.split(users, range(32, len(users), 32))
        scores = [loaded.run((part, films[: len(part)]))[0] for part in parts]
        found = ndcg(np.concatenate(scores), early, late)
        dense = found if name == "float" else dense
        value, low, high = interval(found)
        text = f"{name:<16} {size:9,} NDCG@10 {value:.4f} [{low:.4f}, {high:.4f}]"
        if name != "float":
            value, low, high = interval(dense - found)
            text += f"  lost {value:.4f} [{low:.4f}, {high:.4f}]"
        print(text, *notes, sep="\n    ", flush=True)
    print("one user, all films:")
    in_turn(files, tuple(x[:1] for x in task.prepare().valid.arrays()[0]), options.rounds)
    torch.manual_seed(0)
    table, rows = Lookup(100_000, options.width), np.random.default_rng(0).integers(0, 100_000, (256, 50))
    task = task_of(lambda rng, n: (rng.integers(0, 100_000, (n, 50)),))
    print("100,000 rows, 256 by 50 lookups:")
    for name in FORMATS:
        files[name], size, _ = packed(table, task, name, folder / "table")
        print(f"    {name:<16} {size:11,} bytes")
    in_turn(files, (rows,), options.rounds)


def main() -> None:
    """Parse arguments and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        show(options, Path(folder))


if __name__ == "__main__":
    main()
