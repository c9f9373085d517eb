"""Values of flags: what each type takes, and one line for what it does not."""

import argparse

import pytest

from gptlib import convert, flags, generate, prepare, train


@pytest.mark.parametrize(
    "kind, text, message",
    [
        (flags.positive_int, "abc", "'abc' is not a positive integer"),
        (flags.positive_int, "1.5", "'1.5' is not a positive integer"),
        (flags.positive_int, "0", "0 is not at least 1"),
        (flags.positive_int, str(2**63), "is not below 2^63"),
        (flags.non_negative_int, "", "'' is not an integer of at least 0"),
        (flags.non_negative_int, "-1", "-1 is negative"),
        (flags.non_negative_int, "x", "'x' is not an integer of at least 0"),
        (flags.non_negative_int, str(2**63), "is not below 2^63"),
        (flags.positive_float, "fast", "'fast' is not a positive number"),
        (flags.positive_float, "inf", "inf is not a positive number"),
        (flags.non_negative_float, "x", "'x' is not a number of at least 0"),
        (flags.non_negative_float, "nan", "nan is not a number of at least 0"),
        (flags.fraction, "half", "'half' is not a number above 0 and at most 1"),
        (flags.fraction, "0", "0 is not above 0 and at most 1"),
        (flags.below_one, "x", "'x' is not a number of at least 0 and below 1"),
        (flags.below_one, "1", "1 is not at least 0 and below 1"),
        (flags.file_name, "", "the name is empty"),
    ],
)
def test_what_a_flag_refuses(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as e:
        kind(text)
    assert message in str(e.value)


@pytest.mark.parametrize(
    "command, arguments, flag",
    [
        (train, ["--out", ""], "--out"),
        (train, ["--data", "README.md", ""], "--data"),
        (prepare, ["--cache-dir", ""], "--cache-dir"),
        (prepare, ["--data", ""], "--data"),
        (generate, ["--run", ""], "--run"),
        (convert, ["--from-hf", "", "--out", "out"], "--from-hf"),
        (convert, ["--to-hf", "", "--out", "out"], "--to-hf"),
        (convert, ["--to-hf", "run", "--out", ""], "--out"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_an_empty_name_is_not_the_current_folder(command, arguments, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: argument {flag}: the name is empty; name a file or folder")
    assert not list(tmp_path.iterdir())
