"""How much of a model's latency another model takes, both delivered and timed in turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from penjing.core.artefact import deliver
from penjing.core.backend import Arrays
from penjing.core.data.split import LiveSplit, Split
from penjing.core.errors import Refused
from penjing.core.executor import Limits
from penjing.core.measurement import Estimate, Noise
from penjing.core.scratch import scratch
from penjing.core.target import Target
from penjing.core.value import Model
from penjing.measurement.process import RuntimeProcess, factory_of, save_arrays
from penjing.measurement.serving import Factory
from penjing.measurement.sittings import Effort, Open, summarise_sittings, take_sittings
from penjing.measurement.stage import timed_batch

SECONDS = 4.0

LIMITS = Limits(seconds=60.0)
"""An artefact whose answer takes longer is not timed on."""


@contextmanager
def beside(
    reference: Model, target: Target, split: Split | LiveSplit, seconds: float = SECONDS
) -> Iterator[Callable[[Model], Estimate]]:
    """Deliver a model and give a function that times other models beside it.

    The function delivers its argument for the target, and returns the ratio of its latency to the
    reference's, with its interval at 95%: of several sittings, each with fresh processes.

    Args:
        reference: of which the latency counts as 1.
        target: where both run, each in a process of its own.
        split: the timed batch is made of its examples.
        seconds: of timing for each model, the opening of processes included.

    >>> with beside(model, Target(), task.valid) as ratio_of:  # doctest: +SKIP
    ...     ratio_of(pruned).value
    0.62

    Raises:
        Refused: a model cannot be delivered, loaded or run.
    """
    example, numbers = split.example(), itertools.count()
    inputs = next(split.batches(target.batch))[0]
    with scratch() as folder:
        batch = save_arrays(folder, timed_batch(inputs, target), "batch")

        def opener(model: Model) -> Open:
            path = deliver(model, target, folder / f"model{next(numbers)}", example=example).path
            return partial(_opened, path, target, batch, factory_of(model), verify=False)

        first, noise = opener(reference), None

        def ratio_of(model: Model) -> Estimate:
            nonlocal noise
            openers = {"reference": first, "model": opener(model)}
            sittings = take_sittings(openers, "reference", Effort(seconds, noise))
            noise = sittings.noise
            found = summarise_sittings(sittings, "model", "reference", target.batch, target.threads).ratio
            assert found is not None
            return found

        yield ratio_of


@contextmanager
def _opened(
    path: Path, target: Target, batch: tuple[Path, ...], factory: Factory | None, verify: bool
) -> Iterator[RuntimeProcess]:
    with RuntimeProcess(path, target, model=factory, limits=LIMITS, verify=verify) as process:
        process.set_batch(batch)
        yield process


def ratios(
    folders: Mapping[str, Path],
    reference: str,
    target: Target,
    inputs: Arrays,
    seconds: float,
    noise: Noise | None = None,
) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Time delivered artefacts in turn, each in a process of its own; latency alone.

    Args:
        folders: by name, the reference among them; all for the target, and in no need of a class. Only the
            reference needs a manifest: the others may be what the runtime wrote, as it is.
        reference: of which the latency counts as 1; it must run.
        target: where all run.
        inputs: examples that the timed batch is made of.
        seconds: of timing, all together, the opening of processes included; one sitting of six rounds is
            made in any case.
        noise: what two processes of the reference differ by; None to measure it.

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

    with scratch() as folder:
        batch = save_arrays(folder, timed_batch(inputs, target), "batch")
        openers: dict[str, Open] = {
            name: partial(_opened, path, target, batch, None, verify=name == reference)
            for name, path in folders.items()
        }
        sittings = take_sittings(openers, reference, Effort(seconds, noise, min_calls=1), fail)
    found = {}
    for name in sittings.samples:
        if name != reference:
            ratio = summarise_sittings(sittings, name, reference, target.batch, target.threads).ratio
            assert ratio is not None
            found[name] = ratio
    return found, failures
