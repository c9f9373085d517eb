"""Formulas against worked numbers, and the file of metrics."""

import math
import os

import pytest
import torch

from gptlib import metrics
from gptlib.errors import UserError
from gptlib.model import PRESETS, GPTModel


@pytest.mark.parametrize("causal_half, expected", [(False, 8.55e8), (True, 7.98e8)])
def test_flops_per_token_of_gpt2(causal_half, expected):
    with torch.device("meta"):
        model = GPTModel(PRESETS["gpt2"])
    assert metrics.flops_per_token(model, 1024, causal_half=causal_half) == pytest.approx(expected, rel=1e-3)


def test_an_untied_head_multiplies_as_much_as_a_tied_one():
    shape = {"vocab_size": 50, "context_length": 8, "emb_dim": 12, "n_heads": 2, "n_layers": 1}
    tied, untied = (GPTModel({**shape, "tie_weights": tie}) for tie in (True, False))
    assert metrics.flops_per_token(tied, 8) == metrics.flops_per_token(untied, 8)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA L40", None),
    ],
)
def test_peaks_are_known_or_none(name, peak):
    assert metrics.peak_flops(name) == peak


def test_mfu(monkeypatch):
    with torch.device("meta"):
        model = GPTModel(PRESETS["gpt2"])
    assert metrics.mfu(model, 1024, 1e5, torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert metrics.mfu(model, 1024, 468e3, torch.device("cuda")) == pytest.approx(0.4046, abs=1e-3)


def test_bits_per_byte():
    assert metrics.bits_per_byte(math.log(2) * 6, n_tokens=10, n_bytes=30) == pytest.approx(2.0)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells the peak in another place too")
def test_memory_is_that_of_this_process():
    with open("/proc/self/status") as f:
        peak_kib = next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))
    assert metrics.peak_memory_mb(torch.device("cpu")) == pytest.approx(peak_kib / 1024, rel=0.02)


def row(step, **values):
    return dict.fromkeys(metrics.COLUMNS) | {"step": step} | values


def test_rows_are_kept_up_to_the_step_resumed(tmp_path):
    path = tmp_path / "metrics.csv"
    log = metrics.MetricsFile(path)
    for step in (10, 20, 30):
        log.append(**row(step, train_loss=step / 3))
    log = metrics.MetricsFile(path, last_step=20)
    log.append(**row(25, val_loss=1.5))
    assert metrics.read_metrics(path) == [
        row(10, train_loss=3.33333),
        row(20, train_loss=6.66667),
        row(25, val_loss=1.5),
    ]
    assert path.read_text().splitlines()[0] == ",".join(metrics.COLUMNS)
    assert metrics.MetricsFile(path).path == path and metrics.read_metrics(path) == []


def test_the_curve_is_drawn_from_rows_with_gaps(tmp_path):
    rows = [row(1, train_loss=3.0), row(2, train_loss=2.0, val_loss=2.5), row(3, val_loss=2.2)]
    for some in (rows, rows[:1]):
        metrics.draw_loss_curve(some, tmp_path / "loss.png", unigram_entropy=4.0, title="t")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def two_rows(path, then=""):
    log = metrics.MetricsFile(path)
    for step in (10, 20):
        log.append(**row(step, train_loss=2.5))
    with open(path, "a", newline="") as f:
        f.write(then)


TORN = [
    "30,1536,4.9e-",
    "30,15",
    "30,1536,4.9,,,,,,12",
    "30,15\n",
    "\0\0\0\0",
    "\0\0\n",
    "30,x,,,,,,,\r\n",
    ",,,,,,,,\r\n",
]


@pytest.mark.parametrize("torn", TORN)
def test_a_last_row_that_was_cut_off_is_left_out(tmp_path, torn):
    path = tmp_path / "metrics.csv"
    two_rows(path, then=torn)
    metrics.MetricsFile(path, last_step=30).append(**row(25))
    assert [r["step"] for r in metrics.read_metrics(path)] == [10, 20, 25]


@pytest.mark.parametrize("size", [0, 8, len(metrics.HEADER)])
def test_a_header_that_was_cut_off_is_written_again(tmp_path, size):
    path = tmp_path / "metrics.csv"
    path.write_text(metrics.HEADER[:size])
    metrics.MetricsFile(path, last_step=30).append(**row(25))
    assert metrics.read_metrics(path) == [row(25)]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: two_rows(path, then="30,15\n40,,,,,,,,\n"), r"line 4 is damaged \(2 cells, not 9\)"),
        (lambda path: two_rows(path, then="x,,,,,,,,\n40,,,,,,,,\n"), "line 4 is damaged"),
        (lambda path: path.write_text("epoch,loss\n1,2\n"), "does not begin with the columns"),
        (lambda path: path.write_text("epoch,loss"), "does not begin with the columns"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    ],
)
def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path, damage, message):
    path = tmp_path / "metrics.csv"
    damage(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UserError, match=f"metrics.csv.*{message}.*to go on") as e:
        metrics.MetricsFile(path, last_step=30)
    assert "\n" not in str(e.value) and before == (path.read_bytes() if path.is_file() else None)


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    path = tmp_path / "metrics.csv"
    log = metrics.MetricsFile(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"metrics\.csv cannot be written: Is a directory"):
        log.append(**row(1))
    path = tmp_path / "loss.png"
    path.mkdir()
    with pytest.raises(UserError, match=r"loss\.png cannot be written: Is a directory"):
        metrics.draw_loss_curve([row(1, train_loss=3.0)], path, unigram_entropy=4.0, title="t")
