"""PruneChannels with every score, across groups, and by parameters, multiply-adds, bytes and milliseconds."""

import contextlib
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.arrays.scores import SCORES  # noqa: E402
from penjing.arrays.structure.cut_cost import multiply_adds_removed, unit_costs  # noqa: E402
from penjing.arrays.structure.ranking import Bounds, Ranking  # noqa: E402
from penjing.arrays.structure.reach import Quantity, reach  # noqa: E402
from penjing.backends.torch import BACKEND  # noqa: E402
from penjing.core.apply import apply  # noqa: E402
from penjing.core.backend import Group, Slot  # noqa: E402
from penjing.core.context import Context  # noqa: E402
from penjing.core.measurement import Estimate  # noqa: E402
from penjing.measurement import side_by_side  # noqa: E402

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.a, self.bn, self.b = (
            nn.Conv2d(width, inner, 3, padding=1),
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, width, 3, padding=1),
        )

    def forward(self, x):
        return (x + self.b(self.bn(self.a(x)).relu())).relu()


class Net(nn.Module):
    """A stem, two blocks of one topology and a classifier; the stream has no BatchNorm."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(1, 16, 3, padding=1), Block(16, 24), Block(16, 40)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.two(self.one(self.stem(x).relu())).mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net().eval()
    for block in (model.one, model.two):
        nn.init.uniform_(block.bn.weight, 0.2, 1.5)
    return model


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(96, 1, 6, 6)).astype("float32"), rng.integers(0, 3, 96)
    return pj.Task(train=(x, y), valid=(x[:32] + 1, y[:32]), test=(x[32:64] + 2, y[32:64])).prepare()


EXAMPLE = (np.zeros((1, 1, 6, 6), "float32"),)


def widths(model):
    return {n: m.weight.shape[0] for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def cut(net, task, ratio, **fields):
    fields = {"round_to": 1, "examples": 32, "batch_size": 16} | fields
    return apply(net, pj.PruneChannels(ratio, **fields), task)


def test_a_score_that_says_nothing_of_a_group_leaves_it_whole(net, task):
    applied = cut(net, task, 0.5, score="batchnorm")
    by_layer = {c.layer: c for c in applied.changes}
    assert widths(applied.model) == widths(net) | {"one.a": 12, "two.a": 20}
    assert "no score batchnorm: no BatchNorm" in by_layer["stem"].reason


def test_scores_with_labels_find_the_channels_that_matter(net, task):
    """Channels whose outgoing weights are zero change nothing, however large they are."""
    model = BACKEND.copy(net)
    with torch.no_grad():
        model.one.b.weight[:, ::2] = 0
        model.one.a.weight[::2] *= 100
    for score in ("taylor", "fisher", "output_fisher", "activation"):
        small = cut(model, task, 0.5, score=score).model
        assert torch.equal(small.one.a.weight, model.one.a.weight[1::2][:, _kept(small, model)]), score


def _kept(small, model):
    """Which channels of the stem are left, by its rows."""
    rows = [tuple(r.flatten().tolist()) for r in model.stem.weight]
    return [rows.index(tuple(r.flatten().tolist())) for r in small.stem.weight]


@pytest.mark.parametrize(
    ("of", "selection"),
    [("parameters", "local"), ("multiply_adds", "global"), ("multiply_adds", "isomorphic")],
)
def test_a_share_of_the_whole_model_goes_and_hardly_more(of, selection, net, task):
    before = getattr(BACKEND.operations(net, EXAMPLE), of)
    applied = cut(net, task, 0.62, of=of, selection=selection, score="lamp")
    removed = 1 - getattr(BACKEND.operations(applied.model, EXAMPLE), of) / before
    # One channel of the stream is about a twentieth of what is left.
    assert 0.62 <= removed < 0.68
    [note] = applied.notes["pruning"]
    assert of.replace("_", "-") in note


def test_rounding_to_widths_still_meets_the_share(net, task):
    before = BACKEND.operations(net, EXAMPLE).multiply_adds
    applied = cut(net, task, 0.4, of="multiply_adds", round_to=8)
    after = BACKEND.operations(applied.model, EXAMPLE).multiply_adds
    assert after <= 0.6 * before
    assert all(width % 8 == 0 for name, width in widths(applied.model).items() if name != "fc")
    # Local selection alone would step in all three groups at once.
    assert after > BACKEND.operations(cut(net, task, 0.5, round_to=8).model, EXAMPLE).multiply_adds


def test_global_selection_takes_from_the_group_that_matters_least(net, task):
    model = BACKEND.copy(net)
    with torch.no_grad():
        for tensor in (model.two.a.weight, model.two.a.bias, model.two.bn.weight, model.two.bn.bias):
            tensor *= 0.01
    applied = cut(model, task, 0.3, selection="global", score="fisher")
    found = widths(applied.model)
    assert found["two.a"] == 40 - 24
    assert (found["one.a"], found["stem"]) == (24, 16)
    isomorphic = widths(cut(model, task, 0.3, selection="isomorphic", score="fisher").model)
    assert isomorphic["stem"] < 16, "the stream competes with nobody"
    assert isomorphic["one.a"] == 24
    reasons = {c.layer: c.reason for c in applied.changes}
    assert reasons["one.a"] == "all 24 channels rank above those that go"


def test_units_compete_by_what_they_cost_for_what_they_save(net, task, monkeypatch):
    """With scores all alike, the channels whose removal saves most multiply-adds go first."""
    groups = BACKEND.groups(net, EXAMPLE).groups
    counts = BACKEND.operations(net, EXAMPLE)
    shapes = {layer.name: layer.shapes for layer in BACKEND.layers(net)}
    removed = partial(multiply_adds_removed, shapes=shapes, by_layer=counts.by_layer)
    costs = unit_costs(groups, removed)
    for group in groups:
        kept = {group.name: np.arange(1, group.size)}
        after = BACKEND.operations(BACKEND.keep(net, BACKEND.groups(net, EXAMPLE), kept), EXAMPLE)
        assert counts.multiply_adds - after.multiply_adds == pytest.approx(costs[group.name])

    def flat(cut, chosen):
        return {group.name: np.ones(group.size) for group in chosen}

    monkeypatch.setattr("penjing.prune.channels._score", flat)
    found = widths(cut(net, task, 0.2, of="multiply_adds", selection="global", score="taylor").model)
    dearest = max(groups, key=lambda group: costs[group.name])
    for group in groups:
        assert (found[group.layers[0]] < group.size) == (group is dearest)


def test_floors_and_ceilings_by_layer(net, task):
    floors = (("two.*", 0.9), ("*", 0.2))
    applied = cut(net, task, 0.95, floor=floors)
    assert widths(applied.model) == {"stem": 4, "one.a": 5, "one.b": 4, "two.a": 36, "two.b": 4, "fc": 3} | {
        name: width
        for name, width in widths(applied.model).items()
        if name in ("stem", "one.b", "two.b")  # the stream belongs to two.b as well
    }
    assert widths(applied.model)["stem"] == 15, "0.9 of 16 rounded up"
    reasons = {c.layer: c.reason for c in applied.changes}
    assert reasons["one.a"] == "the floor keeps 20% of 24 channels"
    limited = cut(net, task, 0.05, ceiling=(("one.a", 0.5),))
    assert widths(limited.model)["one.a"] == 12
    assert widths(limited.model)["two.a"] == 38
    assert {c.layer: c.reason for c in limited.changes}["one.a"] == "the ceiling keeps 50% of 24 channels"


def test_a_share_that_cannot_go_is_refused_with_the_largest_that_can(net, task):
    for fields in ({"of": "multiply_adds"}, {"of": "parameters"}, {"selection": "global"}):
        with pytest.raises(pj.Refused, match=r"must be at most 0\.[0-9]+, the share .*Ask for 0\.") as caught:
            cut(net, task, 0.9, floor=0.5, **fields)
        possible = float(caught.value.fix.removeprefix("ask for ").split(",")[0])
        cut(net, task, possible - 0.005, floor=0.5, **fields)
    with pytest.raises(pj.Refused, match="must be at most 0"):
        apply(net, pj.only("one.a", pj.PruneChannels(0.9, of="multiply_adds")), task)


def test_a_share_of_bytes_is_of_the_exported_file(net, task, tmp_path):
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    applied = cut(net, task, 0.5, of="size")
    BACKEND.export(applied.model, EXAMPLE, tmp_path / "after.onnx")
    after, before = (int(word) for word in applied.notes["pruning"][0].split() if word.isdigit())
    assert "bytes of ONNX" in applied.notes["pruning"][0]
    assert after == (tmp_path / "after.onnx").stat().st_size
    assert 0.45 < after / before <= 0.5


def test_a_share_of_latency_is_measured_beside_the_uncut_model(net, task, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def beside(reference, target, split):
        whole = BACKEND.operations(reference, EXAMPLE).multiply_adds
        assert target.threads == 2

        def ratio_of(model):
            # Half of the time is overhead that no cut removes.
            seen.append(model)
            value = 0.5 + 0.5 * BACKEND.operations(model, EXAMPLE).multiply_adds / whole
            return Estimate(value=value, low=value, high=value, n=7)

        yield ratio_of

    monkeypatch.setattr("penjing.measurement.cost.beside", beside)
    target = pj.Target(threads=2)
    applied = cut(net, task, 0.3, of="latency", target=target)
    left = BACKEND.operations(applied.model, EXAMPLE).multiply_adds
    assert 0.33 < left / BACKEND.operations(net, EXAMPLE).multiply_adds <= 0.4
    assert 2 <= len(seen) <= 8
    assert "of the latency before, onnxruntime, 7 interleaved rounds" in applied.notes["pruning"][0]
    with pytest.raises(pj.Refused, match=r"at most 0\.4"):
        cut(net, task, 0.7, of="latency", target=target)


def test_side_by_side_times_a_model_against_another(net, task):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    with side_by_side.beside(net, pj.Target(), task.valid, seconds=0.1) as ratio_of:
        found = ratio_of(net)
    assert 0 < found.low <= found.value <= found.high
    assert found.n >= 6


def one_group(size=100):
    slots = (Slot("a", "weight", 0, np.arange(size), "out"), Slot("b", "weight", 1, np.arange(size), "in"))
    group = Group("a", size, slots, ("a",), np.zeros(size, np.int64))
    return Ranking([[group]], {"a": np.arange(float(size))}, {"a": Bounds(1, 1, size)})


@pytest.mark.parametrize("bend", [0.3, 0.8, 1.5, 3.0])
def test_a_wrong_prediction_is_corrected_by_probes(bend):
    probes = []

    def measured(width):
        probes.append(width)
        return (width / 100) ** bend, "by hand"

    quantity = Quantity(lambda kept: len(kept.get("a", range(100))) / 100, measured, near=0.02)
    found = reach(one_group(), quantity, lambda kept: len(kept.get("a", range(100))), 0.4, "here")
    assert found.left == (found.model / 100) ** bend <= 0.6
    assert found.left > 0.57
    assert len(probes) <= 8


def test_too_little_data_and_a_loss_without_a_number_are_refused(net, task):
    with pytest.raises(pj.Refused, match="must have a batch of 128 examples for the score fisher"):
        cut(net, task, 0.5, score="fisher", examples=512, batch_size=128)
    assert cut(net, task, 0.5, examples=512, batch_size=128).model is not net, "l2 needs no data"

    def broken(outputs, targets):
        return outputs.mean() * float("nan")

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 1, 6, 6)).astype("float32"), rng.integers(0, 3, 64)
    bad = pj.Task(train=(x, y), valid=(x[:32] + 1, y[:32]), test=(x[32:] + 2, y[32:]), loss=broken)
    with pytest.raises(pj.Refused, match="must give finite numbers with the score taylor"):
        apply(net, pj.PruneChannels(0.5, score="taylor", examples=32), bad)


class Functional(nn.Module):
    """A layer whose weight is used without calling it, beside one that is called."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = nn.functional.linear(self.a(x.flatten(1)).relu(), self.b.weight, self.b.bias).relu()
        return self.d(self.c(x).relu())


@pytest.mark.parametrize("score", ["fisher", "output_fisher", "activation"])
def test_a_group_that_a_score_cannot_see_is_skipped_with_the_reason(score, task):
    applied = cut(Functional().eval(), task, 0.5, score=score)
    assert widths(applied.model) == {"a": 8, "b": 4, "c": 4, "d": 3}
    reasons = {c.layer: c.reason for c in applied.changes}
    assert reasons["a"] == f"no score {score}: {SCORES[score].absent}"


def test_a_transposed_convolution_is_reported_with_outputs_and_inputs_in_their_places():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ConvTranspose2d(8, 12, 3), nn.Flatten(), nn.Linear(432, 3))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(96, 1, 6, 6)).astype("float32"), rng.integers(0, 3, 96)
    images = pj.Task(train=(x, y), valid=(x[:32] + 1, y[:32]), test=(x[32:64] + 2, y[32:64]))
    applied = apply(model.eval(), pj.PruneChannels(0.5, round_to=1), images)
    detail = {c.layer: c.detail for c in applied.changes}["1"]
    assert detail == {"out_before": 12, "out_after": 6, "in_before": 8, "in_after": 4}


def test_kinds_of_units_that_are_not_named_stay(net, task):
    with pytest.raises(pj.Refused, match=r"kind 'channel', which PruneChannels\.units does not name"):
        cut(net, task, 0.5, units=("head",))


class Encoder(nn.Module):
    """One transformer layer of 4 heads of width 6 on a stream of width 16, by hand."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Linear(16, 24),
            nn.Linear(16, 24),
            nn.Linear(16, 24),
            nn.Linear(24, 16),
        )
        self.embed, self.norm, self.up, self.down = (
            nn.Linear(6, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 40),
            (nn.Linear(40, 16)),
        )
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = self.norm(self.embed(x.flatten(1, 2)))
        q, k, v = (f(x).unflatten(-1, (-1, 6)).transpose(1, 2) for f in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.o(heads.flatten(2))
        return self.fc((x + self.down(self.up(x).relu())).mean(1))


def test_heads_neurons_and_hidden_widths_go_when_they_are_named(task):
    torch.manual_seed(0)
    model = Encoder().eval()
    for score in ("l2", "fisher", "activation"):
        small = cut(model, task, 0.5, score=score).model
        assert [getattr(small, name).out_features for name in ("q", "v", "up", "embed")] == [12, 12, 20, 16]
    applied = cut(model, task, 0.5, units=("head",))
    assert [getattr(applied.model, name).out_features for name in ("q", "v", "up", "embed")] == [
        12,
        12,
        40,
        16,
    ]
    reasons = {c.layer: c.reason for c in applied.changes}
    assert "kind 'channel', which PruneChannels.units does not name" in reasons["up"]
    assert "kind 'hidden'" in reasons["embed"]
    hidden = cut(model, task, 0.5, units=("hidden",)).model
    assert [getattr(hidden, name).out_features for name in ("q", "up", "embed", "o")] == [24, 40, 8, 8]


def test_head_width_is_another_view_of_attention(task):
    torch.manual_seed(0)
    model = Encoder().eval()
    small = cut(model, task, 0.34, units=("head width",)).model
    assert [getattr(small, name).out_features for name in ("q", "k", "v", "up")] == [16, 16, 16, 40]
    applied = cut(model, task, 0.34, units=("head width",), score="fisher")
    assert [getattr(applied.model, name).out_features for name in ("q", "v")] == [24, 16]
    assert "no score fisher" in {c.layer: c.reason for c in applied.changes}["q"], "no layer takes q as input"


def test_a_share_of_multiply_adds_counts_what_no_layer_multiplies(task):
    """Attention's own products are not in the prediction; the cut still removes what was asked for."""
    torch.manual_seed(0)
    model = Encoder().eval()
    example = task.valid.example()
    before = BACKEND.operations(model, example)
    assert sum(before.by_layer.values()) < before.multiply_adds
    applied = cut(model, task, 0.4, of="multiply_adds")
    removed = 1 - BACKEND.operations(applied.model, example).multiply_adds / before.multiply_adds
    assert 0.4 <= removed < 0.46


def test_random_scores_follow_the_seed(net, task):
    def stem(seed):
        context = Context(task=task, backend=BACKEND, original=net, seed=seed)
        return apply(net, pj.PruneChannels(0.5, score="random"), task, context=context).model.stem.weight

    assert torch.equal(stem(1), stem(1))
    assert not torch.equal(stem(1), stem(2))


def test_a_model_that_was_cut_before_is_noted(net, task):
    once = cut(net, task, 0.5)
    assert "pruning" not in once.notes
    twice = cut(once.model, task, 0.5)
    assert "cut before (1 steps)" in twice.notes["pruning"][0]


def test_multiply_adds_by_layer_are_those_of_the_model(net):
    counted = BACKEND.operations(net, EXAMPLE)
    assert counted.by_layer == {
        "stem": 36 * 16 * 9,
        "one.a": 36 * 24 * 16 * 9,
        "one.b": 36 * 16 * 24 * 9,
        "two.a": 36 * 40 * 16 * 9,
        "two.b": 36 * 16 * 40 * 9,
        "fc": 48,
    }
    assert sum(counted.by_layer.values()) == counted.multiply_adds
    attention = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 3)
    )
    counted = BACKEND.operations(attention, (np.zeros((1, 5, 8), "float32"),))
    products = 2 * 5 * 5 * 8
    assert sum(counted.by_layer.values()) == counted.multiply_adds - products
    assert counted.by_layer["0.linear1"] == 5 * 8 * 16
