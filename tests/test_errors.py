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


@pytest.mark.parametrize("redirected", [">&-", "> /dev/full"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_output_that_cannot_be_written(redirected, encoding):
    code = "import sys; from gptlib.errors import exit_status; sys.exit(exit_status(lambda: print('\\u20ac')))"
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{code}" {redirected}'],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    full = "full" in redirected
    assert (done.returncode, done.stderr) == ((2, "error: the output: No space left on device\n") if full else (0, ""))


def test_characters_that_a_terminal_lacks_are_replaced():
    code = "import sys; from gptlib.errors import exit_status; sys.exit(exit_status(lambda: print('a\\u20acb')))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a?b\n", b"")


def test_a_file_that_the_system_refuses_is_one_line(capsys):
    assert exit_status(lambda: Path("/" + "a" * 300).read_text()) == 2
    assert capsys.readouterr().err == f"error: /{'a' * 300}: File name too long\n"
