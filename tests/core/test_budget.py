"""Budgets: what people write, how it is said back, and what is refused."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing.core.budget import COSTS, Budget, Limit, parse_drop, parse_limit, parse_time, say
from penjing.core.errors import Exit, Refused

positive = st.floats(1e-6, 1e12)


@pytest.mark.parametrize(
    ("text", "unit", "value", "relative"),
    [
        ("5ms", "ms", 5, False),
        (" 5 ms ", "ms", 5, False),
        ("250us", "ms", 0.25, False),
        ("250µs", "ms", 0.25, False),
        ("1.5S", "ms", 1500, False),
        ("60%", "ms", 0.6, True),
        ("150 %", "ms", 1.5, True),
        (0.6, "ms", 0.6, True),
        ("0.6", "bytes", 0.6, True),
        (1, "bytes", 1, True),
        ("2x faster", "ms", 0.5, True),
        ("4x", "bytes", 0.25, True),
        ("2x smaller", "bytes", 0.5, True),
        ("10MB", "bytes", 1e7, False),
        ("10 MiB", "bytes", 10 * 2**20, False),
        ("1e3b", "bytes", 1000, False),
        (".5GB", "bytes", 5e8, False),
        ("40M", "count", 4e7, False),
        (40_000_000, "count", 4e7, False),
        (0.5, "count", 0.5, True),
        ("25%", "count", 0.25, True),
    ],
)
def test_limits_are_read(text, unit, value, relative):
    limit = parse_limit(text, unit, "x")
    assert (limit.value, limit.relative, limit.unit) == (pytest.approx(value), relative, unit)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize(
    "wrong",
    [
        0,
        -1,
        "0%",
        "-5ms",
        "-5%",
        math.nan,
        math.inf,
        -math.inf,
        "nan",
        "inf",
        "1e400",
        "",
        "%",
        "ms",
        "fast",
        "5 parsecs",
        "5ms 6ms",
        "5min",
        "0x",
        "0.5x",
        True,
        False,
        [5],
        frozenset(),
        10**400,
        "1,5ms",
        "5..1ms",
        "%5",
    ],
    ids=repr,
)
def test_wrong_limits_are_refused_by_name(name, wrong):
    with pytest.raises(Refused, match=rf"budget\.{name}") as caught:
        Budget(**{name: wrong})
    assert caught.value.code == Exit.USAGE
    assert caught.value.fix


@pytest.mark.parametrize("name", ["latency", "size", "memory"])
@pytest.mark.parametrize("bare", ["50", 50, 1.0001])
def test_a_bare_number_above_one_is_neither_a_share_nor_an_amount(name, bare):
    with pytest.raises(Refused, match=r"must have a unit.*50%"):
        Budget(**{name: bare})


def test_a_unit_of_another_kind_is_refused():
    for fields in ({"latency": "5MB"}, {"size": "5ms"}, {"memory": "40k"}, {"operations": "5ms"}):
        with pytest.raises(Refused, match="must have a unit"):
            Budget(**fields)
    with pytest.raises(Refused, match=r"limit's unit must be ms.*bytes"):
        Budget(latency=Limit(value=5, relative=False, unit="bytes"))
    with pytest.raises(Refused, match="limit's unit must be ms"):
        Budget(latency={"value": 5, "relative": False, "unit": "bytes"})
    with pytest.raises(Refused):
        Budget(latency={"value": 5})


@pytest.mark.parametrize(("text", "drop"), [("1%", 0.01), (0.01, 0.01), ("0.01", 0.01), ("0.5 %", 0.005)])
def test_drops_are_read(text, drop):
    assert parse_drop(text) == pytest.approx(drop)
    assert Budget(max_drop=text).max_drop == pytest.approx(drop)


@pytest.mark.parametrize("wrong", [0, 1, "1", 5, "100%", "-1%", "1ms", "1 point", "", math.nan, True, [1]])
def test_wrong_drops_are_refused(wrong):
    with pytest.raises(Refused, match=r"budget\.max_drop"):
        Budget(max_drop=wrong)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10min", 600), ("1.5h", 5400), ("2 min", 120)])
def test_times_are_read(text, seconds):
    assert parse_time(text) == seconds
    assert Budget(time=text).time == Budget(time=seconds).time == seconds


@pytest.mark.parametrize("wrong", [0, -3, "10", "5m", "5ms", "", math.inf, math.nan, True, 10**400, {}])
def test_wrong_times_are_refused(wrong):
    with pytest.raises(Refused, match=r"budget\.time"):
        Budget(time=wrong)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"trials": 0}, r"budget\.trials"),
        ({"trials": 2.5}, r"budget\.trials"),
        ({"confidence": 95}, r"budget\.confidence"),
        ({"confidence": 0.5}, r"budget\.confidence"),
        ({"confidence": math.nan}, r"budget\.confidence"),
        ({"latncy": "5ms"}, "cannot take a field 'latncy'.*Did you mean 'latency'"),
    ],
)
def test_wrong_fields_are_refused_with_their_name(fields, said):
    with pytest.raises(Refused, match=said) as caught:
        Budget(**fields)
    assert caught.value.code == Exit.USAGE


@given(value=positive, relative=st.booleans(), name=st.sampled_from(sorted(COSTS)))
def test_limits_survive_json(value, relative, name):
    budget = Budget(**{name: Limit(value=value, relative=relative, unit=COSTS[name])})
    again = Budget(**json.loads(json.dumps(budget.model_dump(mode="json"))))
    assert again == budget
    assert str(again) == str(budget)
    assert Budget.model_validate_json(budget.model_dump_json()) == budget


@given(
    max_drop=st.none() | st.floats(1e-6, 0.999),
    time=st.none() | st.floats(1e-3, 1e7),
    trials=st.none() | st.integers(1, 10**6),
    confidence=st.floats(0.51, 0.999),
    latency=st.none() | st.floats(1e-4, 1),
)
def test_budgets_survive_json(**fields):
    budget = Budget(**fields)
    assert Budget(**budget.model_dump(mode="json")) == budget
    assert hash(budget) == hash(Budget(**fields))


@given(value=st.floats(1e-3, 1e6), unit=st.sampled_from(["us", "ms", "s"]))
def test_an_amount_means_what_it_says(value, unit):
    factor = {"us": 1e-3, "ms": 1, "s": 1e3}[unit]
    assert parse_limit(f"{value}{unit}", "ms", "latency").absolute(7.0) == pytest.approx(value * factor)


@given(percent=st.floats(1e-3, 1e3), baseline=st.floats(1e-3, 1e9))
def test_a_share_is_of_the_baseline(percent, baseline):
    limit = parse_limit(f"{percent}%", "bytes", "size")
    assert limit.absolute(baseline) == pytest.approx(percent / 100 * baseline)


def test_a_budget_says_back_what_it_understood():
    budget = Budget(max_drop="1%", latency="60%", size="2.5MB", operations="40M", time="90s", trials=7)
    assert str(budget) == (
        "max_drop 1 points, latency 60% of the baseline, size 2.5 MB, operations 40 M, time 1.5 min, "
        "at most 7 trials; confidence 95%"
    )
    assert str(Budget()) == "no limits; confidence 95%"
    assert list(budget.costs) == ["latency", "size", "operations"]


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (999_950, "bytes", "1 MB"),
        (5, "bytes", "5 B"),
        (0, "bytes", "0 B"),
        (3600, "s", "1 h"),
        (1500, "ms", "1.5 s"),
        (0.25, "ms", "0.25 ms"),
        (4e7, "count", "40 M"),
        (12, "count", "12"),
        (0.5, "share", "0.5 share"),
    ],
)
def test_quantities_in_words(value, unit, words):
    assert say(value, unit) == words
