"""Which architectures pruning takes, and at what cost: every model of `architectures` at two ratios.

    python benchmarks/coverage_pruning.py [--only 'resnet*|hf-bert'] [--ratio 0.3 0.7] [--markdown]

Every row runs in a process of its own, one after the other: peak memory is what that process took beyond the
libraries and the model. Exits with 1 where a row failed that no entry of EXPECTED explains.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from architectures import ARCHITECTURES, Architecture
from pruning_examination import Row, examine

LIMIT_S = 180

EXPECTED = {"hf-mixtral": "No ONNX function found for <OpOverload(op='transformers.grouped_mm_fallback'"}
"""By name: a part of the reason with which a row may fail."""

COLUMNS = (
    "architecture",
    "ratio",
    "parameters",
    "multiply-adds",
    "groups",
    "frozen",
    "class",
    "difference",
    "trained",
    "ONNX",
    "reloaded",
    "analyse s",
    "cut s",
    "MB",
)
_CLASS = {None: "–", True: "own", False: "graph"}


def one_row(architecture: Architecture, ratio: float, onnx: bool) -> dict[str, Any]:
    """Examine an architecture in a forked process; a crash or a timeout becomes a row too."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, architecture, ratio, onnx))
    process.start()
    sender.close()
    row = Row(architecture.name, architecture.family, ratio, "process", f"still running after {LIMIT_S} s")
    if receiver.poll(LIMIT_S):
        try:
            return dict(receiver.recv())
        except EOFError:
            process.join()
            row.reason = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    return row.plain()


def _child(sender: Any, architecture: Architecture, ratio: float, onnx: bool) -> None:
    sender.send(examine(architecture, ratio, onnx).plain())


def _warm_up(names: list[str]) -> None:
    """Import what every row needs, so that no row pays for it."""
    import onnxruntime  # noqa: F401

    tiny = Architecture(
        "tiny",
        "",
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        lambda: ((torch.ones(2, 4) / 2).numpy(),),
    )
    first = next((name for name in names if name.startswith("hf-")), None)
    for architecture in (tiny, *([ARCHITECTURES[first]] if first else [])):
        architecture.build()
    row = examine(tiny, 0.5)
    if row.reason:
        sys.exit(f"{row.stage}: {row.reason}")


def selected(patterns: str) -> list[str]:
    """Return the architectures whose names match a pattern; `|` between several."""
    return [name for name in ARCHITECTURES if any(fnmatchcase(name, p) for p in patterns.split("|"))]


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as the words of a table."""

    def change(pair: Any) -> str:
        return f"{_short(pair[0])} → {_short(pair[1])}" if pair else "–"

    def small(value: float | None) -> str:
        return "–" if value is None else f"{value:.0e}" if value else "0"

    return [
        row["name"],
        f"{row['ratio']}",
        change(row["parameters"]),
        change(row["multiply_adds"]),
        _groups(row),
        _frozen(row["frozen"]),
        _CLASS[row["own_class"]],
        small(row["matched"]),
        "yes" if row["trained"] else "–",
        small(row["exported"]),
        small(row["reloaded"]),
        _seconds(row["analyse_s"]),
        _seconds(row["cut_s"]),
        "–" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}",
    ]


def _groups(row: dict[str, Any]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in row["kinds"].items()) or "0"


def _frozen(frozen: dict[str, str]) -> str:
    """Return how many layers are frozen, and the most frequent reason but that they make the output."""
    reasons = Counter(why.partition(" (")[0] for why in frozen.values() if "output of the model" not in why)
    return f"{len(frozen)}: {reasons.most_common(1)[0][0]}" if reasons else str(len(frozen))


def _short(number: float) -> str:
    for divisor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= divisor:
            return f"{number / divisor:.3g}{unit}"
    return f"{number:.3g}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the tables of the documentation: a summary, one table a family, and what failed and why."""
    failed = [row for row in rows if row["reason"]]
    apart, units = (sum(row[key] for row in rows if not row["reason"]) for key in ("apart", "units"))
    names = {row["name"] for row in rows}
    counts = f"{len(rows) - len(failed)} went through, {len(failed)} did not"
    lines = [
        f"{len(names)} architectures, {len(rows)} rows: {counts}. Zeroed weights check {apart:,} of the "
        f"{units:,} units that went."
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        lines += [f"\n## {family.capitalize()}\n", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(cells(row))} |" for row in rows if row["family"] == family]
    lines += ["\n## What did not go through\n"]
    lines += [f"- `{r['name']}` at {r['ratio']}, {r['stage']}: {r['reason']}" for r in failed] or ["Nothing."]
    return "\n".join(lines)


def _line(row: dict[str, Any], seconds: float) -> str:
    words = "  ".join(cells(row)[1:])
    failure = f"\n    {row['stage']}: {row['reason']}" if row["reason"] else ""
    return f"{row['name']:<26} {words}  [{seconds:.0f} s]{failure}"


def run(names: list[str], ratios: list[float], onnx: bool, file: Path | None) -> list[dict[str, Any]]:
    """Examine architectures at ratios one after the other; show and save each row when it is there."""
    if not names:
        sys.exit("no architecture matches")
    torch.set_num_threads(1)
    _warm_up(names)
    rows = []
    for name in names:
        for ratio in ratios:
            start = time.perf_counter()
            rows.append(one_row(ARCHITECTURES[name], ratio, onnx))
            print(_line(rows[-1], time.perf_counter() - start), file=sys.stderr, flush=True)
            if file is not None:
                file.write_text(json.dumps(_merged(file, rows), indent=1), encoding="utf-8")
    return rows


def _merged(file: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a file and new ones, which replace old ones of the same name and ratio, in order."""
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    by_key = {(row["name"], row["ratio"]): row for row in (*old, *rows)}
    order = {name: number for number, name in enumerate(ARCHITECTURES)}
    return [by_key[key] for key in sorted(by_key, key=lambda key: (order.get(key[0], -1), key[1]))]


def main() -> int:
    """Run the rows, print and save them; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="names, with wildcards and | between several")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.3, 0.7])
    parser.add_argument("--no-onnx", action="store_true", help="leave out the export, which takes longest")
    parser.add_argument("--json", type=Path, help="file that the rows are added to, or replaced in")
    parser.add_argument("--read", type=Path, help="take the rows from such a file and run nothing")
    parser.add_argument("--markdown", action="store_true", help="print the table of the documentation")
    arguments = parser.parse_args()
    if arguments.read:
        rows = json.loads(arguments.read.read_text(encoding="utf-8"))
    else:
        rows = run(selected(arguments.only), arguments.ratio, not arguments.no_onnx, arguments.json)
    if arguments.markdown:
        print(markdown(rows))
    bad = [r for r in rows if r["reason"] and EXPECTED.get(r["name"], "\0") not in r["reason"]]
    print(f"{len(rows) - len(bad)} of {len(rows)} rows as expected", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
