"""The examples run as a user would run them: in a process of their own, from another folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch", reason="the extra torch is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("sklearn", reason="the extra metrics is not installed")

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = os.environ.get("PENJING_DATA", "")


def run(name: str, folder: Path, *arguments: str) -> str:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def imported(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_here() -> None:
    here = Path(__file__).read_text("utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert path.stem in here, path.name


def test_digits_by_hand(tmp_path: Path) -> None:
    words = run("digits_by_hand.py", tmp_path)
    for method in ("PruneChannels", "ReestimateBatchNorm", "Distill", "Int8Static", "CorrectBias"):
        assert method in words
    assert (tmp_path / "digits-small" / "model.onnx").is_file()
    accuracy = float(words.rpartition(": ")[2])
    assert accuracy > 0.8
    sizes = {line.split(":")[0]: int(line.split()[-2]) for line in words.splitlines() if "bytes" in line}
    assert sizes["small"] < 0.35 * sizes["float"]


@pytest.mark.slow  # the README's Python, which always runs, is the same
def test_three_lines(tmp_path: Path) -> None:
    words = run("three_lines.py", tmp_path)
    assert "Verdict: " in words
    assert (tmp_path / "runs" / "three-lines" / "report.html").is_file()
    assert (tmp_path / "runs" / "three-lines" / "record.json").is_file()
    assert 0 <= int(words.split()[-1]) <= 9


def test_cifar10_has_the_published_networks_and_its_task_augments(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import torch

    cifar = imported("cifar10")
    for depth, parameters in ((20, 269_722), (56, 853_018)):
        net = cifar.ResNet(depth).eval()
        assert sum(p.numel() for p in net.parameters()) == parameters
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    rng = np.random.default_rng(0)
    made = {
        f"{part}_{kind}": rng.integers(0, 256, (n, 3, 32, 32), np.uint8) if kind == "x" else np.arange(n) % 10
        for part, n in (("train", 300), ("test", cifar.VALID + 400))
        for kind in "xy"
    }
    monkeypatch.setattr(cifar, "images", lambda: made)
    task = cifar.task().prepare()
    assert (len(task.train), len(task.valid), len(task.test)) == (300, cifar.VALID, 400)
    assert task.train.example()[0].shape == (1, 3, 32, 32)
    first, second = (next(task.train.batches(128))[0][0] for _ in range(2))
    assert not np.array_equal(first, second), "each walk is augmented anew"


def test_cifar10_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar = imported("cifar10")
    monkeypatch.setattr(cifar, "CACHE", tmp_path)
    monkeypatch.delenv("PENJING_DATA", raising=False)
    with pytest.raises(Exception, match="PENJING_DATA"):
        cifar.task()


def test_mobilenet_has_the_published_shape_and_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    mobilenet = imported("mobilenet")
    net = mobilenet.MobileNet().eval()
    assert sum(p.numel() for p in net.parameters()) == 470_072
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
    monkeypatch.delenv("PENJING_DATA", raising=False)
    with pytest.raises(SystemExit, match="PENJING_DATA"):
        mobilenet.task()


@pytest.mark.skipif(not DATA, reason="PENJING_DATA is not set")
def test_mobilenet_knows_the_images() -> None:
    import torch

    mobilenet = imported("mobilenet")
    x, y = mobilenet.images()
    net = mobilenet.model()
    with torch.no_grad():
        found = torch.cat([net(torch.from_numpy(x[i : i + 50])) for i in range(0, 500, 50)]).argmax(1).numpy()
    assert (found == y).mean() == pytest.approx(0.558, abs=0.01)


def test_minilm_pads_sentences_and_its_mask_hides_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import torch

    minilm = imported("minilm")
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, 70)
    mask = (np.arange(minilm.LENGTH["sst2"]) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(0, minilm.VOCABULARY, mask.shape) * mask
    labels = rng.integers(0, 2, 70)
    parts = {part: (ids, mask, np.roll(labels, i)) for i, part in enumerate(("train", "valid", "test"))}
    monkeypatch.setattr(minilm, "encoded", lambda data: parts)
    assert [x.shape for x in minilm.task("sst2").valid[0]] == [ids.shape, mask.shape]
    torch.manual_seed(0)
    net = minilm.MiniLM(2).eval()
    assert sum(p.numel() for p in net.encoder.parameters()) == 6 * 1_774_464
    with torch.no_grad():
        whole = net(torch.from_numpy(ids[:4]), torch.from_numpy(mask[:4]))
        short = net(torch.from_numpy(ids[:4, :20]), torch.from_numpy(mask[:4, :20]))
    torch.testing.assert_close(whole, short, rtol=1e-4, atol=1e-4)
    batches = list(minilm._of_similar_length(lengths, rng))
    assert sorted(np.concatenate(batches).tolist()) == list(range(70))


def test_minilm_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minilm = imported("minilm")
    monkeypatch.setattr(minilm, "CACHE", tmp_path)
    monkeypatch.delenv("PENJING_DATA", raising=False)
    with pytest.raises(Exception, match="PENJING_DATA"):
        minilm.rows("sst2")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not DATA, reason="PENJING_DATA is not set")
def test_cifar10_ends_with_every_limit_judged(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        str(EXAMPLES / "cifar10.py"),
        "--max-drop",
        "1%",
        "--time",
        "10min",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stderr[-3000:]
    assert (out / "record.json").is_file()
