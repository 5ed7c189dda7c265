"""One list of names: exports, the registry and the type checker's stub all come from it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import penjing as pj
from penjing.core.names import METHODS, NAMES

ROOT = Path(__file__).parents[1]
MADE = {
    "RemoveBlocks": {"count": 1},
    "PruneChannels": {"ratio": 0.5},
    "PruneTransformer": {"ratio": 0.5},
}
SPARSE = {"PruneMagnitude", "PruneGradually", "PruneSecondOrder", "PruneKFAC", "PruneWanda", "PruneSparseGPT"}
SPARSE |= {"PruneOBC", "PruneALPS"}


def made(name: str) -> pj.Method:
    """A method with what it cannot do without."""
    return getattr(pj, name)(**MADE.get(name, {"sparsity": 0.5} if name in SPARSE else {}))


def test_a_fresh_process_rebuilds_every_method_from_its_json():
    """The process that reads a plan has not constructed any of its methods before."""
    from penjing.core.plan import plan_to_json

    plans = [plan_to_json((made(name),)) for name in METHODS]
    code = (
        "import json, sys\n"
        "from penjing.core.plan import plan_from_json, plan_to_json\n"
        "print(json.dumps([plan_to_json(plan_from_json(plan)) for plan in json.load(sys.stdin)]))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(plans), capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout) == plans


def test_every_handler_belongs_to_an_exported_method():
    from penjing.core.registry import load_methods

    assert set(load_methods()) == set(METHODS)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_there(name):
    assert getattr(pj, name).__name__ == name


def test_the_stub_is_what_the_list_says():
    out = subprocess.run(
        [sys.executable, "-c", "import write_stub; print(write_stub.text(), end='')"],
        cwd=ROOT / "tools",
        capture_output=True,
        text=True,
        check=True,
    )
    stub = (ROOT / "src" / "penjing" / "__init__.pyi").read_text("utf-8")
    assert out.stdout == stub, "run `python tools/write_stub.py`"
