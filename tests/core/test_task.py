"""Every usual form of data is read; every usual fault of data is refused where it is, or noted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from penjing.core.data import reading
from penjing.core.data.split import divide
from penjing.core.errors import Exit, Refused
from penjing.core.task import LiveSplit, Split, Task

RNG = np.random.default_rng(0)
X = RNG.normal(size=(400, 3, 4)).astype(np.float32)
Y = RNG.integers(0, 4, 400)
TRAIN, VALID, TEST = (X[:200], Y[:200]), (X[200:300], Y[200:300]), (X[300:], Y[300:])


def task(train: Any = TRAIN, valid: Any = VALID, test: Any = TEST, **fields: Any) -> Task:
    return Task(train=train, valid=valid, test=test, **fields)


def batches_of(x: np.ndarray, y: np.ndarray, size: int = 32) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(y), size)]


class Indexed:
    """A map-style data set that may fail at one index."""

    def __init__(self, x: np.ndarray, y: np.ndarray, bad: int | None = None) -> None:
        self.x, self.y, self.bad = x, y, bad

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index == self.bad:
            raise OSError("truncated image")
        return self.x[index], int(self.y[index])


FORMS = {
    "arrays": lambda x, y: (x, y),
    "list of arrays": lambda x, y: [x, y],
    "tensors": lambda x, y: (torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)),
    "lists": lambda x, y: (x.tolist(), y.tolist()),
    "data set": Indexed,
    "tensor data set": lambda x, y: TensorDataset(torch.from_numpy(x), torch.from_numpy(y)),
    "loader": lambda x, y: DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=48),
    "list of batches": batches_of,
    "list of examples": lambda x, y: list(zip(x, y.tolist(), strict=True)),
    "function": lambda x, y: lambda: iter(batches_of(x, y)),
    "generator function": lambda x, y: lambda: (b for b in batches_of(x, y, 17)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_examples(form: str):
    make = FORMS[form]
    ready = task(make(*TRAIN), make(*VALID), make(*TEST)).prepare()
    for name, (x, y) in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
        split = getattr(ready, name)
        inputs, targets = split.arrays()
        assert len(split) == len(y)
        assert inputs[0].dtype == np.float32
        assert targets.dtype == np.int64
        assert np.array_equal(inputs[0], x)
        assert np.array_equal(targets, y)
        assert np.array_equal(split.example()[0], x[:1])
    assert isinstance(ready.valid, Split)


@pytest.mark.parametrize("form", FORMS)
def test_batches_have_the_size_asked_for_and_can_be_walked_again(form: str):
    split = task(FORMS[form](*TRAIN)).prepare().train
    for _ in range(2):
        sizes = [len(y) for _, y in split.batches(64)]
        assert sizes == [64, 64, 64, 8]


def test_several_inputs_stay_apart():
    pairs = ((X, X[:, 0].astype(np.int32)), Y)
    data = TensorDataset(torch.from_numpy(X), torch.from_numpy(X[:, 0].astype(np.int32)), torch.from_numpy(Y))
    for given in (pairs, data, DataLoader(data, batch_size=50)):
        ready = Task(train=given, valid=given, max_overlap=1).prepare()
        inputs, _ = ready.valid.arrays()
        assert [x.dtype for x in inputs] == [np.float32, np.int32]
        assert inputs[1].shape[1:] == (4,)


def test_shuffling_follows_the_seed_and_covers_everything():
    for form in ("arrays", "data set"):
        split = task(FORMS[form](*TRAIN)).prepare().train
        first, again, other = (np.concatenate([y for _, y in split.batches(64, seed)]) for seed in (1, 1, 2))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
        assert np.array_equal(np.sort(first), np.sort(TRAIN[1]))


def test_augmentation_of_training_data_stays_alive():
    def noisy() -> Iterator[Any]:
        for x, y in batches_of(*TRAIN):
            yield x + np.random.default_rng().normal(size=x.shape).astype(np.float32), y

    split = task(noisy).prepare().train
    assert isinstance(split, LiveSplit)
    assert split.inputs is split.targets is None
    assert not np.array_equal(split.arrays()[0][0], split.arrays()[0][0])
    assert np.array_equal(split.example()[0], split.example()[0])


def test_prepare_is_repeatable_and_leaves_the_task_alone():
    plain = task()
    ready = plain.prepare()
    assert ready.prepare() is ready
    assert plain.train is TRAIN
    assert plain.notes == ()
    assert plain.prepare().fingerprint() == ready.fingerprint()


# Faults of the source


def test_a_one_shot_iterator_is_refused_with_the_way_out():
    for name in ("train", "valid", "test"):
        with pytest.raises(Refused, match=rf"task.{name}.*pass a function that makes it") as caught:
            task(**{name: iter(batches_of(*TRAIN))}).prepare()
        assert caught.value.code is Exit.BAD_INPUT


@pytest.mark.parametrize("empty", [(X[:0], Y[:0]), [], Indexed(X[:0], Y[:0]), lambda: iter([])])
def test_empty_data_is_refused(empty: Any):
    for name in ("train", "valid"):
        with pytest.raises(Refused, match=f"task.{name}: the split must have examples, got 0"):
            task(**{name: empty}).prepare()


def test_a_function_that_gives_the_same_iterator_twice_is_found():
    used = iter(batches_of(*TRAIN))
    with pytest.raises(Refused, match="must give its examples on every pass"):
        task(lambda: used).prepare()


def test_endless_data_needs_a_limit(monkeypatch: pytest.MonkeyPatch):
    class Endless(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            for i in itertools.count():
                yield torch.full((2,), float(i)), torch.tensor(1)

    monkeypatch.setattr(reading, "WITHOUT_LENGTH", 500)
    endless = DataLoader(Endless(), batch_size=16)
    small = (-np.arange(1, 17, dtype=np.float32).reshape(8, 2), np.arange(8) % 2)
    for name in ("train", "valid"):
        splits = {"train": small, "valid": (small[0] - 50, small[1]), name: endless}
        with pytest.raises(Refused, match="max_examples"):
            Task(**splits).prepare()
        ready = Task(**splits, max_examples=40).prepare()
        assert len(getattr(ready, name)) in (20, 40)
    ready = Task(train=endless, valid=small, max_examples=40).prepare()
    assert [len(y) for _, y in ready.train.batches(16)] == [16, 16, 8]


def test_an_example_that_cannot_be_read_is_named():
    with pytest.raises(
        Refused, match=r"task.valid, example 7: every example must be readable, got OSError: truncated image"
    ):
        task(valid=Indexed(*VALID, bad=7)).prepare()
    with pytest.raises(Refused, match=r"task.train, example 199"):
        task(train=Indexed(*TRAIN, bad=199)).prepare()

    def breaks() -> Iterator[Any]:
        yield from batches_of(*VALID)[:2]
        raise RuntimeError("worker exited")

    with pytest.raises(Refused, match=r"task.valid, batch 2: .*worker exited"):
        task(valid=breaks).prepare()


def test_a_change_of_shape_or_type_names_the_batch():
    good = batches_of(*VALID)
    wide = [*good, (X[:5, :2], Y[:5])]
    with pytest.raises(Refused, match=r"task.valid, batch 4: .*\(2, 4\) after float32 \(3, 4\)"):
        task(valid=wide).prepare()
    typed = [*good, (X[:5].astype(np.float16), Y[:5])]
    with pytest.raises(Refused, match=r"batch 4.*float16"):
        task(valid=lambda: iter(typed)).prepare()
    ragged = Indexed(X, Y)
    ragged.x = [*X[:3], X[3, :2], *X[4:]]  # type: ignore[assignment]
    with pytest.raises(Refused, match="example 3"):
        task(valid=ragged).prepare()


def test_batches_of_other_sizes_are_weighted_by_their_examples():
    uneven = [(X[200:208], Y[:8]), (X[208:216], Y[8:16]), (X[216:219], Y[16:19])]
    assert np.array_equal(task(valid=uneven).prepare().valid.targets, Y[:19])


@pytest.mark.parametrize(
    "data",
    [
        X,
        {"x": X, "y": Y},
        "train.csv",
        5,
        (X,),
        (X, Y[:-1]),
        (X, [["a"], [1, 2]]),
        [{"x": 1}],
        (X[0, 0, 0], Y[0]),
    ],
)
def test_what_is_no_data_is_refused(data: Any):
    with pytest.raises(Refused):
        task(valid=data).prepare()


# Faults of inputs and labels


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.where(np.arange(400) == 5, -1, Y), "1 negative, -1..3"),
        (Y.astype(float), "astype"),
        (np.eye(4)[Y], r"one-hot \(400, 4\).*argmax"),
        (np.array(list("abcd"))[Y], "text such as"),
        (Y[:, None], r"shape \(400, 1\)"),
        (Y[:, None].astype(float) / 3, "shape"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused(labels: np.ndarray, words: str):
    for name in ("train", "valid"):
        with pytest.raises(Refused, match=words):
            task(**{name: (X, labels)}).prepare()


def test_labels_are_compared_with_the_models_outputs():
    ready = task(class_names=tuple("abcd")).prepare()
    ready.check_labels(4)
    with pytest.raises(Refused, match=r"task.train, targets: the labels must lie in 0..2.*got 0..3"):
        task().prepare().check_labels(3)
    with pytest.raises(Refused, match="one name for each of 5 outputs"):
        ready.check_labels(5)
    data = TensorDataset(*(torch.from_numpy(part) for part in TRAIN))
    live = task(DataLoader(data, batch_size=64)).prepare()
    with pytest.raises(Refused, match=r"task.train"):
        live.check_labels(2)


def test_other_targets_are_left_to_functions_of_the_user():
    targets = RNG.normal(size=(400, 2))
    own = {"loss": lambda o, t: 0, "metric": lambda o, t: 0.0, "direction": "minimize"}
    ready = task((X[:200], targets[:200]), (X[200:], targets[200:]), None, **own).prepare()
    assert ready.train.targets.shape == (200, 2)
    ready.check_labels(1)
    targets[250, 1] = np.nan
    with pytest.raises(Refused, match="valid, targets"):
        task((X[:200], targets[:200]), (X[200:], targets[200:]), None, **own).prepare()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_counted(value: float):
    bad = X[:100].copy()
    bad[[40, 60], 1] = value
    with pytest.raises(
        Refused, match=r"task.valid, input 0.* 40.*8 values NaN or infinite in 2 of 100 examples"
    ):
        task(valid=(bad, Y[:100])).prepare()
    live = task(train=lambda: iter(batches_of(bad, Y[:100])), max_examples=100)
    with pytest.raises(Refused, match=r"task.train, batch 1"):
        live.prepare()


def test_types_of_inputs():
    doubles = task((X[:200].astype(float), Y[:200])).prepare()
    assert doubles.train.inputs[0].dtype == np.float32
    assert "float64 inputs were cast to float32" in doubles.notes
    tokens = (RNG.integers(0, 9, (50, 6)), Y[:50])
    assert Task(train=tokens).prepare().train.inputs[0].dtype == np.int64
    for wrong in (X + 1j, X.astype(str), X.astype(object)):
        with pytest.raises(Refused):
            task(valid=(wrong, Y)).prepare()
    with pytest.raises(Refused, match="TypeError"):
        task(valid=(torch.from_numpy(X).bfloat16(), Y)).prepare()
    with pytest.raises(Refused, match="one shape and type"):
        task(valid=(X[:, :2], Y)).prepare()


# Splits that are missing, overlap, or are small


def test_a_missing_test_split_is_half_of_valid_with_every_class():
    ready = Task(train=TRAIN, valid=VALID).prepare(seed=1)
    assert len(ready.valid) == len(ready.test) == 50
    counts = np.bincount(VALID[1]), np.bincount(ready.valid.targets), np.bincount(ready.test.targets)
    assert np.array_equal(counts[0], counts[1] + counts[2])
    assert np.abs(counts[1] - counts[2]).max() <= 1
    assert "test was not given: half of valid (50 examples) was held back for it" in ready.notes
    other = Task(train=TRAIN, valid=VALID).prepare(seed=2)
    assert not np.array_equal(ready.test.inputs[0], other.test.inputs[0])
    assert (
        ready.fingerprint()
        == Task(train=TRAIN, valid=VALID).prepare(seed=1).fingerprint()
        != other.fingerprint()
    )


@pytest.mark.parametrize("form", ["arrays", "data set", "loader"])
def test_missing_valid_is_taken_from_train(form: str):
    ready = Task(train=FORMS[form](X, Y)).prepare()
    assert (len(ready.train), len(ready.valid), len(ready.test)) == (280, 60, 60)
    assert not any("also in" in note for note in ready.notes)
    assert any("valid was not given" in note for note in ready.notes)
    assert any("augmentation" in note for note in ready.notes) == (form != "arrays")
    with pytest.raises(Refused, match="enough examples"):
        Task(train=(X[:1], Y[:1])).prepare()


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_divide_draws_the_same_share_of_every_class(share: float):
    targets = np.repeat([0, 1, 2], [600, 300, 40])
    rest, drawn = divide(targets, share, 0)
    assert np.array_equal(np.sort(np.concatenate([rest, drawn])), np.arange(940))
    assert np.bincount(targets[drawn]) == pytest.approx(share * np.array([600, 300, 40]), abs=1)


def test_a_test_split_that_the_search_sees_is_refused():
    for same in (
        lambda: task(test=VALID),
        lambda: Task(TRAIN, VALID, TRAIN),
        lambda: task(test=(VALID[0].copy(), VALID[1].copy())),
    ):
        with pytest.raises(Refused, match="unseen by the search"):
            same().prepare()


def test_overlaps_are_counted_in_a_note():
    shared = np.concatenate([X[:8], X[300:]]), np.concatenate([Y[:8], Y[300:]])
    notes = task(test=shared).prepare().notes
    assert "8 of 108 examples of test are also in train" in notes
    assert not any("valid" in note for note in notes)
    assert any("valid is train" in n for n in Task(TRAIN, TRAIN, TEST).prepare().notes)


def test_small_and_degenerate_data_are_noted():
    tiny = task(test=(X[300:320], Y[300:320])).prepare().notes
    assert "test has 20 examples: drops below about 15.0% cannot be certified at 95%" in tiny
    single = task(test=(X[300:], np.full(100, 2))).prepare().notes
    assert "test has only one class (2)" in single
    flat = task(valid=(np.zeros_like(X[200:300]), Y[200:300])).prepare().notes
    assert "an input of valid has the same value everywhere" in flat


def test_max_examples_draws_from_the_whole():
    order = 200 + np.argsort(Y[200:300])
    ordered = (X[order], Y[order])
    for form in ("arrays", "data set"):
        ready = task(valid=FORMS[form](*ordered), max_examples=80).prepare()
        assert len(ready.train) == len(ready.valid) == len(ready.test) == 80
        assert len(np.unique(ready.valid.targets)) == 4


# Settings and fingerprints


@pytest.mark.parametrize(
    "fields", [{"metric": lambda o, t: 0.0}, {"batch_size": 0}, {"batch_size": True}, {"max_examples": -1}]
)
def test_settings_are_refused_as_usage(fields: dict[str, Any]):
    with pytest.raises(Refused) as caught:
        task(**fields).prepare()
    assert caught.value.code is Exit.USAGE


def test_fingerprints_see_a_changed_value_and_survive_augmentation():
    changed = TEST[0].copy()
    changed[0, 0, 0] += 1
    assert task().fingerprint() == task().fingerprint() != task(test=(changed, TEST[1])).fingerprint()
    data = TensorDataset(torch.from_numpy(TRAIN[0]), torch.from_numpy(TRAIN[1]))
    loader = DataLoader(data, batch_size=32, shuffle=True)
    shuffled = task(loader).prepare()
    assert shuffled.fingerprint() == shuffled.fingerprint()
    stable = task(Indexed(*TRAIN)).fingerprint()
    assert (
        stable == task(Indexed(*TRAIN)).fingerprint() != task(Indexed(TRAIN[0] + 1, TRAIN[1])).fingerprint()
    )
