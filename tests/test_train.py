"""The trainer, run as a user runs it: small model, real text, every kind of attention."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptlib import runfolder, train
from gptlib.data import Batches
from gptlib.device import memory_for
from gptlib.errors import UserError
from gptlib.metrics import COLUMNS, read_metrics
from gptlib.model import GPTConfig
from tests import trainer

CHECKPOINT = ("model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return trainer.real_text(tmp_path_factory.mktemp("train") / "text")


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def succeed(*flags, data):
    code, out, err = trainer.run(*flags, data=data)
    assert code == 0, err
    return out


def same_checkpoint(a, b):
    return all(
        (Path(a) / "checkpoint" / n).read_bytes() == (Path(b) / "checkpoint" / n).read_bytes() for n in CHECKPOINT
    )


LEARNING = ("--log-every", 1, "--drop-rate", 0, "--lr", 1e-2, "--warmup-steps", 0, "--eval-windows", 2)


@pytest.fixture(scope="session")
def on(device):
    """Flags for the suite's device, with losses that can be compared; without them the trainer runs on the CPU."""
    return "--device", device, "--dtype", "float32"


@pytest.fixture(scope="module")
def reference_losses(text, on, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        succeed(*LEARNING, *on, "--steps", 20, "--attn", "reference", "--norm", "reference", "--out", "run", data=text)
    return trainer.losses(folder / "run")


OTHERS = [
    ("sdpa", "torch", "torch"),
    ("sdpa-math", "reference", "reference"),
    ("triton-softmax", "torch", "torch"),
    ("triton", "torch", "torch"),
    ("sdpa", "triton", "torch"),
    ("sdpa", "torch", "triton"),
]


@pytest.mark.parametrize("attn, norm, loss", OTHERS)
def test_losses_equal_the_references(text, reference_losses, attn, norm, loss, device, on):
    names = ("--attn", attn, "--norm", norm, "--loss", loss)
    code, _, err = trainer.run(*LEARNING, *on, "--steps", 20, "--stop-at", 4, *names, "--out", "run", data=text)
    assert code == 0, err
    interpreted = device == "cpu" and "triton" in attn + norm + loss
    assert err.count("interpreter") == interpreted, "said once, and only where it is so"
    expected = reference_losses[:4]
    assert expected[0] - expected[-1] > 0.3, "the model must learn for this to mean something"
    assert trainer.losses("run") == pytest.approx(expected, abs=1e-3)


@pytest.mark.deep
def test_twenty_steps_with_our_kernels(text, reference_losses, on):
    names = ("--attn", "triton", "--norm", "triton", "--loss", "triton")
    succeed(*LEARNING, *on, "--steps", 20, *names, "--out", "run", data=text)
    assert trainer.losses("run") == pytest.approx(reference_losses, abs=1e-3)


@pytest.mark.deep
def test_compile_changes_no_loss(text, on):
    flags = (*on, "--steps", 4, "--log-every", 1, "--eval-windows", 4)
    succeed(*flags, "--out", "a", data=text)
    succeed(*flags, "--compile", "--out", "b", data=text)
    assert trainer.losses("b") == pytest.approx(trainer.losses("a"), abs=1e-4)


def test_batches_do_not_depend_on_attention_or_evaluation(text, monkeypatch):
    seen = []
    next_batch = Batches.next_batch

    def noted(self):
        batch = next_batch(self)
        seen[-1].append(batch)
        return batch

    monkeypatch.setattr(Batches, "next_batch", noted)
    for flags in (
        ("--attn", "reference", "--eval-every", 1, "--sample-every", 2),
        ("--attn", "sdpa", "--drop-rate", 0.2),
    ):
        seen.append([])
        succeed("--steps", 4, "--grad-accum", 2, *flags, data=text)
    assert len(seen[0]) == len(seen[1]) == 8
    for a, b in zip(*seen, strict=True):
        assert all(map(torch.equal, a, b))


def test_accumulated_gradients_are_those_of_the_whole_batch(text):
    common = ("--steps", 3, "--log-every", 1, "--seed", 4)
    succeed(*common, "--batch-size", 4, "--grad-accum", 2, "--out", "a", data=text)
    succeed(*common, "--batch-size", 8, "--out", "b", data=text)
    a, b = (read_metrics(f"{run}/metrics.csv") for run in "ab")
    for key in ("train_loss", "grad_norm", "tokens"):
        assert [r[key] for r in a] == pytest.approx([r[key] for r in b], rel=1e-4)


@pytest.mark.deep
def test_a_run_with_the_devices_defaults_goes_on_where_it_stopped(text, device):
    """On a GPU: our kernels, bf16 and dropout, from a checkpoint with the GPU's random numbers."""
    flags = ("--device", device, "--steps", 8, "--drop-rate", 0.1, "--log-every", 1, "--lr", 1e-2, "--warmup-steps", 0)
    succeed(*flags, "--out", "whole", data=text)
    succeed(*flags, "--out", "parts", "--stop-at", 4, data=text)
    code, out, err = trainer.run("--device", device, "--resume", "--out", "parts")
    assert code == 0, err
    assert f" on {device} -> " in out
    assert trainer.losses("parts") == pytest.approx(trainer.losses("whole"), abs=1e-3)
    assert trainer.losses("whole")[0] - trainer.losses("whole")[-1] > 0.3


def test_resuming_is_exact(text):
    flags = ("--steps", 8, "--drop-rate", 0.1, "--grad-accum", 2)
    succeed(*flags, "--out", "whole", data=text)
    succeed(*flags, "--out", "parts", "--stop-at", 4, data=text)
    assert not same_checkpoint("whole", "parts")
    # Without --data and the rest: a resumed run knows its flags. Evaluating and sampling change nothing.
    code, _, err = trainer.run("--resume", "--out", "parts", "--eval-every", 3, "--sample-every", 2)
    assert code == 0, err
    assert same_checkpoint("whole", "parts")
    assert [r["step"] for r in read_metrics("parts/metrics.csv")] == [4, 6, 8]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(text, monkeypatch, number):
    flags = ("--steps", 6, "--drop-rate", 0.1)
    succeed(*flags, "--out", "whole", data=text)
    next_batch, calls = Batches.next_batch, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return next_batch(self)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "next_batch", interrupted)
        code, out, _ = trainer.run(*flags, "--out", "parts", data=text)
    assert code == 128 + number and len(calls) == 3
    assert "saved at step 3; to go on: --resume --out parts" in out
    assert json.loads(Path("parts/checkpoint/state.json").read_text())["step"] == 3
    assert signal.getsignal(number) is not None and trainer.run("--resume", "--out", "parts")[0] == 0
    assert same_checkpoint("whole", "parts")


def test_a_crash_loses_only_what_came_after_the_last_checkpoint(text, monkeypatch):
    succeed("--steps", 6, "--out", "whole", data=text)
    next_batch, calls = Batches.next_batch, []

    def crashing(self):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError
        return next_batch(self)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "next_batch", crashing)
        with pytest.raises(MemoryError):
            trainer.run("--steps", 6, "--save-every", 2, "--log-every", 1, "--out", "parts", data=text)
    assert json.loads(Path("parts/checkpoint/state.json").read_text())["step"] == 4
    assert trainer.run("--resume", "--out", "parts")[0] == 0
    assert same_checkpoint("whole", "parts")
    assert [r["step"] for r in read_metrics("parts/metrics.csv")] == [1, 2, 3, 4, 5, 6]


def test_what_a_run_leaves_behind(text):
    out = succeed("--steps", 6, "--log-every", 2, "--eval-every", 3, "--sample-every", 3, "--profile", data=text)
    run = Path("runs/tiny-sdpa")
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoint",
        "config.json",
        "loss.png",
        "metrics.csv",
        "profile",
        "tokenizer.json",
    ]
    rows = read_metrics(run / "metrics.csv")
    assert list(rows[0]) == list(COLUMNS)
    assert [(r["step"], r["val_loss"] is not None) for r in rows] == [(2, False), (3, True), (4, False), (6, True)]
    assert [r["tokens"] for r in rows] == [256, 384, 512, 768]
    config = json.loads((run / "config.json").read_text())
    assert config["arguments"]["steps"] == 6 and config["arguments"]["lr"] == train.options.DEFAULTS["tiny"]["lr"]
    assert config["model"]["vocab_size"] == 257 and config["versions"]["torch"] == torch.__version__
    assert {"commit", "command", "machine", "tokenizer", "data"} <= config.keys()
    assert "aten::" in (run / "profile/top_ops.txt").read_text()
    assert json.loads((run / "profile/trace.json").read_text())["traceEvents"]
    for phrase in ("bits per byte", "unigram entropy", "MFU n/a = (6 N + 12 L C T)", "    | ", f"--run {run} --prompt"):
        assert phrase in out
    succeed("--steps", 1, data=text)
    assert Path("runs/tiny-sdpa-2/checkpoint").is_dir(), "a taken default name is numbered"


def test_a_run_folder_is_not_overwritten_unasked(text):
    succeed("--steps", 2, "--out", "mine", data=text)
    Path("mine/notes.txt").write_text("keep")
    before = Path("mine/checkpoint/model.safetensors").read_bytes()
    code, _, err = trainer.run("--steps", 3, "--out", "mine", data=text)
    assert code == 2 and "mine holds a run; add --resume or --overwrite" in err
    assert Path("mine/checkpoint/model.safetensors").read_bytes() == before
    succeed("--steps", 3, "--out", "mine", "--overwrite", data=text)
    assert [r["step"] for r in read_metrics("mine/metrics.csv")] == [3]
    runfolder.claim(SimpleNamespace(out="mine", overwrite=True))
    assert [p.name for p in Path("mine").iterdir()] == ["notes.txt"], "a run goes whole, and nothing else goes"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--emb-dim", 48], "--emb-dim 48 differs from the run resumed (32)"),
        (["--tokenizer", "corpus"], "--tokenizer corpus differs"),
        (["--data", "elsewhere"], "--data ['elsewhere'] differs"),
        (["--seed", 7], "--seed 7 differs from the run resumed (0)"),
        (["--steps", 2], "is at step 2 already; raise --steps or --stop-at (now 2)"),
        (["--overwrite"], "not allowed with argument"),
    ],
)
def test_resuming_refuses_another_model_other_data_and_a_finished_run(text, flags, message):
    succeed("--steps", 2, "--out", "mine", data=text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "SHAPE", [])
        code, _, err = trainer.run("--resume", "--out", "mine", *flags)
    assert code == 2 and message in err and err.count("\n") == 1


def test_resuming_refuses_changed_text(tmp_path):
    data = trainer.real_text(tmp_path / "text")
    succeed("--steps", 2, "--out", "mine", data=data)
    (tmp_path / "text" / "more.py").write_text("print('more')\n" * 50)
    code, _, err = trainer.run("--resume", "--out", "mine", "--steps", 4)
    assert code == 2 and "has changed" in err


BAD_INPUT = [
    (["--preset", "huge"], "--preset: invalid choice: 'huge'"),
    (["--attn", "flash"], "--attn flash: unknown; it can be reference, sdpa"),
    (["--norm", "batch"], "--norm batch: unknown; it can be reference, torch, triton"),
    (["--loss", "hinge"], "--loss hinge: unknown; it can be reference, torch, triton or package.module:function"),
    (["--attn", "flex"], "--attn flex has no backward on a CPU"),
    (["--attn", "flex", "--drop-rate", 0.1], "--attn flex has no dropout"),
    (["--n-heads", 5], "emb_dim 32 is not a multiple of n_heads 5"),
    (["--steps", "abc"], "--steps: 'abc' is not a positive integer"),
    (["--steps", 0], "--steps: 0 is not at least 1"),
    (["--seed", 2**63], "--seed: 9223372036854775808 is not below 2^63"),
    (["--out", "/proc/no/such/folder"], "--out /proc/no/such/folder cannot be made: "),
    (["--lr", "nan"], "--lr: nan is not a positive number"),
    (["--drop-rate", 1], "--drop-rate: 1 is not at least 0 and below 1"),
    (["--dtype", "int8"], "--dtype: invalid choice"),
    (["--device", "tpu"], "--device tpu: unknown"),
    (["--device", "cuda:9"], "--device cuda:9: torch"),
    (["--unknown-flag"], "unrecognized arguments: --unknown-flag"),
    (["--vocab-size", 100], "--vocab-size 100 is too small for the 257 tokens of --tokenizer bytes"),
    (["--context-length", 100_000], "too small"),
    (["--emb-dim", 10**12], "out of memory for a model of 24,000,000,0"),
    (["--emb-dim", 2**63], "--emb-dim: 9223372036854775808 is not below 2^63"),
    (["--vocab-size", 10**18], "out of memory for a model of 32,000,000,"),
    (["--batch-size", 100_000], "too small"),
    (["--data", "nowhere.txt"], "nowhere.txt"),
    (["--data", "empty.txt"], "empty.txt"),
    (["--data", "binary.bin"], "binary.bin"),
    (["--data", "short.txt"], "too small"),
    (["--resume"], "--resume needs the run folder"),
    (["--overwrite"], "--overwrite needs the run folder"),
    (["--resume", "--out", "nowhere"], "nowhere holds no checkpoint"),
    (["--out", "short.txt"], "--out short.txt is a file"),
]


@pytest.mark.parametrize(
    "flags, message", BAD_INPUT, ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else ""
)
def test_bad_input_is_one_line_and_writes_nothing(text, flags, message):
    Path("empty.txt").touch()
    Path("binary.bin").write_bytes(bytes(range(256)) * 20)
    Path("short.txt").write_text("a few words\n")
    before = sorted(p for p in Path().iterdir())
    code, out, err = trainer.run(*flags, data=None if "--data" in flags else text)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert [p for p in sorted(Path().iterdir()) if p.name != "runs"] == before
    assert [p for p in Path().glob("runs/*") if p.name != "data"] == []


def test_a_loss_that_explodes_ends_the_run(text):
    code, _, err = trainer.run("--steps", 40, "--lr", 1e20, "--clip", 1e30, "--warmup-steps", 0, data=text)
    assert code == 2 and "the loss is nan" in err and "lower --lr" in err


def test_weights_that_explode_are_not_saved(text):
    code, _, err = trainer.run("--steps", 1, "--lr", 1e39, "--warmup-steps", 0, "--out", "run", data=text)
    assert code == 2 and "the weights are not finite at step 1, and were not saved" in err
    assert not Path("run/checkpoint").exists()


def test_decay_is_on_matrices_only():
    cfg = GPTConfig(vocab_size=11, context_length=4, emb_dim=8, n_heads=2, n_layers=1, qkv_bias=True)
    model = train.build_model(cfg, attn="reference", norm="reference")
    optimizer = train.make_optimizer(model, lr=1.0, weight_decay=0.5)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decays[id(p)] == (0.0 if name.endswith(("bias", "scale", "shift")) else 0.5), name


def test_only_a_lack_of_memory_is_called_one():
    cfg = GPTConfig()
    with pytest.raises(UserError, match="out of memory for a model of 163,009,536 parameters"), memory_for(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shapes differ"), memory_for(cfg):
        raise RuntimeError("shapes differ")


def test_a_seed_is_a_model():
    cfg = GPTConfig(vocab_size=11, context_length=4, emb_dim=8, n_heads=2, n_layers=1)
    weights = [train.build_model(cfg, attn="sdpa", norm="torch", seed=s).out_head.weight for s in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_evaluation_is_the_mean_over_tokens():
    cfg = GPTConfig(vocab_size=11, context_length=4, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.5)
    model = train.build_model(cfg, attn="reference", norm="reference")
    tokens = torch.randint(11, (29,)).numpy()  # seven windows: a last batch of one row
    losses = [train.evaluate(model, model.loss, tokens, batch_size=n) for n in (1, 3, 7)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6) and model.training


@pytest.mark.deep
def test_the_command_line_in_a_process_of_its_own(text, tmp_path):
    root = Path(train.__file__).parents[1]
    command = [
        sys.executable,
        "-m",
        "gptlib.train",
        *trainer.SHAPE,
        "--data",
        text,
        "--steps",
        "100000",
        "--out",
        "run",
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.terminate()
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM and "SIGTERM: saved at step" in rest
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()
