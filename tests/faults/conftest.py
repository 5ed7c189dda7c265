"""A tiny network without a framework, so that whole runs take seconds, and what faults are tried on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import penjing as pj

PENJING = str(Path(sys.executable).with_name("penjing"))

NAMES = ("<script>alert(1)</script>", "\x1b[31mred\x1b[0m", "{{7*7}}", "=1+1;\nnext", "[bold]猫[/bold]")

TASK_FILE = """
import numpy as np
import penjing as pj
from penjing.backends.numpy import Node, NumpyNet


def data():
    rng = np.random.default_rng(0)
    labels = np.arange(900) % 5
    inputs = rng.standard_normal((5, 16))[labels] + 0.3 * rng.standard_normal((900, 16))
    return inputs.astype(np.float32), labels


def task(**options):
    x, y = data()
    train, valid, test = ((x[i : i + 300], y[i : i + 300]) for i in (0, 300, 600))
    return pj.Task(train=train, valid=valid, test=test, **options)


def model(first="fc", head="head"):
    x, y = data()
    weight = np.random.default_rng(1).standard_normal((32, 16)).astype(np.float32) / 4
    hidden = np.maximum(x @ weight.T, 0)
    fitted = np.linalg.lstsq(hidden, np.eye(5)[y], rcond=None)[0].T.astype(np.float32)
    nodes = (Node(first, "linear", ("x",)), Node("act", "relu", (first,)), Node(head, "linear", ("act",)))
    return NumpyNet(("x",), nodes, {first: {"weight": weight}, head: {"weight": fitted}})
"""


@pytest.fixture(scope="session")
def task_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "tiny.py"
    path.write_text(TASK_FILE)
    return path


@pytest.fixture(scope="session")
def tiny(task_file):
    """The functions of the task file."""
    parts: dict = {}
    exec(compile(task_file.read_text(), str(task_file), "exec"), parts)
    return parts


@pytest.fixture
def optimize(tiny, quick, tmp_path):
    """`pj.optimize` on the tiny network; everything can be replaced."""

    def run(model=None, task=None, out="run", said=None, **options):
        budget = pj.Budget(**options.pop("budget", {"size": "40%", "trials": 2}))
        return pj.optimize(
            tiny["model"]() if model is None else model,
            tiny["task"]() if task is None else task,
            budget,
            out=tmp_path / out,
            say=None if said is None else lambda line: said.append(str(line)),
            **options,
        )

    return run


@pytest.fixture(scope="session")
def command():
    """Run the command line as a user would; stdin closed, both streams captured."""

    def run(*arguments, env=None, cwd=None):
        return subprocess.run(
            [PENJING, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=120,
            env={**os.environ, **(env or {})},
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def finished(tiny, task_file, shorten, tmp_path_factory):
    """A finished run whose folder, layers and classes have hostile names, as the command line leaves it."""
    out = tmp_path_factory.mktemp("runs") / "<img src=x onerror=alert(2)> 实验 {{7*7}}"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        task = tiny["task"](class_names=NAMES)
        model = tiny["model"](first="fc<script>alert(3)</script>", head="head\x1b]0;owned\x07")
        config = {"task_file": str(task_file)}
        pj.optimize(model, task, pj.Budget(max_drop="5%", trials=1), out=out, config=config)
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to be tampered with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
