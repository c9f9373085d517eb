"""Whole training steps: the losses before the clock, rows by hand, the batch search, bad input."""

import dataclasses
import json

import pytest
import torch

from bench import command, table, timing, train
from bench.arguments import GaveUp
from gptlib import backends, metrics, reference
from gptlib.device import choose_device
from gptlib.model import PRESETS

FLAGS = ["--preset", "tiny", "--n-layers", "1", "--seq", "16", "--batch", "2", "--steps", "3"]


@pytest.fixture
def on(device):
    """Flags for the suite's device."""
    return ["--device", device, *FLAGS]


def losses(setting):
    return train.trial(setting)[0]


def settings(flags):
    args = train.parse(flags)
    return train.settings_of(args, choose_device(args.device))


def test_a_whole_run_from_the_command_line(on, tmp_path, capsys):
    assert command.run(train.main, [*on, "--attn", "reference,sdpa", "--norm", "torch", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"MFU = {metrics.MFU_FORMULA}" in printed and "ceiling, measured in this run: matmul" in printed
    rows = table.read_csv(tmp_path / "train.csv")
    assert [row["provider"] for row in rows] == ["reference+torch+torch", "sdpa+torch+torch"]
    for row in rows:
        assert row["status"] == "ok" and row["loss_difference"] < 2e-2
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["tokens_per_s"] == pytest.approx(2 * 16 / row["p50_ms"] * 1e3, rel=1e-4)
        assert row["peak_mib"] > 3 * 4 * row["parameters"] / 2**20  # weights and two AdamW moments in fp32
        facts = json.loads((tmp_path / "train.json").read_text())
        half = 6 * PRESETS["tiny"].emb_dim * 16  # of one layer: the columns of the square that no query may see
        achieved = (row["flops_per_token"] - half) * row["tokens_per_s"]
        assert row["share"] == pytest.approx(
            achieved / max(v for k, v in facts["ceilings"].items() if k != "copy"), rel=1e-3
        )
    assert facts["complete"] is True and facts["mfu_formula"] == metrics.MFU_FORMULA


def sees_too_much(q, k, v, *, scale=None, dropout_p=0.0):
    return 100 * reference.causal_attention(q, k, v, scale=scale)


def mean_of_values(q, k, v, *, scale=None, dropout_p=0.0):
    return reference.causal_attention(0 * q, 0 * k, v, scale=scale)


def forgets_queries(q, k, v, *, scale=None, dropout_p=0.0):
    return reference.causal_attention(q.detach(), k, v, scale=scale)


def has_another_scale(q, k, v, *, scale=None, dropout_p=0.0):
    return reference.causal_attention(q, k, v, scale=1.1 * (scale or q.shape[-1] ** -0.5))


def test_other_losses_are_refused_before_the_clock(on, tmp_path, capsys):
    name = f"{__name__}:sees_too_much"
    assert command.run(train.main, [*on, "--attn", f"sdpa,{name}", "--norm", "torch", "--out", str(tmp_path)]) == 0
    sdpa, bad = table.read_csv(tmp_path / "train.csv")
    assert sdpa["status"] == "ok" and sdpa["gradient_difference"] < max(train.GRADIENT_TOLERANCE.values()) / 2
    assert bad["status"] == "wrong" and bad["tokens_per_s"] is None
    assert bad["loss_difference"] > 2 * max(train.TOLERANCE.values())
    assert "losses differ" in bad["note"]
    assert "wrong: losses differ" in capsys.readouterr().out


@pytest.mark.parametrize("attend", [mean_of_values, forgets_queries, has_another_scale])
def test_other_gradients_are_refused_where_losses_show_nothing_yet(attend, on):
    """With weights as small as at the start nearly all queries look everywhere alike."""
    (bad,) = settings([*on, "--attn", f"{__name__}:{attend.__name__}", "--norm", "torch", "--dtype", "float32"])
    status, loss, gradient, note = train.Check([bad]).verdict(bad)
    assert loss < train.TOLERANCE[torch.float32]
    assert status == "wrong" and gradient > 10 * train.GRADIENT_TOLERANCE[torch.float32], note
    assert "the gradient of trf_blocks." in note and "W_" in note


def test_all_losses_are_compared_on_the_same_weights_and_tokens(on):
    first, second = settings([*on, "--attn", "sdpa,reference", "--norm", "torch"])
    assert losses(first) == pytest.approx(losses(second), abs=2e-2)
    other = dataclasses.replace(first, cfg=dataclasses.replace(first.cfg, emb_dim=64))
    assert abs(losses(other)[0] - losses(first)[0]) > 1e-4


def test_memory_and_other_errors_become_rows(on, tmp_path, monkeypatch):
    calls = []

    def measure(setting, steps, ceiling):
        calls.append(setting.name)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "measure", measure)
    flags = [*on, "--attn", "reference,sdpa", "--norm", "torch", "--out", str(tmp_path)]
    assert command.run(train.main, flags) == 0
    assert [row["status"] for row in table.read_csv(tmp_path / "train.csv")] == ["oom", "oom"] and len(calls) == 2


def test_once_the_device_is_lost_the_rows_so_far_are_what_there_is(on, tmp_path, monkeypatch, capsys):
    def lost(device, culprit):
        raise GaveUp(culprit)

    monkeypatch.setattr(timing, "require_device", lost)
    name = f"{__name__}:sees_too_much"
    flags = [*on, "--attn", f"sdpa,{name},reference", "--norm", "torch", "--out", str(tmp_path)]
    assert command.run(train.main, flags) == 1
    assert capsys.readouterr().err.endswith(f"error: {name}+torch+torch at 16\n")
    assert [row["status"] for row in table.read_csv(tmp_path / "train.csv")] == ["ok", "wrong"]
    assert json.loads((tmp_path / "train.json").read_text())["complete"] is False


@pytest.mark.parametrize("most", [0, 1, 5, 8, 100, 4096, 5000])
def test_the_largest_batch_is_found(most):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= most

    assert train.largest_batch(fits) == min(most, train.LARGEST_BATCH)
    assert len(tried) <= 26 and max(tried) <= train.LARGEST_BATCH


def test_step_times_count_every_step_after_the_warm_up(device):
    steps = []
    times = train.step_times(lambda: steps.append(1), 4, torch.device(device))
    assert len(times) == 4 and len(steps) == 4 + train.WARMUP_STEPS and all(t >= 0 for t in times)


def test_a_contestant_may_name_all_its_parts_and_a_label_names_the_files(on, tmp_path):
    found = settings([*on, "--attn", "reference+torch,sdpa+reference+reference", "--loss", "torch,triton"])
    names = ["reference+torch+torch", "reference+torch+triton", "sdpa+reference+reference"]
    assert [s.name for s in found] == names
    found = settings([*on, "--attn", "sdpa,reference+reference", "--norm", "torch", "--loss", "torch"])
    assert [s.name for s in found] == ["sdpa+torch+torch", "reference+reference+torch"]
    flags = [*on, "--attn", "sdpa+torch", "--out", str(tmp_path), "--label"]
    assert command.run(train.main, [*flags, "long"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train-long.csv", "train-long.json"]
    assert json.loads((tmp_path / "train-long.json").read_text())["bench"] == "train"
    assert command.run(train.main, [*flags, "a/b"]) == 2


def test_every_attention_meets_every_norm_and_loss(on):
    flags = ["--attn", "reference,sdpa", "--norm", "torch,reference", "--seq", "8,16", "--loss", "torch"]
    found = settings([*on, *flags])
    assert [(s.cfg.context_length, s.name) for s in found[:4]] == [
        (8, "reference+torch+torch"),
        (8, "sdpa+torch+torch"),
        (8, "reference+reference+torch"),
        (8, "sdpa+reference+torch"),
    ]
    assert [s.name for s in settings([*on, "--attn", "sdpa", "--norm", "torch", "--loss", "reference,triton"])] == [
        "sdpa+torch+reference",
        "sdpa+torch+triton",
    ]
    assert len(found) == 8 and {s.cfg.n_layers for s in found} == {1}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--attn", "sdpb"], ["sdpb", *backends.ATTENTION]),
        (["--norm", "batch"], ["batch", *backends.NORM]),
        (["--loss", "hinge"], ["hinge", *backends.LOSS]),
        (["--attn", "no.such:thing"], ["no.such:thing"]),
        (["--preset", "gpt9"], ["gpt9", "gpt2-xl"]),
        (["--seq", "0"], ["--seq"]),
        (["--steps", "-1"], ["--steps"]),
        (["--dtype", "fp8"], ["fp8"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(flags, words, device, tmp_path, capsys):
    assert command.run(train.main, [*flags, "--device", device, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_batch_search_needs_a_gpu(capsys):
    assert command.run(train.main, ["--find-batch"]) == 2
    assert capsys.readouterr().err.startswith("error: --find-batch")
