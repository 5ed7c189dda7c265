"""Two modules on the same data, layer by layer: the second waits at each layer until it is needed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penjing.backends.torch.hooks import EndOfPass, hooked
from penjing.backends.torch.tensors import evaluating, select_output


@dataclass
class Usage:
    """How a forward pass uses a layer.

    Attributes:
        times: how often it is called.
        bytes: of its output.
        batchnorm: the BatchNorm layer whose input is the very output of the layer.
        alike: the first layer that takes the very tensor that this one takes; its own name if it is the first
            or is called several times.
    """

    times: int = 0
    bytes: int = 0
    batchnorm: str = ""
    alike: str = ""


def record_usage(model: nn.Module, layers: Sequence[str], inputs: tuple[Tensor, ...]) -> dict[str, Usage]:
    """Return by name how one forward pass in evaluation mode calls each of some layers.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    >>> record_usage(net, ["0"], (torch.ones(2, 4),))["0"]
    Usage(times=1, bytes=32, batchnorm='1', alike='0')
    """
    found = {name: Usage() for name in layers}
    # The tensors are kept, so that no other gets their address.
    outputs: dict[int, tuple[str, Tensor]] = {}
    inputs_seen: dict[int, tuple[str, Tensor]] = {}

    def made(name: str, given: tuple[Any, ...], output: Any) -> None:
        tensor = select_output(output)
        found[name].times += 1
        first, _ = inputs_seen.setdefault(id(given[0]), (name, given[0])) if given else (name, None)
        found[name].alike = first if found[name].times == 1 else name
        found[name].bytes = max(found[name].bytes, tensor.numel() * tensor.element_size())
        outputs[id(tensor)] = (name, tensor)

    def taken(name: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        source, tensor = outputs.get(id(given[0]), ("", None)) if given else ("", None)
        if given and tensor is given[0]:
            found[source].batchnorm = name

    modules = dict(model.named_modules())
    normal = {
        n: module for n, module in modules.items() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    with (
        hooked({name: modules[name] for name in layers}, after=made),
        hooked(normal, taken),
        evaluating(model),
        torch.no_grad(),
    ):
        model(*inputs)
    return found


def run_hooked(
    model: nn.Module,
    before: Mapping[str, Callable[[nn.Module, Tensor], None]],
    inputs: tuple[Tensor, ...],
    after: Mapping[str, Callable[[nn.Module, Tensor], Any]] | None = None,
) -> None:
    """Run a forward pass in evaluation mode that calls functions at layers, without gradients.

    Args:
        model: modes are restored afterwards; the functions may change its tensors.
        before: by layer, called with the module and its input before it runs.
        inputs: of the model.
        after: by layer, called with the module and its output, returns the output that the pass goes on with.
    """
    after = after or {}
    modules = dict(model.named_modules())
    with (
        hooked(
            {name: modules[name] for name in before},
            lambda name, args, _: before[name](modules[name], args[0]),
        ),
        hooked(
            {name: modules[name] for name in after},
            after=lambda name, _, output: after[name](modules[name], output),
        ),
        evaluating(model),
        torch.no_grad(),
    ):
        model(*inputs)


class Pass:
    """A forward pass that runs from one layer to the next as its outputs are asked for.

    Runs in a thread of its own, but never at the same time as the one that asks. Use as a context manager.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], inputs: tuple[Tensor, ...]) -> None:
        self._model, self._layers, self._inputs = model, layers, inputs
        self._go = threading.Semaphore(0)
        self._found: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Pass:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over = True
        self._go.release()
        self._thread.join()

    def output(self, layer: str) -> Tensor | None:
        """Run on to a layer and return its output, or None where the pass ends without it.

        Raises:
            Exception: whatever the forward raised.
        """
        while not self._over:
            self._go.release()
            name, value = self._found.get()
            if name == layer:
                return value
            if name == "":
                self._over = True
                if value is not None:
                    raise value
        return None

    def _run(self) -> None:
        failure: BaseException | None = None
        self._go.acquire()
        modules = dict(self._model.named_modules())
        layers = {name: modules[name] for name in self._layers}
        try:
            if not self._over:
                with hooked(layers, after=self._pause), evaluating(self._model), torch.no_grad():
                    self._model(*self._inputs)
        except EndOfPass:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised where the output was asked for
            failure = error
        self._found.put(("", failure))

    def _pause(self, name: str, given: tuple[Any, ...], output: Any) -> None:
        if threading.current_thread() is not self._thread:
            return
        self._found.put((name, select_output(output)))
        self._go.acquire()
        if self._over:
            raise EndOfPass
