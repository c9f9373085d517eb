"""Whole runs beside the reference's: distances by hand, the verdict, real trainings of a few steps, bad input."""

import contextlib
import json
import math
import subprocess
import sys

import pytest

from bench import command, curves, environment, report, spread, table
from gptlib import reference, train
from gptlib.device import choose_device
from tests import trainer

SHAPE = ["--n-layers", "1", "--n-heads", "2", "--emb-dim", "32", "--context-length", "32", "--tokenizer", "bytes"]
SEEDS = [0, 1]


def run_of(losses, val):
    """Rows of a run by hand: a training loss every ten steps, the validation loss of every second one."""
    return [
        {"step": 10 * i, "train_loss": loss, "val_loss": None if i % 2 else v}
        for i, (loss, v) in enumerate(zip(losses, val, strict=True), 1)
    ]


BASE = run_of([5.0, 4.0, 3.0, 2.0], [None, 4.1, None, 2.1])
SECOND = run_of([5.1, 4.0, 2.9, 2.2], [None, 4.2, None, 2.1])


def judged(run):
    runs = {(spread.BASE, 0): BASE, (spread.BASE, 1): SECOND} | ({("mine+torch", 0): run} if run else {})
    _, (verdict,) = spread.judge(runs, ["mine+torch"], SEEDS)
    return verdict


def test_the_distance_is_what_its_names_say():
    found = spread.distance(SECOND, BASE)
    assert found["train_rms"] == pytest.approx(math.sqrt((0.1**2 + 0.1**2 + 0.2**2) / 4))
    assert found["train_max"] == pytest.approx(0.2)
    assert found["val_rms"] == pytest.approx(math.sqrt(0.1**2 / 2))
    assert found["val_last"] == 0.0, "of the last evaluation alone: by chance nothing, and so it is not judged"


def test_the_same_curve_is_within_and_the_other_seed_is_the_limit():
    same, limit = judged(BASE), judged(SECOND)
    assert same["within"] and same["ratio"] == 0 and same["train_max"] == 0
    assert limit["within"] and limit["ratio"] == 1


@pytest.mark.parametrize(
    ("losses", "val", "ratio"),
    [
        ([5.15, 4.15, 3.15, 2.15], [None, 4.1, None, 2.1], 1.22),  # farther on the whole
        ([5.0, 4.0, 3.0, 2.21], [None, 4.1, None, 2.1], 1.05),  # once too far
        ([5.0, 4.0, 3.0, 2.0], [None, 4.1, None, 2.25], 1.5),  # the same training, another validation loss
    ],
)
def test_any_of_the_three_can_put_a_run_outside(losses, val, ratio):
    found = judged(run_of(losses, val))
    assert not found["within"] and found["ratio"] == pytest.approx(ratio, abs=0.01)


def test_a_run_that_ended_early_or_has_no_number_is_outside():
    early, missing = judged(BASE[:3]), judged(None)
    assert not early["within"] and early["ratio"] is None and early["note"] == "ended after step 30, of 40"
    assert not missing["within"] and missing["note"] == "did not start, of 40"
    assert not judged(run_of([5.0, 4.0, math.nan, 2.0], [None, 4.1, None, 2.1]))["within"]
    assert not judged(run_of([5.0, 4.0, 3.0, 2.0], [None, 4.1, None, math.nan]))["within"]
    with pytest.raises(ValueError, match="same steps"):
        spread.distance(BASE[1:], BASE[:3])


# ---- real trainings --------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """The trainer in this process, and the folder with a small text that it runs in."""

    def start_trainer(flags, log):
        with open(log, "w") as words, contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
            return train.main(flags)

    monkeypatch.setattr(curves, "start_trainer", start_trainer)
    monkeypatch.chdir(tmp_path)
    trainer.real_text(tmp_path / "text")
    return tmp_path


def compare(*flags, device="cpu", passed=()):
    """Exit code of the command with a small model."""
    small = ["--preset", "tiny", "--steps", "12", "--batch-size", "4", "--data", "text", "--device", device]
    return command.run(curves.main, [*small, *flags, "--", *SHAPE, "--lr", "1e-2", *passed])


def attends_to_everything(q, k, v, *, scale=None, dropout_p=0.0):
    return 30 * (q @ k.transpose(-2, -1)).softmax(-1) @ v


def test_a_right_attention_is_within_and_a_wrong_one_outside(in_process, device, capsys):
    wrong = f"{__name__}:attends_to_everything"
    assert compare("--attn", f"reference,sdpa,{wrong}", "--out", "out", "--commit", "abc", device=device) == 1
    facts = json.loads((in_process / "out" / "curves.json").read_text())
    right, outside = facts["verdicts"]
    assert right["provider"] == "sdpa+reference" and right["within"] and right["ratio"] < 0.2
    assert outside["provider"] == f"{wrong}+reference" and not outside["within"] and outside["ratio"] > 1
    assert f"outside the spread: {wrong}+reference" in capsys.readouterr().out
    assert (
        facts["complete"] and facts["commit"] == "abc" and facts["model"]["drop_rate"] == 0 and len(facts["runs"]) == 4
    )
    assert all("--warmup-steps 6 " in run["command"] and run["exit"] == 0 for run in facts["runs"])

    rows = table.read_csv(in_process / "out" / "curves.csv")
    runs = spread.runs_of(rows)
    assert [*runs] == [(spread.BASE, 0), (spread.BASE, 1), ("sdpa+reference", 0), (f"{wrong}+reference", 0)]
    assert all([row["step"] for row in run] == [*range(1, 13)] and run[-1]["val_loss"] for run in runs.values())
    assert rows[11]["tokens"] == 12 * 4 * 32 and rows[0]["preset"] == "tiny" and rows[0]["tokens_per_s"] > 0
    assert spread.judge(runs, [v["provider"] for v in facts["verdicts"]], SEEDS)[0] == pytest.approx(facts["spread"])
    assert not list(in_process.rglob("checkpoint")), "weights are not kept"


def test_a_run_is_made_again_and_a_report_is_drawn(in_process, capsys):
    stale = in_process / "results" / "cpu" / "curves" / "reference-reference-0"
    stale.mkdir(parents=True)
    (stale / "metrics.csv").write_text("step\n99\n")
    assert compare("--attn", "sdpa", "--norm", "torch,reference", "--seeds", "3,1", "--out", "results/cpu") == 0
    assert "all within the spread" in capsys.readouterr().out
    assert "99" not in [str(r["step"]) for r in table.read_csv(in_process / "results" / "cpu" / "curves.csv")]
    assert report.main(["--results", "results"]) == 0
    page = (in_process / "results" / "README.md").read_text()
    assert "| sdpa | torch | " in page and "| reference | reference, seed 1 | " in page and "tokens/s" not in page
    assert "](cpu/curves.png)" in page
    assert (in_process / "results" / "cpu" / "curves.png").read_bytes().startswith(b"\x89PNG")
    (result,) = report.load(in_process / "results")
    assert [line.split(":")[0] for line in report.digest(result)] == ["curves tiny"] * 2
    table.write_json(result.folder / "curves.json", {**result.facts, "complete": False, "verdicts": []})
    (cut_short,) = report.load(in_process / "results")
    assert report.pictures(cut_short) == [] and "cut short" in report.results_page([cut_short], in_process / "results")


def breaks_late(q, k, v, *, scale=None, dropout_p=0.0):
    out = reference.causal_attention(q, k, v, scale=scale)
    return out * (math.nan if q.shape[2] == 32 else 1)


def test_a_contestant_that_cannot_train_is_outside_and_the_others_are_judged(in_process, capsys):
    assert compare("--attn", f"{__name__}:breaks_late,sdpa", "--out", "out") == 1
    bad, good = json.loads((in_process / "out" / "curves.json").read_text())["verdicts"]
    assert not bad["within"] and bad["note"] == "did not start, of 12" and good["within"]
    assert "the trainer ended with exit code 2" in capsys.readouterr().out


def test_without_a_reference_there_is_nothing_to_compare(in_process, monkeypatch, capsys):
    monkeypatch.setattr(curves, "start_trainer", lambda flags, log: 1)
    assert compare("--attn", "sdpa", "--out", "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: reference+reference, seed 0, ") and error.count("\n") == 1
    assert not (in_process / "out" / "curves.csv").exists()


def test_an_interrupted_training_leaves_no_weights(in_process, monkeypatch):
    def interrupted(flags, log):
        (folder / "checkpoint.partial").mkdir(parents=True)
        (folder / "metrics.csv").write_text("step")
        raise KeyboardInterrupt

    args = curves.parse(["--attn", "sdpa", "--preset", "tiny", "--steps", "3", "--out", "out"])
    training = curves.trainings_of(args)[0]
    folder = training.folder("out")
    monkeypatch.setattr(curves, "start_trainer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        curves.run(training, args, choose_device("cpu"))
    assert [path.name for path in folder.iterdir()] == ["metrics.csv"]


def test_the_trainer_runs_as_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(subprocess, "call", lambda words, **how: asked.append((words, how)) or 0)
    assert curves.start_trainer(["--steps", "1"], tmp_path / "log") == 0
    ((words, how),) = asked
    assert words == [sys.executable, "-m", "gptlib.train", "--steps", "1"]
    assert how["env"]["PYTHONPATH"].split(":")[0] == str(environment.ROOT)


@pytest.mark.deep
def test_the_script_itself_in_a_folder_of_its_own(tmp_path):
    data = trainer.real_text(tmp_path / "text")
    words = [sys.executable, str(environment.ROOT / "bench" / "curves.py"), "--device", "cpu", "--preset", "tiny"]
    words += ["--attn", "sdpa", "--steps", "3", "--data", data, "--out", "out", "--", *SHAPE]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all within the spread" in done.stdout and (tmp_path / "out" / "curves.csv").exists()


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, log_every, eval_every", [(5, 1, 1), (20, 1, 2), (200, 5, 20), (1000, 25, 100)])
def test_losses_and_evaluations_are_spread_over_the_run(steps, log_every, eval_every):
    args = curves.parse(["--attn", "sdpa", "--steps", str(steps), "--preset", "tiny", "--", "--eval-windows", "7"])
    flags = train.options.parse(curves.flags_of(curves.Training("sdpa", "torch", 4), args, choose_device("cpu")))
    assert (flags.log_every, flags.eval_every, flags.eval_windows) == (log_every, eval_every, 7)
    assert flags.warmup_steps == min(150, steps // 2)
    assert (flags.attn, flags.norm, flags.seed, flags.drop_rate, flags.steps) == ("sdpa", "torch", 4, 0, steps)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--attn", "sdpb"], ["sdpb", "triton-softmax"]),
        (["--attn", "no.such:thing"], ["no.such:thing"]),
        (["--norm", "batch"], ["batch"]),
        (["--seeds", "1"], ["two different seeds"]),
        (["--seeds", "2,2"], ["two different seeds"]),
        (["--steps", "0"], ["--steps"]),
        (["--preset", "gpt9"], ["gpt9", "seed-124m"]),
        (["--attn", "reference"], ["nothing to compare"]),
        (["--data", "/no/where"], ["/no/where"]),
        (["--", "--seed", "3"], ["--seed", "--"]),
        (["--", "--resume"], ["--resume"]),
        (["--", "--n-heads", "3"], ["emb_dim 128"]),
        (["--", "--nonsense"], ["--nonsense"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.run(curves.main, ["--device", "cpu", "--out", "out", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words), error
    assert not list(tmp_path.iterdir())
