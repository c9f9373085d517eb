"""Checkpoints: bit for bit, whole whenever a process dies, and clear about damage."""

import dataclasses
import json
import os
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptlib import checkpoint
from gptlib.data import Batches
from gptlib.errors import UserError
from gptlib.model import GPTConfig
from gptlib.train import build_model, make_optimizer, train_step

SMALL = GPTConfig(vocab_size=31, context_length=8, emb_dim=12, n_heads=2, n_layers=2, drop_rate=0.1, tie_weights=True)
CORPUS = SimpleNamespace(tokenizer=SimpleNamespace(hash="t" * 64), fingerprint="d" * 64)


class Training:
    """A model in the middle of its training."""

    def __init__(self, seed=0, cfg=SMALL):
        self.model = build_model(cfg, attn="reference", norm="reference", seed=seed)
        self.optimizer = make_optimizer(self.model, lr=1e-2)
        tokens = torch.arange(500).remainder(31).numpy()
        self.batches = Batches(tokens, context_length=8, batch_size=2, seed=3)

    def run(self, steps):
        for _ in range(steps):
            train_step(self.model.loss, self.optimizer, [self.batches.next_batch()], lr=1e-2)

    def save(self, run, step):
        checkpoint.save(run, self.model, self.optimizer, self.batches, CORPUS, step)

    def restore(self, run):
        return checkpoint.restore(run, self.model, self.optimizer, self.batches, CORPUS)


def weights(run):
    return load_file(checkpoint.find(run) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_everything_comes_back(tmp_path):
    first = Training()
    first.run(3)
    first.save(tmp_path, 3)
    first.run(3)  # dropout draws from torch's generator, so this also proves that generator's return
    second = Training(seed=1)
    assert second.restore(tmp_path) == 3
    second.run(3)
    assert same(first.model.state_dict(), second.model.state_dict())
    first.save(tmp_path / "a", 6)
    second.save(tmp_path / "b", 6)
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"):
        a, b = ((tmp_path / run / "checkpoint" / name).read_bytes() for run in "ab")
        assert a == b, name


def test_a_tied_head_is_stored_once_and_a_model_comes_back_for_use(tmp_path):
    training = Training()
    training.run(1)
    training.save(tmp_path, 1)
    assert "out_head.weight" not in weights(tmp_path)
    model = checkpoint.load_model(tmp_path, attn="sdpa", norm="torch")
    assert model.cfg == SMALL and model.out_head.weight is model.tok_emb.weight
    assert same(model.state_dict(), training.model.state_dict())


def test_no_file_is_a_pickle(tmp_path):
    training = Training()
    training.run(1)
    training.save(tmp_path, 1)
    names = sorted(p.name for p in (tmp_path / "checkpoint").iterdir())
    assert names == ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


class Killed(BaseException):
    pass


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Die before and after each call that touches the disk, one after the other, then go on from what is left."""
    old, new = Training(), Training()
    old.run(1)
    new.run(2)
    real = {name: getattr(owner, name) for owner, name in CALLS}
    moments = 0
    while True:
        run = tmp_path / str(moments)
        old.save(run, 1)
        countdown = [moments]
        with monkeypatch.context() as patch:
            for owner, name in CALLS:
                patch.setattr(owner, name, dying(real[name], countdown))
            try:
                new.save(run, 2)
                finished = True
            except Killed:
                finished = False
        if finished:
            break
        after = Training(seed=9)
        step = after.restore(run)
        expected = {1: old, 2: new}[step]
        assert same(after.model.state_dict(), expected.model.state_dict()), f"moment {moments}"
        new.save(run, 3)
        assert Training(seed=9).restore(run) == 3 and [p.name for p in run.iterdir()] == ["checkpoint"]
        moments += 1
    assert moments >= 14, "the test no longer reaches the calls that save makes"


CALLS = [(checkpoint, "save_file"), (os, "replace"), (os, "rename"), (shutil, "rmtree")]


def dying(call, countdown):
    """`call`, but the process dies before it when the countdown reaches 0 and after it at the next even count."""

    def wrapped(*args, **kwargs):
        if countdown[0] == 0:
            if call is shutil.rmtree:  # dies half-way: something is gone already
                for file in list(args[0].glob("*"))[:1]:
                    file.unlink()
            raise Killed
        result = call(*args, **kwargs)
        if countdown[0] == 1:
            raise Killed
        countdown[0] -= 2
        return result

    return wrapped


def test_other_text_other_shapes_and_damage_are_refused(tmp_path):
    training = Training()
    training.run(1)
    training.save(tmp_path, 1)
    other = SimpleNamespace(tokenizer=CORPUS.tokenizer, fingerprint="e" * 64)
    with pytest.raises(UserError, match="has changed"):
        checkpoint.restore(tmp_path, training.model, training.optimizer, training.batches, other)
    with pytest.raises(UserError, match="does not fit the model: size mismatch"):
        Training(cfg=dataclasses.replace(SMALL, vocab_size=32)).restore(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find(tmp_path / "nowhere")
    folder = tmp_path / "checkpoint"
    whole = (folder / "state.json").read_text()
    (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match="lacks one of batches, data_fingerprint"):
        checkpoint.load_state(tmp_path)
    (folder / "state.json").write_text(whole)
    for name in ("optimizer.safetensors", "model.safetensors", "state.json"):
        (folder / name).write_bytes((folder / name).read_bytes()[:50])
        with pytest.raises(UserError, match=rf"{name} cannot be read .*damaged") as e:
            Training().restore(tmp_path)
        assert "\n" not in str(e.value)


@pytest.fixture
def saved(tmp_path):
    training = Training()
    training.run(1)
    training.save(tmp_path, 1)
    return tmp_path


def refused(run, message):
    with pytest.raises(UserError, match=message) as e:
        Training().restore(run)
    assert "\n" not in str(e.value)


def edit(run, name, change):
    path = run / "checkpoint" / name
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


MOMENT = "final_norm.scale.exp_avg"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update({MOMENT: torch.zeros(1)}), r"exp_avg: float32 \(1,\), not float32 \(12,\)"),
        (lambda t: t.update({MOMENT: torch.zeros(3, 4)}), r"exp_avg: float32 \(3, 4\), not float32 \(12,\)"),
        (lambda t: t.update({MOMENT: torch.zeros(12).double()}), r"exp_avg: float64 \(12,\), not float32 \(12,\)"),
        (lambda t: t.update({"final_norm.scale.step": torch.ones(2)}), r"step: float32 \(2,\), not float32 \(\)"),
        (lambda t: t.pop(MOMENT), r"exp_avg: NoneType, not float32 \(12,\)"),
        (lambda t: t.clear(), r": NoneType, not float32 .*"),
        (lambda t: t.update({"another.exp_avg": torch.zeros(1)}), r"another.exp_avg: float32 \(1,\), not NoneType"),
        (lambda t: t.update({"final_norm.scale.max": torch.zeros(1)}), r"scale.max: float32 \(1,\), not NoneType"),
    ],
)
def test_moments_that_do_not_fit_the_model_are_refused(saved, change, message):
    edit(saved, "optimizer.safetensors", change)
    refused(saved, rf"optimizer.safetensors does not fit the model \(.*{message}\); the checkpoint is damaged")


def test_a_run_stopped_before_its_first_step_has_no_moments(tmp_path):
    Training().save(tmp_path, 0)
    assert Training().restore(tmp_path) == 0


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda t: t.pop("cpu"), "it lacks cpu"),
        (lambda t: t.update(cpu=torch.zeros(5056)), "ByteTensor"),
        (lambda t: t.update(cpu=torch.zeros(3, dtype=torch.uint8)), "state size to be 3"),
    ],
)
def test_a_damaged_random_state_is_refused(saved, change, reason):
    edit(saved, "random.safetensors", lambda t: (t.update(other=torch.zeros(1)), change(t)))
    refused(saved, rf"random.safetensors holds no state .*{reason}.*the checkpoint is damaged")


STATE = [
    ({"model": {}}, "model must hold vocab_size, "),
    ({"model": None}, "model must hold vocab_size, "),
    ({"model": dataclasses.asdict(SMALL) | {"extra": 1}}, "model must hold .* and nothing else"),
    ({"model": dataclasses.asdict(SMALL) | {"n_layers": "2"}}, "n_layers of the model is '2'"),
    ({"model": dataclasses.asdict(SMALL) | {"n_layers": True}}, "n_layers of the model is True"),
    ({"model": dataclasses.asdict(SMALL) | {"drop_rate": None}}, "drop_rate of the model is None"),
    ({"model": dataclasses.asdict(SMALL) | {"n_heads": 5}}, "emb_dim 12 is not a multiple of n_heads 5"),
    ({"step": "x"}, "step is 'x'"),
    ({"step": -1}, "step is -1"),
    ({"tokenizer_hash": 7}, "tokenizer_hash is 7"),
]


@pytest.mark.parametrize("change, reason", STATE)
def test_a_damaged_state_is_refused(saved, change, reason):
    path = saved / "checkpoint/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(saved, rf"state.json cannot be read \(.*{reason}.*\); the checkpoint is damaged")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_model(saved, attn="sdpa", norm="torch")


@pytest.mark.parametrize("text, reason", [("[" * 100_000, "nested too deeply"), ("[]", "not a JSON object")])
def test_a_state_that_is_no_object_is_refused(saved, text, reason):
    (saved / "checkpoint/state.json").write_text(text)
    refused(saved, rf"state.json cannot be read \(it is {reason}\)")


@pytest.mark.parametrize("name, value", [("n_heads", 3), ("n_layers", 1), ("drop_rate", 0.5)])
def test_a_state_of_another_model_is_refused(saved, name, value):
    path = saved / "checkpoint/state.json"
    state = json.loads(path.read_text())
    state["model"][name] = value
    path.write_text(json.dumps(state))
    refused(saved, rf"state.json says {name} {value}, the run's config.json {getattr(SMALL, name)}")


def test_a_full_disk_leaves_the_old_checkpoint(saved):
    """A limit on the size of files stands in for the disk: the first file fits no more."""
    training, limits = Training(), resource.getrlimit(resource.RLIMIT_FSIZE)
    training.run(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"{saved}/checkpoint cannot be written: .*too large") as e:
            training.save(saved, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(e.value) and [p.name for p in saved.iterdir()] == ["checkpoint"]
    assert Training().restore(saved) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(saved, value):
    training = Training()
    training.run(1)
    with torch.no_grad():
        training.model.final_norm.scale[3] = value
    with pytest.raises(UserError, match="the weights are not finite at step 2, and were not saved"):
        training.save(saved, 2)
    assert Training().restore(saved) == 1


def test_weights_of_integers_are_refused(saved):
    edit(saved, "model.safetensors", lambda t: t.update({"final_norm.scale": torch.ones(12, dtype=torch.int8)}))
    refused(
        saved, r"model.safetensors does not fit the model: final_norm.scale is int8 \(12,\); the checkpoint is damaged"
    )


@pytest.mark.parametrize(
    "size, message", [(10**14, "out of memory for a model of .*state.json asks"), (10**30, "vocab_size")]
)
def test_a_state_that_asks_for_a_huge_model_is_refused(saved, size, message):
    path = saved / "checkpoint/state.json"
    state = json.loads(path.read_text())
    state["model"]["vocab_size"] = size
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=message):
        checkpoint.load_model(saved, attn="sdpa", norm="torch")
