"""Imports point one way, the core needs no framework, and importing is quick to answer."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import penjing

SOURCE = Path(__file__).parents[1] / "src" / "penjing"
LEVELS = [
    {"cli", "__main__"},
    {"diagnostics"},
    {"search", "experiments", "language"},
    {"run"},
    {"report"},
    {"planners"},
    {"prune", "quantize", "distillation", "repair"},
    {"train", "measurement", "calibration"},
    {"processes"},
    {"targets", "backends"},
    {"arrays"},
    {"core"},
]
LEVEL = {name: depth for depth, names in enumerate(LEVELS) for name in names}
METHODS = {"prune", "quantize", "distillation", "repair"}
HEAVY = {"torch", "onnx", "onnxruntime", "onnxscript", "openvino", "sklearn", "keras", "tensorflow", "optuna"}
HEAVY |= {"pytorch_optimizer", "accelerate", "transformers"}
FILES = sorted(SOURCE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[str, bool, int]]:
    """Every module imported by a file: its name, whether at run time, and the line."""
    found = []

    def walk(node: ast.AST, typing_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            guarded = typing_only or (
                isinstance(child, ast.If)
                and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
            )
            if isinstance(child, ast.Import):
                found.extend((alias.name, not guarded, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found.append((child.module or "", not guarded, child.lineno))
                found.extend((f"{child.module}.{a.name}", not guarded, child.lineno) for a in child.names)
            walk(child, guarded)

    walk(ast.parse(path.read_text()), typing_only=False)
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    me = module_of(path).split(".")
    if len(me) == 1:
        return  # the package itself names its public members lazily
    for name, _, line in imports(path):
        other = name.split(".")
        if other[0] != "penjing" or len(other) < 2 or other[1] not in LEVEL:
            continue
        assert LEVEL[other[1]] >= LEVEL[me[1]], f"{path}:{line}: {me[1]} must not import {other[1]}"


@pytest.mark.parametrize("path", [f for f in FILES if f.parent.name in METHODS], ids=module_of)
def test_a_method_never_imports_another_method(path):
    for name, _, line in imports(path):
        part = name.split(".")
        if part[0] == "penjing" and len(part) > 2 and part[1] in METHODS:
            assert module_of(path).startswith(".".join(part[:3])), f"{path}:{line} imports {name}"


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Names that can all be reached from each other (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    waiting: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        waiting.append(name)
        for other in sorted(arrows[name]):
            if other not in order:
                visit(other)
            if other in waiting:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == order[name]:
            place = waiting.index(name)
            found.append(sorted(waiting[place:]))
            del waiting[place:]

    for name in arrows:
        if name not in order:
            visit(name)
    return [circle for circle in found if len(circle) > 1]


def arrows_between(files: list[Path]) -> dict[str, set[str]]:
    """From each module to those that it imports, for type checking too; a package stands for its own file."""
    modules = {module_of(path): path for path in files}
    arrows = {}
    for me, path in modules.items():
        named = {name for name, _, _ in imports(path)} & modules.keys() - {me}
        arrows[me] = {name for name in named if not any(other.startswith(f"{name}.") for other in named)}
    return arrows


def test_no_module_imports_itself_in_a_circle():
    """For type checking neither: values that know each other belong in one file, or one of them lower."""
    assert circles(arrows_between(FILES)) == []


def test_the_test_of_circles_sees_one():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}) == [["a", "b", "c"]]


def test_the_import_test_sees_a_violation(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from penjing.cli import main\n")
    assert ("penjing.cli", True, 2) in imports(bad)


def test_no_public_name_is_a_subpackage():
    """Importing a subpackage binds its name in the package, and would hide the public name."""
    subpackages = {path.stem for path in SOURCE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not subpackages & set(penjing.__all__)


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import penjing",
        "import penjing as pj; pj.Budget(max_drop='1%'); pj.Target(); pj.Task; pj.Refused",
        "from penjing.core.registry import load_methods; load_methods()",
        "import penjing as pj; pj.chain(pj.PruneChannels(ratio=0.5), pj.Distill(), pj.Int8Static())",
    ],
)
def test_no_framework_is_imported(statement):
    assert not loaded_after(statement) & HEAVY


def test_the_core_works_where_no_framework_is_installed():
    """Frameworks are optional: with every one of them blocked, the core imports and refuses by name."""
    code = f"""
import sys
for name in {sorted(HEAVY)!r}:
    sys.modules[name] = None
import penjing as pj
plan = pj.chain(pj.PruneChannels(ratio=0.5), pj.Int8Static())
print(plan, pj.Budget(max_drop="1%", latency="5ms"))
from penjing.core.target import runtime_for
try:
    runtime_for(pj.Target())
except pj.Refused as refusal:
    print("refused:", refusal)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert 'pip install "penjing[onnx]"' in out.stdout
