"""The process of one artefact: answers, crashes, hangs and limits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from penjing.backends.onnx.model import OnnxModel
from penjing.core.artefact import deliver
from penjing.core.errors import Exit, Refused
from penjing.core.executor import Limits
from penjing.core.system import system_fault
from penjing.core.target import Target
from penjing.measurement.process import Lost, RuntimeProcess, cores_for, environment, save_arrays

ROWS = np.random.default_rng(0).standard_normal((11, 4)).astype(np.float32)


def onnx_net(batch="batch") -> OnnxModel:
    weight = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return OnnxModel(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def expected(rows: np.ndarray) -> np.ndarray:
    return np.maximum(rows @ (np.arange(12, dtype=np.float32).reshape(4, 3) / 10), 0)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "artefact"
    return deliver(onnx_net(), Target(), folder, example=(ROWS[:1],)).path


@pytest.fixture(scope="module")
def process(artefact):
    with RuntimeProcess(artefact, Target()) as running:
        yield running


def torch_artefact(folder: Path, net, target: Target) -> Path:
    """Deliver a net to torch eager and return its folder."""
    return deliver(net, target, folder, example=(ROWS[:1],)).path


def test_outputs_are_those_of_the_file_for_every_batch_size(process, tmp_path):
    files = save_arrays(tmp_path, (ROWS,), "inputs")
    for batch in (1, 4, 11, 64):
        outputs = process.outputs(files, batch, tmp_path / "outputs.npy")
        np.testing.assert_allclose(outputs, expected(ROWS), rtol=1e-6)


def test_times_are_positive_and_as_many_as_asked(process, tmp_path):
    process.set_batch(save_arrays(tmp_path, (ROWS[:2],), "batch"))
    times = process.time(7, warmup=2)
    assert len(times) == 7
    assert all(t > 0 for t in times)


def test_the_process_of_an_onnx_file_is_light_pinned_and_counted(process):
    assert process.modules == []
    assert process.cores == cores_for(1)
    assert psutil.Process(process.pid).cpu_affinity() == cores_for(1)
    assert process.peak_memory_bytes() >= process.rss_before_bytes > 0


def test_a_refusal_in_the_process_keeps_it_alive(process, tmp_path):
    with pytest.raises(Refused, match=r"input 'x'.*float32"):
        process.outputs(save_arrays(tmp_path, (ROWS.astype(np.float64),), "f64"), 4, tmp_path / "o.npy")
    files = save_arrays(tmp_path, (ROWS,), "inputs")
    assert len(process.outputs(files, 4, tmp_path / "o.npy")) == 11


def test_a_fixed_batch_is_filled_up_and_cut(tmp_path):
    folder = deliver(onnx_net(batch=4), Target(), tmp_path / "fixed", example=(ROWS[:4],)).path
    with RuntimeProcess(folder, Target()) as running:
        outputs = running.outputs(save_arrays(tmp_path, (ROWS,), "inputs"), 128, tmp_path / "outputs.npy")
    np.testing.assert_allclose(outputs, expected(ROWS), rtol=1e-6)


def test_a_damaged_artefact_is_refused_in_the_process(artefact, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(artefact), str(copy)], check=True)
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(bytes(data))
    with pytest.raises(Refused, match=r"model\.onnx"):
        RuntimeProcess(copy, Target())


def test_more_threads_than_cores_are_refused_before_anything_starts(artefact):
    with pytest.raises(Refused, match="core for every thread") as caught:
        RuntimeProcess(artefact, Target(threads=1024))
    assert caught.value.code == Exit.ENVIRONMENT


def test_object_arrays_are_refused(tmp_path):
    with pytest.raises(Refused, match="numbers"):
        save_arrays(tmp_path, (np.array(["a", None], dtype=object),), "inputs")


def test_thread_pools_are_passive():
    settings = environment(Target("torch", threads=2))
    assert settings["OMP_WAIT_POLICY"] == "PASSIVE"
    assert settings["OMP_NUM_THREADS"] == "2"
    assert int(settings["MALLOC_MMAP_THRESHOLD_"]) == 2**25
    assert "MALLOC_MMAP_THRESHOLD_" not in environment(Target())


class Trouble:
    """Names what the worker of a test shall do once it is loaded."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self):
        import ctypes
        import os
        import signal

        print("this goes to stdout")
        if self.what == "segfault":
            ctypes.string_at(0)
        if self.what == "abort":
            os.abort()
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "exit":
            os._exit(7)
        if self.what == "sys.exit":
            raise SystemExit(3)
        if self.what == "full":
            raise OSError(28, "No space left on device")
        if self.what == "raise":
            raise ValueError("no such weights")
        if self.what.startswith("hang"):
            return self.hanging()
        return None

    def hanging(self):
        import subprocess

        import torch

        class Net(torch.nn.Linear):
            def forward(net, x):
                child = subprocess.Popen(["sleep", "1000"])
                with open(self.what[5:], "w") as file:
                    file.write(f"{os.getpid()} {child.pid}")
                time.sleep(1000)

        return Net(4, 3)


@pytest.fixture(scope="module")
def eager(tmp_path_factory) -> Path:
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("torch") / "artefact"
    return torch_artefact(folder, torch.nn.Linear(4, 3), Target("torch"))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("segfault", r"native crash: SIGSEGV \(signal 11\) during open"),
        ("abort", r"native crash: SIGABRT \(signal 6\) during open"),
        ("kill", r"signal 9, probably out of memory\) during open"),
        ("exit", "exited with code 7 without a result during open"),
        ("sys.exit", r"must return a model, not end the process, got sys\.exit\(3\)"),
        ("raise", "ValueError: no such weights"),
    ],
)
def test_a_process_that_dies_is_a_refusal_with_the_cause(eager, what, said):
    with pytest.raises(Refused, match=said):
        RuntimeProcess(eager, Target("torch"), model=Trouble(what))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, seconds=20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_process_that_hangs_is_ended_with_its_children(eager, tmp_path):
    note = tmp_path / "pids"
    with RuntimeProcess(eager, Target("torch"), model=Trouble(f"hang:{note}")) as running:
        running.set_batch(save_arrays(tmp_path, (ROWS[:2],), "batch"))
        running.limits = Limits(seconds=6)
        with pytest.raises(Lost, match="must answer in time, got no answer to time in 6 s"):
            running.time(1)
    pids = [int(word) for word in note.read_text().split()]
    assert len(pids) == 2
    assert wait_until(lambda: not any(alive(pid) for pid in pids))


def test_no_process_outlives_a_program_that_is_killed(eager, tmp_path):
    note, script = tmp_path / "pids", tmp_path / "program.py"
    script.write_text(
        "import pathlib\n"
        "from penjing.core.target import Target\n"
        "from penjing.measurement.process import RuntimeProcess\n"
        "def hang():\n"
        "    import os, subprocess, time\n"
        "    child = subprocess.Popen(['sleep', '1000'])\n"
        f"    open({str(note)!r} + '.part', 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"    os.rename({str(note)!r} + '.part', {str(note)!r})\n"
        "    time.sleep(1000)\n"
        f"RuntimeProcess(pathlib.Path({str(eager)!r}), Target('torch'), model=hang)\n"
    )
    program = subprocess.Popen([sys.executable, str(script)])
    assert wait_until(note.exists, 40)
    pids = [int(word) for word in note.read_text().split()]
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    assert wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_generous_memory_limit_does_not_disturb(artefact, tmp_path):
    with RuntimeProcess(artefact, Target(), limits=Limits(memory_bytes=2**31)) as running:
        outputs = running.outputs(save_arrays(tmp_path, (ROWS,), "inputs"), 4, tmp_path / "outputs.npy")
    np.testing.assert_allclose(outputs, expected(ROWS), rtol=1e-6)


def test_a_model_of_many_megabytes_goes_through_the_pipe(eager):
    ballast = np.random.default_rng(0).bytes(20_000_000)

    def make():
        import torch

        assert len(ballast) == 20_000_000
        return torch.nn.Linear(4, 3)

    with RuntimeProcess(eager, Target("torch"), model=make) as running:
        assert running.alive


def test_a_process_above_its_memory_limit_is_ended(eager):
    with pytest.raises(Refused, match=r"of memory, limit 30 MB during open"):
        RuntimeProcess(
            eager, Target("torch"), model=Trouble("nothing"), limits=Limits(memory_bytes=30_000_000)
        )


def test_a_closed_process_refuses_and_closing_twice_is_harmless(artefact):
    running = RuntimeProcess(artefact, Target())
    pid = running.pid
    running.close()
    running.close()
    assert not running.alive
    assert not alive(pid)
    with pytest.raises(Refused, match="must be open, got a process that has ended"):
        running.time(1)


def hungry_net() -> OnnxModel:
    """A net that asks for as many numbers as its largest input says, in billions."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Mul", ["largest", "billion"], ["many"]),
        helper.make_node("Cast", ["many"], ["count"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["count", "one"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceMax", ["zeros"], ["zero"], keepdims=0),
        helper.make_node("Add", ["x", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "hungry",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [
            onnx.numpy_helper.from_array(np.float32(1e9), "billion"),
            onnx.numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    return OnnxModel(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def test_memory_beyond_the_limit_is_not_granted(tmp_path):
    folder = deliver(hungry_net(), Target(), tmp_path / "hungry", example=(np.zeros((1, 4), "f4"),)).path
    limits = Limits(seconds=60, memory_bytes=300_000_000)
    modest, greedy = np.full((2, 4), 1e-6, np.float32), np.full((2, 4), 8, np.float32)
    with RuntimeProcess(folder, Target(), limits=limits) as running:
        files = save_arrays(tmp_path, (modest,), "modest")
        np.testing.assert_array_equal(running.outputs(files, 2, tmp_path / "o.npy"), modest)
        with pytest.raises(Refused, match="must run within its memory limit"):
            running.outputs(save_arrays(tmp_path, (greedy,), "greedy"), 2, tmp_path / "o.npy")
        assert running.peak_memory_bytes() < 1e9


def test_a_stopped_process_holds_nobody_longer_than_the_limit(artefact, tmp_path):
    with RuntimeProcess(artefact, Target()) as running:
        running.set_batch(save_arrays(tmp_path, (ROWS[:2],), "batch"))
        running.limits = Limits(seconds=2)
        os.kill(running.pid, signal.SIGSTOP)
        with pytest.raises(Lost, match="must answer in time, got no answer to time in 2 s"):
            running.time(1)
        assert not running.alive
        assert wait_until(lambda: not alive(running.pid))


def test_a_full_disk_in_the_process_is_a_fault_of_the_environment(artefact, eager, tmp_path):
    files = save_arrays(tmp_path, (ROWS,), "inputs")
    (tmp_path / "full.npy").symlink_to("/dev/full")
    with RuntimeProcess(artefact, Target()) as running:
        with pytest.raises(Refused, match="No space left") as caught:
            running.outputs(files, 4, tmp_path / "full.npy")
        assert caught.value.code == Exit.ENVIRONMENT
        assert len(running.outputs(files, 4, tmp_path / "outputs.npy")) == 11
    with pytest.raises(Refused, match="No space left") as caught:
        RuntimeProcess(eager, Target("torch"), model=Trouble("full"))
    assert caught.value.code == Exit.ENVIRONMENT
    assert system_fault(caught.value) == "ENOSPC"
