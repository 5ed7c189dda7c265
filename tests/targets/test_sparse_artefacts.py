"""Masks in delivered files: packed in safetensors, exact zeros in ONNX, zeros again after integers."""

import numpy as np
import pytest

import penjing as pj
from penjing.core.errors import Refused
from penjing.core.target import Target, runtime_for
from penjing.core.task import Split, Task

torch = pytest.importorskip("torch")
nn = torch.nn

from penjing.backends.torch import BACKEND  # noqa: E402
from penjing.backends.torch.masks import masks_of, set_masks  # noqa: E402
from penjing.targets.torch_weights import load, save  # noqa: E402

RUNTIME = runtime_for(Target("torch"))
X = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)


class Net(nn.Module):
    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32, 4)
        self.twin = nn.Linear(32, 4)
        self.twin.weight = self.head.weight
        self.to(dtype)

    def forward(self, x):
        x = torch.relu(self.body(torch.relu(self.norm(self.stem(x))))).mean((2, 3))
        return self.head(x) + self.twin(x)


def sparse(make=Net, sparsity=0.8):
    torch.manual_seed(0)
    model, rng = make().eval(), np.random.default_rng(0)
    set_masks(
        model, {n: rng.random(tuple(p.shape)) > sparsity for n, p in model.named_parameters() if p.ndim > 1}
    )
    return model


def test_the_torch_artefact_stores_what_is_kept_and_brings_masks_back(tmp_path):
    model = sparse()
    artefact = pj.deliver(model, Target("torch"), tmp_path / "a", example=(X[:1],))
    (tmp_path / "d").mkdir()
    RUNTIME.deliver(Net(), (X[:1],), tmp_path / "d")
    size, whole = ((tmp_path / f / "model.safetensors").stat().st_size for f in "ad")
    assert size < 0.45 * whole
    runner = pj.load(artefact.path, model=Net)
    np.testing.assert_array_equal(runner(X), BACKEND.run(model, (X,)))
    found, expected = masks_of(runner._call), masks_of(model)
    assert found.keys() == expected.keys() == {"stem.weight", "body.weight", "head.weight", "twin.weight"}
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert runner._call.head.weight is runner._call.twin.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_and_negative_zeros_come_back_bit_by_bit(tmp_path, dtype):
    model = sparse(lambda: Net(dtype))
    with torch.no_grad():
        model.body.weight.neg_()
    save(model, tmp_path / "w.safetensors")
    again = Net(dtype)
    load(again, tmp_path / "w.safetensors")
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other), name


def test_masks_of_a_cut_model_come_back(tmp_path):
    model = sparse()
    groups = BACKEND.groups(model, (X[:1],))
    group = next(g for g in groups.groups if g.layers == ("stem",))
    small = BACKEND.keep(model, groups, {group.name: np.arange(0, 16, 2)})
    RUNTIME.deliver(small, (X[:1],), tmp_path)
    runner = RUNTIME.open(tmp_path, Target("torch"), Net)
    assert masks_of(runner._call)["body.weight"].shape == (32, 8, 3, 3)
    np.testing.assert_allclose(runner(X), BACKEND.run(small, (X,)), rtol=1e-5, atol=1e-6)


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(16, 31, 3, padding=1)


class More(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


@pytest.mark.parametrize(("other", "said"), [(Wider, r"body\.weight"), (More, "missing: .*more")])
def test_another_class_is_refused_with_the_name(tmp_path, other, said):
    RUNTIME.deliver(sparse(), (X[:1],), tmp_path)
    with pytest.raises(Refused, match=rf"must hold the tensors of the class.*{said}"):
        RUNTIME.open(tmp_path, Target("torch"), other)


def test_a_weight_written_behind_its_mask_is_refused(tmp_path):
    model = sparse()
    with torch.no_grad():
        model.head.weight.fill_(1.0)
    with pytest.raises(Refused, match=r"head\.weight: a weight that a mask removes must be zero"):
        RUNTIME.deliver(model, (X[:1],), tmp_path)


def weights_of(path):
    """The weight matrices and kernels of an ONNX file as floats, by name."""
    import onnx
    from onnx import numpy_helper

    tensors = onnx.load(str(path)).graph.initializer
    return {t.name: numpy_helper.to_array(t) for t in tensors if len(t.dims) > 1}


def test_onnx_keeps_zeros_exactly_and_its_compressed_size_shows_them(tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    model, dense = sparse(), sparse(sparsity=0)
    small = pj.deliver(model, Target(), tmp_path / "s", example=(X[:1],))
    whole = pj.deliver(dense, Target(), tmp_path / "w", example=(X[:1],))
    for name, mask in masks_of(model).items():
        arrays = [a for n, a in weights_of(small.path / "model.onnx").items() if a.size == mask.size]
        assert any(np.array_equal(np.sort((a != 0).ravel()), np.sort(mask.ravel())) for a in arrays), name
    assert small.size_bytes == pytest.approx(whole.size_bytes, rel=0.01)
    assert small.compressed_bytes < 0.6 * whole.compressed_bytes
    np.testing.assert_allclose(pj.load(small.path)(X), BACKEND.run(model, (X,)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [pj.Int8Static(examples=32), pj.Int8Dynamic()])
def test_integers_keep_zeros_at_zero(tmp_path, method):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    rng = np.random.default_rng(1)
    data = Split((rng.normal(size=(64, 3, 8, 8)).astype(np.float32),), rng.integers(0, 4, 64), "train")
    model = sparse()
    result = pj.apply(model, method, Task(train=data, valid=data, max_overlap=1))
    before = BACKEND.operations(model, (X[:1],)).zeros
    quantized = pj.deliver(result, Target(), tmp_path / "q", example=(X[:1],))
    integers = {n: a for n, a in weights_of(quantized.path / "model.onnx").items() if a.dtype == np.int8}
    assert integers
    for name, mask in masks_of(model).items():
        candidates = [a for a in integers.values() if a.size == mask.size]
        if candidates:
            zeros = int((~mask).sum())
            assert any(zeros <= int((a == 0).sum()) < zeros + 0.05 * mask.size for a in candidates), name
    assert before == sum(int((~m).sum()) for n, m in masks_of(model).items() if n != "twin.weight")
