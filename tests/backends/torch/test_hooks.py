"""Hooks act while their context lasts, and are gone behind it, whatever is raised."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import penjing  # noqa: E402
from penjing.backends.torch.hooks import EndOfPass, hooked, watched  # noqa: E402


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 2))


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


X = torch.arange(6.0).reshape(2, 3) - 3


def test_what_functions_return_takes_the_place_of_arguments_and_outputs():
    model = net()
    wanted = model[2](torch.ones(2, 4)) + 1
    with hooked(
        {"relu": model[1], "last": model[2]},
        before=lambda name, args, kwargs: ((torch.ones(2, 4),), kwargs) if name == "last" else None,
        after=lambda name, args, output: output + 1 if name == "last" else None,
    ):
        assert torch.equal(model(X), wanted)
    assert not torch.equal(model(X), wanted)


@pytest.mark.parametrize("error", [ValueError, EndOfPass, KeyboardInterrupt])
def test_hooks_are_gone_whatever_is_raised(error):
    model = net()

    def fail(name, args, output):
        assert hooks_of(model) == 2 * 4
        raise error

    with pytest.raises(error), hooked(dict(model.named_modules()), lambda *_: None, fail):
        model(X)
    assert hooks_of(model) == 0


def test_a_hook_that_cannot_be_set_takes_the_others_away():
    model = net()
    with pytest.raises(AttributeError), hooked({"0": model[0], "none": None}, lambda *_: None):
        pass
    assert hooks_of(model) == 0


def test_first_sees_the_arguments_ahead_of_the_modules_own_hooks():
    model, seen = net(), []
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    for first in (True, False):
        with hooked({"0": model[0]}, lambda name, args, kwargs: seen.append(args[0]), first=first):
            model(X)
    assert torch.equal(seen[0], X)
    assert not seen[1].any()


def test_a_watched_call_holds_what_the_module_was_given_before_it_worked_in_place():
    model, calls = net(), []
    with watched({"relu": model[1]}, lambda name, call: calls.append((name, call))):
        model(X)
    ((name, call),) = calls
    assert name == "relu"
    assert torch.equal(call.args[0], torch.nn.functional.linear(X, model[0].weight, model[0].bias))
    assert call.given[0] is call.output
    assert call.arguments == {0: call.args[0]}


def test_nobody_else_registers_hooks():
    """A block of a decoder has one for life; everything else goes through `hooks`."""
    root = Path(penjing.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if "register_forward" in path.read_text() or "register_full_backward" in path.read_text()
    }
    assert found == {"backends/torch/hooks.py", "backends/torch/decoder/decoder_block.py"}
