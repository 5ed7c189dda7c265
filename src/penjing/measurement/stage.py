"""The processes of one comparison: each artefact is judged in one, then timed in several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.backend import Arrays
from penjing.core.errors import Exit, Refused
from penjing.core.executor import Limits
from penjing.core.measurement import Estimate, Latency, NotMeasured
from penjing.core.target import Target
from penjing.measurement.batch_dependence import JudgedOutputs, judged_outputs
from penjing.measurement.process import Lost, RuntimeProcess, save_arrays
from penjing.measurement.serving import Factory
from penjing.measurement.sittings import Effort, Sittings, summarise_sittings, take_sittings

Entry = tuple[Path, Target, Factory | None]
"""A delivered folder, where it runs, and what makes the user's class where the runtime needs it."""

_WARM_CALLS = 3


@dataclass
class Stage:
    """One comparison.

    Attributes:
        folder: for files on the way.
        inputs: of the split.
        usual: the batch size of the task.
        reference: what ratios are taken with.
        limits: of every process.
        alone: whether there is no other candidate than the reference.
        judged: the outputs of the artefacts.
        memory: their peaks on the target's batch.
        failures: why one could not be timed.
    """

    folder: Path
    inputs: Arrays
    usual: int
    reference: str
    limits: Limits
    alone: bool
    entries: dict[str, Entry] = field(default_factory=dict)
    judged: dict[str, JudgedOutputs] = field(default_factory=dict)
    memory: dict[str, Estimate | NotMeasured] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    sittings: Sittings = field(default_factory=lambda: Sittings({}, None))
    _open: dict[str, RuntimeProcess] = field(default_factory=dict)
    _whole: tuple[Path, ...] = ()
    _files: int = 0

    def judge(self, name: str, entry: Entry, stack: ExitStack) -> None:
        """Open an artefact, take its peak memory on the target's batch, then all outputs.

        Raises:
            Refused: it cannot be opened, or its outputs cannot be had.
        """
        self.entries[name] = entry
        with self._blaming(name):
            process = stack.enter_context(self._process(name, verify=True))
            self.memory[name] = self._memory(name, process)
            run = partial(self._outputs, process)
            self.judged[name] = judged_outputs(run, self.inputs, self.usual, entry[1].batch)
        self._open[name] = process

    def time(self, effort: Effort) -> None:
        """Time what can be timed, in several sittings; the first is of the processes that judged."""
        names = [name for name in self.entries if name not in self.failures]
        openers = {name: lambda name=name: self._timed(name) for name in names}
        self.sittings = take_sittings(openers, self.reference, effort, self.fail)

    def fail(self, name: str, refusal: Refused) -> None:
        """Note why an artefact could not be timed.

        Raises:
            Refused: it is the reference, and its process was lost: that is no candidate's fault.
        """
        if name == self.reference and isinstance(refusal, Lost):
            with self._blaming(name):
                raise refusal
        self.failures[name] = str(refusal)

    def latency(self, name: str) -> Latency | NotMeasured:
        """Return the latency of an artefact, with its ratio to the reference where both were timed."""
        target, samples = self.entries[name][1], self.sittings.samples
        if name not in samples:
            return NotMeasured(reason=self.failures.get(name, "no rounds were run"))
        other = self.reference if name != self.reference and self.reference in samples else None
        return summarise_sittings(self.sittings, name, other, target.batch, target.threads)

    @contextmanager
    def _timed(self, name: str) -> Iterator[RuntimeProcess]:
        process = self._open.pop(name, None)
        if process is not None:
            with process:
                yield process
            return
        with self._process(name, verify=False) as process:
            process.set_batch(self._batch_files(name))
            yield process

    def _process(self, name: str, verify: bool) -> RuntimeProcess:
        folder, target, factory = self.entries[name]
        return RuntimeProcess(folder, target, model=factory, limits=self.limits, verify=verify)

    def _batch_files(self, name: str) -> tuple[Path, ...]:
        return self._saved(timed_batch(self.inputs, self.entries[name][1]))

    def _saved(self, arrays: Arrays) -> tuple[Path, ...]:
        self._files += 1
        return save_arrays(self.folder, arrays, f"arrays{self._files}")

    def _memory(self, name: str, process: RuntimeProcess) -> Estimate | NotMeasured:
        process.set_batch(self._batch_files(name))
        try:
            process.time(_WARM_CALLS)
            return peak_memory(process)
        except Refused as refusal:
            if not process.alive:
                raise
            self.fail(name, refusal)
            return NotMeasured(reason=str(refusal))

    def _outputs(self, process: RuntimeProcess, inputs: Arrays, size: int) -> NDArray[Any]:
        if inputs is self.inputs:
            self._whole = self._whole or self._saved(inputs)
        files = self._whole if inputs is self.inputs else self._saved(inputs)
        self._files += 1
        return process.outputs(files, size, self.folder / f"outputs{self._files}.npy")

    @contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        """Tell the loss of the reference's process from a fault of a candidate: it is the machine's."""
        try:
            yield
        except Lost as lost:
            if name != self.reference or self.alone:
                raise
            raise Refused(
                "the reference must survive its measurement",
                value=lost.value,
                place=lost.place,
                fix="look for what ended its process (the system, out of memory?), then go on",
                code=Exit.ENVIRONMENT,
            ) from lost


def timed_batch(inputs: Arrays, target: Target) -> Arrays:
    """Return the batch that is timed: the first `target.batch` examples, repeated where there are fewer.

    Where the target's input shapes are not the data's, numbers of these shapes are drawn (zeros for
    integers, which every table of embeddings holds).

    >>> timed_batch((np.eye(3),), Target(batch=5))[0].argmax(1)
    array([0, 1, 2, 0, 1])

    Raises:
        Refused: the target has another number of shapes than the data has inputs.
    """
    shapes = target.input_shapes
    if shapes is not None and len(shapes) != len(inputs):
        raise Refused(
            "must have one shape for each input",
            value=f"{len(shapes)} for {len(inputs)}",
            place="target.input_shapes",
            fix="give the shapes in the order of the inputs, without the batch",
            code=Exit.USAGE,
        )
    rng = np.random.default_rng(0)
    batch = []
    for i, array in enumerate(inputs):
        if shapes is None or shapes[i] == array.shape[1:]:
            batch.append(array[np.arange(target.batch) % len(array)])
        elif np.issubdtype(array.dtype, np.floating):
            batch.append(rng.standard_normal((target.batch, *shapes[i])).astype(array.dtype))
        else:
            batch.append(np.zeros((target.batch, *shapes[i]), dtype=array.dtype))
    return tuple(batch)


def peak_memory(process: RuntimeProcess) -> Estimate | NotMeasured:
    """Return the peak resident memory of a process in bytes, and in words what of it was there before."""
    peak, before = process.peak_memory_bytes(), process.rss_before_bytes
    if peak is None:
        return NotMeasured(reason="the system keeps no peak of a process's memory")
    how = f"peak resident memory of the process, of which {before} before loading the artefact"
    return Estimate(value=peak, low=peak, high=peak, n=1, unit="bytes", how=how)
