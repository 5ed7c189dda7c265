"""Every refusal says what must hold, and what to do about it."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "penjing"
MODAL = re.compile(r"\b(must|needs?|cannot)\b")


def words(node):
    """The text of a literal or an f-string, its fields as {}; None where it is only known when it runs."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def faults(source):
    """The line of every refusal in a source that has no fix, or a rule without a modal verb, and which."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refused"):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        rule = words(node.args[0] if node.args else given["rule"])
        fix = words(given["fix"]) if "fix" in given else ""
        if rule is not None and MODAL.search(rule) is None:
            yield node.lineno, f"rule: {rule}"
        if fix is not None and not fix.strip():
            yield node.lineno, f"no fix: {rule}"


def test_every_refusal_has_a_rule_and_a_fix():
    left = [
        f"{path.relative_to(SOURCE)}:{line}: {fault}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line, fault in faults(path.read_text())
    ]
    assert not left, "\n".join(left)


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ('Refused("must be less than 1", fix="use 0.3")', None),
        ('Refused(rule, value=1, fix=f"use {best}")', None),
        ('Refused(f"{name} needs data", fix=advice(name))', None),
        ('Refused("is less than 1", fix="use 0.3")', "rule: is less than 1"),
        ('Refused(f"the {name} fits", fix="use 0.3")', "rule: the {} fits"),
        ('Refused("must be less than 1")', "no fix: must be less than 1"),
        ('Refused("must be less than 1", fix=" ")', "no fix: must be less than 1"),
    ],
)
def test_a_bad_refusal_is_found(call, fault):
    assert [what for _, what in faults(call)] == ([] if fault is None else [fault])
