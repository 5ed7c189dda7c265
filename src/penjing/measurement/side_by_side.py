"""How much of a model's latency another model takes, both delivered and timed in turn."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from penjing.core.artefact import deliver
from penjing.core.backend import Arrays
from penjing.core.data import LiveSplit, Split
from penjing.core.errors import Refused
from penjing.core.executor import Limits
from penjing.core.measurement import Estimate
from penjing.core.target import Target
from penjing.core.value import Model
from penjing.measurement.latency import interleave, summarise
from penjing.measurement.measure import timed_batch
from penjing.measurement.process import RuntimeProcess, factory_of, save_arrays

SECONDS = 4.0

LIMITS = Limits(seconds=60.0)
"""An artefact whose answer takes longer is not timed on."""


@contextmanager
def beside(
    reference: Model, target: Target, split: Split | LiveSplit, seconds: float = SECONDS
) -> Iterator[Callable[[Model], Estimate]]:
    """Deliver a model and give a function that times other models beside it.

    The function delivers its argument for the target, and returns the ratio of its latency to the
    reference's: the median over interleaved rounds, with its interval at 95%.

    Args:
        reference: of which the latency counts as 1.
        target: where both run, each in a process of its own.
        split: the timed batch is made of its examples.
        seconds: of timing for each model.

    >>> with beside(model, Target(), task.valid) as ratio_of:  # doctest: +SKIP
    ...     ratio_of(pruned).value
    0.62

    Raises:
        Refused: a model cannot be delivered, loaded or run.
    """
    example, numbers = split.example(), itertools.count()
    inputs = next(split.batches(target.batch))[0]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penjing-")))
        batch = save_arrays(folder, timed_batch(inputs, target), "batch")

        def start(model: Model, keeper: ExitStack) -> RuntimeProcess:
            path = deliver(model, (), target, folder / f"model{next(numbers)}", example=example).path
            process = keeper.enter_context(RuntimeProcess(path, target, model=factory_of(model)))
            process.set_batch(batch)
            return process

        first = start(reference, stack)

        def ratio_of(model: Model) -> Estimate:
            with ExitStack() as own:
                samples = interleave({"reference": first, "model": start(model, own)}, seconds=seconds)
            found = summarise(
                samples["model"], samples["reference"], target.batch, target.threads, "reference"
            )
            assert found.ratio is not None
            return found.ratio

        yield ratio_of


def ratios(
    folders: Mapping[str, Path], reference: str, target: Target, inputs: Arrays, seconds: float
) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Time delivered artefacts in turn, each in a process of its own; latency alone.

    Args:
        folders: by name, the reference among them; all for the target, and in no need of a class. Only the
            reference needs a manifest: the others may be what the runtime wrote, as it is.
        reference: of which the latency counts as 1; it must run.
        target: where all run.
        inputs: examples that the timed batch is made of.
        seconds: of timing, all together; six rounds are made in any case.

    Returns:
        The ratio of each artefact's latency to the reference's with its interval at 95%, and for those that
        could not be timed the reason.

    >>> ratios({"float": a, "int8": b}, "float", Target(), inputs, 2.0)[0]["int8"].value  # doctest: +SKIP
    0.51

    Raises:
        Refused: the reference cannot be loaded or run.
    """
    failures: dict[str, str] = {}

    def fail(name: str, refusal: Refused) -> None:
        if name == reference:
            raise refusal
        failures[name] = str(refusal)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penjing-")))
        batch = save_arrays(folder, timed_batch(inputs, target), "batch")
        processes = {}
        for name, path in folders.items():
            try:
                checked = name == reference
                process = RuntimeProcess(path, target, limits=LIMITS, verify=checked)
                stack.enter_context(process)
                process.set_batch(batch)
                processes[name] = process
            except Refused as refusal:
                fail(name, refusal)
        samples = interleave(processes, min_calls=1, seconds=seconds, on_failure=fail)
    found = {}
    for name, times in samples.items():
        if name == reference:
            continue
        ratio = summarise(times, samples[reference], target.batch, target.threads, reference).ratio
        assert ratio is not None
        found[name] = ratio
    return found, failures
