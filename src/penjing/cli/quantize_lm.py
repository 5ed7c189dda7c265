"""`penjing quantize-lm`: a language model quantized from its files, one block in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from penjing.cli import options as o
from penjing.cli.training import say
from penjing.core.progress import silent

Checkpoint = Annotated[
    Path, typer.Argument(help="A folder with config.json and safetensors files.", metavar="FOLDER")
]
Tokens = Annotated[Path, typer.Option("--tokens", help="A .npy file [examples, length] to calibrate on.")]
Evaluation = Annotated[
    Path | None,
    typer.Option("--evaluation", help="Other sequences, whose perplexity is taken before and after."),
]
Folder = Annotated[Path, typer.Option("--out", help="The folder to be made.")]
Name = Annotated[str, typer.Option("--method", help="QuantizeNearest, QuantizeGPTQ, QuantizeAWQ, ...")]
Weights = Annotated[str, typer.Option("--weights", help="A number format, as 'int4 group 32'.")]
Examples = Annotated[int, typer.Option("--examples", help="Sequences that are drawn.", min=1)]


def quantize_lm(
    folder: Checkpoint,
    tokens: Tokens,
    out: Folder,
    evaluation: Evaluation = None,
    method: Name = "QuantizeGPTQ",
    weights: Weights = "int4 group 32",
    examples: Examples = 256,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> int:
    """Quantize the blocks of a causal language model; the same command goes on after a kill."""
    from penjing.cli.main import emit
    from penjing.core.registry import method_from_json
    from penjing.language.quantize import quantize_checkpoint

    fields = {"method": method, "weights": weights, "inputs": None, "examples": examples}
    result = quantize_checkpoint(
        folder,
        method_from_json(fields),
        _array(tokens),
        out,
        seed=seed,
        evaluation=None if evaluation is None else _array(evaluation),
        say=silent if json else say,
    )
    emit(result.model_dump(mode="json"), json, _show)
    return 0


def _array(path: Path) -> Any:
    """Read an array; nothing is ever unpickled.

    Raises:
        Refused: there is no such file, or it holds no array.
    """
    import numpy as np

    from penjing.core.errors import Refused
    from penjing.core.files import refusing

    try:
        with refusing(path, "read"):
            return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise Refused(
            "must be a .npy file of token ids",
            value=error,
            place=str(path),
            fix="write it with numpy.save(path, ids), ids being whole numbers [examples, length]",
        ) from error


def _show(data: dict[str, Any]) -> None:
    from rich.table import Table

    from penjing.report.progress import console
    from penjing.report.words import clean

    table = Table(title=clean(data["folder"]))
    for head in ("layer", "format", "error of the weights", "left as it was"):
        table.add_column(head)
    for change in data["changes"]:
        detail = change["detail"]
        error = f"{detail['weight_error']:.2%}" if "weight_error" in detail else ""
        table.add_row(clean(change["layer"]), str(detail.get("weights", "")), error, clean(change["reason"]))
    console().print(table)
    found = data["perplexity"]
    if found is not None:
        typer.echo(
            f"perplexity {found['before']:.3f} before, {found['after']:.3f} after "
            f"({found['ratio']:.3f} times, 95% {found['low']:.3f} to {found['high']:.3f}), "
            f"on {found['tokens']:,} tokens"
        )
    typer.echo(
        f"{data['weight_bytes']:,} bytes of weights as before; {data['packed_bytes']:,} with the packed codes"
    )
