"""The benches from the command line: whole runs, mistakes in one line, and help that teaches."""

import importlib
import json

import pytest
import torch

from bench import attention, command, environment, layernorm, linear_cross_entropy, providers, ratios, softmax, table
from gptlib import reference
from gptlib.errors import UserError


def test_a_whole_run_from_the_command_line(device, tmp_path, capsys):
    flags = ["--seq", "16,32", "--heads", "2", "--head-dim", "8", "--providers", "reference,sdpa", "--budget", "0.01"]
    assert command.run(attention.main, [*flags, "--device", device, "--out", str(tmp_path), "--profile"]) == 0
    printed = capsys.readouterr().out
    assert f"causal_attention on {environment.device_name(device)}: " in printed
    assert "ceiling, measured in this run: matmul " in printed
    assert ("No GPU here" in printed) == (device == "cpu")
    rows = table.read_csv(tmp_path / "attention.csv")
    assert len(rows) == 8 and all(row["status"] == "ok" and row["rate"] > 0 for row in rows)
    assert json.loads((tmp_path / "attention.json").read_text())["complete"] is True
    trace = json.loads((tmp_path / "attention-causal_attention-trace.json").read_text())
    assert {"sdpa fwd", "reference bwd"} <= {event.get("name") for event in trace["traceEvents"]}


def test_the_loss_from_the_command_line(device, tmp_path):
    flags = ["--tokens", "40", "--width", "8", "--classes", "70", "--providers", "reference,torch,triton"]
    common = ["--budget", "0.01", "--device", device, "--out", str(tmp_path)]
    for dtype in ("fp32", "bf16"):
        assert command.run(linear_cross_entropy.main, [*flags, "--dtype", dtype, *common]) == 0
        rows = table.read_csv(tmp_path / "linear_cross_entropy.csv")
        ours = "parity" if device == "cpu" else "ok"
        assert {r["provider"]: r["status"] for r in rows} == {"reference": "ok", "torch": "ok", "triton": ours}
        assert {r["mode"] for r in rows} == {"fwd+bwd"}


def half_the_loss(x, weight, targets):
    return 0.5 * reference.linear_cross_entropy(x, weight, targets)


def test_another_loss_is_refused(device, tmp_path):
    flags = ["--tokens", "40", "--width", "8", "--classes", "70", "--providers", f"{__name__}:half_the_loss"]
    assert command.run(linear_cross_entropy.main, [*flags, "--device", device, "--out", str(tmp_path)]) == 0
    (row,) = table.read_csv(tmp_path / "linear_cross_entropy.csv")
    assert row["status"] == "wrong"


@pytest.mark.parametrize(
    ("main", "flags", "words"),
    [
        (attention.main, ["--seq", "0"], ["--seq", "0 is not at least 1"]),
        (attention.main, ["--seq", "-5"], ["--seq"]),
        (attention.main, ["--seq", "12,x"], ["'x'"]),
        (attention.main, ["--providers", "sdpa,nope"], ["'nope'", "sdpa-flash", "triton-softmax", "xformers"]),
        (attention.main, ["--providers", "no.such:function"], ["--providers no.such:function", "cannot be imported"]),
        (attention.main, ["--providers", "math:sqrt"], ["math:sqrt", "(q, k, v, *, scale=None, dropout_p=0.0)"]),
        (attention.main, ["--dtype", "fp8"], ["'fp8'", "bf16"]),
        (attention.main, ["--mode", "forward"], ["'forward'", "fwd+bwd"]),
        (attention.main, ["--dropout", "1"], ["--dropout", "below 1"]),
        (attention.main, ["--against", "no-such-ref"], ["--against", "git"]),
        (attention.main, ["--wat"], ["--wat"]),
        (attention.main, ["--out", __file__], ["--out", "is a file"]),
        (attention.main, ["--out", f"{__file__}/below"], ["--out", "is a file"]),
        (attention.main, ["--out", ""], ["--out", "is empty"]),
        (attention.main, ["--providers", "flash-attn-3"], ["nobody is left to measure", "flash-attn-3: not usable"]),
        (softmax.main, ["--length", "0"], ["--length"]),
        (softmax.main, ["--op", "sigmoid"], ["'sigmoid'", "causal_softmax"]),
        (softmax.main, ["--providers", "some.module:function"], ["'some.module:function'", "liger"]),
        (layernorm.main, ["--providers", "quack"], ["'quack'", "liger"]),
        (linear_cross_entropy.main, ["--providers", "quack"], ["'quack'", "torch-chunked"]),
        (linear_cross_entropy.main, ["--mode", "bwd"], ["--mode bwd", "only fwd+bwd"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(main, flags, words, device, tmp_path, capsys):
    out = [] if "--out" in flags else ["--out", str(tmp_path)]
    status = command.run(main, [*flags, "--device", device, *out, "--budget", "0.001"])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, capsys):
    assert command.run(attention.main, ["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: --device cuda")


def test_names_that_no_op_has_are_refused():
    with pytest.raises(UserError, match="quack"):
        providers.check_known(["layer_norm"], "quack")
    providers.check_known(["layer_norm", "rms_norm"], "quack")


# ---- another commit --------------------------------------------------------------------------------------------------


@pytest.mark.deep
@pytest.mark.skipif(environment.git_commit() == "unknown", reason="needs a git checkout")
def test_another_commit_is_measured_beside_todays(tmp_path, capsys):
    flags = ["--seq", "64", "--heads", "1", "--head-dim", "16", "--providers", "triton", "--budget", "0.01"]
    assert command.run(attention.main, [*flags, "--against", "HEAD", "--out", str(tmp_path)]) == 0
    rows = table.read_csv(tmp_path / "attention.csv")
    assert [row["provider"] for row in rows] == ["triton", "triton@HEAD"] * 2
    assert len({row["status"] for row in rows}) == 1 and rows[0]["status"] in ("ok", "parity")
    assert rows[0]["max_error"] == rows[1]["max_error"]


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in (environment.ROOT / "bench").glob("*.py") if "def main(argv=None)" in p.read_text())
)
def test_help_is_the_docstring(name, capsys):
    """Whole sentences, not the first line of one."""
    script = importlib.import_module(f"bench.{name}")
    with pytest.raises(SystemExit):
        script.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert " ".join(script.__doc__.split("\n\n")[0].split()) in printed
    assert " ".join(script.__doc__.strip().split("\n\n")[-1].split()) in printed


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert command.run(attention.main, ["--out", str(tmp_path / "new")]) == 2
    assert "cannot be written to; name another folder" in capsys.readouterr().err


def test_what_a_kernel_refuses_is_not_compiled_either(device, tmp_path, monkeypatch, capsys):
    flags = ["--seq", "16", "--head-dim", "512", "--heads", "1", "--providers", "triton", "--budget", "0.01"]
    monkeypatch.setattr("bench.compile_report.compile_all", lambda *args, **options: pytest.fail("compiled"))
    assert command.run(attention.main, [*flags, "--arch", "sm_90", "--device", device, "--out", str(tmp_path)]) == 0
    assert {row["status"] for row in table.read_csv(tmp_path / "attention.csv")} == {"unsupported"}


def test_a_grown_ratio_is_one_line(monkeypatch, tmp_path, capsys):
    def regressed(flags):
        raise ratios.PerformanceRegression("Performance has regressed.")

    monkeypatch.setattr(ratios.pytest, "main", regressed)
    assert command.run(ratios.main, ["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: a ratio grew by more than 25 %")
