"""What follows a cut, by what the backend can do."""

import pytest

import penjing as pj
from penjing.planners.recovery import epochs_of, repairs


@pytest.mark.parametrize("kinds", [("conv", "batchnorm"), ("linear",)])
def test_least_squares_repairs_where_there_is_a_handler(kinds):
    assert repairs(kinds, "torch") == (pj.LeastSquares(),)


def test_elsewhere_statistics_are_taken_anew_where_there_are_any():
    assert repairs(("conv", "batchnorm"), "numpy") == (pj.ReestimateBatchNorm(),)
    assert repairs(("conv",), "numpy") == ()
    assert repairs(("conv", "batchnorm"), "onnx") == ()


def test_epochs_of_all_steps_add_up():
    plan = pj.chain(pj.PruneChannels(0.5), pj.FineTune(epochs=2), pj.only("a", pj.Distill(epochs=0.5)))
    assert epochs_of(plan) == 2.5
