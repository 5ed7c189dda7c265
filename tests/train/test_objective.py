from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from penjing.core.errors import Refused
from penjing.core.task import Split, Task
from penjing.train.objective import evaluate_loss, make_objective, pick, to_tensors

T = torch.ones(2, 3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("outputs", "choice"),
    [
        (T, None),
        ((T,), None),
        ({"logits": T}, None),
        (SimpleNamespace(logits=T), None),
        ((0, T), 1),
        ({"a": 0, "b": T}, "b"),
        (SimpleNamespace(b=T), "b"),
        ((0, T), lambda outputs: outputs[1]),
    ],
)
def test_the_output_that_counts(outputs, choice):
    chosen = pick(outputs, choice)
    assert chosen.dtype == torch.float32
    assert chosen.shape == (2, 3)


@pytest.mark.parametrize(
    ("outputs", "choice"), [((T, T), None), ((T, T), 2), ({"a": T}, "b"), (T, "b"), ((T, T), "a")]
)
def test_an_unclear_output_is_refused(outputs, choice):
    with pytest.raises(Refused) as caught:
        pick(outputs, choice)
    assert caught.value.place == "task.output"


@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_that_the_model_lacks_is_refused(label):
    loss = make_objective(Task(train=None))
    with pytest.raises(Refused, match=rf"class indices must lie in \[0, 2\].*got {label}"):
        loss(torch.zeros(2, 3), (), torch.tensor([0, label]))


def test_integer_kinds_and_soft_labels_and_own_functions():
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    loss = make_objective(Task(train=None))
    expected = float(loss(logits, (), torch.tensor([0, 1])))
    assert float(loss(logits, (), torch.tensor([0, 1], dtype=torch.uint8))) == pytest.approx(expected)
    assert float(loss(logits, (), torch.eye(2))) == pytest.approx(expected)
    own = make_objective(Task(train=None, loss=lambda outputs, targets: (outputs - targets).abs().mean()))
    assert float(own(logits, (), torch.zeros(2, 2))) == pytest.approx(0.75)


def test_an_unknown_loss_is_refused():
    with pytest.raises(Refused, match="Did you mean 'cross_entropy'"):
        make_objective(Task(train=None, loss="crossentropy"))


def test_tensors_take_the_dtype_of_the_weights_and_integers_stay():
    like = torch.zeros(1, dtype=torch.float32)
    x, tokens = to_tensors((np.zeros(2), np.zeros(2, np.int32)), like)
    assert (x.dtype, tokens.dtype) == (torch.float32, torch.int32)


def test_read_only_and_strided_arrays_are_taken():
    array = np.arange(6.0).reshape(2, 3)[:, ::-1]
    array.flags.writeable = False
    assert to_tensors((array,))[0].tolist() == array.tolist()


def test_mean_loss_is_exact_in_evaluation_mode_and_puts_modes_back(split, net):
    model = net()
    inside = Split((split.inputs[0][:70],), split.targets[:70], "train")
    value = evaluate_loss(model, inside, make_objective(Task(train=None)), batch_size=32)
    assert model.training
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(inside.inputs[0]))
    assert value == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(inside.targets))), rel=1e-5
    )
