"""The matrix of Triton versions, with reports that are there already instead of installations."""

import json
from pathlib import Path

import pytest

from bench import command, compile_matrix, compile_report, table

ROW = dict.fromkeys(compile_report.COLUMNS) | {
    "arch": "sm_90",
    "case": "c",
    "kernel": "k_kernel",
    "config": "BLOCK_Q=64",
}
CLEAN = ROW | {"status": "ok", "spill_bytes": 0, "programs_per_sm": 1, "missing": ""}


def test_summary_and_differences():
    rows = {
        "3.6.0": [CLEAN, CLEAN | {"case": "d", "spill_bytes": 16}],
        "3.9.0": [CLEAN, CLEAN | {"case": "d"}, ROW | {"case": "e", "status": "PassManager::run failed"}],
    }
    (old,) = compile_matrix.summarize("3.6.0", rows["3.6.0"])
    (new,) = compile_matrix.summarize("3.9.0", rows["3.9.0"])
    assert (old["configurations"], old["spilling"], old["most_spill_bytes"], old["faults"]) == (2, 1, 16, 1)
    assert (new["configurations"], new["spilling"], new["faults"], new["not_compiling"]) == (3, 0, 1, 1)
    assert compile_matrix.compare(rows) == {
        "sm_90 d k_kernel BLOCK_Q=64": {"3.6.0": "spills 16 bytes per thread, at most 0 allowed"},
        "sm_90 e k_kernel BLOCK_Q=64": {"3.9.0": "PassManager::run failed"},
    }


def test_every_version_is_installed_apart_and_reported(tmp_path, monkeypatch, capsys):
    installed = []

    def install(version, folder):
        installed.append((version, Path(folder)))

    def report(folder, archs, jobs):
        path = Path(folder) / "report.csv"
        table.write_csv(path, [CLEAN | {"spill_bytes": 8 * len(installed)}], compile_report.COLUMNS)
        return table.read_csv(path)

    monkeypatch.setattr(compile_matrix, "install", install)
    monkeypatch.setattr(compile_matrix, "report", report)
    arguments = ["--triton", "1.0,2.0", "--arch", "sm_90", "--out", str(tmp_path), "--commit", "abc"]
    assert command.run(compile_matrix.main, arguments) == 0
    assert [version for version, _ in installed] == ["1.0", "2.0"]
    assert not any(folder.exists() for _, folder in installed), "nothing is left behind"
    lines = table.read_csv(tmp_path / "matrix.csv")
    assert [(line["triton"], line["most_spill_bytes"]) for line in lines] == [(1, 8), (2, 16)]
    facts = json.loads((tmp_path / "matrix.json").read_text())
    assert facts["commit"] == "abc" and len(facts["faults"]["sm_90 c k_kernel BLOCK_Q=64"]) == 2
    assert "spills 16 bytes" in capsys.readouterr().out


def test_a_version_that_pip_does_not_have_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # no need to ask the network
    with pytest.raises(compile_matrix.UserError, match=r"pip cannot install triton==0\.0\.0: ERROR"):
        compile_matrix.install("0.0.0", tmp_path)
