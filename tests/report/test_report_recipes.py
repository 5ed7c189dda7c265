"""What the probe of precision recipes found, in the terminal and in the HTML page."""

import pytest

from penjing.core.measurement import Estimate
from penjing.planners.candidates import Probed
from penjing.report.html import write_report
from penjing.report.recipes import describe_recipes, list_recipe_rows
from penjing.report.record import RecipeRows, Record
from penjing.report.terminal import plain_table


def row(name, value, left=(), reason=""):
    ratio = None if value is None else Estimate(value=value, low=value - 0.01, high=value + 0.01, n=6)
    return Probed(name=name, plan=[], loss=0, ratio=ratio, float_layers=left, layers=3, reason=reason)


@pytest.fixture
def probed(record):
    rows = [row("packed", 1.2), row("late", None, reason="no <time>"), row("static", 0.5, ("head",))]
    return Record.model_validate(record | {"recipes": RecipeRows(rows=rows)})


def test_the_fastest_recipe_is_told_and_all_are_listed(probed, tmp_path):
    said = describe_recipes(probed.recipes)
    assert said == (
        "The fastest precision recipe, static, takes 0.50 times the latency of float before any pruning; "
        "1 of 2 recipes do not pay."
    )
    assert said in plain_table(probed, width=1000)
    assert list_recipe_rows(probed.recipes) == [
        ("static", "0.50", "0.49 to 0.51", "1 of 3: head"),
        ("packed", "1.20", "1.19 to 1.21", "none"),
        ("late", "not measured", "no <time>", "none"),
    ]
    write_report(probed, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert said in page
    assert "1 of 3: head" in page
    assert "no &lt;time&gt;" in page


def test_without_a_probe_nothing_is_said(record, tmp_path):
    record = Record.model_validate(record)
    assert describe_recipes(record.recipes) == ""
    assert list_recipe_rows(record.recipes) == []
    write_report(record, tmp_path / "report.html")
    assert "Precision recipes" not in (tmp_path / "report.html").read_text(encoding="utf-8")
