"""`make gpu`: time shared out, failing steps passed over, all saved as it comes; with a fake clock and tiny steps."""

import json
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import (
    attention,
    command,
    cross_entropy,
    curves,
    gpu,
    harness,
    layernorm,
    linear_cross_entropy,
    memcheck,
    output,
    softmax,
    table,
    train,
)
from bench.gpu import Outcome, Step


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def steps(*names):
    return [Step(name, 1.0, ("true",)) for name in names]


def run_all(plan, minutes, out, script):
    """`script`: {step: (seconds it takes, status) or an exception}; returns outcomes and the limits that were given."""
    clock, limits = Clock(), {}

    def run_step(step, limit_s, log):
        limits[step.name] = limit_s
        happening = script[step.name]
        if isinstance(happening, BaseException):
            raise happening
        log.write_text(f"log of {step.name}\n")
        clock.seconds += happening[0]
        return Outcome(step.name, happening[1], *happening[:1], limit_s)

    return gpu.run_all(plan, minutes, out, run_step, now=clock), limits


def test_what_a_step_leaves_goes_to_the_later_ones(tmp_path):
    plan = [Step("a", 1.0, ()), Step("b", 2.0, ()), Step("c", 1.0, ())]
    outcomes, limits = run_all(plan, 2, tmp_path, {"a": (6, "ok"), "b": (76, "ok"), "c": (1, "ok")})
    assert limits == {"a": 30.0, "b": pytest.approx(114 * 2 / 3), "c": pytest.approx(38.0)}
    assert [o.status for o in outcomes] == ["ok", "ok", "ok"]


def test_a_failing_step_is_reported_and_passed_over(tmp_path, capsys):
    script = {"a": (1, "ok"), "b": (1, "failed"), "c": (1, "out of time"), "d": (1, "ok")}
    outcomes, _ = run_all(steps("a", "b", "c", "d"), 1, tmp_path, script)
    assert [o.status for o in outcomes] == ["ok", "failed", "out of time", "ok"]
    printed = capsys.readouterr().out
    assert "[2/4] b, at most" in printed and "failed after 1 s" in printed
    last = gpu.summary(outcomes).splitlines()
    assert len(last) == 4 and last[1].split()[:2] == ["b", "failed"]


def test_steps_without_time_are_not_started(tmp_path):
    outcomes, limits = run_all(steps("a", "b"), 0.2, tmp_path, {"a": (11, "out of time"), "b": (1, "ok")})
    assert [o.status for o in outcomes] == ["out of time", "not started"]
    assert list(limits) == ["a"]


def test_everything_is_saved_as_it_comes(tmp_path):
    script = {"a": (1, "ok"), "b": (1, "failed"), "c": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_all(steps("a", "b", "c"), 1, tmp_path, script)
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert [(o["name"], o["status"]) for o in saved] == [("a", "ok"), ("b", "failed")]
    with tarfile.open(tmp_path / gpu.ARCHIVE) as archive:
        assert sorted(archive.getnames()) == ["gpu/01-a.log", "gpu/02-b.log", "gpu/summary.json"]
        assert archive.extractfile("gpu/02-b.log").read() == b"log of b\n"


def test_weights_that_a_killed_training_left_are_not_archived(tmp_path):
    for name in ("checkpoint", "checkpoint.partial"):
        (tmp_path / "curves" / "sdpa" / name).mkdir(parents=True)
        (tmp_path / "curves" / "sdpa" / name / "model.safetensors").write_bytes(b"gigabytes")
    (tmp_path / "curves" / "sdpa" / "metrics.csv").write_text("step\n")
    gpu.save([], tmp_path)
    with tarfile.open(tmp_path / gpu.ARCHIVE) as archive:
        assert sorted(archive.getnames()) == ["gpu/curves/sdpa/metrics.csv", "gpu/summary.json"]


# ---- real processes --------------------------------------------------------------------------------------------------


def python(code):
    return Step("step", 1.0, (sys.executable, "-c", code))


def test_a_step_runs_compiled_and_from_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "/packages/of/the/user")
    code = """
import os, sys, bench.table
assert os.path.exists("bench") and "TRITON_INTERPRET" not in os.environ
assert sys.path.index("/packages/of/the/user") > sys.path.index(os.getcwd())
"""
    outcome = gpu.run_step(python(code), 60, tmp_path / "log")
    assert outcome.status == "ok", outcome


def test_a_step_that_fails_says_so_with_its_last_line(tmp_path):
    code = r"import sys; print('\x1b[31mlost\x1b[0m the plot\n---\n'); sys.exit(3)"
    outcome = gpu.run_step(python(code), 60, tmp_path / "log")
    assert (outcome.status, outcome.note) == ("failed", "exit code 3: lost the plot")


def test_a_step_out_of_time_is_interrupted_and_may_speak(tmp_path):
    code = """
import time
try:
    print("started", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("2 failed so far")
"""
    outcome = gpu.run_step(python(code), 2, tmp_path / "log")
    assert (outcome.status, outcome.note) == ("out of time", "2 failed so far")
    assert outcome.seconds < 30


def test_a_step_that_ignores_the_interrupt_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('x'); time.sleep(0.05)"
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", {child!r}])
while True: time.sleep(1)
"""
    outcome = gpu.run_step(python(code), 2, tmp_path / "log")
    assert outcome.status == "out of time"
    size = beat.stat().st_size
    assert size > 0
    time.sleep(0.3)
    assert beat.stat().st_size == size


# ---- the steps themselves --------------------------------------------------------------------------------------------


def test_what_tells_most_comes_first(tmp_path):
    names = [step.name for step in gpu.plan("NVIDIA H100 80GB HBM3", tmp_path)]
    assert names[:5] == ["environment", "tests", "numerics", "attention", "train"]
    assert names[-1] == "report" and len(set(names)) == len(names)


def test_the_hopper_kernels_are_tried_on_hoppers_after_what_must_not_be_lost(tmp_path):
    names = [step.name for step in gpu.plan("NVIDIA H200", tmp_path)]
    first = names.index("hopper-tests")
    assert names.index("attention") < first
    assert names[first : first + 3] == ["hopper-tests", "hopper-model-tests", "attention-hopper"]
    steps = {step.name: step.command for step in gpu.plan("NVIDIA H200", tmp_path)}
    assert (gpu.ROOT / gpu.HOPPER_TESTS).is_file() and gpu.HOPPER_TESTS in steps["hopper-tests"]
    for other in ("NVIDIA A100-SXM4-80GB", "CPU"):
        assert not any("hopper" in step.name for step in gpu.plan(other, tmp_path))


def test_the_tests_that_run_are_those_that_use_the_device(tmp_path):
    steps = {step.name: step.command for step in gpu.plan("NVIDIA H100 80GB HBM3", tmp_path)}
    assert steps["tests"][-1] == "device and not deep" and steps["tests-deep"][-1] == "device and deep"


@pytest.mark.parametrize("device_name", ["NVIDIA H100 80GB HBM3", "CPU"])
def test_every_bench_step_has_flags_that_parse_and_files_of_its_own(device_name, tmp_path, monkeypatch):
    parsed = {}
    monkeypatch.setattr(harness, "main", lambda bench, args: parsed.update({bench.name: args}))
    mains = {"attention": attention.main, "softmax": softmax.main, "layernorm": layernorm.main}
    mains |= {"cross_entropy": cross_entropy.main, "linear_cross_entropy": linear_cross_entropy.main}
    files = {}
    for step in gpu.plan(device_name, tmp_path, commit="abc123"):
        script, *flags = step.command[1:]
        assert script == "-m" or (gpu.ROOT / script).is_file()
        bench = Path(script).stem
        if bench in mains:
            mains[bench](flags)
            files[step.name] = output.file_name(bench, parsed[bench].label)
        elif bench == "train":
            parsed[bench] = train.parse(flags)
            compiled = "-compiled" * parsed[bench].compile
            files[step.name] = output.file_name(bench + compiled, parsed[bench].label)
            train.settings_of(parsed[bench], torch.device("cuda" if device_name != "CPU" else "cpu"))
        elif bench == "curves":
            parsed[bench] = curves.parse(flags)
            files[step.name] = bench
        else:
            continue
        assert parsed[bench].out == str(tmp_path / "results" / table.folder_name(device_name))
        assert parsed[bench].commit == "abc123"
    hopper = ["attention-hopper"] * ("H100" in device_name)
    expected = ["attention", "train", "attention-gpt2", *hopper, "softmax", "layernorm", "linear_cross_entropy"]
    expected += ["cross_entropy", "train-compiled", "attention-dropout", "train-long", "attention-slow", "curves"]
    assert list(files) == expected
    if device_name != "CPU":
        assert list(files.values()) == expected, "no two steps write one file"


def test_a_memory_checker_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setattr(memcheck, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(memcheck, "find_tool", lambda: None)
    memcheck.main([])
    assert "not installed" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 9])
def test_the_memory_checker_runs_the_calls_and_is_heard(code, tmp_path, monkeypatch, capsys):
    """With a tool that only says how it was called."""
    tool = tmp_path / memcheck.TOOL
    tool.write_text(f"#!/bin/sh\necho $PYTORCH_NO_CUDA_MEMORY_CACHING $* > {tmp_path}/said\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(memcheck, "choose_device", lambda name: torch.device("cuda"))
    assert command.run(memcheck.main, ["--device", "cuda"]) == (2 if code else 0)
    said = (tmp_path / "said").read_text()
    assert said.startswith("1 --tool memcheck") and "memcheck.py --unchecked --device cuda" in said
    assert ("exit code 9" in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize(
    ("flags", "found", "words"),
    [
        (["--only", "tests,nonsense"], ("GPU", None), "nonsense is unknown; steps: environment, tests"),
        ([], ("", "torch 2.13.0 sees no GPU here"), "sees no GPU"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_2(flags, found, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "probe", lambda device: found)
    assert gpu.main([*flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flags", "words"), [(["--minutes", "0"], "--minutes 0"), (["--bogus"], "--bogus")])
def test_a_wrong_flag_is_one_line(flags, words, capsys):
    assert command.run(gpu.main, flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
