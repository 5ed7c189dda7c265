"""What a callable contains: equal for equal work, different for any part that changes the work."""

import functools
import subprocess
import sys
import types

import numpy as np
import pytest

from penjing.core.content import MOST_PARTS, digest_content


def made(source, name="f"):
    """Return what a piece of code defines, as a module of the user's would."""
    module = types.ModuleType("users_own")
    exec(compile(source, "users_own.py", "exec"), vars(module))
    return vars(module)[name]


def digest(value):
    return digest_content(value).sha256


BASE = "import math\nk = 3\ndef g(x): return x + k\ndef f(o, t, p=1, *, q=2):\n    return g(o) * math.pi\n"


def test_the_same_code_is_the_same_wherever_it_stands():
    other = BASE.replace("return g", "# a comment\n\n    return  g").replace(
        "*, q=2):", "*, q=2):\n    'says'"
    )
    assert digest(made(BASE)) == digest(made(BASE)) == digest(made(other))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("g(o) *", "g(o) /"),
        ("g(o)", "g(t)"),
        ("p=1", "p=2"),
        ("q=2", "q=3"),
        ("k = 3", "k = 4"),
        ("x + k", "x - k"),
        ("math.pi", "math.e"),
        (
            "def g(x): return x + k",
            "class g:\n    def __init__(self, x): self.x = x\n    def __mul__(self, y): return y",
        ),
    ],
)
def test_whatever_changes_the_work_changes_the_digest(old, new):
    assert digest(made(BASE)) != digest(made(BASE.replace(old, new)))


CLOSURE = "def outer(n):\n    def f(o, t): return o * n\n    return f\n"


def test_closures_partials_methods_and_objects_count_by_what_they_hold():
    outer = made(CLOSURE, "outer")
    assert digest(outer(2)) == digest(outer(2)) != digest(outer(3))
    assert digest(functools.partial(outer, 2)) != digest(functools.partial(outer, 3))
    init, call = "  def __init__(s, w): s.w = w\n", "  def __call__(s, o): return o * s.w\n"
    source = f"class f:\n{init}{call}  def m(s): pass\n"
    kind = made(source)
    assert digest(kind(np.ones(3))) == digest(kind(np.ones(3))) != digest(kind(np.zeros(3)))
    assert digest(kind(1).m) == digest(kind(1).m) != digest(kind(2).m)
    assert digest(kind(1)) != digest(made(source.replace("o * s.w", "o + s.w"))(1))
    slots = made("class f:\n    __slots__ = ('w',)\n    def __init__(s, w): s.w = w\n")
    assert digest(slots(1)) == digest(slots(1)) != digest(slots(2))


def test_containers_count_by_content_and_not_by_order_where_there_is_none():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
    assert digest({1, 2, 3}) == digest({3, 2, 1}) != digest({1, 2})
    assert digest([1, 2]) != digest([2, 1])
    assert digest(1) != digest(True) != digest(1.0)
    assert digest(np.array([1, 2])) != digest(np.array([1, 2], np.int32))


def test_what_refers_to_itself_ends():
    ring = {"a": 1}
    ring["self"] = ring
    assert digest(ring) == digest(ring)
    assert digest_content(list(range(1000))).unknown == ()


def test_what_cannot_be_read_is_named():
    assert digest_content(np.random.default_rng(0)).unknown == ("numpy.random._generator.Generator",)
    outer = made(CLOSURE, "outer")
    assert digest_content(outer(iter([1]))).unknown == ("builtins.list_iterator",)
    many = [[] for _ in range(MOST_PARTS + 1)]
    assert digest_content(many).unknown == (f"more than {MOST_PARTS} parts",)


def test_a_package_counts_by_its_version(monkeypatch):
    before = digest(np.median)
    assert digest(np.median) == before != digest(np.mean)
    monkeypatch.setattr(np, "__version__", "0.0")
    assert digest(np.median) != before


def test_losses_of_torch_count_by_their_settings():
    nn = pytest.importorskip("torch").nn
    assert digest(nn.CrossEntropyLoss()) == digest(nn.CrossEntropyLoss())
    assert digest(nn.CrossEntropyLoss()) != digest(nn.CrossEntropyLoss(label_smoothing=0.1))


def test_another_process_finds_the_same():
    code = f"""
import types, sys
from penjing.core.content import digest_content
module = types.ModuleType("users_own")
exec(compile({BASE!r}, "users_own.py", "exec"), vars(module))
print(digest_content([module.f, {{"a", "b", "c"}}]).sha256)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest([made(BASE), {"a", "b", "c"}])
