"""How much of a model's latency another model takes, both delivered and timed in turn."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from penjing.core.artefact import deliver
from penjing.core.data import LiveSplit, Split
from penjing.core.measurement import Estimate
from penjing.core.method import Model
from penjing.core.target import Target
from penjing.measuring.latency import interleave, summarise
from penjing.measuring.measure import timed_batch
from penjing.measuring.process import RuntimeProcess, save_arrays
from penjing.measuring.sealing import factory_of

SECONDS = 4.0


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
