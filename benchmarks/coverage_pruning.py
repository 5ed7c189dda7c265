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
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from architectures import ARCHITECTURES, Architecture
from pruning_examination import Row, examine

LIMIT_S = 180

EXPECTED: dict[str, str] = {}
"""By name: a part of the reason with which a row may fail."""

COLUMNS = ("architecture", "ratio", "parameters", "multiply-adds", "groups", "frozen", "class", "difference",
           "trained", "ONNX", "reloaded", "analyse s", "cut s", "MB")  # fmt: skip
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

    tiny = Architecture("tiny", "", lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
                        lambda: ((torch.ones(2, 4) / 2).numpy(),))  # fmt: skip
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
        row["name"], f"{row['ratio']}", change(row["parameters"]), change(row["multiply_adds"]),
        str(row["groups"]), str(len(row["frozen"])), _CLASS[row["own_class"]], small(row["matched"]),
        "yes" if row["trained"] else "–", small(row["exported"]), small(row["reloaded"]),
        _seconds(row["analyse_s"]), _seconds(row["cut_s"]),
        "–" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}",
    ]  # fmt: skip


def _short(number: float) -> str:
    for divisor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= divisor:
            return f"{number / divisor:.3g}{unit}"
    return f"{number:.3g}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of the documentation, and under it the failures with their reasons."""
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows):
        lines += [f"\n## {family.capitalize()}\n", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(cells(row))} |" for row in rows if row["family"] == family]
    failed = [row for row in rows if row["reason"]]
    lines += ["\n## What did not go through\n"]
    lines += [f"- `{r['name']}` at {r['ratio']}, {r['stage']}: {r['reason']}" for r in failed] or ["Nothing."]
    return "\n".join(lines)


def _line(row: dict[str, Any], seconds: float) -> str:
    words = "  ".join(cells(row)[1:])
    return f"{row['name']:<26} {words}  [{seconds:.0f} s]" + (
        f"\n    {row['stage']}: {row['reason']}" if row["reason"] else ""
    )


def main() -> int:
    """Run the rows, print and save them; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="names, with wildcards and | between several")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.3, 0.7])
    parser.add_argument("--no-onnx", action="store_true", help="leave out the export, which takes longest")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", action="store_true", help="print the table of the documentation")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = selected(arguments.only)
    if not names:
        sys.exit(f"no architecture matches {arguments.only}")
    _warm_up(names)
    rows = []
    for name in names:
        for ratio in arguments.ratio:
            start = time.perf_counter()
            rows.append(one_row(ARCHITECTURES[name], ratio, not arguments.no_onnx))
            print(_line(rows[-1], time.perf_counter() - start), file=sys.stderr, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if arguments.markdown:
        print(markdown(rows))
    bad = [r for r in rows if r["reason"] and EXPECTED.get(r["name"], "\0") not in r["reason"]]
    print(f"{len(rows) - len(bad)} of {len(rows)} rows as expected", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
