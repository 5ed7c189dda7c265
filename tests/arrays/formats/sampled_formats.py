"""What tests of formats share."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from penjing.core.number_format import number_format

ELEMENTS = [
    "int2",
    "int3 narrow",
    "int4",
    "int4 asymmetric",
    "uint4",
    "int8 narrow",
    "uint8",
    "int16",
    "uint16",
    "fp8_e4m3",
    "fp8_e5m2",
    "nf4",
    "ternary",
    "binary",
]
SHARED = ["tensor", "channel", "group 4", "token"]
FORMATS = [number_format(f"{e} {s}") for e in ELEMENTS for s in SHARED]
FORMATS += [number_format(name) for name in ("mxfp4", "mxfp8", "mxfp8_e5m2", "nvfp4")]
SMALL = st.floats(-100, 100, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)

tensors = arrays(np.float32, array_shapes(min_dims=2, max_dims=3, max_side=7), elements=SMALL)
formats = st.sampled_from(FORMATS)
