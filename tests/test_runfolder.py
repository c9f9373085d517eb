"""Run folders that are damaged, taken or not writable: one line that says so, and nothing lost."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptlib import options, runfolder
from gptlib.device import choose_device
from gptlib.errors import UserError
from gptlib.metrics import read_metrics
from tests import trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runfolder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, _, err = trainer.run(
            "--steps", 2, "--log-every", 1, "--out", "run", data=trainer.real_text(folder / "text")
        )
    assert code == 0, err
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of the trained run, as the folder `run` of the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, "run"))


def refused(*flags, message, data=None):
    code, out, err = trainer.run(*flags, "--out", "run", data=data)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "{}", "null"])
def test_a_config_that_is_no_config_is_refused(run, text):
    (run / "config.json").write_text(text)
    refused("--resume", message="run/config.json is damaged (")


@pytest.mark.parametrize("arguments", [None, [], {}, "lr"])
def test_arguments_that_are_none_are_refused(run, arguments):
    rewrite(run / "config.json", arguments=arguments)
    refused("--resume", message=f"run/config.json is damaged (arguments is {arguments!r}, not the run's)")


@pytest.mark.parametrize(
    "name, value",
    [
        ("preset", "zzz"),
        ("preset", None),
        ("lr", "abc"),
        ("lr", "0.001"),
        ("lr", None),
        ("lr", float("nan")),
        ("dtype", "qq"),
        ("data", "README.md"),
        ("data", [1]),
        ("data", []),
        ("data", ["README.md", None]),
        ("steps", True),
        ("steps", 2.5),
        ("compile", "yes"),
        ("n_layers", {}),
        ("device", 3),
    ],
)
def test_arguments_that_no_flag_takes_are_refused(run, name, value):
    arguments = json.loads((run / "config.json").read_text())["arguments"]
    rewrite(run / "config.json", arguments=arguments | {name: value})
    refused("--resume", message=f"run/config.json is damaged ({name} is {value!r}); --resume needs it")


@pytest.mark.parametrize(
    "flags",
    [
        ("--data=-a", "--no-compile", "--tie-weights", "--lr", "1e-3", "--attn", "package.module:function"),
        (
            "--preset",
            "gpt2",
            "--data",
            "a",
            "b",
            "--compile",
            "--no-qkv-bias",
            "--drop-rate",
            0,
            "--final-lr",
            0,
            "--device",
            "cpu",
        ),
    ],
)
def test_arguments_come_back_as_they_were_given(tmp_path, flags):
    args = options.complete(options.parse([str(f) for f in flags]), choose_device("cpu"))
    arguments = vars(args) | {"help": True}  # as a flag of another version would be
    (tmp_path / "config.json").write_text(json.dumps({"arguments": arguments}))
    assert runfolder.stored_arguments(tmp_path) == arguments


def test_an_imported_model_has_no_training_to_resume(run):
    (run / "config.json").write_text(json.dumps({"converted_from": "gpt2", "model": {}, "tokenizer": {}}))
    refused("--resume", message="run is an imported model, with no training to resume; it can be sampled from")


def test_a_run_without_a_checkpoint_can_only_be_overwritten(run):
    shutil.rmtree(run / "checkpoint")
    with pytest.raises(UserError, match="ended before its first checkpoint; add --overwrite to replace its files") as e:
        runfolder.refuse_taken("run", resume=False, overwrite=False)
    assert "--resume" not in str(e.value)
    runfolder.refuse_taken("run", resume=False, overwrite=True)


def test_a_row_that_was_cut_off_does_not_end_the_run(run):
    with open(run / "metrics.csv", "a") as f:
        f.write("3,1536,4.9e-")
    code, _, err = trainer.run("--resume", "--steps", 4, "--out", "run")
    assert code == 0, err
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == [1, 2, 3, 4]


def test_damaged_metrics_are_refused_before_anything_is_written(run):
    (run / "metrics.csv").write_text("epoch,loss\n1,2\n")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    refused("--resume", "--steps", 4, message="run/metrics.csv does not begin with the columns")
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["config.json.partial", "metrics.csv.partial"])
def test_a_folder_that_cannot_be_written_is_one_line(run, name):
    (run / name).mkdir()  # in the way of the file
    refused("--resume", "--steps", 4, message=" cannot be written: Is a directory; make room there")


def test_a_run_that_cannot_be_emptied_is_one_line(run, trained):
    (run / "loss.png").unlink()
    (run / "loss.png").mkdir()
    refused("--overwrite", message="run cannot be written: Is a directory", data=str(trained.parent / "text"))


def test_a_place_for_runs_that_is_none_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file")
    with pytest.raises(UserError, match="runs/tiny-sdpa cannot be written: Not a directory"):
        runfolder.claim(SimpleNamespace(out=None, preset="tiny", attn="sdpa"))
