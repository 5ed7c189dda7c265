"""The documentation is true: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main

from penjing.cli.main import VERBS, app, run
from penjing.core.registry import load_methods
from penjing.train.method import TrainingMethod
from penjing.train.strategy import Strategy

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SKIP = "<!-- not run -->\n"
GIVEN = re.compile(r"<!-- given: ([\w, ]+) -->")
FOREIGN = ("/tmp/", "/root", "/home/", "/mnt/")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str, bool]]:
    """Return line number, text and whether it is to be run, of every block in a language."""
    text = page.read_text("utf-8")
    return [
        (text[: match.start()].count("\n") + 1, match[2], not text[: match.start()].endswith(SKIP))
        for match in FENCE.finditer(text)
        if match[1] == language
    ]


def output_after(page: Path, text: str) -> str | None:
    """Return the text block directly under a Python block, which is what it prints."""
    rest = page.read_text("utf-8").partition(f"```python\n{text}```\n")[2]
    match = re.match(r"\n```text\n(.*?)^```$", rest, re.MULTILINE | re.DOTALL)
    return None if match is None else match[1]


def without_code(page: Path) -> str:
    return FENCE.sub("", page.read_text("utf-8"))


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    """What a page may take for granted: a small trained network and handwritten digits in three parts."""
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    datasets = pytest.importorskip("sklearn.datasets", reason="the extra metrics is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    nn = torch.nn
    digits = datasets.load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    parts = [(images[part], digits.target[part]) for part in np.split(order, [700, 1000])]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    x, y = (torch.from_numpy(a) for a in parts[0])
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(8):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    train, valid, test = parts
    return {"model": model.eval(), "net": model, "train": train, "valid": valid, "test": test}


RUNNABLE = [page for page in PAGES if any(runs for _, _, runs in blocks(page, "python"))]


@pytest.mark.parametrize("page", [p for p in RUNNABLE if p.name != "README.zh.md"], ids=name_of)
def test_python_runs(
    page: Path, given: dict[str, Any], quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [name for match in GIVEN.finditer(page.read_text("utf-8")) for name in match[1].split(", ")]
    namespace = {"__name__": "example"} | {name: given[name] for name in names}
    for line, text, runs in blocks(page, "python"):
        if runs:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * line + text, name_of(page), "exec"), namespace)
            expected = output_after(page, text)
            assert expected is None or printed.getvalue() == expected, f"{name_of(page)}:{line}"


def commands() -> list[tuple[Path, str]]:
    return [
        (page, line.removeprefix("$ ").strip())
        for page in PAGES
        for _, text, _ in blocks(page, "console")
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    ]


def test_console_commands_exist() -> None:
    run(["--version"])  # registers the verbs
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(verbs) == set(VERBS)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    seen = set()
    for page, command in commands():
        words = re.sub(r"\s+#.*", "", command).split()
        if words[0] == "make":
            assert {w for w in words[1:] if "=" not in w} <= targets, (name_of(page), command)
        if words[0] != "penjing" or words[1].startswith("--"):
            continue
        assert words[1] in VERBS, (name_of(page), command)
        seen.add(words[1])
        known = {option for parameter in verbs[words[1]].params for option in parameter.opts}
        used = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert used <= known | {"--help"}, (name_of(page), command)
    assert seen == set(VERBS), "every verb is shown somewhere"


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+", without_code(page), re.MULTILINE)


def test_the_two_readmes_say_the_same() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README.zh.md"
    assert headings(english) == headings(chinese)
    code = [FENCE.findall(page.read_text("utf-8")) for page in (english, chinese)]
    assert code[0] == code[1]
    links = [set(re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8"))) for page in (english, chinese)]
    assert links[0] - {"README.zh.md"} == links[1] - {"README.md"}
    assert next(page.read_text("utf-8").count("\n|") for page in (english, chinese)) > 0
    assert english.read_text("utf-8").count("\n|") == chinese.read_text("utf-8").count("\n|")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere_and_nothing_names_a_machine(page: Path) -> None:
    text = page.read_text("utf-8")
    for word in FOREIGN:
        assert word not in text, word
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if not target.startswith("http"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_in_the_index() -> None:
    listed = (ROOT / "docs" / "index.md").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        if page.name != "index.md":
            assert f"({page.relative_to(ROOT / 'docs').as_posix()})" in listed, page.name


def test_every_method_has_a_card_with_each_of_its_options() -> None:
    for name, kind in load_methods().items():
        card = (ROOT / "docs" / "methods" / f"{name}.md").read_text("utf-8")
        for part in ("## What", "## When", "## Cost", "## Options", "## Refused", "## Reference"):
            assert part in card, (name, part)
        trains = issubclass(kind, TrainingMethod)
        assert trains == ("[strategy](../strategy.md)" in card), name
        for field in kind.model_fields:
            if field != "strategy":
                assert f"`{field}`" in card, (name, field)


def test_the_page_of_a_strategy_has_each_field_with_its_default() -> None:
    page = (ROOT / "docs" / "strategy.md").read_text("utf-8")
    for field, info in Strategy.model_fields.items():
        plain = f"`{info.default}`" if isinstance(info.default, str) else f"{info.default}".lower()
        said = f"{info.default:g}" if isinstance(info.default, float) else plain
        assert f"| `{field}` | {said} | " in page, field
