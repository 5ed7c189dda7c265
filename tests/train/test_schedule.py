import pytest

from penjing.train.schedule import rate_factor

SCHEDULES = ("linear", "cosine", "one_cycle")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7, 100, 1000])
def test_rises_then_falls_to_nearly_nothing(schedule, total):
    factors = [rate_factor(schedule, step, total) for step in range(total)]
    top = factors.index(max(factors))
    assert max(factors) == 1.0
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[-1] <= 1.1 / (0.7 * total) or total == 1


def test_warm_up_lengths():
    assert [rate_factor("linear", s, 100) for s in range(6)].index(1.0) == 5
    assert [rate_factor("one_cycle", s, 100) for s in range(40)].index(1.0) == 30
