"""Which recipes are legal, and their order once they are measured."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

import penjing as pj
from penjing.core.budget import Budget
from penjing.core.measurement import Estimate
from penjing.core.method import Only, inner
from penjing.core.plan import chain, plan_to_json
from penjing.planners.candidates import MOST, PAYS, Probed, list_recipes, match_with_patterns, order_recipes

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


def left_out(plan):
    """Return the pattern around the first method of a plan."""
    return plan[0].pattern if isinstance(plan[0], Only) else ""


def layers(**kinds):
    return kinds


def names(found):
    return [candidate.name for candidate in found]


def test_a_transformer_may_have_everything_but_what_its_runtime_has_no_kernel_for():
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    kinds = layers(words="embedding", a="linear", b="linear", norm="layernorm")
    found = names(list_recipes(kinds, {"a": 50, "b": 50}, pj.Target()))
    assert found == [
        "smoothed static int8",
        "dynamic int8",
        "static int8",
        "8-bit weights",
        "4-bit weights",
        "smoothed static int8, signed activations",
        "smoothed static int8, one step for a weight",
    ]
    there = names(list_recipes(kinds, {"a": 50, "b": 50}, pj.Target("openvino")))
    assert there == [name for name in found if name != "dynamic int8"]


def test_a_network_of_convolutions_has_static_integers_with_small_layers_float():
    kinds = layers(**{f"conv{i}": "conv" for i in range(3)}, gate="conv", fc="linear", bn="batchnorm")
    work = {"conv0": 400, "conv1": 300, "conv2": 230, "gate": 60, "fc": 10}
    found = list_recipes(kinds, work, pj.Target())
    assert names(found) == [
        "static int8",
        "static int8 but for the smallest layers (2% of the work)",
        "static int8 but for the smallest layers (10% of the work)",
        "static int8, signed activations",
        "static int8, one step for a weight",
    ]
    assert [left_out(candidate.plan) for candidate in found] == ["", "!fc", "!fc | !gate", "", ""]
    assert [inner(candidate.plan[0]).inputs for candidate in found] == ["uint8"] * 3 + ["int8", "uint8"]
    assert found[-1].plan[0].weights == "int8 tensor"
    assert all(isinstance(candidate.plan[1], pj.CorrectBias) for candidate in found)


def test_convolutions_and_linear_layers_alone_where_both_do_much_of_the_work():
    kinds = layers(conv="conv", wide="linear", deep="linear")
    found = {
        c.name: left_out(c.plan)
        for c in list_recipes(kinds, {"conv": 50, "wide": 30, "deep": 20}, pj.Target())
    }
    assert found == {
        "static int8": "",
        "static int8, convolutions alone": "!wide | !deep",
        "static int8, linear layers alone": "!conv",
        "static int8, signed activations": "",
        "static int8, one step for a weight": "",
    }


def test_no_recipe_where_there_is_no_layer_no_count_or_no_integer_graph():
    pytest.importorskip("torch", reason="the extra torch is not installed")
    assert list_recipes(layers(words="embedding"), {}, pj.Target()) == ()
    assert list_recipes(layers(conv="conv"), {"conv": 1}, pj.Target("torch")) == ()
    assert names(list_recipes(layers(conv="conv", fc="linear"), {}, pj.Target()))[0] == "static int8"


dotted = st.lists(st.sampled_from(["a", "b", "0", "1", "2", "[x]", "*", "?"]), min_size=1, max_size=4)


@given(st.sets(dotted.map(".".join), min_size=1, max_size=12), st.data())
def test_patterns_match_the_layers_and_no_other(every, data):
    chosen = [name for name in sorted(every) if data.draw(st.booleans())]
    others = sorted(every - set(chosen))
    found = match_with_patterns(chosen, others)
    assert len(found) <= len(chosen)
    assert all(any(fnmatchcase(name, pattern) for pattern in found) for name in chosen)
    assert not any(fnmatchcase(name, pattern) for name in others for pattern in found)


def test_patterns_are_as_short_as_layers_are_alike():
    every = [f"body.{i}.{part}" for i in range(6) for part in ("up", "down")]
    assert match_with_patterns(every[::2], every[1::2]) == ("body.*.up",)


def row(name, ratio, loss=0, reason=""):
    plan = plan_to_json(chain(pj.only(f"!{name}", pj.Int8Static())))
    value = None if ratio is None else Estimate(value=ratio, low=ratio, high=ratio, n=6)
    return Probed(name=name, plan=plan, loss=loss, ratio=value, layers=4, reason=reason)


def order(rows, **budget):
    return [left_out(plan)[1:] for plan in order_recipes(rows, Budget(**budget))]


def test_the_fastest_comes_first_and_what_is_slower_than_float_is_not_tried():
    rows = [row("slow", 1.08), row("b", 0.6), row("a", 0.4), row("untimed", None, reason="no time")]
    assert order(rows, max_drop="1%") == ["a", "b"]
    assert order([row("slow", 1.08), row("as fast", 0.97)], latency="50%") == []
    assert order(rows, size="50%") == ["a", "b", "slow"], "fewer bits may be wanted for their size alone"


def test_for_size_alone_the_one_with_the_fewest_float_layers_comes_first():
    part = row("part", 0.97).model_copy(update={"float_layers": ("a",)})
    assert order([part, row("whole", 1.1), row("fast", 0.5)], size="50%") == ["fast", "whole", "part"]


@pytest.mark.parametrize(("times", "budget"), [(1.0, {}), (2.6, {"size": "50%"})])
def test_what_is_as_fast_comes_in_the_order_of_expected_loss(times, budget):
    rows = [row("coarse", 0.40 * times, 6), row("fine", 0.41 * times, 1), row("far", 0.413 * times, 0)]
    assert order(rows, **budget) == ["fine", "coarse", "far"]


def test_trials_are_left_for_the_other_levers():
    rows = [row(str(i), 0.1 + i / 10) for i in range(7)]
    assert len(order(rows)) == MOST
    assert order(rows, trials=1) == ["0"]
    assert order(rows, trials=6) == ["0", "1"]


@given(st.lists(st.tuples(st.floats(0.05, 3.0), st.integers(0, 6)), max_size=9))
def test_every_recipe_is_tried_at_most_once_and_never_one_slower_than_float(pairs):
    rows = [row(str(i), ratio, loss) for i, (ratio, loss) in enumerate(pairs)]
    found = order(rows)
    assert len(set(found)) == len(found) == min(MOST, sum(ratio < PAYS for ratio, _ in pairs))
    assert all(pairs[int(name)][0] < PAYS for name in found)


@pytest.mark.parametrize(
    ("unsigned", "signed", "first"), [(0.5, 0.4, "int8"), (0.4, 0.41, "uint8"), (0.4, 6.0, "uint8")]
)
def test_of_two_recipes_with_the_same_values_the_faster_one_is_tried(unsigned, signed, first):
    same = row("a", signed)
    same = same.model_copy(update={"plan": plan_to_json(chain(pj.only("!a", pj.Int8Static(inputs="int8"))))})
    (plan,) = order_recipes([row("a", unsigned), same], Budget(size="50%"))
    assert inner(plan[0]).inputs == first
