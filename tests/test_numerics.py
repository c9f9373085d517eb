"""The table of errors: it measures what it says, and leaves its files."""

import json

import pytest
import torch

import kernels
from bench import command, numerics, table
from gptlib import reference


def softmax_case(ours, device):
    x = torch.randn(6, 20, device=device)
    return numerics.Case(
        "softmax", (6, 20), "normal", {"x": x}, ours, reference.softmax, {"torch": reference.softmax}, {}
    )


def test_errors_are_in_units_of_a_rounding_and_judged_by_the_rule(device):
    good = list(numerics.measure(softmax_case(kernels.softmax, device), torch.float32))
    assert [row["result"] for row in good] == ["y", "dx"]
    assert all(row["within"] == "yes" and 0 < row["triton"] < 4 for row in good)
    (y, _) = numerics.measure(softmax_case(lambda x: kernels.softmax(x) + 1e-3, device), torch.float32)
    assert y["within"] == "no"
    assert y["triton"] * y["unit"] == pytest.approx(1e-3, rel=1e-3)


def test_the_command_writes_its_table(tmp_path, monkeypatch, capsys, device):
    monkeypatch.setitem(numerics.SECTIONS, "rows", lambda device: [softmax_case(kernels.softmax, device)])
    numerics.main(["--section", "rows", "--dtype", "fp32,bf16", "--device", device, "--out", str(tmp_path)])
    rows = table.read_csv(tmp_path / "numerics_rows.csv")
    assert [(row["result"], row["dtype"]) for row in rows] == [
        (result, dtype) for dtype in ("float32", "bfloat16") for result in ("y", "dx")
    ]
    assert json.loads((tmp_path / "numerics_rows.json").read_text())["section"] == "rows"
    assert "softmax" in capsys.readouterr().out


def test_a_call_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, device):
    def breaks(x):
        raise RuntimeError("out of resource: shared memory")

    cases = [softmax_case(breaks, device), softmax_case(kernels.softmax, device)]
    monkeypatch.setitem(numerics.SECTIONS, "rows", lambda device: cases)
    flags = ["--section", "rows", "--dtype", "fp32", "--device", device, "--out", str(tmp_path)]
    assert command.run(numerics.main, flags) == 1
    rows = table.read_csv(tmp_path / "numerics_rows.csv")
    assert [row["within"] for row in rows] == ["failed: out of resource: shared memory", "yes", "yes"]
