"""What follows a cut, by what the backend can do."""

import pytest

import penjing as pj
from penjing.planners.recovery import count_epochs, plan_repair


@pytest.mark.parametrize("kinds", [("conv", "batchnorm"), ("linear",)])
def test_least_squares_repairs_where_there_is_a_handler(kinds):
    assert plan_repair(kinds, "torch") == (pj.LeastSquares(),)


def test_elsewhere_statistics_are_taken_anew_where_there_are_any():
    assert plan_repair(("conv", "batchnorm"), "numpy") == (pj.ReestimateBatchNorm(),)
    assert plan_repair(("conv",), "numpy") == ()
    assert plan_repair(("conv", "batchnorm"), "onnx") == ()


def test_epochs_of_all_steps_add_up():
    plan = pj.chain(pj.PruneChannels(0.5), pj.FineTune(epochs=2), pj.only("a", pj.Distill(epochs=0.5)))
    assert count_epochs(plan) == 2.5
