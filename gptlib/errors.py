"""A user's mistakes, and the command lines that report them."""

import argparse
import contextlib
import os
import sys


class UserError(Exception):
    """Bad input from the user: one clear line that says what, why and what to do; a command line exits with code 2."""


def kind_of(x):
    """A tensor's dtype and shape in words, "float32 (3, 4)"; of anything else its type's name."""
    if not hasattr(x, "dtype"):
        return type(x).__name__
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


@contextlib.contextmanager
def writing(path, *errors):
    """What keeps a file from being written, such as a full disk (OSError, or one of `errors`), becomes a UserError with
    the path and the reason."""
    try:
        yield
    except (OSError, *errors) as e:
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())
        raise UserError(f"{path} cannot be written: {reason}; make room there, or name another folder") from e


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def exit_status(command):
    """What `command()` returns, 0 for None; 2 and one line on stderr for a user's mistake or a file that the system
    refuses, 130 when interrupted, 141 when nobody reads its output any longer, as after `| head`."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what a terminal cannot show
    try:
        status = command() or 0
        print(end="", flush=True)
        return status
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as e:
        print(f"error: {e.filename or 'the output'}: {e.strerror or e}", file=sys.stderr)
        if e.filename is None:
            _drop_output()
        return 2


def _drop_output():
    """What is left in the buffer of stdout goes nowhere when Python exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
