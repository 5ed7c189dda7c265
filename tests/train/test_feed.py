"""Batches that are read ahead where training waits for them."""

import threading
import time

import numpy as np
import pytest

from penjing.core.data import LiveSplit, Split
from penjing.train.feed import Feed, read_ahead


def slow(seconds, count=200, size=10, fails_at=None):
    """Live data whose every batch takes a while, by the thread that reads it."""
    readers = []

    def walk(seed):
        for start in range(0, count, size):
            readers.append(threading.current_thread().name)
            time.sleep(seconds)
            if start == fails_at:
                raise ValueError("no such file")
            yield (np.arange(start, start + size, dtype=np.float32)[:, None],), np.arange(start, start + size)

    return LiveSplit(walk, count, "train"), readers


def taken(feed, batches, compute):
    found = []
    for _, (_, targets) in feed.walk():
        time.sleep(compute)
        found.append(targets.tolist())
        if len(found) == batches:
            return found


def test_slow_data_are_read_ahead_in_the_same_order():
    split, readers = slow(0.01)
    feed = Feed(split, 10, 0)
    found = taken(feed, 40, 0.005)
    assert found == [list(range(i, i + 10)) for _ in range(2) for i in range(0, 200, 10)]
    assert len(set(readers)) >= 2, "first the caller's thread, then another"
    (event,) = feed.events
    assert "of the time waits for data" in event


def test_quick_data_and_arrays_are_read_as_they_are_needed():
    split, readers = slow(0.0)
    feed = Feed(split, 10, 0)
    taken(feed, 30, 0.005)
    assert set(readers) == {threading.current_thread().name}
    assert not feed.events
    arrays = Split((np.zeros((200, 1), np.float32),), np.zeros(200, np.int64), "train")
    feed = Feed(arrays, 10, 0)
    taken(feed, 30, 0.0)
    assert not feed.events


def test_what_reading_raises_comes_through():
    split, _ = slow(0.0, fails_at=50)
    with pytest.raises(ValueError, match="no such file"):
        list(read_ahead(split.batches(10)))


def test_a_walk_that_is_broken_off_leaves_no_thread():
    split, _ = slow(0.001)
    before = threading.active_count()
    walk = read_ahead(split.batches(10))
    next(walk)
    walk.close()
    assert threading.active_count() == before
