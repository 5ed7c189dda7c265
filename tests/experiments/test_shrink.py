"""Students made from the teacher's configuration: what is taken over, what is drawn, what is refused."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402

torch.set_num_threads(1)


@dataclass
class Sizes:
    width: int = 8
    num_hidden_layers: int = 6
    classes: int = 3
    rates: tuple = ()


class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first = nn.Linear(5, config.width)
        self.layers = nn.ModuleList(
            nn.Linear(config.width, config.width) for _ in range(config.num_hidden_layers)
        )
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return Net(Sizes()).eval()


def test_every_so_many_layers_are_taken_over(teacher):
    said, before = [], copy.deepcopy(teacher.state_dict())
    student = pj.shrink(teacher, num_hidden_layers=2, say=lambda line: said.append(str(line)))
    assert len(student.layers) == 2
    for mine, its in zip(student.layers, (1, 4), strict=True):
        assert torch.equal(mine.weight, teacher.layers[its].weight)
    assert torch.equal(student.head.bias, teacher.head.bias)
    assert said == ["8 of 8 tensors start from the teacher's, layers 1, 4"]
    assert teacher.config.num_hidden_layers == 6
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    student.layers[0].weight.data.zero_()
    assert teacher.layers[1].weight.any(), "nothing is shared"


def test_other_shapes_are_drawn_by_the_seed(teacher):
    said = []
    one, same, other = (
        pj.shrink(teacher, width=4, seed=seed, say=lambda line: said.append(str(line))) for seed in (0, 0, 1)
    )
    assert said[0] == "1 of 16 tensors start from the teacher's"
    assert torch.equal(one.first.weight, same.first.weight)
    assert not torch.equal(one.first.weight, other.first.weight)
    assert torch.equal(one.head.bias, teacher.head.bias)
    drawn = pj.shrink(teacher, num_hidden_layers=2, start="drawn")
    assert not torch.equal(drawn.head.bias, teacher.head.bias)


def test_it_learns_from_its_teacher(teacher):
    x = np.random.default_rng(0).standard_normal((300, 5)).astype("float32")
    with torch.no_grad():
        y = teacher(torch.from_numpy(x)).argmax(1).numpy()
    task = pj.Task(train=(x[:200], y[:200]), valid=(x[200:250], y[200:250]), test=(x[250:], y[250:]))
    student = pj.shrink(teacher, num_hidden_layers=1)
    found = pj.distill(
        student, teacher, task, pj.Distill(epochs=20, optimizer="adam", lr=0.01, batch_size=20)
    )
    with torch.no_grad():
        alike = [
            (net(torch.from_numpy(x[250:])).argmax(1).numpy() == y[250:]).mean()
            for net in (student, found.model)
        ]
    assert alike[1] > max(alike[0], 0.8)


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        ("LlamaForCausalLM", {"num_hidden_layers": 2}),
        ("Qwen2ForCausalLM", {"num_hidden_layers": 2}),
        ("GPT2LMHeadModel", {"num_hidden_layers": 2}),
        ("BertForSequenceClassification", {"num_hidden_layers": 2, "intermediate_size": 24}),
    ],
)
def test_models_of_the_transformers_library(make, fields):
    transformers = pytest.importorskip("transformers", reason="the extra transformers is not installed")
    cls = getattr(transformers, make)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 40}
    if make != "GPT2LMHeadModel":
        sizes["intermediate_size"] = 48
    if make == "Qwen2ForCausalLM":
        sizes["num_key_value_heads"] = 1
    torch.manual_seed(0)
    teacher = cls(cls.config_class(**sizes)).eval()
    said = []
    student = pj.shrink(teacher, say=lambda line: said.append(str(line)), **fields)
    assert student.config.num_hidden_layers == 2
    assert said[0].endswith("layers 1, 3")
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    assert student(torch.arange(6)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "needs at least one changed value"),
        ({"layers": 2}, "Known are num_hidden_layers"),
        ({"num_hidden_layers": "two"}, "the class must take"),
        ({"width": -1}, "the class must take"),
        ({"width": 4, "start": "zero"}, "must be .teacher. or .drawn."),
    ],
)
def test_wrong_changes_are_refused(teacher, fields, words):
    with pytest.raises(pj.Refused, match=words):
        pj.shrink(teacher, **fields)


def test_models_without_a_configuration_are_refused():
    with pytest.raises(pj.Refused, match="with a configuration"):
        pj.shrink(nn.Linear(3, 2), width=4)
