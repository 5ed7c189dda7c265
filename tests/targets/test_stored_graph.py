"""Torch artefacts that need no class, and what is refused of a graph that somebody else wrote."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.backends.torch import BACKEND  # noqa: E402
from penjing.backends.torch.stored.graph_json import find_operator  # noqa: E402
from penjing.backends.torch.stored.graph_reader import build_net  # noqa: E402
from penjing.backends.torch.structure.blocks import find_blocks, remove_blocks  # noqa: E402
from penjing.backends.torch.structure.history import history  # noqa: E402
from penjing.targets.torch import load_module  # noqa: E402

torch.set_num_threads(1)
X = (np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype("float32"),)
TOKENS = (np.random.default_rng(0).integers(1, 30, (3, 6)),)
TORCH = pj.Target("torch")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding="same", bias=False), nn.BatchNorm2d(16)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Net(nn.Module):
    """Widths written into the code, a constant tensor, dropout, a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.body = nn.Sequential(Block(), Block(), Block())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16 * 16, 4)
        self.register_buffer("scale", torch.tensor(1.5), persistent=False)

    def forward(self, image):
        x = self.depthwise(self.body(self.stem(image)))
        weights = torch.tensor([1.0, 2.0, 3.0, float("inf")]).clamp(max=4.0)
        return self.head(self.drop(x.view(-1, 16 * 16))) * self.scale * weights


def made():
    torch.manual_seed(0)
    net = Net()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
    return net.eval()


def halved(model, example=X):
    from oracles.selection import select

    groups = BACKEND.groups(model, example)
    rng = np.random.default_rng(0)
    kept = {g.name: select(rng.random(g.size), 0.5, g.blocks, 1) for g in groups.groups}
    return BACKEND.keep(model, groups, kept)


def shortened(model, names, example=X):
    return remove_blocks(model, find_blocks(model, example), names, example)


def delivered(model, folder, example=X):
    return pj.deliver(model, TORCH, folder, example=example).path


def test_without_the_class_it_gives_the_same_outputs_for_any_batch(tmp_path):
    model = made()
    folder = delivered(model, tmp_path / "a")
    runner = pj.load(folder)
    for n in (1, 2, 5):
        x = X[0][:n]
        np.testing.assert_array_equal(runner(x), BACKEND.run(model, (x,)))
    again = pj.load(folder, Net)
    np.testing.assert_array_equal(again(*X), runner(*X))


@pytest.mark.parametrize("order", ["skip", "keep", "skip keep", "skip skip keep keep"])
def test_removed_blocks_and_channels_come_back_both_ways(order, tmp_path):
    model, removed = made(), iter(["body.1", "body.2"])
    for step in order.split():
        model = shortened(model, [next(removed)]) if step == "skip" else halved(model)
    assert [next(iter(entry)) for entry in history(model)] == order.split()
    folder = delivered(model, tmp_path / "a")
    wanted = BACKEND.run(model, X)
    np.testing.assert_array_equal(pj.load(folder)(*X), wanted)
    np.testing.assert_array_equal(pj.load(folder, Net)(*X), wanted)
    of_class, of_graph = load_module(folder, Net), load_module(folder)
    assert history(of_class) == history(of_graph) == history(model)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, of_class, of_graph)]
    assert len(set(sizes)) == 1


def test_it_loads_in_a_process_that_never_saw_the_class(tmp_path):
    model = halved(shortened(made(), ["body.0"]))
    folder = delivered(model, tmp_path / "a")
    np.save(tmp_path / "x.npy", X[0])
    code = (
        "import numpy as np, penjing as pj, sys;"
        "np.save(sys.argv[2], pj.load(sys.argv[1])(np.load(sys.argv[3])))"
    )
    paths = [str(folder), str(tmp_path / "y.npy"), str(tmp_path / "x.npy")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), BACKEND.run(model, X))


def test_the_loaded_module_has_real_layers_and_goes_on(tmp_path):
    net = load_module(delivered(shortened(made(), ["body.1"]), tmp_path / "a"))
    kinds = {name: type(net.get_submodule(name)) for name in ("stem", "body.0.conv", "depthwise", "head")}
    assert set(kinds.values()) == {nn.Conv2d, nn.Linear}
    assert type(net.get_submodule("body.0.norm")) is nn.BatchNorm2d
    assert [layer.kind for layer in BACKEND.layers(net) if layer.name] == [
        "conv",
        "conv",
        "batchnorm",
        "conv",
        "batchnorm",
        "depthwise",
        "linear",
    ]
    np.testing.assert_array_equal(BACKEND.run(copy.deepcopy(net), X), BACKEND.run(net, X))

    mean = net.get_submodule("body.0.norm").running_mean.clone()
    optimizer, losses = torch.optim.SGD(net.parameters(), 0.01), []
    net.train()
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(torch.from_numpy(X[0])), torch.arange(5) % 4)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert net.get_submodule("body.0.norm").running_mean.ne(mean).any(), "BatchNorm follows the mode"
    assert not torch.equal(net(torch.from_numpy(X[0])), net(torch.from_numpy(X[0]))), "and so does dropout"
    small = halved(net.eval())
    assert small.get_submodule("stem").out_channels == 8
    folder = delivered(small, tmp_path / "b")
    np.testing.assert_array_equal(pj.load(folder)(*X), BACKEND.run(small, X))


def test_names_of_modules_may_be_numbers_and_words_with_hyphens(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Sequential(nn.Linear(144, 4))
    ).eval()
    model[3].add_module("drop-path", nn.Sequential(nn.Linear(4, 4)))
    folder = delivered(model, tmp_path / "a")
    np.testing.assert_array_equal(pj.load(folder)(*X), BACKEND.run(model, X))
    names = [name for name, _ in load_module(folder).named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]


def test_masks_come_back_without_the_class(tmp_path):
    from penjing.backends.torch.masks import masks_of, set_masks

    model = made()
    mask = np.random.default_rng(0).random((16, 16, 3, 3)) > 0.8
    set_masks(model, {"body.0.conv.weight": mask})
    folder = delivered(model, tmp_path / "a")
    net = load_module(folder)
    np.testing.assert_array_equal(masks_of(net)["body.0.conv.weight"], mask)
    np.testing.assert_array_equal(BACKEND.run(net, X), BACKEND.run(model, X))


def language_models():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
    }
    torch.manual_seed(0)
    return {
        "Bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)),
        # Tied embeddings, constants in the code, a block without gradients.
        "Llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=True)
        ),
    }


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_transformers_are_self_contained(family, tmp_path):
    model = BACKEND.select(language_models()[family]().eval(), "logits")
    blocks = find_blocks(model, TOKENS)
    small = remove_blocks(model, blocks, list(blocks.found)[:1], TOKENS)
    folder = delivered(small, tmp_path / "a", TOKENS)
    np.testing.assert_array_equal(pj.load(folder)(*TOKENS), BACKEND.run(small, TOKENS))
    net = load_module(folder)
    loss = net(torch.from_numpy(TOKENS[0])).square().mean()
    loss.backward()
    assert all(p.grad is not None for n, p in net.named_parameters() if "norm" in n.lower())
    count = [sum(p.numel() for p in m.parameters()) for m in (net, small)]
    assert count[0] == count[1], "ties stay"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = delivered(made(), tmp_path_factory.mktemp("stored") / "a")
    return json.loads((folder / "graph.json").read_text())


def constants_of(data):
    return {
        name: torch.ones(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for name, entry in data["tensors"].items()
        if entry["role"] == "constant"
    }


def test_the_graph_is_small_plain_data(stored):
    assert set(stored) == {"format", "inputs", "tensors", "nodes", "outputs"}
    assert stored["inputs"] == ["image"]
    assert {node["op"].split(".")[0] for node in stored["nodes"]} <= {"aten", "operator", "torch"}
    assert build_net(stored, constants_of(stored)) is not None


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.exec",
        "aten.from_file.default",
        "aten.__class__.default",
        "aten.add",
        "aten.add.__class__",
        "aten..default",
        "aten.set_.source_Storage",
        "prims.add.default",
        "torch.load",
        "operator.attrgetter",
        "operator.methodcaller",
        "aten.rand.generator",
        "aten.add.Tensor.more",
        "aten.add.Tensor\n",
        "aten.nothing.default",
        "aten._debug_has_internal_overlap.default",
        None,
        7,
        ["aten.add.Tensor"],
    ],
)
def test_other_operators_are_never_looked_up(name):
    with pytest.raises(pj.Refused, match="known operators of aten"):
        find_operator(name)


def changed(data, path, value):
    data = copy.deepcopy(data)
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


CODE = "x); __import__('os').abort("
HOSTILE = {
    "operator": (["nodes", 0, "op"], "os.system"),
    "keyword": (["nodes", 0, "kwargs"], {CODE: 1}),
    "foreign keyword": (["nodes", 0, "kwargs"], {"out": 1}),
    "unknown value": (["nodes", 0, "args", 0], {"eval": "1"}),
    "two kinds": (["nodes", 0, "args", 0], {"node": 0, "input": 0}),
    "later node": (["nodes", 0, "args", 0], {"node": 5}),
    "negative node": (["nodes", 1, "args", 0], {"node": -1}),
    "boolean node": (["nodes", 1, "args", 0], {"node": True}),
    "unknown tensor": (["nodes", 0, "args", 1], {"tensor": "__class__"}),
    "device": (["nodes", 0, "args", 0], {"device": "meta"}),
    "dtype": (["nodes", 0, "args", 0], {"dtype": "__loader__"}),
    "input": (["inputs"], [CODE]),
    "inputs": (["inputs"], ["__class__"]),
    "format": (["format"], 2),
    "nodes": (["nodes"], {"a": 1}),
    "outputs": (["outputs"], None),
    "shape": (["tensors", "stem.weight", "shape"], [-1]),
    "type": (["tensors", "stem.weight", "dtype"], "os"),
    "role": (["tensors", "stem.weight"], {"role": "tied", "to": "nothing", "shape": [], "dtype": "float32"}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_graph_is_refused(case, stored):
    data = changed(stored, *HOSTILE[case])
    with pytest.raises(pj.Refused):
        build_net(data, constants_of(stored))


@pytest.mark.parametrize(
    "name",
    [
        "__class__",
        "a.__init__",
        "forward",
        "_modules",
        "training",
        "../up",
        "/etc/passwd",
        "a/b",
        "a b",
        "stem.weight.x",
        "_parameters.x",
        CODE,
        "",
        "a..b",
        "head.forward",
        "_penjing_code.weight",
        "Ａ",
    ],
)
def test_hostile_names_of_tensors_are_refused(name, stored):
    data = copy.deepcopy(stored)
    data["tensors"][name] = {"shape": [1], "dtype": "float32", "role": "parameter"}
    with pytest.raises(pj.Refused):
        build_net(data, constants_of(stored))


def test_text_in_arguments_stays_text(stored):
    data = copy.deepcopy(stored)
    data["nodes"].append(
        {
            "op": "aten.gelu.default",
            "args": [{"node": 0}],
            "kwargs": {"approximate": "'); __import__('os').abort() #"},
        }
    )
    data["outputs"] = [{"node": len(data["nodes"]) - 1}]
    net = build_net(data, constants_of(stored))
    with pytest.raises(RuntimeError, match="approximate"):
        net(torch.zeros(1, 3, 8, 8))


def test_a_changed_or_damaged_graph_is_refused_on_loading(tmp_path):
    folder = delivered(made(), tmp_path / "a")
    whole = (folder / "graph.json").read_text()
    (folder / "graph.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(pj.Refused):
        pj.load(folder)
