import math

import pytest

from penjing.train.schedule import SCHEDULES, lr_factor

FALLING = ("linear", "cosine", "polynomial", "one_cycle")
"""Those that fall to zero and never rise again."""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7, 100, 1000])
def test_every_schedule_rises_to_one_and_stays_above_zero(schedule, total):
    factors = [lr_factor(schedule, step, total) for step in range(total)]
    top = factors.index(max(factors))
    assert max(factors) == pytest.approx(1.0)
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    if schedule != "cosine_restarts":
        assert factors[top:] == sorted(factors[top:], reverse=True)
    if schedule in FALLING:
        assert factors[-1] <= 1.1 / (0.7 * total) or total == 1


def test_warm_up_lengths():
    assert [lr_factor("linear", s, 100) for s in range(6)].index(1.0) == 5
    assert [lr_factor("one_cycle", s, 100) for s in range(40)].index(1.0) == 30


def test_values_on_the_way():
    def at(schedule, *steps):
        return [lr_factor(schedule, step, 100) for step in steps]

    assert at("constant", 5, 50, 99) == [1, 1, 1]
    assert at("step", 52, 53, 76, 77) == pytest.approx([1, 0.1, 0.1, 0.01])
    assert at("polynomial", 52)[0] == pytest.approx((1 - 47 / 95) ** 2)
    assert at("exponential", 5, 99) == pytest.approx([1, 0.01 ** (94 / 95)])
    assert at("inverse_sqrt", 23)[0] == pytest.approx(0.5)
    assert at("warmup_stable_decay", 80)[0] == 1
    assert at("warmup_stable_decay", 99)[0] == pytest.approx(1 - math.sqrt((94 / 95 - 0.8) / 0.2))


def test_restarts_double():
    factors = [lr_factor("cosine_restarts", step, 1400) for step in range(1400)]
    risen = [step for step in range(71, 1400) if factors[step] > factors[step - 1]]
    first, second = risen
    assert second - first == pytest.approx(2 * (first - 70), abs=2)
    assert factors[first] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "exponential", "polynomial"])
def test_the_framework_falls_in_the_same_way(schedule):
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    total = 19
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = torch.optim.lr_scheduler
    theirs = {
        "cosine": lambda: rates.CosineAnnealingLR(optimizer, total),
        "exponential": lambda: rates.ExponentialLR(optimizer, 0.01 ** (1 / total)),
        "polynomial": lambda: rates.PolynomialLR(optimizer, total, power=2),
    }[schedule]()
    for step in range(total):
        assert lr_factor(schedule, step, total) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        theirs.step()
