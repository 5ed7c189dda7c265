"""What a task's outputs are, by the name of its loss or by shapes and values of its targets."""

import numpy as np
import pytest

import penjing as pj
from penjing.core.kind import KINDS, Kind, find_kind

INDICES = np.array([0, 2, 1, 2])
SEVERAL = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
SHARES = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8], [0.0, 0.5, 0.5]])
ONE = np.array([0, 1, 1, 0])
NUMBERS = np.array([0.5, -1.0, 3.0, 0.0])


def own(outputs, targets):
    """A loss that tells nothing by itself."""


@pytest.mark.parametrize(
    ("outputs", "targets", "kind"),
    [
        ((4, 3), INDICES, Kind.CLASSES),
        ((4, 3, 7), np.zeros((4, 7), int), Kind.CLASSES),
        ((4, 7, 3), np.zeros((4, 7), int), Kind.CLASSES),
        ((4, 3), SHARES, Kind.CLASSES),
        ((4, 3), np.eye(3)[INDICES], Kind.CLASSES),
        ((4, 3), SEVERAL, Kind.LABELS),
        ((4, 3), SEVERAL.astype(np.float32), Kind.LABELS),
        ((4, 3), SEVERAL > 0, Kind.LABELS),
        ((4, 1), ONE, Kind.LABELS),
        ((4,), ONE, Kind.LABELS),
        ((4,), ONE[:, None].astype(float), Kind.LABELS),
        ((4, 1), NUMBERS, Kind.VALUES),
        ((4, 1), INDICES, Kind.VALUES),
        ((4, 3), NUMBERS[:, None] * SHARES, Kind.VALUES),
        ((4, 3), NUMBERS, Kind.OTHER),
        ((4, 3), np.array(["a", "b", "c", "d"]), Kind.OTHER),
    ],
)
def test_targets_tell_where_the_loss_does_not(outputs, targets, kind):
    assert find_kind(own, outputs, targets) is kind


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_a_named_loss_tells_by_itself(name, kind):
    assert find_kind(name, (4, 3), INDICES) is kind


@pytest.mark.parametrize("loss", ["bce", "binary_cross_entropy", "mse", "mae", "huber"])
def test_other_losses_than_of_classes_need_a_metric_of_their_own(loss):
    x = np.arange(80, dtype=np.float32).reshape(40, 2)
    with pytest.raises(pj.Refused, match=f"task.metric must be a function with the loss '{loss}'"):
        pj.Task(train=(x, np.zeros(40)), loss=loss).prepare()
    task = pj.Task(train=(x, np.linspace(0, 1, 40)), loss=loss, metric=own, direction="minimize")
    assert task.prepare().train.targets.dtype == np.float64
