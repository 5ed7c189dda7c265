"""Two processes that train one model, against one process with the same batches."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="the extra distributed is not installed")

SCRIPT = """
import os, sys
import torch
import penjing as pj
own = __import__("runpy").run_path({file!r})
(folder,) = sys.argv[1:]
for kind, strategy in own["STRATEGIES"].items():
    lines, out = [], folder + "/" + kind
    say = lambda line: lines.append(str(line))
    fitted = pj.fit(own["net"](kind), own["task"](), strategy, out=out, say=say)
    found = [fitted.model.state_dict(), fitted.record.model_dump(), lines]
    torch.save(found, out + "-" + os.environ["RANK"])
for kind in own["BROKEN_OFF"]:
    found = own["broken_off"](kind, folder + "/state-" + kind)
    torch.save(found, folder + "/broken-" + kind + os.environ["RANK"])
"""


def net(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "shards-average":
            body = nn.Sequential(nn.Conv2d(2, 16, 2), nn.BatchNorm2d(16), nn.Tanh())
            return nn.Sequential(nn.Unflatten(1, (2, 2, 2)), body, nn.Flatten(), nn.Linear(16, 3))
        norm = [nn.BatchNorm1d(16)] if kind == "norm" else []
        blocks = [nn.Sequential(nn.Linear(16, 16), nn.Tanh())] if kind.startswith("shards") else []
        return nn.Sequential(nn.Linear(8, 16), *norm, nn.Tanh(), *blocks, nn.Linear(16, 3))


def task():
    import penjing as pj

    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 8)).astype(np.float32)
    y = (x @ rng.standard_normal((8, 3)).astype(np.float32)).argmax(1)
    return pj.Task(train=(x[:401], y[:401]), valid=(x[401:500], y[401:500]), test=(x[500:], y[500:]))


def strategies():
    import penjing as pj

    return {
        "plain": pj.Strategy(epochs=3, batch_size=33, clip_norm=1.0),
        "shards": pj.Strategy(epochs=3, batch_size=33, clip_norm=1.0, shard=True, optimizer="adamw"),
        **{
            f"shards-{optimizer}": pj.Strategy(epochs=3, batch_size=33, shard=True, optimizer=optimizer)
            for optimizer in ("lion", "muon", "schedule_free")
        },
        "shards-average": pj.Strategy(epochs=3, batch_size=50, averaging="ema", patience=2, shard=True),
        "norm": pj.Strategy(epochs=3, batch_size=50, averaging="ema", patience=2, max_seconds=60),
    }


STRATEGIES = strategies()


BROKEN_OFF = {
    "norm": STRATEGIES["norm"],
    "shards-average": STRATEGIES["shards-average"],
}


def broken_off(kind, path):
    """Return the weights of a run with dropout, and of one that stopped on the way and went on."""
    from penjing.train.distributed import find_processes
    from penjing.train.hooks import Hooks
    from penjing.train.loop import fit
    from penjing.train.objective import make_objective
    from penjing.train.saved_state import SavedState

    class Stop(Exception):
        pass

    prepared = task().prepare()

    def run(model, saved_state, stop_at=None):
        taken = []

        def after_step(progress):
            taken.append(progress)
            if len(taken) == stop_at:
                raise Stop

        hooks = Hooks(after_step=after_step)
        strategy = BROKEN_OFF[kind].model_copy(update={"epochs": 2.0})
        return fit(
            model, prepared.train, make_objective(prepared), strategy, hooks=hooks, saved_state=saved_state
        )

    def dropping():
        return nn.Sequential(net(kind), nn.Dropout(0.5))

    def kept():
        return SavedState(Path(path), "key", every=0.0, processes=find_processes())

    whole, broken = dropping(), dropping()
    run(whole, None)
    with pytest.raises(Stop):
        run(dropping(), kept(), stop_at=8)
    events = run(broken, kept()).events
    return whole.state_dict(), broken.state_dict(), list(events)


def on_two(arguments, folder):
    """Launch two processes in a folder and return what they write to stdout."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By strategy what either process had in the end, and the folder; all in one launch."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT.format(file=__file__))
    on_two(["script.py", str(folder)], folder)

    def of(kind):
        ends = [torch.load(f"{folder / kind}-{rank}", weights_only=True) for rank in (0, 1)]
        return *ends, folder / kind

    of.folder = folder
    return of


@pytest.mark.parametrize("kind", ["plain", "shards", "shards-lion", "shards-muon", "shards-schedule_free"])
def test_two_processes_take_the_steps_of_one(kind, trained):
    import penjing as pj

    (first, record, lines), (second, _, silent), folder = trained(kind)
    single = pj.fit(net(kind), task(), STRATEGIES[kind], say=[].append)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Muon rounds its products to bfloat16, which may fall on the other side of a half.
    rtol, atol = (0.01, 0.02) if kind == "shards-muon" else (1e-4, 1e-5)
    for name, tensor in single.model.state_dict().items():
        torch.testing.assert_close(first[name], tensor, rtol=rtol, atol=atol)
    assert record["steps"] == single.record.steps
    assert [p["loss"] for p in record["curve"]] == pytest.approx(
        [p.loss for p in single.record.curve], rel=rtol
    )
    assert any("2 processes" in event for event in record["events"])
    assert any("shard of the weights" in event for event in record["events"]) == (kind != "plain")
    assert len(lines) == 3
    assert not silent
    assert sorted(path.name for path in folder.iterdir()) == ["fit.json", "weights.safetensors"]


@pytest.mark.parametrize("kind", ["norm", "shards-average"])
def test_statistics_and_decisions_agree(kind, trained):
    (first, record, _), (second, other, _), _ = trained(kind)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [p["quality"] for p in record["curve"]] == [p["quality"] for p in other["curve"]]
    assert record["quality"] > 0.7


@pytest.mark.parametrize("kind", BROKEN_OFF)
def test_a_run_of_two_that_was_broken_off_ends_with_the_same_weights(kind, trained):
    for rank in (0, 1):
        file = trained.folder / f"broken-{kind}{rank}"
        whole, broken, events = torch.load(file, weights_only=True)
        assert any("went on from a saved state" in event for event in events)
        for name, tensor in whole.items():
            assert torch.equal(tensor, broken[name]), name


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optimizer": "adafactor"}, "sharded tensors"),
        ({"sam": 0.05}, "sam"),
        ({"ghost_batch": 8}, "ghost_batch"),
        ({"recompute": True}, "recompute"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(fields, words):
    import penjing as pj
    from penjing.train.sharding import Sharded

    with pytest.raises(pj.Refused, match=words):
        Sharded(net("shards"), pj.Strategy(shard=True, **fields), 2)


def test_masks_and_watched_layers_do_not_go_with_shards():
    import penjing as pj
    from penjing.backends.torch.masks import set_masks
    from penjing.train.sharding import Sharded

    masked, watched = net("shards"), net("shards")
    set_masks(masked, {"0.weight": np.arange(128).reshape(16, 8) % 2 > 0})
    watched[0].register_forward_hook(lambda *_: None)
    for model, words in ((masked, "mask"), (watched, "watched")):
        with pytest.raises(pj.Refused, match=words):
            Sharded(model, pj.Strategy(shard=True), 2)


def test_one_process_has_nothing_to_shard():
    import penjing as pj

    single, same = (
        pj.fit(net("plain"), task(), pj.Strategy(epochs=1, shard=s), say=[].append) for s in (False, True)
    )
    assert same.record.events == single.record.events
    assert all(map(torch.equal, same.model.parameters(), single.model.parameters()))


def test_the_command_speaks_once(tmp_path):
    (tmp_path / "work.py").write_text(
        f"own = __import__('runpy').run_path({__file__!r})\n"
        "def model():\n    return own['net']('shards')\n"
        "def task():\n    return own['task']()\n"
    )
    settings = ["--set", "epochs=1", "--set", "shard=true"]
    said = on_two(["-m", "penjing", "fit", "work.py", *settings, "--out", "run"], tmp_path)
    assert said.count("weights and record:") == 1
    assert "shard of the weights" in said
