import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from penjing.arrays.sparse_storage import pack, unpack, unpack_mask


@given(
    shape=arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=7),
    dtype=st.sampled_from([np.float32, np.float16, np.int8]),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_what_is_packed_comes_back_exactly(shape, dtype, sparsity, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) >= sparsity
    array = (rng.normal(size=shape) * 10 * mask).astype(dtype)
    bits, values = pack(array, mask)
    found = unpack(bits, values, shape)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(unpack_mask(bits, shape), mask)
    assert bits.nbytes + values.nbytes == (array.size + 7) // 8 + int(mask.sum()) * array.itemsize


def test_a_kept_zero_stays_kept_and_the_layout_does_not_matter():
    array = np.asfortranarray(np.array([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]]))
    mask = np.array([[True, True, True], [False, False, True]])
    bits, values = pack(array, mask)
    assert values.tolist() == [0.0, 1.0, 2.0, 3.0]
    np.testing.assert_array_equal(unpack_mask(bits, (2, 3)), mask)
    np.testing.assert_array_equal(unpack(bits, values, (2, 3)), array)


def test_what_does_not_fit_is_an_error():
    array, mask = np.ones(9), np.arange(9) < 4
    with pytest.raises(ValueError, match="not zero"):
        pack(array, mask)
    with pytest.raises(ValueError, match="differ in shape"):
        pack(array, mask[:8])
    bits, values = pack(array * mask, mask)
    with pytest.raises(ValueError, match="do not fit"):
        unpack(bits, values, (17,))
    with pytest.raises(ValueError, match="4 bits are set"):
        unpack(bits, values[:3], (9,))
