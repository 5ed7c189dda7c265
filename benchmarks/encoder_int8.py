"""MiniLM-L6 in 8 bits, by Penjing, by ONNX Runtime's own quantizers and by NNCF: quality and latency.

    pip install nncf      # its rows are left out without it
    PENJING_DATA=/path/to/data python benchmarks/encoder_int8.py [--data sst2 clinc150] [--rounds 15]

Every row is a delivered artefact, in ONNX Runtime and in OpenVINO, timed in a process of its own in rounds
interleaved with all others (one thread, one sentence padded to 48 or 24 tokens), and judged on the whole test
part: accuracy, points lost against the float model with a paired 95% interval, mean cosine of the logits
after their mean over the float model's test outputs was taken off (so that a constant does not count), and
the 97.5% bound of a non-inferiority test. All methods calibrate on the same 256 training sentences.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import penjing as pj
from penjing.backends.onnx import OnnxModel
from penjing.core.artefact import Artefact, open_artefact
from penjing.core.target import Target
from penjing.measurement.compare import compare
from penjing.measurement.latency import interleave, summarise
from penjing.measurement.process import RuntimeProcess, save_arrays
from penjing.measurement.stage import timed_batch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import minilm

CALIBRATION = 256
REFERENCE = "onnxruntime float32"
FLOAT = "model.onnx"


def ours(*methods: pj.Method) -> Callable[[Any, pj.Task, Path], Any]:
    """Return a row that carries out a plan."""
    return lambda net, task, folder: pj.apply(net, pj.chain(*methods), task).model


def sentences(task: pj.Task, folder: Path) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the calibration sentences one by one, by the names of the file's inputs."""
    inputs = next(task.train.batches(CALIBRATION, 0))[0]
    names = pj.load_onnx(folder / FLOAT).inputs
    for i in range(CALIBRATION):
        yield {name: x[i : i + 1].astype(np.int64) for name, x in zip(names, inputs, strict=True)}


def ort_dynamic(net: Any, task: pj.Task, folder: Path) -> OnnxModel:
    """Quantize by ONNX Runtime's `quantize_dynamic`, weights by channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = folder / "dynamic.onnx"
    quantize_dynamic(folder / FLOAT, made, per_channel=True, weight_type=QuantType.QInt8)
    return pj.load_onnx(made)


def ort_static(only: list[str] | None) -> Callable[[Any, pj.Task, Path], OnnxModel]:
    """Return a row that is quantized by ONNX Runtime's `quantize_static`; `only`: kinds of operators."""

    def row(net: Any, task: pj.Task, folder: Path) -> OnnxModel:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self._left = sentences(task, folder)

            def get_next(self) -> dict[str, NDArray[Any]] | None:
                return next(self._left, None)

        made = folder / "static.onnx"
        quantize_static(
            folder / FLOAT,
            made,
            Reader(),
            per_channel=True,
            op_types_to_quantize=only,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return pj.load_onnx(made)

    return row


def nncf(net: Any, task: pj.Task, folder: Path) -> OnnxModel:
    """Quantize by NNCF with its settings for transformers (SmoothQuant and bias correction)."""
    import nncf as library
    import onnx

    data = library.Dataset(list(sentences(task, folder)))
    made = library.quantize(
        onnx.load(folder / FLOAT), data, subset_size=CALIBRATION, model_type=library.ModelType.TRANSFORMER
    )
    onnx.save(made, folder / "nncf.onnx")
    return pj.load_onnx(folder / "nncf.onnx")


static = pj.Int8Static(examples=CALIBRATION)
smoothed = (
    pj.SmoothActivations(examples=CALIBRATION),
    pj.Int8Static(observer="minmax", examples=CALIBRATION),
    pj.CorrectBias(examples=CALIBRATION),
)
ROWS: dict[str, Callable[[Any, pj.Task, Path], Any]] = {
    "float32": lambda net, task, folder: net,
    "Penjing static": ours(static),
    "Penjing smoothed static": ours(*smoothed),
    "Penjing smoothed static, tables": ours(pj.QuantizeEmbeddings(), *smoothed),
    "Penjing dynamic": ours(pj.Int8Dynamic()),
    "ONNX Runtime static": ort_static(None),
    "ONNX Runtime static, MatMul only": ort_static(["MatMul", "Gemm"]),
    "ONNX Runtime dynamic": ort_dynamic,
    "NNCF": nncf,
}
RUNTIMES = {
    "onnxruntime": Target(),
    "openvino": Target("openvino"),
    "openvino bf16": Target("openvino", mode="bf16"),
}
ONLY = {
    "openvino bf16": ("float32",),
    "openvino": (
        "float32",
        "Penjing static",
        "Penjing smoothed static",
        "Penjing smoothed static, tables",
        "NNCF",
    ),
}
"""Rows of a runtime; all where nothing is said. OpenVINO has no fast kernels for dynamic integers."""


def artefacts(net: Any, task: pj.Task, rows: list[str], folder: Path) -> dict[str, tuple[Artefact, Target]]:
    """Return by label what could be made and delivered; the rest is printed with its reason."""
    example = task.valid.example()
    path = pj.deliver(net, Target(), folder / "first", example=example).path
    (folder / FLOAT).write_bytes((path / "model.onnx").read_bytes())
    found = {}
    for name in rows:
        try:
            model = ROWS[name](net, task, folder)
        except (pj.Refused, ImportError) as reason:
            print(f"{name}: not run: {reason}", flush=True)
            continue
        for runtime, target in RUNTIMES.items():
            if name not in ONLY.get(runtime, rows):
                continue
            label = f"{runtime} {name}"
            try:
                made = pj.deliver(model, target, folder / label.replace(" ", "_"), example=example)
                found[label] = open_artefact(made.path), target
            except pj.Refused as reason:
                print(f"{label}: not delivered: {reason}", flush=True)
    return found


def table(data: str, options: argparse.Namespace) -> None:
    """Measure everything on one data set and print its rows."""
    task, net = minilm.task(data).prepare(), minilm.model(data)
    inputs, targets = task.test.arrays()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penjing-")))
        files = save_arrays(folder, inputs, "test")
        made = artefacts(net, task, options.rows, folder)
        outputs, processes = {}, {}
        for number, (label, (artefact, target)) in enumerate(made.items()):
            process = stack.enter_context(RuntimeProcess(artefact.path, target))
            process.set_batch(save_arrays(folder, timed_batch(inputs, target), f"batch{number}"))
            batch = artefact.evaluation_batch(32)
            outputs[label] = process.outputs(files, batch, folder / f"outputs{number}.npy")
            processes[label] = process
        samples = interleave(processes, rounds=options.rounds, seconds=240.0)
    print(f"\n{data}, {len(targets)} test sentences of {inputs[0].shape[1]} tokens\n")
    print("| | accuracy | points lost (95%) | cosine | p50 ms (95%) | of float32 (95%) | MB |")
    print("|---|---|---|---|---|---|---|")
    wanted = outputs[REFERENCE]
    for label, (artefact, target) in made.items():
        found = summarise(samples[label], samples[REFERENCE], target.batch, target.threads, REFERENCE)
        drop = compare(task, wanted, outputs[label], targets).bounds(0.975)
        ratio, p50 = found.ratio, found.p50_ms
        assert ratio is not None
        cells = (
            label,
            f"{(outputs[label].argmax(1) == targets).mean():.2%}",
            f"{100 * drop.value:.2f} ({100 * drop.low:.2f} to {100 * drop.high:.2f})",
            f"{cosine(outputs[label], wanted):.4f}",
            f"{p50.value:.2f} ({p50.low:.2f} to {p50.high:.2f})",
            f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
            f"{artefact.size_bytes / 1e6:.1f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def cosine(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return the mean cosine of rows, with the mean of the wanted rows taken off both."""
    a, b = (np.asarray(x, np.float64) - wanted.mean(axis=0) for x in (found, wanted))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(axis=1) / np.maximum(norms, 1e-30)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["sst2", "clinc150"], choices=sorted(minilm.CLASSES))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    for name in arguments.data:
        table(name, arguments)
