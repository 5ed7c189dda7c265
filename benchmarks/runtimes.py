"""Latency in float, in int8 and with packed weights, of several models in every runtime and precision.

    export PENJING_DATA=/path/to/data
    python benchmarks/runtimes.py                     # one thread, batch 1
    python benchmarks/runtimes.py --threads 2 --batch 32 --only resnet20

Every row is a delivered artefact in a process of its own, timed in interleaved rounds with all others of
its model: median of the rounds' medians with its interval, ratio to ONNX Runtime in float32 round by round,
largest relative difference of the outputs, predictions on the validation data that change, accuracy on them,
how many of the layers that are stated in integers run on integers, and the operations a second as a share of
the machine's peak: the most that any runtime here reaches in 8 bits on a product of three matrices of 2048.

`resnet20`, `mobilenet` (MobileNetV1 0.25, ImageNet weights) and `minilm` are real networks on real data;
`mobilenet_v2` and `dlrm` have published shapes, random weights and random data (no accuracy).
"""

import argparse
import importlib.util
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import penjing as pj
from penjing.core.artefact import Artefact, open_artefact
from penjing.core.backend import enter
from penjing.core.extras import missing
from penjing.core.target import Target
from penjing.measurement.agreement import difference
from penjing.measurement.latency import interleave, summarise
from penjing.measurement.process import RuntimeProcess, factory_of, save_arrays
from penjing.measurement.stage import timed_batch
from penjing.run.folder import describe_environment
from penjing.search.runtimes import list_openvino_modes
from shapes import SHAPES

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
REAL = {"resnet20": "cifar10", "mobilenet": "mobilenet", "minilm": "minilm"}
MODELS = (*REAL, *SHAPES)
PEAK = 2048
COMPARED = 256
REFERENCE = "onnxruntime float32"


def main() -> None:
    """Measure and print a Markdown table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=MODELS, nargs="+")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    options = parser.parse_args()
    facts = describe_environment()
    print(
        f"{facts['processor']}, {options.threads} threads, batch {options.batch}; "
        f"{', '.join(f'{name} {version}' for name, version in facts['packages'].items())}"
    )
    peak = peak_rate(options)
    for name in options.only or MODELS:
        table(name, options, peak)


def peak_rate(options: argparse.Namespace) -> float:
    """Return the most multiply-adds a second in 8 bits, of any runtime, on a large product."""
    import torch

    torch.manual_seed(0)
    rows = torch.randn(PEAK, PEAK).numpy()
    labels = torch.arange(PEAK).numpy() % 2
    parts = [slice(0, 512), slice(512, 1024), slice(1024, None)]
    train, valid, test = ((rows[part], labels[part]) for part in parts)
    task = pj.Task(train=train, valid=valid, test=test).prepare()
    model = pj.apply(torch.nn.Linear(PEAK, PEAK), pj.Int8Static(examples=64), task).model
    common = {"threads": options.threads, "batch": PEAK}
    targets = [Target(**common)]
    if "f32" in list_openvino_modes():
        targets.append(Target("openvino", **common))
    rates = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penjing-")))
        for target in targets:
            path = pj.deliver(model, target, folder / target.runtime, example=(rows[:1],)).path
            process = stack.enter_context(RuntimeProcess(path, target))
            process.set_batch(save_arrays(folder, (rows,), target.runtime))
            rates[target.runtime] = PEAK**3 / (min(process.time(9, 2)) / 1e3)
    words = ", ".join(f"{name} {2 * rate / 1e12:.2f}" for name, rate in rates.items())
    print(f"8-bit peak, tera-operations a second: {words}")
    return max(rates.values())


def table(name: str, options: argparse.Namespace, peak: float) -> None:
    """Measure one model everywhere and print its rows."""
    if name in SHAPES:
        build, data = SHAPES[name]
    else:
        module = _module(EXAMPLES / f"{REAL[name]}.py")
        build, data = module.model, module.task
    backend, model, task = enter(build().eval(), data().prepare())
    operations = backend.operations(model, task.valid.example()).multiply_adds * options.batch
    labels = task.valid.arrays()[1][:COMPARED] if name in REAL else None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penjing-")))
        rows = dict(variants(model, task, options, folder))
        inputs = tuple(x[:COMPARED] for x in task.valid.arrays()[0])
        outputs, processes = {}, {}
        for number, (label, (artefact, target)) in enumerate(rows.items()):
            process = stack.enter_context(RuntimeProcess(artefact.path, target, model=factory_of(model)))
            process.set_batch(save_arrays(folder, timed_batch(inputs, target), f"batch{number}"))
            files = save_arrays(folder, inputs, f"inputs{number}")
            batch = artefact.evaluation_batch(32)
            outputs[label] = process.outputs(files, batch, folder / f"outputs{number}.npy")
            processes[label] = process
        samples = interleave(processes, rounds=options.rounds, seconds=120.0)
    print(f"\n## {name}\n")
    print(
        "| runtime and precision | p50 ms | interval | of ONNX Runtime float32 | interval | difference | "
        f"changed of {len(outputs[REFERENCE])} | accuracy | integer layers | of peak |"
    )
    print("|---" * 10 + "|")
    for label, (artefact, target) in rows.items():
        found = summarise(samples[label], samples[REFERENCE], target.batch, target.threads, REFERENCE)
        p50, ratio = found.p50_ms, found.ratio
        changed = int((outputs[label].argmax(-1) != outputs[REFERENCE].argmax(-1)).sum())
        apart = difference(outputs[label], outputs[REFERENCE])
        cells = (
            label,
            f"{p50.value:.3g}",
            f"{p50.low:.3g} to {p50.high:.3g}",
            f"{ratio.value:.2f}",
            f"{ratio.low:.2f} to {ratio.high:.2f}",
            f"{apart:.1e}",
            changed,
            "—" if labels is None else f"{(outputs[label].argmax(-1) == labels).mean():.1%}",
            _integers(artefact),
            f"{operations / (p50.value / 1e3) / peak:.1%}",
        )
        print(f"| {' | '.join(map(str, cells))} |")


def variants(
    model: Any, task: pj.Task, options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, tuple[Artefact, Target]]]:
    """Deliver the float model and its int8 forms to every target that takes them."""
    common = {"threads": options.threads, "batch": options.batch}
    example, number = task.valid.example(), itertools.count()

    def delivered(changed: Any, target: Target) -> tuple[Artefact, Target]:
        path = folder / f"artefact{next(number)}"
        pj.deliver(changed, target, path, example=example)
        return open_artefact(path), target

    runtimes = {"onnxruntime": Target(**common)}
    if "f32" in list_openvino_modes():
        runtimes["openvino"] = Target("openvino", **common)
    low = Target("openvino", mode="bf16", **common) if "bf16" in list_openvino_modes() else None
    for label, target in runtimes.items():
        yield f"{label} float32", delivered(model, target)
    if low is not None:
        yield "openvino bfloat16", delivered(model, low)
    if not options.no_torch and not missing("torch"):
        for mode in ("eager", "compiled"):
            yield f"torch {mode} float32", delivered(model, Target("torch", mode=mode, **common))
    static = pj.chain(pj.Int8Static(), pj.CorrectBias())
    smooth = pj.chain(pj.SmoothActivations(), pj.Int8Static())
    dynamic = pj.chain(pj.Int8Dynamic())
    packed = {f"{bits}-bit weights": pj.chain(pj.WeightOnly(f"int{bits} group 32")) for bits in (4, 8)}
    for words, plan in (
        {"int8 static": static, "int8 smoothed": smooth, "int8 dynamic": dynamic} | packed
    ).items():
        try:
            changed = pj.apply(model, plan, task).model
        except pj.Refused as refusal:
            print(f"{words}: {refusal}")
            continue
        lowered = {"openvino": low} if low is not None else {}
        for label, target in itertools.chain(runtimes.items(), lowered.items()):
            rest = ", the rest bfloat16" if target is low else ""
            try:
                yield f"{label} {words}{rest}", delivered(changed, target)
            except pj.Refused as refusal:
                print(f"{label} {words}{rest}: {refusal}")


def _integers(artefact: Artefact) -> str:
    if artefact.target.runtime != "openvino":
        return "—"
    here, elsewhere = (len(artefact.facts[name]) for name in ("integer_layers", "float_layers"))
    return f"{here} of {here + elsewhere}" if here + elsewhere else "—"


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
