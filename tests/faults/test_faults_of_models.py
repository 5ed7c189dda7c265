"""Faults 5, 15-17, 20 and 22 as whole runs on torch models; the others stand in tests/backends/torch."""

import threading
from collections import namedtuple

import numpy as np
import pytest

from penjing.core.errors import Exit, Refused
from penjing.core.verdict import LimitVerdict, Verdict
from penjing.measurement.nondeterminism import within_noise
from penjing.search.resources import COPIES

torch = pytest.importorskip("torch")
nn = torch.nn

Memory = namedtuple("Memory", "total available")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.fc(x).relu())


@pytest.fixture(scope="module")
def weights(tiny):
    x, y = (torch.from_numpy(a) for a in tiny["data"]())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Plain()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[:300]), y[:300]).backward()
            optimizer.step()
    return model.state_dict()


def with_weights(kind, weights):
    model = kind()
    model.load_state_dict(weights)
    return model


class NotPickled:
    """Can be copied, but not sent to another process."""

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError("cannot pickle a handle of the driver")


def test_a_model_that_holds_a_lambda_and_returns_a_dictionary_goes_all_the_way(optimize, tiny, weights):
    class Named(Plain):  # a local class, which plain pickle refuses
        def __init__(self):
            super().__init__()
            self.scale = lambda x: x * 2

        def forward(self, x):
            hidden = self.fc(x).relu()
            return {"features": hidden, "logits": self.scale(self.head(hidden))}

    model = with_weights(Named, weights)
    task = tiny["task"](output="logits")
    result = optimize(model, task, budget={"max_drop": "5%", "trials": 1})
    record = result.record
    assert record["trials"][0]["status"] == "done", record["trials"][0]["reason"]
    assert record["baselines"]["eager"]["target"] == "torch eager"
    assert result.load()(task.test[0][:7]).shape == (7, 5)
    assert isinstance(model(torch.zeros(1, 16)), dict), "the user's model is as it was"
    with pytest.raises(Refused, match=r"dict with keys 'features', 'logits'.*task\.output='logits'"):
        optimize(model, out="other")


def test_a_model_that_cannot_be_sent_is_worked_on_in_this_process(optimize, weights):
    model = with_weights(Plain, weights)
    model.handle = NotPickled()
    said = []
    result = optimize(model, said=said, budget={"size": "200%"})
    warning = next(line for line in said if "Candidates run in this process" in line)
    assert "handle" in warning
    assert result.record["baselines"]["eager"] is None
    assert any("PyTorch eager was not measured" in note for note in result.record["notes"])
    assert result.verdict.status == "reached"
    assert result.load()(np.zeros((2, 16), np.float32)).shape == (2, 5)


def test_a_model_that_cannot_be_copied_is_refused_with_the_part_to_remove(optimize, weights):
    model = with_weights(Plain, weights)
    model.cache = threading.Lock()
    with pytest.raises(Refused, match=r"^cache: .*deepcopy.*Remove locks"):
        optimize(model)


@pytest.mark.slow
def test_a_model_that_holds_a_tensor_of_a_graph_is_sent_where_it_cannot_be_copied(optimize, weights):
    model = with_weights(Plain, weights)
    model.cache = model.fc(torch.ones(1, 16))
    assert optimize(model, budget={"size": "200%"}).verdict.status == "reached"


class Branching(Plain):
    def forward(self, x):
        if x.sum() > 0:
            return super().forward(x)
        return super().forward(-x)


def test_control_flow_that_depends_on_data_is_refused_with_its_line(optimize, weights):
    said = []
    place = r"^(test_faults_of_models\.py:\d+|Branching\.forward, line \d+): "
    with pytest.raises(Refused, match=place) as refused:
        optimize(with_weights(Branching, weights), said=said)
    assert "take control flow" in refused.value.fix
    assert not any(line.startswith("trying") for line in said)


class Noisy(Plain):
    def forward(self, x):
        return super().forward(x) + 4 * torch.randn_like(self.head.bias.expand(x.shape[0], 5))


def test_a_model_with_noise_is_measured_and_nothing_below_the_noise_is_claimed(optimize, weights):
    result = optimize(with_weights(Noisy, weights), budget={"max_drop": "0.9%", "size": "200%"})
    [note] = result.verdict.notes
    assert "not deterministic: 5 evaluations on 300 examples gave accuracy" in note
    assert note in result.record["notes"]
    assert result.verdict.limits["max_drop"].status == "inconclusive"
    assert "not deterministic" in result.report.read_text()


@pytest.mark.parametrize(("spread", "status"), [(0.0, "reached"), (0.009, "reached"), (0.02, "inconclusive")])
def test_a_drop_below_the_spread_is_not_claimed(spread, status):
    limits = {name: LimitVerdict(status="reached", limit=0.01, measured=0.0) for name in ("max_drop", "size")}
    verdict = within_noise(Verdict.of(limits), spread, ("noise",))
    assert verdict.status == verdict.limits["max_drop"].status == status
    assert verdict.limits["size"].status == "reached"
    assert verdict.notes == ("noise",)


def test_a_model_larger_than_the_memory_is_refused_with_need_and_have(
    optimize, tmp_path, monkeypatch, weights
):
    free = 10 * 2**20
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(2**34, free))
    big = nn.Sequential(
        nn.Linear(16, free // 4 // 16 // COPIES), nn.ReLU(), nn.Linear(free // 4 // 16 // COPIES, 5)
    )
    with pytest.raises(Refused, match=r"needed for weights of 3\.\d+ MB, 10\.5 MB available") as refused:
        optimize(big)
    assert refused.value.code == Exit.ENVIRONMENT
    assert not (tmp_path / "run").exists()
