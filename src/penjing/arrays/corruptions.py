"""Standard corruptions of inputs, at five severities, for telling how a model bears them.

After Hendrycks and Dietterich 2019 (arXiv 1903.12261, "ImageNet-C"), in units of the inputs' own spread
instead of gray levels, so that they fit images normalized in any way: `noise`, `blur`, `contrast`,
`brightness` and `pixelate` for images, `noise` and `missing` for tables, `missing` for whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused, nearest

Array = NDArray[Any]
SEVERITIES = (1, 2, 3, 4, 5)


def _noise(x: Array, severity: int, rng: np.random.Generator) -> Array:
    """Add Gaussian noise of 0.1 to 0.9 standard deviations."""
    spread = float(x.std()) * (0.1, 0.2, 0.35, 0.6, 0.9)[severity - 1]
    noise: Array = x + rng.standard_normal(x.shape).astype(x.dtype) * x.dtype.type(spread)
    return noise


def _blur(x: Array, severity: int, rng: np.random.Generator) -> Array:
    """Blur by a Gaussian of 0.4 to 1.6 pixels."""
    from scipy.ndimage import gaussian_filter

    sigma = (0.4, 0.6, 0.8, 1.2, 1.6)[severity - 1]
    blurred: Array = gaussian_filter(x, (0, 0, sigma, sigma)).astype(x.dtype)
    return blurred


def _contrast(x: Array, severity: int, rng: np.random.Generator) -> Array:
    """Draw each image towards its mean, to 0.75 to 0.15 of its contrast."""
    share = x.dtype.type((0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1])
    mean = x.mean(axis=tuple(range(1, x.ndim)), keepdims=True)
    flat: Array = mean + share * (x - mean)
    return flat


def _brightness(x: Array, severity: int, rng: np.random.Generator) -> Array:
    """Lift all values by 0.2 to 1 standard deviations."""
    lifted: Array = x + x.dtype.type(float(x.std()) * 0.2 * severity)
    return lifted


def _pixelate(x: Array, severity: int, rng: np.random.Generator) -> Array:
    """Shrink to 0.9 to 0.4 of the pixels on a side, by means over boxes, and back to the nearest."""
    share = (0.9, 0.75, 0.6, 0.5, 0.4)[severity - 1]
    for axis in (-2, -1):
        side = x.shape[axis]
        small = max(1, round(share * side))
        means = np.moveaxis(x, axis, -1) @ _boxes(side, small).astype(x.dtype)
        nearest = ((np.arange(side) + 0.5) * small / side).astype(int)
        x = np.moveaxis(means[..., nearest], -1, axis)
    return np.ascontiguousarray(x)


def _boxes(side: int, small: int) -> Array:
    """Return `[side, small]`: which share of each of `small` equal boxes each of `side` pixels fills."""
    edges = np.linspace(0, side, small + 1)
    pixels = np.arange(side)[:, None]
    shared = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    boxes: Array = np.clip(shared, 0, None) * small / side
    return boxes


def _missing(x: Array, severity: int, rng: np.random.Generator) -> Array:
    """Put the column's middle value, or 0 for whole numbers, in the place of 2% to 40% of the values."""
    gone = rng.random(x.shape) < (0.02, 0.05, 0.1, 0.2, 0.4)[severity - 1]
    put = np.zeros((), x.dtype) if x.dtype.kind in "iu" else np.median(x, axis=0, keepdims=True)
    left: Array = np.where(gone, put, x).astype(x.dtype)
    return left


KINDS: dict[str, Callable[[Array, int, np.random.Generator], Array]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "pixelate": _pixelate,
    "missing": _missing,
}


def fitting(x: Array) -> tuple[str, ...]:
    """Return the names of the corruptions that fit an input `[n, ...]`."""
    if x.dtype.kind in "iu":
        return ("missing",)
    return ("noise", "blur", "contrast", "brightness", "pixelate") if x.ndim == 4 else ("noise", "missing")


def corrupt(x: Array, name: str, severity: int, seed: int = 0) -> Array:
    """Return corrupted inputs of the same shape and type; the same seed gives the same.

    Args:
        x: `[n, ...]`, floating or whole numbers.
        name: one of `fitting(x)`.
        severity: 1 to 5.
        seed: of what is random.

    Raises:
        Refused: an unknown name, one that does not fit these inputs, or another severity.
    """
    if name not in fitting(x):
        raise Refused(
            f"the corruption must fit inputs {x.dtype} {x.shape}",
            value=name,
            place="corruptions",
            fix=nearest(name, fitting(x)),
        )
    if severity not in SEVERITIES:
        raise Refused(
            "the severity must be 1 to 5", value=severity, place="corruptions", fix="3 is the middle one"
        )
    return KINDS[name](x, severity, np.random.default_rng(seed))
