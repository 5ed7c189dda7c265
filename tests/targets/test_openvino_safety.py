"""OpenVINO files from anywhere: their sizes are looked at before they are read and compiled."""

import numpy as np
import pytest

ov = pytest.importorskip("openvino", reason="the extra openvino is not installed")
from openvino import opset13 as op  # noqa: E402

from penjing.core.errors import Refused  # noqa: E402
from penjing.core.target import Target, runtime_for  # noqa: E402
from penjing.targets import openvino_safety  # noqa: E402
from penjing.targets.openvino_safety import check_sizes, check_text  # noqa: E402

TARGET = Target("openvino")


def constant(values, kind=np.int64):
    return op.constant(np.array(values, kind))


def saved(output, inputs, folder):
    ov.save_model(ov.Model([output], inputs, "m"), folder / "model.xml", compress_to_fp16=False)
    return folder


def parameter(shape):
    return op.parameter(shape, np.float32, name="x")


def computed_size(folder):
    """A reshape to a size that is computed with a Broadcast, as OpenVINO's own reader writes it."""
    x = parameter([-1, 6])
    rank = op.shape_of(op.shape_of(x, "i64"), "i64")
    ones = op.broadcast(constant([1]), op.subtract(rank, constant([1])), "NUMPY")
    y = op.reshape(constant(range(6), np.float32), op.concat([ones, constant([6])], 0), False)
    return saved(op.add(x, y), [x], folder)


def test_a_size_that_is_computed_with_a_broadcast_is_read_apart_and_runs(tmp_path, monkeypatch):
    folder = computed_size(tmp_path)
    apart = []
    read = openvino_safety._read_apart
    monkeypatch.setattr(openvino_safety, "_read_apart", lambda *given: (apart.append(given), read(*given)))
    monkeypatch.setattr(openvino_safety, "has_memory_limit", lambda: False)
    runner = runtime_for(TARGET).open(folder, TARGET)
    np.testing.assert_array_equal(runner(np.zeros((2, 6), np.float32)), [range(6)] * 2)
    assert len(apart) == 1
    monkeypatch.setattr(openvino_safety, "has_memory_limit", lambda: True)
    runtime_for(TARGET).open(folder, TARGET)
    assert len(apart) == 1, "this process has a limit of its own"


def test_a_reading_that_takes_too_much_is_refused(tmp_path, monkeypatch):
    folder = computed_size(tmp_path)
    monkeypatch.setattr(openvino_safety, "has_memory_limit", lambda: False)
    monkeypatch.setattr(openvino_safety, "LARGEST_PEAK", 2**24)
    with pytest.raises(Refused, match=r"must be read within 16777216 bytes.*it ended"):
        check_text(folder / "model.xml", folder / "model.bin")


def looped(trips, folder, goes_on=True):
    x, inner = parameter([-1, 4]), op.parameter([-1, 4], np.float32)
    y = op.add(inner, inner)
    body = ov.Model([y, constant(goes_on, bool)], [inner], "body")
    loop = op.loop(constant(trips), constant(True, bool))
    loop.set_function(body)
    loop.set_special_body_ports([-1, 1])
    loop.set_merged_input(inner, x.output(0), y.output(0))
    return saved(loop.get_iter_value(y.output(0), -1), [x], folder)


def test_loops_with_a_count_run_and_others_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr("penjing.core.memory_limit.has_memory_limit", lambda: False)
    for name, trips in (("some", 3), ("many", 10**9), ("endless", -1)):
        (tmp_path / name).mkdir()
        looped(trips, tmp_path / name)
    core = ov.Core()
    some = core.read_model(tmp_path / "some" / "model.xml")
    assert check_sizes(some, 0, "here") == ""
    with pytest.raises(Refused, match="operators run in one call"):
        check_sizes(core.read_model(tmp_path / "many" / "model.xml"), 0, "here")
    endless = core.read_model(tmp_path / "endless" / "model.xml")
    assert "no bound on its iterations" in check_sizes(endless, 0, "here")


def test_a_size_that_depends_on_values_has_no_bound():
    x = parameter([1, 2])
    size = op.convert(op.reshape(x, constant([2]), False), "i64")
    grown = ov.Model([op.broadcast(constant(1, np.float32), size, "NUMPY")], [x], "m")
    assert "depends on values" in check_sizes(grown, 0, "here")


def test_open_dimensions_are_tried_at_lengths_that_fit():
    x, y = parameter([-1, 32]), parameter([-1, 32])
    both = ov.Model([op.add(x, y)], [x, y], "m")
    assert check_sizes(both, 0, "here") == ""
    assert both.inputs[0].partial_shape.is_dynamic, "the model is not changed"
    for window, fits in ((400, True), (600, False)):
        x, kernel = parameter([-1, 1, -1]), constant(np.ones((1, 1, window)), np.float32)
        model = ov.Model([op.convolution(x, kernel, [1], [0], [0], [1])], [x], "m")
        assert ("cannot be inferred" in check_sizes(model, 0, "here")) != fits


@pytest.mark.parametrize("weights", [0, 2**28])
def test_constants_may_unfold_to_a_multiple_of_the_weights(weights):
    x = parameter([1, 1])
    grown = op.broadcast(constant(1, np.float32), constant([3, 10**8]), "NUMPY")
    grown = ov.Model([op.add(x, op.reduce_sum(grown, constant([0, 1]), False))], [x], "m")
    if weights:
        assert check_sizes(grown, weights, "here") == ""
    else:
        with pytest.raises(Refused, match="bytes of constants that it unfolds to"):
            check_sizes(grown, weights, "here")
