"""The shape of the house: no file, function or folder grows past the worst of today.

Each ceiling equals the worst that there is, so that what is mended stays mended: a looser one fails as well,
also in the limits that `pyproject.toml` gives ruff. The present worst of each, with its place:

    python tests/test_shape.py
"""

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "penjing"
CEILINGS = {
    "lines of a file": 447,
    "statements of a function": 44,
    "parameters of a function": 10,
    "options of a verb": 16,
    "branches of a function": 28,
    "nesting of a function": 5,
    "files of a folder": 32,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.IfExp,
    ast.comprehension,
    ast.match_case,
)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def inside(function: Function) -> Iterator[ast.AST]:
    """What belongs to a function itself, not to functions and classes in it."""
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, Function | ast.ClassDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def statements(function: Function) -> int:
    """Statements without the docstring, those of inner functions included."""
    found = sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1
    return found - (ast.get_docstring(function) is not None)


def parameters(function: Function) -> int:
    """Parameters without `self` and `cls`; `*` and `**` count as one each."""
    a = function.args
    names = [
        arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg is not None
    ]
    return len([name for name in names if name not in ("self", "cls")])


def branches(function: Function) -> int:
    """McCabe's number (1976): decisions and one; `and` and `or` decide too."""
    own = list(inside(function))
    decisions = sum(isinstance(node, BRANCHES) for node in own)
    return 1 + decisions + sum(len(node.values) - 1 for node in own if isinstance(node, ast.BoolOp))


def nesting(node: ast.AST, depth: int = 0) -> int:
    """How deep blocks stand in blocks; `elif` is no deeper than its `if`."""
    deepest = depth
    for name, value in ast.iter_fields(node):
        chained = (
            isinstance(node, ast.If) and name == "orelse" and len(value) == 1 and isinstance(value[0], ast.If)
        )
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, Function | ast.ClassDef | ast.Lambda):
                continue
            if isinstance(child, ast.AST):
                step = isinstance(child, BLOCKS) and not chained
                deepest = max(deepest, nesting(child, depth + step))
    return deepest


def worst(source: Path) -> dict[str, tuple[int, str]]:
    """The largest number of each kind, with its place."""
    files = sorted(source.rglob("*.py"))
    found: dict[str, list[tuple[int, str]]] = {name: [] for name in CEILINGS}
    for path in files:
        text, place = path.read_text("utf-8"), str(path.relative_to(source))
        found["lines of a file"].append((len(text.splitlines()), place))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Function):
                where = f"{place}:{node.lineno} {node.name}"
                for count in (statements, parameters, branches, nesting):
                    name = f"{count.__name__} of a function"
                    if count is parameters and place.startswith("cli/"):
                        name = "options of a verb"  # a parameter each, as the command line's library wants it
                    found[name].append((count(node), where))
    folders = Counter(str(path.parent.relative_to(source)) for path in files if path.name != "__init__.py")
    found["files of a folder"] = [(count, folder) for folder, count in folders.items()]
    return {name: max(numbers) for name, numbers in found.items()}


@pytest.mark.parametrize("kind", CEILINGS)
def test_nothing_grows_past_the_worst_of_today(kind):
    number, place = worst(SOURCE)[kind]
    assert number == CEILINGS[kind], f"the worst is {number} now ({place}): mend it, or lower the ceiling"


RULES = {
    "C901": "mccabe.max-complexity",
    "PLR0911": "pylint.max-returns",
    "PLR0912": "pylint.max-branches",
    "PLR0913": "pylint.max-args",
    "PLR0915": "pylint.max-statements",
}
"""Ruff's rules on complexity, and the limit of each."""


def limit_of(option: str) -> int:
    """What `pyproject.toml` sets a limit to."""
    section, name = option.split(".")
    number: int = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["ruff"]["lint"][
        section
    ][name]
    return number


def breaks(rule: str, limit: int) -> list[str]:
    """The lines that ruff prints for a rule under another limit than the one that is set."""
    command = [sys.executable, "-m", "ruff", "check", "--select", rule, "--output-format", "concise"]
    command += ["--config", f"lint.{RULES[rule]}={limit}", "src", "tests", "benchmarks", "examples", "tools"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [line for line in out.stdout.splitlines() if rule in line]


@pytest.mark.parametrize("rule", RULES)
def test_the_limits_of_ruff_are_no_looser_than_needed(rule):
    limit = limit_of(RULES[rule])
    assert breaks(rule, limit) == []
    assert breaks(rule, limit - 1), f"lower {RULES[rule]}: nothing comes near {limit}"


EXAMPLE = '''
def example(a, /, b, *rest, c=None, **others):
    """Say nothing."""
    if a:
        return 1
    elif b and c:
        for x in rest:
            with x:
                y = [z for z in x if z]
    def inner(self):
        while self:
            pass
    return inner
'''


def test_counts_are_those_counted_by_hand():
    function = ast.parse(EXAMPLE).body[0]
    assert [count(function) for count in (statements, parameters, branches, nesting)] == [10, 5, 6, 3]


if __name__ == "__main__":
    for kind, (number, place) in worst(SOURCE).items():
        print(f"{kind:26} {number:5}  ceiling {CEILINGS[kind]:5}  {place}")
    for rule, option in RULES.items():
        limit = limit_of(option)
        while limit > 1 and not breaks(rule, limit - 1):
            limit -= 1
        print(f"{option:26} {limit:5}  ceiling {limit_of(option):5}  {rule}")
