import contextlib
import ctypes
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from penjing.core.errors import Exit, Refused
from penjing.core.executor import Limits, candidate_seed, refused_from
from penjing.core.progress import Line
from penjing.processes.local import LocalExecutor

ENOUGH = Limits(seconds=60, grace_s=0.3)


class Net:
    """A user's class in a module that a child cannot import."""

    def __init__(self, **attributes):
        self.weight = np.arange(200_000, dtype=np.float32)
        self.__dict__.update(attributes)


def gone(pid, seconds=10.0):
    """Tell whether a process ends within some seconds; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def total(net, say, scale):
    say(Line.note("adding"))
    print("printed to the log")
    return {"total": float(net.weight.sum()) * scale, "pid": os.getpid()}


def scribble(net, say):
    before = float(net.weight[0])
    net.weight[:] = 5
    return {"before": before, "after": float(net.weight[0])}


def test_result_progress_and_log(tmp_path):
    lines = []
    with LocalExecutor(Net(), logs=tmp_path / "logs") as executor:
        finished = executor.run(
            total, 2, limits=ENOUGH, name="trial-1", say=lambda line: lines.append(str(line))
        )
    assert finished.status == "done"
    assert finished.value["total"] == 2 * np.arange(200_000, dtype=np.float32).sum()
    assert finished.value["pid"] != os.getpid()
    assert lines == ["adding"]
    assert (tmp_path / "logs" / "trial-1.log").read_text() == "printed to the log\n"
    assert finished.log == str(tmp_path / "logs" / "trial-1.log")
    assert finished.peak_bytes > 10 * 2**20
    assert finished.reason == ""


def test_arrays_are_writable_and_no_job_sees_another(tmp_path):
    net = Net()
    with LocalExecutor(net) as executor:
        for _ in range(2):
            assert executor.run(scribble, limits=ENOUGH).value == {"before": 0.0, "after": 5.0}
    assert net.weight[1] == 1.0


def test_closures_lambdas_and_local_classes_travel():
    class Local:
        double = staticmethod(lambda x: 2 * x)

    with LocalExecutor((Local(), lambda x: x + 1)) as executor:
        finished = executor.run(lambda p, say, x: {"y": p[1](p[0].double(x))}, 3, limits=ENOUGH)
    assert finished.value == {"y": 7}


@pytest.mark.parametrize(
    ("payload", "part"),
    [
        ({"net": Net(layers=[Net(guard=threading.Lock())])}, r"\['net'\]\.layers\[0\]\.guard \(lock\)"),
        ((1, (i for i in range(3))), r"payload\[1\] \(generator\)"),
    ],
)
def test_what_cannot_be_sent_is_named(payload, part):
    with pytest.raises(Refused, match=part) as caught:
        LocalExecutor(payload)
    assert "in_process=True" in str(caught.value)


def test_function_that_uses_a_lock_is_named():
    guard = threading.Lock()
    with LocalExecutor(None) as executor, pytest.raises(Refused, match="uses guard"):
        executor.run(lambda p, say: {"x": guard.locked()}, limits=ENOUGH)


def fail(net, say, how):
    if how == "refused":
        raise Refused("channels stay", value=3, place="conv", fix="prune less", code=Exit.USAGE)
    if how == "raise":
        raise ZeroDivisionError("by nothing")
    if how == "sys.exit":
        sys.exit("enough")
    if how == "_exit":
        os._exit(7)
    if how == "list":
        return [1]
    return {"x": float("nan")}


@pytest.mark.parametrize("in_process", [False, True])
def test_in_process_tells_the_same(in_process):
    with LocalExecutor(
        Net(guard=threading.Lock()) if in_process else Net(), in_process=in_process
    ) as executor:
        refused = executor.run(fail, "refused", limits=ENOUGH)
        assert refused.status == "refused"
        assert str(refused_from(refused.refusal)) == refused.reason
        assert refused.refusal.model_dump() == {
            "rule": "channels stay",
            "value": "3",
            "place": "conv",
            "fix": "prune less",
            "code": 2,
            "fault": "",
        }
        crashed = executor.run(fail, "raise", limits=ENOUGH)
        assert (crashed.status, crashed.reason) == ("crashed", "ZeroDivisionError: by nothing")
        assert 'raise ZeroDivisionError("by nothing")' in crashed.detail
        assert "mapping of plain data" in executor.run(fail, "list", limits=ENOUGH).reason
        assert "JSON" in executor.run(fail, "nan", limits=ENOUGH).reason
        done = executor.run(total, 1, limits=ENOUGH)
        assert (done.value["pid"] == os.getpid()) is in_process
        assert bool(done.notes) is in_process


def test_exits_without_a_result():
    with LocalExecutor(None) as executor:
        assert executor.run(fail, "sys.exit", limits=ENOUGH).reason == "SystemExit: enough"
        finished = executor.run(fail, "_exit", limits=ENOUGH)
        assert (finished.status, finished.reason) == ("crashed", "exited with code 7 without a result")


def die(net, say, number):
    block = np.ones(4_000_000)
    say(Line.note(f"have {block.nbytes}"))
    if number == signal.SIGSEGV:
        ctypes.string_at(0)
    os.kill(os.getpid(), number)
    time.sleep(30)


def test_killed_worker_is_told_with_its_peak():
    lines = []
    with LocalExecutor(None) as executor:
        finished = executor.run(die, signal.SIGKILL, limits=ENOUGH, say=lambda line: lines.append(str(line)))
    assert finished.status == "killed"
    assert finished.reason == "killed (signal 9, probably out of memory)"
    assert finished.peak_bytes > 32_000_000
    assert lines == ["have 32000000"]


def test_native_crash_is_named_with_its_stack(tmp_path):
    with LocalExecutor(None, logs=tmp_path) as executor:
        finished = executor.run(die, signal.SIGSEGV, limits=ENOUGH, name="t")
        assert (finished.status, finished.reason) == ("crashed", "native crash: SIGSEGV (signal 11)")
        assert "Segmentation fault" in finished.detail
        assert "in die" in finished.detail
        assert "in die" in (tmp_path / "t.log").read_text()
        assert executor.run(die, signal.SIGABRT, limits=ENOUGH).reason == "native crash: SIGABRT (signal 6)"
        assert executor.run(total_of_none, limits=ENOUGH).status == "done"


def total_of_none(net, say):
    return {}


def hang(net, say, deaf):
    """Never end, with a child in the group, a child of that, and one in a session of its own."""
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleeper = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", sleeper])
    second = subprocess.Popen(["sleep", "60"], start_new_session=True)
    while len(pids := [p.pid for p in psutil.Process(os.getpid()).children(recursive=True)]) < 3:
        time.sleep(0.02)
    assert {first.pid, second.pid} < set(pids)
    say(Line.note(" ".join(map(str, [os.getpid(), *pids]))))
    time.sleep(60)


@pytest.mark.parametrize("deaf", [False, True])
def test_timeout_ends_the_whole_family(deaf):
    lines = []
    with LocalExecutor(None) as executor:
        limits = Limits(seconds=6, grace_s=0.3)
        finished = executor.run(hang, deaf, limits=limits, say=lambda line: lines.append(str(line)))
    assert (finished.status, finished.reason) == ("timeout", "stopped after 6 s")
    assert finished.seconds >= 6
    pids = [int(text) for text in lines[0].split()]
    assert len(pids) == 4
    assert all(gone(pid) for pid in pids)
    assert psutil.Process().children() == []


def grow(net, say):
    blocks = []
    while True:
        blocks.append(np.ones(2_000_000))
        time.sleep(0.02)


def test_memory_limit_by_the_resident_size():
    limits = Limits(seconds=60, memory_bytes=250_000_000, grace_s=0.3)
    with LocalExecutor(None) as executor:
        finished = executor.run(grow, limits=limits)
    assert finished.status == "killed"
    assert "limit 250 MB" in finished.reason
    assert finished.peak_bytes > 250_000_000


def shout(net, say):
    sys.stdout.write("first\n")
    for _ in range(40):
        sys.stdout.write("x" * 100_000 + "\n")
    sys.stdout.write("last\n")
    return {}


def test_log_is_bounded_and_keeps_both_ends(tmp_path):
    with LocalExecutor(None, logs=tmp_path) as executor:
        assert executor.run(shout, limits=ENOUGH, name="t").status == "done"
    text = (tmp_path / "t.log").read_text()
    assert text.startswith("first\n")
    assert text.endswith("last\n")
    assert "bytes not kept" in text
    assert len(text) < 1.2 * 2**20


def test_environment_of_the_children():
    def read(net, say):
        return {"threads": os.environ["OMP_NUM_THREADS"], "order": hash("fixed")}

    with LocalExecutor(None, environment={"OMP_NUM_THREADS": "3"}) as executor:
        first, second = (executor.run(read, limits=ENOUGH).value for _ in range(2))
    assert first == second
    assert first["threads"] == "3"


def test_the_wall_clock_does_not_matter(monkeypatch):
    moments = iter(range(10**9, 0, -(10**6)))
    monkeypatch.setattr(time, "time", lambda: float(next(moments)))
    with LocalExecutor(None) as executor:
        finished = executor.run(total_of_none, limits=ENOUGH)
    assert finished.status == "done"
    assert 0 < finished.seconds < 60


def test_seeds_come_from_the_candidate():
    def seed(net, say, key):
        return {"seed": candidate_seed(7, key)}

    with LocalExecutor(None) as executor:
        there = executor.run(seed, "trial-1", limits=ENOUGH).value["seed"]
    assert there == candidate_seed(7, "trial-1") != candidate_seed(7, "trial-2")


SCRIPT = """
import signal, sys, time
import numpy as np
from penjing.core.executor import Limits
from penjing.core.progress import Line
from penjing.processes.local import LocalExecutor
print("top", flush=True)
signal.signal(signal.SIGINT, signal.default_int_handler)

class Mine:
    weight = np.ones(10)

def job(mine, say, pause):
    import subprocess
    if pause:
        say(Line.note(f"{__import__('os').getpid()} {subprocess.Popen(['sleep', '60']).pid}"))
        time.sleep(pause)
    return {"sum": float(mine.weight.sum())}

with LocalExecutor(Mine()) as executor:
    print(executor.run(job, float(sys.argv[1]), limits=Limits(grace_s=float(sys.argv[2])),
                       say=lambda line: print(line, flush=True)).value)
"""


def script(tmp_path, *arguments):
    """Start a script from a folder that holds a file named as a module of the library."""
    (tmp_path / "user script.py").write_text(SCRIPT)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "json.py").write_text("raise SystemExit('the wrong json')")
    command = [sys.executable, str(tmp_path / "user script.py"), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path / "here")


def test_user_script_without_a_main_guard(tmp_path):
    printed, errors = script(tmp_path, "0", "1").communicate(timeout=60)
    assert printed == "top\n{'sum': 10.0}\n", errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_orphans_when_the_driver_ends(tmp_path, number):
    driver = script(tmp_path, "60", "0.3")
    assert driver.stdout.readline() == "top\n"
    pids = [int(text) for text in driver.stdout.readline().split()]
    assert len(pids) == 2
    driver.send_signal(number)
    _, errors = driver.communicate(timeout=30)
    assert driver.returncode == -number
    assert ("KeyboardInterrupt" in errors) is (number == signal.SIGINT)
    assert all(gone(pid) for pid in pids)


def test_helper_module_beside_a_task_file_travels(tmp_path, monkeypatch):
    (tmp_path / "helper_of_task.py").write_text("def triple(x):\n    return 3 * x\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        import helper_of_task
    try:
        with LocalExecutor(helper_of_task.triple) as executor:
            finished = executor.run(lambda triple, say: {"y": triple(2)}, limits=ENOUGH)
    finally:
        del sys.modules["helper_of_task"]
    assert finished.value == {"y": 6}, finished.detail


def test_torch_model_with_a_lambda_and_tied_weights():
    torch = pytest.importorskip("torch")

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.two.weight = self.one.weight
            self.activation = lambda x: x.relu()

        def forward(self, x):
            return self.two(self.activation(self.one(x)))

    def job(payload, say):
        model, x = payload
        out = model(torch.from_numpy(x)).sum().item()
        return {"tied": model.one.weight is model.two.weight, "out": out}

    model, x = Tied(), np.ones((2, 4), np.float32)
    with LocalExecutor((model, x), environment={"OMP_NUM_THREADS": "1"}) as executor:
        finished = executor.run(job, limits=ENOUGH)
    assert finished.status == "done", finished.detail
    assert finished.value["tied"]
    assert finished.value["out"] == pytest.approx(model(torch.from_numpy(x)).sum().item(), rel=1e-5)


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with LocalExecutor(Net()) as executor:
        assert os.listdir(tmp_path) == []
        executor.run(total, 1, limits=ENOUGH)
        assert os.listdir(tmp_path) == []


def kill_children(delay, pids):
    time.sleep(delay)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            pids.add(child.pid)
            child.kill()


def test_random_kills_of_the_worker_never_harm_the_driver():
    rng = random.Random(0)
    with LocalExecutor(Net()) as executor:
        for _ in range(4):
            pids = set()
            killer = threading.Thread(target=kill_children, args=(rng.random() * 0.4, pids))
            killer.start()
            finished = executor.run(total, 1, limits=ENOUGH)
            killer.join()
            assert finished.status in ("done", "killed")
            assert finished.status == "done" or pids
        assert executor.run(total, 1, limits=ENOUGH).status == "done"


def test_a_broken_callback_ends_the_child():
    def broken(line):
        raise RuntimeError(str(line))

    with LocalExecutor(Net()) as executor, pytest.raises(RuntimeError, match="adding"):
        executor.run(total, 1, limits=ENOUGH, say=broken)
    assert psutil.Process().children() == []
