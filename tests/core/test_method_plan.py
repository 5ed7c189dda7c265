"""Methods as data, plans in a legal order, and what JSON makes of them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import penjing as pj
from penjing.core.errors import Exit, Refused
from penjing.core.method import Only, Stage, inner, name_of, stage_of, unmatched
from penjing.core.plan import chain, digest, only, plan_from_json, plan_name, plan_to_json
from penjing.core.registry import (
    backends_of,
    handler_for,
    handles,
    load_methods,
    method_from_json,
    method_to_json,
)

CUT, TUNE, INT8 = pj.PruneChannels(0.5), pj.FineTune(epochs=1), pj.Int8Static()

methods = st.one_of(
    st.builds(pj.PruneChannels, st.floats(0.01, 0.99), score=st.sampled_from(["l2", "taylor"])),
    st.builds(pj.FineTune, epochs=st.floats(0.1, 10), optimizer=st.sampled_from(["sgd", "adamw"])),
    st.builds(pj.Distill, temperature=st.floats(0.5, 8), alpha=st.floats(0, 1)),
    st.builds(pj.Int8Static, examples=st.integers(1, 512)),
)
patterns = st.sampled_from(["layer1.*", "a | b", "*.conv?", "!head", "a.* | !a.b"])
limited = st.one_of(
    methods, st.builds(only, patterns, methods), st.builds(only, patterns, st.builds(only, patterns, methods))
)


@given(limited)
def test_methods_survive_json_and_repr(method):
    data = json.loads(json.dumps(method_to_json(method)))
    assert method_from_json(data) == method
    assert hash(method_from_json(data)) == hash(method)
    assert eval(repr(method), {name: getattr(pj, name) for name in pj.__all__}) == method  # noqa: S307


@given(st.lists(limited, max_size=4))
def test_plans_survive_json(parts):
    plan = chain(sorted(parts, key=stage_of))
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


def test_a_chain_joins_methods_and_plans():
    assert chain() == ()
    assert chain(CUT, (TUNE, INT8)) == chain(chain(CUT), chain(TUNE), [INT8]) == (CUT, TUNE, INT8)
    assert chain(TUNE, TUNE) == (TUNE, TUNE)


@pytest.mark.parametrize("parts", [(TUNE, CUT), (INT8, TUNE), (INT8, only("a", CUT)), ((CUT, INT8), TUNE)])
def test_a_descending_stage_is_refused(parts):
    with pytest.raises(Refused, match="the stages of a plan must not descend") as caught:
        chain(*parts)
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize("wrong", [0.5, "PruneChannels", None, pj.FineTune, [CUT, 3]])
def test_what_is_no_method_is_refused(wrong):
    with pytest.raises(Refused, match="a plan must consist of methods"):
        chain(wrong)


def test_only_limits_names_and_keeps_the_stage():
    method = only("layer1.* | head", CUT)
    assert [method.covers(n) for n in ("layer1.0.conv", "head", "layer10.0", "layer1")] == [
        True,
        True,
        False,
        False,
    ]
    assert (stage_of(method), name_of(method), inner(method)) == (Stage.STRUCTURE, "PruneChannels", CUT)
    assert repr(method) == "only('layer1.* | head', PruneChannels(ratio=0.5))"
    both = only("layer1.*", only("*.conv", CUT))
    assert [both.covers(n) for n in ("layer1.conv", "layer1.fc", "layer2.conv")] == [True, False, False]
    assert only("Layer1.*", CUT).covers("layer1.0") is False


def test_a_pattern_behind_an_exclamation_mark_leaves_out():
    names = ("layer1.0.conv", "layer1.1.conv", "layer2.0.conv", "head")
    assert [only("!head", CUT).covers(n) for n in names] == [True, True, True, False]
    assert [only("!layer?.0.* | !head", CUT).covers(n) for n in names] == [False, True, False, False]
    assert [only("layer1.* | !layer1.0.*", CUT).covers(n) for n in names] == [False, True, False, False]
    assert [only("!head", only("layer1.*", CUT)).covers(n) for n in names] == [True, True, False, False]
    assert unmatched(only("layer1.* | !tail", only("layer9.*", CUT)), names) == "!tail"
    assert unmatched(only("layer1.* | !head", only("layer9.*", CUT)), names) == "layer9.*"
    assert unmatched(only("layer1.* | !head", CUT), names) == unmatched(CUT, names) == ""


@pytest.mark.parametrize(
    "arguments", [("", CUT), ("  ", CUT), (CUT, "a"), (None, CUT), ("a", 3), ("a", pj.FineTune)]
)
def test_only_refuses_what_it_cannot_take(arguments):
    with pytest.raises(Refused, match="a pattern that is not empty, and a method"):
        only(*arguments)


def test_a_wrapper_without_a_pattern_cannot_be_made():
    with pytest.raises(Refused, match="pattern"):
        Only(pattern=" ", method=CUT)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("PruneChannels", "mapping with the key 'method'"),
        (None, "mapping with the key 'method'"),
        ({"ratio": 0.5}, "mapping with the key 'method'"),
        ({"method": "PruneChanels", "ratio": 0.5}, "Did you mean 'PruneChannels'"),
        ({"method": ["FineTune"]}, "the method must be known"),
        ({"method": None}, "the method must be known"),
        ({"method": "PruneChannels"}, "no ratio"),
        ({"method": "PruneChannels", "ratio": 1.5}, r"PruneChannels\.ratio"),
        ({"method": "PruneChannels", "ratio": "much"}, r"PruneChannels\.ratio"),
        ({"method": "FineTune", "epoch": 3}, "Did you mean 'epochs'"),
        ({"method": "FineTune", 3: 3}, "cannot take a field '3'"),
        ({"method": "FineTune", "epochs": float("nan")}, r"FineTune\.epochs"),
        ({"method": "FineTune", "only": ""}, "pattern"),
        ({"method": "FineTune", "only": [3]}, "pattern"),
        ({"method": "FineTune", "only": 3}, "plan.FineTune"),
    ],
)
def test_wrong_entries_of_a_saved_plan_are_refused(entry, said):
    with pytest.raises(Refused, match=said) as caught:
        method_from_json(entry)
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize("data", [None, "FineTune", {"method": "FineTune"}, 3])
def test_a_saved_plan_is_a_list(data):
    with pytest.raises(Refused, match="plan must be a list"):
        plan_from_json(data)


def test_the_order_of_a_saved_plan_is_checked():
    with pytest.raises(Refused, match="must not descend"):
        plan_from_json([{"method": "Int8Static"}, {"method": "FineTune"}])


def test_methods_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        CUT.ratio = 0.1
    assert CUT.ratio == 0.5


def test_names_for_tables():
    assert plan_name(()) == "float"
    assert plan_name(chain(CUT, only("fc", INT8))) == "PruneChannels(ratio=0.5) + only('fc', Int8Static())"


def test_every_public_method_has_handlers():
    known = load_methods()
    public = {
        n for n in pj.__all__ if isinstance(getattr(pj, n), type) and issubclass(getattr(pj, n), pj.Method)
    }
    assert public - {"Method", "Strategy"} == set(known)
    assert all(backends_of(kind) for kind in known.values())


def test_handlers_are_found_through_only_and_any():
    assert handler_for(only("a", CUT), "numpy") is handler_for(CUT, "torch") is not None
    assert handler_for(TUNE, "onnx") is None
    with pytest.raises(AssertionError, match="already has a handler"):
        handles(pj.PruneChannels)(lambda model, method, context: None)


def test_the_digest_is_of_content_not_of_order():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})
    with pytest.raises(ValueError, match="Out of range float"):
        digest(float("nan"))
