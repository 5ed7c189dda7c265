"""A strategy is data: it prints as what makes it, and comes back from YAML and JSON as it was."""

from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

import penjing as pj
from penjing.core.strict_yaml import dump_yaml, load_yaml, read_yaml
from penjing.train.optimizers import NAMES
from penjing.train.schedule import SCHEDULES

Strategy = pj.Strategy


def _values(info):
    """Return values that a field may have: of its type, within its bounds."""
    kinds = get_args(info.annotation) if type(None) in get_args(info.annotation) else (info.annotation,)
    bounds = {
        name: getattr(rule, name)
        for rule in info.metadata
        for name in ("gt", "ge", "lt", "le")
        if hasattr(rule, name)
    }
    low, high = bounds.get("gt", bounds.get("ge")), bounds.get("lt", bounds.get("le", 1e9))
    made = []
    for kind in kinds:
        if kind is type(None):
            made.append(st.none())
        elif kind is bool:
            made.append(st.booleans())
        elif kind is int:
            made.append(st.integers(low, high))
        elif kind is float:
            made.append(st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds))
        else:
            assert get_origin(kind) is Literal, kind
            made.append(st.sampled_from(get_args(kind)))
    return st.one_of(made)


strategies = st.builds(Strategy, **{name: _values(info) for name, info in Strategy.model_fields.items()})


@given(strategies)
def test_a_strategy_prints_as_what_makes_it(strategy):
    assert eval(repr(strategy), {"Strategy": Strategy}) == strategy  # noqa: S307
    assert str(strategy) == repr(strategy)


@given(strategies)
def test_a_strategy_comes_back_from_yaml_and_json(strategy):
    again = Strategy(**load_yaml(dump_yaml(strategy.model_dump()), "strategy"))
    assert again == strategy
    assert hash(again) == hash(strategy)
    assert Strategy.model_validate_json(strategy.model_dump_json()) == strategy


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
@pytest.mark.parametrize("optimizer", NAMES)
def test_each_comes_back_from_a_file(optimizer, schedule, tmp_path):
    strategy = Strategy(optimizer=optimizer, schedule=schedule, lr=3e-7)
    (tmp_path / "strategy.yaml").write_text(dump_yaml(strategy.model_dump(mode="json")))
    again = Strategy(**read_yaml(tmp_path / "strategy.yaml"))
    assert again == strategy
    assert (again.peak_lr, again.lr_schedule) == (strategy.peak_lr, strategy.lr_schedule)
