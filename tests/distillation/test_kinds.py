"""Distillation where outputs are no classes: several labels, one logit, numbers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import penjing as pj  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.standard_normal((1300, 16)).astype(np.float32)
SCORES = X @ RNG.standard_normal((16, 12)) + 0.3 * RNG.standard_normal((1300, 12))
LABELS = (SCORES > 4).astype(np.float32)
"""Twelve labels, each there in about one example of six, independent of each other."""


def f1(outputs, targets):
    found = outputs > 0
    hits = (found & (targets > 0)).sum()
    return float(2 * hits / max(1, found.sum() + (targets > 0).sum()))


def gap(outputs, targets):
    return float(np.abs(outputs.ravel() - targets.ravel()).mean())


def task(targets, loss, metric=f1):
    splits = {"train": slice(800), "valid": slice(800, 1000), "test": slice(1000, 1300)}
    data = {name: (X[part], targets[part]) for name, part in splits.items()}
    direction = "maximize" if metric is f1 else "minimize"
    return pj.Task(**data, loss=loss, metric=metric, direction=direction)


def net(width, outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, outputs))


def quality(model, targets, metric=f1):
    with torch.no_grad():
        return metric(model.eval()(torch.from_numpy(X[1000:])).numpy(), targets[1000:])


@pytest.fixture(scope="module")
def of_labels():
    strategy = pj.Strategy(epochs=20, batch_size=50, lr=0.02, optimizer="adam")
    return pj.fit(net(48, 12), task(LABELS, "bce"), strategy, say=[].append).model


STUDENT = {"epochs": 8, "batch_size": 50, "alpha": 1}


@pytest.mark.parametrize("loss", ["bce", functional.binary_cross_entropy_with_logits])
def test_independent_labels_are_taught_each_by_its_own_logit(of_labels, loss):
    """A softmax over them taught 0.15 where the teacher had 0.6."""
    found = pj.distill(net(24, 12, 1), of_labels, task(LABELS, loss), pj.Distill(**STUDENT))
    assert "distillation: the outputs are labels, compared by 'sigmoid'" in found.notes["events"]
    assert quality(of_labels, LABELS) > 0.8
    assert quality(found.model, LABELS) > quality(of_labels, LABELS) - 0.1


@pytest.mark.parametrize("method", ["logits", "dkd", "dist", "ranking"])
@pytest.mark.parametrize("loss", ["bce", functional.binary_cross_entropy_with_logits])
def test_a_softmax_over_independent_labels_is_refused_with_both_shapes(of_labels, method, loss):
    words = (
        rf"loss '{method}' cannot compare outputs that are labels.*outputs \(200, 12\), targets \(200, 12\)"
    )
    with pytest.raises(pj.Refused, match=words):
        pj.distill(net(24, 12, 1), of_labels, task(LABELS, loss), pj.Distill(loss=method))


@pytest.mark.parametrize("shape", [(1,), ()])
def test_one_logit_is_taught(shape):
    targets = (SCORES[:, 0] > 0).astype(np.float32).reshape(-1, *shape)
    whole = task(targets, "bce")
    teacher = pj.fit(net(48, 1), whole, pj.Strategy(epochs=20, batch_size=50), say=[].append).model
    found = pj.distill(net(16, 1, 1), teacher, whole, pj.Distill(epochs=8, batch_size=50, alpha=0.5))
    assert quality(found.model, targets.reshape(-1, 1)) > 0.9
    assert "compared by 'sigmoid'" in " ".join(found.notes["events"])


@pytest.mark.parametrize("shape", [(1,), ()])
@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_numbers_are_taught(loss, shape):
    targets = (SCORES[:, 0] / 4).astype(np.float32).reshape(-1, *shape)
    whole = task(targets, loss, gap)
    teacher = pj.fit(net(48, 1), whole, pj.Strategy(epochs=20, batch_size=50), say=[].append).model
    found = pj.distill(net(16, 1, 1), teacher, whole, pj.Distill(epochs=8, batch_size=50))
    spread = np.abs(targets - targets.mean()).mean()
    assert quality(found.model, targets, gap) < 0.3 * spread
    assert "the outputs are values, compared by 'mse'" in " ".join(found.notes["events"])
    with pytest.raises(pj.Refused, match="'sigmoid' cannot compare outputs that are values"):
        pj.distill(net(16, 1, 1), teacher, whole, pj.Distill(loss="sigmoid"))


def test_probabilities_of_labels_are_compared_as_numbers(of_labels):
    """A loss of the user's may want probabilities; a sigmoid of them would be one too many."""
    own = task(LABELS, functional.binary_cross_entropy)
    teacher, student = (nn.Sequential(m, nn.Sigmoid()) for m in (of_labels, net(24, 12, 1)))
    found = pj.distill(student, teacher, own, pj.Distill(epochs=0.5, alpha=1))
    assert "the outputs are labels, compared by 'mse'" in " ".join(found.notes["events"])


def test_targets_that_do_not_tell_need_a_loss_by_name(of_labels):
    own = task(LABELS[:, :5], lambda outputs, targets: (outputs[:, :5] - targets).square().mean())
    with pytest.raises(pj.Refused, match=r"needs targets that tell.*outputs \(200, 12\), targets \(200, 5\)"):
        pj.distill(net(24, 12, 1), of_labels, own, pj.Distill())
    assert pj.distill(net(24, 12, 1), of_labels, own, pj.Distill(epochs=0.5, loss="mse")).changes[0].done


@pytest.mark.parametrize(
    "method",
    [
        pj.DistillFeatures(epochs=0.5, pairs={"0": "0"}),
        pj.PruneGradually(0.5, epochs=0.5, alpha=0.5),
    ],
)
def test_whatever_has_a_teacher_compares_by_the_kind(of_labels, method):
    found = pj.apply(of_labels, method, task(LABELS, "bce"))
    assert "compared by 'sigmoid'" in " ".join(found.notes["events"])


def test_training_on_the_broadcast_is_refused_and_by_name_it_is_right():
    targets = (SCORES[:, 0] / 4).astype(np.float32)
    wrong = task(targets, lambda outputs, wanted: (outputs - wanted).square().mean(), gap)
    with pytest.raises(pj.Refused, match=r"its own target.*outputs \(50, 1\), targets \(50,\)"):
        pj.fit(net(16, 1), wrong, pj.Strategy(batch_size=50), say=[].append)
    with pytest.raises(pj.Refused, match=r"its own target.*outputs \(50, 1\), targets \(50,\)"):
        pj.apply(net(16, 1), pj.FineTune(batch_size=50), wrong)
    right = pj.fit(net(16, 1), task(targets, "mse", gap), pj.Strategy(epochs=8, batch_size=50), say=[].append)
    assert right.record.quality < 0.3 * np.abs(targets - targets.mean()).mean()
