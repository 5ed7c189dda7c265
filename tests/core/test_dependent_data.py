"""Examples that depend on each other, or were seen before: counted, said or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from penjing.core.data.copies import READ, row_hashes
from penjing.core.data.split import divide_groups
from penjing.core.errors import Refused
from penjing.core.task import Split, Task
from penjing.measurement.certify import certify

RNG = np.random.default_rng(0)
X = RNG.normal(size=(600, 5)).astype(np.float32)
Y = RNG.integers(0, 3, 600)
TRAIN, VALID, TEST = ((X[part], Y[part]) for part in (slice(300), slice(300, 450), slice(450, 600)))


def data_set(pair: tuple[np.ndarray, np.ndarray]) -> TensorDataset:
    return TensorDataset(*(torch.from_numpy(part) for part in pair))


def task(train: Any = TRAIN, valid: Any = VALID, test: Any = TEST, **fields: Any) -> Task:
    return Task(train=train, valid=valid, test=test, **fields)


def rows(pair: tuple[np.ndarray, np.ndarray], index: Any) -> tuple[np.ndarray, np.ndarray]:
    return pair[0][index], pair[1][index]


# Copies


def test_copies_within_test_count_once():
    repeated = rows(TEST, np.tile(np.arange(40), 50))
    ready = task(test=repeated).prepare()
    assert len(ready.test) == 40
    assert (
        "1960 of 2000 examples of test are copies of others in it: each counts once, 40 are left"
        in ready.notes
    )
    np.testing.assert_array_equal(ready.test.inputs[0], TEST[0][:40])
    assert ready.fingerprint() == task(test=rows(TEST, slice(40))).fingerprint()


def test_the_same_input_with_another_target_is_no_copy():
    twice = np.concatenate([TEST[0][:9]] * 2), np.concatenate([TEST[1][:9], (TEST[1][:9] + 1) % 3])
    assert len(task(test=twice).prepare().test) == 18


def test_copies_stay_on_one_side_when_a_split_is_divided():
    many = rows(VALID, np.repeat(np.arange(150), 3))
    ready = task(valid=many, test=None).prepare()
    assert not set(row_hashes(ready.valid.inputs)) & set(row_hashes(ready.test.inputs))
    assert len(ready.valid) + 3 * len(ready.test) == 450
    assert not any("also in" in note for note in ready.notes)


def test_hashes_tell_contents_apart_by_every_input():
    first = (X[:4], np.array([0, 0, 1, 1])[:, None])
    assert len(set(row_hashes(first))) == 4
    assert len(set(row_hashes((X[[0, 0, 0, 0]], first[1])))) == 2


# Seen before

SEEN = {
    "a copy of train": lambda: task(test=(TRAIN[0].copy(), TRAIN[1].copy())),
    "valid in another order": lambda: task(test=rows(VALID, RNG.permutation(150))),
    "a fifth of train": lambda: task(test=(np.concatenate([TEST[0], TRAIN[0][:40]]), np.arange(190) % 3)),
    "a loader of train that holds the test": lambda: task(DataLoader(data_set((X, Y)), 64, shuffle=True)),
    "a data set of train that holds the test": lambda: task(data_set((X, Y))),
    "a function that gives the test": lambda: task(lambda: iter([TRAIN, TEST])),
}


@pytest.mark.parametrize("case", SEEN)
def test_a_test_that_was_seen_is_refused_whatever_form_the_data_has(case: str):
    with pytest.raises(
        Refused, match=r"task.test: the test split must be unseen by the search, got \d+% of test in"
    ):
        SEEN[case]().prepare()


def test_what_valid_shares_with_train_is_refused_too_unless_it_is_train_itself():
    with pytest.raises(Refused, match="valid must not be in train, got 100% of valid"):
        task(valid=rows(TRAIN, slice(50))).prepare()
    assert any("valid is train" in note for note in task(valid=TRAIN).prepare().notes)


def test_a_share_below_the_stated_one_is_noted():
    mixed = np.concatenate([TEST[0], TRAIN[0][:10]]), np.concatenate([TEST[1], TRAIN[1][:10]])
    note = "10 of 160 examples of test are also in train"
    for train in (TRAIN, data_set(TRAIN), DataLoader(data_set(TRAIN), 32, shuffle=True)):
        assert note in task(train, test=mixed).prepare().notes
    with pytest.raises(Refused, match="where 5% may be"):
        task(test=mixed, max_overlap=0.05).prepare()
    everything = task(test=TRAIN, valid=TEST, max_overlap=1.0)
    with pytest.raises(Refused, match="test is train"):
        everything.prepare()  # the same object is an error whatever the share
    copied = (TRAIN[0].copy(), TRAIN[1].copy())
    assert "300 of 300 examples of test are also in train" in task(test=copied, max_overlap=1).prepare().notes


def test_a_part_of_much_training_data_is_read_and_its_share_taken_for_the_whole():
    many = RNG.normal(size=(3 * READ, 1)).astype(np.float32)
    labels = np.zeros(len(many), np.int64)
    read = []

    class Counted(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return super().__getitem__(index)

    held = Counted(torch.from_numpy(many), torch.from_numpy(labels))
    own = rows((many, labels), slice(0, 600)), rows((many, labels), slice(600, 1200))
    with pytest.raises(Refused, match=r"about (9[0-9]|100)%"):
        Task(train=held, valid=(own[0][0] + 9, own[0][1]), test=own[1]).prepare()
    assert READ <= len(set(read)) < 1.2 * READ


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "half"])
def test_a_share_is_between_nothing_and_everything(share: Any):
    with pytest.raises(Refused, match=r"task.max_overlap must be a share from 0 to 1"):
        task(max_overlap=share).prepare()


# Groups


def test_groups_reach_the_certificate():
    patients = np.repeat(np.arange(30), 5)
    ready = task(groups=patients).prepare()
    np.testing.assert_array_equal(ready.test.groups, patients)
    outputs = np.eye(3, dtype=np.float32)[ready.test.targets]
    certificate, _ = certify(
        outputs, [("same", outputs)], ready.test.targets, ready, 0.2, 0.95, ready.test.groups
    )
    assert (certificate.n, certificate.groups) == (150, 30)
    assert ready.fingerprint() != task().fingerprint()
    assert ready.fingerprint() == task(groups=[f"patient {i}" for i in 100 + patients]).fingerprint()


def test_groups_stay_whole_where_a_split_is_made():
    names = np.repeat(np.arange(30), 5)
    ready = task(test=None, groups={"valid": names}).prepare()
    assert not set(ready.valid.groups) & set(ready.test.groups)
    assert len(ready.valid) == len(ready.test) == 75
    ready = Task(train=TRAIN, groups={"train": np.repeat(np.arange(60), 5)}).prepare(seed=3)
    parts = [set(split.groups) for split in (ready.train, ready.valid, ready.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60
    assert [len(split) for split in (ready.train, ready.valid, ready.test)] == [210, 45, 45]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_groups_of_different_sizes_are_divided_near_the_share(share: float):
    groups = np.repeat(np.arange(200), RNG.integers(1, 9, 200))
    rest, drawn = divide_groups(groups, share, 0)
    assert not set(groups[rest]) & set(groups[drawn])
    assert len(rest) + len(drawn) == len(groups)
    assert len(drawn) / len(groups) == pytest.approx(share, abs=0.02)


def test_groups_in_two_splits_were_seen():
    names = {"train": np.repeat(np.arange(60), 5), "test": np.repeat(np.arange(58, 88), 5)}
    assert "2 of 30 groups of test are also in train" in task(groups=names).prepare().notes
    assert "2 of 30 groups of test are also in train" in task(data_set(TRAIN), groups=names).prepare().notes
    with pytest.raises(Refused, match="the groups of test must not be in train, got 2 of 30"):
        task(groups=names, max_overlap=0.02).prepare()


def test_groups_follow_limits_copies_and_data_sets():
    names = np.arange(150) // 5
    for form in (TEST, data_set(TEST), DataLoader(data_set(TEST), 32)):
        if not isinstance(form, DataLoader):
            limited = task(test=form, groups=names, max_examples=60).prepare().test
            place = {row: i for i, row in enumerate(row_hashes((TEST[0],)))}
            assert [names[place[row]] for row in row_hashes(limited.inputs)] == list(limited.groups)
        np.testing.assert_array_equal(task(test=form, groups=names).prepare().test.groups, names)
    doubled = rows(TEST, np.repeat(np.arange(150), 2))
    np.testing.assert_array_equal(task(test=doubled, groups=np.repeat(names, 2)).prepare().test.groups, names)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"groups": np.arange(149)}, "must be one for each example"),
        ({"groups": np.zeros((150, 2))}, "must be one for each example"),
        ({"groups": {"tests": np.arange(150)}}, "of a split that is given, got 'tests'"),
        ({"groups": np.arange(150), "test": None}, "of a split that is given, got 'test'"),
        ({"groups": np.arange(150), "test": DataLoader(data_set(TEST), 8, shuffle=True)}, "a fixed order"),
    ],
)
def test_groups_that_do_not_fit_are_refused(fields: dict[str, Any], words: str):
    with pytest.raises(Refused, match=words):
        task(**fields).prepare()


# Loaders


@pytest.mark.parametrize("name", ["valid", "test"])
def test_a_loader_that_shuffles_gets_the_order_of_its_content(name: str):
    pair = {"valid": VALID, "test": TEST}[name]
    made = [task(**{name: DataLoader(data_set(pair), 32, shuffle=True)}).prepare() for _ in range(2)]
    assert made[0].fingerprint() == made[1].fingerprint()
    assert (
        f"the loader of {name} shuffles: its examples were put in the order of their content" in made[0].notes
    )
    inputs, targets = getattr(made[0], name).arrays()
    assert sorted(row_hashes((*inputs, targets))) == sorted(row_hashes(pair))
    fixed = task(**{name: DataLoader(data_set(pair), 32)}).prepare()
    assert not any("shuffles" in note for note in fixed.notes)


@pytest.mark.parametrize("name", ["valid", "test"])
def test_other_examples_on_every_pass_are_refused_where_they_judge(name: str):
    def noisy() -> Iterator[Any]:
        yield VALID[0] + np.random.default_rng().normal(size=VALID[0].shape).astype(np.float32), VALID[1]

    with pytest.raises(Refused, match=f"task.{name}: the examples must be the same on every pass"):
        task(**{name: noisy}).prepare()
    notes = Task(train=noisy).prepare().notes
    assert "train gives other examples on every pass, so that a stopped run cannot be resumed" in notes


def test_a_shuffled_part_of_a_loader_cannot_be_found_again():
    with pytest.raises(Refused, match="in a fixed order where there is max_examples"):
        task(valid=DataLoader(data_set(VALID), 16, shuffle=True), max_examples=40).prepare()


def test_what_a_loader_leaves_out_is_counted():
    notes = (
        task(
            DataLoader(data_set(TRAIN), 64, drop_last=True),
            VALID,
            DataLoader(data_set(TEST), 100, drop_last=True),
        )
        .prepare()
        .notes
    )
    assert "the loader of train leaves out 44 of 300 examples (drop_last)" in notes
    assert "the loader of test leaves out 50 of 150 examples (drop_last)" in notes
    assert not any("leaves out" in note for note in task(DataLoader(data_set(TRAIN), 64)).prepare().notes)


def test_splits_that_are_values_keep_their_groups():
    split = Split((TEST[0],), TEST[1], "test", np.arange(150) // 3)
    np.testing.assert_array_equal(task(test=split).prepare().test.groups, split.groups)
