"""Weights on one grid for each layer, before and after cross-layer equalization.

    PENJING_DATA=/path/to/data python benchmarks/equalization.py [--images 2000]

ResNet-20 adapted to the JPEG copies (`examples/cifar10.py`), on test images: accuracy. UltraFace slim, a face
detector of convolutions, depthwise convolutions and ReLUs, on 32 photographs without labels: the error of its
outputs only. Both as ONNX models with BatchNorm folded; nothing is calibrated. The error is the L2 norm of
the change of all outputs together over theirs. At last MobileNetV1 0.25, whose ReLU6 no factor passes, and
what a ReLU in the place of each costs it, as Nagel et al. 2019 do, on 500 images of ImageNet.
"""

import argparse
import tempfile
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn import functional

import penjing as pj
from one_shot_sparsity import BACKEND as TORCH
from one_shot_sparsity import adapted, cifar10
from penjing.arrays.formats.coding import rounded
from penjing.arrays.quantization import relative_error
from penjing.backends.onnx import BACKEND, OnnxModel
from penjing.backends.onnx.integers.calibrate import limit_batch
from penjing.core.number_format import number_format

import mobilenet  # isort: skip  (examples, found by one_shot_sparsity)

GRIDS = {"one grid": "int{} narrow", "a grid for each channel": "int{} narrow channel"}
BITS = (8, 6)


def main() -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help="test images of ResNet-20")
    count = parser.parse_args().images
    torch.set_num_threads(1)
    net, task = adapted()
    (x,), y = task.prepare().test.arrays()
    with tempfile.TemporaryDirectory() as folder:
        TORCH.export(net, (x[:2],), Path(folder) / "net.onnx")
        resnet = pj.load_onnx(Path(folder) / "net.onnx")
    show(f"ResNet-20, {count} images", resnet, x[:count], y[:count])
    path = cifar10.data_folder() / "weights" / "ultraface_slim_320.onnx"
    show("UltraFace slim, 32 photographs", pj.load_onnx(path), photographs(32))
    capped, freed = mobilenet_accuracies()
    print(f"MobileNetV1 0.25: top-1 {capped}, with ReLU in the place of ReLU6 {freed}")


def show(title: str, net: OnnxModel, x: np.ndarray, y: np.ndarray | None = None) -> None:
    """Print the errors of one network, and its accuracy where there are labels."""
    few = x[:16], np.zeros(16, np.int64)
    equalized = pj.apply(
        net, pj.EqualizeWeights(), pj.Task(train=few, valid=few, test=(x[16:32], few[1]), max_overlap=1)
    )
    done = [change for change in equalized.changes if change.done]
    before, after = (
        float(np.mean([change.detail[f"precision_{when}"] for change in done]))
        for when in ("before", "after")
    )
    wanted = outputs(net, x)
    print(
        f"{title}: {len(done)} of {len(equalized.changes)} layers, mean precision {before:.2f}, "
        f"then {after:.2f}; top-1 in float {top(wanted, y) or 'unknown'}, equalized in float: error "
        f"{relative_error(outputs(equalized.model, x), wanted):.1e}\n"
    )
    heads = ["weights", *(head for bits in BITS for head in (f"int{bits}, error", f"int{bits}, top-1"))]
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n")
    for name, model in (("as they are", net), ("equalized", equalized.model)):
        for grid, form in GRIDS.items():
            cells = []
            for bits in BITS:
                found = outputs(on_grid(model, form.format(bits)), x)
                cells += [f"{relative_error(found, wanted):.3f}", top(found, y)]
            print(f"| {name}, {grid} | {' | '.join(cells)} |", flush=True)
    print()


def mobilenet_accuracies() -> tuple[str, str]:
    """Return those of the published network, and with ReLU in the place of ReLU6."""
    x, y = mobilenet.images()
    found = []
    for function in (functional.relu6, functional.relu):
        with mock.patch.object(functional, "relu6", function):
            found.append(top(TORCH.run(mobilenet.model(), (x,)), y))
    return found[0], found[1]


def outputs(net: OnnxModel, x: np.ndarray) -> np.ndarray:
    """Return the first output, in batches as the model takes them."""
    size = limit_batch(net.proto, 250)
    return np.concatenate([net.run((x[i : i + size],))[0] for i in range(0, len(x), size)])


def on_grid(net: OnnxModel, form: str) -> OnnxModel:
    """Return a copy whose weights are rounded to the nearest values of a format over their whole range."""
    changed = BACKEND.copy(net)
    for layer in BACKEND.layers(net):
        if layer.kind in ("conv", "depthwise", "linear"):
            weight = BACKEND.read(net, layer.name)["weight"]
            BACKEND.write(changed, layer.name, {"weight": rounded(weight, number_format(form))})
    return changed


def photographs(count: int) -> np.ndarray:
    """Return images of ImageNet as UltraFace takes them, `[count, 3, 240, 320]`."""
    from PIL import Image

    with np.load(cifar10.data_folder() / "cv" / "imagenet_sample_500a.npz") as stored:
        ends, raw = stored["offsets"], stored["jpeg"].tobytes()
    files = [raw[a:b] for a, b in pairwise(ends[: count + 1])]
    pixels = [Image.open(BytesIO(file)).convert("RGB").resize((320, 240)) for file in files]
    found = np.stack([np.asarray(image, np.float32) for image in pixels])
    return (found.transpose(0, 3, 1, 2) - 127) / 128


def top(found: np.ndarray, labels: np.ndarray | None) -> str:
    """Return the accuracy in percent, where there are labels."""
    return "" if labels is None else f"{100 * float((found.argmax(1) == labels).mean()):.1f}%"


if __name__ == "__main__":
    main()
