"""Two modules side by side: outputs as they are asked for, nothing left behind."""

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402

from penjing.backends.torch.observe.lockstep import Pass, record_usage, run_hooked  # noqa: E402
from penjing.backends.torch.observe.observations import gather_rows  # noqa: E402

torch.set_num_threads(1)
X = (torch.arange(6.0).reshape(2, 3),)


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2))


def threads():
    return threading.active_count()


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_outputs_come_layer_by_layer_and_some_may_be_left_out():
    model, before = chain().train(), threads()
    with Pass(model, ["0", "2", "4"], X) as run:
        assert torch.equal(run.output("0"), model[0](X[0]))
        last = run.output("4")
    model.eval()
    assert torch.equal(last, model(*X))
    assert not last.requires_grad
    assert (hooks_of(model), threads()) == (0, before)


def test_the_pass_goes_no_further_than_it_is_asked():
    model, reached = chain(), []
    model[4].register_forward_hook(lambda *a: reached.append(1))
    model.train()
    with Pass(model, ["0", "2"], X) as run:
        run.output("0")
        assert not model[0].training
    assert not reached
    assert model[0].training
    with Pass(model, ["0"], X):
        pass
    assert not reached


def test_a_layer_that_is_passed_by_gives_none():
    model = chain()
    with Pass(model, ["0", "2"], X) as run:
        assert run.output("2") is not None
        assert run.output("0") is None
        assert run.output("2") is None


def test_an_error_of_the_forward_is_raised_where_the_output_is_asked_for():
    model, before = chain(), threads()
    narrow = (X[0][:, :2],)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), Pass(model, ["4"], narrow) as run:
        run.output("4")
    assert (hooks_of(model), threads()) == (0, before)


def test_calls_tell_how_often_how_large_and_which_batchnorm_follows():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice, self.unused = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Linear(1, 1)
            self.norm, self.behind_relu = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

        def forward(self, x):
            return self.twice(self.twice(self.behind_relu(self.norm(self.first(x)).relu())))

    found = record_usage(Net(), ["first", "twice", "unused", "norm"], (torch.ones(1, 1, 3, 3),))
    assert [call.times for call in found.values()] == [1, 2, 0, 1]
    assert found["first"].bytes == 4 * 18
    assert [call.batchnorm for call in found.values()] == ["norm", "", "", ""]


def test_functions_see_a_layer_before_and_after_it_runs():
    model = chain().eval()

    def double(module, x):
        module.weight.mul_(2)

    seen = []

    def negative(module, output):
        seen.append(output)
        return -output

    weight = model[2].weight.detach().clone()
    run_hooked(model, {"2": double}, X, {"4": negative})
    assert torch.equal(model[2].weight, 2 * weight)
    assert len(seen) == 1
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, groups=2),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", groups=4),
        nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="reflect", bias=False),
    ],
    ids=str,
)
def test_rows_of_a_convolution_give_its_outputs(layer):
    check(layer, torch.randn(40, 4, 7, 6))


@pytest.mark.parametrize("shape", [(50, 4), (40, 3, 4), (36, 2, 3, 4)])
def test_rows_of_a_linear_layer_give_its_outputs(shape):
    check(nn.Linear(4, 6), torch.randn(shape))


def test_rows_of_a_convolution_of_one_axis_give_its_outputs():
    check(nn.Conv1d(4, 6, 3, stride=2), torch.randn(33, 4, 9))


def check(layer, x):
    """The rows times the weight are the outputs; a limit draws some of them."""
    y = layer(x).detach()
    kept = np.array([0, 2, 3])
    for limit in (10**6, 34):
        runs = list(gather_rows(layer, x, y, kept, limit, np.random.default_rng(0)))
        assert len(runs) >= 32
        inputs, outputs = (np.concatenate(parts) for parts in zip(*runs, strict=True))
        assert len(inputs) == min(limit, y.numel() // len(layer.weight))
        weight = layer.weight.detach().reshape(len(layer.weight), -1).numpy()
        groups = getattr(layer, "groups", 1)
        blocks = zip(np.split(inputs, groups, axis=1), np.split(weight, groups), strict=True)
        made = np.concatenate([part @ w.T for part, w in blocks], axis=1)
        made += 0 if layer.bias is None else layer.bias.detach().numpy()
        np.testing.assert_allclose(made[:, kept], outputs, atol=1e-5)


def test_outputs_at_other_positions_are_not_taken():
    layer = nn.Conv2d(1, 1, 1)
    x = torch.ones(32, 1, 4, 4)
    rng = np.random.default_rng(0)
    assert gather_rows(layer, x, torch.ones(32, 1, 3, 4), np.array([0]), 10, rng) is None
