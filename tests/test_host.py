"""The bench of host time: every op and mode has a row, wrong providers none; launches are left out without a GPU."""

import pytest
import torch

import kernels
from bench import gate, host, providers, table
from kernels import _runtime

CPU = torch.device("cpu")


def rows_of(op, name, call, calls=3):
    checks = gate.Gate(host.CASES[op][0], providers.reference_of(op), CPU, with_gradients=True)
    return host.measure(op, providers.Provider(name, call), checks, CPU, calls)


def test_every_public_kernel_is_measured():
    assert host.CASES.keys() == set(kernels.__all__)


def test_rows_of_all_modes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # it would last
    flags = "--device cpu --calls 3 --op softmax,layer_norm --providers torch,triton --out"
    host.main([*flags.split(), str(tmp_path)])
    rows = table.read_csv(tmp_path / "host.csv")
    seen = [(row["op"], row["provider"], row["mode"], row["status"], row["note"]) for row in rows]
    assert seen == [
        (op, provider, mode, "measured", note)
        for op in ("softmax", "layer_norm")
        for provider, note in (("torch", None), ("triton", host.NO_LAUNCH))
        for mode in host.MODES
    ]
    assert all(0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] for row in rows)
    assert f"triton: measured: {host.NO_LAUNCH}" in capsys.readouterr().out


@pytest.mark.skipif(not _runtime.INTERPRETED, reason="counts what the interpreter runs")
@pytest.mark.parametrize("op", host.CASES)
def test_our_kernels_are_checked_and_then_not_launched(op, monkeypatch):
    (provider,), _ = providers.resolve(op, ["triton"])
    launched = []
    original = host.leave_out_launches

    def leave_out():
        monkeypatch.setattr(_runtime.interpreter.GridExecutor, "__call__", lambda *_, **__: launched.append(op))
        return original()

    monkeypatch.setattr(host, "leave_out_launches", leave_out)
    rows = rows_of(op, "triton", provider.call)
    assert [row["status"] for row in rows] == ["measured"] * 3 and not launched


def test_who_is_wrong_or_fails_is_not_measured():
    def fails_later(x):
        fails_later.calls += 1
        if fails_later.calls > 1:
            raise RuntimeError("no such device")
        return torch.softmax(x, -1)

    fails_later.calls = 0
    wrong = rows_of("softmax", "wrong", lambda x: torch.softmax(1.01 * x, -1))
    assert [row["status"] for row in wrong] == ["wrong"] * 3 and "max error" in wrong[0]["note"]
    failed = rows_of("softmax", "failed", fails_later)
    assert [(row["status"], row["note"]) for row in failed] == [("failed", "no such device")] * 3
    assert not any("p50_us" in row for row in wrong + failed)
