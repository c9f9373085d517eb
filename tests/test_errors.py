"""Every command ends with a status and one line at most: mistakes, Ctrl-C, a reader that has left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptlib import convert, errors, generate, prepare, train
from gptlib.errors import UserError, exit_status

COMMANDS = [train, generate, prepare, convert]
ROOT = Path(errors.__file__).parents[1]


def raising(error):
    def command(*_):
        raise error

    return command


@pytest.mark.parametrize("returned, status", [(None, 0), (0, 0), (143, 143)])
def test_the_status_is_what_the_command_returns(returned, status):
    assert exit_status(lambda: returned) == status


@pytest.mark.parametrize("command", COMMANDS, ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    "error, status, said", [(KeyboardInterrupt(), 130, ""), (UserError("a b, c"), 2, "error: a b, c\n")], ids=repr
)
def test_no_command_ends_in_a_traceback(command, error, status, said, monkeypatch, capsys):
    monkeypatch.setattr(errors.Parser, "parse_args", raising(error))
    assert command.main([]) == status
    assert capsys.readouterr() == ("", said)


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_status(raising(ZeroDivisionError()))


@pytest.mark.parametrize("lines", [1, 100_000], ids=["found when Python exits", "found while printing"])
def test_a_reader_that_has_left_ends_the_command_quietly(lines):
    code = f"import sys\nfrom gptlib.errors import exit_status\ndef say():\n    print('text\\n' * {lines})\n"
    left, pipe = os.pipe()
    os.close(left)
    with os.fdopen(pipe) as stdout:
        done = subprocess.run(
            [sys.executable, "-c", f"{code}sys.exit(exit_status(say))"],
            cwd=ROOT,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (141, "")
