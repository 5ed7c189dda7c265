"""Language models quantized from their files: as on the whole model, resumed, loaded elsewhere."""

import json
import resource
import signal
import subprocess
import sys
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
transformers = pytest.importorskip("transformers", reason="the extra language is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

import penjing as pj  # noqa: E402
from penjing.arrays.formats.coding import decode  # noqa: E402
from penjing.backends.torch.decoder.decoder import Decoder  # noqa: E402
from penjing.cli.main import run  # noqa: E402
from penjing.core.errors import Exit  # noqa: E402

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4),
    "phi": lambda: transformers.PhiConfig(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
}
RNG = np.random.default_rng(0)
TOKENS, EVALUATION = RNG.integers(0, 50, (40, 12)), RNG.integers(0, 50, (6, 12))
NEAREST = pj.QuantizeNearest("int4 group 16", None)


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def model_of(name, kind=torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for tensor in model.parameters():  # as random as trained weights, so that what is lost shows
            tensor.mul_(4) if tensor.ndim > 1 else tensor.add_(0.1 * torch.randn_like(tensor))
    return model.to(kind)


@pytest.fixture
def saved(tmp_path):
    def save(name="llama", kind=torch.float32, shard="20KB"):
        model_of(name, kind).save_pretrained(tmp_path / name, max_shard_size=shard)
        return tmp_path / name

    return save


def loaded(folder, kind=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()


def perplexity(model, ids):
    ids = torch.from_numpy(ids)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp())


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def task():
    y = np.zeros(len(TOKENS), np.int64)
    parts = {"train": (TOKENS, y), "valid": (EVALUATION[:3], y[:3]), "test": (EVALUATION[3:], y[:3])}
    return pj.Task(**parts, metric=lambda outputs, targets: 0.0, direction="minimize", loss=lambda a, b: 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_what_transformers_loads_and_its_perplexity_is_that_of_the_loaded_model(name, saved, tmp_path):
    result = pj.quantize_checkpoint(saved(name), NEAREST, TOKENS, tmp_path / "out", evaluation=EVALUATION)
    before, after = (
        perplexity(loaded(tmp_path / name), EVALUATION),
        perplexity(loaded(tmp_path / "out"), EVALUATION),
    )
    assert result.perplexity.before == pytest.approx(before, rel=1e-5)
    assert result.perplexity.after == pytest.approx(after, rel=1e-5)
    assert before != pytest.approx(after, rel=1e-4)
    assert result.perplexity.tokens == 66
    state, layers = loaded(tmp_path / "out").state_dict(), dict(pj.read_packed_weights(tmp_path / "out"))
    assert {change.layer for change in result.changes if change.done} == set(layers)
    assert len(layers) == 3 * {"phi": 6, "gpt2": 4}.get(name, 7)
    for layer, weight in layers.items():
        stored = state[f"{layer}.weight"].numpy()
        assert np.array_equal(decode(weight), stored.T if name == "gpt2" else stored)
    float_state = loaded(tmp_path / name).state_dict()
    rest = {x for x in state if x.removesuffix(".weight") not in layers}
    assert all(torch.equal(state[x], float_state[x]) for x in rest)
    assert "lm_head" in {change.layer for change in result.changes if not change.done}
    assert result.packed_bytes < result.weight_bytes


@pytest.mark.parametrize(
    "method",
    [
        NEAREST,
        pj.QuantizeGPTQ("uint3 group 16"),
        pj.QuantizeGPTQ("int3 channel", compensate=True, order="given"),
        pj.QuantizeAWQ("int4 group 16"),
        pj.only("*mlp*", pj.QuantizeGPTQ("nf4 group 16", by_layer={"model.layers.1.*": "int8 group 16"})),
    ],
    ids=lambda method: str(method)[:40],
)
def test_block_by_block_is_what_the_whole_model_gives(method, saved, tmp_path):
    pj.quantize_checkpoint(saved("llama"), method, TOKENS, tmp_path / "out")
    found = loaded(tmp_path / "out").state_dict()
    inside = method.method if hasattr(method, "method") else method
    whole = inside.model_copy(
        update={
            "ends": False,
            "by_layer": tuple((f"model.{pattern}", option) for pattern, option in inside.by_layer),
        }
    )
    whole = pj.only("!*lm_head", whole)
    plan = pj.only(method.pattern, whole) if hasattr(method, "pattern") else whole
    applied = pj.apply(Logits(model_of("llama")), plan, task()).model
    for name, layer in applied.model.named_modules():
        if hasattr(layer, "weight_quantizer"):
            with torch.no_grad():
                wanted = layer.weight_quantizer(layer.weight)
            gap = (found[f"{name}.weight"] - wanted).abs().max() / wanted.abs().max()
            assert gap < 2e-3, name
            # A sum in another order may turn a tie, no more.
            assert (found[f"{name}.weight"] != wanted).float().mean() < 0.01, name


def test_learned_rounding_works_block_by_block(saved, tmp_path):
    learned = pj.QuantizeAutoRound("int2 group 16", steps=40)
    nearest = pj.QuantizeNearest("int2 group 16", None)
    result = pj.quantize_checkpoint(saved(), learned, TOKENS, tmp_path / "learned", evaluation=EVALUATION)
    pj.quantize_checkpoint(tmp_path / "llama", nearest, TOKENS, tmp_path / "nearest")
    done = [change for change in result.changes if change.done]
    assert len(done) == 21
    assert {change.detail["block"] for change in done} == {f"model.layers.{i}" for i in range(3)}

    def lost(folder):
        ids = torch.from_numpy(EVALUATION)
        with torch.no_grad():
            return float(
                (loaded(tmp_path / folder)(ids).logits - loaded(tmp_path / "llama")(ids).logits).norm()
            )

    assert lost("learned") < lost("nearest")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_is_what_was_evaluated(kind, saved, tmp_path):
    folder = saved("llama", kind)
    result = pj.quantize_checkpoint(folder, NEAREST, TOKENS, tmp_path / "out", evaluation=EVALUATION)
    assert result.perplexity.after == pytest.approx(
        perplexity(loaded(tmp_path / "out"), EVALUATION), rel=1e-4
    )
    stored = {}
    for path in (tmp_path / "out").glob("model-*.safetensors"):
        stored |= load_file(path)
    assert {tensor.dtype for tensor in stored.values()} == {kind}
    for layer, weight in pj.read_packed_weights(tmp_path / "out"):
        assert torch.equal(torch.from_numpy(decode(weight)).to(kind), stored[f"{layer}.weight"])


def test_sequences_that_judge_may_have_another_length_and_a_last_group_is_told(saved, tmp_path):
    evaluation = np.random.default_rng(3).integers(0, 50, (1, 30))
    result = pj.quantize_checkpoint(
        saved("mistral"), NEAREST, TOKENS, tmp_path / "out", evaluation=evaluation
    )
    assert result.perplexity.after == pytest.approx(
        perplexity(loaded(tmp_path / "out"), evaluation), rel=1e-5
    )
    assert result.perplexity.low == result.perplexity.ratio == result.perplexity.high
    shorter = {c.layer for c in result.changes if c.detail.get("last_group") == 44 % 16}
    assert shorter == {f"model.layers.{i}.mlp.down_proj" for i in range(3)}


def test_patterns_that_hold_for_some_blocks_leave_the_others_as_they_are(saved, tmp_path):
    by_layer = {"*layers.[01].mlp.*": "int8 group 16"}
    method = pj.only("!*layers.0.*", pj.QuantizeAWQ("int4 group 16", by_layer=by_layer))
    result = pj.quantize_checkpoint(saved(), method, TOKENS, tmp_path / "out")
    formats = {c.layer: c.detail.get("weights", c.reason) for c in result.changes}
    assert len(formats) == 23
    assert formats["model.layers.0.mlp.up_proj"] == "not covered by the pattern"
    assert formats["model.layers.1.mlp.up_proj"] == "int8 group 16"
    assert formats["model.layers.1.self_attn.o_proj"] == "int4 group 16"
    assert formats["model.layers.2.mlp.up_proj"] == "int4 group 16"
    old, new = loaded(tmp_path / "llama").model.layers[0], loaded(tmp_path / "out").model.layers[0]
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


def test_a_block_is_gone_before_the_next_one_comes(saved, tmp_path, monkeypatch):
    blocks, make = [], Decoder.block

    def made(self, index, call):
        assert not any(block() is not None for block in blocks)
        assert all(tensor.is_meta for tensor in self.model.parameters() if tensor.ndim > 1)
        block = make(self, index, call)
        blocks.append(weakref.ref(block.module))
        return block

    monkeypatch.setattr(Decoder, "block", made)
    pj.quantize_checkpoint(
        saved(), pj.QuantizeGPTQ("int4 group 16", compensate=True), TOKENS, tmp_path / "out"
    )
    assert len(blocks) == 3


DRIVER = """
import sys
import numpy as np, torch, penjing as pj
torch.set_num_threads(1)
folder, out, data = sys.argv[1:]
with np.load(data) as stored:
    tokens, evaluation = stored["tokens"], stored["evaluation"]
say = lambda line: print(line, flush=True)
pj.quantize_checkpoint(folder, pj.QuantizeGPTQ("int3 group 16"), tokens, out, evaluation=evaluation, say=say)
"""


def killed(folder, out, data, line):
    """Run in a process of its own and kill it at a line of progress."""
    command = [sys.executable, "-c", DRIVER, folder, out, data]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        assert any(line in said for said in driver.stdout)
        driver.send_signal(signal.SIGKILL)
    assert driver.returncode == -signal.SIGKILL


def content(folder):
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.safetensors")}
    record = json.loads((folder / "quantization.json").read_text())
    record["result"].pop("seconds")
    return files, record


def test_a_killed_run_goes_on_and_gives_the_same_to_the_bit(saved, tmp_path):
    folder, data = saved("qwen2"), tmp_path / "data.npz"
    np.savez(data, tokens=TOKENS, evaluation=EVALUATION)
    calm, shot, method = tmp_path / "calm", tmp_path / "shot", pj.QuantizeGPTQ("int3 group 16")
    killed(folder, shot, data, "model.layers.1: QuantizeGPTQ: model.layers.1.mlp.down_proj")
    assert not shot.exists()
    seen = []
    first = pj.quantize_checkpoint(folder, method, TOKENS, calm, evaluation=EVALUATION)
    second = pj.quantize_checkpoint(
        folder, method, TOKENS, shot, evaluation=EVALUATION, say=lambda line: seen.append(str(line))
    )
    assert [line for line in seen if line.startswith("block ")] == ["block 2 of 3", "block 3 of 3"]
    assert content(shot) == content(calm)
    assert first.changes == second.changes
    assert not (tmp_path / "shot.partial").exists()


def test_a_finished_folder_is_the_result_and_nothing_else_takes_its_place(saved, tmp_path):
    folder, out = saved(), tmp_path / "out"
    first = pj.quantize_checkpoint(folder, NEAREST, TOKENS, out, evaluation=EVALUATION)
    assert pj.quantize_checkpoint(folder, NEAREST, TOKENS, out, evaluation=EVALUATION) == first
    for method, seed in ((pj.QuantizeNearest("int3 group 16", None), 0), (NEAREST, 1)):
        with pytest.raises(pj.Refused, match="same model, method, tokens and seed"):
            pj.quantize_checkpoint(folder, method, TOKENS, out, evaluation=EVALUATION, seed=seed)
    (tmp_path / "mine").mkdir()
    with pytest.raises(pj.Refused, match=r"must be new, or of the same model.*something else is there"):
        pj.quantize_checkpoint(folder, NEAREST, TOKENS, tmp_path / "mine")
    with pytest.raises(pj.Refused, match="must hold a float model"):
        pj.quantize_checkpoint(out, NEAREST, TOKENS, tmp_path / "twice")
    shard = next(out.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(pj.Refused, match="as it was written"):
        pj.quantize_checkpoint(folder, NEAREST, TOKENS, out, evaluation=EVALUATION)


def test_a_beginning_of_another_run_is_left_alone(saved, tmp_path, monkeypatch):
    folder, out = saved(), tmp_path / "out"

    class Stop(Exception):
        pass

    def stop(line):
        if line.text.startswith("block 2"):
            raise Stop

    with pytest.raises(Stop):
        pj.quantize_checkpoint(folder, NEAREST, TOKENS, out, say=stop)
    with pytest.raises(pj.Refused, match="the beginning of another"):
        pj.quantize_checkpoint(folder, NEAREST, TOKENS[:20], out)
    seen = []
    pj.quantize_checkpoint(folder, NEAREST, TOKENS, out, say=lambda line: seen.append(str(line)))
    assert seen == ["block 2 of 3", "block 3 of 3"]


def refused(match, folder, method=NEAREST, tokens=TOKENS, **more):
    out = folder.parent / "refused"
    with pytest.raises(pj.Refused, match=match) as caught:
        pj.quantize_checkpoint(folder, method, tokens, out, **more)
    assert not out.exists()
    assert not out.with_name("refused.partial").exists()
    return caught.value


def test_methods_that_do_not_fit_are_refused(saved):
    folder = saved()
    for method in (pj.PruneMagnitude(0.5), pj.TrainQuantized(), pj.WeightOnly(), "GPTQ"):
        refused("must be a method that quantizes weights", folder, method)
    refused("must be None: a checkpoint holds weights", folder, pj.QuantizeNearest("int4 group 16"))
    refused("mixed must be None", folder, pj.QuantizeGPTQ(mixed=pj.MixedBits(4.0)))
    refused("must match a linear layer of a block", folder, pj.only("*conv*", NEAREST))
    refused("leave a linear layer of a block to quantize", folder, pj.only("!*", NEAREST))
    refused("patterns that match a layer", folder, pj.QuantizeGPTQ(by_layer={"lm_head": "int8 group 16"}))


def test_tokens_that_do_not_fit_are_refused(saved):
    folder = saved()
    refused("whole numbers", folder, tokens=TOKENS.astype(np.float32))
    refused("whole numbers", folder, tokens=TOKENS[0])
    refused("at least 2 tokens", folder, tokens=TOKENS[:0])
    refused("at least 2 tokens", folder, tokens=TOKENS[:, :1])
    refused("at most 64 tokens", folder, tokens=np.zeros((2, 65), np.int64))
    assert "0..50" in str(refused("lie in 0..49", folder, tokens=np.array([[0, 50]])))
    refused("lie in 0..49", folder, evaluation=EVALUATION - 50)
    refused("2 in both", folder, evaluation=np.concatenate([TOKENS[:2], EVALUATION]))


def test_checkpoints_that_cannot_be_read_are_refused(saved, tmp_path):
    folder = saved()
    refused("must have a configuration", tmp_path / "nowhere")
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    assert shards[1].name in str(refused("whole safetensors file", folder))
    shards[1].unlink()
    assert shards[1].name in str(refused("every shard", folder))
    shards[1].write_bytes(shards[0].read_bytes())
    refused("what the index says", folder)
    shards[1].write_bytes(whole)
    for path in shards:
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "never unpickled" in str(refused("must hold safetensors", folder))


def test_weights_and_configurations_that_do_not_fit_are_refused(saved):
    folder = saved(shard="1GB")
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    state = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"

    def store(change):
        save_file(state | change, path, metadata={"format": "pt"})

    bad = state[name].clone()
    bad[3, 4] = float("nan")
    store({name: bad})
    assert f"1 NaN or infinite values in {name}" in str(refused("weights must be finite", folder))
    store({name: state[name].double()})
    assert f"{name} is F64" in str(refused("float32, float16 or bfloat16", folder))
    store({name: state[name].to(torch.float8_e4m3fn)})
    assert name in str(refused("is F8_E4M3", folder))
    store({name: state[name][:-1]})
    refused("as the configuration says", folder)
    save_file({key: x for key, x in state.items() if key != name}, path)
    assert f"no {name}" in str(refused("hold every tensor", folder))
    store({})
    for change, match in (
        ({"model_type": "unheard_of"}, "the transformers library knows, got"),
        ({"model_type": "clip"}, "causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "has quantization_config"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        refused(match, folder)


def test_architectures_that_are_no_row_of_blocks_are_refused(tmp_path):
    tuples = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=3, n_head=4)
    experts = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)
    for config, match in ((tuples, "follow each other"), (experts, "hold every tensor")):
        folder = tmp_path / config.model_type
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        refused(match, folder)


def test_lists_that_were_looked_at_are_named(saved):
    folder = saved(shard="1GB")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    assert "model.layers of 0" in str(refused("one list must hold the 0 decoder blocks", folder))


def test_a_full_disk_leaves_nothing_half_written_and_the_run_goes_on_later(saved, tmp_path, monkeypatch):
    folder, out = saved(), tmp_path / "out"
    monkeypatch.setattr("penjing.language.checks.free_bytes", lambda path: 1000)
    assert refused("needs .* bytes of room", folder).code == Exit.ENVIRONMENT
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(line):
        if line.text == "block 2 of 3":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(pj.Refused, match="must be room to write") as caught:
            pj.quantize_checkpoint(folder, NEAREST, TOKENS, out, say=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.code == Exit.ENVIRONMENT
    assert torch.is_grad_enabled(), "the walk that was broken off is still held, but not its mode"
    assert not out.exists()
    assert not list((tmp_path / "out.partial").rglob("*.tmp"))
    seen = []
    pj.quantize_checkpoint(folder, NEAREST, TOKENS, out, say=lambda line: seen.append(str(line)))
    assert seen[0] == "block 2 of 3"
    assert perplexity(loaded(out), EVALUATION) > 0


def test_the_very_codes_go_to_the_packed_operators_of_onnx_runtime(saved, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    pj.quantize_checkpoint(saved("gpt2"), pj.QuantizeGPTQ("uint4 group 16"), TOKENS, tmp_path / "out")
    simulated = pj.load_quantized(tmp_path / "out")
    packed = pj.apply(Logits(simulated), pj.WeightOnly(compute="float32"), task()).model
    operators = [node.op_type for node in packed.proto.graph.node]
    assert operators.count("MatMulNBits") == len(dict(pj.read_packed_weights(tmp_path / "out")))
    with torch.no_grad():
        wanted = loaded(tmp_path / "out")(torch.from_numpy(EVALUATION)).logits.numpy()
    assert np.abs(packed.run((EVALUATION,))[0] - wanted).max() < 1e-4


def test_packed_weights_of_a_damaged_or_foreign_folder_are_refused(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(pj.Refused):
        next(pj.read_packed_weights(tmp_path / "empty"))
    pj.quantize_checkpoint(saved(), NEAREST, TOKENS, tmp_path / "out")
    packed = next((tmp_path / "out" / "packed").iterdir())
    packed.write_bytes(packed.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(pj.Refused, match="as it was written"):
        pj.load_quantized(tmp_path / "out")


def test_from_a_shell(saved, tmp_path, capsys):
    folder, out = str(saved()), str(tmp_path / "out")
    np.save(tmp_path / "tokens.npy", TOKENS)
    np.save(tmp_path / "evaluation.npy", EVALUATION)
    command = [
        "quantize-lm",
        folder,
        "--tokens",
        str(tmp_path / "tokens.npy"),
        "--out",
        out,
        "--evaluation",
        str(tmp_path / "evaluation.npy"),
        "--weights",
        "uint4 group 16",
    ]
    assert run([*command, "--method", "QuantizeAWQ"]) == 0
    printed = capsys.readouterr()
    assert "block 3 of 3" in printed.err
    assert "perplexity" in printed.out
    assert run([*command, "--method", "QuantizeAWQ", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["folder"] == out
    assert printed.err == ""
    assert run([*command, "--method", "Int8Static"]) == Exit.USAGE
    (tmp_path / "tokens.npy").write_bytes(b"no array")
    assert run(command) == Exit.BAD_INPUT
    assert "numpy.save" in capsys.readouterr().err
