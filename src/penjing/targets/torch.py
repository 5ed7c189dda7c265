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

from penjing.backends.torch.history import Entry, history
from penjing.core.backend import Arrays, backend_named
from penjing.core.errors import Exit, Refused
from penjing.core.method import Model
from penjing.core.plan import Plan
from penjing.core.target import Target
from penjing.targets import torch_weights
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
                raise Refused("the module runs on the batch", value=f"{type(error).__name__}: {line}",
                              place="torch") from error  # fmt: skip
        return _first(output)


class TorchRuntime:
    """The runtime `torch`: delivers torch modules that their own class can be rebuilt from."""

    name = "torch"

    def backends(self) -> tuple[str, ...]:
        """Name the backends whose models can be delivered."""
        return ("torch",)

    def deliver(self, model: Model, plan: Plan, example: Arrays, folder: Path) -> dict[str, Any]:
        """Write `model.safetensors` (masked tensors packed) and `recipe.json`; return facts for the manifest.

        The recipe holds the inputs (dtypes and the shapes of one example) and the history, for each cut the
        kept units by group, so that a fresh instance of the user's class takes the same shape.

        Raises:
            Refused: the model is no torch module.
        """
        if not isinstance(model, torch.nn.Module):
            raise Refused("the runtime torch takes a torch module", value=type(model).__qualname__,
                          place="target.runtime", fix="deliver it to onnxruntime")  # fmt: skip
        specs = [TensorSpec(f"input{i}", x.dtype.name, (None, *x.shape[1:])) for i, x in enumerate(example)]
        recipe = {
            "inputs": [spec.to_json() for spec in specs],
            "history": history(model),
        }
        torch_weights.save(model, folder / WEIGHTS)
        (folder / RECIPE).write_text(json.dumps(recipe, indent=1), encoding="utf-8")
        return {"format": "safetensors", "class": type(model).__qualname__, "inputs": recipe["inputs"]}

    def open(self, folder: Path, target: Target, model: Callable[[], Model] | None = None) -> TorchRunner:
        """Rebuild the module from `model()`, the recorded history and the weights.

        For the mode `compiled` the compilation for `target.batch` examples happens here.

        Raises:
            Refused: no `model`, files that are damaged, or a class that the weights do not fit.
        """
        if model is None:
            raise Refused("a torch artefact is opened with its class", value="no model=", place=str(folder),
                          fix="pass model=, a function without arguments that makes your module")  # fmt: skip
        recipe = _read_recipe(folder / RECIPE)
        specs = tuple(spec_from_json(entry) for entry in recipe["inputs"])
        module = rebuild(_made(model), recipe["history"], specs)
        _load(module, folder / WEIGHTS)
        return runner(module, target, specs)


def runner(module: Any, target: Target, specs: tuple[TensorSpec, ...]) -> TorchRunner:
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
        raise Refused("torch.compile compiles the module", value=error.value, place="target.mode",
                      fix="use the mode eager", code=Exit.ENVIRONMENT) from error  # fmt: skip
    return compiled


def rebuild(module: Any, steps: list[Entry], specs: tuple[TensorSpec, ...]) -> Any:
    """Replay a recorded history on a module.

    Steps that the module carries already, because it was made by taking them, are not taken twice.
    """
    made = history(module)
    if steps[: len(made)] != made:
        raise Refused("the class was not cut in another way", value=f"{len(made)} steps", place="model()",
                      fix="pass the class that the artefact was made from")  # fmt: skip
    backend = backend_named("torch")
    for step in steps[len(made) :]:
        groups = backend.groups(module, _zeros(specs, 1))
        unknown = sorted(set(step["keep"]) - {group.name for group in groups.groups})
        if unknown:
            raise Refused("the class has the groups that were cut", value=", ".join(unknown[:5]),
                          place="model()", fix="pass the class that the artefact was made from")  # fmt: skip
        kept = {name: np.asarray(units, dtype=np.int64) for name, units in step["keep"].items()}
        module = backend.keep(module, groups, kept)
    return module


def _made(model: Callable[[], Model]) -> Any:
    try:
        module = model()
    except Exception as error:
        # The user's own code runs here and may raise anything.
        raise Refused("the function makes the model", value=f"{type(error).__name__}: {error}",
                      place="model()") from error  # fmt: skip
    if not isinstance(module, torch.nn.Module):
        raise Refused("the function makes a torch module", value=type(module).__qualname__, place="model()")
    return module


def _load(module: Any, path: Path) -> None:
    try:
        torch_weights.load(module, path)
    except (SafetensorError, OSError) as error:
        raise Refused("the weights file is whole", value=error, place=str(path)) from error
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise Refused("the weights fit the class", value="; ".join(lines) or error, place=str(path),
                      fix="pass the class that the artefact was made from") from error  # fmt: skip


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        return {"inputs": list(recipe["inputs"]), "history": list(recipe["history"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused("the artefact has a readable recipe", value=error, place=str(path)) from error


def _zeros(specs: tuple[TensorSpec, ...], batch: int) -> Arrays:
    return tuple(np.zeros((batch, *(d or 1 for d in s.shape[1:])), dtype=s.dtype) for s in specs)


def _tensor(array: NDArray[Any]) -> Any:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _first(output: Any) -> NDArray[Any]:
    while not isinstance(output, torch.Tensor):
        if isinstance(output, dict) and output:
            output = next(iter(output.values()))
        elif isinstance(output, tuple | list) and output:
            output = output[0]
        else:
            raise Refused("the module returns a tensor", value=type(output).__name__, place="torch",
                          fix="choose one with task.output")  # fmt: skip
    # NumPy has no bfloat16; float32 holds all its values.
    array: NDArray[Any] = (output.float() if output.dtype == torch.bfloat16 else output).numpy()
    return array


RUNTIME = TorchRuntime()
