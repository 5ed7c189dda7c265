"""Goals in people's words."""

import pytest

from penjing.core.errors import Refused
from penjing.core.goal import Goal, parse_goal


@pytest.mark.parametrize(
    ("text", "metric", "at_least", "value"),
    [
        ("accuracy >= 92%", "accuracy", True, 0.92),
        ("f1_macro>=0.8", "f1_macro", True, 0.8),
        (" rmse <= 1.5e-1 ", "rmse", False, 0.15),
        ("accuracy ≥ 90 %", "accuracy", True, 0.9),
    ],
)
def test_goals_are_read(text, metric, at_least, value):
    goal = parse_goal(text)
    assert (goal.metric, goal.at_least, goal.value) == (metric, at_least, pytest.approx(value))
    assert parse_goal(goal) is goal
    assert parse_goal(str(goal)) == goal


@pytest.mark.parametrize(
    "text", ["", "accuracy", "accuracy > 92%", "92%", "accuracy >= much", "accuracy >= ", ">= 3", 0.92, None]
)
def test_what_is_no_goal_is_refused(text):
    with pytest.raises(Refused, match="goal must read as"):
        parse_goal(text)


def test_a_goal_is_met_at_its_value():
    assert Goal(metric="accuracy", at_least=True, value=0.5).met(0.5)
    assert not Goal(metric="rmse", at_least=False, value=0.5).met(0.51)
