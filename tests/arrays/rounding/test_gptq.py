"""GPTQ against its definition, solved column by column, and what it promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.arrays.formats.clipping import clipped_parameters
from penjing.arrays.formats.coding import rounded
from penjing.arrays.formats.parameters import parameters_of
from penjing.arrays.rounding.gptq import sweep
from penjing.arrays.rounding.inverse_factor import factorized
from penjing.arrays.sparsity.gram import damped, output_error
from penjing.core.number_format import number_format

FORMATS = (
    "int4 channel",
    "int3 group 8",
    "uint2 group 8",
    "int8 channel",
    "nf4 group 16",
    "mxfp4",
    "nvfp4",
    "fp8_e4m3 channel",
    "ternary channel",
)


def gptq(weight, gram, form, parameters, order="activation"):
    """Round a matrix from the second moments of its inputs."""
    return sweep(weight, factorized(gram, order), form, parameters, order)


def problem(rows, columns, seed):
    """A random weight, and the damped moments of correlated inputs of different sizes."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) * np.exp(-np.arange(columns) * 3 / columns)
    x = rng.normal(size=(20 * columns, columns)) @ mixing.T * rng.uniform(0.2, 2, columns)
    return rng.normal(size=(rows, columns)), damped(x.T @ x / len(x))


def slow(weight, gram, form, parameters, order):
    """Round one column after the other; what is left takes the least squares solution for the rest."""
    new, found = weight.copy(), np.zeros(weight.shape, np.float32)
    left = list(order)
    while left:
        column = left.pop(0)
        padded = np.zeros_like(weight)
        padded[:, column] = new[:, column]
        found[:, column] = rounded(padded, form, *parameters)[:, column]
        gap = new[:, column] - found[:, column]
        if left:
            step = np.linalg.solve(gram[np.ix_(left, left)], gram[left, column])
            new[:, left] += np.outer(gap, step)
    return found


# In the order given the scales of groups are taken on the way.
@pytest.mark.parametrize(
    ("name", "order"),
    [(name, "activation") for name in FORMATS]
    + [(name, "given") for name in FORMATS if not number_format(name).group],
)
def test_the_sweep_is_the_definition(name, order):
    form = number_format(name)
    weight, gram = problem(5, 40, 0)
    parameters = clipped_parameters(weight, form)
    columns = range(40) if order == "given" else np.argsort(-np.diagonal(gram), kind="stable")
    found, same = gptq(weight, gram, form, parameters, order)
    assert same is parameters
    np.testing.assert_array_equal(found, slow(weight, gram, form, parameters, columns))


def test_many_columns_are_one_block_after_another():
    form = number_format("int3 channel")
    weight, gram = problem(3, 300, 1)
    parameters = parameters_of(weight, form)
    found, _ = gptq(weight, gram, form, parameters, "given")
    np.testing.assert_array_equal(found, slow(weight, gram, form, parameters, range(300)))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(FORMATS),
    order=st.sampled_from(["activation", "given"]),
    columns=st.integers(2, 48),
    seed=st.integers(0, 10**6),
)
def test_values_are_on_the_format_under_the_parameters_returned(name, order, columns, seed):
    form = number_format(name)
    weight, gram = problem(4, columns, seed)
    found, parameters = gptq(weight, gram, form, clipped_parameters(weight, form), order)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(rounded(found, form, *parameters), found)


@pytest.mark.parametrize("name", ["int4 channel", "int3 group 8", "uint2 group 8", "nf4 group 16", "mxfp4"])
@pytest.mark.parametrize("order", ["activation", "given"])
def test_outputs_are_nearer_than_after_nearest_rounding(name, order):
    form, errors = number_format(name), []
    for seed in range(5):
        weight, gram = problem(16, 64, seed)
        parameters = clipped_parameters(weight, form)
        nearest = rounded(weight, form, *parameters) - weight
        new, _ = gptq(weight, gram, form, parameters, order)
        errors.append(output_error(new - weight, gram) / output_error(nearest, gram))
    assert max(errors) < 0.9


def test_inputs_that_are_not_correlated_leave_nearest_rounding():
    form = number_format("int4 channel")
    weight, _ = problem(4, 12, 2)
    parameters = parameters_of(weight, form)
    found, _ = gptq(weight, np.diag(np.linspace(1, 2, 12)), form, parameters)
    np.testing.assert_array_equal(found, rounded(weight, form, *parameters))


def test_arrays_of_torch_give_the_same():
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    form = number_format("uint3 group 8")
    weight, gram = problem(6, 40, 3)
    parameters = clipped_parameters(weight, form)
    tensors = type(parameters)(*(None if p is None else torch.from_numpy(p) for p in parameters))
    for order in ("activation", "given"):
        found, _ = gptq(torch.from_numpy(weight), torch.from_numpy(gram), form, tensors, order)
        np.testing.assert_array_equal(found.numpy(), gptq(weight, gram, form, parameters, order)[0])


def test_importance_moves_the_clip_towards_what_counts():
    form = number_format("int2 narrow channel")
    weight = np.append(np.tile(np.float32([-1, 1]), 20), np.float32(6)).reshape(1, -1)
    price = np.ones_like(weight)
    price[0, -1] = 1e4
    plain, priced = clipped_parameters(weight, form), clipped_parameters(weight, form, importance=price)
    assert plain.scales[0] < 2 < priced.scales[0]
    ones = clipped_parameters(weight, form, importance=np.ones(41))
    np.testing.assert_array_equal(ones.scales, plain.scales)
