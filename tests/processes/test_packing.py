"""What is sent to another process, by value where it could not be imported there."""

import subprocess
import sys
import threading
import traceback
from functools import partial

import numpy as np
import pytest

from penjing.core.errors import Refused
from penjing.processes.packing import pack, unpack

READ = "import sys; from penjing.processes.packing import unpack; print(unpack(int(sys.argv[1]))().size)"


def test_code_of_a_file_that_cannot_be_imported_travels_by_value(tmp_path):
    import importlib.util

    source = tmp_path / "users_task_file.py"
    source.write_text("class Net:\n    size = 7\n\ndef model():\n    return Net()\n")
    spec = importlib.util.spec_from_file_location("users_task_file", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["users_task_file"] = module
    try:
        spec.loader.exec_module(module)
        named = pack(module.model, "model()")
        held = pack(partial(lambda net: net, module.Net()), "model()")
    finally:
        del sys.modules["users_task_file"]
    for file in (named, held):
        with file:
            command = [sys.executable, "-c", READ, str(file.fileno())]
            done = subprocess.run(command, pass_fds=(file.fileno(),), capture_output=True, check=True)
        assert done.stdout.split() == [b"7"]


def test_a_factory_that_cannot_be_sent_is_refused_with_its_part():
    lock = threading.Lock()
    with pytest.raises(Refused, match="cannot be sent to another process") as caught:
        pack(lambda: lock, "model()")
    assert caught.value.place == "model() uses lock (lock)"


def test_arrays_come_back_equal_and_writable():
    array = np.arange(1000.0)
    with pack({"x": array, "y": array[::2]}, "payload") as file:
        back = unpack(file.fileno())
        back["x"][0] = 5
        assert unpack(file.fileno())["x"][0] == 0
    np.testing.assert_array_equal(back["x"][1:], array[1:])
    np.testing.assert_array_equal(back["y"], array[::2])


def test_a_traceback_quotes_the_line_that_failed():
    with pack(lambda: 1 // 0, "job") as file:
        function = unpack(file.fileno())
    with pytest.raises(ZeroDivisionError) as caught:
        function()
    assert "lambda: 1 // 0" in "".join(traceback.format_exception(caught.value))
