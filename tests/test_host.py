"""The bench of host time: every op and mode has a row, launches are left out where there is no GPU."""

import pytest
import torch

import kernels
from bench import host, providers, table
from kernels import _runtime


def test_every_public_kernel_is_measured():
    assert host.SHAPES.keys() == set(kernels.__all__)


def test_rows_of_all_modes_with_no_kernel_run(tmp_path, monkeypatch, capsys):
    if _runtime.INTERPRETED:
        monkeypatch.setattr(_runtime.interpreter.InterpretedFunction, "__call__", lambda *_: pytest.fail("launched"))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # it would last
    flags = "--device cpu --calls 3 --op softmax,layer_norm --providers torch,triton --out"
    host.main([*flags.split(), str(tmp_path)])
    rows = table.read_csv(tmp_path / "host.csv")
    seen = [(row["op"], row["provider"], row["mode"], bool(row["note"])) for row in rows]
    assert seen == [
        (op, provider, mode, provider == "triton")
        for op in ("softmax", "layer_norm")
        for provider in ("torch", "triton")
        for mode in host.MODES
    ]
    assert all(0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] for row in rows)
    assert "without Triton's launch" in capsys.readouterr().out


@pytest.mark.parametrize("op", host.SHAPES)
def test_every_op_can_be_called(op, device):
    (provider,), _ = providers.resolve(op, ["triton"])
    for call in host.calls_of(op, provider.call, torch.device(device)).values():
        call()
