"""HQQ beside the methods of Penjing, in the benchmark only: its zero points are real numbers.

No format here stores such zero points; with whole ones the method does not differ from clip search.
"""

import copy
from collections.abc import Collection

import numpy as np
import torch
from torch import nn

from penjing.arrays.formats.layout import from_rows, to_rows
from penjing.arrays.formats.parameters import parameters_of
from penjing.core.number_format import NumberFormat, number_format

POWER, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20
"""Norm, first weight of the split, its growth, and steps: the authors' defaults."""


def quantized(model: nn.Module, name: str, skip: Collection[str]) -> nn.Module:
    """Return a copy whose linear layers have weights on an asymmetric format, but for those in `skip`."""
    small, form = copy.deepcopy(model), number_format(name)
    for layer, module in small.named_modules():
        if isinstance(module, nn.Linear) and layer not in skip:
            weight = module.weight.detach().numpy()
            module.weight = nn.Parameter(torch.from_numpy(hqq(weight, form)))
    return small


def hqq(weight: np.ndarray, form: NumberFormat) -> np.ndarray:
    """Return a weight rounded under zero points that serve an L0.7 norm of the error.

    Badri and Shaji 2023, "Half-quadratic quantization of large machine learning models", equations 6 to 11.
    """
    start = parameters_of(weight, form)
    rows, scale = to_rows(weight.astype(float), form), start.scales.reshape(-1, 1).astype(float)
    zero = start.zero_points.reshape(-1, 1).astype(float)
    beta, best, kept = BETA, np.inf, rows
    for _ in range(STEPS):
        codes = np.clip(np.round(rows / scale + zero), form.lowest, form.highest)
        made = scale * (codes - zero)
        gap = rows - made
        error = np.abs(gap).mean()
        if error >= best:
            break
        best, kept = error, made
        magnitude = np.maximum(np.abs(gap), 1e-12)
        spike = np.sign(gap) * np.maximum(magnitude - magnitude ** (POWER - 1) / beta, 0)
        zero = np.mean(codes - (rows - spike) / scale, axis=1, keepdims=True)
        beta *= KAPPA
    return from_rows(kept, form, weight.shape).astype(np.float32)
