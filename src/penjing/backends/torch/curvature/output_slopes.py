"""How strongly what a model gives depends on the outputs of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penjing.backends.torch.curvature.per_sample_gradients import per_sample_gradients, recording
from penjing.backends.torch.tensors import evaluating, select_output, to_inputs, to_numpy
from penjing.core.backend import Arrays
from penjing.core.task import Batch


def random_directions(output: Tensor, centred: bool, generator: torch.Generator) -> Tensor:
    """Return random signs of the output's shape; with `centred`, less their mean over the last axis.

    The squared product of a derivative with them is the sum of squares over all outputs, in the mean.
    Softmax does not see a shift of all logits: for them directions are centred.
    """
    shape = output.shape
    signs = torch.randint(0, 2, shape, generator=generator).to(output) * 2 - 1
    return signs - signs.mean(-1, keepdim=True) if centred else signs


def output_slopes(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    centred: bool,
    seed: int,
) -> dict[str, NDArray[np.float64]]:
    """Return for each output of each module the mean squared derivative of the model's outputs by it.

    Summed over positions and over the model's outputs (by random signs), meant over examples. In evaluation
    mode, one backward pass a batch; labels are not used.

    Args:
        model: modes are put back.
        modules: convolutions and linear layers of `model`, by name.
        batches: data.
        centred: see `random_directions`.
        seed: of the directions.

    Returns:
        By module `[out]`; zeros for a module that the model does not call.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = {name: np.zeros(len(module.weight)) for name, module in modules.items()}
    examples = 0
    for inputs, targets in batches:
        examples += len(targets)
        with evaluating(model), torch.enable_grad(), recording(modules) as calls:
            output = select_output(model(*to_inputs(model, inputs)))
            directions = random_directions(output, centred, generator)
            outputs = [y for made in calls.values() for _, y in made]
            found = torch.autograd.grad((output * directions).sum(), outputs, allow_unused=True)
        slopes = iter(found)
        for name, made in calls.items():
            for _ in made:
                slope = next(slopes)
                if slope is not None:
                    sums[name] += to_numpy(_by_output(modules[name], slope.double().square()))
    return {name: total / max(examples, 1) for name, total in sums.items()}


def _by_output(module: nn.Module, squares: Tensor) -> Tensor:
    axis = squares.ndim - 1 if isinstance(module, nn.Linear) else 1
    return squares.sum([a for a in range(squares.ndim) if a != axis])


def directed_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    inputs: Arrays,
    wanted: NDArray[Any],
    directions: tuple[bool, Sequence[int]],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return each example's gradient of one random direction of the outputs, and the error along it.

    Args:
        model: modes are put back.
        modules: by name, such that `explain_unsupported` has nothing against them.
        inputs: one batch.
        wanted: the outputs as they should be.
        directions: whether they are centred (see `random_directions`), and their seed.

    Returns:
        `[examples, weights of all modules]` and `[examples]`: what is too much along the direction.
    """
    centred, seed = directions
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    errors = []

    def along(output: Any) -> Tensor:
        chosen = select_output(output)
        signs = random_directions(chosen, centred, generator)
        gap = chosen.detach() - torch.from_numpy(wanted).to(chosen)
        errors.append((signs * gap).flatten(1).sum(1))
        return (chosen * signs).sum()

    found = per_sample_gradients(model, modules, to_inputs(model, inputs), along)
    rows = torch.cat([gradient.flatten(1) for gradient in found.values()], 1)
    return to_numpy(rows.float()), to_numpy(errors[0].float())
