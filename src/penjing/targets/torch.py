"""PyTorch itself, eager or compiled: weights in safetensors, and the steps that shape the user's class."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from penjing.backends.torch.quantizers import refuse_simulated
from penjing.backends.torch.replay import replay
from penjing.backends.torch.stored.bounds import check_sizes
from penjing.backends.torch.structure.history import HISTORY, history
from penjing.core.artefact import open_artefact
from penjing.core.backend import Arrays
from penjing.core.errors import Exit, Refused
from penjing.core.memory_limit import EXAMPLES, is_trusted, require_bounds
from penjing.core.target import Target
from penjing.core.value import Model
from penjing.targets import stored_graph, torch_weights
from penjing.targets.signature import Guard, TensorSpec, spec_from_json

WEIGHTS = "model.safetensors"
RECIPE = "recipe.json"


class TorchRunner:
    """A module in evaluation mode that takes NumPy arrays and returns its first output as one."""

    fixed_batch: int | None = None

    def __init__(self, call: Callable[..., Any], specs: tuple[TensorSpec, ...]) -> None:
        self._call = call
        self._guard = Guard(specs)

    def __call__(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        """Return the first output for one batch.

        Raises:
            Refused: an input does not fit (it is named), or the module fails on the batch.
        """
        self._guard(inputs)
        with torch.inference_mode():
            try:
                output = self._call(*[_tensor(x) for x in inputs])
            except Exception as error:
                # The user's own code runs here and may raise anything.
                line = (str(error).strip().splitlines() or [""])[0][:300]
                raise Refused(
                    "the module must run on the batch",
                    value=f"{type(error).__name__}: {line}",
                    place="torch",
                    fix="give a batch that the module takes in evaluation mode",
                ) from error
        return _first(output)


class TorchRuntime:
    """The runtime `torch`: delivers torch modules that their own class can be rebuilt from."""

    name = "torch"

    def backends(self) -> tuple[str, ...]:
        """Name the backends whose models can be delivered."""
        return ("torch",)

    def deliver(self, model: Model, example: Arrays, folder: Path) -> dict[str, Any]:
        """Write weights (masked tensors packed), recipe and graph; return facts for the manifest.

        `recipe.json` holds the inputs (dtypes and the shapes of one example) and the history, the units
        that every cut kept and the blocks that were removed, so that a fresh instance of the user's class
        takes the same shape. `graph.json` is the self-contained form, which needs no class; where the model
        has none, the recipe and the fact `no_graph` say why.

        Raises:
            Refused: the model is no torch module, or simulates number formats.
        """
        if not isinstance(model, torch.nn.Module):
            raise Refused(
                "must be a torch module for the runtime torch",
                value=type(model).__qualname__,
                place="model",
                fix="deliver it to Target('onnxruntime')",
            )
        refuse_simulated(model)
        specs = [TensorSpec(f"input{i}", x.dtype.name, (None, *x.shape[1:])) for i, x in enumerate(example)]
        torch_weights.save(model, folder / WEIGHTS)
        recipe = {
            "inputs": [spec.to_json() for spec in specs],
            "history": history(model),
            "no_graph": stored_graph.write(model, example, folder, folder / WEIGHTS),
        }
        (folder / RECIPE).write_text(json.dumps(recipe, indent=1), encoding="utf-8")
        facts = {"format": "safetensors", "class": type(model).__qualname__, "inputs": recipe["inputs"]}
        return facts | ({"no_graph": recipe["no_graph"]} if recipe["no_graph"] else {})

    def open(self, folder: Path, target: Target, model: Callable[[], Model] | None = None) -> TorchRunner:
        """Open the module: of the user's class where `model` makes it, else from the stored graph.

        For the mode `compiled` the compilation for `target.batch` examples happens here.

        Raises:
            Refused: damaged files, a class that the weights do not fit, or neither a class nor a graph.
        """
        module, specs = _module(folder, model)
        return make_runner(module, target, specs)


def load_module(folder: Path | str, model: Callable[[], Model] | None = None) -> torch.nn.Module:
    """Return the module of a delivered folder, to train or change it further; in evaluation mode.

    Args:
        folder: delivered for the target `torch`; its manifest is verified.
        model: makes an instance of the user's own class; None: the module of the self-contained form, with
            torch's own layers under their old names.

    Raises:
        Refused: as `penjing.load` refuses, or a folder for another target.
    """
    artefact = open_artefact(folder)
    if artefact.target.runtime != "torch":
        raise Refused(
            "must be an artefact for torch",
            value=artefact.target.label,
            place=str(folder),
            fix="deliver the model to Target('torch')",
        )
    return _module(artefact.path, model)[0].eval()


def _module(
    folder: Path, model: Callable[[], Model] | None
) -> tuple[torch.nn.Module, tuple[TensorSpec, ...]]:
    recipe = _read_recipe(folder / RECIPE)
    specs = tuple(spec_from_json(entry) for entry in recipe["inputs"])
    if model is not None:
        module = replay(_made(model), recipe["history"], _zeros(specs, 1))
        _load(module, folder / WEIGHTS)
        return module, specs
    if recipe["no_graph"] or not (folder / stored_graph.GRAPH).is_file():
        raise Refused(
            "needs the class of the model: it has no self-contained graph",
            value=recipe["no_graph"] or f"no {stored_graph.GRAPH}",
            place=str(folder),
            fix="pass model=, a function without arguments that makes your module",
        )
    net = stored_graph.read(folder, folder / WEIGHTS)
    if not is_trusted():
        require_bounds(check_sizes(net, [_sized(spec) for spec in specs]), str(folder / stored_graph.GRAPH))
    setattr(net, HISTORY, recipe["history"])
    return net, specs


def make_runner(module: torch.nn.Module, target: Target, specs: tuple[TensorSpec, ...]) -> TorchRunner:
    """Wrap a module, in evaluation mode, with the target's threads and mode."""
    torch.set_num_threads(target.threads)
    module.eval()
    shapes_may_vary = tuple(TensorSpec(s.name, s.dtype, tuple(None for _ in s.shape)) for s in specs)
    if target.mode != "compiled":
        return TorchRunner(module, shapes_may_vary)
    try:
        with warnings.catch_warnings():
            # torch's own compiler imports modules that torch has deprecated.
            warnings.filterwarnings("ignore", r".*torch\.jit\.script_method", DeprecationWarning)
            compiled = TorchRunner(torch.compile(module), shapes_may_vary)
            compiled(*_zeros(specs, target.batch))
    except Refused as error:
        raise Refused(
            "torch.compile must compile the module",
            value=error.value,
            place="target.mode",
            fix="use the mode eager",
            code=Exit.ENVIRONMENT,
        ) from error
    return compiled


def _made(model: Callable[[], Model]) -> torch.nn.Module:
    try:
        module = model()
    except Exception as error:
        # The user's own code runs here and may raise anything.
        raise Refused(
            "must make the module without arguments",
            value=f"{type(error).__name__}: {error}",
            place="model()",
            fix="pass a function such as lambda: Net(10)",
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise Refused(
            "must return a torch module",
            value=type(module).__qualname__,
            place="model()",
            fix="pass the class, or a function that returns an instance of it",
        )
    return module


def _load(module: torch.nn.Module, path: Path) -> None:
    try:
        torch_weights.load(module, path)
    except (SafetensorError, OSError) as error:
        raise Refused(
            "must be a whole safetensors file", value=error, place=str(path), fix="deliver the model again"
        ) from error
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise Refused(
            "must hold the tensors of the class",
            value="; ".join(lines) or error,
            place=str(path),
            fix="pass the class that the artefact was made from",
        ) from error


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        found = {key: list(recipe[key]) for key in ("inputs", "history")}
        return found | {"no_graph": str(recipe.get("no_graph", ""))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(
            "must be a readable recipe", value=error, place=str(path), fix="deliver the model again"
        ) from error


def _sized(spec: TensorSpec) -> tuple[list[int], torch.dtype]:
    """Return shape and type of a small batch of an input."""
    batch, other = EXAMPLES[0]
    shape = [(batch if i == 0 else other) if d is None else d for i, d in enumerate(spec.shape)]
    return shape, torch.from_numpy(np.zeros(0, spec.dtype)).dtype


def _zeros(specs: tuple[TensorSpec, ...], batch: int) -> Arrays:
    return tuple(np.zeros((batch, *(d or 1 for d in s.shape[1:])), dtype=s.dtype) for s in specs)


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _first(output: Any) -> NDArray[Any]:
    while not isinstance(output, torch.Tensor):
        if isinstance(output, dict) and output:
            output = next(iter(output.values()))
        elif isinstance(output, tuple | list) and output:
            output = output[0]
        else:
            raise Refused(
                "the module must return a tensor",
                value=type(output).__name__,
                place="torch",
                fix="choose one with task.output",
            )
    # NumPy has no bfloat16; float32 holds all its values.
    array: NDArray[Any] = (output.float() if output.dtype == torch.bfloat16 else output).numpy()
    return array


RUNTIME = TorchRuntime()
