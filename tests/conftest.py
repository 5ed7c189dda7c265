"""What tests of several parts share: NumPy nets and their twins in torch."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# Tests run side by side on few cores: one thread each, and waiting threads sleep. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

# What is started in the background of a shell ignores interruptions, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Cores are shared and slow at times; a deadline would test the machine.
hypothesis.settings.register_profile("penjing", deadline=None)
hypothesis.settings.load_profile("penjing")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Findings are cached in a folder of these tests, not in the user's."""
    before = os.environ.get("PENJING_CACHE")
    os.environ["PENJING_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["PENJING_CACHE"]
    else:
        os.environ["PENJING_CACHE"] = before


LONGEST = (
    "test_optimize",
    "test_every_method",
    "test_demo",
    "test_faults_of_models",
    "test_runtimes",
    "test_docs",
)
"""Files that take more than half a minute each."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Begin with the longest files: one that comes last leaves all workers but its own without work.

    With `--dist loadgroup` a file stays on one worker, and of the table of all methods each row does.
    """
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        row = getattr(item, "callspec", None) and item.callspec.params.get("row")
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {row or ''}"))


def pytest_terminal_summary(terminalreporter):
    """Say how many tests ran in a browser: they are skipped where there is none."""
    counts = {
        outcome: sum("browser" in report.keywords for report in terminalreporter.stats.get(outcome, ()))
        for outcome in ("passed", "failed", "skipped")
    }
    if any(counts.values()):
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        terminalreporter.write_line(f"browser tests of the report: {said}")


QUICK = {
    "penjing.search.session.LEAST_TIMING": 0.2,
    "penjing.search.session.MOST_TIMING": 0.2,
    "penjing.measurement.sittings.TWINS": 0,
    "penjing.search.recipes.MOST_S": 4.0,
    "penjing.search.recipes.START_S": 0.2,
    "penjing.search.recipes.ROUND_S": 0.01,
}


@pytest.fixture(scope="session")
def shorten():
    """A function that makes runs time artefacts but briefly: most tests are not about speeds."""

    def patch_all(patch):
        for name, seconds in QUICK.items():
            patch.setattr(name, seconds)

    return patch_all


@pytest.fixture
def quick(monkeypatch, shorten):
    """Short rounds of timing."""
    shorten(monkeypatch)


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    """A test leaves torch's switches as it found them: gradients on, one thread, single precision."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        found = torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        assert found == (True, 1, torch.float32), "torch was left with gradients, threads, type of"


@pytest.fixture(scope="session")
def torch_twin():
    """A function that builds the same network in torch: modules by the names of the nodes, same weights."""
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    nn, functional = torch.nn, torch.nn.functional

    def module(node, tensors):
        weight, bias = tensors["weight"], "bias" in tensors
        if node.op == "linear":
            return nn.Linear(weight.shape[1], weight.shape[0], bias)
        if node.op == "batchnorm":
            return nn.BatchNorm2d(len(weight), node["eps"])
        groups = node.whole("groups")
        return nn.Conv2d(
            weight.shape[1] * groups,
            len(weight),
            weight.shape[2:],
            node.whole("stride"),
            node.whole("padding"),
            groups=groups,
            bias=bias,
        )

    def window(node):
        return node.whole("kernel"), node.whole("stride"), node.whole("padding")

    plain = {
        "relu": lambda node, x: functional.relu(x),
        "add": lambda node, x, y: x + y,
        "concat": lambda node, *xs: torch.cat(xs, 1),
        "max_pool": lambda node, x: functional.max_pool2d(x, *window(node)),
        "avg_pool": lambda node, x: functional.avg_pool2d(x, *window(node)),
        "global_mean": lambda node, x: x.mean((2, 3)),
        "flatten": lambda node, x: x.flatten(1),
    }

    class Twin(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net
            for node in net.nodes:
                if node.name in net.tensors:
                    self.add_module(node.name, module(node, net.tensors[node.name]))
            for layer, tensors in net.tensors.items():
                own = getattr(self, layer).state_dict()
                own |= {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
                getattr(self, layer).load_state_dict(own)
            self.eval()

        def forward(self, x):
            values = {self.net.inputs[0]: x}
            for node in self.net.nodes:
                taken = [values[name] for name in node.inputs]
                own = getattr(self, node.name, None)
                values[node.name] = own(*taken) if own is not None else plain[node.op](node, *taken)
            return values[self.net.nodes[-1].name]

    return Twin


@pytest.fixture(scope="session")
def tiny_transformer():
    """A function that builds a transformer of two layers for images [n, 1, 8, 8], a row being a token."""
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    nn = torch.nn

    class Layer(nn.Module):
        def __init__(self, width, inner, head_width):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
            self.project, self.head_width = nn.Linear(width, width), head_width
            self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

        def forward(self, x):
            n, t, _ = x.shape
            y = self.norm1(x)
            q, k, v = (
                part(y).view(n, t, -1, self.head_width).transpose(1, 2)
                for part in (self.query, self.key, self.value)
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.project(y.transpose(1, 2).reshape(n, t, -1))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    class Transformer(nn.Module):
        def __init__(self, width, inner, head_width):
            super().__init__()
            self.embed, self.places = nn.Linear(8, width), nn.Parameter(torch.randn(8, width) / 4)
            self.body = nn.ModuleList(Layer(width, inner, head_width) for _ in range(2))
            self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, 10)

        def forward(self, image):
            x = self.embed(image.flatten(1, 2)) + self.places
            for layer in self.body:
                x = layer(x)
            return self.fc(self.norm(x).mean(1))

    def build(width=32, inner=64, head_width=8, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Transformer(width, inner, head_width).eval()

    return build


@pytest.fixture(scope="session")
def tiny_decoder():
    """A function that builds a decoder of one layer: at most 16 tokens [n, t] to logits [n, t, 11]."""
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    nn = torch.nn

    class Decoder(nn.Module):
        def __init__(self, width, causal):
            super().__init__()
            self.table, self.places = nn.Embedding(11, width), nn.Parameter(torch.randn(16, width) / 4)
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
            self.norm, self.causal = nn.LayerNorm(width), causal
            self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.out = nn.Linear(width, 11)

        def forward(self, ids):
            x = self.table(ids) + self.places[: ids.shape[1]]
            y = self.norm(x)
            q, k, v = (
                part(y).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            x = x + y.transpose(1, 2).flatten(2)
            return self.out(x + self.down(nn.functional.gelu(self.up(x))))

    def build(width=16, seed=0, causal=True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Decoder(width, causal).eval()

    return build


TASK = Path(__file__).with_name("tiny_task.py")
BUDGET = ["--max-drop", "6%", "--size", "60%", "--trials", "2"]


def penjing(*arguments, cwd=None, check=None, env=None, timeout=240):
    """Run the installed command line as a user would."""
    out = subprocess.run(
        [str(Path(sys.executable).with_name("penjing")), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if check is not None:
        assert out.returncode == check, f"exit {out.returncode}\n{out.stdout}\n{out.stderr}"
    return out


@pytest.fixture(scope="session")
def command():
    return penjing


@pytest.fixture(scope="session")
def task_file(tmp_path_factory):
    """The tiny task file in a folder of its own, its weights trained once."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("任务 task")
    path = folder / "tiny_task.py"
    shutil.copy(TASK, path)
    train = f"import runpy; runpy.run_path({str(path)!r})['model']()"
    subprocess.run([sys.executable, "-c", train], check=True)
    return path


@pytest.fixture(scope="session")
def finished(task_file, tmp_path_factory):
    """A finished run and the JSON that the command printed."""
    out = tmp_path_factory.mktemp("runs") / "实验 ü"
    done = penjing("optimize", task_file, *BUDGET, "--out", out, "--json")
    assert done.returncode in (0, 3), done.stderr
    return out, json.loads(done.stdout), done
