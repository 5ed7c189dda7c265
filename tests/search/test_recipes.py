"""The probe of precision recipes: what it writes, what it keeps, and what a run makes of it."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import penjing as pj
from penjing.core.artefact import deliver
from penjing.core.backend import backend_for
from penjing.core.cache import cache_folder
from penjing.core.errors import Refused
from penjing.core.executor import Finished
from penjing.core.measurement import Estimate
from penjing.core.plan import chain, digest, plan_to_json
from penjing.core.target import Target
from penjing.measurement.side_by_side import ratios
from penjing.planners.candidates import list_recipes
from penjing.report.recipes import describe_recipes, list_recipe_rows
from penjing.search import recipes
from penjing.search.open_session import open_session
from penjing.search.recipes import choose_recipes, explain_no_probe
from penjing.search.recipes_job import EXAMPLES, NO_TIME, deliver_recipes, shorten_calibration
from penjing.search.values import LayerFacts, Survey
from penjing.targets.graph_shape import digest_graph

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

FLOAT = SimpleNamespace(latency_ms=0.1, folder="float")
SMALLER = chain(pj.only("!head | !conv1", pj.Int8Static()), pj.CorrectBias())
WITHOUT_HEAD = chain(pj.only("!head", pj.Int8Static()), pj.CorrectBias())
STATIC, DYNAMIC = chain(pj.Int8Static(), pj.CorrectBias()), chain(pj.Int8Dynamic())


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PENJING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def parts(task_file):
    import runpy

    found = runpy.run_path(str(task_file))
    return found["model"]().eval(), found["task"]().prepare()


@pytest.fixture(scope="module")
def nets(parts, tmp_path_factory):
    """A network on digits in ONNX, the same with other weights, and a narrower one."""
    model, task = parts
    folder = tmp_path_factory.mktemp("nets")
    tuned, narrow = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.01 * torch.randn_like(weight)
    narrow.conv2, narrow.head = torch.nn.Conv2d(32, 40, 3, 2, 1), torch.nn.Linear(40, 10)
    found = {}
    for name, net in {"digits": model, "tuned": tuned, "narrow": narrow}.items():
        deliver(net, Target(), folder / name, example=task.valid.example())
        found[name] = pj.load_onnx(folder / name / "model.onnx")
    return found


@pytest.fixture(scope="module")
def digits(nets, parts):
    return nets["digits"], parts[1]


def facts_of(model, task):
    backend, example = backend_for(model), task.valid.example()
    return Survey(
        backend=backend.name,
        fingerprint="",
        operations=backend.operations(model, example),
        outputs=10,
        layers=tuple(LayerFacts(name=x.name, kind=x.kind, shapes={}) for x in backend.layers(model)),
        eager=False,
        noise=0.0,
        spread=0.0,
        seconds={},
    )


class Here:
    """Carries jobs out in this process."""

    def __init__(self, *payload):
        self.payload = payload

    def run(self, job, *args, limits, name, say):
        return Finished(status="done", value=job(self.payload, say, *args), seconds=0.0)


@pytest.fixture
def run(tmp_path):
    """A function that makes the choice for a model in a run of its own, and returns it with what was said."""
    count = iter(range(100))

    def choose(model, task, target=None, apart=False, **budget):
        target, said = target or Target(), []
        limits = pj.Budget(max_drop="5%", **budget)
        folder, options = tmp_path / f"run{next(count)}", {"say": lambda line: said.append(str(line))}
        with open_session(model, task, limits, target, folder, 0, options) as session:
            said.clear()
            if target.runtime != "torch":
                deliver(model, target, folder / "float" / "target", example=task.valid.example())
            if not apart:
                session = replace(session, executor=Here(session.model, session.task))
            return choose_recipes(session, facts_of(model, task), FLOAT), said

    return choose


@pytest.fixture
def timed(monkeypatch):
    """Latencies are given, by the number of the recipe; returns what was asked for."""
    given, asked = {}, []

    def answer(folders, reference, target, inputs, seconds):
        asked.append([name for name in folders if name != reference])
        for name in folders:
            assert any(folders[name].iterdir()), "there is a file to time"
        found = {name: given[name] for name in asked[-1] if name in given}
        estimates = {k: Estimate(value=v, low=v - 0.02, high=v + 0.02, n=6) for k, v in found.items()}
        return estimates, {name: "it crashed" for name in asked[-1] if name not in given}

    monkeypatch.setattr(recipes, "ratios", answer)
    return SimpleNamespace(given=given, asked=asked)


def test_the_fastest_comes_first_and_the_next_run_asks_the_cache(digits, run, timed):
    model, task = digits
    timed.given.update({"recipe0": 0.5, "recipe1": 0.45, "recipe2": 0.7, "recipe3": 9.0, "recipe4": 0.97})
    found, said = run(model, task)
    assert found.measured
    assert [row.ratio.value for row in found.found.rows] == [0.5, 0.45, 0.7, 9.0, 0.97]
    assert "static int8, signed activations: 9.00 times float [8.98, 9.02]; it does not pay here" in said
    assert found.plans == (WITHOUT_HEAD, STATIC, SMALLER)
    assert found.found.rows[1].float_layers == ("head",)
    assert "static int8: 0.50 times float [0.48, 0.52]" in said
    assert not found.found.cached
    again, said = run(model, task)
    assert again.found.cached
    assert again.plans == found.plans
    assert len(timed.asked) == 1
    assert "precision recipes, latency over that of float (from the cache):" in said


def test_another_shape_target_or_number_of_threads_is_measured_again(nets, digits, run, timed):
    model, task = digits
    timed.given.update({"recipe0": 0.5, "recipe1": 0.45, "recipe2": 0.7})
    run(model, task)
    assert run(nets["tuned"], task)[0].found.cached, "other weights, the same shape"
    assert not run(nets["narrow"], task)[0].found.cached
    assert not run(model, task, Target(batch=4))[0].found.cached
    assert len(timed.asked) == 3


def test_what_there_was_no_time_for_is_measured_by_the_next_run(digits, run, timed, monkeypatch):
    model, task = digits
    timed.given.update({"recipe0": 0.5})
    monkeypatch.setattr(recipes, "_fitting", lambda seconds, call_ms: 1)
    found, said = run(model, task)
    assert [row.reason for row in found.found.rows] == ["", *[NO_TIME] * 4]
    assert found.plans == (STATIC,)
    assert any(line.endswith(f"was not measured: {NO_TIME}") for line in said)
    timed.given["recipe0"] = 0.3
    second, _ = run(model, task)
    assert [row.ratio and row.ratio.value for row in second.found.rows] == [0.5, 0.3, *[None] * 3]
    assert second.plans == (WITHOUT_HEAD, STATIC)
    for _ in range(3):
        assert not run(model, task)[0].found.cached
    assert run(model, task)[0].found.cached


def test_a_damaged_file_in_the_cache_is_said_and_measured_again(digits, run, timed):
    model, task = digits
    timed.given.update({"recipe0": 0.5, "recipe1": 0.45, "recipe2": 0.7})
    run(model, task)
    (path,) = (cache_folder() / "recipes").iterdir()
    path.write_text(path.read_text().replace("0.45", "0.11"))
    found, said = run(model, task)
    assert not found.found.cached
    assert any("does not match its hash" in line for line in said)
    assert any("does not match its hash" in note for note in found.found.notes)
    assert run(model, task)[0].found.cached, "and replaced"
    content = json.loads(path.read_text())
    content["content"]["rows"][0]["ratio"] = "fast"
    path.write_text(json.dumps(content | {"sha256": digest(content["content"])}))
    assert any("another form" in note for note in run(model, task)[0].found.notes)


def test_where_lower_precision_does_not_pay_float_is_kept_and_it_is_said(digits, run, timed):
    model, task = digits
    timed.given.update({"recipe0": 1.08, "recipe1": 1.2, "recipe2": 1.3})
    found, said = run(model, task)
    assert (found.plans, found.measured) == ((), True)
    assert "lower precision does not pay here: 1.08 times float; float is kept" in said
    small, said = run(model, task, size="60%")
    assert small.plans[0] == STATIC
    assert "lower precision does not pay here: 1.08 times float; tried for its size alone" in said
    record = found.found.recorded()
    assert describe_recipes(record) == (
        "Lower precision does not pay here: the fastest recipe, static int8, takes 1.08 times the latency of "
        "float."
    )
    assert list_recipe_rows(record)[0] == ("static int8", "1.08", "1.06 to 1.10", "none")
    assert list_recipe_rows(record)[1][3] == "1 of 3: head"


def test_a_recipe_that_cannot_be_timed_is_named_and_the_rest_counts(digits, run, timed):
    model, task = digits
    timed.given.update({"recipe1": 0.6})
    found, said = run(model, task)
    assert "static int8 was not measured: it crashed" in said
    assert found.plans == (WITHOUT_HEAD,)
    assert list_recipe_rows(found.found.recorded())[-1][1:3] == ("not measured", "it crashed")


def test_rules_decide_where_nothing_could_be_timed(digits, run, timed, monkeypatch):
    model, task = digits
    found, said = run(model, task)
    assert (found.plans, found.measured) == ((STATIC,), False)
    assert "precision recipes go by rules, not measured: none could be timed" in said
    assert describe_recipes(found.found.recorded()) == ""

    def broken(*_):
        raise Refused("the artefact answers in time", value="no answer", place="float", fix="try again")

    monkeypatch.setattr(recipes, "ratios", broken)
    assert any("the artefact answers in time" in note for note in run(model, task)[0].found.notes)


def test_rules_decide_where_time_or_memory_is_short(digits, run, timed, monkeypatch):
    model, task = digits
    found, said = run(model, task, time="60s")
    assert (found.plans, timed.asked) == ((STATIC,), [])
    assert "precision recipes go by rules, not measured: a probe may take 15 s" in said[-1]
    assert explain_no_probe(0.0, 1.0, 0)
    assert explain_no_probe(1e-9, 1.0, 0)
    assert explain_no_probe(None, None, 0) == "the latency of the float model was not measured"
    assert explain_no_probe(200.0, 2000.0, 0) == "a call takes 2e+03 ms, too long for a short probe"
    assert "GB of memory" in explain_no_probe(None, 1.0, 10**15)
    assert explain_no_probe(None, 1.0, 0) == explain_no_probe(150.0, 1.0, 0) == ""


def test_a_target_without_an_integer_graph_has_no_recipe(parts, run, timed):
    found, said = run(*parts, Target("torch"))
    assert (found.plans, found.measured, found.found.rows, said) == ((), False, (), [])


def test_a_transformer_is_written_under_every_recipe_and_really_timed(tiny_transformer, tmp_path):
    model = tiny_transformer()
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 1, 8, 8)).astype(np.float32), np.arange(64) % 10
    task = pj.Task(train=(x[:32], y[:32]), valid=(x[32:48], y[32:48]), test=(x[48:], y[48:])).prepare()
    facts = facts_of(model, task)
    legal = list_recipes(facts.kinds, facts.operations.by_layer, Target())
    plans = {f"recipe{i}": plan_to_json(c.plan) for i, c in enumerate(legal)}
    found = deliver_recipes(
        (model, task), lambda line: None, plans, Target(), tmp_path, 0, 100.0, tmp_path / "none.onnx"
    )
    assert found["refused"] == {}
    assert found["layers"] == 14
    left = {c.name: set(found["float"][f"recipe{i}"]) for i, c in enumerate(legal)}
    small = left.pop("static int8 but for the smallest layers (2% of the work)")
    assert small == {"embed", "fc"}
    assert left.pop("static int8 but for the smallest layers (10% of the work)") > small
    assert {"fc", "body.0.up"}.isdisjoint(set.union(*left.values()))
    reference = deliver(model, Target(), tmp_path / "float", example=task.valid.example()).path
    folders = {"float": reference, "dynamic": tmp_path / "recipe1", "none": tmp_path / "absent"}
    measured, failures = ratios(folders, "float", Target(), (x,), 0.0)
    assert measured.keys() == {"dynamic"}
    assert 0 < measured["dynamic"].low <= measured["dynamic"].value <= measured["dynamic"].high
    assert failures.keys() == {"none"}
    none = deliver_recipes((model, task), lambda line: None, plans, Target(), tmp_path, 0, -1.0, reference)
    assert set(none["refused"].values()) == {NO_TIME}


def test_only_what_corrects_errors_is_left_out_of_a_quick_recipe():
    plan = chain(pj.SmoothActivations(), pj.only("!a", pj.Int8Static()), pj.CorrectBias())
    assert shorten_calibration(plan) == (
        pj.SmoothActivations(examples=EXAMPLES),
        pj.only("!a", pj.Int8Static(observer="minmax", examples=EXAMPLES)),
    )
    assert shorten_calibration(DYNAMIC) == DYNAMIC


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_weights_do_not_enter_the_shape_and_widths_do(nets, parts, tmp_path, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="the extra openvino is not installed")
    shapes = []
    for name, net in nets.items():
        path = deliver(net, Target(runtime), tmp_path / name, example=parts[1].valid.example()).path
        shapes.append(digest_graph(path))
    assert shapes[0] == shapes[1] != shapes[2]
    assert digest_graph(tmp_path) is None


def test_a_torch_module_for_openvino_is_written_in_a_process_of_its_own(parts, run, timed):
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    timed.given.update({"recipe0": 0.7, "recipe1": 0.9, "recipe2": 0.8})
    found, said = run(*parts, Target("openvino"), apart=True)
    assert "writing recipe1" in said
    assert found.plans == (STATIC, SMALLER, WITHOUT_HEAD)
    assert found.found.seconds.keys() == {"export", "compression", "measurement"}
