"""Batches that are read ahead where training waits for them."""

import threading

import numpy as np
import pytest

from penjing.core.data.split import LiveSplit, Split
from penjing.train.feed import PROBED_BATCHES, BatchFeed, prefetch


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def live(clock, seconds, count=200, size=10, fails_at=None):
    """Live data whose every batch takes so many seconds of the clock, and the threads that read them."""
    readers = []

    def walk(seed):
        for start in range(0, count, size):
            readers.append(threading.current_thread().name)
            clock.now += seconds
            if start == fails_at:
                raise ValueError("no such file")
            yield (np.arange(start, start + size, dtype=np.float32)[:, None],), np.arange(start, start + size)

    return LiveSplit(walk, count, "train"), readers


def taken(feed, batches, clock, compute):
    found = []
    for _, (_, targets) in feed.iterate():
        clock.now += compute
        found.append(targets.tolist())
        if len(found) == batches:
            return found


def test_slow_data_are_read_ahead_in_the_same_order():
    clock = Clock()
    split, readers = live(clock, 0.01)
    feed = BatchFeed(split, 10, 0, clock=clock)
    found = taken(feed, 40, clock, 0.005)
    assert found == [list(range(i, i + 10)) for _ in range(2) for i in range(0, 200, 10)]
    first = PROBED_BATCHES + 1  # a batch is held back until it is known whether the next one is too small
    assert set(readers[:first]) == {threading.current_thread().name}
    assert threading.current_thread().name not in readers[first:], "from then on another thread reads"
    (event,) = feed.events
    assert event.startswith("71% of the time waits for data")


@pytest.mark.parametrize("seconds", [0.0, 0.001])
def test_quick_data_and_arrays_are_read_as_they_are_needed(seconds):
    clock = Clock()
    split, readers = live(clock, seconds)
    feed = BatchFeed(split, 10, 0, clock=clock)
    taken(feed, 30, clock, 0.005)
    assert set(readers) == {threading.current_thread().name}
    assert not feed.events
    arrays = Split((np.zeros((200, 1), np.float32),), np.zeros(200, np.int64), "train")
    feed = BatchFeed(arrays, 10, 0, clock=clock)
    taken(feed, 30, clock, 0.0)
    assert not feed.events


def test_what_reading_raises_comes_through():
    split, _ = live(Clock(), 0.0, fails_at=50)
    with pytest.raises(ValueError, match="no such file"):
        list(prefetch(split.batches(10)))


def test_a_walk_that_is_broken_off_leaves_no_thread():
    split, _ = live(Clock(), 0.0)
    before = threading.active_count()
    walk = prefetch(split.batches(10))
    next(walk)
    walk.close()
    assert threading.active_count() == before
